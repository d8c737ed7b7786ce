import copy
import io
import math
from functools import partial

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch.utils._python_dispatch import TorchDispatchMode

import training
from slimstate.optim import GaLoreAdafactor, state_bytes
from slimstate.optim._projected import Matrix
from slimstate.projections import SVD, _blocks, matrix_view
from training import run

trajectory = partial(training.trajectory, GaLoreAdafactor)


def gradients(shape, steps, dtype=torch.float64, seed=0):
    return training.gradients(shape, steps, dtype, seed)


def parameter(shape, dtype=torch.float64, seed=7):
    return training.parameter(shape, dtype, seed)


SIDES = ["auto", "left", "right", "reverse"]
TRANSPORTS = ["rotate", "keep", "reset"]
MATRICES = [(12, 20), (20, 12), (14, 14), (8, 3, 2, 2)]
PLAIN = dict(scale_parameter=False)
seeds = st.integers(0, 2**16)


def orthogonal(n, seed=0):
    return torch.linalg.qr(torch.randn(n, n, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)).Q


def draw(shape, seed, dtype=torch.float64):
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64).to(dtype)


def dense(params, **settings):
    """An optimizer that projects none of these."""
    matrix = torch.nn.Parameter(torch.ones(2, 2))  # a rank needs a matrix; without a gradient it stands still
    return GaLoreAdafactor([{"params": params}, {"params": [matrix], "rank": 1}], **settings)


# The rule.


def rms(x):
    return np.sqrt(np.mean(np.square(x)))


def written_out(w, grads, *, lr, eps, clip_threshold, decay_rate, beta1, weight_decay, scale_parameter, **subspace):
    """The method as its docstring states it, on one matrix whose rows are compressed, in numpy."""
    rank, gap, scale, transport = (subspace[key] for key in ("rank", "gap", "scale", "transport"))
    q, a, b, m, age = None, 0.0, 0.0, 0.0, 0
    for t, g in enumerate(grads, start=1):
        if rank is None:
            q = np.eye(len(g))
        elif (t - 1) % gap == 0:
            new = np.linalg.svd(g)[0][:, :rank]
            new = new * np.sign(np.take_along_axis(new, np.abs(new).argmax(0)[None], 0))
            if transport == "reset":
                a, b, m, age = 0.0, 0.0, 0.0, 0
            elif transport == "rotate" and q is not None:
                c = new.T @ q
                a = c**2 @ a + (1 - (c**2).sum(1, keepdims=True)) * a.mean()
                m = c @ m
            q = new
        age += 1
        r = q.T @ g
        rho = 1 - age**decay_rate
        a = rho * a + (1 - rho) * (r**2 + eps[0]).mean(1, keepdims=True)
        b = rho * b + (1 - rho) * (r**2 + eps[0]).mean(0, keepdims=True)
        u = r / np.sqrt(a @ b / a.mean())
        u = u / max(1, rms(u) / clip_threshold)
        eta = (min(1e-2, t**-0.5) if lr is None else lr) * (max(eps[1], rms(w)) if scale_parameter else 1)
        m = eta * u if beta1 is None else beta1 * m + (1 - beta1) * eta * u
        w = (1 - eta * weight_decay) * w - scale * q @ m
    return w


RULES = [
    dict(lr=None, beta1=None, scale_parameter=True),
    dict(lr=0.1, beta1=None, scale_parameter=False),
    dict(lr=0.1, beta1=0.8, scale_parameter=False),
    dict(lr=None, beta1=0.8, scale_parameter=True),
]
COMMON = dict(eps=(1e-4, 0.01), clip_threshold=0.7, decay_rate=-0.6, weight_decay=0.3)


@pytest.mark.parametrize("transport", TRANSPORTS)
@pytest.mark.parametrize("rule", RULES)
@pytest.mark.parametrize("turned", [False, True])
def test_is_the_method_that_the_docstring_states(rule, transport, turned):
    grads, start = gradients((12, 20), 9), draw((12, 20), 7)
    subspace = dict(rank=3, scale=0.5, transport=transport)
    expected = written_out(start.numpy(), [g.numpy() for g in grads], gap=2, **subspace, **COMMON, **rule)
    p = torch.nn.Parameter(start.mT.clone() if turned else start.clone())
    gs = [g.mT if turned else g for g in grads]
    ours = trajectory(p, gs, update_proj_gap=2, **subspace, **COMMON, **rule)[-1]
    np.testing.assert_allclose((ours.mT if turned else ours).numpy(), expected, rtol=1e-8, atol=1e-8)


@pytest.mark.parametrize("rule", RULES)
@pytest.mark.parametrize("shape", [(12, 20), (20, 12), (9,), (), (8, 3, 2, 2)])
def test_what_is_not_projected_gets_adafactor(rule, shape):
    p, grads = parameter(shape), [draw(shape, t) for t in range(5)]
    rows, columns = (shape[0], math.prod(shape[1:])) if len(shape) > 1 else (math.prod(shape), 1)
    start, gs = p.detach().clone().numpy(), [g.numpy().reshape(rows, columns) for g in grads]
    full = dict(rank=None, gap=None, scale=1.0, transport=None)
    expected = written_out(start.reshape(rows, columns), gs, **full, **COMMON, **rule)
    run(dense([p], **COMMON, **rule), [p], [[g] for g in grads])
    np.testing.assert_allclose(p.detach().numpy(), expected.reshape(shape), rtol=1e-9, atol=1e-12)


@given(
    shape=st.sampled_from([(5, 9), (9, 5), (6, 6), (1, 7), (7, 1), (7,), (1,), ()]),
    scale_parameter=st.booleans(),
    lr=st.sampled_from([None, 0.03]),
    warmup_init=st.booleans(),
    beta1=st.sampled_from([None, 0.9]),
    clip_threshold=st.floats(0.1, 3),
    decay_rate=st.floats(-1, -0.1),
    weight_decay=st.sampled_from([0.0, 0.1]),
    seed=seeds,
)
def test_dense_matrices_and_vectors_follow_transformers(shape, lr, warmup_init, seed, **settings):
    adafactor = pytest.importorskip("transformers.optimization").Adafactor
    settings |= dict(lr=lr, warmup_init=warmup_init and lr is None, relative_step=lr is None)
    p, q = parameter(shape, seed=seed), parameter(shape, seed=seed)
    grads = [draw(shape, seed + t) for t in range(1, 5)]
    run(dense([p], **settings), [p], [[g] for g in grads])
    run(adafactor([q], **settings), [q], [[g] for g in grads])
    torch.testing.assert_close(p, q, rtol=1e-9, atol=1e-12)


@pytest.mark.contract("torch's defaults, or transformers' for Adafactor", "GaLoreAdafactor")
def test_the_defaults_are_transformers():
    adafactor = pytest.importorskip("transformers.optimization").Adafactor
    theirs = adafactor([parameter((3, 4))]).param_groups[0]
    ours = GaLoreAdafactor([parameter((3, 4))]).param_groups[0]
    assert theirs.pop("relative_step") is True
    assert ours["relative_step"] is None  # on, as no lr is given
    assert {key: ours[key] for key in theirs.keys() - {"params"}} == {k: theirs[k] for k in theirs.keys() - {"params"}}


@pytest.mark.parametrize("shape", [(20, 12), (12, 20), (14, 14)])
@pytest.mark.parametrize("rule", RULES)
def test_full_rank_is_adafactor_in_the_rotated_basis(shape, rule):
    p, grads = parameter(shape), gradients(shape, 8)
    view, start = matrix_view(shape), p.detach().clone()
    optimizer = GaLoreAdafactor([p], rank=min(shape), scale=1.0, weight_decay=0.1, **rule)
    run(optimizer, [p], [[g] for g in grads])
    q = optimizer.state[p]["basis"]
    rotated = torch.nn.Parameter(q.mT @ view.open(start))
    run(dense([rotated], weight_decay=0.1, **rule), [rotated], [[q.mT @ view.open(g)] for g in grads])
    torch.testing.assert_close(q.mT @ view.open(p.detach()), rotated.detach(), rtol=1e-9, atol=1e-9)


@given(
    rows=st.integers(1, 12),
    columns=st.integers(1, 12),
    rank=st.integers(1, 4),
    side=st.sampled_from(SIDES),
    clip=st.floats(0.01, 2),
    sparse=st.booleans(),
    seed=seeds,
)
def test_no_update_in_the_subspace_is_longer_than_the_threshold(rows, columns, rank, side, clip, sparse, seed):
    p = parameter((rows, columns), seed=seed)
    rank = min(rank, rows, columns)
    optimizer = GaLoreAdafactor([p], lr=1.0, scale=1.0, clip_threshold=clip, rank=rank, side=side, **PLAIN)
    for t in range(4):
        before = p.detach().clone()
        size = 10.0 ** (t % 3)  # the statistics lag behind, so that U gets long
        g = size * draw((rows, columns), seed + t)
        run(optimizer, [p], [[g * (g > 1).any(1, keepdim=True) if sparse else g]])
        k = matrix_view((rows, columns), side).k
        assert (p.detach() - before).norm() <= clip * math.sqrt(rank * k) * (1 + 1e-9) + 1e-12


def test_without_a_limit_nothing_is_clipped():
    p, grads = parameter((12, 20)), [draw((12, 20), 0), 100 * draw((12, 20), 1)]
    ends = [
        trajectory(copy.deepcopy(p), grads, lr=0.1, rank=3, clip_threshold=x, **PLAIN) for x in (1e9, math.inf, 1.0)
    ]
    assert torch.equal(ends[0], ends[1])
    assert not torch.equal(ends[1], ends[2])


@given(rows=st.integers(2, 14), columns=st.integers(2, 14), side=st.sampled_from(SIDES), seed=seeds)
def test_between_refreshes_updates_lie_in_the_span_of_the_basis(rows, columns, side, seed):
    p, rank = parameter((rows, columns), seed=seed), min(3, rows, columns)
    view, start = matrix_view((rows, columns), side), p.detach().clone()
    optimizer = GaLoreAdafactor([p], lr=0.1, rank=rank, side=side, beta1=0.9)
    run(optimizer, [p], [[g] for g in gradients((rows, columns), 4, seed=seed)])
    q, moved = optimizer.state[p]["basis"], view.open(p.detach() - start)
    assert moved.norm() > 0
    assert (moved - q @ (q.mT @ moved)).abs().max() < 1e-10 * moved.abs().max()


@pytest.mark.parametrize("factor", [0.25, 3.0])
@pytest.mark.parametrize("beta1", [None, 0.9])
@pytest.mark.parametrize("shape", MATRICES)
def test_scale_and_lr_are_one_factor_without_decay(shape, beta1, factor):
    grads, common = gradients(shape, 6), dict(rank=3, update_proj_gap=2, beta1=beta1, **PLAIN)
    a = trajectory(parameter(shape), grads, lr=0.01, scale=factor, **common)
    b = trajectory(parameter(shape), grads, lr=0.01 * factor, scale=1.0, **common)
    torch.testing.assert_close(a, b, rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("transport", TRANSPORTS)
@pytest.mark.parametrize("rule", RULES)
def test_the_size_of_the_gradients_does_not_matter(rule, transport):
    grads, common = gradients((12, 20), 7), dict(rank=3, update_proj_gap=2, transport=transport, **rule)
    a = trajectory(parameter((12, 20)), grads, **common)
    b = trajectory(parameter((12, 20)), [2.0**10 * g for g in grads], **common)
    torch.testing.assert_close(a, b, rtol=1e-9, atol=1e-12)


@given(seed=seeds, scale_parameter=st.booleans(), side=st.sampled_from(["left", "right"]))
def test_rotating_the_compressed_axis_rotates_the_trajectory(seed, scale_parameter, side):
    shape, o = (12, 20), orthogonal(12 if side == "left" else 20, seed)

    def turn(x):
        return o @ x if side == "left" else x @ o

    grads, start = gradients(shape, 8, seed=seed), draw(shape, seed + 1)
    common = dict(lr=0.1, beta1=0.9, rank=3, side=side, update_proj_gap=2, scale_parameter=scale_parameter)
    straight = trajectory(torch.nn.Parameter(start.clone()), grads, **common)
    turned = trajectory(torch.nn.Parameter(turn(start)), [turn(g) for g in grads], **common)
    torch.testing.assert_close(turned, turn(straight), rtol=1e-6, atol=1e-7)


# The learning rate.


@pytest.mark.parametrize(
    ("warmup_init", "step", "expected"),
    [
        (False, 1, 0.01),
        (False, 400, 0.01),
        (False, 40_000, 0.005),
        (True, 1, 1e-6),
        (True, 50, 5e-5),
        (True, 40_000, 0.005),
    ],
)
def test_the_relative_step_is_the_smaller_of_its_two_bounds(warmup_init, step, expected):
    p = torch.nn.Parameter(torch.zeros(6, 6, dtype=torch.float64))
    optimizer = dense([p], warmup_init=warmup_init, **PLAIN)
    p.grad = torch.ones_like(p)  # U is one everywhere
    optimizer._create_states()
    optimizer.state[p]["step"].fill_(step - 1)
    optimizer.state[p]["exp_avg_sq_row"].fill_(1)
    optimizer.state[p]["exp_avg_sq_col"].fill_(1)
    optimizer.step()
    torch.testing.assert_close(p.detach(), torch.full_like(p, -expected), rtol=1e-9, atol=0)


def test_a_group_with_a_lr_takes_it_and_the_others_the_relative_step():
    p, q, same = (parameter((12, 20), seed=s) for s in (1, 2, 1))
    grads = [[draw((12, 20), t), draw((12, 20), 9 + t)] for t in range(3)]
    run(GaLoreAdafactor([{"params": [p], "lr": 0.3}, {"params": [q]}], rank=3), [p, q], grads)
    run(GaLoreAdafactor([same], lr=0.3, rank=3, relative_step=False), [same], [g[:1] for g in grads])
    assert torch.equal(p, same)


def test_a_tensor_lr_and_a_scheduler_are_followed():
    p, q = parameter((12, 20)), parameter((12, 20))
    a = GaLoreAdafactor([p], lr=torch.tensor(0.1, dtype=torch.float64), rank=3, weight_decay=0.1)
    b = GaLoreAdafactor([q], lr=0.1, rank=3, weight_decay=0.1)
    schedulers = [torch.optim.lr_scheduler.LambdaLR(o, lambda i: 0.5**i) for o in (a, b)]
    for g in gradients((12, 20), 4):
        run(a, [p], [[g]])
        run(b, [q], [[g]])
        for scheduler in schedulers:
            scheduler.step()
    torch.testing.assert_close(p, q, rtol=1e-12, atol=1e-12)
    assert b.param_groups[0]["lr"] == 0.1 * 0.5**4


def test_decay_goes_by_the_step_size_and_the_weights_rms():
    start = draw((12, 20), 7)
    for settings in (dict(scale_parameter=True), PLAIN):
        for params in ([torch.nn.Parameter(start.clone())], [torch.nn.Parameter(start.flatten().clone())]):
            expected = start.clone()
            for _ in range(5):
                size = 0.1 * (expected.square().mean().sqrt() if settings["scale_parameter"] else 1)
                expected *= 1 - 0.3 * size
            make = GaLoreAdafactor if params[0].ndim > 1 else dense
            optimizer = make(params, lr=0.1, weight_decay=0.3, **settings)
            run(optimizer, params, [[torch.zeros_like(params[0])]] * 5)
            torch.testing.assert_close(params[0].detach().view(12, 20), expected, rtol=1e-12, atol=0)


def test_a_weight_of_zero_steps_by_the_second_epsilon():
    p = torch.nn.Parameter(torch.zeros(12, 20, dtype=torch.float64))
    trajectory(p, gradients((12, 20), 1), lr=1.0, eps=(1e-30, 0.25), rank=12, scale=1.0, clip_threshold=1e-3)
    torch.testing.assert_close(p.detach().square().mean().sqrt().item(), 0.25e-3, rtol=1e-9, atol=0)


# Transports.


def rotated(row, overlap, exp_avg=None):
    """What a refresh with this overlap makes of the statistics."""
    p = parameter((12, 20))
    optimizer = GaLoreAdafactor([p], lr=0.1, rank=len(row), beta1=None if exp_avg is None else 0.9)
    run(optimizer, [p], [[draw((12, 20), 1)]])
    group, state = optimizer.param_groups[0], optimizer.state[p]
    state["exp_avg_sq_row"].copy_(row)
    if exp_avg is not None:
        state["exp_avg"].copy_(exp_avg)
    column = state["exp_avg_sq_col"].clone()
    optimizer._rotate_(Matrix(p, None, p, p.grad, state, 1.0, (0, 0, 1), optimizer._view(p, group)), group, 0, overlap)
    assert torch.equal(state["exp_avg_sq_col"], column)
    return state["exp_avg_sq_row"], state.get("exp_avg")


def test_rotation_by_a_permutation_with_signs_permutes_and_turns_signs():
    row, m = torch.rand(4, dtype=torch.float64), draw((4, 20), 3)
    order, signs = [2, 0, 3, 1], torch.tensor([1.0, -1, -1, 1], dtype=torch.float64)[:, None]
    a, turned = rotated(row, signs * torch.eye(4, dtype=torch.float64)[order], m)
    torch.testing.assert_close(a, row[order])
    torch.testing.assert_close(turned, signs * m[order])


@given(seed=seeds, rank=st.integers(1, 6))
def test_rotated_statistics_stay_between_the_smallest_and_the_largest(seed, rank):
    generator = torch.Generator().manual_seed(seed)
    row = 10.0 ** (6 * torch.rand(rank, generator=generator, dtype=torch.float64) - 8)
    overlap = orthogonal(6, seed)[:rank, :rank]  # of two subspaces of six dimensions
    a, _ = rotated(row, overlap)
    assert (a >= row.min() * (1 - 1e-9)).all()
    assert (a <= row.max() * (1 + 1e-9)).all()


def test_a_subspace_that_is_all_new_begins_with_equal_rows():
    row = torch.rand(4, dtype=torch.float64)
    a, _ = rotated(row, torch.zeros(4, 4, dtype=torch.float64))
    torch.testing.assert_close(a, row.mean().expand(4))


def test_rotated_rows_are_the_mean_squares_of_rotated_uncorrelated_coordinates():
    """What the rule is derived from, by drawing such coordinates."""
    row, c = torch.rand(4, dtype=torch.float64) + 0.1, orthogonal(4, 5)
    r = row.sqrt()[:, None] * draw((4, 200_000), 1)
    a, _ = rotated(row, c)
    torch.testing.assert_close(a, (c @ r).square().mean(1), rtol=0.02, atol=0)


class Flipped(SVD):
    """An SVD with other signs at every other refresh: as arbitrary as a decomposition's own."""

    def fit(self, m, old, counter):
        q = super().fit(m, old, counter)
        return q * torch.tensor([-1.0, 1, -1]).to(q) if counter[1] % 2 else q


@pytest.mark.parametrize(
    ("transport", "beta1", "independent"),
    [("rotate", 0.9, True), ("reset", 0.9, True), ("keep", 0.9, False), ("keep", None, True), ("rotate", None, True)],
)
def test_only_a_first_moment_that_is_kept_depends_on_the_signs_of_singular_vectors(transport, beta1, independent):
    weights = []
    for kind in (SVD, Flipped):
        p = parameter((12, 20))
        optimizer = GaLoreAdafactor([p], lr=0.1, beta1=beta1, rank=3, update_proj_gap=2, transport=transport, **PLAIN)
        optimizer.projections = {"svd": kind()}
        run(optimizer, [p], [[g] for g in gradients((12, 20), 9)])
        weights.append(p.detach())
    assert torch.allclose(*weights, rtol=1e-6, atol=1e-7) is independent


def test_after_a_reset_the_statistics_begin_anew():
    grads, common = gradients((12, 20), 8), dict(lr=0.1, beta1=0.9, rank=3, update_proj_gap=4, transport="reset")
    p = parameter((12, 20))
    optimizer = GaLoreAdafactor([p], **common)
    run(optimizer, [p], [[g] for g in grads[:4]])
    q = torch.nn.Parameter(p.detach().clone())
    run(optimizer, [p], [[g] for g in grads[4:]])
    run(GaLoreAdafactor([q], **common), [q], [[g] for g in grads[4:]])
    torch.testing.assert_close(p, q, rtol=1e-12, atol=1e-12)
    assert (optimizer.state[p]["step"].item(), optimizer.state[p]["age"].item()) == (8, 4)


def quadratic(seed, steps, **settings):
    """Loss of a convex quadratic of condition 10 at the end, relative to the start's."""
    target, turn = draw((16, 24), seed), orthogonal(16, seed + 1)
    curvature = turn * torch.logspace(0, -1, 16, dtype=torch.float64) @ turn.mT
    p = torch.nn.Parameter(torch.zeros(16, 24, dtype=torch.float64))
    optimizer = GaLoreAdafactor([p], lr=0.3, rank=4, scale=1.0, **PLAIN, **settings)
    schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, steps)
    for _ in range(steps):
        p.grad = curvature @ (p.detach() - target)
        optimizer.step()
        schedule.step()
    left = p.detach() - target
    return ((left * (curvature @ left)).sum() / (target * (curvature @ target)).sum()).item()


@given(seed=seeds, beta1=st.sampled_from([None, 0.5]))
def test_a_quadratic_is_solved_by_following_the_gradient_and_not_in_one_subspace(seed, beta1):
    assert quadratic(seed, steps=60, beta1=beta1, update_proj_gap=5) < 0.05
    assert quadratic(seed, steps=20, beta1=beta1, update_proj_gap=10**9) > 0.1


# Bad gradients.


@pytest.mark.parametrize("beta1", [None, 0.9])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
def test_zero_gradients_zero_rows_and_late_starts_give_no_nan(dtype, beta1):
    params = [parameter(shape, dtype) for shape in [(12, 20), (20, 12), (6,), (8, 3, 2, 2)]]
    starts = [p.detach().clone() for p in params]
    optimizer = GaLoreAdafactor(params, lr=0.1, rank=3, beta1=beta1, update_proj_gap=2)
    run(optimizer, params, [[torch.zeros_like(p) for p in params]] * 3)
    assert all(torch.equal(p, start) for p, start in zip(params, starts, strict=True))
    for t in range(4):
        grads = [draw(p.shape, t, dtype) for p in params]
        for g in grads:
            g[1:3] = 0  # as an embedding's unused rows
        run(optimizer, params, [grads])
    assert all(p.isfinite().all() and not torch.equal(p, start) for p, start in zip(params, starts, strict=True))


@pytest.mark.parametrize("bad", [math.nan, math.inf])
def test_a_gradient_that_is_not_finite_spoils_its_own_parameter_and_no_basis(bad):
    p, q = parameter((12, 20)), parameter((20, 12))
    optimizer = GaLoreAdafactor([p, q], lr=0.1, rank=3, update_proj_gap=1)
    run(optimizer, [p, q], [[draw((12, 20), 0), draw((20, 12), 1)]])
    basis, g = optimizer.state[p]["basis"].clone(), draw((12, 20), 2)
    g[0, 0] = bad
    run(optimizer, [p, q], [[g, draw((20, 12), 3)]])
    assert torch.equal(optimizer.state[p]["basis"], basis)
    assert q.isfinite().all()


# What is kept.


@given(
    rows=st.integers(1, 40),
    columns=st.integers(1, 40),
    stack=st.integers(0, 3),
    rank=st.one_of(st.integers(1, 50), st.floats(0.01, 1)),
    side=st.sampled_from(SIDES),
    transport=st.sampled_from(TRANSPORTS),
    beta1=st.sampled_from([None, 0.0, 0.9]),
    dtype=st.sampled_from([torch.float32, torch.float64, torch.bfloat16]),
)
@pytest.mark.filterwarnings("ignore:rank .* is above the smaller side")
def test_state_bytes_are_the_formula(rows, columns, stack, rank, side, transport, beta1, dtype):
    shape = (stack, rows, columns) if stack else (rows, columns)
    p = parameter(shape, dtype)
    common = dict(rank=rank, side=side, transport=transport, batch_dims=int(stack > 0))
    optimizer = GaLoreAdafactor([p], beta1=beta1, **common)
    run(optimizer, [p], [[torch.randn_like(p)]])
    d, k = (rows, columns) if side == "left" else (columns, rows)
    if side in ("auto", "reverse"):
        d, k = sorted((rows, columns), reverse=side == "reverse")
    r = min(rank if isinstance(rank, int) else max(1, math.floor(rank * d)), d, k)
    count, itemsize = max(stack, 1), 8 if dtype == torch.float64 else 4
    counters = 4 + 4 * count + 4 * (transport == "reset")  # step, refreshes, age
    assert state_bytes(optimizer) == count * (r + k + r * d + (r * k if beta1 else 0)) * itemsize + counters
    assert f"state in total: {state_bytes(optimizer):,} B" in optimizer.report()


@pytest.mark.parametrize("shape", [(6, 7), (8, 3, 2, 2), (9,), (), (0,), (0, 3), (3, 0)])
@pytest.mark.parametrize("beta1", [None, 0.9])
def test_the_state_of_what_is_not_projected(shape, beta1):
    p = parameter(shape, torch.float32)
    optimizer = dense([p], beta1=beta1)
    run(optimizer, [p], [[torch.randn_like(p)]] * 2)
    rows, columns = (shape[0], math.prod(shape[1:])) if len(shape) > 1 else (math.prod(shape), 1)
    assert state_bytes(optimizer, [p]) == 4 * (rows + columns + (p.numel() if beta1 else 0) + 1)
    if beta1:
        assert optimizer.state[p]["exp_avg"].shape == shape


@pytest.mark.parametrize(
    ("dtype", "moment_dtype", "expected"),
    [
        (torch.float32, None, torch.float32),
        (torch.float64, None, torch.float64),
        (torch.bfloat16, "param", torch.bfloat16),
        (torch.float16, "param", torch.float16),
        (torch.float32, torch.bfloat16, torch.bfloat16),
    ],
)
def test_the_first_moment_has_the_dtype_that_was_asked_for_and_the_statistics_are_wide(dtype, moment_dtype, expected):
    params = [parameter((12, 20), dtype), parameter((9,), dtype)]
    optimizer = GaLoreAdafactor(params, lr=0.1, rank=3, beta1=0.9, moment_dtype=moment_dtype, update_proj_gap=2)
    run(optimizer, params, [[draw(p.shape, t, dtype) for p in params] for t in range(3)])
    wide = torch.float64 if dtype == torch.float64 else torch.float32
    for p in params:
        state = optimizer.state[p]
        assert state["exp_avg"].dtype == expected
        assert state["exp_avg_sq_row"].dtype == state["exp_avg_sq_col"].dtype == wide
        assert p.isfinite().all()


@pytest.mark.parametrize("shape", [(12, 20), (300,)])
def test_a_bfloat16_first_moment_stays_close_to_a_float32_one(shape):
    ends, start = [], parameter(shape, torch.float32).detach()
    grads = [draw(shape, t, torch.float32) for t in range(30)]
    for moment_dtype in (None, "bfloat16"):
        p = torch.nn.Parameter(start.clone())
        make = GaLoreAdafactor if len(shape) > 1 else dense
        run(make([p], lr=0.01, beta1=0.9, moment_dtype=moment_dtype), [p], [[g] for g in grads])
        ends.append(p.detach() - start)
    assert 0 < (ends[0] - ends[1]).norm() < 0.05 * ends[0].norm()


def setting(dtype, transport, seed=0, **settings):
    """Parameters of every kind, an optimizer, and ten steps of gradients."""
    shapes = [(12, 20), (20, 12), (6,), (2, 9, 7), (8, 3, 2, 2), (5, 4)]
    params = [parameter(shape, dtype, seed + i) for i, shape in enumerate(shapes)]
    common = dict(rank=3, update_proj_gap=3, transport=transport)
    stack = {"params": [params[3]], "batch_dims": 1, **common}
    groups = [{"params": [params[0], params[1], params[4]], **common}, stack, {"params": [params[2], params[5]]}]
    grads = [[draw(shape, 10 * t, dtype) for shape in shapes] for t in range(10)]
    return params, GaLoreAdafactor(groups, weight_decay=0.1, **settings), grads


@pytest.mark.parametrize("saved_at", [1, 4, 5])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize(
    ("transport", "settings"),
    [("rotate", {"beta1": 0.9, "moment_dtype": "bfloat16"}), ("keep", {}), ("reset", {"lr": 0.1, "beta1": 0.5})],
)
def test_resuming_is_as_if_never_stopped(transport, settings, dtype, saved_at):
    params, optimizer, grads = setting(dtype, transport, **settings)
    run(optimizer, params, grads[:saved_at])
    file = io.BytesIO()
    torch.save({"weights": [p.detach() for p in params], "optimizer": optimizer.state_dict()}, file)
    run(optimizer, params, grads[saved_at:])
    file.seek(0)
    saved = torch.load(file, weights_only=True)
    others, resumed, _ = setting(dtype, transport, seed=100, **settings)
    torch.manual_seed(4242)
    with torch.no_grad():
        for p, weight in zip(others, saved["weights"], strict=True):
            p.copy_(weight)
    resumed.load_state_dict(saved["optimizer"])
    run(resumed, others, grads[saved_at:])
    for p, q in zip(params, others, strict=True):
        assert torch.equal(p, q)
        assert optimizer.state[p].keys() == resumed.state[q].keys()
        for a, b in zip(optimizer.state[p].values(), resumed.state[q].values(), strict=True):
            assert torch.equal(a, b) if isinstance(a, torch.Tensor) else a == b


# Weights.


@pytest.mark.parametrize("shape", [(16, 512), (8192,)])
@pytest.mark.parametrize("scale_parameter", [True, False])
def test_bfloat16_weights_decay_and_move_as_float32_ones_do_on_average(shape, scale_parameter):
    ends = []
    for dtype in (torch.float32, torch.bfloat16):
        p = torch.nn.Parameter(torch.ones(shape, dtype=dtype))
        make = dense if p.ndim == 1 else GaLoreAdafactor
        optimizer = make([p], lr=1e-3, scale_parameter=scale_parameter, weight_decay=0.3)
        p.grad = torch.ones_like(p)
        for _ in range(100):  # a decay and a step of less than a tenth of the spacing: to nearest neither would move it
            optimizer.step()
        ends.append(p.detach().double().mean())
    assert 1 - ends[0] > 0.03
    assert abs(ends[0] - ends[1]) < 1e-3


@pytest.mark.parametrize("transport", TRANSPORTS)
@pytest.mark.parametrize("rank", [3, None])
@pytest.mark.parametrize("scale_parameter", [True, False])
def test_stacked_matrices_equal_separate_ones(rank, transport, scale_parameter):
    members = [gradients((9, 15), 7, seed=seed) for seed in range(3)]
    p, other = parameter((3, 9, 15)), parameter((4, 4))
    apart = [torch.nn.Parameter(x.clone()) for x in p.detach()]
    common = dict(lr=0.1, beta1=0.9, weight_decay=0.1, update_proj_gap=3, transport=transport)
    common |= dict(scale_parameter=scale_parameter)
    ranks = [{"params": [other], "rank": 2}]
    stack = GaLoreAdafactor([{"params": [p], "rank": rank, "batch_dims": 1}, *ranks], **common)
    run(stack, [p], [[torch.stack(gs)] for gs in zip(*members, strict=True)])
    for q, grads in zip(apart, members, strict=True):
        run(GaLoreAdafactor([{"params": [q], "rank": rank}, *ranks], **common), [q], [[g] for g in grads])
    torch.testing.assert_close(p.detach(), torch.stack([q.detach() for q in apart]))


@pytest.mark.parametrize("make", [lambda params, **s: GaLoreAdafactor(params, rank=3, **s), dense], ids=["3", "dense"])
@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16])
@pytest.mark.parametrize("shape", [(8, 3, 2, 2), (20, 2, 3, 2)])
def test_memory_formats_and_the_flattened_matrix_agree_and_nothing_is_replaced(shape, dtype, make):
    start, grads = parameter(shape, dtype).detach(), [draw(shape, t, dtype) for t in range(5)]
    last = torch.channels_last
    variants = [
        (start.clone(), grads),
        (start.flatten(1).clone(), [g.flatten(1) for g in grads]),
        (start.clone(memory_format=last), [g.clone(memory_format=last) for g in grads]),
        (start.clone(), [torch.stack([g, g], -1)[..., 0] for g in grads]),
    ]
    ends = []
    for weight, gs in variants:
        p = torch.nn.Parameter(weight)
        optimizer = make([p], beta1=0.9, weight_decay=0.1, lr=0.1, update_proj_gap=2)
        place = p.data_ptr(), p.stride()
        for g in gs:
            p.grad, copied = g, g.clone()
            optimizer.step()
            assert p.grad is g
            assert torch.equal(g, copied)
        assert (p.data_ptr(), p.stride()) == place
        ends.append(p.detach().reshape(shape))
    tolerance = dict(rtol=1e-9, atol=1e-9) if dtype == torch.float64 else dict(rtol=2e-2, atol=5e-3)
    for end in ends[1:]:
        torch.testing.assert_close(end, ends[0], **tolerance)


@pytest.mark.parametrize("shape", [(12, 20), (6,), (9, 5)])
def test_maximize_is_the_opposite_gradient(shape):
    weights = []
    for sign in (1, -1):
        p, matrix = parameter(shape), parameter((4, 4))
        group = {"params": [p], "rank": 3} if shape == (12, 20) else {"params": [p]}
        groups = [group, {"params": [matrix], "rank": 1}]
        optimizer = GaLoreAdafactor(groups, lr=0.1, beta1=0.9, maximize=sign < 0)
        run(optimizer, [p], [[sign * draw(shape, t)] for t in range(5)])
        weights.append(p.detach())
    torch.testing.assert_close(*weights, rtol=1e-9, atol=1e-9)


@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16])
@pytest.mark.parametrize("rank", [3, None])
def test_the_size_of_blocks_changes_nothing(rank, dtype, monkeypatch):
    shapes, ends = [(40, 30), (30, 40), (20, 6, 5)], []
    for size in (_blocks.BLOCK_BYTES, 1000):
        monkeypatch.setattr(_blocks, "BLOCK_BYTES", size)
        params, vector, other = (
            [parameter(shape, dtype) for shape in shapes],
            parameter((900,), dtype),
            parameter((4, 4)),
        )
        groups = [{"params": params, "rank": rank}, {"params": [vector]}, {"params": [other], "rank": 2}]
        optimizer = GaLoreAdafactor(groups, beta1=0.9, weight_decay=0.1, scale=1.0)
        everything = [*params, vector]
        run(optimizer, everything, [[draw(p.shape, t, dtype) for p in everything] for t in range(3)])
        ends.append([p.detach() for p in everything])
    for a, b in zip(*ends, strict=True):
        torch.testing.assert_close(a, b, **(dict(rtol=1e-2, atol=1e-2) if dtype == torch.bfloat16 else {}))


class Sizes(TorchDispatchMode):
    """Notes the largest tensor with memory of its own that an operation returns."""

    def __init__(self, known):
        super().__init__()
        self.known, self.largest = {x.untyped_storage().data_ptr() for x in known}, 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        out = func(*args, **(kwargs or {}))
        for x in out if isinstance(out, tuple | list) else [out]:
            if isinstance(x, torch.Tensor) and x.untyped_storage().data_ptr() not in self.known:
                self.largest = max(self.largest, x.untyped_storage().nbytes())
        return out


@pytest.mark.parametrize("rank", [4, None])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("beta1", [None, 0.9])
def test_no_temporary_is_as_large_as_the_weight(beta1, dtype, rank, monkeypatch):
    monkeypatch.setattr(_blocks, "BLOCK_BYTES", 4096)
    last = torch.empty(64, 8, 8, 8, dtype=dtype).copy_(draw((64, 8, 8, 8), 0)).to(memory_format=torch.channels_last)
    params = [parameter((128, 256), dtype), parameter((256, 128), dtype), parameter((2, 64, 256), dtype)]
    if rank is None:  # a gradient that no view turns into a matrix is copied where it is projected
        params.append(torch.nn.Parameter(last))
    groups = [{"params": [p], "rank": rank, "batch_dims": int(p.ndim == 3)} for p in params]
    other = {"params": [parameter((4, 4))], "rank": 2}
    common = dict(beta1=beta1, weight_decay=0.1, moment_dtype="bfloat16")
    optimizer = GaLoreAdafactor([*groups, other], **common)
    run(optimizer, params, [[torch.randn_like(p) for p in params]] * 2)
    states = [x for p in params for x in optimizer.state[p].values() if isinstance(x, torch.Tensor)]
    with Sizes([*params, *(p.grad for p in params), *states]) as mode:
        optimizer.step()
    assert 2048 <= mode.largest <= (4096 if rank is None else 4 * 4 * 512)  # a block, or R of the stack


# Settings.

REFUSED = [
    (dict(lr=0.1, relative_step=True), "lr=0.1 cannot be combined with relative_step=True"),
    (dict(relative_step=False), "relative_step=False needs an lr"),
    (dict(lr=0.1, warmup_init=True), "warmup_init=True is for the relative step: leave out lr=0.1"),
    (dict(lr=-0.1), "lr must be a number >= 0"),
    (dict(lr=math.nan), "lr must be a number >= 0"),
    (dict(lr=torch.ones(2)), "Tensor lr must be 1-element"),
    (dict(eps=1e-8), "eps must be two numbers"),
    (dict(eps=(0.0, 1e-3)), "eps must be two numbers"),
    (dict(eps=(1e-30, -1.0)), "eps must be two numbers"),
    (dict(eps=(None, 1e-3)), "eps must be two numbers"),
    (dict(clip_threshold=0.0), "clip_threshold must be a number > 0"),
    (dict(clip_threshold=None), "clip_threshold must be a number > 0"),
    (dict(decay_rate=0.8), "decay_rate must be a number <= 0"),
    (dict(beta1=1.0), r"beta1 must be None or a number in \[0, 1\)"),
    (dict(beta1=-0.1), r"beta1 must be None or a number in \[0, 1\)"),
    (dict(weight_decay=-1.0), "weight_decay must be a number >= 0"),
    (dict(scale_parameter=None), "scale_parameter must be one of True, False"),
    (dict(relative_step="yes"), "relative_step must be one of None, True, False"),
    (dict(warmup_init=2), "warmup_init must be one of True, False"),
    (dict(scale=-1.0), "scale must be a number >= 0"),
    (dict(moment_dtype="int8"), "moment_dtype must be None or one of"),
    (dict(seed=None), "seed must be an int"),
]


@pytest.mark.parametrize(("settings", "message"), REFUSED, ids=[str(row[0]) for row in REFUSED])
def test_values_out_of_range_are_refused_in_arguments_and_in_groups(settings, message):
    with pytest.raises(ValueError, match=message):
        GaLoreAdafactor([parameter((12, 20))], **settings)
    optimizer = GaLoreAdafactor([parameter((12, 20))])
    before = copy.deepcopy(optimizer.state_dict())
    with pytest.raises(ValueError, match=message):
        optimizer.add_param_group({"params": [parameter((9, 5))], **settings})
    assert optimizer.state_dict() == before


def test_keywords_of_other_optimizers_are_refused():
    with pytest.raises(TypeError, match="GaLoreAdafactor got an unexpected keyword argument 'betas'"):
        GaLoreAdafactor([parameter((12, 20))], betas=(0.9, 0.999))
    with pytest.raises(ValueError, match="unknown key 'betas' in a group of GaLoreAdafactor"):
        GaLoreAdafactor([{"params": [parameter((12, 20))], "betas": (0.9, 0.999)}])
    with pytest.raises(ValueError, match="foreach=True is not supported by GaLoreAdafactor"):
        GaLoreAdafactor([parameter((12, 20))], foreach=True)


def test_the_call_in_galore_torchs_script_works_unchanged():
    p, v = parameter((12, 20)), parameter((6,))
    projected = {"params": [p], "rank": 3, "update_proj_gap": 2, "scale": 0.25, "proj_type": "std"}
    optimizer = GaLoreAdafactor(
        [{"params": [v]}, projected],
        lr=0.01,
        eps=(1e-30, 1e-3),
        clip_threshold=1.0,
        decay_rate=-0.8,
        beta1=0.9,
        weight_decay=0.0,
        relative_step=False,
        scale_parameter=False,
        warmup_init=False,
    )
    run(optimizer, [p, v], [[g, torch.ones(6, dtype=torch.float64)] for g in gradients((12, 20), 5)])
    moments = {"exp_avg", "exp_avg_sq_row", "exp_avg_sq_col"}
    assert set(optimizer.state[v]) == {"step", "stream", *moments}
    assert set(optimizer.state[p]) == {"step", "stream", *moments, "basis", "refreshes"}
