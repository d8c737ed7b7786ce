import pytest
import torch

from slimstate.projections import captured_energy, subspace_overlap


def orthonormal(d, r):
    return torch.linalg.qr(torch.randn(d, r)).Q


def test_captured_energy_is_the_share_of_squares_inside_the_subspace():
    m = torch.tensor([[3.0, 0.0, 0.0], [0.0, 4.0, 0.0]])
    eye = torch.eye(2)
    assert captured_energy(m, eye[:, :1]).item() == pytest.approx(9 / 25)
    assert captured_energy(m, eye[:, 1:]).item() == pytest.approx(16 / 25)
    assert captured_energy(m, eye).item() == pytest.approx(1)
    assert captured_energy(m, eye).shape == ()


@pytest.mark.parametrize("size", [1e-25, 1.0, 1e25])
def test_captured_energy_does_not_depend_on_the_gradients_size(size):
    m, q = torch.randn(12, 20), orthonormal(12, 4)
    assert captured_energy(m * size, q).item() == pytest.approx(captured_energy(m, q).item(), rel=1e-4)


def test_captured_energy_widens_low_precision_gradients():
    m, q = torch.randn(12, 20).bfloat16(), orthonormal(12, 4)
    assert captured_energy(m, q).item() == pytest.approx(captured_energy(m.float(), q).item(), rel=1e-6)


def test_captured_energy_of_nothing_is_nan():
    assert captured_energy(torch.zeros(12, 20), orthonormal(12, 4)).isnan()


def test_subspace_overlap_is_the_mean_squared_cosine():
    eye = torch.eye(6)
    tilted = torch.stack([eye[0] * 0.6 + eye[4] * 0.8, eye[1]], dim=1)
    assert subspace_overlap(eye[:, :2], tilted).item() == pytest.approx((0.36 + 1) / 2)
    assert subspace_overlap(eye[:, :2], eye[:, 2:5]).item() == 0
    assert subspace_overlap(eye[:, :2], eye[:, 1:5]).item() == pytest.approx(1 / 2)


def test_subspace_overlap_does_not_depend_on_the_basis_of_a_subspace():
    a, b, turn = orthonormal(20, 5), orthonormal(20, 5), orthonormal(5, 5)
    assert subspace_overlap(a, a @ turn).item() == pytest.approx(1)
    assert subspace_overlap(a @ turn, b).item() == pytest.approx(subspace_overlap(a, b).item(), rel=1e-4)


def test_random_subspaces_overlap_by_r_of_d():
    overlaps = torch.stack([subspace_overlap(orthonormal(20, 5), orthonormal(20, 5)) for _ in range(300)])
    assert overlaps.mean().item() == pytest.approx(5 / 20, abs=0.02)
