import copy
import io
import itertools
import math
import re
from functools import partial

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

import training
from slimstate.optim import AdamW, GaLoreAdamW, param_groups, state_bytes
from slimstate.optim._projected import due, rotated
from slimstate.projections import SVD, PowerIteration, RandomOrthogonal, matrix_view
from training import gradients, parameter, run

trajectory = partial(training.trajectory, GaLoreAdamW)


SIDES = ["auto", "left", "right", "reverse"]
TRANSPORTS = ["rotate", "keep", "reset"]
PROJECTIONS = ["svd", "power", "random"]
MATRICES = [(12, 20), (20, 12), (14, 14), (8, 3, 2, 2)]
EXACT = dict(weight_decay=0.0, eps=1e-12)


def orthogonal(n, seed=0, dtype=torch.float64):
    return torch.linalg.qr(torch.randn(n, n, generator=torch.Generator().manual_seed(seed), dtype=dtype)).Q


def state_of(optimizer):
    return [{k: v for k, v in optimizer.state[p].items()} for _, p, _ in optimizer._named()]


def assert_same_state(a, b):
    for x, y in zip(state_of(a), state_of(b), strict=True):
        assert x.keys() == y.keys()
        for key in x:
            assert type(x[key]) is type(y[key])
            if isinstance(x[key], torch.Tensor):
                assert x[key].dtype == y[key].dtype
                assert torch.equal(x[key], y[key]), key
            else:
                assert x[key] == y[key]


# Limits and symmetries.


@pytest.mark.parametrize("shape", [(20, 12), (12, 20), (14, 14)])
@pytest.mark.parametrize("weight_decay", [0.0, 0.1])
def test_full_rank_is_adamw_in_the_rotated_basis_and_not_in_the_original_one(shape, weight_decay):
    grads = gradients(shape, 10, torch.float64)
    p = parameter(shape, torch.float64)
    view, start = matrix_view(shape), p.detach().clone()
    hp = dict(lr=0.05, weight_decay=weight_decay)
    optimizer = GaLoreAdamW([p], rank=min(shape), scale=1.0, update_proj_gap=10**9, **hp)
    run(optimizer, [p], [[g] for g in grads])
    q = optimizer.state[p]["basis"]
    assert q.shape == (view.d, view.d)
    rotated = torch.nn.Parameter(q.mT @ view.open(start))
    run(torch.optim.AdamW([rotated], **hp), [rotated], [[q.mT @ view.open(g)] for g in grads])
    torch.testing.assert_close(q.mT @ view.open(p.detach()), rotated.detach(), rtol=1e-9, atol=1e-9)
    original = torch.nn.Parameter(start.clone())
    run(torch.optim.AdamW([original], **hp), [original], [[g] for g in grads])
    assert (p - original).abs().max() > 0.02


def written_out(w, grads, *, lr, betas, eps, weight_decay, rank, gap, scale, transport):
    """The method as its docstrings state it, on one wide matrix, by full decompositions and in full-size arithmetic."""
    (b1, b2), q, age = betas, None, 0
    for t, g in enumerate(grads):
        if t % gap == 0:
            new = torch.linalg.svd(g, full_matrices=False).U[:, :rank]
            new = new * new.gather(0, new.abs().argmax(0, keepdim=True)).sign()
            if q is None or transport == "reset":
                m = v = torch.zeros(rank, g.shape[1], dtype=g.dtype)
                age = 0
            elif transport == "rotate":
                c, mean, second = new.mT @ q, m / (1 - b1**age), v / (1 - b2**age)
                m, v = c @ m, (1 - b2**age) * (c**2 @ (second - mean**2) + (c @ mean) ** 2).abs()
            q = new
        age += 1
        r = q.mT @ g
        m, v = b1 * m + (1 - b1) * r, b2 * v + (1 - b2) * r**2
        u = (m / (1 - b1**age)) / ((v / (1 - b2**age)).sqrt() + eps)
        w = (1 - lr * weight_decay) * w - lr * scale * q @ u
    return w


@pytest.mark.parametrize("transport", TRANSPORTS)
@pytest.mark.parametrize("turned", [False, True])
def test_is_the_method_that_the_docstrings_state(transport, turned):
    grads = gradients((12, 20), 9, torch.float64)
    common = dict(lr=0.1, betas=(0.8, 0.95), eps=1e-3, weight_decay=0.2, rank=3, scale=0.5, transport=transport)
    start = parameter((12, 20), torch.float64).detach()
    expected = written_out(start, grads, gap=2, **common)
    p = torch.nn.Parameter(start.mT.clone() if turned else start.clone())
    ours = trajectory(p, [g.mT if turned else g for g in grads], update_proj_gap=2, **common)[-1]
    torch.testing.assert_close(ours.mT if turned else ours, expected, rtol=1e-8, atol=1e-8)


# P2 of the specification is about a plain SGD rule in the subspace, which GaLoreAdamW does not have.


@given(
    rows=st.integers(2, 16),
    columns=st.integers(2, 16),
    rank=st.integers(1, 4),
    side=st.sampled_from(SIDES),
    projection=st.sampled_from(PROJECTIONS),
    seed=st.integers(0, 99),
)
def test_between_refreshes_updates_lie_in_the_span_of_an_orthonormal_basis(rows, columns, rank, side, projection, seed):
    rank = min(rank, rows, columns)
    grads = gradients((rows, columns), 4, torch.float64, seed)
    p = parameter((rows, columns), torch.float64, seed)
    view, start = matrix_view((rows, columns), side), p.detach().clone()
    optimizer = GaLoreAdamW([p], lr=0.1, rank=rank, side=side, projection=projection, **EXACT)
    run(optimizer, [p], [[g] for g in grads])
    q, moved = optimizer.state[p]["basis"], view.open(p.detach() - start)
    assert q.shape == (view.d, rank)
    assert (q.mT @ q - torch.eye(rank, dtype=torch.float64)).abs().max() < 1e-10
    assert moved.norm() > 0
    assert (moved - q @ (q.mT @ moved)).abs().max() < 1e-10 * moved.abs().max()


@pytest.mark.parametrize("side", SIDES)
@pytest.mark.parametrize("shape", MATRICES)
def test_the_basis_of_a_refresh_holds_the_leading_singular_values(shape, side):
    (g,) = gradients(shape, 1)
    p = parameter(shape)
    optimizer = GaLoreAdamW([p], rank=3, side=side)
    run(optimizer, [p], [[g]])
    q, m = optimizer.state[p]["basis"], matrix_view(shape, side).open(g)
    energy = torch.linalg.svdvals(m)[:3].square().sum()
    torch.testing.assert_close((q.mT @ m).square().sum(), energy, rtol=1e-5, atol=0)
    assert (q.mT @ q - torch.eye(3)).abs().max() < 1e-5


@pytest.mark.parametrize("factor", [0.25, 3.0])
@pytest.mark.parametrize("shape", MATRICES)
def test_scale_and_lr_are_one_factor_without_decay(shape, factor):
    grads = gradients(shape, 6, torch.float64)
    common = dict(rank=3, update_proj_gap=2, weight_decay=0.0)
    a = trajectory(parameter(shape, torch.float64), grads, lr=0.01, scale=factor, **common)
    b = trajectory(parameter(shape, torch.float64), grads, lr=0.01 * factor, scale=1.0, **common)
    torch.testing.assert_close(a, b, rtol=1e-12, atol=1e-12)


def test_decay_goes_by_lr_alone():
    grads = gradients((12, 20), 5, torch.float64)
    p, q = parameter((12, 20), torch.float64), parameter((12, 20), torch.float64)
    common = dict(rank=3, scale=0.0, weight_decay=0.3)
    torch.testing.assert_close(
        trajectory(p, grads, lr=0.1, **common)[-1], q.detach() * (1 - 0.1 * 0.3) ** 5, rtol=1e-12, atol=0
    )


@given(seed=st.integers(0, 99), side=st.sampled_from(["left", "right"]), transport=st.sampled_from(["rotate", "reset"]))
def test_rotating_the_compressed_axis_of_the_gradients_rotates_the_trajectory(seed, side, transport):
    shape = (12, 20)
    grads = gradients(shape, 8, torch.float64, seed)
    o1, o2 = orthogonal(12, seed), orthogonal(20, seed + 1)

    def turn(x):
        return o1 @ x if side == "left" else x @ o2

    zero = torch.zeros(shape, dtype=torch.float64)
    common = dict(lr=0.1, rank=3, side=side, transport=transport, update_proj_gap=2, **EXACT)
    straight = trajectory(torch.nn.Parameter(zero.clone()), grads, **common)
    turned = trajectory(torch.nn.Parameter(zero.clone()), [turn(g) for g in grads], **common)
    torch.testing.assert_close(turned, turn(straight), rtol=1e-6, atol=1e-7)


def quadratic(transport, gap, steps=200):
    """Distance to the minimum of |W - W*|^2 / 2, relative to the start's."""
    generator = torch.Generator().manual_seed(3)
    target = torch.randn(16, 24, generator=generator)
    p = torch.nn.Parameter(torch.zeros(16, 24))
    optimizer = GaLoreAdamW(
        [p], lr=0.1, rank=4, scale=1.0, update_proj_gap=gap, transport=transport, weight_decay=0.0, betas=(0.9, 0.99)
    )
    schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, steps)
    for _ in range(steps):
        p.grad = p.detach() - target
        optimizer.step()
        schedule.step()
    return ((p - target).norm() / target.norm()).item()


def test_a_quadratic_is_solved_where_moments_follow_the_basis_and_not_by_one_basis():
    followed, kept, fixed = quadratic("rotate", 1), quadratic("keep", 1), quadratic("rotate", 10**9)
    assert followed < 1e-3
    assert kept > 30 * followed
    assert fixed > 0.5
    assert quadratic("rotate", 10) < 0.01


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_zero_gradients_leave_only_decay(dtype):
    shapes = [(12, 20), (20, 12), (7,)]
    params = [parameter(shape, dtype) for shape in shapes]
    starts = [p.detach().clone() for p in params]
    optimizer = GaLoreAdamW(params, lr=0.1, weight_decay=0.2, rank=3, update_proj_gap=2)
    run(optimizer, params, [[torch.zeros_like(p) for p in params]] * 6)
    for p, start in zip(params, starts, strict=True):
        torch.testing.assert_close(p.detach(), start * (1 - 0.1 * 0.2) ** 6, rtol=1e-5, atol=0)


# Refreshes.


@given(n=st.integers(1, 12), gap=st.integers(1, 20))
def test_refreshes_are_staggered_and_nobody_pays_for_all(n, gap):
    for step in range(2, 3 * gap + 2):
        expected = [step > 1 and (step - 1 - i * gap // n) % gap == 0 for i in range(n)]
        assert [due(step, i, n, gap) for i in range(n)] == expected
        assert sum(expected) <= math.ceil(n / gap)
    assert all(due(1, i, n, gap) for i in range(n))
    assert not any(due(0, i, n, gap) for i in range(n))
    for i in range(n):
        assert sum(due(step, i, n, gap) for step in range(2, 3 * gap + 2)) == 3


@pytest.mark.parametrize(("n", "gap"), [(5, 3), (3, 5), (4, 4), (3, 1)])
def test_an_optimizer_refreshes_by_that_schedule(n, gap):
    shapes = [(8, 12), (12, 8), (9, 9)]
    params = [parameter(shapes[i % 3]) for i in range(n)] + [parameter((6,))]
    params.insert(1, parameter((5,)))  # vectors have no place in the schedule
    optimizer = GaLoreAdamW(params, rank=2, update_proj_gap=gap)
    matrices = [p for p in params if p.ndim == 2]
    counts = torch.zeros(n, dtype=torch.int32)
    for step in range(1, 2 * gap + 3):
        run(optimizer, params, [[torch.randn_like(p) for p in params]])
        new = torch.stack([optimizer.state[p]["refreshes"] for p in matrices])
        assert (new - counts).tolist() == [int(due(step, i, n, gap)) for i in range(n)]
        assert step == 1 or (new - counts).sum() <= math.ceil(n / gap)
        counts = new


@pytest.mark.parametrize("projection", PROJECTIONS)
def test_bases_stay_between_refreshes_and_change_at_them(projection):
    p = parameter((12, 20))
    optimizer = GaLoreAdamW([p], rank=3, update_proj_gap=3, projection=projection)
    bases = []
    for _ in range(7):
        run(optimizer, [p], [[torch.randn_like(p)]])
        bases.append(optimizer.state[p]["basis"].clone())
    changed = [not torch.equal(a, b) for a, b in itertools.pairwise(bases)]
    assert changed == [False, False, True, False, False, True]


def bad_gradients(like):
    infinite, nan = torch.randn_like(like), torch.randn_like(like)
    infinite[0, 0], nan[0, 0] = math.inf, math.nan
    return {"zero": torch.zeros_like(like), "inf": infinite, "nan": nan}


@pytest.mark.parametrize("projection", PROJECTIONS)
@pytest.mark.parametrize("bad", ["zero", "inf", "nan"])
def test_a_bad_gradient_leaves_the_basis_as_it_was(bad, projection):
    p = parameter((12, 20))
    optimizer = GaLoreAdamW([p], rank=3, update_proj_gap=2, projection=projection)
    run(optimizer, [p], [[torch.randn_like(p)]] * 2)
    before = optimizer.state[p]["basis"].clone()
    run(optimizer, [p], [[bad_gradients(p)[bad]]])  # step 3 is due
    assert torch.equal(optimizer.state[p]["basis"], before)
    assert int(optimizer.state[p]["refreshes"]) == 1
    run(optimizer, [p], [[torch.randn_like(p)]] * 2)  # step 5 is
    assert int(optimizer.state[p]["refreshes"]) == 2
    assert not torch.equal(optimizer.state[p]["basis"], before)


@pytest.mark.parametrize("projection", PROJECTIONS)
@pytest.mark.parametrize("bad", ["zero", "inf", "nan"])
def test_the_first_good_gradient_fits_though_it_is_not_due(bad, projection):
    p = parameter((12, 20))
    optimizer = GaLoreAdamW([p], rank=3, update_proj_gap=100, projection=projection)
    run(optimizer, [p], [[bad_gradients(p)[bad]]] * 2)
    assert not optimizer.state[p]["basis"].any()
    assert int(optimizer.state[p]["refreshes"]) == 0
    run(optimizer, [p], [[torch.randn_like(p)]])
    basis = optimizer.state[p]["basis"].clone()
    assert (basis.mT @ basis - torch.eye(3)).abs().max() < 1e-5
    run(optimizer, [p], [[torch.randn_like(p)]] * 2)
    assert torch.equal(optimizer.state[p]["basis"], basis)
    assert int(optimizer.state[p]["refreshes"]) == 1


def test_zero_gradients_change_no_weight_and_count_as_steps():
    p = parameter((12, 20))
    start = p.detach().clone()
    optimizer = GaLoreAdamW([p], rank=3, weight_decay=0.0)
    run(optimizer, [p], [[torch.zeros_like(p)]] * 3)
    assert torch.equal(p, start)
    assert optimizer.state[p]["step"].item() == 3


@pytest.mark.parametrize("transport", TRANSPORTS)
def test_one_matrix_of_a_stack_without_a_gradient_keeps_its_basis_alone(transport):
    p = parameter((3, 9, 15))
    optimizer = GaLoreAdamW([p], rank=3, batch_dims=1, update_proj_gap=2, transport=transport)
    dead = torch.randn(3, 9, 15)
    dead[1] = 0
    run(optimizer, [p], [[dead]])
    assert optimizer.state[p]["refreshes"].tolist() == [1, 0, 1]
    assert not optimizer.state[p]["basis"][1].any()
    run(optimizer, [p], [[torch.randn(3, 9, 15)]])  # not due: only the one that has none is fitted
    assert optimizer.state[p]["refreshes"].tolist() == [1, 1, 1]
    before = optimizer.state[p]["basis"].clone()
    dead = torch.randn(3, 9, 15)
    dead[0] = math.nan
    run(optimizer, [p], [[dead]])
    assert optimizer.state[p]["refreshes"].tolist() == [1, 2, 2]
    assert torch.equal(optimizer.state[p]["basis"][0], before[0])
    assert not torch.equal(optimizer.state[p]["basis"][1], before[1])


# Transports.


def test_rotation_by_the_identity_changes_nothing():
    m, v = torch.randn(4, 9), torch.rand(4, 9)
    torch.testing.assert_close(rotated(m, v, torch.eye(4), (0.9, 0.999), 7), (m, v), rtol=1e-5, atol=1e-6)


def test_rotation_by_a_permutation_with_signs_permutes_and_turns_signs():
    m, v = torch.randn(4, 9), torch.rand(4, 9)
    order, signs = [2, 0, 3, 1], torch.tensor([1.0, -1, -1, 1])[:, None]
    expected = signs * m[order], v[order]
    overlap = signs * torch.eye(4)[order]
    torch.testing.assert_close(rotated(m, v, overlap, (0.9, 0.999), 7), expected, rtol=1e-5, atol=1e-6)


def test_rotation_is_the_published_rule():
    m, v, c = (torch.randn(4, 9, dtype=torch.float64), torch.rand(4, 9, dtype=torch.float64), orthogonal(6)[:4, :4])
    bias1, bias2 = 1 - 0.9**5, 1 - 0.99**5
    mean, second = m / bias1, v / bias2
    expected = c @ m, bias2 * (c**2 @ (second - mean**2) + (c @ mean) ** 2).abs()
    torch.testing.assert_close(rotated(m, v, c, (0.9, 0.99), 5), expected)


def test_the_full_size_momentum_survives_a_turned_basis_of_the_same_subspace():
    """What rotation is for: Q M does not depend on which basis of a subspace Q is."""
    q, turn = orthogonal(12)[:, :4], orthogonal(4, seed=1)
    m, v = torch.randn(4, 9, dtype=torch.float64), torch.rand(4, 9, dtype=torch.float64)
    before = q @ m
    m, _ = rotated(m, v, (q @ turn).mT @ q, (0.9, 0.99), 5)
    torch.testing.assert_close(q @ turn @ m, before)


class Flipped(SVD):
    """An SVD with other signs at every other refresh: as arbitrary as a decomposition's own."""

    def fit(self, m, old, counter):
        q = super().fit(m, old, counter)
        return q * torch.tensor([-1.0, 1, -1]).to(q) if counter[1] % 2 else q


@pytest.mark.parametrize(("transport", "independent"), [("rotate", True), ("reset", True), ("keep", False)])
def test_rotated_moments_do_not_depend_on_the_signs_of_singular_vectors(transport, independent):
    weights = []
    for kind in (SVD, Flipped):
        p = parameter((12, 20), torch.float64)
        optimizer = GaLoreAdamW([p], lr=0.1, rank=3, update_proj_gap=2, transport=transport, **EXACT)
        optimizer.projections = {"svd": kind()}
        run(optimizer, [p], [[g] for g in gradients((12, 20), 9, torch.float64)])
        weights.append(p.detach())
    assert torch.allclose(*weights, rtol=1e-6, atol=1e-7) is independent


@pytest.mark.parametrize("shape", MATRICES)
def test_the_first_step_after_a_reset_moves_every_coordinate_by_lr_times_scale(shape):
    p = parameter(shape, torch.float64)
    view = matrix_view(shape)
    optimizer = GaLoreAdamW([p], lr=0.1, scale=0.5, rank=3, update_proj_gap=4, transport="reset", **EXACT)
    sizes = []
    for g in gradients(shape, 9, torch.float64):
        before = p.detach().clone()
        run(optimizer, [p], [[g]])
        sizes.append((optimizer.state[p]["basis"].mT @ view.open(p.detach() - before)).abs())
    for step in (1, 5, 9):
        torch.testing.assert_close(sizes[step - 1], torch.full_like(sizes[0], 0.05), rtol=1e-6, atol=0)
    assert optimizer.state[p]["step"].item() == 9
    assert optimizer.state[p]["age"].item() == 1
    assert (sizes[5] - 0.05).abs().max() > 1e-4


def test_bias_correction_after_a_reset_goes_by_the_age_of_the_moments():
    grads = gradients((12, 20), 8, torch.float64)
    p = parameter((12, 20), torch.float64)
    optimizer = GaLoreAdamW([p], lr=0.1, rank=3, update_proj_gap=4, transport="reset", **EXACT)
    run(optimizer, [p], [[g] for g in grads[:4]])
    q = torch.nn.Parameter(p.detach().clone())
    run(optimizer, [p], [[g] for g in grads[4:]])
    fresh = GaLoreAdamW([q], lr=0.1, rank=3, update_proj_gap=4, transport="reset", **EXACT)
    run(fresh, [q], [[g] for g in grads[4:]])
    torch.testing.assert_close(p, q, rtol=1e-12, atol=1e-12)


def test_nothing_is_reset_where_no_new_basis_was_taken():
    p = parameter((12, 20))
    optimizer = GaLoreAdamW([p], rank=3, update_proj_gap=2, transport="reset")
    run(optimizer, [p], [[torch.randn_like(p)]] * 2)
    before = optimizer.state[p]["exp_avg"].clone()
    run(optimizer, [p], [[torch.zeros_like(p)]])  # due, but zero: the old basis stays, and with it its moments
    torch.testing.assert_close(optimizer.state[p]["exp_avg"], 0.9 * before)
    assert optimizer.state[p]["age"].item() == 3


def test_an_expert_that_never_gets_a_gradient_resets_no_other():
    grads = [torch.stack([a, b]) for a, b in zip(gradients((9, 15), 6), gradients((9, 15), 6, seed=5), strict=True)]
    for g in grads:
        g[1] = 0
    p = parameter((2, 9, 15))
    alone = torch.nn.Parameter(p.detach()[0].clone())
    common = dict(lr=0.1, rank=3, update_proj_gap=4, transport="reset", **EXACT)
    run(GaLoreAdamW([p], batch_dims=1, **common), [p], [[g] for g in grads])
    run(GaLoreAdamW([alone], **common), [alone], [[g[0]] for g in grads])
    torch.testing.assert_close(p[0], alone, rtol=1e-5, atol=1e-6)


# What is kept.


@given(
    rows=st.integers(1, 40),
    columns=st.integers(1, 40),
    stack=st.integers(0, 3),
    rank=st.one_of(st.integers(1, 50), st.floats(0.01, 1)),
    side=st.sampled_from(SIDES),
    transport=st.sampled_from(TRANSPORTS),
    dtype=st.sampled_from([torch.float32, torch.float64, torch.bfloat16]),
)
@pytest.mark.filterwarnings("ignore:rank .* is above the smaller side")
def test_state_bytes_are_the_formula(rows, columns, stack, rank, side, transport, dtype):
    shape = (stack, rows, columns) if stack else (rows, columns)
    p = parameter(shape, dtype)
    optimizer = GaLoreAdamW([p], rank=rank, side=side, transport=transport, batch_dims=int(stack > 0))
    assert state_bytes(optimizer) == 0
    run(optimizer, [p], [[torch.randn_like(p)]])
    d, k = (rows, columns) if side == "left" else (columns, rows)
    if side in ("auto", "reverse"):
        d, k = sorted((rows, columns), reverse=side == "reverse")
    r = min(rank if isinstance(rank, int) else max(1, math.floor(rank * d)), d, k)
    count, itemsize = max(stack, 1), 8 if dtype == torch.float64 else 4
    counters = 4 + 4 * count + 4 * (transport == "reset")  # step, refreshes, age
    assert state_bytes(optimizer) == count * (2 * k * r + d * r) * itemsize + counters
    assert optimizer.state[p]["basis"].untyped_storage().nbytes() == count * d * r * itemsize
    assert f"state in total: {state_bytes(optimizer):,} B" in optimizer.report()
    assert state_bytes(optimizer, [p]) == state_bytes(optimizer)
    assert state_bytes(optimizer, [parameter((3,))]) == 0


def test_the_basis_owns_its_memory_after_every_refresh_and_a_load():
    p = parameter((20, 12))
    optimizer = GaLoreAdamW([p], rank=3, update_proj_gap=1)
    for _ in range(3):
        run(optimizer, [p], [[torch.randn_like(p)]])
        assert optimizer.state[p]["basis"].untyped_storage().nbytes() == 12 * 3 * 4
    optimizer.load_state_dict(optimizer.state_dict())
    assert optimizer.state[p]["basis"].untyped_storage().nbytes() == 12 * 3 * 4


@pytest.mark.parametrize(
    ("dtype", "moment_dtype", "expected", "basis"),
    [
        (torch.float32, None, torch.float32, torch.float32),
        (torch.float64, None, torch.float64, torch.float64),
        (torch.bfloat16, None, torch.float32, torch.float32),
        (torch.bfloat16, "param", torch.bfloat16, torch.float32),
        (torch.float16, "param", torch.float16, torch.float32),
        (torch.float32, "bfloat16", torch.bfloat16, torch.float32),
        (torch.float32, torch.bfloat16, torch.bfloat16, torch.float32),
    ],
)
def test_moments_and_bases_have_the_dtypes_that_were_asked_for(dtype, moment_dtype, expected, basis):
    p = parameter((12, 20), dtype)
    optimizer = GaLoreAdamW([p], rank=3, moment_dtype=moment_dtype, update_proj_gap=2)
    run(optimizer, [p], [[torch.randn_like(p)]] * 3)
    state = optimizer.state[p]
    assert (state["exp_avg"].dtype, state["exp_avg_sq"].dtype, state["basis"].dtype) == (expected, expected, basis)
    assert p.isfinite().all()


def test_bfloat16_moments_stay_close_to_float32_ones():
    weights = []
    for moment_dtype in (None, "bfloat16"):
        p = parameter((12, 20))
        start = p.detach().clone()
        optimizer = GaLoreAdamW([p], lr=0.01, rank=3, update_proj_gap=5, moment_dtype=moment_dtype, weight_decay=0.0)
        run(optimizer, [p], [[g] for g in gradients((12, 20), 30)])
        weights.append(p.detach() - start)
    assert 0 < (weights[0] - weights[1]).norm() < 0.05 * weights[0].norm()


# Weights.


def test_bfloat16_weights_follow_float32_ones_within_the_statistical_error():
    d, k, steps, size = 16, 512, 200, 1e-3
    moved = {}
    for dtype in (torch.float32, torch.bfloat16):
        p = torch.nn.Parameter(torch.ones(d, k, dtype=dtype))
        # A constant gradient of rank one: every entry moves by lr * scale / sqrt(d) in each step.
        optimizer = GaLoreAdamW([p], lr=size * math.sqrt(d), scale=1.0, rank=1, **EXACT)
        run(optimizer, [p], [[torch.ones_like(p)]] * steps)
        moved[dtype] = 1 - p.detach().double()
    torch.testing.assert_close(moved[torch.float32], torch.full((d, k), 0.2, dtype=torch.float64), rtol=1e-3, atol=0)
    unit = 2.0**-8  # spacing of bfloat16 below 1; a rounding has a variance of f (1 - f) unit^2
    deviation = unit * math.sqrt(steps * (size / unit) * (1 - size / unit))
    assert abs(moved[torch.bfloat16].mean() - 0.2) < 4 * deviation / math.sqrt(d * k) + 1e-4
    assert 0.8 * deviation < moved[torch.bfloat16].std() < 1.2 * deviation


@pytest.mark.parametrize("transport", TRANSPORTS)
@pytest.mark.parametrize("shape", [(3, 9, 15), (3, 15, 9), (2, 2, 9, 15), (2, 8, 3, 2, 2)])
def test_stacked_matrices_equal_separate_ones(shape, transport):
    batch_dims = 2 if shape[:2] == (2, 2) else 1
    single = shape[batch_dims:]
    count = math.prod(shape[:batch_dims])
    members = [gradients(single, 7, torch.float64, seed) for seed in range(count)]
    p = parameter(shape, torch.float64)
    apart = [torch.nn.Parameter(x.clone()) for x in p.detach().reshape(count, *single)]
    common = dict(lr=0.1, rank=3, update_proj_gap=3, transport=transport)
    run(
        GaLoreAdamW([p], batch_dims=batch_dims, **common),
        [p],
        [[torch.stack(gs).reshape(shape)] for gs in zip(*members, strict=True)],
    )
    for q, grads in zip(apart, members, strict=True):
        run(GaLoreAdamW([q], **common), [q], [[g] for g in grads])
    torch.testing.assert_close(p.detach().reshape(count, *single), torch.stack([q.detach() for q in apart]))


@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16])
@pytest.mark.parametrize("shape", [(8, 3, 2, 2), (20, 2, 3, 2)])
def test_a_convolution_equals_its_matrix_and_memory_formats_agree(shape, dtype):
    training.assert_memory_formats_agree(GaLoreAdamW, shape, dtype)


@pytest.mark.parametrize("shape", [(12, 20), (20, 12), (8, 3, 2, 2)])
def test_strided_gradients_and_parameters_equal_contiguous_ones(shape):
    grads = gradients(shape, 6, torch.float64)
    common = dict(lr=0.1, rank=3, update_proj_gap=2)
    expected = trajectory(parameter(shape, torch.float64), grads, **common)
    strided = [torch.stack([g, g], -1)[..., 0] for g in grads]
    torch.testing.assert_close(trajectory(parameter(shape, torch.float64), strided, **common), expected)
    p = torch.nn.Parameter(parameter(shape, torch.float64).detach().mT.contiguous().mT)
    torch.testing.assert_close(trajectory(p, [g.mT.contiguous().mT for g in grads], **common), expected)


@pytest.mark.parametrize("shape", [(12, 20), (6,)])
def test_maximize_is_the_opposite_gradient(shape):
    grads = [torch.randn(shape, dtype=torch.float64) for _ in range(5)]
    weights = []
    for sign, maximize in ((1, False), (-1, True)):
        params = [parameter(shape, torch.float64), parameter((9, 5), torch.float64)]
        optimizer = GaLoreAdamW(params, lr=0.1, rank=3, maximize=maximize)
        run(optimizer, params, [[sign * g, None] for g in grads])
        weights.append(params[0].detach())
    torch.testing.assert_close(*weights, rtol=1e-9, atol=1e-9)


def test_a_tensor_lr_is_read_at_every_step_and_kept():
    lr = torch.tensor(0.1, dtype=torch.float64)
    p, q = parameter((12, 20), torch.float64), parameter((12, 20), torch.float64)
    a, b = GaLoreAdamW([p], lr=lr, rank=3), GaLoreAdamW([q], lr=0.1, rank=3)
    for value, g in zip((0.1, 0.03, 0.0), gradients((12, 20), 3, torch.float64), strict=True):
        lr.fill_(value)
        b.param_groups[0]["lr"] = value
        run(a, [p], [[g]])
        run(b, [q], [[g]])
    assert torch.equal(p, q)
    assert a.param_groups[0]["lr"] is lr


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("projection", PROJECTIONS)
def test_gradients_and_storages_are_left_alone(projection, dtype):
    shapes = [(12, 20), (20, 12), (8, 3, 2, 2), (6,), ()]
    params = [parameter(shape, dtype) for shape in shapes]
    params.append(torch.nn.Parameter(parameter((20, 2, 3, 3), dtype).detach().to(memory_format=torch.channels_last)))
    pointers = [(p.data_ptr(), p.stride()) for p in params]
    optimizer = GaLoreAdamW(params, rank=2, update_proj_gap=2, projection=projection, weight_decay=0.1)
    for _ in range(4):
        for p in params:
            p.grad = torch.randn_like(p)
        grads, copies = [p.grad for p in params], [p.grad.clone() for p in params]
        optimizer.step()
        assert [(p.data_ptr(), p.stride()) for p in params] == pointers
        for p, g, copied in zip(params, grads, copies, strict=True):
            assert p.grad is g
            assert torch.equal(g, copied)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("projection", PROJECTIONS)
def test_the_same_gradients_give_the_same_bits_whatever_the_global_generator(projection, dtype):
    weights = []
    for seed in (1, 2):
        torch.manual_seed(seed)
        p = parameter((12, 20), dtype)
        weights.append(
            trajectory(p, gradients((12, 20), 7, dtype), rank=3, update_proj_gap=2, projection=projection, lr=0.1)
        )
        assert torch.get_rng_state().equal(torch.Generator().manual_seed(seed).get_state())
    assert torch.equal(*weights)


def test_seeds_and_parameters_draw_differently():
    bases = []
    for seed in (0, 1):
        params = [parameter((12, 20)), parameter((12, 20))]
        optimizer = GaLoreAdamW(params, rank=3, projection="random", seed=seed)
        run(optimizer, params, [[torch.randn(12, 20)] * 2])
        bases += [optimizer.state[p]["basis"] for p in params]
    assert len({tuple(b.flatten().tolist()) for b in bases}) == 4


def test_draws_of_named_parameters_go_by_name_and_not_by_order():
    bases = []
    for order in (["a", "b"], ["b", "a"]):
        named = {name: parameter((12, 20)) for name in order}
        optimizer = GaLoreAdamW(named.items(), rank=3, projection="random")
        run(optimizer, list(named.values()), [[torch.randn(12, 20)] * 2])
        bases.append(torch.stack([optimizer.state[named[name]]["basis"] for name in "ab"]))
    assert torch.equal(*bases)


# Resuming.


def setting(dtype, transport="rotate", projection="svd", seed=0):
    """Parameters, an optimizer with every kind of state, and ten steps of gradients."""
    shapes = [(12, 20), (20, 12), (6,), (2, 9, 7), (8, 3, 2, 2)]
    params = [parameter(shape, dtype, seed + i) for i, shape in enumerate(shapes)]
    common = dict(rank=3, update_proj_gap=3, projection=projection, transport=transport)
    stack = {"params": [params[3]], "batch_dims": 1, **common}
    groups = [{"params": [params[0], params[1], params[4]], **common}, stack, {"params": [params[2]]}]
    generator = torch.Generator().manual_seed(11)
    grads = [[torch.randn(s, generator=generator).to(dtype) for s in shapes] for _ in range(10)]
    return params, GaLoreAdamW(groups, lr=0.05), grads


@pytest.mark.parametrize("saved_at", [0, 1, 2, 4, 5, 6])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize(
    ("projection", "transport"), [("svd", "rotate"), ("power", "keep"), ("random", "reset"), ("random", "rotate")]
)
def test_resuming_is_as_if_never_stopped(projection, transport, dtype, saved_at):
    params, optimizer, grads = setting(dtype, transport, projection)
    run(optimizer, params, grads[:saved_at])
    file = io.BytesIO()
    torch.save({"weights": [p.detach() for p in params], "optimizer": optimizer.state_dict()}, file)
    run(optimizer, params, grads[saved_at:])

    file.seek(0)
    saved = torch.load(file, weights_only=True)
    others, resumed, _ = setting(dtype, transport, projection, seed=100)
    torch.manual_seed(4242)
    with torch.no_grad():
        for p, weight in zip(others, saved["weights"], strict=True):
            p.copy_(weight)
    resumed.load_state_dict(saved["optimizer"])
    run(resumed, others, grads[saved_at:])
    for p, q in zip(params, others, strict=True):
        assert torch.equal(p, q)
    assert_same_state(optimizer, resumed)


# Groups and arguments.


@pytest.mark.parametrize("rank", [0, -1, True, math.nan, math.inf, 1.5, 0.0, 2.0, "8", [4]])
@pytest.mark.parametrize("where", ["argument", "group"])
def test_ranks_out_of_range_are_refused(rank, where):
    with pytest.raises(ValueError, match=r"rank must be an int >= 1 .*, got " + re.escape(repr(rank))):
        if where == "argument":
            GaLoreAdamW([parameter((12, 20))], rank=rank)
        else:
            GaLoreAdamW([{"params": [parameter((12, 20))], "rank": rank}])


@pytest.mark.parametrize(("rank", "r"), [(1, 1), (5, 5), (12, 12), (0.25, 3), (0.01, 1), (1.0, 12), (0.99, 11)])
def test_ranks_are_counts_or_shares_of_the_compressed_side(rank, r):
    p = parameter((12, 20))
    optimizer = GaLoreAdamW([p], rank=rank)
    run(optimizer, [p], [[torch.randn_like(p)]])
    assert optimizer.state[p]["exp_avg"].shape == (r, 20)


def test_a_clamped_rank_leaves_nothing_behind_where_warnings_are_errors():
    optimizer = GaLoreAdamW([parameter((9, 12))], rank=3)
    with pytest.raises(UserWarning, match="is clamped"):
        optimizer.add_param_group({"params": [parameter((4, 6))], "rank": 5})
    assert len(optimizer.param_groups) == 1


def test_a_rank_above_the_smaller_side_is_clamped_with_a_warning():
    p, q = parameter((12, 20)), parameter((40, 30))
    with pytest.warns(UserWarning, match=r"rank 16 is above the smaller side of 1 of 2 matrices, such as \(12, 20\)"):
        optimizer = GaLoreAdamW([p, q], rank=16)
    run(optimizer, [p, q], [[torch.randn_like(p), torch.randn_like(q)]])
    assert optimizer.state[p]["exp_avg"].shape == (12, 20)
    assert optimizer.state[q]["exp_avg"].shape == (16, 40)


# argument, values that are refused, what the message names
REFUSED = [
    ("update_proj_gap", [0, -1, 1.5, True, "200", None], "update_proj_gap must be an int >= 1"),
    ("scale", [-0.1, math.nan, "1", None], "scale must be a number >= 0"),
    ("projection", ["svdd", "SVD", None], "projection must be one of svd, power, random"),
    ("side", ["top", None], "side must be one of auto, left, right, reverse"),
    ("transport", ["rotated", None], "transport must be one of rotate, keep, reset"),
    ("batch_dims", [-1, 0.5], "batch_dims must be an int >= 0"),
    ("moment_dtype", ["int8", torch.int8, 16], "moment_dtype must be None or one of float32, bfloat16, param"),
    ("stochastic_rounding", ["yes", 3], "stochastic_rounding must be None, True or False"),
    ("seed", [0.5, None, True], "seed must be an int"),
]


@pytest.mark.parametrize(("argument", "values", "message"), REFUSED, ids=[row[0] for row in REFUSED])
def test_values_out_of_range_are_refused_in_arguments_and_in_groups(argument, values, message):
    for value in values:
        with pytest.raises(ValueError, match=message):
            GaLoreAdamW([parameter((12, 20))], **{argument: value})
        with pytest.raises(ValueError, match=message):
            GaLoreAdamW([{"params": [parameter((12, 20))], "rank": 3, argument: value}])


def test_unknown_keywords_and_group_keys_are_refused():
    with pytest.raises(TypeError, match="unexpected keyword argument 'ranks'"):
        GaLoreAdamW([parameter((12, 20))], ranks=4)
    with pytest.raises(
        ValueError, match=r"unknown key 'update_gap' in a group of GaLoreAdamW; known are .*update_proj_gap"
    ):
        GaLoreAdamW([{"params": [parameter((12, 20))], "rank": 4, "update_gap": 10}])


def test_a_refused_group_changes_nothing():
    p, q = parameter((12, 20)), parameter((9, 5))
    optimizer = GaLoreAdamW([p], rank=3)
    before = copy.deepcopy(optimizer.state_dict())
    for group in ({"params": [q], "ranks": 1}, {"params": [q], "rank": 0}, {"params": [q], "dim": 2}):
        copied = dict(group)
        with pytest.raises((ValueError, NotImplementedError)):
            optimizer.add_param_group(group)
        assert group == copied
    assert optimizer.state_dict() == before


@pytest.mark.parametrize(
    "params",
    [
        [(7,)],
        [(7,), ()],
        [(0, 5)],
        [(3, 0), (4,)],
    ],
)
def test_a_rank_where_nothing_can_be_projected_is_refused(params):
    with pytest.raises(ValueError, match="no parameter can be projected"):
        GaLoreAdamW([parameter(shape) for shape in params], rank=2)
    vectors = [parameter(shape) for shape in params]
    with pytest.raises(ValueError, match="rank=2 is set for a group without a non-empty parameter of two or more"):
        GaLoreAdamW([{"params": [parameter((9, 5))], "rank": 2}, {"params": vectors, "rank": 2}])


def test_a_group_with_a_rank_and_too_few_axes_for_its_stack_is_refused():
    with pytest.raises(ValueError, match="rank=2 is set for a group"):
        GaLoreAdamW(
            [{"params": [parameter((9, 5))], "rank": 2}, {"params": [parameter((9, 5))], "rank": 2, "batch_dims": 1}]
        )


def test_groups_without_a_rank_are_dense_where_another_has_one():
    p, q, v = parameter((12, 20)), parameter((20, 12)), parameter((6,))
    start = q.detach().clone()
    optimizer = GaLoreAdamW([{"params": [p], "rank": 3}, {"params": [q, v]}], lr=0.1)
    grads = [[torch.randn_like(x) for x in (p, q, v)] for _ in range(4)]
    run(optimizer, [p, q, v], grads)
    assert optimizer.state[p]["basis"].shape == (12, 3)
    assert "basis" not in optimizer.state[q]
    same = torch.nn.Parameter(start)
    run(torch.optim.AdamW([same], lr=0.1, fused=True), [same], [[g[1]] for g in grads])
    assert torch.equal(q, same)


def test_without_any_group_rank_every_matrix_is_projected():
    p, q, v = parameter((12, 20)), parameter((20, 12)), parameter((6,))
    optimizer = GaLoreAdamW([{"params": [p]}, {"params": [q, v], "lr": 0.1}])
    run(optimizer, [p, q, v], [[torch.randn_like(x) for x in (p, q, v)]])
    assert ["basis" in optimizer.state[x] for x in (p, q, v)] == [True, True, False]
    assert optimizer.state[p]["exp_avg"].shape == (3, 20)  # a quarter
    assert "2 of 3 parameters are projected" in repr(optimizer)


def test_vectors_get_adamw_bit_for_bit():
    p, v = parameter((12, 20)), parameter((6,))
    same = torch.nn.Parameter(v.detach().clone())
    grads = [[torch.randn_like(p), torch.randn_like(v)] for _ in range(5)]
    run(GaLoreAdamW([p, v], lr=0.1, weight_decay=0.2), [p, v], grads)
    run(AdamW([same], lr=0.1, weight_decay=0.2), [same], [[g[1]] for g in grads])
    assert torch.equal(v, same)


@pytest.mark.parametrize(
    ("proj_type", "side"), [("std", "auto"), ("reverse_std", "reverse"), ("left", "left"), ("right", "right")]
)
@pytest.mark.parametrize("shape", [(12, 20), (20, 12), (14, 14)])
def test_galore_torchs_groups_work_unchanged(proj_type, side, shape):
    def groups(p, v, **extra):
        return [{"params": [v]}, {"params": [p], "rank": 3, "update_proj_gap": 2, "scale": 0.5, **extra}]

    weights = []
    for extra in ({"proj_type": proj_type}, {"side": side}):
        p, v = parameter(shape), parameter((6,))
        given = groups(p, v, **extra)
        copied = [dict(group) for group in given]
        optimizer = GaLoreAdamW(given, lr=0.01)
        assert given == copied
        run(optimizer, [p, v], [[g, torch.ones(6)] for g in gradients(shape, 5)])
        weights.append(p.detach())
        assert optimizer.param_groups[1]["side"] == side
    assert torch.equal(*weights)


@pytest.mark.parametrize(
    ("group", "error", "message"),
    [
        ({"proj_type": "full"}, NotImplementedError, "proj_type='full'"),
        ({"proj_type": "both"}, ValueError, "proj_type must be one of std, reverse_std, left, right"),
        ({"proj_type": "left", "side": "right"}, ValueError, "proj_type='left' contradicts side='right'"),
        ({"dim": 4}, NotImplementedError, "dim"),
    ],
)
def test_what_galore_torch_has_and_we_do_not_says_what_to_use(group, error, message):
    with pytest.raises(error, match=message):
        GaLoreAdamW([{"params": [parameter((12, 20))], "rank": 3, **group}])


@pytest.mark.parametrize(
    ("projection", "name"),
    [
        (SVD(rank=3, side="left", seed=4), "svd"),
        (PowerIteration(rank=3, side="left", seed=4), "power"),
        (RandomOrthogonal(rank=3, side="left", seed=4), "random"),
    ],
)
def test_a_projection_object_is_its_name_and_settings(projection, name):
    grads = gradients((20, 12), 5)
    a = trajectory(parameter((20, 12)), grads, projection=projection, update_proj_gap=2)
    b = trajectory(parameter((20, 12)), grads, projection=name, rank=3, side="left", seed=4, update_proj_gap=2)
    assert torch.equal(a, b)
    group = GaLoreAdamW([parameter((20, 12))], projection=projection).param_groups[0]
    assert [type(group[key]) for key in ("projection", "rank", "side")] == [str, int, str]


def test_a_sparse_gradient_is_refused_before_anything_changes():
    p, q, s = parameter((12, 20)), parameter((6,)), parameter((9, 5))
    optimizer = GaLoreAdamW([p, q, s], rank=3)
    p.grad, q.grad, s.grad = torch.randn_like(p), torch.randn_like(q), torch.randn_like(s).to_sparse()
    before = [x.detach().clone() for x in (p, q, s)]
    with pytest.raises(RuntimeError, match="dense real gradients, got a sparse one for number 2"):
        optimizer.step()
    assert all(torch.equal(x, y) for x, y in zip((p, q, s), before, strict=True))
    assert not any(optimizer.state.values())


def test_complex_and_integer_parameters_are_refused():
    for dtype in (torch.complex64, torch.int64):
        p = torch.nn.Parameter(torch.ones(12, 20, dtype=dtype), requires_grad=dtype.is_complex)
        with pytest.raises(ValueError, match=f"real floating-point parameters, got {dtype}"):
            GaLoreAdamW([parameter((9, 5)), p], rank=3)


def test_param_groups_train_a_model():
    model = torch.nn.Sequential(torch.nn.Linear(24, 32), torch.nn.Tanh(), torch.nn.Linear(32, 16))
    optimizer = GaLoreAdamW(param_groups(model, rank=4, update_proj_gap=10), lr=0.02)
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
