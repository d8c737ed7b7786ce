import copy
import io
import math
from functools import partial

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch.nn.utils import parametrizations

import training
from slimstate.optim import AdamW, GaLoreAdamW, GradNormLoRP, state_bytes
from slimstate.optim._projected import Matrix
from slimstate.optim.gradnorm import _radii, _reparametrized
from slimstate.projections import SVD, matrix_view
from training import run

trajectory = partial(training.trajectory, GradNormLoRP)


def gradients(shape, steps, dtype=torch.float64, seed=0):
    return training.gradients(shape, steps, dtype, seed)


def parameter(shape, dtype=torch.float64, seed=7):
    return training.parameter(shape, dtype, seed)


SIDES = ["auto", "left", "right", "reverse"]
TRANSPORTS = ["rotate", "keep", "reset"]
DOUBLE = torch.float64
MATRICES = [(12, 20), (20, 12), (14, 14), (8, 3, 2, 2)]


def row_norms(p):
    return p.detach().flatten(1).norm(dim=1)


# The equations.


def adam(x, moments, t, betas, eps):
    """Adam's direction of x; moments is a list of two, changed in place."""
    moments[0] = betas[0] * moments[0] + (1 - betas[0]) * x
    moments[1] = betas[1] * moments[1] + (1 - betas[1]) * x**2
    return (moments[0] / (1 - betas[0] ** t)) / ((moments[1] / (1 - betas[1] ** t)).sqrt() + eps)


def written_out(w, grads, *, lr, betas, eps, weight_decay, rank, gap, scale, transport, left):
    """The method as its docstring states it: directions and lengths kept apart, full decompositions, by autograd."""
    g = w.norm(dim=1)
    v = w / g[:, None]
    q, age, lengths = None, 0, [0.0, 0.0]
    weights = []
    for t, grad in enumerate(grads):
        v_, g_ = v.clone().requires_grad_(), g.clone().requires_grad_()
        ((g_[:, None] * v_ / v_.norm(dim=1, keepdim=True)) * grad).sum().backward()
        dv = v_.grad if left else v_.grad.mT
        if t % gap == 0:
            new = torch.linalg.svd(dv, full_matrices=False).U[:, :rank]
            new = new * new.gather(0, new.abs().argmax(0, keepdim=True)).sign()
            if q is None or transport == "reset":
                moments, age = [0.0, 0.0], 0
            elif transport == "rotate":
                c = new.mT @ q
                mean, second = moments[0] / (1 - betas[0] ** age), moments[1] / (1 - betas[1] ** age)
                moments = [
                    c @ moments[0],
                    (1 - betas[1] ** age) * (c**2 @ (second - mean**2) + (c @ mean) ** 2).abs(),
                ]
            q = new
        age += 1
        step = q @ adam(q.mT @ dv, moments, age, betas, eps)
        v = v - lr * scale * (step if left else step.mT)
        v = v / v.norm(dim=1, keepdim=True)
        g = (1 - lr * weight_decay) * g - lr * adam(g_.grad, lengths, t + 1, betas, eps)
        weights.append(g[:, None] * v)
    return torch.stack(weights), g


@pytest.mark.parametrize("transport", TRANSPORTS)
@pytest.mark.parametrize("side", ["left", "right"])
@pytest.mark.parametrize("shape", [(12, 20), (20, 12)])
def test_is_the_method_that_the_docstring_states(shape, side, transport):
    grads = gradients(shape, 9)
    common = dict(lr=0.1, betas=(0.8, 0.95), eps=1e-3, weight_decay=0.2, rank=3, scale=0.5, transport=transport)
    p = parameter(shape)
    expected, lengths = written_out(p.detach().clone(), grads, gap=2, left=side == "left", **common)
    optimizer = GradNormLoRP([p], update_proj_gap=2, side=side, **common)
    for g, w in zip(grads, expected, strict=True):
        run(optimizer, [p], [[g]])
        torch.testing.assert_close(p.detach(), w, rtol=1e-8, atol=1e-8)
    torch.testing.assert_close(optimizer.state[p]["lengths"], lengths, rtol=1e-8, atol=1e-8)


@given(
    rows=st.integers(1, 12),
    columns=st.integers(2, 12),
    negative=st.booleans(),
    size=st.sampled_from([1e-4, 1.0, 1e4]),
    seed=st.integers(0, 99),
)
def test_the_chain_rule_is_that_of_torchs_weight_norm(rows, columns, negative, size, seed):
    """P3, at directions of unit norm and lengths of either sign."""
    torch.manual_seed(seed)
    layer = parametrizations.weight_norm(torch.nn.Linear(columns, rows, bias=False, dtype=DOUBLE))
    g, v = layer.parametrizations.weight.original0, layer.parametrizations.weight.original1
    with torch.no_grad():
        v.normal_().div_(v.norm(dim=1, keepdim=True))
        g.normal_().abs_().add_(0.1).mul_(-size if negative else size)
    p = torch.nn.Parameter(layer.weight.detach().clone())
    x = torch.randn(5, columns, dtype=DOUBLE)
    torch.tanh(layer(x)).square().sum().backward()
    torch.tanh(x @ p.mT).square().sum().backward()
    state = {"lengths": g.detach().flatten().clone()}
    matrix = Matrix(p, None, p, p.grad, state, 1.0, (0, 0, 1), matrix_view((rows, columns)))
    ((_, dv, dg),) = _reparametrized(matrix, 0)
    torch.testing.assert_close(dg, g.grad.flatten(), rtol=1e-9, atol=1e-12)
    torch.testing.assert_close(dv, v.grad, rtol=1e-9, atol=1e-12 * size)
    torch.testing.assert_close(_radii(matrix), g.detach().flatten())


@given(
    shape=st.sampled_from([(12, 20), (20, 12), (8, 3, 2, 2), (1, 6)]),
    weight_decay=st.sampled_from([0.0, 0.3]),
    seed=st.integers(0, 99),
)
def test_row_norms_are_the_lengths_and_full_rank_directions_are_tangential(shape, weight_decay, seed):
    """P1."""
    p = parameter(shape, seed=seed)
    optimizer = GradNormLoRP([p], lr=0.1, rank=1.0, update_proj_gap=2, weight_decay=weight_decay)
    for g in gradients(shape, 5, seed=seed):
        run(optimizer, [p], [[g]])
        torch.testing.assert_close(row_norms(p), optimizer.state[p]["lengths"].abs(), rtol=1e-12, atol=0)
        matrix = Matrix(p, None, p, p.grad, optimizer.state[p], 1.0, (0, 0, 1), matrix_view(shape))
        ((_, dv, _),) = _reparametrized(matrix, 0)
        assert (dv * p.detach().flatten(1)).sum(1).abs().max() < 1e-12 * dv.norm() * p.norm()
        up = optimizer.state[p]["basis"] @ optimizer._reduce(matrix, optimizer.param_groups[0], SVD())[0]
        torch.testing.assert_close(up, dv.mT if matrix.view.transposed else dv, rtol=1e-9, atol=1e-12)


@given(shape=st.sampled_from([(12, 20), (20, 12), (14, 14)]), rank=st.sampled_from([1.0, 3]), seed=st.integers(0, 99))
def test_without_lengths_it_is_galore_on_the_tangential_gradient(shape, rank, seed):
    """P6: with rows put back to length 1 after each step W is V, and the same is GaLore with normalised rows."""
    grads = gradients(shape, 7, seed=seed)
    p = parameter(shape, seed=seed)
    with torch.no_grad():
        p.div_(row_norms(p)[:, None])
    q = torch.nn.Parameter(p.detach().clone())
    common = dict(lr=0.1, rank=rank, update_proj_gap=3, weight_decay=0.0)
    optimizer, galore = GradNormLoRP([p], **common), GaLoreAdamW([q], **common)
    for g in grads:
        run(optimizer, [p], [[g]])
        w = q.detach()
        run(galore, [q], [[g - (g * w).sum(1, keepdim=True) * w]])
        with torch.no_grad():
            p.div_(row_norms(p)[:, None]).mul_(optimizer.state[p]["lengths"].sign()[:, None])
            q.div_(row_norms(q)[:, None])
        torch.testing.assert_close(p, q, rtol=1e-7, atol=1e-7)


@given(seed=st.integers(0, 99), side=st.sampled_from(SIDES), shape=st.sampled_from([(9, 14), (14, 9)]))
def test_the_gauge_does_not_matter(seed, side, shape):
    """P2: V has unit rows whatever it was made of, so that only W = g V / |V| is seen."""
    generator = torch.Generator().manual_seed(seed)
    v = torch.randn(shape, generator=generator, dtype=DOUBLE)
    g = torch.rand(shape[0], 1, generator=generator, dtype=DOUBLE) + 0.1
    factors = 10 ** torch.empty(shape[0], 1, dtype=DOUBLE).uniform_(-3, 3, generator=generator)
    grads = gradients(shape, 6, seed=seed)
    ways = []
    for raw in (v, factors * v):
        p = torch.nn.Parameter(g * raw / raw.norm(dim=1, keepdim=True))
        ways.append(trajectory(p, grads, lr=0.1, rank=3, update_proj_gap=2, side=side))
    torch.testing.assert_close(*ways, rtol=1e-6, atol=1e-8)


@given(seed=st.integers(0, 99), factor=st.sampled_from([1e-3, 0.5, 100.0]))
def test_directions_turn_alike_whatever_the_lengths_of_the_matrix(seed, factor):
    """What the learning rate means: a loss of W / c at c W takes the directions through the same turns."""
    shape, grads = (9, 14), gradients((9, 14), 6, seed=seed)
    turns = []
    for c in (1.0, factor):
        p = torch.nn.Parameter(c * parameter(shape, seed=seed).detach())
        optimizer = GradNormLoRP([p], lr=0.05, rank=3, weight_decay=0.0, eps=0.0)
        for g in grads:
            run(optimizer, [p], [[g / c]])
            with torch.no_grad():  # lengths as if they did not learn
                p.mul_((c * row_norms(parameter(shape, seed=seed)) / optimizer.state[p]["lengths"])[:, None])
                optimizer.state[p]["lengths"].copy_(row_norms(p))
        turns.append(p.detach() / row_norms(p)[:, None])
    torch.testing.assert_close(*turns, rtol=1e-6, atol=1e-8)


def test_decay_is_of_lengths_and_goes_by_lr_alone():
    p = parameter((12, 20))
    start = p.detach().clone()
    optimizer = GradNormLoRP([p], lr=0.1, rank=3, scale=0.5, weight_decay=0.3)
    run(optimizer, [p], [[torch.zeros_like(p)]] * 5)
    torch.testing.assert_close(p.detach(), start * (1 - 0.1 * 0.3) ** 5, rtol=1e-12, atol=0)


def test_a_length_goes_through_zero_and_its_direction_does_not_jump():
    p = parameter((12, 20))
    with torch.no_grad():
        p[3] *= 0.05 / p[3].norm()
    direction = p.detach()[3] / p.detach()[3].norm()
    optimizer = GradNormLoRP([p], lr=0.02, rank=3, scale=0.0, weight_decay=0.0)
    lengths = []
    for _ in range(8):
        run(optimizer, [p], [[direction.expand(12, 20)]])
        lengths.append(optimizer.state[p]["lengths"][3].item())
        torch.testing.assert_close(p.detach()[3], lengths[-1] * direction, rtol=1e-9, atol=1e-12)
    torch.testing.assert_close(torch.tensor(lengths), 0.05 - 0.02 * torch.arange(1, 9), rtol=1e-4, atol=1e-6)


# Rows without a direction.


@given(
    shape=st.sampled_from([(12, 20), (20, 12), (8, 3, 2, 2)]),
    dtype=st.sampled_from([torch.float32, torch.float64, torch.bfloat16, torch.float16]),
    dead=st.sets(st.integers(0, 7), min_size=1),
    side=st.sampled_from(SIDES),
    seed=st.integers(0, 99),
)
def test_zero_rows_stay_finite_and_train(shape, dtype, dead, side, seed):
    """P4."""
    p, dead = parameter(shape, dtype), sorted(dead)
    with torch.no_grad():
        p[dead] = 0
    optimizer = GradNormLoRP([p], lr=0.01, rank=3, update_proj_gap=2, side=side)
    for step, g in enumerate(gradients(shape, 6, dtype, seed)):
        run(optimizer, [p], [[g]])
        assert p.isfinite().all()
        assert (row_norms(p) > 0).all()
        lengths = optimizer.state[p]["lengths"]
        assert lengths.isfinite().all()
        assert (lengths[dead] == 0).all() if step == 0 else (lengths[dead] != 0).all()  # of the second step on


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_matrix_of_zeros_takes_galores_first_step(dtype):
    weights = []
    for kind in (GradNormLoRP, GaLoreAdamW):
        p = torch.nn.Parameter(torch.zeros(12, 20, dtype=dtype))
        run(kind([p], lr=0.1, rank=3), [p], [[g] for g in gradients((12, 20), 1, dtype)])
        weights.append(p.detach())
    torch.testing.assert_close(*weights)


@given(seed=st.integers(0, 99), dead=st.sets(st.integers(0, 11), min_size=1, max_size=12), side=st.sampled_from(SIDES))
def test_rows_that_are_zero_and_get_no_gradient_stay_zero(seed, dead, side):
    """Padding: whatever the other rows do, and whichever side is compressed."""
    p = parameter((12, 20), seed=seed)
    dead = sorted(dead)
    with torch.no_grad():
        p[dead] = 0
    grads = gradients((12, 20), 5, seed=seed)
    for g in grads:
        g[dead] = 0
    optimizer = GradNormLoRP([p], lr=0.1, rank=3, side=side, update_proj_gap=2)
    run(optimizer, [p], [[g] for g in grads])
    assert p.isfinite().all()
    assert p[dead].abs().max() < 1e-12
    assert (optimizer.state[p]["lengths"][dead] == 0).all()


# The weight is the truth.


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("factor", [0.5, 1.25])
def test_lengths_follow_a_weight_that_was_changed_from_outside(dtype, factor):
    """By a loaded checkpoint, a merge, a constraint on norms."""
    grads = gradients((12, 20), 7, dtype)
    settings = dict(lr=0.01, rank=3, weight_decay=0.0)
    p = parameter((12, 20), dtype)
    optimizer = GradNormLoRP([p], **settings)
    run(optimizer, [p], [[g] for g in grads[:3]])
    with torch.no_grad():
        p.mul_(factor)
    changed = row_norms(p).to(optimizer.state[p]["lengths"].dtype)
    run(optimizer, [p], [[torch.zeros_like(p)]])  # the moments go on: a length moves by a few times lr
    torch.testing.assert_close(optimizer.state[p]["lengths"], changed, rtol=0, atol=0.05)
    assert (optimizer.state[p]["lengths"] - changed / factor).abs().min() > 0.2
    torch.testing.assert_close(row_norms(p).to(changed.dtype), optimizer.state[p]["lengths"], rtol=8e-3, atol=0)


def test_a_loaded_weight_keeps_the_sign_of_its_lengths():
    p = parameter((12, 20))
    optimizer = GradNormLoRP([p], lr=0.01, rank=3)
    grads = gradients((12, 20), 6)
    run(optimizer, [p], [[g] for g in grads[:3]])
    other, copied = copy.deepcopy((p, optimizer))
    with torch.no_grad():
        copied.state[other]["lengths"].neg_()  # W = g v = (-g) (-v): the same weight, of the other sign
        copied.state[other]["lengths_avg"].neg_()
        copied.state[other]["exp_avg"].neg_()
        for q in (p, other):
            q.mul_(1.5)
    run(optimizer, [p], [[g] for g in grads[3:]])
    run(copied, [other], [[g] for g in grads[3:]])
    assert (copied.state[other]["lengths"] < 0).all()
    torch.testing.assert_close(p, other, rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("stochastic_rounding", [True, False])
def test_lengths_of_low_precision_weights_lose_nothing_to_rounding(dtype, stochastic_rounding):
    """400 changes of 1e-4 of a length that starts at about 4: each is far below the weight's precision."""
    p = parameter((12, 20), dtype)
    start = row_norms(p.float())
    v = p.detach() / p.detach().norm(dim=1, keepdim=True)
    optimizer = GradNormLoRP([p], lr=1e-4, rank=3, scale=0.0, weight_decay=0.0, stochastic_rounding=stochastic_rounding)
    run(optimizer, [p], [[v]] * 400)
    lengths = optimizer.state[p]["lengths"]
    torch.testing.assert_close(lengths, start - 0.04, rtol=0, atol=2e-4)
    assert ((row_norms(p.float()) - lengths).abs() <= torch.finfo(dtype).eps * lengths).all()


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("settings", [{"lr": 0.0}, {"weight_decay": 0.0, "scale": 0.0}])
def test_rows_that_do_not_move_keep_their_bits(dtype, settings):
    p = parameter((12, 20), dtype)
    start = p.detach().clone()
    gradient = gradients((12, 20), 1, dtype)[0]
    if "scale" in settings:  # lengths of orthogonal gradients do not move either
        gradient = torch.zeros_like(gradient)
    optimizer = GradNormLoRP([p], **{"lr": 0.1, "rank": 3, **settings})
    run(optimizer, [p], [[gradient]] * 4)
    assert torch.equal(p, start)


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
    p = parameter((stack, rows, columns) if stack else (rows, columns), dtype)
    optimizer = GradNormLoRP([p], rank=rank, side=side, transport=transport, batch_dims=int(stack > 0))
    run(optimizer, [p], [[torch.randn_like(p)]])
    d, k = (rows, columns) if side == "left" else (columns, rows)
    if side in ("auto", "reverse"):
        d, k = sorted((rows, columns), reverse=side == "reverse")
    r = min(rank if isinstance(rank, int) else max(1, math.floor(rank * d)), d, k)
    count, itemsize = max(stack, 1), 8 if dtype == DOUBLE else 4
    counters = 4 + 4 * count + 4 * (transport == "reset")  # step, refreshes, age
    assert state_bytes(optimizer) == count * (2 * k * r + d * r + 3 * rows) * itemsize + counters
    assert f"state in total: {state_bytes(optimizer):,} B" in optimizer.report()


def test_the_formula_is_the_published_target_in_elements():
    m, n, r = 48, 20, 5
    p = parameter((m, n), torch.float32)
    optimizer = GradNormLoRP([p], rank=r)
    run(optimizer, [p], [[torch.randn_like(p)]])
    kept = [x for key, x in optimizer.state[p].items() if key not in ("step", "stream", "refreshes")]
    assert sum(x.numel() for x in kept) == 2 * m * r + n * r + 3 * m
    assert [x.shape for x in kept if x.ndim == 1] == [(m,)] * 3


@pytest.mark.parametrize("moment_dtype", ["bfloat16", "param", None])
def test_lengths_and_their_moments_are_never_narrow(moment_dtype):
    p = parameter((12, 20), torch.bfloat16)
    optimizer = GradNormLoRP([p], rank=3, update_proj_gap=2, moment_dtype=moment_dtype)
    run(optimizer, [p], [[torch.randn_like(p)]] * 3)
    state = optimizer.state[p]
    assert {state[key].dtype for key in ("basis", "lengths", "lengths_avg", "lengths_avg_sq")} == {torch.float32}
    assert state["exp_avg"].dtype == (torch.bfloat16 if moment_dtype else torch.float32)


def test_a_reset_forgets_the_moments_in_the_subspace_and_keeps_those_of_lengths():
    p, q = parameter((12, 20)), parameter((12, 20))
    optimizers = [GradNormLoRP([p], rank=3, update_proj_gap=4, transport="reset")]
    optimizers.append(GradNormLoRP([q], rank=3, update_proj_gap=4))
    grads = gradients((12, 20), 5)
    for optimizer, w in zip(optimizers, (p, q), strict=True):
        run(optimizer, [w], [[g] for g in grads[:4]])
    torch.testing.assert_close(p, q)
    for optimizer, w in zip(optimizers, (p, q), strict=True):
        run(optimizer, [w], [[grads[4]]])
    reset, rotated = (optimizer.state[w] for optimizer, w in zip(optimizers, (p, q), strict=True))
    assert (reset["age"].item(), reset["step"].item()) == (1, 5)
    assert not torch.allclose(reset["exp_avg"], rotated["exp_avg"])
    for key in ("lengths", "lengths_avg", "lengths_avg_sq"):
        torch.testing.assert_close(reset[key], rotated[key])


class Allocations(torch.utils._python_dispatch.TorchDispatchMode):
    """The bytes of the largest storage that an operation creates."""

    def __init__(self):
        super().__init__()
        self.largest = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        given = {
            x.untyped_storage().data_ptr() for x in torch.utils._pytree.tree_leaves((args, kwargs)) if is_tensor(x)
        }
        result = func(*args, **(kwargs or {}))
        for x in filter(is_tensor, torch.utils._pytree.tree_leaves(result)):
            if x.untyped_storage().data_ptr() not in given:
                self.largest = max(self.largest, x.untyped_storage().nbytes())
        return result


def is_tensor(x):
    return isinstance(x, torch.Tensor)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("shape", [(3000, 1024), (1024, 3000)])
def test_a_step_makes_nothing_of_the_weights_size_but_at_a_refresh(shape, dtype):
    p = torch.nn.Parameter(torch.randn(shape).to(dtype))
    optimizer = GradNormLoRP([p], rank=4, projection="random", update_proj_gap=3)
    sizes = []
    for _ in range(4):
        p.grad = torch.randn_like(p)
        with Allocations() as made:
            optimizer.step()
        sizes.append(made.largest)
    whole = 4 * p.numel()
    assert max(sizes[1:3]) <= 4 << 20
    assert sizes[0] == sizes[3] == whole


# Weights.


@pytest.mark.parametrize("transport", TRANSPORTS)
@pytest.mark.parametrize("shape", [(3, 9, 15), (3, 15, 9), (2, 2, 9, 15), (2, 8, 3, 2, 2)])
def test_stacked_matrices_equal_separate_ones(shape, transport):
    batch_dims = 2 if shape[:2] == (2, 2) else 1
    single, count = shape[batch_dims:], math.prod(shape[:batch_dims])
    members = [gradients(single, 7, seed=seed) for seed in range(count)]
    p = parameter(shape)
    apart = [torch.nn.Parameter(x.clone()) for x in p.detach().reshape(count, *single)]
    common = dict(lr=0.1, rank=3, update_proj_gap=3, transport=transport)
    optimizer = GradNormLoRP([p], batch_dims=batch_dims, **common)
    run(optimizer, [p], [[torch.stack(gs).reshape(shape)] for gs in zip(*members, strict=True)])
    for q, grads in zip(apart, members, strict=True):
        run(GradNormLoRP([q], **common), [q], [[g] for g in grads])
    torch.testing.assert_close(p.detach().reshape(count, *single), torch.stack([q.detach() for q in apart]))


@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16])
@pytest.mark.parametrize("shape", [(8, 3, 2, 2), (20, 2, 3, 2)])
def test_a_convolution_equals_its_matrix_and_memory_formats_agree(shape, dtype):
    training.assert_memory_formats_agree(GradNormLoRP, shape, dtype)


@pytest.mark.parametrize("shape", [(12, 20), (20, 12), (8, 3, 2, 2)])
def test_strided_gradients_and_parameters_equal_contiguous_ones(shape):
    grads = gradients(shape, 6)
    common = dict(lr=0.1, rank=3, update_proj_gap=2)
    expected = trajectory(parameter(shape), grads, **common)
    strided = [torch.stack([g, g], -1)[..., 0] for g in grads]
    torch.testing.assert_close(trajectory(parameter(shape), strided, **common), expected)
    p = torch.nn.Parameter(parameter(shape).detach().mT.contiguous().mT)
    torch.testing.assert_close(trajectory(p, [g.mT.contiguous().mT for g in grads], **common), expected)


@pytest.mark.parametrize("shape", [(12, 20), (20, 12)])
def test_blocks_of_rows_do_not_matter(shape, monkeypatch):
    grads = gradients(shape, 5)
    common = dict(lr=0.1, rank=3, update_proj_gap=2)
    whole = trajectory(parameter(shape), grads, **common)
    monkeypatch.setattr("slimstate.projections._blocks.BLOCK_BYTES", 3 * shape[1] * 8)
    torch.testing.assert_close(trajectory(parameter(shape), grads, **common), whole, rtol=1e-10, atol=1e-10)


@pytest.mark.parametrize("shape", [(12, 20), (20, 12), (6,)])
def test_maximize_is_the_opposite_gradient(shape):
    grads = [torch.randn(shape, dtype=DOUBLE) for _ in range(5)]
    weights = []
    for sign, maximize in ((1, False), (-1, True)):
        params = [parameter(shape), parameter((9, 5))]
        optimizer = GradNormLoRP(params, lr=0.1, rank=3, maximize=maximize)
        run(optimizer, params, [[sign * g, None] for g in grads])
        weights.append(params[0].detach())
    torch.testing.assert_close(*weights, rtol=1e-9, atol=1e-9)


@given(
    shapes=st.lists(st.sampled_from([(12, 20), (20, 12), (8, 3, 2, 2), (20, 2, 3, 3), (6,), ()]), max_size=4),
    dtype=st.sampled_from([torch.float32, torch.bfloat16]),
    channels_last=st.booleans(),
)
def test_gradients_and_storages_are_left_alone(shapes, dtype, channels_last):
    """P5."""
    params = [parameter(shape, dtype) for shape in [(9, 15), *shapes]]
    if channels_last:
        params += [torch.nn.Parameter(p.detach().to(memory_format=torch.channels_last)) for p in params if p.ndim == 4]
    pointers = [(p.data_ptr(), p.stride()) for p in params]
    optimizer = GradNormLoRP(params, rank=2, update_proj_gap=2, weight_decay=0.1)
    for _ in range(3):
        for p in params:
            p.grad = torch.randn_like(p)
        grads, copies = [p.grad for p in params], [p.grad.clone() for p in params]
        optimizer.step()
        assert [(p.data_ptr(), p.stride()) for p in params] == pointers
        for p, g, copied in zip(params, grads, copies, strict=True):
            assert p.grad is g
            assert torch.equal(g, copied)


def test_vectors_get_adamw_bit_for_bit():
    p, v = parameter((12, 20), torch.float32), parameter((6,), torch.float32)
    same = torch.nn.Parameter(v.detach().clone())
    grads = [[torch.randn_like(p), torch.randn_like(v)] for _ in range(5)]
    run(GradNormLoRP([p, v], lr=0.1, weight_decay=0.2), [p, v], grads)
    run(AdamW([same], lr=0.1, weight_decay=0.2), [same], [[g[1]] for g in grads])
    assert torch.equal(v, same)


@pytest.mark.parametrize("saved_at", [0, 1, 4, 5])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("transport", ["rotate", "reset"])
def test_resuming_is_as_if_never_stopped(transport, dtype, saved_at):
    shapes = [(12, 20), (20, 12), (6,), (2, 9, 7), (8, 3, 2, 2)]
    common = dict(lr=0.05, rank=3, update_proj_gap=3, transport=transport)

    def setting(seed):
        params = [parameter(shape, dtype, seed + i) for i, shape in enumerate(shapes)]
        with torch.no_grad():
            params[0][2] = 0
        groups = [{"params": params[:3] + params[4:]}, {"params": [params[3]], "batch_dims": 1}]
        return params, GradNormLoRP(groups, **common)

    grads = [[torch.randn(shape).to(dtype) for shape in shapes] for _ in range(9)]
    params, optimizer = setting(0)
    run(optimizer, params, grads[:saved_at])
    file = io.BytesIO()
    torch.save({"weights": [p.detach() for p in params], "optimizer": optimizer.state_dict()}, file)
    run(optimizer, params, grads[saved_at:])
    file.seek(0)
    saved = torch.load(file, weights_only=True)
    others, resumed = setting(100)
    with torch.no_grad():
        for p, weight in zip(others, saved["weights"], strict=True):
            p.copy_(weight)
    resumed.load_state_dict(saved["optimizer"])
    run(resumed, others, grads[saved_at:])
    for p, q in zip(params, others, strict=True):
        assert torch.equal(p, q)
        for key, x in optimizer.state[p].items():
            assert torch.equal(torch.as_tensor(x), torch.as_tensor(resumed.state[q][key])), key


# Convergence.


def minimized(loss, p, steps, lr, **settings):
    """Minimises a function of p with a learning rate that falls to zero, and returns its value."""
    optimizer = GradNormLoRP([p], lr=lr, scale=1.0, weight_decay=0.0, betas=(0.9, 0.99), **settings)
    schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, steps)
    for _ in range(steps):
        optimizer.zero_grad()
        loss(p).backward()
        optimizer.step()
        schedule.step()
    return loss(p).item()


@pytest.mark.parametrize("seed", [0, 1])
@pytest.mark.parametrize(("settings", "steps"), [({"rank": 1.0}, 300), ({"rank": 4, "update_proj_gap": 5}, 500)])
def test_a_random_convex_quadratic_is_solved(settings, steps, seed):
    generator = torch.Generator().manual_seed(seed)
    target = torch.randn(12, 16, generator=generator)
    q = torch.linalg.qr(torch.randn(16, 16, generator=generator)).Q
    half = q * torch.linspace(0.3, 1, 16)  # a Hessian of condition 11

    def loss(w):
        return ((w - target) @ half).square().sum() / 2

    p = torch.nn.Parameter(0.1 * torch.randn(12, 16, generator=generator))
    before = loss(p).item()
    assert minimized(loss, p, steps, 0.1, **settings) < 1e-3 * before


@pytest.mark.parametrize(("settings", "steps"), [({"rank": 1.0}, 300), ({"rank": 3, "update_proj_gap": 10}, 500)])
def test_logistic_regression_reaches_the_loss_of_its_minimum(settings, steps):
    generator = torch.Generator().manual_seed(1)
    x, true = torch.randn(200, 16, generator=generator), torch.randn(8, 16, generator=generator)
    y = torch.distributions.Gumbel(0, 1).sample((200, 8)).add(x @ true.mT).argmax(1)

    def loss(w):
        return torch.nn.functional.cross_entropy(x @ w.mT, y) + 0.005 * w.square().sum()

    best = torch.nn.Parameter(torch.zeros(8, 16))
    lbfgs = torch.optim.LBFGS([best], max_iter=500, line_search_fn="strong_wolfe")

    def closure():
        lbfgs.zero_grad()
        value = loss(best)
        value.backward()
        return value

    lbfgs.step(closure)
    start = torch.nn.Parameter(0.1 * torch.randn(8, 16, generator=generator))
    gap = loss(start).item() - loss(best).item()
    assert minimized(loss, start, steps, 0.1, **settings) - loss(best).item() < 2e-3 * gap
