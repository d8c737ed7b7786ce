import copy
import math

import pytest
import torch
from hypothesis import assume, given
from hypothesis import strategies as st
from torch.utils._python_dispatch import TorchDispatchMode

from slimstate.optim import SGDP, AdamP, AdamW, state_bytes
from slimstate.projections import _blocks
from training import gradients, parameter, run

SHAPES = [(5, 9), (9, 5), (6, 6), (1, 7), (8, 1), (4, 3, 2, 2)]
shapes = st.sampled_from(SHAPES)
seeds = st.integers(0, 2**16)
RULES = {
    "AdamP": (AdamP, {}),
    "AdamP, nesterov": (AdamP, {"nesterov": True}),
    "SGDP": (SGDP, {"momentum": 0.9}),
    "SGDP, nesterov": (SGDP, {"momentum": 0.9, "nesterov": True}),
    "SGDP, no momentum": (SGDP, {"momentum": 0.0}),
}
rules = st.sampled_from(sorted(RULES))
every = pytest.mark.parametrize("rule", RULES)


def build(rule, params, **settings):
    kind, own = RULES[rule]
    return kind(params, **{"lr": 0.1, **own, **settings})


def weight(shape, seed, dtype=torch.float64):
    return torch.nn.Parameter(torch.randn(shape, generator=torch.Generator().manual_seed(seed)).to(dtype))


def rows(x, view):
    return x.detach().reshape(1 if view == "layer" else len(x), -1)


def gradient(p, seed, *, radial, view="channel"):
    """Orthogonal to every row of the weight (of the view), but for a part along it of `radial` times its length."""
    g = torch.randn(p.shape, generator=torch.Generator().manual_seed(seed + 2**20)).to(p)  # not the weight's own draw
    w = rows(p, view)
    unit = w / w.norm(dim=1, keepdim=True)
    across = rows(g, view) - unit * (unit * rows(g, view)).sum(1, keepdim=True)
    return (across + radial * across.norm(dim=1, keepdim=True).clamp(min=1e-3) * unit).reshape(p.shape)


def both_views_off(p, seed):
    """A gradient whose cosine with the weight is large in every row, and over all."""
    return gradient(p, seed, radial=3.0)


def layer_only(p, seed):
    """Orthogonal to the weight as a whole, along it in every row."""
    w = rows(p, "channel")
    factors = torch.tensor([(-1.0) ** i for i in range(len(w))]).to(p)[:, None]
    if len(w) % 2:
        factors[-1] = 0
    lengths = w.norm(dim=1, keepdim=True)
    noise = gradient(p, seed, radial=0.0)
    return (factors * w / lengths.square() + 0.01 * rows(noise, "channel")).reshape(p.shape)


# Where the test fails, and where there is none.


@given(shape=shapes, seed=seeds, decay=st.sampled_from([0.0, 0.1]))
def test_without_an_orthogonal_gradient_adamp_is_adamw(shape, seed, decay):
    p, q = weight(shape, seed), weight(shape, seed)
    ours, theirs = AdamP([p], lr=0.1, weight_decay=decay), torch.optim.AdamW([q], lr=0.1, weight_decay=decay)
    for t in range(4):
        p.grad = both_views_off(p, seed + t)
        q.grad = p.grad.clone()
        ours.step()
        theirs.step()
        torch.testing.assert_close(p, q, rtol=1e-12, atol=1e-12)


@given(shape=st.sampled_from([*SHAPES, (), (1,), (7,), (0,), (3, 0), (0, 3)]), seed=seeds)
def test_with_delta_zero_adamp_is_adamw(shape, seed):
    p, q = weight(shape, seed, torch.float32), weight(shape, seed, torch.float32)
    ours, theirs = AdamP([p], delta=0.0, weight_decay=0.1), AdamW([q], weight_decay=0.1)
    for t in range(4):
        p.grad = q.grad = weight(shape, seed + t, torch.float32).data
        ours.step()
        theirs.step()
    assert torch.equal(p, q)


@given(shape=st.sampled_from([*SHAPES, (), (7,)]), seed=seeds, nesterov=st.booleans())
def test_with_delta_zero_sgdp_is_sgd(shape, seed, nesterov):
    p, q = weight(shape, seed), weight(shape, seed)
    settings = {"lr": 0.1, "momentum": 0.9, "nesterov": nesterov}
    ours, theirs = SGDP([p], delta=0.0, **settings), torch.optim.SGD([q], **settings)
    for t in range(4):
        p.grad = q.grad = weight(shape, seed + t).data
        ours.step()
        theirs.step()
    torch.testing.assert_close(p, q, rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("shape", [(), (1,), (7,)])
@every
def test_vectors_are_never_projected(rule, shape):
    p, q = weight(shape, 0), weight(shape, 0)
    ours, theirs = build(rule, [p], delta=math.inf), build(rule, [q], delta=0.0)
    for t in range(3):
        p.grad = q.grad = weight(shape, 1 + t).data
        ours.step()
        theirs.step()
    assert torch.equal(p, q)


# Where it succeeds.


@given(rule=rules, shape=shapes, seed=seeds, view=st.sampled_from(["channel", "layer"]))
def test_a_fired_step_is_orthogonal_to_the_weight_and_never_shortens_it(rule, shape, seed, view):
    assume(view == "channel" or 1 not in shape)  # of one row or column both views are the same, or all is radial
    p = weight(shape, seed)
    optimizer = build(rule, [p])
    for t in range(5):
        p.grad = gradient(p, seed + t, radial=0.0) if view == "channel" else layer_only(p, seed + t)
        before = p.detach().clone()
        optimizer.step()
        step, w = rows(p - before, view), rows(before, view)
        scale = step.norm(dim=1) * w.norm(dim=1)
        assert ((step * w).sum(1).abs() <= 1e-6 * scale + 1e-15).all()  # epsilon leaves 1e-8 of it
        lengths = (w.square().sum(1) + step.square().sum(1)).sqrt()
        torch.testing.assert_close(rows(p, view).norm(dim=1), lengths, rtol=1e-6, atol=0)


@given(shape=shapes, seed=seeds)
def test_projection_never_lengthens_a_step_and_doing_it_twice_changes_nothing(shape, seed):
    p = weight(shape, seed)
    free, once = copy.deepcopy(p), copy.deepcopy(p)
    grad = weight(shape, seed + 1).data
    for q, delta in ((free, 0.0), (once, math.inf)):
        q.grad = grad
        AdamP([q], lr=0.1, delta=delta, eps=0.0).step()
    step, projected = rows(free - p, "channel"), rows(once - p, "channel")
    assert (projected.norm(dim=1) <= step.norm(dim=1) * (1 + 1e-9) + 1e-12).all()
    w = rows(p, "channel")
    again = projected - w * ((w * projected).sum(1, keepdim=True) / w.square().sum(1, keepdim=True))
    torch.testing.assert_close(again, projected, rtol=1e-9, atol=1e-12)


@every
@pytest.mark.parametrize(
    ("gradients", "share"),
    [
        (lambda p: gradient(p, 1, radial=0.0), 0.25),
        (lambda p: layer_only(p, 1), 0.25),
        (lambda p: both_views_off(p, 1), 1),
    ],
    ids=["channel", "layer", "none"],
)
def test_decay_is_weakened_where_a_view_fires(rule, gradients, share):
    p, q = weight((6, 8), 0), weight((6, 8), 0)
    decayed, free = build(rule, [p], weight_decay=0.01, wd_ratio=0.25), build(rule, [q])
    p.grad = q.grad = gradients(p)
    before = p.detach().clone()
    decayed.step()
    free.step()
    rate = 0.01 if "momentum" not in RULES[rule][1] else 0.01 / (1 - RULES[rule][1]["momentum"])
    torch.testing.assert_close(q - p, 0.1 * rate * share * before, rtol=1e-9, atol=1e-12)


@every
def test_the_layer_view_can_be_left_out(rule):
    p, q, r = (weight((6, 8), 0) for _ in range(3))
    p.grad = q.grad = r.grad = layer_only(p, 1)
    build(rule, [p], weight_decay=0.1).step()
    build(rule, [q], weight_decay=0.1, layer_view=False).step()
    build(rule, [r], weight_decay=0.1, delta=0.0).step()
    assert not torch.allclose(p, q)
    torch.testing.assert_close(q, r, rtol=1e-12, atol=1e-14)


def test_the_layer_view_fires_by_chance_as_often_as_the_threshold_says():
    p = torch.nn.Parameter(torch.randn(2000, 16, 8).double())
    p.grad = torch.randn_like(p)
    fired = 0
    for w, g in zip(p.detach(), p.grad, strict=True):
        q = torch.nn.Parameter(w.clone())
        q.grad = g
        SGDP([q], lr=1.0, weight_decay=0.5, wd_ratio=0.0).step()
        fired += (q - (0.5 * w - g)).abs().max().item() > 1e-9
    expected = math.erf(0.1 / math.sqrt(2))  # 0.0797
    assert abs(fired / 2000 - expected) < 4 * math.sqrt(expected * (1 - expected) / 2000)


# Scale invariance.


def trajectory(rule, p, steps=30, **settings):
    """Minimises a function of the rows' directions; returns these directions, and the rows' lengths."""
    target = weight(p.shape, 99).data
    optimizer = build(rule, [p], **settings)
    for _ in range(steps):
        optimizer.zero_grad()
        (p / p.norm(dim=1, keepdim=True) - target).square().sum().backward()
        optimizer.step()
    lengths = p.detach().norm(dim=1, keepdim=True)
    return p.detach() / lengths, lengths


@given(rule=rules, shape=st.sampled_from([(5, 9), (9, 5), (6, 6)]), seed=seeds, c=st.sampled_from([0.25, 3.0]))
def test_the_path_of_a_scale_invariant_weight_does_not_depend_on_its_length(rule, shape, seed, c):
    p = weight(shape, seed)
    longer = torch.nn.Parameter(c * p.detach())
    lr = 0.02
    a, _ = trajectory(rule, p, lr=lr, eps=1e-14)
    b, _ = trajectory(rule, longer, lr=lr * (c if "AdamP" in rule else c * c), eps=1e-14)
    torch.testing.assert_close(a, b, rtol=1e-6, atol=1e-6)


@pytest.mark.parametrize("rule", ["AdamP", "SGDP", "SGDP, nesterov"])
def test_momentum_lengthens_a_scale_invariant_weight_less(rule):
    lr = 0.05
    _, projected = trajectory(rule, weight((6, 8), 0), lr=lr)
    _, free = trajectory(rule, weight((6, 8), 0), lr=lr, delta=0.0)
    start = weight((6, 8), 0).norm(dim=1, keepdim=True)
    assert (projected >= start).all()
    assert (projected - start).sum() < 0.8 * (free - start).sum()


# What shows nothing.


@pytest.mark.parametrize(
    ("rule", "what", "eps"),
    [
        *((rule, what, 1e-8) for rule in RULES for what in ("gradient", "weight", "tiny gradient", "tiny weight")),
        *((rule, "weight", 0.0) for rule in RULES),
        *((rule, "gradient", 0.0) for rule in RULES if rule.startswith("SGDP")),  # in Adam itself it is 0 / 0
    ],
)
def test_rows_of_no_length_are_no_evidence(rule, what, eps):
    p = weight((6, 8), 0)
    grad = gradient(p, 1, radial=0.0)
    if "gradient" in what:
        grad *= 1e-12 if "tiny" in what else 0
    else:
        p.data *= 1e-12 if "tiny" in what else 0
    q = copy.deepcopy(p)
    ours, plain = build(rule, [p], weight_decay=0.1, eps=eps), build(rule, [q], weight_decay=0.1, delta=0.0, eps=eps)
    for _ in range(2):
        p.grad = q.grad = grad
        ours.step()
        plain.step()
        torch.testing.assert_close(p, q, rtol=1e-12, atol=1e-16)
        p.data, q.data = (x.data * (1e-12 if what == "tiny weight" else what != "weight") for x in (p, q))


@every
def test_some_rows_without_gradient_do_not_keep_a_view_from_firing(rule):
    p = weight((6, 8), 0)
    p.grad = gradient(p, 1, radial=0.0)
    p.grad[2] = 0
    q = copy.deepcopy(p)
    q.grad = p.grad.clone()
    build(rule, [p], weight_decay=0.1, wd_ratio=0.0).step()
    build(rule, [q]).step()
    assert torch.equal(p, q)


@every
@pytest.mark.parametrize("bad", [math.nan, math.inf])
def test_a_bad_entry_spoils_itself_only(rule, bad):
    p, q = weight((6, 8), 0), weight((6, 8), 0)
    p.grad = gradient(p, 1, radial=0.0)
    q.grad = p.grad.clone()
    p.grad[1, 2] = bad
    build(rule, [p]).step()
    build(rule, [q], delta=0.0).step()
    same = torch.ones(6, 8, dtype=torch.bool)
    same[1, 2] = False
    torch.testing.assert_close(p[same], q[same], rtol=1e-12, atol=1e-14)


# Memory, precision, device.


@given(rule=rules, seed=seeds, place=st.sampled_from(["parameter", "gradient", "both"]))
@pytest.mark.parametrize(
    ("shape", "layout"),
    [
        ((9, 6), lambda x: x.mT.contiguous().mT),
        ((9, 6), lambda x: torch.stack([x, x], -1)[..., 0]),
        ((8, 3, 2, 2), lambda x: x.to(memory_format=torch.channels_last)),
        ((8, 3, 2, 5), lambda x: x.permute(3, 1, 0, 2).contiguous().permute(2, 1, 3, 0)),
    ],
    ids=["transposed", "strided", "channels_last", "permuted"],
)
def test_memory_format_changes_nothing(shape, layout, rule, seed, place):
    p, q = weight(shape, seed), weight(shape, seed)
    if place != "gradient":
        p = torch.nn.Parameter(layout(p.detach()))
    ours, same = build(rule, [p], weight_decay=0.1), build(rule, [q], weight_decay=0.1)
    pointer, strides = p.data_ptr(), p.stride()
    for t in range(3):
        q.grad = gradient(q, seed + t, radial=0.0) if t % 2 else both_views_off(q, seed + t)
        p.grad = layout(q.grad) if place != "parameter" else q.grad.clone()
        ours.step()
        same.step()
        assert torch.equal(p.grad, q.grad)
    torch.testing.assert_close(p, q, rtol=1e-12, atol=1e-12)
    assert (p.data_ptr(), p.stride()) == (pointer, strides)


@every
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("maximize", [False, True])
def test_blocks_change_nothing(rule, dtype, maximize, monkeypatch):
    def run():
        p = weight((40, 6, 5), 0, dtype)
        optimizer = build(rule, [p], weight_decay=0.1, maximize=maximize)
        for t, grad in enumerate((both_views_off, layer_only, lambda p, s: gradient(p, s, radial=0.0))):
            p.grad = grad(p, t)
            optimizer.step()
        return p.detach()

    whole = run()
    monkeypatch.setattr(_blocks, "BLOCK_BYTES", 7 * 30 * 16)
    torch.testing.assert_close(run(), whole, rtol=0, atol=1e-6 if dtype == torch.float32 else 0)


@every
def test_maximize_turns_the_gradient_around(rule):
    p, q = weight((6, 8), 0), weight((6, 8), 0)
    up, down = build(rule, [p], maximize=True, weight_decay=0.1), build(rule, [q], weight_decay=0.1)
    for t in range(3):
        p.grad = gradient(p, t, radial=0.0) if t else both_views_off(p, t)
        q.grad = -p.grad
        up.step()
        down.step()
    assert torch.equal(p, q)


@every
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_low_precision_steps_are_neighbours_of_float32_ones(rule, dtype):
    p = weight((6, 8), 0, dtype)
    q = torch.nn.Parameter(p.detach().float())
    p.grad = gradient(p, 1, radial=0.0)
    q.grad = p.grad.float()
    build(rule, [p]).step()
    build(rule, [q]).step()
    torch.testing.assert_close(p.float(), q.detach(), rtol=1.01 * torch.finfo(dtype).eps, atol=1e-6)


@every
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_low_precision_weights_do_move_by_small_steps(rule, dtype):
    p = torch.nn.Parameter(torch.ones(64, 64, dtype=dtype))
    lr = 1e-3 if dtype == torch.bfloat16 else 1e-4
    optimizer = build(rule, [p], lr=lr)
    for _ in range(20):
        p.grad = torch.ones_like(p)
        optimizer.step()
    reference = torch.nn.Parameter(torch.ones(64, 64))
    optimizer = build(rule, [reference], lr=lr)
    for _ in range(20):
        reference.grad = torch.ones_like(reference)
        optimizer.step()
    moved = 1 - reference[0, 0].item()
    assert 1 - p.float().mean().item() == pytest.approx(moved, rel=0.1)


@pytest.mark.parametrize(("rule", "floats"), [("AdamP", 2), ("SGDP", 1), ("SGDP, no momentum", 0)])
def test_state_is_what_the_docstring_says(rule, floats):
    p = weight((6, 8), 0, torch.float32)
    p.grad = torch.ones_like(p)
    optimizer = build(rule, [p])
    optimizer.step()
    assert state_bytes(optimizer) == (floats * 48 + 1) * 4  # and `step`


class Reads(TorchDispatchMode):
    """Notes what is read by Python: on another device each would wait for it."""

    def __init__(self):
        super().__init__()
        self.read = []

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        if func in (torch.ops.aten._local_scalar_dense.default, torch.ops.aten.is_nonzero.default):
            self.read.append(args[0])
        return func(*args, **(kwargs or {}))


@every
def test_no_value_is_read_but_the_step(rule):
    params = [weight((6, 8), 0), weight((7,), 1), weight((4, 3, 2, 2), 2, torch.bfloat16)]
    optimizer = build(rule, params, weight_decay=0.1)
    for p in params:
        p.grad = torch.randn_like(p)
    with Reads() as mode:
        optimizer.step()
    steps = {optimizer.state[p]["step"].data_ptr() for p in params}
    assert {x.data_ptr() for x in mode.read} <= steps


# Settings.


@pytest.mark.parametrize(
    ("kind", "settings", "message"),
    [
        (AdamP, {"delta": -0.1}, "delta must be a number >= 0, got -0.1"),
        (AdamP, {"delta": math.nan}, "delta must be a number >= 0, got nan"),
        (AdamP, {"wd_ratio": "1"}, "wd_ratio must be a number >= 0, got '1'"),
        (AdamP, {"nesterov": "yes"}, "nesterov must be True or False, got 'yes'"),
        (SGDP, {"layer_view": None}, "layer_view must be True or False, got None"),
        (SGDP, {"lr": -1.0}, "lr must be a number >= 0"),
        (SGDP, {"weight_decay": -1.0}, "weight_decay must be a number >= 0"),
        (SGDP, {"momentum": 1.0}, r"momentum must be a number in \[0, 1\), got 1.0"),
        (SGDP, {"dampening": None}, "dampening must be a number, got None"),
        (SGDP, {"nesterov": True}, "nesterov=True needs momentum > 0 and dampening = 0"),
        (SGDP, {"nesterov": True, "momentum": 0.9, "dampening": 0.1}, "nesterov=True needs"),
        (SGDP, {"foreach": True}, "foreach=True is not supported by SGDP"),
    ],
    ids=str,
)
def test_refuses_values_out_of_range(kind, settings, message):
    with pytest.raises(ValueError, match=message):
        kind([weight((6, 8), 0)], **settings)


def test_sgdp_refuses_what_sgd_does_not_have():
    with pytest.raises(TypeError, match="SGDP got an unexpected keyword argument 'betas'"):
        SGDP([weight((6, 8), 0)], betas=(0.9, 0.99))


def test_momentum_can_be_scheduled_from_zero():
    p = weight((6, 8), 0)
    optimizer = SGDP([p], lr=0.1)
    for momentum in (0.0, 0.5, 0.9):
        optimizer.param_groups[0]["momentum"] = momentum
        p.grad = both_views_off(p, 1)
        optimizer.step()
    assert optimizer.state[p]["momentum_buffer"].shape == (6, 8)


@pytest.mark.parametrize(("first", "then"), [(0.0, 0.9), (0.9, 0.0)])
@pytest.mark.parametrize("steps", [(0, 0), (0, 1), (1, 0), (1, 1)])
def test_a_checkpoint_loads_that_was_written_after_a_change_of_momentum(first, then, steps):
    p = parameter((6, 8))
    optimizer = SGDP([p], lr=0.1, momentum=first)
    for momentum, count in zip((first, then), steps, strict=True):
        optimizer.param_groups[0]["momentum"] = momentum
        run(optimizer, [p], [[g] for g in gradients(p.shape, count)])
    for momentum in (first, then):
        q = torch.nn.Parameter(p.detach().clone())
        resumed, original = SGDP([q], lr=0.1, momentum=momentum), copy.deepcopy((p, optimizer))
        resumed.load_state_dict(optimizer.state_dict())
        for o, x in ((resumed, q), original[::-1]):
            run(o, [x], [[g] for g in gradients(p.shape, 2, seed=1)])
        assert torch.equal(q, original[0])


def test_momentum_that_was_turned_off_is_not_kept():
    grads = gradients((6, 8), 4)
    p, q = parameter((6, 8)), parameter((6, 8))
    optimizer, without = (SGDP([x], lr=0.1, momentum=m) for x, m in ((p, 0.9), (q, 0.0)))
    run(optimizer, [p], [[grads[0]]])
    optimizer.param_groups[0]["momentum"] = 0.0
    with torch.no_grad():
        q.copy_(p)
    run(optimizer, [p], [[grads[1]]])
    run(without, [q], [[grads[1]]])
    assert state_bytes(optimizer) == state_bytes(without)
    for o in (optimizer, without):
        o.param_groups[0]["momentum"] = 0.9
    run(optimizer, [p], [[g] for g in grads[2:]])
    run(without, [q], [[g] for g in grads[2:]])
    assert torch.equal(p, q)


def test_one_cycle_drives_sgdps_momentum():
    p = weight((6, 8), 0)
    optimizer = SGDP([p], lr=0.1, momentum=0.9)
    scheduler = torch.optim.lr_scheduler.OneCycleLR(optimizer, max_lr=0.1, total_steps=10)
    values = set()
    for t in range(8):
        p.grad = both_views_off(p, t)
        optimizer.step()
        scheduler.step()
        values.add(optimizer.param_groups[0]["momentum"])
    assert len(values) > 4
