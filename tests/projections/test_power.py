import itertools

import pytest
import scipy.linalg
import torch

from slimstate.projections import SVD, PowerIteration, captured_energy

SHAPES = [(24, 60), (60, 24), (30, 30)]


def decaying(d, k, rate=0.85, seed=0):
    generator = torch.Generator().manual_seed(seed)
    side = min(d, k)
    u, v = (torch.linalg.qr(torch.randn(n, side, generator=generator)).Q for n in (d, k))
    return u * rate ** torch.arange(side) @ v.mT


def top_energy(m, r):
    s = scipy.linalg.svdvals(m.double().numpy())
    return (s[:r] ** 2).sum() / (s**2).sum()


def orthonormal(q):
    return (q.mT @ q - torch.eye(q.shape[1])).abs().max() < 1e-5


@pytest.mark.parametrize("shape", SHAPES)
def test_warm_sweeps_converge_to_the_energy_of_the_svd(shape):
    m = decaying(*shape)
    projection = PowerIteration(rank=5)
    q, missing = None, []
    for refresh in range(12):
        q = projection.fit(m, q, (0, refresh, 0))
        assert orthonormal(q)
        missing.append(top_energy(m, 5) - captured_energy(m, q).item())
    assert missing[-1] < 1e-4
    assert all(later <= earlier + 1e-6 for earlier, later in itertools.pairwise(missing))


@pytest.mark.parametrize("shape", SHAPES)
def test_a_cold_start_is_close(shape):
    m = decaying(*shape)
    q = PowerIteration(rank=5).fit(m, None, (0, 0, 0))
    assert 0.9 * top_energy(m, 5) < captured_energy(m, q) < top_energy(m, 5) + 1e-6


@pytest.mark.parametrize("shape", SHAPES)
def test_one_warm_sweep_follows_a_drifting_gradient(shape):
    m = decaying(*shape)
    old = SVD(rank=5).fit(m, None, (0,))
    drifted = m + 0.02 * torch.randn(shape) / shape[0] ** 0.5
    q = PowerIteration(rank=5).fit(drifted, old, (0, 1, 0))
    assert captured_energy(drifted, q) > top_energy(drifted, 5) - 3e-4 * 5
    assert captured_energy(drifted, q) > captured_energy(drifted, old)


@pytest.mark.parametrize("size", [1e-37, 1e-25, 1e25])
def test_tiny_and_huge_gradients_have_the_basis_of_ordinary_ones(size):
    m = decaying(24, 60)
    m = m / m.abs().max()
    for old in (None, SVD(rank=5).fit(decaying(24, 60, seed=1), None, (0,))):
        q = PowerIteration(rank=5).fit(m * size, old, (0, 0, 0))
        assert orthonormal(q)
        torch.testing.assert_close(q, PowerIteration(rank=5).fit(m, old, (0, 0, 0)), atol=1e-3, rtol=0)


@pytest.mark.parametrize("old", [None, "warm"])
def test_rank_deficient_gradients_get_an_orthonormal_basis(old):
    m = torch.randn(24, 2) @ torch.randn(2, 60)
    old = SVD(rank=6).fit(decaying(24, 60), None, (0,)) if old else None
    q = PowerIteration(rank=6).fit(m, old, (0, 0, 0))
    assert orthonormal(q)
    assert captured_energy(m, q) > 1 - 1e-5


@pytest.mark.parametrize(
    ("dtype", "basis"),
    [(torch.bfloat16, torch.float32), (torch.float16, torch.float32), (torch.float64, torch.float64)],
)
def test_bases_are_float32_or_float64(dtype, basis):
    m = decaying(60, 24).to(dtype)
    q = PowerIteration(rank=5).fit(m, None, (0, 0, 0))
    warm = PowerIteration(rank=5).fit(m, q, (0, 1, 0))
    assert q.dtype == warm.dtype == basis
    assert captured_energy(m, warm).item() == pytest.approx(top_energy(m, 5), abs=0.01)


def test_the_first_fit_is_a_function_of_seed_and_counter_and_leaves_the_global_generator_alone():
    m = decaying(24, 60)
    first = PowerIteration(rank=5, seed=3).fit(m, None, (1, 0, 0))
    torch.manual_seed(99)
    before = torch.get_rng_state()
    assert torch.equal(PowerIteration(rank=5, seed=3).fit(m, None, (1, 0, 0)), first)
    assert torch.equal(torch.get_rng_state(), before)
    assert not torch.equal(PowerIteration(rank=5, seed=4).fit(m, None, (1, 0, 0)), first)
    assert not torch.equal(PowerIteration(rank=5, seed=3).fit(m, None, (2, 0, 0)), first)


@pytest.mark.parametrize("shape", SHAPES)
def test_columns_have_the_sign_of_their_largest_entry_and_own_their_memory(shape):
    q = PowerIteration(rank=4).fit(decaying(*shape), None, (0, 0, 0))
    assert (q.gather(0, q.abs().argmax(0, keepdim=True)) > 0).all()
    assert q.is_contiguous()
    assert q.untyped_storage().nbytes() == q.numel() * q.itemsize
