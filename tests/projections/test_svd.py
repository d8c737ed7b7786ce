import numpy as np
import pytest
import scipy.linalg
import torch
from hypothesis import given
from hypothesis import strategies as st

from slimstate.projections import SVD, captured_energy, subspace_overlap

SHAPES = [(12, 40), (40, 12), (24, 24), (1, 9), (9, 1), (17, 19)]


def decaying(d, k, rate=0.8, dtype=torch.float64, seed=0):
    """A matrix whose singular values fall by `rate`, so that its leading subspaces are well defined."""
    generator = torch.Generator().manual_seed(seed)
    side = min(d, k)
    u, v = (torch.linalg.qr(torch.randn(n, side, generator=generator, dtype=torch.float64)).Q for n in (d, k))
    return (u * rate ** torch.arange(side) @ v.mT).to(dtype)


def top_energy(m, r):
    s = scipy.linalg.svdvals(m.double().numpy())
    return (s[:r] ** 2).sum() / (s**2).sum()


def assert_orthonormal(q, tolerance=1e-5):
    gram = q.double().mT @ q.double()
    assert (gram - torch.eye(q.shape[1], dtype=torch.float64)).abs().max() < tolerance


@given(
    d=st.integers(1, 40),
    k=st.integers(1, 40),
    rank=st.one_of(st.integers(1, 45), st.floats(0.01, 1)),
    seed=st.integers(0, 1000),
)
def test_captures_the_energy_of_the_leading_singular_values(d, k, rank, seed):
    m = torch.randn(d, k, generator=torch.Generator().manual_seed(seed))
    q = SVD(rank=rank).fit(m, None, (0,))
    r = min(rank if isinstance(rank, int) else max(1, int(rank * d)), d, k)
    assert q.shape == (d, r)
    assert_orthonormal(q)
    assert captured_energy(m, q).item() == pytest.approx(top_energy(m, r), abs=1e-5)


@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.float64, 1e-12), (torch.float32, 1e-5)])
@pytest.mark.parametrize("shape", SHAPES)
def test_spans_the_subspace_of_a_full_decomposition(shape, dtype, tolerance):
    m = decaying(*shape, dtype=dtype)
    r = max(1, min(shape) // 3)
    q = SVD(rank=r).fit(m, None, (0,))
    u = torch.linalg.svd(m.double(), full_matrices=False).U[:, :r]
    assert q.dtype == dtype
    assert 1 - subspace_overlap(q.double(), u).item() < tolerance
    # column by column too: largest singular value first
    cosines = (q.double() * u).sum(0).abs()
    assert (1 - cosines).max() < tolerance


@pytest.mark.parametrize("shape", SHAPES)
def test_the_entry_of_largest_magnitude_of_each_column_is_positive(shape):
    q = SVD(rank=3).fit(torch.randn(shape), None, (0,))
    assert (q.gather(0, q.abs().argmax(0, keepdim=True)) > 0).all()


@pytest.mark.parametrize("shape", [(12, 40), (40, 12)])
def test_signs_do_not_follow_the_gradients_sign(shape):
    m = decaying(*shape, dtype=torch.float32)
    torch.testing.assert_close(SVD(rank=4).fit(-m, None, (0,)), SVD(rank=4).fit(m, None, (0,)))


@pytest.mark.parametrize("size", [1e-25, 1e-37, 1e25, 1e37])
@pytest.mark.parametrize("shape", [(12, 40), (40, 12)])
def test_tiny_and_huge_gradients_have_the_basis_of_ordinary_ones(shape, size):
    m = decaying(*shape, dtype=torch.float32)
    m = m / m.abs().max()
    q = SVD(rank=4).fit(m * size, None, (0,))
    assert_orthonormal(q)
    assert subspace_overlap(q, SVD(rank=4).fit(m, None, (0,))) > 1 - 1e-5


@pytest.mark.parametrize("shape", [(12, 40), (40, 12)])
def test_rank_deficient_gradients_get_an_orthonormal_basis_that_holds_them(shape):
    u, v = torch.randn(shape[0], 2), torch.randn(shape[1], 2)
    m = u @ v.mT
    q = SVD(rank=6).fit(m, None, (0,))
    assert_orthonormal(q)
    assert captured_energy(m, q) > 1 - 1e-5


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("shape", [(12, 40), (40, 12)])
def test_low_precision_gradients_get_a_float32_basis(shape, dtype):
    m = decaying(*shape).to(dtype)
    q = SVD(rank=4).fit(m, None, (0,))
    assert q.dtype == torch.float32
    assert_orthonormal(q)
    assert captured_energy(m, q).item() == pytest.approx(top_energy(m, 4), abs=1e-5)


@pytest.mark.parametrize("shape", SHAPES)
def test_owns_exactly_its_memory(shape):
    q = SVD(rank=3).fit(torch.randn(shape), None, (0,))
    assert q.is_contiguous()
    assert q.untyped_storage().nbytes() == q.numel() * q.itemsize


def test_non_contiguous_gradients_and_other_arguments_do_not_matter():
    m = decaying(40, 12, dtype=torch.float32)
    q = SVD(rank=4).fit(m, None, (0,))
    torch.testing.assert_close(SVD(rank=4, seed=9).fit(m.mT.contiguous().mT, q.flip(1), (3, 4)), q)


def test_large_matrices_are_summed_over_all_their_blocks():
    m = torch.zeros(64, 1 << 15)  # 8 MiB: two blocks, each of which alone gives another answer
    m[0, 5], m[1, -5] = 2.0, 3.0
    q = SVD(rank=2).fit(m, None, (0,))
    expected = np.zeros((64, 2), dtype=np.float32)
    expected[1, 0] = expected[0, 1] = 1
    np.testing.assert_allclose(q.numpy(), expected, atol=1e-6)


@pytest.mark.parametrize("rank", [0, -1, True, 1.5, 0.0, float("nan"), float("inf"), "8", None, 2.0])
def test_refuses_ranks_out_of_range(rank):
    with pytest.raises(ValueError, match=r"rank must be an int >= 1 .* or a float in \(0, 1\]"):
        SVD(rank=rank)


def test_refuses_an_unknown_side():
    with pytest.raises(ValueError, match="side must be one of auto, left, right, reverse, got 'both'"):
        SVD(side="both")


@pytest.mark.parametrize("shape", [(300, 520), (520, 300)])
@pytest.mark.parametrize("rate", [0.5, 0.9, 0.99, 1.0])
def test_sides_where_eigenvectors_are_iterated_lose_nothing(shape, rate):
    m = decaying(*shape, rate=rate, dtype=torch.float32) + 1e-3 * torch.randn(shape) / shape[1] ** 0.5
    q = SVD(rank=24).fit(m, None, (0,))
    assert_orthonormal(q, 2e-5)
    assert captured_energy(m, q).item() == pytest.approx(top_energy(m, 24), abs=1e-5)
    assert torch.equal(SVD(rank=24).fit(m, None, (0,)), q)
