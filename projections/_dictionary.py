"""What bases share that are known from their size alone: which of their columns to keep, and how to write them back."""

from abc import abstractmethod
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import partial
from typing import Literal

import torch
from torch import Tensor

from ._base import IndexProjection, add_products_, compute_dtype, matrix_in_place
from ._blocks import BLOCK_BYTES, blocks, largest_magnitude
from ._matrix import MatrixView
from ._numbers import Number
from ._rounding import NEAREST, Rounding

__all__ = ["Columns", "FixedDictionary", "SomeRows", "every_row"]


class Columns:
    """A = M + E (d x k), read in blocks of columns, so that the sum need not exist.

    Args:
        m: M, of any floating dtype.
        added: gives E[:, s] for a slice s, in the dtype of arithmetic; None where there is no E.
        largest_added: gives max|E|, 0-d.
    """

    def __init__(
        self,
        m: Tensor,
        added: Callable[[slice], Tensor] | None = None,
        largest_added: Callable[[], Tensor] | None = None,
    ) -> None:
        self.m = m
        self.added = added
        self.largest_added = largest_added

    def blocks(self) -> Iterator[slice]:
        """What to read at a time."""
        return _columns(self.m, compute_dtype(self.m.dtype))

    def read(self, s: slice) -> Tensor:
        """A[:, s] in float32 (float64 for float64), to be overwritten at will."""
        x = self.m[:, s].to(compute_dtype(self.m.dtype), copy=True)
        return x if self.added is None else x.add_(self.added(s))

    @property
    def largest(self) -> Tensor:
        """max|A| or more, 0-d; NaN if any entry of M is."""
        dtype = compute_dtype(self.m.dtype)
        if not self.m.numel():  # what a process may hold of A
            return self.m.new_zeros((), dtype=dtype)
        largest = largest_magnitude(self.m).to(dtype)
        return largest if self.largest_added is None else largest + self.largest_added()


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

    def prepare(self, d: int, dtype: torch.dtype, device: torch.device) -> None:
        """Makes what is shared for this size, which compiled code only finds."""
        self._transform(torch.zeros(d, 1, dtype=dtype, device=device))
        self._rows(torch.zeros(1, dtype=torch.int32, device=device), d, dtype)

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
        rank = self.rank_of(*m.shape)
        if rank == m.shape[0]:
            return every_row(m)
        return _leading(self._measured(Columns(m))[0], rank)

    def fit_down(self, a: Columns, old: Tensor | None) -> tuple[Tensor, Tensor, Tensor]:
        """J, R = Q_J^T A, and whether A could be used, as a 0-d tensor: what is zero or not finite keeps the old J.

        Nothing waits for the device. Where A fits in one block of columns its coefficients are computed once.

        Args:
            a: A (d x k).
            old: J before; None at first, where any J will do for an A that cannot be used.
        """
        d, k = a.m.shape
        rank = self.rank_of(d, k)
        if rank == d:
            index, usable = every_row(a.m), (a.largest > 0) & a.largest.isfinite()
            return index, self.coefficients(a, index), usable
        scores, rows = self._measured(a)
        index, usable = self.choose(scores, rank, old)
        return index, rows(index), usable

    def scores(self, a: Columns, largest: Tensor) -> Tensor:
        """What some columns A of a matrix, maybe none, add to its scores (d,).

        Args:
            a: the columns.
            largest: max|A| of the whole matrix, or more, 0-d.
        """
        return self._scores(a, _scale(largest))[0]

    def choose(self, scores: Tensor, rank: int, old: Tensor | None) -> tuple[Tensor, Tensor]:
        """J (r,) from all scores (d,), and whether they could be used, as in `fit_down`."""
        total = scores.sum()
        usable, index = (total > 0) & total.isfinite(), _leading(scores, rank)
        return index if old is None else torch.where(usable, index, old), usable

    def _measured(self, a: Columns) -> tuple[Tensor, Callable[[Tensor], Tensor]]:
        """The scores of all of A, up to a power of two, and what makes R of J."""
        scale = _scale(a.largest)
        scores, only = self._scores(a, scale)
        if only is None:
            return scores, partial(self.coefficients, a)
        return scores, lambda index: only.index_select(0, index).div_(scale)

    def _scores(self, a: Columns, scale: Tensor) -> tuple[Tensor, Tensor | None]:
        """The norms (d,) of the rows of scale S, squared for l2; and scale S itself where it is one block."""
        scores, every = torch.zeros(a.m.shape[0], dtype=scale.dtype, device=scale.device), list(a.blocks())
        for s in every:
            x = self._transform(a.read(s).mul_(scale))
            scores += (x.abs() if self.norm == 1 else x.square()).sum(1)
        return scores, x if len(every) == 1 else None

    def coefficients(self, a: Columns, index: Tensor) -> Tensor:
        """R = Q_J^T A (r x k), by a product or by the transform."""
        m, dtype = a.m, compute_dtype(a.m.dtype)
        by_transform = self._by_transform(len(index), len(m))
        r = torch.empty(len(index), m.shape[1], dtype=dtype, device=m.device)
        if a.added is None and m.dtype == dtype and not by_transform:
            for s, rows in self._pieces(index, len(m), dtype):
                torch.mm(rows, m, out=r[s])
            return r
        for columns in a.blocks():
            x = a.read(columns)
            if by_transform:
                r[:, columns] = self._transform(x).index_select(0, index)
                continue
            for s, rows in self._pieces(index, len(m), dtype):
                r[s, columns] = rows @ x
        return r

    def _pieces(self, basis: Tensor, d: int, dtype: torch.dtype) -> Iterator[tuple[slice, Tensor]]:
        """Q_J^T (r x d) in runs of rows within `BLOCK_BYTES`, also while they are made."""
        step = max(1, BLOCK_BYTES // (8 * d))
        for start in range(0, len(basis), step):
            s = slice(start, min(start + step, len(basis)))
            yield s, self._rows(basis[s], d, dtype)

    def down(self, m: Tensor, basis: Tensor) -> Tensor:
        """R = Q_J^T M (r x k), in float32 (float64 for float64)."""
        if basis.ndim > 1:
            return torch.stack([self.down(*pair) for pair in zip(m, basis, strict=True)])
        return self.coefficients(Columns(m), basis)

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
        alpha: Number,
        beta: Number,
        rounding: Rounding = NEAREST,
    ) -> None:
        """W <- beta W + alpha Q_J U, in place and without a temporary of W's size."""
        pairs = list(zip(basis, u, strict=True) if view.lead else [(basis, u)])
        by_transform = p.dtype == u.dtype and self._by_transform(basis.shape[-1], view.d)
        if by_transform and (w := matrix_in_place(p, view)) is not None:
            m = w.mT if view.transposed else w
            for target, (index, x) in zip(m if view.lead else [m], pairs, strict=True):
                for s in _columns(target, u.dtype):
                    target[:, s].mul_(beta).add_(self._spread(x[:, s], index, view.d).mul_(alpha))
            return

        def factors(index: Tensor, x: Tensor) -> Iterator[tuple[Tensor, Tensor]]:
            for s, rows in self._pieces(index, view.d, x.dtype):
                yield rows.mT, x[s]

        each = [lambda pair=pair: factors(*pair) for pair in pairs]
        add_products_(p, view, each, u.dtype, alpha=alpha, beta=beta, rounding=rounding)


@dataclass(frozen=True, kw_only=True)
class SomeRows(FixedDictionary):
    """The rows of another Q that belong to some rows of M: Q_J^T M is then what these add to R. There is no choosing by
    it, for which all rows are needed.

    Args:
        whole: the other.
        d: the size of its Q.
        held: which rows.
    """

    whole: FixedDictionary
    d: int
    held: slice | Tensor

    def _transform(self, x: Tensor) -> Tensor:
        raise NotImplementedError("a transform needs all rows")

    _inverse = _transform

    def _by_transform(self, rank: int, d: int) -> bool:
        return False

    def _rows(self, index: Tensor, d: int, dtype: torch.dtype) -> Tensor:
        return self.whole._rows(index, self.d, dtype)[:, self.held]

    def _pieces(self, basis: Tensor, d: int, dtype: torch.dtype) -> Iterator[tuple[slice, Tensor]]:
        return super()._pieces(basis, self.d, dtype)  # within `BLOCK_BYTES` while all of a row is there


def _columns(m: Tensor, dtype: torch.dtype) -> Iterator[slice]:
    """Runs of columns to transform: half a block, since a half spectrum is a little larger than what it came from."""
    return blocks(m, 1, 2 * dtype.itemsize)


def every_row(m: Tensor) -> Tensor:
    """All indices of M's rows."""
    return torch.arange(m.shape[0], dtype=torch.int32, device=m.device)


def _scale(largest: Tensor) -> Tensor:
    """The power of two that takes `largest` into [1/2, 1), or near it from where its own dtype has none."""
    tiny = torch.finfo(largest.dtype).tiny
    largest = largest.nan_to_num(1.0).clamp(tiny, 1 / tiny)
    return torch.frexp(largest).mantissa / largest


def _leading(scores: Tensor, rank: int) -> Tensor:
    """The `rank` largest scores, sorted by index; the first of equal ones."""
    order = scores.sort(descending=True, stable=True).indices
    return order[:rank].sort().values.to(torch.int32)
