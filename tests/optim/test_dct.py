import copy
import io
import math
import re
from functools import partial

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch.utils._python_dispatch import TorchDispatchMode

import training
from slimstate.optim import AdamW, DCTAdamW, param_groups, state_bytes
from slimstate.optim._moments import Moment
from slimstate.optim._projected import Matrix
from slimstate.optim._quantize import LEVELS
from slimstate.optim.dct import carry_
from slimstate.projections import DCT, SVD, Hadamard, matrix_view
from training import parameter, run

trajectory = partial(training.trajectory, DCTAdamW)


PROJECTIONS = ["dct", "dct3", "hadamard"]
ERRORS = [None, "param", "8bit", "4bit"]
EXACT = dict(weight_decay=0.0, eps=1e-12)
# With an epsilon far above the gradient a step is lr / eps times the first moment: plain SGD at beta1 = 0.
SGD = dict(betas=(0.0, 0.0), eps=1e8, weight_decay=0.0)
sides = st.integers(1, 12)
ranks = st.one_of(st.integers(1, 14), st.floats(0.01, 1))
quiet = pytest.mark.filterwarnings("ignore:rank .* is above the smaller side")


def gradients(shape, steps, dtype=torch.float32, seed=0):
    """Gradients that drift, so that some columns stay chosen and some change."""
    generator = torch.Generator().manual_seed(seed)
    g = torch.randn(shape, generator=generator, dtype=torch.float64)
    grads = []
    for _ in range(steps):
        g = 0.7 * g + 0.7 * torch.randn(shape, generator=generator, dtype=torch.float64)
        grads.append(g.to(dtype))
    return grads


def basis(name, d, dtype=torch.float64):
    """Q (d x d)."""
    return DCTAdamW.projections[name].inverse(torch.eye(d, dtype=dtype))


def open_(optimizer, p, x):
    """x of p's shape as the optimizer sees it, d x k."""
    return optimizer._view(p, optimizer.param_groups[0]).open(x)


# The method.


def written_out(w, grads, *, q, lr, betas, eps, weight_decay, rank, update_proj_gap, scale, transport, norm, feedback):
    """The method as its docstring states it, on one wide matrix, in full-size arithmetic."""
    (b1, b2), d = betas, len(w)
    e, j = torch.zeros_like(w), []
    m = v = torch.zeros(rank, w.shape[1], dtype=w.dtype)
    ages = [0] * rank
    for t, g in enumerate(grads):
        a = g + e
        if t % update_proj_gap == 0:
            scores = torch.linalg.vector_norm(q.mT @ a, norm, dim=1)
            new = sorted(sorted(range(d), key=lambda i: (-scores[i].item(), i))[:rank])
            if transport == "rotate":
                c = torch.tensor([[float(x == y) for y in j] for x in new], dtype=w.dtype) if j else torch.eye(rank)
                m, v = c.to(m) @ m, c.to(m) @ v
                ages = [ages[j.index(x)] if x in j else 0 for x in new]
            j = new
        r = q[:, j].mT @ a
        e = a - q[:, j] @ r if feedback else e
        ages = [age + 1 for age in ages]
        m, v = b1 * m + (1 - b1) * r, b2 * v + (1 - b2) * r**2
        bias1, bias2 = (1 - b ** torch.tensor(ages, dtype=w.dtype)[:, None] for b in betas)
        w = (1 - lr * weight_decay) * w - lr * scale * q[:, j] @ (m / bias1 / ((v / bias2).sqrt() + eps))
    return w, e


@given(
    d=st.integers(2, 9),
    extra=st.integers(0, 5),
    rank=st.integers(1, 9),
    turned=st.booleans(),
    projection=st.sampled_from(PROJECTIONS),
    norm=st.sampled_from([1, 2]),
    gap=st.integers(1, 4),
    transport=st.sampled_from(["rotate", "keep"]),
    feedback=st.booleans(),
    seed=st.integers(0, 1000),
)
def test_is_the_method_that_the_docstring_states(
    d, extra, rank, turned, projection, norm, gap, transport, feedback, seed
):
    rank, shape = min(rank, d), (d, d + extra)
    common = dict(lr=0.1, betas=(0.8, 0.95), eps=1e-3, weight_decay=0.2, rank=rank, scale=0.5, norm=norm)
    common |= dict(transport=transport, update_proj_gap=gap)
    start, grads = parameter(shape, torch.float64).detach(), gradients(shape, 8, torch.float64, seed)
    expected, error = written_out(start, grads, q=basis(projection, d), feedback=feedback, **common)
    p = torch.nn.Parameter(start.mT.clone() if turned else start.clone())
    settings = dict(projection=projection, error_feedback="param" if feedback else None)
    optimizer = DCTAdamW([p], side="right" if turned else "left", **settings, **common)
    run(optimizer, [p], [[g.mT if turned else g] for g in grads])
    torch.testing.assert_close(p.detach().mT if turned else p.detach(), expected, rtol=1e-8, atol=1e-8)
    if feedback:
        torch.testing.assert_close(optimizer.state[p]["error"].mT, error, rtol=1e-8, atol=1e-8)


@pytest.mark.parametrize("projection", PROJECTIONS)
@pytest.mark.parametrize("feedback", ERRORS)
@given(rows=sides, columns=sides, rank=st.one_of(st.integers(12, 20), st.just(1.0)))
@quiet
def test_full_rank_is_adamw_in_the_rotated_basis(projection, feedback, rows, columns, rank):
    p, hp = parameter((rows, columns), torch.float64), dict(lr=0.05, weight_decay=0.1)
    grads = gradients((rows, columns), 6, torch.float64)
    view = matrix_view((rows, columns))
    q = basis(projection, view.d)
    rotated = torch.nn.Parameter(q.mT @ view.open(p.detach().clone()))
    run(torch.optim.AdamW([rotated], **hp), [rotated], [[q.mT @ view.open(g)] for g in grads])
    optimizer = DCTAdamW([p], rank=rank, projection=projection, error_feedback=feedback, **hp)
    run(optimizer, [p], [[g] for g in grads])
    torch.testing.assert_close(q.mT @ view.open(p.detach()), rotated.detach(), rtol=1e-8, atol=1e-8)
    if view.d == 1:  # the basis of one dimension is 1
        plain = parameter((rows, columns), torch.float64)
        run(torch.optim.AdamW([plain], **hp), [plain], [[g] for g in grads])
        torch.testing.assert_close(p, plain, rtol=1e-9, atol=1e-9)
    if feedback:
        assert optimizer.state[p]["index"].tolist() == list(range(view.d))
        assert optimizer.state[p].get("error_scale", optimizer.state[p]["error"]).abs().max() < 1e-12


@pytest.mark.parametrize("transport", ["rotate", "keep"])
def test_the_order_of_the_columns_never_matters(transport):
    grads = gradients((9, 12), 8, torch.float64)
    p, q = (parameter((9, 12), torch.float64) for _ in range(2))
    settings = dict(lr=0.1, rank=4, update_proj_gap=10**9, transport=transport, error_feedback="param")
    a, b = DCTAdamW([p], **settings), DCTAdamW([q], **settings)
    for t, g in enumerate(grads):
        run(a, [p], [[g]])
        run(b, [q], [[g]])
        order = torch.randperm(4, generator=torch.Generator().manual_seed(t))
        for key in ("index", "exp_avg", "exp_avg_sq", "ages"):
            b.state[q][key] = b.state[q][key][order]
    torch.testing.assert_close(p, q, rtol=1e-10, atol=1e-10)


@given(p=st.floats(0.05, 20), norm=st.sampled_from([1, 2]), projection=st.sampled_from(PROJECTIONS))
def test_steps_and_columns_do_not_depend_on_the_gradients_scale(p, norm, projection):
    grads = gradients((9, 12), 6, torch.float64)
    common = dict(lr=0.1, rank=4, norm=norm, projection=projection, error_feedback="param", **EXACT)
    ours = trajectory(parameter((9, 12), torch.float64), grads, **common)
    scaled = trajectory(parameter((9, 12), torch.float64), [p * g for g in grads], **common)
    torch.testing.assert_close(scaled, ours, rtol=1e-7, atol=1e-7)


@pytest.mark.parametrize("projection", PROJECTIONS)
def test_updates_without_momentum_lie_in_the_span_of_the_chosen_columns(projection):
    p = parameter((17, 13), torch.float64)
    optimizer = DCTAdamW([p], lr=0.1, rank=5, projection=projection, **EXACT)
    for g in gradients((17, 13), 5, torch.float64):
        before = p.detach().clone()
        run(optimizer, [p], [[g]])
        q = basis(projection, 13)[:, optimizer.state[p]["index"].long()]
        moved = open_(optimizer, p, p.detach() - before)
        torch.testing.assert_close(q @ (q.mT @ moved), moved, rtol=1e-9, atol=1e-12)


# Moments and their ages.


@given(d=st.integers(1, 30), r=st.integers(1, 30), k=st.integers(1, 4), seed=st.integers(0, 1000), low=st.booleans())
def test_kept_columns_keep_moments_and_age_bitwise_and_new_ones_start_at_zero(d, r, k, seed, low):
    generator, r = torch.Generator().manual_seed(seed), min(r, d)
    old, new = (torch.randperm(d, generator=generator)[:r].sort().values.int() for _ in range(2))
    moments = [torch.randn(r, k, generator=generator).to(torch.bfloat16 if low else torch.float32) for _ in range(2)]
    moments[0][0] = math.nan  # goes where its column goes, and nowhere else
    ages = torch.randint(1, 50, (r,), generator=generator, dtype=torch.int32)
    before, aged = [x.clone() for x in moments], ages.tolist()
    carry_([Moment(None, key, 0, x) for key, x in zip(("exp_avg", "exp_avg_sq"), moments, strict=True)], ages, old, new)
    places = {column: i for i, column in enumerate(old.tolist())}
    for i, column in enumerate(new.tolist()):
        kept = places.get(column)
        assert ages[i] == (0 if kept is None else aged[kept])
        for now, then in zip(moments, before, strict=True):
            expected = torch.zeros_like(now[i]) if kept is None else then[kept]
            assert torch.equal(now[i].view(torch.uint8), expected.view(torch.uint8))


def test_ages_count_the_gradients_that_a_column_has_seen():
    p = parameter((8, 12))
    optimizer = DCTAdamW([p], rank=3, lr=0.1)
    ages = {}
    for g in gradients((8, 12), 12):
        run(optimizer, [p], [[g]])
        index = optimizer.state[p]["index"].tolist()
        ages = {i: ages.get(i, 0) + 1 for i in index}
        assert optimizer.state[p]["ages"].tolist() == list(ages.values())
        assert index == sorted(index)
    assert 1 < max(ages.values()) < 12


def test_the_first_step_of_a_new_column_is_lr_and_not_the_age_of_the_parameters():
    """Each column in turn gets a gradient of its own: every step is a column's first, or its oldest's age tells."""
    p = torch.nn.Parameter(torch.zeros(8, 20, dtype=torch.float64))
    optimizer = DCTAdamW([p], rank=1, lr=0.1, **EXACT)
    q = basis("dct", 8)
    for t in range(24):
        before = p.detach().clone()
        run(optimizer, [p], [[q[:, t % 8, None] * torch.ones(20)]])
        step = q.mT @ (p.detach() - before)
        assert step[t % 8].abs().max() == pytest.approx(0.1, rel=1e-6)


# Error feedback.


@given(
    rows=sides,
    columns=sides,
    rank=ranks,
    norm=st.sampled_from([1, 2]),
    gap=st.integers(1, 4),
    projection=st.sampled_from(PROJECTIONS),
    feedback=st.sampled_from(ERRORS[1:]),
    seed=st.integers(0, 1000),
)
@quiet
def test_what_was_applied_and_what_is_kept_add_up_to_the_gradients(
    rows, columns, rank, norm, gap, projection, feedback, seed
):
    p = parameter((rows, columns), torch.float64)
    settings = dict(rank=rank, norm=norm, update_proj_gap=gap, projection=projection)
    # without a memory the first moment is R
    optimizer = DCTAdamW([p], betas=(0.0, 0.9), error_feedback=feedback, **settings)
    group, applied, total, allowed = optimizer.param_groups[0], 0.0, 0.0, 1e-10
    for g in gradients((rows, columns), 7, torch.float64, seed):
        run(optimizer, [p], [[g]])
        state, d = optimizer.state[p], min(rows, columns)
        applied = applied + optimizer._projection(group).up(state["exp_avg"], state["index"], d)
        total = total + open_(optimizer, p, g)
        matrix = Matrix(p, None, p, torch.zeros_like(p), state, 1.0, (0, 0, 1), optimizer._view(p, group))
        error = optimizer._corrected(matrix, group, 0).read(slice(None))
        if feedback != "param":  # a quantisation is off by less than a step
            allowed = allowed + state["error_scale"] / LEVELS[feedback]
        assert ((applied + error - total).abs() <= allowed).all()


@pytest.mark.parametrize("feedback", ["8bit", "4bit"])
def test_components_below_half_a_step_of_the_code_are_not_lost(feedback):
    """Rounded to nearest they would vanish at every step, and never be applied."""
    q = basis("dct", 8).float()
    sizes = torch.tensor([100.0, 90.0, 80.0, 70.0, 1.0, 0.0, 0.0, 0.0])  # of 70/127 and 70/7 a step: 0.6 and 10
    g = (q * sizes) @ torch.ones(8, 400)
    p = torch.nn.Parameter(torch.zeros(8, 400))
    optimizer = DCTAdamW([p], rank=3, betas=(0.0, 0.0), error_feedback=feedback, side="left")
    applied, steps = torch.zeros(8, 400), 200
    for _ in range(steps):
        run(optimizer, [p], [[g]])
        state = optimizer.state[p]
        applied += DCT(rank=3).up(state["exp_avg"], state["index"], 8)
    small = (q.mT @ applied)[4].mean() / steps
    assert 0.5 < small < 1.5


@pytest.mark.parametrize("feedback", ERRORS[1:])
@pytest.mark.parametrize("bad", [math.inf, math.nan])
def test_a_bad_gradient_keeps_the_columns_and_the_errors(feedback, bad):
    p = parameter((8, 12))
    optimizer = DCTAdamW([p], rank=3, error_feedback=feedback)
    run(optimizer, [p], [[g] for g in gradients((8, 12), 3)])
    before = {k: x.clone() for k, x in optimizer.state[p].items() if k in ("index", "error", "error_scale")}
    g = torch.randn(8, 12)
    g[2, 5] = bad
    run(optimizer, [p], [[g]])
    state = optimizer.state[p]
    assert torch.equal(state["index"], before["index"])
    for key in before.keys() - {"index"}:
        assert torch.equal(state[key][5], before[key][5])
        assert not torch.equal(state[key], before[key])
    assert all(x.isfinite().all() for k, x in state.items() if k in ("error", "error_scale"))
    assert p[:, 5].isnan().any()  # as with any Adam
    assert p[:, :5].isfinite().all()


def test_half_precision_errors_do_not_overflow():
    p = torch.nn.Parameter(torch.zeros(4, 6, dtype=torch.float16))
    optimizer = DCTAdamW([p], rank=1, update_proj_gap=10**6, error_feedback="param", lr=1e-3)
    run(optimizer, [p], [[basis("dct", 4).half()[:, :1].expand(4, 6)]])
    run(optimizer, [p], [[torch.full((4, 6), 3e4).half() * torch.tensor([1, 1, -1, -1])[:, None]]] * 5)
    assert optimizer.state[p]["error"].isfinite().all()
    assert p.isfinite().all()


# Convergence.


def quadratic(steps=100, shape=(8, 12), seed=0, lr=0.5, **settings):
    """|W - W*| / |W*| at the end of gradient descent on its square."""
    target = torch.randn(shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)
    p = torch.nn.Parameter(torch.zeros(shape, dtype=torch.float64))
    optimizer = DCTAdamW([p], lr=lr * SGD["eps"], **SGD, **settings)
    for _ in range(steps):
        run(optimizer, [p], [[p.detach() - target]])
    return ((p - target).norm() / target.norm()).item()


@given(
    rows=st.integers(2, 5),
    columns=st.integers(2, 6),
    rank=st.integers(1, 5),
    norm=st.sampled_from([1, 2]),
    projection=st.sampled_from(PROJECTIONS),
    seed=st.integers(0, 100),
)
@quiet
def test_gradient_descent_solves_a_quadratic_at_any_rank_where_columns_follow(
    rows, columns, rank, norm, projection, seed
):
    common = dict(shape=(rows, columns), rank=rank, norm=norm, projection=projection, seed=seed)
    assert quadratic(**common) < 1e-3
    assert quadratic(error_feedback="param", lr=0.1, **common) < 1e-3  # what is kept is late by about d/r steps
    if rank < min(rows, columns):
        assert quadratic(update_proj_gap=10**9, **common) > 0.02


@pytest.mark.parametrize("feedback", ["8bit", "4bit"])
def test_gradient_descent_with_quantised_errors_solves_a_quadratic(feedback):
    assert quadratic(rank=2, error_feedback=feedback, lr=0.1) < 1e-3  # codes shrink with what they hold


def logistic(optimizer_of, steps=200):
    """The loss of a multinomial regression."""
    generator = torch.Generator().manual_seed(3)
    x = torch.randn(400, 24, generator=generator)
    y = (x @ torch.randn(24, 16, generator=generator)).argmax(1)
    p = torch.nn.Parameter(torch.zeros(24, 16))
    optimizer = optimizer_of(p)
    scheduler = torch.optim.lr_scheduler.LinearLR(optimizer, 1.0, 0.01, steps)
    for _ in range(steps):
        optimizer.zero_grad()
        loss = torch.nn.functional.cross_entropy(x @ p, y)
        loss.backward()
        optimizer.step()
        scheduler.step()
    return loss.item()


@pytest.mark.parametrize("feedback", ERRORS)
def test_a_logistic_regression_is_learned_nearly_as_well_as_by_adamw(feedback):
    full = logistic(lambda p: torch.optim.AdamW([p], lr=0.1))
    ours = logistic(lambda p: DCTAdamW([p], lr=0.1, rank=4, error_feedback=feedback))
    fixed = logistic(lambda p: DCTAdamW([p], lr=0.1, rank=4, update_proj_gap=10**9))
    print(f"AdamW {full:.4f}, {feedback} {ours:.4f}, one choice {fixed:.4f}")
    assert ours < 0.5 * fixed
    assert ours < full + 0.2


# Choices.


def bad_gradients(like):
    infinite, nan = torch.randn_like(like), torch.randn_like(like)
    infinite[0, 0], nan[0, 0] = math.inf, math.nan
    return {"zero": torch.zeros_like(like), "inf": infinite, "nan": nan}


@pytest.mark.parametrize("projection", PROJECTIONS)
@pytest.mark.parametrize("bad", ["zero", "inf", "nan"])
@pytest.mark.parametrize("gap", [1, 2])
def test_a_bad_gradient_leaves_the_columns_as_they_were(bad, projection, gap):
    p = parameter((12, 20))
    optimizer = DCTAdamW([p], rank=3, update_proj_gap=gap, projection=projection)
    run(optimizer, [p], [[torch.randn_like(p)]] * 2)
    before = optimizer.state[p]["index"].clone()
    run(optimizer, [p], [[bad_gradients(p)[bad]]])  # step 3 is due
    assert torch.equal(optimizer.state[p]["index"], before)
    assert int(optimizer.state[p]["refreshes"]) == (3 if gap == 1 else 1)
    run(optimizer, [p], [[torch.randn_like(p)]] * 2)  # step 5 is
    assert not torch.equal(optimizer.state[p]["index"], before)


@pytest.mark.parametrize("bad", ["zero", "inf", "nan"])
def test_the_first_good_gradient_chooses_though_it_is_not_due(bad):
    p, g = parameter((12, 20)), torch.randn(12, 20)
    optimizer = DCTAdamW([p], rank=3, update_proj_gap=100)
    run(optimizer, [p], [[bad_gradients(p)[bad]]] * 2)
    assert int(optimizer.state[p]["refreshes"]) == 0
    run(optimizer, [p], [[g]])
    expected = DCT(rank=3).fit(g, None, ())
    assert torch.equal(optimizer.state[p]["index"], expected)
    run(optimizer, [p], [[torch.randn_like(p)]] * 2)
    assert torch.equal(optimizer.state[p]["index"], expected)
    assert int(optimizer.state[p]["refreshes"]) == 1


def test_one_matrix_of_a_stack_without_a_gradient_waits_alone():
    p = parameter((3, 9, 15))
    optimizer = DCTAdamW([p], rank=3, batch_dims=1, update_proj_gap=5)
    dead = torch.randn(3, 9, 15)
    dead[1] = 0
    run(optimizer, [p], [[dead]])
    assert optimizer.state[p]["refreshes"].tolist() == [1, 0, 1]
    before = optimizer.state[p]["index"].clone()
    alive = torch.randn(3, 9, 15)
    run(optimizer, [p], [[alive]])
    assert optimizer.state[p]["refreshes"].tolist() == [1, 1, 1]
    before[1] = DCT(rank=3).fit(alive[1], None, ())
    assert torch.equal(optimizer.state[p]["index"], before)


@pytest.mark.parametrize("feedback", ERRORS)
def test_zero_gradients_leave_only_decay(feedback):
    shapes = [(12, 20), (20, 12), (7,)]
    params = [parameter(shape) for shape in shapes]
    starts = [p.detach().clone() for p in params]
    optimizer = DCTAdamW(params, lr=0.1, weight_decay=0.2, rank=3, error_feedback=feedback)
    run(optimizer, params, [[torch.zeros_like(p) for p in params]] * 6)
    for p, start in zip(params, starts, strict=True):
        torch.testing.assert_close(p.detach(), start * (1 - 0.1 * 0.2) ** 6, rtol=1e-5, atol=0)


class Waits(TorchDispatchMode):
    """Counts what would wait for the device, had the tensor not been a counter."""

    def __init__(self, counters):
        super().__init__()
        self.counters = {x.data_ptr() for x in counters}
        self.seen = []

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        waits = ("_local_scalar_dense", "nonzero", "equal", "is_nonzero", "masked_select", "unique")
        name = func.name().removeprefix("aten::").split(".")[0]
        if name in waits and args[0].data_ptr() not in self.counters:
            self.seen.append(name)
        return func(*args, **(kwargs or {}))


@pytest.mark.parametrize("feedback", ERRORS)
@pytest.mark.parametrize("projection", PROJECTIONS)
@pytest.mark.parametrize("gap", [1, 3])
def test_no_step_waits_for_the_device_but_where_a_matrix_of_a_larger_gap_chooses(projection, feedback, gap):
    params = [parameter((12, 20)), parameter((20, 12), torch.bfloat16), parameter((3, 9, 7))]
    settings = dict(rank=3, projection=projection, error_feedback=feedback, update_proj_gap=gap)
    groups = [{"params": params[:2], **settings}, {"params": params[2:], "batch_dims": 1, **settings}]
    optimizer = DCTAdamW(groups)
    run(optimizer, params, [[torch.randn_like(p) for p in params]])
    states = [optimizer.state[p] for p in params]
    for _ in range(5):
        before = sum(int(state["refreshes"].sum()) for state in states)
        with Waits([state[key] for state in states for key in ("step", "refreshes")]) as mode:
            run(optimizer, params, [[torch.randn_like(p) for p in params]])
        chosen = sum(int(state["refreshes"].sum()) for state in states) - before
        assert len(mode.seen) == (0 if gap == 1 else chosen)


# What is kept.


@given(
    rows=st.integers(1, 40),
    columns=st.integers(1, 40),
    stack=st.integers(0, 3),
    rank=st.one_of(st.integers(1, 50), st.floats(0.01, 1)),
    side=st.sampled_from(["auto", "left", "right", "reverse"]),
    transport=st.sampled_from(["rotate", "keep"]),
    feedback=st.sampled_from(ERRORS),
    dtype=st.sampled_from([torch.float32, torch.float64, torch.bfloat16]),
)
@quiet
def test_state_bytes_are_the_formula(rows, columns, stack, rank, side, transport, feedback, dtype):
    shape = (stack, rows, columns) if stack else (rows, columns)
    p = parameter(shape, dtype)
    settings = dict(side=side, transport=transport, error_feedback=feedback, batch_dims=int(stack > 0))
    optimizer = DCTAdamW([p], rank=rank, **settings)
    assert state_bytes(optimizer) == 0
    run(optimizer, [p], [[torch.randn_like(p)]] * 2)
    d, k = (rows, columns) if side == "left" else (columns, rows)
    if side in ("auto", "reverse"):
        d, k = sorted((rows, columns), reverse=side == "reverse")
    r = min(rank if isinstance(rank, int) else max(1, math.floor(rank * d)), d, k)
    count, wide = max(stack, 1), 8 if dtype == torch.float64 else 4
    error = {None: 0, "param": d * k * p.itemsize, "8bit": k * (d + wide), "4bit": k * ((d + 1) // 2 + wide)}
    assert state_bytes(optimizer) == 4 + count * (2 * k * r * wide + 2 * r * 4 + 4 + error[feedback])
    assert f"state in total: {state_bytes(optimizer):,} B" in optimizer.report()


@pytest.mark.parametrize("feedback", ERRORS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("moments", [None, "param"])
def test_dtypes_are_those_that_were_asked_for(feedback, dtype, moments):
    p = parameter((12, 20), dtype)
    optimizer = DCTAdamW([p], rank=3, moment_dtype=moments, error_feedback=feedback)
    run(optimizer, [p], [[torch.randn_like(p)]] * 3)
    state, wide = optimizer.state[p], torch.float64 if dtype == torch.float64 else torch.float32
    assert {state[key].dtype for key in ("exp_avg", "exp_avg_sq")} == {dtype if moments else wide}
    assert {state[key].dtype for key in ("index", "ages")} == {torch.int32}
    assert p.isfinite().all()
    if feedback:
        assert state["error"].dtype == {"param": dtype, "8bit": torch.int8, "4bit": torch.uint8}[feedback]
        assert state.get("error_scale", p.to(wide)).dtype == wide


@pytest.mark.parametrize("side", ["left", "right"])
@pytest.mark.parametrize("feedback", ERRORS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("projection", ["dct", "hadamard"])
def test_a_step_allocates_nothing_larger_than_a_block(side, feedback, dtype, projection):
    shape = (192, 1 << 14) if side == "left" else (1 << 14, 192)  # 12 MiB in float32
    p = torch.nn.Parameter(torch.randn(shape).to(dtype))
    optimizer = DCTAdamW([p], rank=8, side=side, error_feedback=feedback, projection=projection)
    p.grad = torch.randn_like(p)
    optimizer.step()
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU], profile_memory=True) as profiler:
        optimizer.step()
    events, largest = list(profiler.profiler.kineto_results.experimental_event_tree()), 0
    while events:
        event = events.pop()
        events += event.children
        if event.typed[0].name == "Allocation":
            largest = max(largest, event.typed[1].alloc_size)
    assert 0 < largest <= 4 << 20


# Weights, shapes and layouts.


def test_bfloat16_weights_follow_float32_ones():
    moved = {}
    for dtype in (torch.float32, torch.bfloat16):
        p = torch.nn.Parameter(torch.ones(16, 256, dtype=dtype))
        optimizer = DCTAdamW([p], lr=4e-3, rank=1, **EXACT)  # a constant gradient moves every entry by lr / sqrt(d)
        run(optimizer, [p], [[torch.ones_like(p)]] * 100)
        moved[dtype] = 1 - p.detach().double()
    torch.testing.assert_close(moved[torch.float32], torch.full((16, 256), 0.1).double(), rtol=1e-3, atol=0)
    assert abs(moved[torch.bfloat16].mean() - 0.1) < 1e-3


@pytest.mark.parametrize("feedback", ERRORS[:2])
@pytest.mark.parametrize("shape", [(3, 9, 15), (3, 15, 9), (2, 2, 9, 15), (2, 8, 3, 2, 2)])
def test_stacked_matrices_equal_separate_ones(shape, feedback):
    batch_dims = 2 if shape[:2] == (2, 2) else 1
    single, count = shape[batch_dims:], math.prod(shape[:batch_dims])
    members = [gradients(single, 6, torch.float64, seed) for seed in range(count)]
    p = parameter(shape, torch.float64)
    apart = [torch.nn.Parameter(x.clone()) for x in p.detach().reshape(count, *single)]
    common = dict(lr=0.1, rank=3, error_feedback=feedback)
    stacks = [[torch.stack(gs).reshape(shape)] for gs in zip(*members, strict=True)]
    run(DCTAdamW([p], batch_dims=batch_dims, **common), [p], stacks)
    for q, grads in zip(apart, members, strict=True):
        run(DCTAdamW([q], **common), [q], [[g] for g in grads])
    torch.testing.assert_close(p.detach().reshape(count, *single), torch.stack([q.detach() for q in apart]))


@pytest.mark.parametrize("feedback", ERRORS)
@pytest.mark.parametrize("shape", [(8, 3, 2, 2), (20, 2, 3, 2)])
def test_a_convolution_equals_its_matrix_and_layouts_agree(shape, feedback):
    grads = gradients(shape, 6, torch.float64)
    common = dict(lr=0.1, rank=3, error_feedback=feedback)
    conv = trajectory(parameter(shape, torch.float64), grads, **common)
    matrix = torch.nn.Parameter(parameter(shape, torch.float64).detach().flatten(1))
    flat = trajectory(matrix, [g.flatten(1) for g in grads], **common)
    last = torch.nn.Parameter(parameter(shape, torch.float64).detach().to(memory_format=torch.channels_last))
    formatted = trajectory(last, [g.to(memory_format=torch.channels_last) for g in grads], **common)
    strided = trajectory(parameter(shape, torch.float64), [torch.stack([g, g], -1)[..., 0] for g in grads], **common)
    # a code may fall to the other side where its last bit decides
    tolerance = dict(rtol=1e-9, atol=1e-9) if feedback in (None, "param") else dict(rtol=0, atol=1e-6)
    for other in (flat.view(conv.shape), formatted, strided):
        torch.testing.assert_close(other, conv, **tolerance)


@given(
    shapes=st.lists(st.lists(st.integers(1, 13), min_size=0, max_size=4), min_size=1, max_size=5),
    rank=st.one_of(st.integers(1, 4), st.floats(0.01, 1)),
    projection=st.sampled_from(PROJECTIONS),
    feedback=st.sampled_from(ERRORS),
)
@quiet
def test_any_mixture_of_shapes_moves_as_each_alone(shapes, rank, projection, feedback):
    shapes = [(5, 7), *map(tuple, shapes)]
    params = [parameter(shape, torch.float64, seed) for seed, shape in enumerate(shapes)]
    starts = [p.detach().clone() for p in params]
    settings = dict(lr=0.05, rank=rank, projection=projection, error_feedback=feedback)
    optimizer = DCTAdamW([(f"w{i}", p) for i, p in enumerate(params)], **settings)
    steps = [[torch.randn(shape, dtype=torch.float64) for shape in shapes] for _ in range(3)]
    run(optimizer, params, steps)
    for i, (p, start) in enumerate(zip(params, starts, strict=True)):
        assert not torch.equal(p, start)
        alone, idle = torch.nn.Parameter(start), parameter((5, 7))  # the rank needs a matrix
        run(DCTAdamW([(f"w{i}", alone), ("idle", idle)], **settings), [alone, idle], [[g[i], None] for g in steps])
        assert torch.equal(p, alone)


@pytest.mark.parametrize("feedback", ERRORS)
@pytest.mark.parametrize("shape", [(12, 20), (6,)])
def test_maximize_is_the_opposite_gradient(shape, feedback):
    grads = [torch.randn(shape, dtype=torch.float64) for _ in range(5)]
    weights = []
    for sign, maximize in ((1, False), (-1, True)):
        params = [parameter(shape, torch.float64), parameter((9, 5), torch.float64)]
        optimizer = DCTAdamW(params, lr=0.1, rank=3, maximize=maximize, error_feedback=feedback)
        run(optimizer, params, [[sign * g, None] for g in grads])
        weights.append(params[0].detach())
    torch.testing.assert_close(*weights, rtol=1e-9, atol=1e-9)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("feedback", ERRORS)
def test_gradients_and_storages_are_left_alone(feedback, dtype):
    shapes = [(12, 20), (20, 12), (8, 3, 2, 2), (6,), ()]
    params = [parameter(shape, dtype) for shape in shapes]
    params.append(torch.nn.Parameter(parameter((20, 2, 3, 3), dtype).detach().to(memory_format=torch.channels_last)))
    pointers = [(p.data_ptr(), p.stride()) for p in params]
    optimizer = DCTAdamW(params, rank=2, error_feedback=feedback, weight_decay=0.1)
    for _ in range(4):
        for p in params:
            p.grad = torch.randn_like(p)
        grads, copies = [p.grad for p in params], [p.grad.clone() for p in params]
        optimizer.step()
        assert [(p.data_ptr(), p.stride()) for p in params] == pointers
        for p, g, copied in zip(params, grads, copies, strict=True):
            assert p.grad is g
            assert torch.equal(g, copied)


def test_vectors_get_adamw_bit_for_bit():
    p, q, matrix = parameter((6,)), parameter((6,)), parameter((4, 5))
    ours, dense = DCTAdamW([p, matrix], lr=0.1), AdamW([q], lr=0.1)
    for g in gradients((6,), 5):
        run(ours, [p, matrix], [[g, None]])
        run(dense, [q], [[g]])
    assert torch.equal(p, q)


# Resuming.


def setting(dtype, seed=0, **settings):
    """Parameters, an optimizer with every kind of state, and ten steps of gradients."""
    shapes = [(12, 20), (20, 12), (6,), (2, 9, 7), (8, 3, 2, 2)]
    params = [parameter(shape, dtype, seed + i) for i, shape in enumerate(shapes)]
    common = dict(rank=3, **settings)
    stack = {"params": [params[3]], "batch_dims": 1, **common}
    groups = [{"params": [params[0], params[1], params[4]], **common}, stack, {"params": [params[2]]}]
    generator = torch.Generator().manual_seed(11)
    grads = [[torch.randn(s, generator=generator).to(dtype) for s in shapes] for _ in range(10)]
    return params, DCTAdamW(groups, lr=0.05), grads


@pytest.mark.parametrize("saved_at", [0, 1, 2, 5])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("feedback", ERRORS)
@pytest.mark.parametrize("gap", [1, 3])
def test_resuming_is_as_if_never_stopped(feedback, gap, dtype, saved_at):
    settings = dict(error_feedback=feedback, update_proj_gap=gap)
    params, optimizer, grads = setting(dtype, **settings)
    run(optimizer, params, grads[:saved_at])
    file = io.BytesIO()
    torch.save({"weights": [p.detach() for p in params], "optimizer": optimizer.state_dict()}, file)
    run(optimizer, params, grads[saved_at:])

    file.seek(0)
    saved = torch.load(file, weights_only=True)
    others, resumed, _ = setting(dtype, seed=100, **settings)
    torch.manual_seed(4242)
    with torch.no_grad():
        for p, weight in zip(others, saved["weights"], strict=True):
            p.copy_(weight)
    resumed.load_state_dict(saved["optimizer"])
    run(resumed, others, grads[saved_at:])
    for p, q in zip(params, others, strict=True):
        assert torch.equal(p, q)
        a, b = optimizer.state[p], resumed.state[q]
        assert a.keys() == b.keys()
        for key, x in a.items():
            assert torch.equal(x, b[key]) and x.dtype == b[key].dtype if isinstance(x, torch.Tensor) else x == b[key]


def test_a_checkpoint_of_other_errors_is_refused_whole():
    params, optimizer, grads = setting(torch.float32, error_feedback="8bit")
    run(optimizer, params, grads[:2])
    others, fresh, _ = setting(torch.float32)
    run(fresh, others, grads[:2])
    saved = copy.deepcopy(fresh.state_dict())
    for group in saved["param_groups"]:
        group["error_feedback"] = "8bit"
    with pytest.raises(ValueError, match="'error' of parameter number 0 must have shape"):
        optimizer.load_state_dict(saved)


# Arguments.


@pytest.mark.parametrize(
    ("argument", "values", "message"),
    [
        ("projection", ["svd", "DCT", None], "projection must be one of dct, dct3, hadamard"),
        ("projection", [SVD(), DCT(method="fft")], "projection must be one of dct, dct3, hadamard"),
        ("transport", ["reset", "carry"], "transport must be one of rotate, keep"),
        ("norm", [0, 3, True, 1.5, "1", -1], "norm must be 1 or 2"),
        ("error_feedback", [True, 8, "int8", "gradient"], "error_feedback must be one of None, param, 8bit, 4bit"),
        ("update_proj_gap", [0, 1.5], "update_proj_gap must be an int >= 1"),
    ],
)
def test_values_out_of_range_are_refused_in_arguments_and_in_groups(argument, values, message):
    p = parameter((12, 20))
    for value in values:
        with pytest.raises(ValueError, match=f"{message}.*got {re.escape(repr(value))}"):
            DCTAdamW([p], **{argument: value})
        if not isinstance(value, SVD | DCT):
            with pytest.raises(ValueError, match=message):
                DCTAdamW([{"params": [p], argument: value}])


@pytest.mark.parametrize(
    ("projection", "settings"),
    [
        (DCT(rank=3, norm=2, side="left"), {"projection": "dct", "rank": 3, "norm": 2, "side": "left"}),
        (DCT(kind=3), {"projection": "dct3", "norm": 1}),
        (Hadamard(rank=0.5), {"projection": "hadamard", "rank": 0.5}),
    ],
)
def test_a_projection_object_is_its_name_and_settings(projection, settings):
    group = DCTAdamW([parameter((12, 20))], projection=projection).param_groups[0]
    assert {key: group[key] for key in settings} == settings


def test_param_groups_train_a_model():
    model = torch.nn.Sequential(torch.nn.Linear(24, 32), torch.nn.Tanh(), torch.nn.Linear(32, 16))
    optimizer = DCTAdamW(param_groups(model, rank=4), lr=0.02, error_feedback="4bit")
    x = torch.randn(64, 24)
    y = torch.tanh(x @ torch.randn(24, 16))
    losses = []
    for _ in range(60):
        loss = torch.nn.functional.mse_loss(model(x), y)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    assert losses[-1] < 0.7 * losses[0]
