"""AdamP and SGDP with and without the compiled passes, which do not take strided memory."""

import copy
import math

import pytest
import torch

from slimstate.ops import COMPILED
from slimstate.ops.tangent import Parameter, TangentRule, tangent_dots, tangent_step_, tangent_takes
from slimstate.optim import SGDP, AdamP

pytestmark = pytest.mark.skipif(not COMPILED, reason="the passes are compiled")
RULE = TangentRule((0.9, 0.999), 1e-8, False, False)
RULES = {
    "AdamP": (AdamP, {}),
    "AdamP, nesterov": (AdamP, {"nesterov": True}),
    "SGDP": (SGDP, {"momentum": 0.9}),
    "SGDP, nesterov": (SGDP, {"momentum": 0.9, "nesterov": True}),
    "SGDP, no momentum": (SGDP, {}),
}
SHAPES = [(6, 40), (3, 9000), (5, 4, 3, 3), (1, 1), (1100, 2)]


def strided(x):
    """The same numbers in memory that no compiled pass takes."""
    return torch.stack([x, x], -1)[..., 0]


def gradients(w, kind, seed):
    """Orthogonal to every row, to all of the weight only, or to neither."""
    rows = w.detach().float().flatten(1)
    noise = torch.randn(rows.shape, generator=torch.Generator().manual_seed(seed))
    g = noise - rows * (rows * noise).sum(1, keepdim=True) / rows.square().sum(1, keepdim=True)
    if kind != "channel":
        signs = torch.ones(len(rows), 1)
        if kind == "layer":
            signs[1::2] = -1
            signs[len(rows) - len(rows) % 2 :] = 0
        g = g + 30 * signs * rows / rows.square().sum(1, keepdim=True)
    return g.view(w.shape).to(w.dtype)


def trained(rule, shape, dtype, layout, **settings):
    kind, own = RULES[rule]
    w = torch.randn(shape, generator=torch.Generator().manual_seed(0)).to(dtype)
    p = torch.nn.Parameter(layout(w))
    optimizer = kind([p], **{"lr": 0.01, "weight_decay": 0.1, **own, **settings})
    for seed, view in enumerate(("channel", "layer", "none")):
        p.grad = gradients(w, view, seed)  # of the first weight: both trainings get the same
        optimizer.step()
    return p.detach(), optimizer.state[p]


@pytest.mark.parametrize("rule", RULES)
@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("settings", [{}, {"maximize": True, "layer_view": False}, {"moment_dtype": "bfloat16"}])
def test_float32_weights_follow_the_other_path(rule, shape, settings):
    p, state = trained(rule, shape, torch.float32, torch.clone, **settings)
    q, other = trained(rule, shape, torch.float32, strided, **settings)
    rtol = 1e-4 if "moment_dtype" not in settings else 1e-2  # where a moment may be its other neighbour
    torch.testing.assert_close(p, q, rtol=rtol, atol=1e-5 if rtol == 1e-4 else 1e-3)
    for key in state.keys() - {"step", "stream"}:
        torch.testing.assert_close(state[key], other[key], rtol=rtol, atol=1e-5)


@pytest.mark.parametrize("rule", ["SGDP", "SGDP, nesterov", "SGDP, no momentum"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("settings", [{}, {"compensation": True}, {"stochastic_rounding": False}])
@pytest.mark.parametrize("moment_dtype", ["float32", "bfloat16", "param"])
def test_without_the_test_bits_are_those_of_the_other_path(rule, dtype, settings, moment_dtype):
    """Nothing is summed then, and SGD multiplies and adds in one order."""
    settings = {**settings, "delta": 0.0, "moment_dtype": moment_dtype}
    p, state = trained(rule, (7, 301), dtype, torch.clone, **settings)
    q, other = trained(rule, (7, 301), dtype, strided, **settings)
    assert torch.equal(p, q)
    assert all(torch.equal(state[key], other[key]) for key in state.keys() - {"step", "stream"})


@pytest.mark.parametrize("rule", ["AdamP", "SGDP"])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("settings", [{}, {"compensation": True}, {"stochastic_rounding": False}])
def test_weights_of_low_precision_are_neighbours_of_the_other_paths(rule, dtype, settings):
    p, _ = trained(rule, (7, 301), dtype, torch.clone, **settings)
    q, _ = trained(rule, (7, 301), dtype, strided, **settings)
    torch.testing.assert_close(p.float(), q.float(), rtol=3 * torch.finfo(dtype).eps, atol=1e-4)
    assert (p == q).float().mean() > 0.98


@pytest.mark.parametrize("shape", [(4, 37), (2, 30_000), (3, 1, 1, 1)])
def test_dots_are_as_exact_as_torchs_sums(shape):
    w, g, m, v = (torch.randn(shape) for _ in range(4))
    v = v.square()
    dots = tangent_dots(Parameter(w, g, (m, v), 3), RULE)
    assert dots.shape == (4, len(w), *[1] * (len(shape) - 1))
    m1, v1 = m.double().lerp(g.double(), 0.1), v.double().lerp(g.double().square(), 0.001)
    u = m1 / (1 - 0.9**3) / ((v1 / (1 - 0.999**3)).sqrt() + 1e-8)
    exact = torch.stack([(x.double() * y.double()).flatten(1).sum(1) for x, y in ((w, g), (g, g), (w, w), (w, u))])
    single = torch.stack([(x * y).flatten(1).sum(1) for x, y in ((w, g), (g, g), (w, w), (w, u.float()))])
    size = torch.stack([(x.double() * y.double()).abs().flatten(1).sum(1) for x, y in ((w, g), (g, g), (w, w), (w, u))])
    error, torchs = ((x.view(4, -1) - exact).abs() / size for x in (dots, single))
    assert (error <= torchs.clamp(min=3e-7)).all()


@pytest.mark.parametrize("shape", [(64, 1030), (2, 100_000)])
def test_nothing_depends_on_the_number_of_threads(shape):
    w, g, m, v = (torch.randn(shape) for _ in range(4))
    g -= w * (w * g).sum(1, keepdim=True) / w.square().sum(1, keepdim=True)
    threads, results = torch.get_num_threads(), []
    try:
        for count in (1, 2, 3):
            torch.set_num_threads(count)
            x = Parameter(w.clone(), g, (m.clone(), v.abs()), 3)
            dots = tangent_dots(x, RULE)
            tangent_step_([x], RULE, lr=0.1, decay=0.1, delta=0.1, wd_ratio=0.1, layer_view=True)
            results.append((dots, x.weight, x.moments[0]))
    finally:
        torch.set_num_threads(threads)
    for result in results[1:]:
        assert all(map(torch.equal, results[0], result))


def test_dots_leave_everything_as_it_was():
    x = Parameter(torch.randn(5, 70), torch.randn(5, 70), (torch.randn(5, 70), torch.rand(5, 70)), 2)
    before = copy.deepcopy(x)
    tangent_dots(x, RULE)
    assert all(map(torch.equal, (x.weight, x.grad, *x.moments), (before.weight, before.grad, *before.moments)))


@pytest.mark.parametrize("start", [1, 2, 3])
def test_unaligned_memory_changes_nothing(start):
    w, g, m, v = (torch.rand(6 * 50 + start) for _ in range(4))
    ends = []
    for layout in (torch.clone, lambda y: y):
        weight, grad, *moments = (layout(y[start:]).view(6, 50) for y in copy.deepcopy((w, g, m, v)))
        x = Parameter(weight, grad, tuple(moments), 4)
        tangent_step_([x], RULE, lr=0.1, decay=0.1, delta=math.inf, wd_ratio=0.1, layer_view=True)
        ends.append((x.weight, *x.moments))
    assert all(map(torch.equal, *ends))


def test_what_is_not_taken():
    w = torch.randn(4, 6)
    assert tangent_takes(Parameter(w, w, (w, w), 1))
    assert tangent_takes(Parameter(w.half(), w.half(), (w, w), 1, torch.zeros(4, 6, dtype=torch.int16)))
    assert tangent_takes(Parameter(*[w.to("meta")] * 2, (w.to("meta"),), 1))  # a step there goes the way of a real one
    assert not tangent_takes(Parameter(w, w.half(), (w, w), 1))
    assert not tangent_takes(Parameter(w.double(), w.double(), (w, w), 1))
    assert not tangent_takes(Parameter(w, w, (w, w.to(torch.uint8)), 1))
    assert not tangent_takes(Parameter(w, w.mT.contiguous().mT, (w, w), 1))


def test_autograd_notices_the_step():
    p = torch.nn.Parameter(torch.ones(4, 4))
    p.grad = torch.ones(4, 4)
    loss = p.square().sum()
    AdamP([p]).step()
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        loss.backward()


def test_the_ops_refuse_what_they_cannot_do():
    step, w = torch.ops.slimstate.tangent_step_, torch.randn(4, 6)
    numbers = (0.1, 0.0, 0.9, 0.99, 1e-8, 0.1, 0.1, False, True, False, False)
    for lists, message in (
        (([w.double()], [w.double()], [], [], []), "weights must be float32, bfloat16 or float16"),
        (([w], [w.half()], [], [], []), "a gradient must have its weight's dtype"),
        (([w], [w.mT], [], [], []), "a gradient must be contiguous"),
        (([w], [w[:3]], [], [], []), "a gradient has 18 elements, its weight has 24"),
        (([w], [w], [], [w], []), "second moments without first ones"),
        (([w], [w], [w, w], [], []), "a list has 2 entries for 1 weights"),
        (([w], [w], [w.double()], [], []), "moments must be float32, bfloat16 or float16"),
        (([w], [w], [], [], [w]), "a compensation must be int16"),
    ):
        with pytest.raises(RuntimeError, match=message):
            step(*lists, [], [], [], [1.0], *numbers)
    with pytest.raises(RuntimeError, match="1 float32 for each row"):
        step([w], [w], [], [], [], [w], [], [], [1.0], *numbers)
    with pytest.raises(RuntimeError, match="a place must have start and pitch >= 0 and width >= 1"):
        step([w], [w], [], [], [], [], [1, 2, 3], [0, 0, 0], [1.0], *numbers)
