"""Weights of low precision: rounded at random they move as float32 ones on average, compensated exactly."""

import math

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

import cases
from cases import CASES, build, contract, every
from slimstate.optim import AdamW, GaLoreAdamW, state_bytes
from slimstate.projections._rounding import Rounding, narrow_, widen
from training import gradients, run

LOW = [torch.bfloat16, torch.float16]
STEPS = 200
UNIT = {torch.bfloat16: 2**-7, torch.float16: 2**-10}  # in the last place, of numbers from 1 to 2


def ones(dtype):
    return [torch.nn.Parameter(torch.ones(shape, dtype=dtype)) for shape in ((48, 96), (64,))]


def trained(name, dtype, **settings):
    """Weights of 1 after 200 updates of about 1e-3, by the same gradients whatever the dtype."""
    params = ones(dtype)
    scale = {"scale": 1.0} if "scale" in build(name, ones(dtype)).defaults else {}
    lr = {} if CASES[name][2].get("lr", 0) is None else {"lr": 1e-3}
    optimizer = build(name, params, **scale, **lr, weight_decay=0.0, **settings)
    generator = torch.Generator().manual_seed(0)
    for _ in range(STEPS):
        for p in params:
            noise = torch.randn(p.shape, generator=generator)
            p.grad = (1 + 0.1 * noise).to(torch.bfloat16).to(dtype)
        optimizer.step()
    return [p.detach().double() for p in params]


@contract("200 updates of 1e-3 take a bfloat16 or float16 weight of 1 where they take a float32 one, on average")
@every
@pytest.mark.parametrize("dtype", LOW)
def test_weights_of_low_precision_move_as_float32_ones_do(name, dtype):
    if "compensation" in CASES[name][2]:
        pytest.skip("exact, see below")
    for p, q in zip(trained(name, dtype), trained(name, torch.float32), strict=True):
        deviation = UNIT[dtype] / 2 * math.sqrt(STEPS / p.numel())  # at most, of the mean of so many roundings
        if "GradNormLoRP" in name and p.ndim > 1:  # where a row turns to depends on how its noise turned it before
            p, q = p.norm(dim=1) / q.shape[1] ** 0.5, q.norm(dim=1) / q.shape[1] ** 0.5
        moved = (q - 1).abs().mean()
        assert (p.mean() - q.mean()).abs() <= 5 * deviation + 0.01 * moved
        assert moved > 3 * deviation


@contract("with `compensation`, bfloat16 and float16 weights are float32 ones, rounded")
@every
@pytest.mark.parametrize("dtype", LOW)
def test_compensated_weights_are_float32_ones_rounded(name, dtype):
    nets = [cases.model(dtype), cases.model(dtype).float()]
    common = {"compensation": True, "moment_dtype": "float32"}
    extra = {} if "error_feedback" not in CASES[name][1] else {"error_feedback": None}  # kept in the weight's dtype
    optimizers = [build(name, net.parameters(), **common, **extra) for net in nets]
    for i in range(8):
        cases.backward(nets[0], i)
        for p, q in zip(*(net.parameters() for net in nets), strict=True):
            q.grad = p.grad.float()
        for optimizer in optimizers:
            optimizer.step()
    for p, q in zip(*(net.parameters() for net in nets), strict=True):
        kept = widen(p.detach(), optimizers[0].state[p]["compensation"], torch.float32)
        torch.testing.assert_close(kept, q.detach(), rtol=3e-6, atol=3e-7)
        assert (kept - p.detach().float()).abs().max() <= UNIT[dtype] / 2 * kept.abs().max()


def test_rounded_to_nearest_without_either_a_weight_never_moves():
    p = torch.nn.Parameter(torch.ones(4, dtype=torch.bfloat16))
    run(AdamW([p], lr=1e-3, weight_decay=0.0, stochastic_rounding=False), [p], [[torch.ones_like(p)]] * 50)
    assert torch.equal(p, torch.ones_like(p))


@pytest.mark.parametrize("dtype", [*LOW, torch.float32])
def test_compensation_costs_two_bytes_a_weight_of_low_precision(dtype):
    sizes = []
    for compensation in (False, True):
        params = [torch.nn.Parameter(torch.ones(shape, dtype=dtype)) for shape in ((12, 20), (7,))]
        optimizer = GaLoreAdamW(params, rank=3, compensation=compensation)
        run(optimizer, params, [[torch.randn_like(p) for p in params]])
        sizes.append(state_bytes(optimizer))
    assert sizes[1] - sizes[0] == (0 if dtype == torch.float32 else 2 * (12 * 20 + 7))


def test_compensated_weights_can_be_changed_between_steps():
    """What was left behind is at most half a unit of the weight that was there."""
    p = torch.nn.Parameter(torch.ones(6, 8, dtype=torch.bfloat16))
    optimizer = GaLoreAdamW([p], rank=2, lr=1e-3, compensation=True)
    grads = gradients((6, 8), 6, torch.bfloat16)
    run(optimizer, [p], [[g] for g in grads[:3]])
    with torch.no_grad():
        p.mul_(2)
    run(optimizer, [p], [[g] for g in grads[3:]])
    assert (p - 2).abs().max() < 0.05


def round_trip(x, dtype):
    w, low = torch.empty(x.shape, dtype=dtype), torch.empty(x.shape, dtype=torch.int16)
    narrow_(w, x, Rounding(low=low))
    return w, widen(w, low, torch.float32)


@given(bits=st.lists(st.integers(-(2**31), 2**31 - 1), min_size=1, max_size=40))
def test_a_bfloat16_and_the_rest_are_every_float32(bits):
    x = torch.tensor(bits, dtype=torch.int32).view(torch.float32)
    w, kept = round_trip(x, torch.bfloat16)
    assert torch.equal(kept.nan_to_num(0.5), x.nan_to_num(0.5))
    assert torch.equal(kept.isnan(), x.isnan())
    assert torch.equal(w.isnan(), x.isnan())
    nearest = x.to(torch.bfloat16)
    ties = (x.view(torch.int32) & 0xFFFF) == 0x8000  # away from zero, where torch takes the even one
    assert torch.equal(w[~ties].nan_to_num(), nearest[~ties].nan_to_num())


@given(
    mantissas=st.lists(st.floats(1, 1.9375, width=32), min_size=1, max_size=40),
    exponent=st.integers(-40, 15),
    sign=st.sampled_from([-1, 1]),
)
def test_a_float16_and_the_rest_are_float32_down_to_two_to_the_minus_17(mantissas, exponent, sign):
    x = sign * torch.tensor(mantissas) * 2.0**exponent
    w, kept = round_trip(x, torch.float16)
    assert torch.equal(w, x.to(torch.float16))
    if w.isinf().any():
        return
    exact = x.abs() >= 2**-17
    assert torch.equal(kept[exact], x[exact])
    assert (kept - x).abs().max() <= 2**-41


def test_float16_zeros_infinities_and_nan_stay():
    x = torch.tensor([0.0, -0.0, math.inf, -math.inf, math.nan, 1e6])
    w, kept = round_trip(x, torch.float16)
    assert torch.equal(w.nan_to_num(7), x.to(torch.float16).nan_to_num(7))
    assert torch.equal(kept.nan_to_num(7), w.float().nan_to_num(7))


def test_compensation_and_stochastic_rounding_exclude_each_other():
    with pytest.raises(ValueError, match="compensation=True rounds to nearest"):
        AdamW([torch.nn.Parameter(torch.ones(2))], compensation=True, stochastic_rounding=True)
    with pytest.raises(ValueError, match="compensation must be True or False, got 2"):
        AdamW([torch.nn.Parameter(torch.ones(2))], compensation=2)
