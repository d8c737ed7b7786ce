import itertools

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from slimstate.projections import RandomOrthogonal, captured_energy, subspace_overlap


@given(d=st.integers(1, 50), k=st.integers(1, 50), rank=st.integers(1, 60), seed=st.integers(-(2**63), 2**63))
def test_is_orthonormal_for_every_shape_and_seed(d, k, rank, seed):
    q = RandomOrthogonal(rank=rank, seed=seed).fit(torch.zeros(d, k), None, (0, 0, 0))
    assert q.shape == (d, min(d, k, rank))
    assert (q.mT @ q - torch.eye(q.shape[1])).abs().max() < 1e-5


def test_is_a_pure_function_of_seed_and_counter():
    m = torch.randn(20, 30)
    fit = RandomOrthogonal(rank=4, seed=7).fit
    first = fit(m, None, (5, 1, 0))
    torch.manual_seed(123)
    before = torch.get_rng_state()
    assert torch.equal(fit(m.exp(), first, (5, 1, 0)), first)
    assert torch.equal(torch.get_rng_state(), before)


def test_every_part_of_seed_and_counter_gives_another_subspace():
    m = torch.zeros(40, 60)
    draws = [(0, (0, 0, 0)), (1, (0, 0, 0)), (0, (1, 0, 0)), (0, (0, 1, 0)), (0, (0, 0, 1)), (0, (0, 0))]
    bases = [RandomOrthogonal(rank=4, seed=seed).fit(m, None, counter) for seed, counter in draws]
    for a, b in itertools.combinations(bases, 2):
        assert subspace_overlap(a, b) < 0.6


@pytest.mark.parametrize(("d", "k", "r"), [(16, 40, 4), (40, 16, 8)])
def test_captures_r_of_d_of_the_energy_on_average(d, k, r):
    m = torch.randn(d, 1) @ torch.randn(1, k)  # one direction: the hardest to hit
    fit = RandomOrthogonal(rank=r).fit
    energies = torch.stack([captured_energy(m, fit(m, None, (0, i, 0))) for i in range(300)])
    # Beta(r/2, (d-r)/2): mean r/d, variance 2 r (d-r) / (d^2 (d+2))
    error = (2 * r * (d - r) / (d**2 * (d + 2)) / 300) ** 0.5
    assert abs(energies.mean().item() - r / d) < 4 * error


@pytest.mark.parametrize(
    ("dtype", "basis"),
    [(torch.bfloat16, torch.float32), (torch.float32, torch.float32), (torch.float64, torch.float64)],
)
def test_bases_are_float32_or_float64_and_own_their_memory(dtype, basis):
    q = RandomOrthogonal(rank=4).fit(torch.zeros(20, 30, dtype=dtype), None, (0, 0, 0))
    assert q.dtype == basis
    assert q.untyped_storage().nbytes() == 20 * 4 * basis.itemsize
