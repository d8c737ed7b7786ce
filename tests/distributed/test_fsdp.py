"""Networks that torch divides, in real processes, train as in one."""

import pytest
import torch

import fully_sharded
from slimstate.optim import LISA, OwLore
from world import world

NAMES = ["AdamW", "AdamP", "SGDP", "GaLoreAdamW, svd, rotate", "GaLoreAdamW, power, keep", "GaLoreAdamW, random, reset"]
NAMES += ["FRUGAL, columns", "FRUGAL, svd, sgdm, sgd", "GaLoreAdafactor, beta1", "GradNormLoRP, svd, rotate"]
NAMES += ["DCTAdamW, every third", "DCTAdamW, hadamard, errors"]
ALWAYS = ("AdamW", "GaLoreAdamW, svd, rotate", "FRUGAL, columns")  # the others in `make test-all`
ROWS = [name if name in ALWAYS else pytest.param(name, marks=pytest.mark.slow) for name in NAMES]
# What refuses to be divided along its compressed side, and says what to use; see the tests of each.
ANYHOW = [x for x, name in zip(ROWS, NAMES, strict=True) if name != "FRUGAL, columns"]
EXACT = 1e-9  # of the distance moved, in float64
GALORE = "GaLoreAdamW, svd, rotate"


def trained(n, name, divide, *args):
    return max(world(n).run(fully_sharded.trains_as_one, name, divide, *args))


@pytest.mark.parametrize("name", NAMES)
def test_a_network_of_sharded_blocks_trains_as_a_whole_one(name):
    assert trained(2, name, fully_sharded.by_rows) < EXACT


@pytest.mark.parametrize("name", ANYHOW)
def test_so_does_one_that_is_sharded_by_columns(name):
    assert trained(2, name, fully_sharded.by_columns) < EXACT


@pytest.mark.parametrize("name", ROWS)
def test_sharded_and_plain_parameters_share_a_group(name):
    assert trained(2, name, fully_sharded.blocks_alone) < EXACT


@pytest.mark.parametrize("name", ANYHOW)
def test_a_tensor_parallel_network_trains_as_a_whole_one(name):
    assert trained(2, name, fully_sharded.tensor_parallel) < EXACT


@pytest.mark.slow
@pytest.mark.parametrize("name", ANYHOW)
def test_tensor_parallel_blocks_can_be_sharded_again(name):
    assert trained(4, name, fully_sharded.tensor_parallel_and_sharded) < EXACT


@pytest.mark.slow
@pytest.mark.parametrize("name", ROWS)
@pytest.mark.parametrize("n", [3, 4])
def test_dimensions_may_be_uneven_and_smaller_than_the_world(name, n):
    assert trained(n, name, fully_sharded.by_rows) < EXACT


@pytest.mark.slow
@pytest.mark.parametrize("name", ROWS)
def test_shards_may_have_replicas(name):
    assert trained(4, name, fully_sharded.replicated_shards) < EXACT


@pytest.mark.parametrize("name", ROWS)
def test_a_forward_pass_in_bfloat16_trains_what_is_kept_in_full(name):
    assert trained(2, name, fully_sharded.in_bfloat16) < 1e-6  # gradients are summed in float32


@pytest.mark.parametrize("name", ROWS)
@pytest.mark.parametrize("experts", [3, 1])
def test_stacks_of_experts_are_divided_by_experts(name, experts):
    assert trained(2, name, fully_sharded.experts_alone, 6, torch.float64, {"experts": experts}) < EXACT


@pytest.mark.parametrize("name", ROWS)
def test_parameters_can_be_swapped_for_sharded_ones_before_the_first_step(name):
    assert trained(2, name, fully_sharded.by_rows, 4, torch.float64, None, True) < EXACT


@pytest.mark.parametrize("name", [GALORE])
def test_gradients_are_clipped_by_the_norm_of_the_whole(name):
    assert trained(2, name, fully_sharded.by_rows, 4, torch.float64, None, False, 0.1) < EXACT


@pytest.mark.parametrize("name", ["AdamW", GALORE])
def test_a_bad_gradient_of_one_process_skips_the_step_of_all(name):
    for said, same, steps, count in world(2).run(fully_sharded.steps_that_are_skipped, name, "skip"):
        assert said is None
        assert same
        assert steps == {1}
        assert count == 1


def test_a_bad_gradient_of_one_process_raises_in_all():
    answers = world(2).run(fully_sharded.steps_that_are_skipped, GALORE, "raise")
    assert answers[0] == answers[1]
    said, same, steps, count = answers[0]
    assert "the gradients of 1 parameters are not finite, such as that of number" in said
    assert (same, steps, count) == (True, {1}, 1)


@pytest.mark.parametrize(("kind", "name"), [(LISA, "AdamW"), (OwLore, GALORE)])
def test_sampled_layers_sleep_and_wake_whole_on_all_processes(kind, name):
    answers = world(2).run(fully_sharded.sampled, kind, name, fully_sharded.by_rows)
    assert max(distance for distance, _ in answers) < EXACT
    assert answers[0][1] == answers[1][1]
    seen = answers[0][1]
    assert len({name for grads, _, _ in seen for name in grads}) > 1
    for i, (grads, awake, kept) in enumerate(seen):
        assert len(grads) == len(awake) == 1
        slept = i % 2 == 1  # the interval is over: the state of all that were awake is gone
        assert grads == awake or slept
        assert sum(kept) <= 1
        if not slept:
            assert [f"layers.{j}" for j, some in enumerate(kept) if some] == awake


@pytest.mark.parametrize("own", [False, True], ids=["the same batches", "each its own"])
@pytest.mark.parametrize("divide", [fully_sharded.by_rows, fully_sharded.tensor_parallel])
def test_outlier_scores_are_those_of_the_whole_weights_everywhere(divide, own):
    answers = world(2).run(fully_sharded.scores, divide, own)
    assert answers[0] == answers[1]
    divided, alone = answers[0]
    assert divided == alone
    assert all(0 < score < 1 for scores in alone[:2] for score in scores)


@pytest.mark.parametrize(("original", "late"), [(False, False), (True, False), (True, True)])
def test_fsdp1_is_refused_for_fully_shard(original, late):
    for answers in world(2).run(fully_sharded.flattened_by_fsdp1, original, late):
        for kind, text in answers:
            assert kind == "NotImplementedError"
            assert "torch.distributed.fsdp.fully_shard" in text


def test_sharded_parameters_are_refused_by_the_per_layer_mode():
    for early, mode, late, kept in world(2).run(fully_sharded.in_backward_is_refused):
        for kind, text in (early, late):
            assert kind == "ValueError"
            assert "divided over processes (DTensor): fully_shard frees whole gradients" in text
        assert mode is None
        assert kept == 0
