"""What bases share that are known from their size alone: which of their columns to keep, and how to write them back."""

from abc import abstractmethod
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor

from ._base import IndexProjection, add_products_, compute_dtype, matrix_in_place
from ._blocks import BLOCK_BYTES, blocks, largest_magnitude
from ._matrix import MatrixView

__all__ = ["FixedDictionary"]


@dataclass(frozen=True, kw_only=True)
class FixedDictionary(IndexProjection):
    r"""Keeps the r columns of a fixed orthonormal Q (d x d) that hold most of the gradient.

    With :math:`S = Q^\top M` (d x k) a row's score is its l1 or l2 norm over k, and J the r largest scores,

    .. math:: R = Q_J^\top M, \qquad \|M - Q_J Q_J^\top M\|_F^2 = \|M\|_F^2 - \sum_{j \in J} \|S_j\|_2^2 ,

    so that ranking by l2 loses least. Kept are the sorted indices J (r, int32), nothing else: Q is known from d. Of
    equal scores the lower index wins, and scaling M by a power of two changes no choice.

    Args:
        rank: r, see `Projection`.
        side: the axis that is compressed.
        seed: not used, nothing is random.
        norm: 1 ranks by the l1 norm, the default of DCT-AdamW's code; 2 by the l2 norm.

    Raises:
        ValueError: for a rank, a side or a norm out of range.
    """

    norm: Literal[1, 2] = 1

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.norm not in (1, 2):
            raise ValueError(f"norm must be 1 or 2, got {self.norm!r}")

    @abstractmethod
    def _transform(self, x: Tensor) -> Tensor:
        """Q^T X of a block X (d x c) that may be overwritten."""

    @abstractmethod
    def _inverse(self, x: Tensor) -> Tensor:
        """Q X of a block X (d x c) that may be overwritten."""

    @abstractmethod
    def _by_transform(self, rank: int, d: int) -> bool:
        """Whether the transform gives R and the write-back faster than a product with `rank` rows."""

    @abstractmethod
    def _rows(self, index: Tensor, d: int, dtype: torch.dtype) -> Tensor:
        """The rows `index` of Q^T."""

    def transform(self, m: Tensor) -> Tensor:
        """S = Q^T M, all d x k coefficients, in float32 (float64 for float64); `fit` never holds them all."""
        out = torch.empty(m.shape, dtype=compute_dtype(m.dtype), device=m.device)
        for s in _columns(m, out.dtype):
            out[:, s] = self._transform(m[:, s].to(out.dtype, copy=True))
        return out

    def inverse(self, s: Tensor) -> Tensor:
        """Q S (d x k), which is M again for S = `transform(M)`."""
        out = torch.empty(s.shape, dtype=compute_dtype(s.dtype), device=s.device)
        for part in _columns(s, out.dtype):
            out[:, part] = self._inverse(s[:, part].to(out.dtype, copy=True))
        return out

    def fit(self, m: Tensor, old: Tensor | None, counter: tuple[int, ...]) -> Tensor:
        """J (r, int32), sorted; neither `old` nor `counter` matters."""
        d, rank = m.shape[0], self.rank_of(*m.shape)
        if rank == d:
            return torch.arange(d, dtype=torch.int32, device=m.device)
        order = self._scores(m).sort(descending=True, stable=True).indices
        return order[:rank].sort().values.to(torch.int32)

    def _scores(self, m: Tensor) -> Tensor:
        """The norms (d,) of S's rows, squared for l2, of M scaled to a largest magnitude in [1/2, 1)."""
        dtype = compute_dtype(m.dtype)
        exponent = torch.frexp(largest_magnitude(m).to(dtype)).exponent
        low = 1 - torch.frexp(torch.tensor(torch.finfo(dtype).max, dtype=dtype)).exponent.item()
        scale = torch.ldexp(torch.ones((), dtype=dtype, device=m.device), (-exponent).clamp(low + 1, -low))
        scores = torch.zeros(m.shape[0], dtype=dtype, device=m.device)
        for s in _columns(m, dtype):
            block = m[:, s]
            x = self._transform(block * scale if block.dtype == dtype else block.to(dtype).mul_(scale))
            scores += (x.abs_() if self.norm == 1 else x.square_()).sum(1)
        return scores

    def _pieces(self, basis: Tensor, d: int, dtype: torch.dtype) -> Iterator[tuple[slice, Tensor]]:
        """Q_J^T (r x d) in runs of rows within `BLOCK_BYTES`, also while they are made."""
        step = max(1, BLOCK_BYTES // (8 * d))
        for start in range(0, len(basis), step):
            s = slice(start, min(start + step, len(basis)))
            yield s, self._rows(basis[s], d, dtype)

    def down(self, m: Tensor, basis: Tensor) -> Tensor:
        """R = Q_J^T M (r x k), in float32 (float64 for float64), by a product or by the transform."""
        if basis.ndim > 1:
            return torch.stack([self.down(*pair) for pair in zip(m, basis, strict=True)])
        dtype = compute_dtype(m.dtype)
        r = torch.empty(len(basis), m.shape[1], dtype=dtype, device=m.device)
        if self._by_transform(len(basis), m.shape[0]):
            for columns in _columns(m, dtype):
                r[:, columns] = self._transform(m[:, columns].to(dtype, copy=True)).index_select(0, basis)
            return r
        for columns in [slice(None)] if m.dtype == dtype else _columns(m, dtype):
            wide = m[:, columns].to(dtype)
            for s, rows in self._pieces(basis, m.shape[0], dtype):
                torch.mm(rows, wide, out=r[s, columns])
        return r

    def up(self, r: Tensor, basis: Tensor, d: int) -> Tensor:
        """Q_J R (d x k)."""
        if basis.ndim > 1:
            return torch.stack([self.up(*pair, d) for pair in zip(r, basis, strict=True)])
        m = r.new_zeros(d, r.shape[1])
        if self._by_transform(len(basis), d):
            for columns in _columns(m, r.dtype):
                m[:, columns] = self._spread(r[:, columns], basis, d)
            return m
        for s, rows in self._pieces(basis, d, r.dtype):
            m.addmm_(rows.mT, r[s])
        return m

    def _spread(self, r: Tensor, basis: Tensor, d: int) -> Tensor:
        """Q_J R by the transform."""
        return self._inverse(r.new_zeros(d, r.shape[1]).index_add_(0, basis, r))

    def write_back_(
        self,
        p: Tensor,
        view: MatrixView,
        basis: Tensor,
        u: Tensor,
        *,
        alpha: float,
        beta: float,
        rounding: int | None = None,
    ) -> None:
        """W <- beta W + alpha Q_J U, in place and without a temporary of W's size."""
        pairs = list(zip(basis, u, strict=True) if view.lead else [(basis, u)])
        by_transform = p.dtype == u.dtype and self._by_transform(basis.shape[-1], view.d)
        if by_transform and (w := matrix_in_place(p, view)) is not None:
            m = w.mT if view.transposed else w
            for target, (index, x) in zip(m if view.lead else [m], pairs, strict=True):
                for s in _columns(target, u.dtype):
                    target[:, s].mul_(beta).add_(self._spread(x[:, s], index, view.d), alpha=alpha)
            return

        def factors(index: Tensor, x: Tensor) -> Iterator[tuple[Tensor, Tensor]]:
            for s, rows in self._pieces(index, view.d, x.dtype):
                yield rows.mT, x[s]

        each = [lambda pair=pair: factors(*pair) for pair in pairs]
        add_products_(p, view, each, u.dtype, alpha=alpha, beta=beta, rounding=rounding)


def _columns(m: Tensor, dtype: torch.dtype) -> Iterator[slice]:
    """Runs of columns to transform: half a block, since a half spectrum is a little larger than what it came from."""
    return blocks(m, 1, 2 * dtype.itemsize)
