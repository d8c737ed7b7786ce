"""A basis drawn at random."""

from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from slimstate.ops import counter_key

from ._base import DenseProjection, compute_dtype
from .svd import fix_signs, gaussian

__all__ = ["RandomOrthogonal"]


@dataclass(frozen=True, kw_only=True)
class RandomOrthogonal(DenseProjection):
    r"""Q = an orthonormal basis of a random subspace, uniformly distributed over all of rank r.

    .. math:: Q = \mathrm{qr}(\Omega), \qquad \Omega_{ij} \sim \mathcal N(0, 1).

    It captures r/d of the energy on average and needs nothing of the gradient: no decomposition, and nothing to
    communicate under sharding. Drawn and orthonormalised on the CPU, so that every rank and device gets the same bits.
    """

    blind: ClassVar[bool] = True

    def fit(self, m: Tensor, old: Tensor | None, counter: tuple[int, ...]) -> Tensor:
        """A fresh basis (d x r) for this seed and `counter`; only the shape, dtype and device of `m` matter."""
        rank = self.rank_of(*m.shape)
        omega = gaussian(m.shape[0], rank, counter_key(self.seed, *counter)).to(compute_dtype(m.dtype))
        return fix_signs(torch.linalg.qr(omega).Q).to(m.device)
