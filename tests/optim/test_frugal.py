import io
import math

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from slimstate.optim import FRUGAL, param_groups, state_bytes
from slimstate.optim._projected import due
from slimstate.optim.frugal import _turn
from slimstate.projections import SVD, Coordinates

COORDINATES = ["columns", "rows", "entries"]
DENSE = ["svd", "power", "random"]
ALL = [*COORDINATES, *DENSE, "blocks"]
EXACT = dict(eps=1e-12, weight_decay=0.0)


def parameters(*shapes, dtype=torch.float64, seed=0):
    generator = torch.Generator().manual_seed(seed)
    return [torch.nn.Parameter(torch.randn(s, generator=generator, dtype=torch.float64).to(dtype)) for s in shapes]


def run(optimizer, params, steps, seed=1, grads=None):
    generator = torch.Generator().manual_seed(seed)
    for t in range(steps):
        for p in params:
            g = torch.randn(p.shape, generator=generator, dtype=torch.float64)
            p.grad = (g if grads is None else grads(t, p)).to(p.dtype)
        optimizer.step()


def copies(params):
    return [torch.nn.Parameter(p.detach().clone()) for p in params]


shapes = st.tuples(st.integers(1, 9), st.integers(1, 9))


# Limits.


@given(
    shape=shapes, projection=st.sampled_from(ALL), gap=st.integers(1, 3), decay=st.floats(0, 0.5), lr=st.floats(0, 0.1)
)
def test_density_1_is_adamw_bit_for_bit(shape, projection, gap, decay, lr):
    ours = parameters(shape, (3,), dtype=torch.float32)
    theirs = copies(ours)
    a = FRUGAL(ours, lr=lr, weight_decay=decay, density=1, projection=projection, update_proj_gap=gap)
    b = torch.optim.AdamW(theirs, lr=lr, weight_decay=decay, fused=True)
    for optimizer, params in ((a, ours), (b, theirs)):
        run(optimizer, params, 5)
    for p, q in zip(ours, theirs, strict=True):
        assert torch.equal(p, q)


@given(
    shape=shapes,
    projection=st.sampled_from(ALL),
    scale=st.floats(0.1, 2),
    outer_scale=st.floats(0.1, 2),
    decay=st.floats(0, 0.5),
    maximize=st.booleans(),
)
def test_density_0_is_sign_sgd_without_state(shape, projection, scale, outer_scale, decay, maximize):
    (p,) = parameters(shape)
    start, grads = p.detach().clone(), torch.randn(4, *shape, dtype=torch.float64)
    optimizer = FRUGAL(
        [p],
        lr=0.1,
        density=0,
        projection=projection,
        scale=scale,
        outer_scale=outer_scale,
        weight_decay=decay,
        maximize=maximize,
    )
    run(optimizer, [p], 4, grads=lambda t, _: grads[t])
    for g in grads:
        start = (1 - 0.1 * decay) * start - 0.1 * scale * outer_scale * g.sign() * (-1 if maximize else 1)
    torch.testing.assert_close(p.detach(), start, rtol=1e-12, atol=1e-12)
    assert set(optimizer.state[p]) == {"step", "stream"} | ({"age"} if projection == "blocks" else set())


@given(shape=shapes, projection=st.sampled_from(ALL), density=st.floats(0, 1), gap=st.integers(1, 3))
def test_sgd_inside_and_outside_is_sgd_at_any_density_and_basis(shape, projection, density, gap):
    ours = parameters(shape, (4, 3), (5,))
    theirs = copies(ours)
    a = FRUGAL(
        ours,
        lr=0.1,
        betas=(0.0, 0.9),
        density=density,
        projection=projection,
        inner="sgdm",
        outer="sgd",
        update_proj_gap=gap,
        weight_decay=0.0,
    )
    b = torch.optim.SGD(theirs, lr=0.1)
    for optimizer, params in ((a, ours), (b, theirs)):
        run(optimizer, params, 5)
    for p, q in zip(ours, theirs, strict=True):
        torch.testing.assert_close(p, q, rtol=1e-9, atol=1e-9)


def lion(p, grads, lr, betas, decay):
    w, m = p.detach().clone(), torch.zeros_like(p)
    for g in grads:
        u = (betas[0] * m + (1 - betas[0]) * g).sign()
        w = (1 - lr * decay) * w - lr * u
        m = betas[1] * m + (1 - betas[1]) * g
    return w


@pytest.mark.parametrize("projection", ALL)
@pytest.mark.parametrize("shape", [(5, 7), (7, 4, 2), (3, 2, 3, 3)])
def test_lion_at_density_1_is_lion(projection, shape):
    (p,) = parameters(shape)
    grads = torch.randn(6, *shape, dtype=torch.float64)
    expected = lion(p, grads, 0.01, (0.9, 0.99), 0.1)
    optimizer = FRUGAL(
        [p], lr=0.01, betas=(0.9, 0.99), weight_decay=0.1, density=1.0, projection=projection, inner="lion"
    )
    run(optimizer, [p], 6, grads=lambda t, _: grads[t])
    torch.testing.assert_close(p.detach(), expected, rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("decay", [0.0, 0.1])
def test_momentum_inside_is_torchs_sgd_with_decoupled_decay(decay):
    ours = parameters((4, 6), (5,), ())
    theirs = copies(ours)
    a = FRUGAL(ours, lr=0.1, betas=(0.8, 0.9), density=1.0, inner="sgdm", weight_decay=decay)
    b = torch.optim.SGD(theirs, lr=0.1, momentum=0.8)
    generator = torch.Generator().manual_seed(3)
    for _ in range(6):
        for p, q in zip(ours, theirs, strict=True):
            p.grad = torch.randn(p.shape, generator=generator, dtype=p.dtype)
            q.grad = p.grad.clone()
            q.data.mul_(1 - 0.1 * decay)
        a.step()
        b.step()
    for p, q in zip(ours, theirs, strict=True):
        torch.testing.assert_close(p, q, rtol=1e-12, atol=1e-12)


# The split.


@given(shape=shapes, projection=st.sampled_from(COORDINATES), density=st.floats(0.01, 1), contiguous=st.booleans())
def test_coordinates_split_the_gradient_bit_for_bit(shape, projection, density, contiguous):
    choice = Coordinates(axis=projection, rank=density, contiguous=contiguous)
    view = choice.view(shape)
    g = torch.randn(shape)
    m = view.open(g)
    inside = choice.up(choice.down(m, index := choice.fit(m, None, (0, 0, 0))), index, view.d)
    outside = m - inside
    assert torch.equal(inside + outside, m)
    assert not ((inside != 0) & (outside != 0)).any()


@given(
    shape=st.tuples(st.integers(2, 8), st.integers(2, 8)),
    projection=st.sampled_from([*COORDINATES, *DENSE]),
    outer=st.sampled_from(["sign", "sgd", "none"]),
    density=st.floats(0.1, 0.9),
    scale=st.floats(0.2, 2),
    outer_scale=st.floats(0.2, 2),
    decay=st.floats(0, 0.5),
    maximize=st.booleans(),
)
def test_first_step_is_the_equation(shape, projection, outer, density, scale, outer_scale, decay, maximize):
    (p,) = parameters(shape)
    w, g = p.detach().clone(), torch.randn(shape, dtype=torch.float64)
    optimizer = FRUGAL(
        [p],
        lr=0.1,
        density=density,
        projection=projection,
        outer=outer,
        scale=scale,
        outer_scale=outer_scale,
        weight_decay=decay,
        maximize=maximize,
        eps=1e-12,
    )
    run(optimizer, [p], 1, grads=lambda t, _: g)
    group = optimizer.param_groups[0]
    choice, view = optimizer._projection(group), optimizer._view(p, group)
    basis = optimizer.state[p].get(choice.key)
    if basis is None:  # the share is all of a short side
        return
    direction = -g if maximize else g
    m = view.open(direction)
    r = choice.down(m, basis)
    inside = choice.up(r.sign(), basis, view.d)  # Adam's first step
    left = m - choice.up(r, basis, view.d)
    if isinstance(choice, Coordinates):
        left[basis.long()] = 0
    outside = {"sign": left.sign(), "sgd": left, "none": torch.zeros_like(left)}[outer]
    expected = (1 - 0.1 * decay) * w - 0.1 * scale * view.close(inside + outer_scale * outside)
    torch.testing.assert_close(p.detach(), expected, rtol=1e-6, atol=1e-6)


@pytest.mark.parametrize("projection", ["columns", "rows", "entries", "svd"])
def test_every_weight_moves_unless_its_gradient_is_zero(projection):
    (p,) = parameters((12, 10), dtype=torch.float32)
    optimizer = FRUGAL([p], density=0.25, projection=projection, weight_decay=0.0, update_proj_gap=3)
    unused = torch.zeros(12, 10)
    unused[4] = 1  # a padding row: its gradient is always zero
    for t in range(8):
        before = p.detach().clone()
        run(optimizer, [p], 1, seed=t, grads=lambda t, p: torch.randn(p.shape) * (1 - unused))
        assert torch.equal(p.detach() == before, unused.bool())


@pytest.mark.parametrize("projection", ["svd", "power"])
def test_rounding_noise_outside_a_dense_basis_gets_no_sign(projection):
    (p,) = parameters((24, 40), dtype=torch.float32)
    factors = torch.randn(24, 3), torch.randn(3, 40)
    optimizer = FRUGAL([p], lr=1.0, rank=8, projection=projection, weight_decay=0.0)
    before = p.detach().clone()
    run(optimizer, [p], 1, grads=lambda t, p: factors[0] @ factors[1])
    group = optimizer.param_groups[0]
    view, q = optimizer._view(p, group), optimizer.state[p]["basis"]
    moved = view.open(p.detach() - before)
    outside = (moved - q @ (q.mT @ moved)).norm() / moved.norm()
    assert outside < 0.01


@given(scale=st.floats(1e-3, 1e3), projection=st.sampled_from(COORDINATES))
def test_the_sign_outside_does_not_see_the_gradients_scale(scale, projection):
    a, b = parameters((6, 8)), parameters((6, 8))
    grads = torch.randn(5, 6, 8)
    for params, taken in ((a, grads), (b, scale * grads)):
        optimizer = FRUGAL(params, lr=0.01, density=0.3, projection=projection, update_proj_gap=2, eps=0.0)
        run(optimizer, params, 5, grads=lambda t, p, taken=taken: taken[t])
    torch.testing.assert_close(a[0], b[0], rtol=1e-5, atol=1e-6)


# Selections.


@given(gap=st.integers(1, 4), projection=st.sampled_from(ALL))
def test_after_a_selection_the_age_restarts_and_the_step_is_one_sign(gap, projection):
    params = parameters((6, 8), (8, 6))
    optimizer = FRUGAL(params, lr=1.0, density=0.5, projection=projection, update_proj_gap=gap, outer="none", **EXACT)
    signs = torch.randn(6, 8, dtype=torch.float64).sign()
    grads = {id(params[0]): signs, id(params[1]): signs.T.contiguous()}
    ages = [0, 0]
    for t in range(3 * gap):
        before = [p.detach().clone() for p in params]
        run(optimizer, params, 1, grads=lambda _, p: grads[id(p)])
        for i, p in enumerate(params):
            state = optimizer.state[p]
            if "exp_avg" not in state:  # not this tensor's turn
                assert torch.equal(p, before[i])
                continue
            selected = t % gap == 0 if projection == "blocks" else due(t + 1, i, 2, gap)
            ages[i] = 1 if selected else ages[i] + 1
            assert int(state["age"]) == ages[i]
            if selected and projection not in DENSE:
                moved = (p - before[i]).abs()
                assert torch.allclose(moved[moved > 0], torch.ones(()).double(), atol=1e-6)
                assert moved.sum() > 0


@given(tensors=st.integers(1, 12), count=st.integers(1, 12), order=st.sampled_from(["ascending", "descending"]))
def test_turns_visit_every_tensor_once_in_a_round(tensors, count, order):
    count = min(count, tensors)
    visits = [0] * tensors
    for interval in range(tensors):  # a multiple of a round
        turn = _turn(tensors, count, order, 0, interval)
        assert len(turn) == count
        for place in turn:
            visits[place] += 1
    assert set(visits) == {count}


@given(tensors=st.integers(1, 12), count=st.integers(1, 12))
def test_mirrored_turns_go_up_and_down(tensors, count):
    count = min(count, tensors)
    runs = math.ceil(tensors / count)
    turns = [_turn(tensors, count, "mirror", 0, i) for i in range(4 * runs)]
    assert set().union(*turns[:runs]) == set(range(tensors))
    assert all(len(turn) == count for turn in turns)
    starts = [min(turn) for turn in turns]
    assert starts[:runs] == sorted(starts[:runs])
    assert starts[runs - 1 : 2 * runs - 1] == sorted(starts[:runs], reverse=True)


def test_random_turns_and_columns_are_equally_likely():
    draws, n, count = 4000, 8, 3
    frequency = torch.zeros(n)
    for interval in range(draws):
        for place in _turn(n, count, "random", 1, interval):
            frequency[place] += 1
    expected = draws * count / n
    statistic = ((frequency - expected) ** 2 / (expected * (1 - count / n))).sum() * (n - 1) / n
    assert statistic < 24.3  # chi-square with 7 degrees of freedom, p = 0.001


@pytest.mark.parametrize("projection", ["columns", "random", "blocks"])
def test_choices_depend_on_the_seed_and_on_nothing_else(projection):
    weights = []
    for seed, disturbance in ((3, 0), (3, 99), (4, 0)):
        params = parameters((8, 12), (10, 6), (12, 8))
        torch.manual_seed(disturbance)
        optimizer = FRUGAL(params, density=0.4, projection=projection, update_proj_gap=2, seed=seed)
        for t in range(7):
            torch.rand(disturbance)
            run(optimizer, params, 1, seed=t)
        weights.append([p.detach() for p in params])
    assert all(map(torch.equal, weights[0], weights[1]))
    assert not all(map(torch.equal, weights[0], weights[2]))


def test_head_embeddings_and_norms_follow_adamw_exactly():
    torch.manual_seed(0)
    net = torch.nn.Sequential(
        torch.nn.Embedding(30, 32), torch.nn.Linear(32, 32), torch.nn.LayerNorm(32), torch.nn.Linear(32, 30)
    )
    groups = param_groups(net, rank=0.25)
    dense = {name for group in groups if "rank" not in group for name, _ in group["params"]}
    assert {"0.weight", "2.weight", "2.bias", "3.weight", "1.bias", "3.bias"} <= dense
    params = [p for p in net.parameters()]
    others = copies(params)
    a = FRUGAL(groups, lr=0.01)
    b = torch.optim.AdamW(others, lr=0.01, fused=True)
    for t in range(4):
        for p, q in zip(params, others, strict=True):
            p.grad = torch.randn(p.shape, generator=torch.Generator().manual_seed(t))
            q.grad = p.grad.clone()
        a.step()
        b.step()
    for (name, p), q in zip(net.named_parameters(), others, strict=True):
        assert torch.equal(p, q) is (name in dense)


# State.


def bytes_of(optimizer):
    return state_bytes(optimizer) - 4 * len(optimizer.state)  # without `step`


@given(
    shape=st.tuples(st.integers(2, 20), st.integers(2, 20)),
    density=st.floats(0.05, 0.9),
    inner=st.sampled_from(["adamw", "lion", "sgdm"]),
    projection=st.sampled_from([*COORDINATES, *DENSE]),
)
def test_state_is_the_formula(shape, density, inner, projection):
    m, n = shape
    moments = 2 if inner == "adamw" else 1
    (p,) = parameters(shape, dtype=torch.float32)
    optimizer = FRUGAL([p], density=density, projection=projection, inner=inner)
    promised = optimizer.report()
    run(optimizer, [p], 3)
    lengths = {"columns": (n, m), "rows": (m, n), "entries": (m * n, 1)}
    d, k = lengths.get(projection, sorted(shape))
    r = max(1, math.floor(density * d))
    expected = moments * r * k + (r if projection in COORDINATES else d * r)
    whole = r == d
    if whole:
        assert bytes_of(optimizer) == 4 * moments * m * n
    else:
        assert bytes_of(optimizer) == 4 * expected + 8  # `refreshes`, `age`
    assert promised == optimizer.report()
    assert f"{state_bytes(optimizer):,} B" in promised


@pytest.mark.parametrize("order", ["random", "ascending", "descending", "mirror"])
def test_tensors_without_a_turn_hold_nothing(order):
    params = parameters(*[(6, 10)] * 5, dtype=torch.float32)
    optimizer = FRUGAL(params, density=0.4, projection="blocks", order=order, update_proj_gap=2)
    for t in range(12):
        run(optimizer, params, 1, seed=t)
        awake = ["exp_avg" in optimizer.state[p] for p in params]
        assert sum(awake) == 2
        assert state_bytes(optimizer) == 2 * 2 * 60 * 4 + 5 * 8
        assert f"{state_bytes(optimizer):,} B" in optimizer.report()


@pytest.mark.parametrize("order", ["random", "mirror"])
@pytest.mark.parametrize("at", [1, 3, 4, 5])
def test_blocks_resume_anywhere(order, at):
    a = parameters(*[(6, 10)] * 5, (7,), dtype=torch.float32)
    first = FRUGAL(a, density=0.4, projection="blocks", order=order, update_proj_gap=2)
    for t in range(at):
        run(first, a, 1, seed=t)
    file = io.BytesIO()
    torch.save(first.state_dict(), file)
    file.seek(0)
    b = copies(a)
    second = FRUGAL(b, density=0.4, projection="blocks", order=order, update_proj_gap=2)
    second.load_state_dict(torch.load(file, weights_only=True))
    for t in range(at, at + 6):
        run(first, a, 1, seed=t)
        run(second, b, 1, seed=t)
    for p, q in zip(a, b, strict=True):
        assert torch.equal(p, q)


def test_a_blocks_checkpoint_of_another_shape_is_refused():
    a, b = parameters((6, 10), (4, 3)), parameters((6, 10), (3, 4))
    first, second = (FRUGAL(p, density=1.0, projection="blocks") for p in (a, b))
    run(first, a, 1)
    with pytest.raises(ValueError, match="does not fit"):
        second.load_state_dict(first.state_dict())


@pytest.mark.parametrize("projection", ALL)
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_low_precision_follows_float32_on_average(projection, dtype):
    (exact,) = parameters((40, 50), dtype=torch.float32)
    exact.data.fill_(1.0)
    low = torch.nn.Parameter(exact.detach().to(dtype))
    grads = (1 + torch.randn(30, 40, 50) / 4).to(dtype)
    for p in (exact, low):
        optimizer = FRUGAL([p], lr=1e-3, density=0.5, projection=projection, weight_decay=0.1, update_proj_gap=7)
        run(optimizer, [p], 30, grads=lambda t, p: grads[t])
    moved = (1 - exact).mean().item()
    assert moved > 0.005
    assert (1 - low.float()).mean().item() == pytest.approx(moved, rel=0.1)


# Convergence.


@given(
    seed=st.integers(0, 10**6),
    projection=st.sampled_from([*COORDINATES, *DENSE, "blocks"]),
    inner=st.sampled_from(["adamw", "lion", "sgdm"]),
    outer=st.sampled_from(["sign", "sgd"]),
)
def test_reaches_the_minimum_of_a_quadratic_at_any_density(seed, projection, inner, outer):
    """A gradient step everywhere: with a decaying rate it converges whatever the subspace."""
    generator = torch.Generator().manual_seed(seed)
    target = torch.randn(6, 9, generator=generator, dtype=torch.float64)
    curvature = 0.5 + torch.rand(6, 9, generator=generator, dtype=torch.float64)
    params = [torch.nn.Parameter(torch.zeros(6, 9, dtype=torch.float64)) for _ in range(2)]
    betas = (0.5, 0.9)
    optimizer = FRUGAL(
        params,
        lr=0.15,
        betas=betas,
        density=0.3,
        projection=projection,
        inner=inner,
        outer=outer,
        update_proj_gap=10,
        weight_decay=0.0,
    )
    for t in range(120):
        optimizer.param_groups[0]["lr"] = 0.15 * (1 - t / 120) ** 2
        for p in params:
            p.grad = curvature * (p.detach() - target)
        optimizer.step()
    for p in params:
        assert (p - target).norm() / target.norm() < 0.03


# Bad input.


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"density": 1.5}, r"density must be a number in \[0, 1\], got 1.5"),
        ({"density": -0.1}, "density must be"),
        ({"density": "much"}, "density must be"),
        ({"density": float("nan")}, "density must be"),
        ({"density": 0.5, "rank": 3}, "density=0.5 and rank=3 say the same"),
        ({"rank": 0}, "rank must be"),
        ({"inner": "adam"}, "inner must be one of adamw, lion, sgdm, got 'adam'"),
        ({"outer": "same"}, "outer must be one of sign, sgd, none, got 'same'"),
        ({"scale": 0}, "scale must be a number > 0"),
        ({"outer_scale": -1.0}, "outer_scale must be a number > 0"),
        ({"projection": "randk"}, "projection must be one of columns, rows, entries, svd, power, random, blocks"),
        ({"projection": "svd", "contiguous": True}, "contiguous=True needs"),
        ({"contiguous": 1}, "contiguous must be True or False"),
        ({"order": "mirror"}, "needs projection='blocks'"),
        ({"projection": "blocks", "order": "zigzag"}, "order must be one of"),
        ({"side": "left"}, "side='left' means nothing for projection='columns'"),
        ({"betas": (0.9, 1.0)}, "betas must be"),
        ({"amsgrad": True}, "amsgrad=True is not supported by FRUGAL"),
        ({"density": 0.5, "projection": SVD(rank=3)}, "contradicts projection"),
    ],
)
def test_bad_settings_are_named(settings, message):
    params = parameters((4, 6))
    with pytest.raises(ValueError, match=message):
        FRUGAL(params, **settings)


def test_groups_take_density_or_rank():
    a, b, c = parameters((4, 6), (6, 4), (8, 8))
    optimizer = FRUGAL([{"params": [a], "density": 0.5}, {"params": [b], "rank": 2}, {"params": [c]}])
    assert [(g["density"], g["rank"]) for g in optimizer.param_groups] == [(0.5, None), (None, 2), (None, None)]
    with pytest.raises(ValueError, match="say the same"):
        optimizer.add_param_group({"params": parameters((3, 3)), "density": 0.5, "rank": 2})
    with pytest.raises(ValueError, match=r"density=0\.3 applies to no group"):
        FRUGAL([{"params": [a], "rank": 2}], density=0.3)
    optimizer = FRUGAL([a], rank=2)
    optimizer.add_param_group({"params": [b], "density": 0.5})
    assert [(g["density"], g["rank"]) for g in optimizer.param_groups] == [(None, 2), (0.5, None)]


def test_a_projection_object_says_everything():
    (p,) = parameters((4, 6))
    optimizer = FRUGAL([p], projection=Coordinates(axis="rows", rank=2, contiguous=True, seed=5))
    group = optimizer.param_groups[0]
    assert [group[key] for key in ("projection", "rank", "contiguous", "seed")] == ["rows", 2, True, 5]


def test_a_rank_above_the_axis_is_reported():
    with pytest.warns(UserWarning, match="rank 7 is above"):
        FRUGAL(parameters((4, 6)), rank=7)
