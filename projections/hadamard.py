"""The Walsh-Hadamard transform as a basis: additions only."""

import math
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial

import torch
from torch import Tensor

from slimstate.ops.hadamard import (
    hadamard_down,
    hadamard_scores,
    hadamard_transform_reference,
    hadamard_write_back_,
    powers_of_two,
    takes_hadamard,
    transforms_hadamard,
)

from ._base import matrix_in_place
from ._dictionary import Columns, FixedDictionary, every_row
from ._matrix import MatrixView
from ._numbers import Number
from ._rounding import NEAREST, Rounding

__all__ = ["Hadamard"]

SMALLEST_FAST = 64  # from this rank on the transform is faster than a product with r rows


@dataclass(frozen=True, kw_only=True)
class Hadamard(FixedDictionary):
    r"""Q = the orthonormal Walsh-Hadamard matrix; kept are the r columns that hold most of the gradient.

    For d a power of two, in Sylvester's order, with :math:`|a|_1` the number of bits set,

    .. math:: Q_{ij} = d^{-1/2} (-1)^{|i \wedge j|_1} = Q_{ji}.

    Any other d is cut into its powers of two, the largest first (its binary digits: 12 = 8 + 4, 1376 = 1024 + 256 + 64
    + 32), and Q is block-diagonal with their matrices: its column j mixes the coordinates of the block that j is in.
    Odd sizes end in a block of one, a plain coordinate. Q is symmetric, so that it is its own inverse.

    The transform is log2 d sweeps of additions, in place over blocks of columns: O(d log d) a column, no product, and Q
    is never built. It gives R and the write-back too, at a cost that does not depend on r. Where no op is compiled, a
    product with the r chosen rows is faster below a rank of 64, and writes weights of low precision.

    It stands in for `DCT`, whose captured energy it about equals where neighbouring coordinates are unrelated.

    Args:
        rank: r, see `Projection`.
        side: the axis that is compressed.
        seed: not used, nothing is random.
        norm: 1 (default, as DCT-AdamW's code) or 2, what the columns are ranked by.

    Raises:
        ValueError: for a rank, a side or a norm out of range.

    Example:
        >>> m = torch.tensor([1.0, -1.0, 1.0, -1.0])[:, None] * torch.ones(4, 5)
        >>> Hadamard(rank=1).fit(m, None, ())
        tensor([1], dtype=torch.int32)
    """

    def _transform(self, x: Tensor) -> Tensor:
        return hadamard_down(x, every_row(x)) if takes_hadamard(x) else hadamard_transform_reference(x)

    def _inverse(self, x: Tensor) -> Tensor:
        return self._transform(x)

    def _measured(self, a: Columns) -> tuple[Tensor, Callable[[Tensor], Tensor]]:
        if a.added is not None or not takes_hadamard(a.m):
            return super()._measured(a)
        return hadamard_scores(a.m, self.norm), partial(self.coefficients, a)

    def coefficients(self, a: Columns, index: Tensor) -> Tensor:
        """R = Q_J^T A (r x k), by the transform, or by a product with few rows where no op is compiled."""
        if not transforms_hadamard(a.m.device, a.m.shape[0]) or a.m.dtype == torch.float64:
            return super().coefficients(a, index)
        if a.added is None and takes_hadamard(a.m):
            return hadamard_down(a.m, index)
        r = torch.empty(len(index), a.m.shape[1], device=a.m.device)
        for s in a.blocks():
            r[:, s] = hadamard_down(a.read(s), index)
        return r

    def up(self, r: Tensor, basis: Tensor, d: int) -> Tensor:
        """Q_J R (d x k)."""
        if basis.ndim > 1 or not takes_hadamard(r):
            return super().up(r, basis, d)
        m = r.new_zeros(d, r.shape[1])
        hadamard_write_back_(m, basis, r, alpha=1.0, beta=1.0)
        return m

    def write_back_(
        self,
        p: Tensor,
        view: MatrixView,
        basis: Tensor,
        u: Tensor,
        *,
        alpha: Number,
        beta: Number,
        rounding: Rounding = NEAREST,
    ) -> None:
        """W <- beta W + alpha Q_J U, in place and without a temporary of W's size."""
        w = matrix_in_place(p, view) if rounding.low is None and u.dtype == torch.float32 else None
        m = w if w is None or not view.transposed else w.mT
        members = [] if m is None else list(m) if view.lead else [m]
        in_order = p.dtype == torch.float32 or p.is_contiguous()  # random bits go by the place in the weight
        if not members or not in_order or not takes_hadamard(members[0], weight=True):
            super().write_back_(p, view, basis, u, alpha=alpha, beta=beta, rounding=rounding)
            return
        for j, target in enumerate(members):
            index, x = (basis[j], u[j]) if view.lead else (basis, u)
            offset = j * view.rows * view.columns
            hadamard_write_back_(target, index, x, alpha=alpha, beta=beta, key=rounding.key, offset=offset)

    def _by_transform(self, rank: int, d: int) -> bool:
        return rank >= SMALLEST_FAST

    def _rows(self, index: Tensor, d: int, dtype: torch.dtype) -> Tensor:
        rows = torch.zeros(len(index), d, dtype=dtype, device=index.device)
        for start, size in powers_of_two(d):
            place = (index - start)[:, None]
            part = rows[:, start : start + size]
            part[:, :1] = ((place >= 0) & (place < size)).to(dtype) / math.sqrt(size)
            for bit in range(size.bit_length() - 1):
                sign = 1 - 2 * ((place >> bit) & 1).to(dtype)
                part[:, 1 << bit : 2 << bit] = part[:, : 1 << bit] * sign
        return rows
