"""Which dimension parameters are sharded on, and who refreshes which basis."""

import pytest
import torch

import placed
from slimstate.optim import FRUGAL, AdamP, DCTAdamW, GaLoreAdamW, in_backward, shard_placement, share_refreshes
from world import world


@pytest.mark.parametrize(
    ("shape", "dim"),
    [
        ((64, 64), None),
        ((128, 64), None),
        ((64, 128), 1),
        ((64, 32, 3, 3), 1),  # 64 x 288
        ((512, 32, 3, 3), None),
        ((64, 3, 7, 7), None),  # 3 channels on 4 processes
        ((64, 130), None),
        ((64,), None),
        ((), None),
        ((8, 64, 128), None),
        ((2, 64, 128), 2),
        ((2, 128, 64), 1),
        ((2, 130, 64), None),
    ],
)
def test_the_axis_that_is_not_compressed_is_sharded_where_fsdp_can(shape, dim):
    placement = shard_placement(torch.empty(shape), processes=4)
    assert (placement and placement.dim) == dim


def test_the_processes_are_counted_where_nobody_says():
    with pytest.raises(ValueError, match="process group"):
        shard_placement(torch.empty(4, 8))


def test_processes_are_counted_from_one():
    with pytest.raises(ValueError, match="processes must be None or an int >= 1, got 0"):
        shard_placement(torch.empty(4, 8), processes=0)


def test_under_fsdp_a_step_between_refreshes_sends_nothing():
    answers = world(2).run(placed.sent_by_steps)
    first, second = answers
    assert first == second
    between, refreshing, default = first
    assert between == []
    assert refreshing
    assert default == ["c10d::allreduce_"]


def test_experts_that_are_divided_send_nothing():
    assert world(2).run(placed.sent_by_stacks) == [[], []]


def test_replicas_share_refreshes_and_train_as_without():
    for worst, decomposed in world(2).run(placed.shared_refreshes):
        assert worst == 0
        assert decomposed == {"alone": 4, "shared": 2}


def test_a_copy_shares_nothing():
    for fine in world(2).run(placed.copy_refreshes_alone):
        assert fine


@pytest.mark.parametrize(
    ("optimizer", "why"),
    [
        (torch.optim.AdamW, "AdamW has no bases"),
        (AdamP, "AdamP has no bases"),
        (DCTAdamW, "'dct' decomposes nothing"),
        (FRUGAL, "'columns' decomposes nothing"),
        (lambda params: GaLoreAdamW(params, projection="random"), "'random' decomposes nothing"),
    ],
)
def test_what_has_nothing_to_share_is_refused(optimizer, why):
    with pytest.raises(ValueError, match=why):
        share_refreshes(optimizer(torch.nn.Linear(8, 8).parameters()))


def test_bases_of_the_backward_pass_are_not_shared():
    optimizer = GaLoreAdamW(torch.nn.Linear(8, 8).parameters())
    in_backward(optimizer)
    with pytest.raises(ValueError, match="in_backward"):
        share_refreshes(optimizer)


def test_without_processes_nothing_is_shared():
    optimizer = GaLoreAdamW(torch.nn.Linear(8, 8).parameters())
    with pytest.raises(RuntimeError, match="init_process_group"):
        share_refreshes(optimizer)
