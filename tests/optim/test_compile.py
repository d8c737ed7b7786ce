"""`torch.compile(optimizer.step)`, and a step that waits for no value of the device."""

import shutil
import warnings

import pytest
import torch
from torch._dynamo.utils import counters

from cases import CASES, backward, build, contract, every, few, model, weights

LR = torch.optim.lr_scheduler


def decaying(optimizer):
    return LR.LambdaLR(optimizer, lambda i: 0.97**i)


def one_cycle(optimizer):
    return LR.OneCycleLR(optimizer, max_lr=0.05, total_steps=50)


def trained(name, dtype, backend, steps, schedule=decaying, **settings):
    """The weights after training with a scheduler; the step is compiled unless `backend` is None."""
    net = model(dtype)
    optimizer = build(name, net.parameters(), **settings)
    scheduler = None if optimizer.defaults["lr"] is None else schedule(optimizer)
    step = optimizer.step if backend is None else torch.compile(optimizer.step, backend=backend)
    for i in range(steps):
        backward(net, i)
        step()
        if scheduler is not None:
            scheduler.step()
    return weights(net)


def graphs(*arguments, **settings):
    """The weights after training with a compiled step, and how many graphs that took."""
    torch._dynamo.reset()
    counters.clear()
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        warnings.filterwarnings("ignore", category=DeprecationWarning)
        ends = trained(*arguments, **settings)
    assert not counters["recompile_limit"]
    return ends, counters["stats"]["unique_graphs"]


def assert_compiles_exactly(name, dtype, steps, **settings):
    ends, count = graphs(name, dtype, "eager", steps, **settings)
    for p, q in zip(ends, trained(name, dtype, None, steps, **settings), strict=True):
        assert torch.equal(p, q)
    assert 1 <= count <= 4


@contract("`torch.compile(optimizer.step)` takes at most 4 graphs over refreshes and schedules, and is exact")
@few
def test_a_compiled_step_is_exact_over_refreshes_and_schedules(name):
    assert_compiles_exactly(name, torch.float32, 40)


@pytest.mark.slow
@every
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_every_variant_compiles_exactly(name, dtype):
    assert_compiles_exactly(name, dtype, 40)


@pytest.mark.parametrize("name", ["AdamW", "SGDP", "GaLoreAdamW, svd, rotate", "FRUGAL, svd, sgdm, sgd"])
def test_cycled_momentum_is_compiled_once(name):
    """OneCycleLR writes betas or momentum at every step."""
    assert_compiles_exactly(name, torch.float32, 40, schedule=one_cycle)


@pytest.mark.parametrize("settings", [{}, {"compensation": True}, {"stochastic_rounding": False}])
def test_bfloat16_weights_compile_exactly_however_they_are_rounded(settings):
    assert_compiles_exactly("GaLoreAdamW, svd, rotate", torch.bfloat16, 12, **settings)


def test_a_learning_rate_as_a_tensor_a_frozen_layer_and_a_resume_recompile_no_more_than_they_change():
    torch._dynamo.reset()
    counters.clear()
    net = model()
    optimizer = build("GaLoreAdamW, svd, rotate", net.parameters(), lr=torch.tensor(0.02))
    step = torch.compile(optimizer.step, backend="eager")
    for i in range(12):
        if i in (4, 8):
            net[3].weight.requires_grad_(i == 8)
        if i == 6:
            optimizer.load_state_dict(optimizer.state_dict())
        optimizer.param_groups[0]["lr"].mul_(0.9)
        backward(net, i)
        step()
    assert counters["stats"]["unique_graphs"] <= 4
    assert not counters["recompile_limit"]


# What rounds differently where a number of the last bit differs: codes are an example of a step of 1/127.
CODED = "errors"


@pytest.mark.slow
@pytest.mark.skipif(shutil.which("g++") is None, reason="inductor needs a C++ compiler")
@few
def test_inductor_follows_within_a_hundred_thousandth_of_the_way(name):
    start = weights(model())
    ends, count = graphs(name, torch.float32, "inductor", 40)
    plain = trained(name, torch.float32, None, 40)
    moved, error = (
        torch.stack([(p - q).square().sum() for p, q in zip(plain, other, strict=True)]).sum().sqrt()
        for other in (start, ends)
    )
    assert error <= (1e-3 if CODED in name else 1e-5) * moved
    assert count <= 4


# Host synchronisation.


@contract("a step between refreshes waits for no value of the device")
@every
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_step_between_refreshes_waits_for_no_value(name, dtype, monkeypatch):
    """On the device meta there is none to wait for: reading one raises."""
    net = model(dtype).to("meta")
    gap = {"update_proj_gap": 100} if "update_proj_gap" in CASES[name][1] else {}
    optimizer = build(name, net.parameters(), weight_decay=0.1, **gap)
    for p in net.parameters():
        p.grad = torch.empty_like(p)
    monkeypatch.setattr(optimizer, "_check_gradients", lambda: None)  # which refuses this device
    optimizer._create_states()
    for p in net.parameters():
        optimizer.state[p]["step"].fill_(1)
        optimizer.state[p].get("refreshes", torch.ones(())).fill_(1)
    optimizer.step()
    assert all(optimizer.state[p]["step"].item() == 2 for p in net.parameters())


@pytest.mark.gpu
@every
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_step_between_refreshes_does_not_synchronise_the_gpu(name, dtype):
    net = model(dtype).cuda()
    gap = {"update_proj_gap": 100} if "update_proj_gap" in CASES[name][1] else {}
    optimizer = build(name, net.parameters(), **gap)
    for _ in range(2):
        for p in net.parameters():
            p.grad = torch.randn_like(p)
        optimizer.step()
    torch.cuda.set_sync_debug_mode("error")
    try:
        optimizer.step()
    finally:
        torch.cuda.set_sync_debug_mode("default")
