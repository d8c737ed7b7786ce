"""accelerate."""

import pytest
import torch

from cases import assert_equal, weights
from slimstate.optim import LISA, create, in_backward
from small import batch, llama

accelerate = pytest.importorskip("accelerate")


@pytest.fixture(autouse=True)
def forgotten():
    """Accelerators share their state."""
    yield
    accelerate.state.AcceleratorState._reset_state(reset_partial_state=True)
    accelerate.state.GradientState._reset_state()


def prepared(name, dtype=torch.float32, micro_batches=1, per_layer=False):
    accelerator = accelerate.Accelerator(cpu=True, gradient_accumulation_steps=micro_batches)
    model = llama(dtype)
    optimizer = create(name, model, lr=1e-2, decay="matrices")
    mode = in_backward(optimizer, 0.5, early_bases=True) if per_layer else None
    schedule = torch.optim.lr_scheduler.StepLR(optimizer, 2, 0.5)
    return accelerator, *accelerator.prepare(model, optimizer, schedule), mode


def train(accelerator, model, optimizer, schedule, mode, start, stop):
    for i in range(start, stop):
        with accelerator.accumulate(model):
            accelerator.backward(model(**batch(i)).loss)
            if accelerator.sync_gradients and mode is None:
                accelerator.clip_grad_norm_(model.parameters(), 0.5)
            optimizer.step()
            schedule.step()
            optimizer.zero_grad()


@pytest.mark.parametrize("per_layer", [False, True])
def test_a_prepared_loop_is_the_plain_one(per_layer):
    run = prepared("galore_adamw", micro_batches=2, per_layer=per_layer)
    train(*run, 0, 8)
    model = llama()
    optimizer = create("galore_adamw", model, lr=1e-2, decay="matrices")
    if per_layer:
        in_backward(optimizer, 0.5, early_bases=True)
    schedule = torch.optim.lr_scheduler.StepLR(optimizer, 2, 0.5)
    for i in range(0, 8, 2):
        for j in (i, i + 1):
            (model(**batch(j)).loss / 2).backward()
        if not per_layer:
            assert torch.nn.utils.clip_grad_norm_(model.parameters(), 0.5) > 0.5
        optimizer.step()
        schedule.step()
        optimizer.zero_grad()
    assert_equal(weights(run[1]), weights(model))
    assert run[2].param_groups[0]["lr"] == 1e-2 / 4


@pytest.mark.parametrize(
    ("name", "dtype"),
    [
        ("galore_adamw_8bit", torch.float32),
        ("frugal", torch.bfloat16),
        pytest.param("adamw", torch.bfloat16, marks=pytest.mark.slow),
        pytest.param("dct_adamw", torch.float32, marks=pytest.mark.slow),
    ],
)
def test_a_saved_state_goes_on_as_if_nothing_had_happened(name, dtype, tmp_path):
    accelerator, *whole = prepared(name, dtype)
    train(accelerator, *whole, 0, 3)
    accelerator.save_state(tmp_path)
    train(accelerator, *whole, 3, 6)
    accelerator, *resumed = prepared(name, dtype)
    torch.default_generator.manual_seed(7)
    accelerator.load_state(tmp_path)
    train(accelerator, *resumed, 3, 6)
    assert_equal(weights(whole[0]), weights(resumed[0]))
    assert_equal(whole[1].state_dict(), resumed[1].state_dict())


def test_a_step_that_overflows_is_skipped_and_said_to_be():
    """With the scaler of mixed precision, which accelerate lets through by a `step` of its own on the optimizer."""
    accelerate.Accelerator(cpu=True)
    model = llama()
    scaler = torch.amp.GradScaler("cpu", init_scale=8.0)
    optimizer = accelerate.optimizer.AcceleratedOptimizer(create("galore_adamw", model, lr=1e-2), scaler=scaler)
    other = llama()
    plain = create("galore_adamw", other, lr=1e-2)
    for i in range(4):
        optimizer.zero_grad()
        scaler.scale(model(**batch(i)).loss).backward()
        plain.zero_grad()
        other(**batch(i)).loss.backward()
        if i == 2:
            model.lm_head.weight.grad[0, 0] = torch.inf
            before = weights(model)
        optimizer.step()
        assert optimizer.step_was_skipped == (i == 2)
        if i == 2:
            assert_equal(before, weights(model))
        else:
            plain.step()
    assert scaler.get_scale() == 4.0
    assert_equal(weights(model), weights(other))  # scaled by powers of two


def test_a_scaler_is_refused_in_the_per_layer_mode():
    accelerate.Accelerator(cpu=True)
    model = llama()
    scaler = torch.amp.GradScaler("cpu")
    optimizer = create("galore_adamw", model)
    in_backward(optimizer, early_bases=True)
    optimizer = accelerate.optimizer.AcceleratedOptimizer(optimizer, scaler=scaler)
    scaler.scale(model(**batch(0)).loss).backward()
    with pytest.raises(RuntimeError, match="GradScaler does not see gradients that were projected"):
        optimizer.step()


def test_a_sampler_is_saved_with_the_rest(tmp_path):
    runs = []
    for _ in range(2):
        accelerator, *run = prepared("adamw")
        sampler = LISA(accelerator.unwrap_model(run[0]), run[1].optimizer, active=1, interval=4)
        sampler.attach()
        accelerator.register_for_checkpointing(sampler)
        runs.append((accelerator, *run))
        if len(runs) == 1:
            train(*runs[0], 0, 3)
            accelerator.save_state(tmp_path)
            train(*runs[0], 3, 6)
    accelerator.load_state(tmp_path)
    train(*runs[1], 3, 6)
    assert_equal(weights(runs[0][1]), weights(runs[1][1]))
    assert_equal(runs[0][2].state_dict(), runs[1][2].state_dict())
