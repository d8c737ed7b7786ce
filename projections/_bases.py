"""How a dense basis Q (d x r) is kept, and how arithmetic reads it: as it is, or from fewer bytes, a few rows at a
time."""

from collections.abc import Iterator
from dataclasses import dataclass
from types import EllipsisType

import torch
from torch import Tensor

from ._blocks import blocks
from ._numbers import Number, addmm_

__all__ = ["BASIS_DTYPES", "Basis", "Kept", "add_product_", "decode", "encode", "project_", "wide"]

BASIS_DTYPES = {"bfloat16": torch.bfloat16, "8bit": torch.int8}
LEVELS = 127


@dataclass(frozen=True, slots=True, eq=False)
class Kept:
    """A basis, or a stack of them, in another dtype than that of arithmetic.

    Args:
        values: bfloat16 numbers, or int8 codes (d x r), or a stack of them.
        scale: what a code counts, of each row (d x 1) or of those of a stack, in the dtype of arithmetic; None for
            bfloat16.
        dtype: of arithmetic.
    """

    values: Tensor
    scale: Tensor | None
    dtype: torch.dtype

    @property
    def shape(self) -> torch.Size:
        """Of Q, or of the stack."""
        return self.values.shape

    def __getitem__(self, key: int | slice | EllipsisType) -> "Kept":
        """A matrix of the stack, rows of Q, or all."""
        return Kept(self.values[key], None if self.scale is None else self.scale[key], self.dtype)

    def wide(self) -> Tensor:
        """Q in the dtype of arithmetic."""
        return decode(self.values, self.scale, self.dtype)


Basis = Tensor | Kept
"""Q (d x r), or a stack of them, in the dtype of arithmetic or not; for other projections what they keep instead."""


def encode(q: Tensor) -> tuple[Tensor, Tensor]:
    r"""Q as int8 codes (d x r) and the scale s of each row (d x 1):

    .. math::
        s_i = \max_j |Q_{ij}| / 127, \qquad c_{ij} = \mathrm{round}(Q_{ij} / s_i), \qquad \hat Q_{ij} = c_{ij}\, s_i,

    rounded to nearest, so that no entry is off by more than half of its row's scale. Leading axes are a stack's.
    """
    scale = q.abs().amax(-1, keepdim=True) / LEVELS
    codes = (q / scale.masked_fill(scale == 0, 1)).round_().clamp_(-LEVELS, LEVELS)
    return codes.to(torch.int8), scale


def decode(values: Tensor, scale: Tensor | None, dtype: torch.dtype) -> Tensor:
    """Q in the dtype of arithmetic, from bfloat16 or from `encode`."""
    return values.to(dtype) if scale is None else values * scale


def wide(basis: Basis) -> Tensor:
    """All of Q in the dtype of arithmetic."""
    return basis.wide() if isinstance(basis, Kept) else basis


def _in_rows(basis: Basis) -> Iterator[tuple[slice, Tensor]]:
    """Q in the dtype of arithmetic: whole where it is kept so, else blocks of rows of a few MiB, and which."""
    if isinstance(basis, Tensor):
        yield slice(None), basis
    else:
        for s in blocks(basis.values, 0, basis.dtype.itemsize):
            yield s, basis[s].wide()


def add_product_(
    w: Tensor,
    basis: Basis,
    u: Tensor,
    transposed: bool,
    s: slice,
    *,
    beta: Number,
    alpha: Number,
    lengths: Tensor | None = None,
) -> None:
    """W[s] <- beta W[s] + alpha diag(lengths) (Q U)[s], of rows of one matrix as it is stored.

    Args:
        w: rows s of W; with beta = 0 only overwritten.
        basis: Q (d x r).
        u: U (r x k).
        transposed: whether W is stored as the transpose of Q U.
        s: which rows.
        beta: factor of the weight.
        alpha: factor of the product.
        lengths: of these rows (rows x 1); None for ones.
    """
    if transposed:
        left = u.mT[s] if lengths is None else u.mT[s] * lengths
        for part, q in _in_rows(basis):
            addmm_(w[:, part], left, q.mT, beta=beta, alpha=alpha)
    else:
        for part, q in _in_rows(basis[s]):
            addmm_(w[part], q if lengths is None else q * lengths[part], u, beta=beta, alpha=alpha)


def project_(r: Tensor, basis: Basis, m: Tensor) -> None:
    """R <- R + Q^T M, of one matrix; where M has another dtype, it is widened in blocks."""
    for part, q in _in_rows(basis):
        rows = m[part]
        for s in [slice(None)] if m.dtype == r.dtype else blocks(rows, 1, r.itemsize):
            r[:, s].addmm_(q.mT, rows[:, s].to(r.dtype))
