"""How good a subspace is, and how far it has moved."""

from torch import Tensor

from ._blocks import largest_magnitude

__all__ = ["captured_energy", "subspace_overlap"]


def captured_energy(m: Tensor, basis: Tensor) -> Tensor:
    r"""The share of M's energy inside the subspace, :math:`\|Q^\top M\|_F^2 / \|M\|_F^2`, in [0, 1].

    Args:
        m: M (d x k).
        basis: Q (d x r), orthonormal columns.

    Returns:
        A 0-d tensor; NaN for M = 0.
    """
    m = m.to(basis.dtype) / largest_magnitude(m).to(basis.dtype)  # squares of tiny or huge entries would be lost
    return (basis.mT @ m).square().sum() / m.square().sum()


def subspace_overlap(a: Tensor, b: Tensor) -> Tensor:
    r"""The mean squared cosine of the principal angles, :math:`\|A^\top B\|_F^2 / r`: 1 for the same subspace, 0 for
    orthogonal ones, r/d on average for random ones.

    Args:
        a: A (d x r), orthonormal columns.
        b: B (d x s), orthonormal columns; r = min of the two ranks.

    Returns:
        A 0-d tensor.
    """
    return (a.mT @ b).square().sum() / min(a.shape[1], b.shape[1])
