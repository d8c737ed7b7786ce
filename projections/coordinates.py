"""Coordinates: keep some rows, columns or entries of the gradient as they are."""

import math
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any, ClassVar, Literal, get_args

import torch
from torch import Tensor

from slimstate.ops import counter_key

from ._base import IndexProjection, compute_dtype, matrix_in_place, rewrite_
from ._matrix import MatrixView, matrix_view
from ._numbers import Number
from ._rounding import NEAREST, Rounding, widen

__all__ = ["Coordinates"]

Axis = Literal["rows", "columns", "entries"]


@dataclass(frozen=True, kw_only=True)
class Coordinates(IndexProjection):
    """Q = r columns of the identity, drawn at random without replacement: down and up are an index, not a product.

    The choice is kept as sorted int32 indices (r of them), a pure function of the seed and the counter. The selections
    are FRUGAL's, https://arxiv.org/abs/2411.07837

    Args:
        rank: how many rows, columns or entries are kept, as a count or as a share of them.
        side: `auto` only: `axis` says which axis is selected from.
        seed: of the draw.
        axis: `rows`, `columns` (the default, as FRUGAL's code) or `entries` of the parameter's matrix.
        contiguous: draw one run of neighbours, which may go on from the last to the first, instead of scattered ones:
            each index is as likely as before, and memory is read and written in long runs.

    Raises:
        ValueError: for a rank or an axis out of range, or a side beside `auto`.
    """

    axis: Axis = "columns"
    contiguous: bool = False

    blind: ClassVar[bool] = True

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.side != "auto":
            raise ValueError(f"side must be 'auto' for Coordinates, whose axis is {self.axis!r}, got {self.side!r}")
        if self.axis not in get_args(Axis):
            raise ValueError(f"axis must be one of {', '.join(get_args(Axis))}, got {self.axis!r}")

    def view(self, shape: tuple[int, ...], batch_dims: int = 0) -> MatrixView:
        """Rows compress the left side, columns the right; entries see the matrix as one column of numel rows."""
        if self.axis == "entries":
            return MatrixView(tuple(shape), batch_dims, math.prod(shape[batch_dims:]), 1, transposed=False)
        return matrix_view(shape, "left" if self.axis == "rows" else "right", batch_dims)

    def rank_of(self, d: int, k: int) -> int:
        """The effective r, at most d: there may be more indices than columns."""
        return super().rank_of(d, d)

    def fit(self, m: Tensor, old: Tensor | None, counter: tuple[int, ...]) -> Tensor:
        """A fresh sorted choice (r, int32) of M's d rows; only the shape and device of `m` matter."""
        d, rank = m.shape[0], self.rank_of(*m.shape)
        generator = torch.Generator().manual_seed(counter_key(self.seed, *counter))
        if self.contiguous:
            chosen = (torch.randint(d, (1,), generator=generator) + torch.arange(rank)) % d
        else:
            chosen = torch.randperm(d, generator=generator)[:rank]
        return chosen.sort().values.to(m.device, torch.int32)

    def down(self, m: Tensor, basis: Tensor) -> Tensor:
        """The chosen rows of M, in float32 (float64 for float64)."""
        if basis.ndim > 1:
            return torch.stack([self.down(*pair) for pair in zip(m, basis, strict=True)])
        return m.index_select(0, basis).to(compute_dtype(m.dtype))

    def up(self, r: Tensor, basis: Tensor, d: int) -> Tensor:
        """R put back on its rows, zeros on the others."""
        if basis.ndim > 1:
            return torch.stack([self.up(*pair, d) for pair in zip(r, basis, strict=True)])
        return r.new_zeros(d, r.shape[1]).index_add_(0, basis, r)

    def take(self, p: Tensor, view: MatrixView, basis: Tensor, low: Tensor | None = None) -> Tensor:
        """The chosen rows (r x k, or a stack of them) of a parameter, in float32 (float64 for float64); `low` is what
        rounding took away from it."""
        rows, dtype = self._chosen(p, view, basis), compute_dtype(p.dtype)
        return widen(rows, None if low is None else self._chosen(low, view, basis), dtype, copy=False)

    def _chosen(self, p: Tensor, view: MatrixView, basis: Tensor) -> Tensor:
        """A copy of the chosen rows, as they are stored."""
        if (w := matrix_in_place(p, view)) is None:
            rows = [member[place] for member, place in self._places(p, view, basis)]
        else:
            dim, each = int(view.transposed), zip(w, basis, strict=True) if view.lead else [(w, basis)]
            rows = [member.index_select(dim, index) for member, index in each]
        rows = [(x.mT if view.transposed else x).reshape(-1, view.k) for x in rows]
        return torch.stack(rows) if view.lead else rows[0]

    def rewrite_(
        self,
        p: Tensor,
        view: MatrixView,
        basis: Tensor,
        rows: Tensor,
        edit: Callable[[Tensor, int, slice], object] | None,
        rounding: Rounding = NEAREST,
        *,
        whole: bool = False,
    ) -> None:
        """Gives the chosen rows of a parameter new values, and all others what `edit` makes of them.

        Args:
            p: the parameter, of any dtype and memory layout.
            view: how it is seen as M.
            basis: the indices (r,), or a stack of them.
            rows: the new values (r x k, or a stack of them), in float32 (float64 for float64).
            edit: as `rewrite_` of the base calls it, with rows of the parameter as stored; None leaves them alone.
            rounding: how a low-precision weight is rounded, each entry by its own place.
            whole: as of the base's.
        """
        plain = matrix_view(view.shape, "left", view.batch_dims)
        w = matrix_in_place(p, view) if p.dtype == rows.dtype else None
        if w is not None:
            if edit is not None:
                rewrite_(p, plain, edit, rows.dtype, rounding, whole=whole)
            values = rows.mT if view.transposed else rows
            each = zip(w, basis.long(), values, strict=True) if view.lead else [(w, basis.long(), values)]
            for member, index, x in each:
                member.index_copy_(int(view.transposed), index, x)
            return

        def both(w: Tensor, j: int, s: slice) -> None:
            if edit is not None:
                edit(w, j, s)
            self._lay_(w, s, *((basis[j], rows[j]) if view.lead else (basis, rows)))

        rewrite_(p, plain, both, rows.dtype, rounding)

    def _lay_(self, w: Tensor, s: slice, index: Tensor, rows: Tensor) -> None:
        """Puts those of the chosen rows into W that are in its rows `s`, which are given."""
        if self.axis == "columns":
            w.index_copy_(1, index.long(), rows.mT[s])
            return
        w = w.view(-1, rows.shape[1])  # of entries, and of rows
        first = s.start * (w.shape[0] // (s.stop - s.start))
        own = torch.arange(first, first + len(w), dtype=index.dtype, device=index.device)
        place = torch.searchsorted(index, own).clamp_(max=len(index) - 1)
        w.copy_(torch.where((index[place] == own)[:, None], rows[place], w))

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
        """W <- beta W + alpha Q U, in place and without a temporary of W's size."""
        rows = self.take(p, view, basis, rounding.low).mul_(beta).add_(u * alpha)
        decays = isinstance(beta, Tensor) or beta != 1
        edit = (lambda w, j, s: w.mul_(beta)) if decays else None
        self.rewrite_(p, view, basis, rows, edit, rounding, whole=True)

    def _places(self, p: Tensor, view: MatrixView, basis: Tensor) -> Iterator[tuple[Tensor, tuple[Any, ...]]]:
        """For memory without a view as matrices: the members of a stack in the parameter's own shape, and where the
        chosen rows are in them."""
        for member, index in zip(view.members(p), basis if view.lead else [basis], strict=True):
            match self.axis:
                case "rows":
                    yield member, (index,)
                case "columns":
                    yield member, (slice(None), *torch.unravel_index(index, member.shape[1:]))
                case "entries":
                    yield member, torch.unravel_index(index, member.shape)
