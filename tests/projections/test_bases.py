import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from slimstate.ops import counter_key
from slimstate.projections import SVD, matrix_view
from slimstate.projections._bases import Kept, decode, encode, wide
from slimstate.projections._residual import scaled_step_, sign_step_
from slimstate.projections._rounding import NEAREST, Rounding

FORMS = ["8bit", "bfloat16"]
SIDES = ["left", "right"]


def orthonormal(d, r, seed=0, dtype=torch.float32):
    generator = torch.Generator().manual_seed(seed)
    return torch.linalg.qr(torch.randn(d, r, generator=generator, dtype=torch.float64)).Q.to(dtype)


def kept(q, form):
    values, scale = encode(q) if form == "8bit" else (q.bfloat16(), None)
    return Kept(values, scale, q.dtype)


def problem(shape, rank, side, batch_dims=0, dtype=torch.float32):
    """W, G, Q, R and U; R is Q^T M."""
    generator = torch.Generator().manual_seed(1)
    view = matrix_view(shape, side, batch_dims)
    w, g = (torch.randn(shape, generator=generator, dtype=torch.float64).to(dtype) for _ in range(2))
    wide_dtype = torch.float64 if dtype == torch.float64 else torch.float32
    bases = [orthonormal(view.d, rank, seed, wide_dtype) for seed in range(*view.lead or (1,))]
    q = torch.stack(bases) if view.lead else bases[0]
    r = q.mT @ view.open(g).to(wide_dtype)
    return view, w, g, q, r, torch.randn(r.shape, generator=generator, dtype=torch.float64).to(wide_dtype)


@given(st.integers(1, 40), st.integers(1, 20), st.floats(-30, 30), st.integers(0, 2**31))
def test_codes_are_off_by_at_most_half_of_their_rows_scale(d, r, exponent, seed):
    q = torch.randn(d, r, generator=torch.Generator().manual_seed(seed)) * 2.0**exponent
    q[seed % d] = 0
    codes, scale = encode(q)
    assert (decode(codes, scale, q.dtype) - q).abs().le(scale * (0.5 + 1e-4)).all()
    torch.testing.assert_close(127 * scale, q.abs().amax(1, keepdim=True))
    assert not codes[seed % d].any()


def test_a_second_encoding_changes_nothing():
    codes, scale = encode(orthonormal(60, 20))
    again, rescaled = encode(decode(codes, scale, torch.float32))
    assert torch.equal(codes, again)
    torch.testing.assert_close(scale, rescaled)


def test_what_a_subspace_holds_is_off_by_about_a_percent():
    q, m = orthonormal(512, 128), torch.randn(512, 200, generator=torch.Generator().manual_seed(0))
    for form, of_r, of_product in (("bfloat16", 0.003, 0.005), ("8bit", 0.01, 0.015)):
        near = wide(kept(q, form))
        r, exact = near.mT @ m, q.mT @ m
        assert (r - exact).norm() < of_r * exact.norm()
        assert (near @ r - q @ exact).norm() < of_product * (q @ exact).norm()


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("side", SIDES)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float64])
@pytest.mark.parametrize(("shape", "batch_dims", "rank"), [((20, 12), 0, 5), ((3, 9, 14), 1, 4)])
def test_products_are_those_with_the_wide_basis(form, side, dtype, shape, batch_dims, rank):
    view, w, g, q, _, u = problem(shape, rank, side, batch_dims, dtype)
    basis, projection = kept(q, form), SVD(rank=rank, side=side)
    near, m = wide(basis), view.open(g)
    torch.testing.assert_close(projection.down(m, basis), projection.down(m, near))
    torch.testing.assert_close(projection.up(u, basis, view.d), near @ u)
    got, expected = w.clone(), w.clone()
    for p, x in ((got, basis), (expected, near)):
        projection.write_back_(p, view, x, u, alpha=-0.3, beta=0.9, rounding=Rounding(counter_key(3)))
    torch.testing.assert_close(got, expected)


@pytest.mark.parametrize("side", SIDES)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_basis_of_several_blocks_is_read_one_at_a_time(side, dtype):
    shape = (2100, 610) if side == "left" else (610, 2100)
    view, w, g, q, _, u = problem(shape, 600, side, 0, dtype)
    basis, projection = kept(q, "8bit"), SVD(rank=600, side=side)
    near = wide(basis)
    torch.testing.assert_close(projection.down(view.open(g), basis), near.mT @ view.open(g).float())
    got = w.clone()
    projection.write_back_(got, view, basis, u, alpha=-0.3, beta=0.9)
    expected = 0.9 * w.float() - 0.3 * (near @ u if side == "left" else (near @ u).mT)
    torch.testing.assert_close(got, expected.to(dtype))


# ------------------------------------------------------------------------------------------------ outside


@pytest.mark.parametrize("form", [None, *FORMS])
@pytest.mark.parametrize("side", SIDES)
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32])
@pytest.mark.parametrize(
    ("shape", "batch_dims", "rank"), [((20, 12), 0, 5), ((3, 9, 14), 1, 4), ((5, 3, 2, 2), 0, 2), ((1300, 1000), 0, 3)]
)
def test_steps_outside_are_their_formulas_in_place(form, side, dtype, shape, batch_dims, rank):
    view, w, g, q, r, u = problem(shape, rank, side, batch_dims, dtype)
    basis = q if form is None else kept(q, form)
    near = wide(basis)
    outside = view.open(g) - near @ r
    scale = torch.rand(*view.lead, 1, view.k, dtype=dtype)
    ways = {
        "sign": (outside.sign() * 0.1, lambda p: sign_step_(*p, beta=0.9, alpha=0.3, step=0.1, rounding=NEAREST)),
        "scaled": (outside * scale, lambda p: scaled_step_(*p, beta=0.9, alpha=0.3, scale=scale, rounding=NEAREST)),
    }
    for step, take in ways.values():
        got = w.clone()
        memory = got.data_ptr()
        take((got, view, basis, r, u.clone(), g))
        expected = 0.9 * w + view.close(0.3 * near @ u - step)
        certain = view.close(outside.abs() > 1e-4)  # of the others rounding decides
        torch.testing.assert_close(got[certain], expected[certain])
        assert got.data_ptr() == memory


@pytest.mark.parametrize("side", SIDES)
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_low_precision_steps_are_the_float32_steps_rounded_by_place(side, dtype):
    view, w, g, q, r, u = problem((30, 20), 4, side, 0, dtype)
    key = Rounding(counter_key(5))
    for take in (
        lambda p, how: sign_step_(p, view, q, r, u, g, beta=0.9, alpha=0.3, step=0.1, rounding=how),
        lambda p, how: scaled_step_(
            p, view, q, r, u.clone(), g, beta=0.9, alpha=0.3, scale=torch.ones(1, 1), rounding=how
        ),
    ):
        exact, nearest, random, kept_apart = w.float(), w.clone(), w.clone(), w.clone()
        low = torch.zeros(w.shape, dtype=torch.int16)
        take(exact, NEAREST)
        take(nearest, NEAREST)
        take(random, key)
        take(kept_apart, Rounding(low=low))
        torch.testing.assert_close(nearest, exact.to(dtype))
        assert torch.equal(nearest, kept_apart)
        assert low.any()
        assert not torch.equal(nearest, random)
        assert ((random.float() - exact).abs() <= torch.finfo(dtype).eps * exact.abs() * 2 + 1e-6).all()


@pytest.mark.parametrize("side", SIDES)
def test_what_the_subspace_holds_whole_has_no_sign(side):
    view, w, _, q, r, u = problem((40, 30), 6, side)
    g = view.close(q @ r)
    got = w.clone()
    sign_step_(got, view, q, q.mT @ view.open(g), u * 0, g, beta=1.0, alpha=1.0, step=1.0, rounding=NEAREST)
    assert torch.equal(got, w)
