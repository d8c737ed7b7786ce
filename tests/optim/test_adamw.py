import copy
import math

import pytest
import torch

from slimstate.optim import AdamW

SHAPES = [(), (1,), (7,), (5, 9), (9, 5), (4, 3, 2, 2), (0,), (3, 0)]
SETTINGS = [
    {},
    {"lr": 0.1, "betas": (0.8, 0.95), "eps": 1e-6, "weight_decay": 0.1},
    {"betas": (0.0, 0.99), "weight_decay": 0.0},
    {"maximize": True},
    {"lr": torch.tensor(0.02)},
    {"foreach": False, "fused": None, "capturable": False, "differentiable": False, "amsgrad": False},
]


def run(optimizer, params, steps=6, seed=1):
    generator = torch.Generator().manual_seed(seed)
    for _ in range(steps):
        for p in params:
            p.grad = torch.randn(p.shape, generator=generator, dtype=torch.float64).to(p)
        optimizer.step()


def pair(make, dtype):
    ours = [torch.nn.Parameter(make(shape).to(dtype)) for shape in SHAPES]
    return ours, [torch.nn.Parameter(p.detach().clone()) for p in ours]


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("settings", SETTINGS, ids=lambda x: ",".join(x) or "defaults")
def test_equals_torch_bit_for_bit(settings, dtype):
    ours, theirs = pair(torch.randn, dtype)
    mine = AdamW(ours, **copy.deepcopy(settings))
    reference = torch.optim.AdamW(theirs, **(copy.deepcopy(settings) | {"fused": True, "foreach": None}))
    run(mine, ours)
    run(reference, theirs)
    for p, q in zip(ours, theirs, strict=True):
        assert torch.equal(p, q)
        for key in ("step", "exp_avg", "exp_avg_sq"):
            assert torch.equal(mine.state[p][key], reference.state[q][key])


@pytest.mark.parametrize("maximize", [False, True])
@pytest.mark.parametrize("place", ["parameter", "gradient", "both"])
@pytest.mark.parametrize(
    ("name", "shape", "layout"),
    [
        ("transposed", (9, 5), lambda x: x.mT.contiguous().mT),
        ("every second element", (9, 5), lambda x: torch.stack([x, x], -1)[..., 0]),
        ("channels_last", (8, 3, 2, 2), lambda x: x.to(memory_format=torch.channels_last)),
        ("permuted", (8, 3, 2, 5), lambda x: x.permute(3, 1, 0, 2).contiguous().permute(2, 1, 3, 0)),
        ("blocks of transposed memory", (1500, 1024), lambda x: x.mT.contiguous().mT),
    ],
)
def test_strided_memory_equals_contiguous_memory_to_rounding(name, shape, layout, place, maximize):
    start = torch.randn(shape)
    p = torch.nn.Parameter(layout(start) if place != "gradient" else start.clone())
    q = torch.nn.Parameter(start.clone())
    ours, theirs = AdamW([p], maximize=maximize), torch.optim.AdamW([q], fused=True, maximize=maximize)
    pointer, strides = p.data_ptr(), p.stride()
    for _ in range(3):
        g = torch.randn(shape)
        p.grad, q.grad = layout(g) if place != "parameter" else g.clone(), g
        ours.step()
        theirs.step()
        assert torch.equal(p.grad, g)
    torch.testing.assert_close(p, q, atol=1e-6, rtol=1e-6)
    assert (p.data_ptr(), p.stride()) == (pointer, strides)


def test_a_tensor_lr_is_read_at_every_step_and_kept():
    lr = torch.tensor(0.1)
    p, q = (torch.nn.Parameter(torch.ones(5)) for _ in range(2))
    mine, theirs = AdamW([p], lr=lr), torch.optim.AdamW([q], lr=0.1, fused=True)
    for value in (0.1, 0.03, 0.0):
        lr.fill_(value)
        theirs.param_groups[0]["lr"] = lr.item()
        p.grad = q.grad = torch.ones(5)
        mine.step()
        theirs.step()
        torch.testing.assert_close(p, q, atol=1e-7, rtol=0)
    assert mine.param_groups[0]["lr"] is lr


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_low_precision_weights_follow_float32_ones_within_the_statistical_error(dtype):
    n, steps, lr = 4096, 200, 1e-3 if dtype == torch.bfloat16 else 1e-5
    p = torch.nn.Parameter(torch.ones(n, dtype=dtype))
    optimizer = AdamW([p], lr=lr, weight_decay=0.0)
    for _ in range(steps):
        p.grad = torch.ones_like(p)
        optimizer.step()
    moved = 1 - p.double()
    # Each step is rounded to a grid of `unit` below 1; a rounding has a variance of f (1 - f) unit^2, f = lr / unit.
    unit = torch.finfo(dtype).eps / 2
    f = lr / unit
    deviation = unit * math.sqrt(steps * f * (1 - f))
    assert abs(moved.mean().item() - steps * lr) < 4 * deviation / math.sqrt(n)
    assert 0.8 * deviation < moved.std().item() < 1.2 * deviation


def test_rounding_to_nearest_swallows_small_updates_and_is_what_false_asks_for():
    p = torch.nn.Parameter(torch.ones(64, dtype=torch.bfloat16))
    optimizer = AdamW([p], lr=1e-3, weight_decay=0.0, stochastic_rounding=False)
    for _ in range(50):
        p.grad = torch.ones_like(p)
        optimizer.step()
    assert torch.equal(p, torch.ones_like(p))


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("shape", SHAPES)
def test_one_low_precision_step_is_a_neighbour_of_the_float32_one(shape, dtype):
    p = torch.nn.Parameter(torch.randn(shape).to(dtype))
    q = torch.nn.Parameter(p.detach().float())
    p.grad = torch.randn(shape).to(dtype)
    q.grad = p.grad.float()
    mine, reference = AdamW([p], lr=0.03), torch.optim.AdamW([q], lr=0.03, fused=True)
    mine.step()
    reference.step()
    torch.testing.assert_close(p.float(), q.detach(), rtol=1.01 * torch.finfo(dtype).eps, atol=1e-6)
    assert mine.state[p]["exp_avg"].dtype == torch.float32
    assert torch.equal(mine.state[p]["exp_avg"], reference.state[q]["exp_avg"])


def test_no_two_elements_share_their_random_bits():
    p = torch.nn.Parameter(torch.ones(2 << 10, 1 << 10, dtype=torch.bfloat16))  # two blocks
    p.grad = torch.ones_like(p)
    AdamW([p], lr=1e-3, moment_dtype="bfloat16").step()
    first, second = p.detach().view(2, -1)
    assert first.unique().numel() == 2
    assert not torch.equal(first, second)


@pytest.mark.parametrize(
    ("dtype", "moment_dtype", "expected"),
    [
        (torch.float32, None, torch.float32),
        (torch.float64, None, torch.float64),
        (torch.bfloat16, None, torch.float32),
        (torch.bfloat16, "param", torch.bfloat16),
        (torch.float32, "bfloat16", torch.bfloat16),
        (torch.float32, torch.bfloat16, torch.bfloat16),
        (torch.float16, "float32", torch.float32),
        (torch.float64, "float32", torch.float32),
    ],
)
def test_moments_have_the_dtype_that_was_asked_for(dtype, moment_dtype, expected):
    p = torch.nn.Parameter(torch.ones(6, dtype=dtype))
    optimizer = AdamW([p], moment_dtype=moment_dtype)
    run(optimizer, [p], steps=2)
    assert {optimizer.state[p][key].dtype for key in ("exp_avg", "exp_avg_sq")} == {expected}
    assert p.dtype == dtype


def test_bfloat16_moments_follow_float32_ones_on_average():
    n, steps = 4096, 60
    p = torch.nn.Parameter(torch.zeros(n))
    optimizer = AdamW([p], moment_dtype="bfloat16")
    for _ in range(steps):
        p.grad = torch.ones_like(p)
        optimizer.step()
    expected = 1 - 0.999**steps  # 0.058; rounding to nearest would stop at the first values whose spacing is above 1e-3
    v = optimizer.state[p]["exp_avg_sq"].double()
    assert v.mean().item() == pytest.approx(expected, rel=2e-3)


def test_the_default_dtype_changes_nothing():
    def trajectory():
        p = torch.nn.Parameter(torch.ones(50, dtype=torch.float32))
        optimizer = AdamW([p], lr=0.1)
        for i in range(300):
            p.grad = torch.full_like(p, math.sin(i))
            optimizer.step()
        assert optimizer.state[p]["step"].dtype == torch.float32
        return p.detach()

    expected = trajectory()
    for dtype in (torch.bfloat16, torch.float64):
        torch.set_default_dtype(dtype)
        try:
            assert torch.equal(trajectory(), expected), dtype
        finally:
            torch.set_default_dtype(torch.float32)


def test_compensated_half_precision_steps_without_a_warning():
    p = torch.nn.Parameter(torch.ones(3, dtype=torch.float16))
    optimizer = AdamW([p], compensation=True)
    for _ in range(2):
        p.grad = torch.ones_like(p)
        optimizer.step()
    assert (p < 1).all()
