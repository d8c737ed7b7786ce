"""The interface that every projection implements, and what the dense bases and the lists of indices each share."""

import math
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from numbers import Integral, Real
from typing import ClassVar

import torch
from torch import Tensor

from ._blocks import blocks
from ._matrix import SIDES, MatrixView, Side, matrix_view
from ._numbers import Number, addmm_
from ._rounding import NEAREST, Rounding, narrow_, widen

__all__ = [
    "DenseProjection",
    "Factors",
    "IndexProjection",
    "Projection",
    "add_products_",
    "check_rank",
    "compute_dtype",
    "matrix_in_place",
    "rewrite_",
]

Factors = Callable[[], Iterable[tuple[Tensor, Tensor]]]
"""Pairs Q_i (d x r_i), U_i (r_i x k), made anew at each call so that they need not all be held at once."""


def compute_dtype(dtype: torch.dtype) -> torch.dtype:
    """Arithmetic is done in float32, in float64 for float64."""
    return torch.float64 if dtype == torch.float64 else torch.float32


def check_rank(rank: object) -> int | float:
    """A rank in the form that groups keep: a Python int (a count) or a float (a share).

    Raises:
        ValueError: unless it is an int >= 1 or a float in (0, 1].
    """
    if isinstance(rank, Integral) and not isinstance(rank, bool) and int(rank) >= 1:
        return int(rank)
    if isinstance(rank, Real) and not isinstance(rank, Integral) and 0 < float(rank) <= 1:
        return float(rank)
    raise ValueError(f"rank must be an int >= 1 (a count) or a float in (0, 1] (a share of the axis), got {rank!r}")


@dataclass(frozen=True, kw_only=True)
class Projection(ABC):
    """Compresses M (d x k) to R = Q^T M (r x k), and brings R back as Q R.

    Args:
        rank: r as a count (int >= 1), or as a share of d (float in (0, 1], `max(1, floor(share * d))`); clamped to the
            smaller side of M. Default 0.25, the ratio of GaLore's 60M and 7B runs.
        side: the axis that is compressed, see `matrix_view`. Default `auto`, the shorter one, as in galore-torch.
        seed: of whatever is drawn at random: a pure function of the seed and of the counter that `fit` is given.

    Raises:
        ValueError: for a rank or a side out of range.
    """

    rank: int | float = 0.25
    side: Side = "auto"
    seed: int = 0

    blind: ClassVar[bool] = False
    """Whether `fit` looks at nothing of M but its shape."""

    key: ClassVar[str]
    """The name under which what `fit` returns is kept in an optimizer's state."""

    def __post_init__(self) -> None:
        check_rank(self.rank)
        if self.side not in SIDES:
            raise ValueError(f"side must be one of {', '.join(SIDES)}, got {self.side!r}")

    def view(self, shape: tuple[int, ...], batch_dims: int = 0) -> MatrixView:
        """How a parameter of this shape is seen as M."""
        return matrix_view(shape, self.side, batch_dims)

    def rank_of(self, d: int, k: int) -> int:
        """The effective r for M (d x k): a share is turned into a count, a count is clamped to the smaller side."""
        return min(self.rank if isinstance(self.rank, int) else max(1, math.floor(self.rank * d)), d, k)

    @abstractmethod
    def shape_of(self, view: MatrixView) -> tuple[int, ...]:
        """Shape of what `fit` returns, behind the stack's axis if there is one."""

    @abstractmethod
    def dtype_of(self, dtype: torch.dtype) -> torch.dtype:
        """The dtype in which what `fit` returns is kept for a parameter of `dtype`."""

    @abstractmethod
    def fit(self, m: Tensor, old: Tensor | None, counter: tuple[int, ...]) -> Tensor:
        """Chooses a subspace for one matrix.

        Args:
            m: M (d x k), finite and not all zero, of any floating dtype.
            old: what was returned for this matrix last time, None at first.
            counter: numbers the draw: the parameter's stream, the refresh count, and the place in a stack.
        """

    def sketch(
        self,
        m: Tensor,
        rank: int,
        largest: float,
        old: Tensor | None,
        counter: tuple[int, ...],
        sum_: Callable[[Tensor], None],
    ) -> Tensor:
        """The share of M's columns in what `solve` needs: the sum over all columns of M.

        Args:
            m: some of M's columns (d x c), maybe none.
            rank: r, for all of M.
            largest: max|M|.
            old: as in `fit`.
            counter: as in `fit`.
            sum_: sums a tensor over all shares, in place, for what must be known on the way.
        """
        raise NotImplementedError

    def solve(self, sketch: Tensor, rank: int) -> Tensor:
        """Q (d x r), from the sum of all sketches."""
        raise NotImplementedError

    @abstractmethod
    def down(self, m: Tensor, basis: Tensor) -> Tensor:
        """R = Q^T M (r x k), in the basis' dtype."""

    @abstractmethod
    def up(self, r: Tensor, basis: Tensor, d: int) -> Tensor:
        """Q R (d x k): the part of M that the subspace holds, if R is M's."""

    @abstractmethod
    def overlap(self, new: Tensor, old: Tensor) -> Tensor:
        """C = Q_new^T Q_old (r x r): reads in the new basis what was written in the old one."""

    @abstractmethod
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
        """W <- beta W + alpha Q U, in place and without a temporary of W's size.

        Args:
            p: the parameter W, of any dtype and memory layout.
            view: how M and W are related.
            basis: what `fit` returned, or a stack of them.
            u: U (r x k), or a stack of them, in float32 (float64 for float64).
            alpha: factor of the update.
            beta: factor of the weight, 1 - lr * weight_decay.
            rounding: how a low-precision weight is read and rounded.
        """


class DenseProjection(Projection):
    """A projection that keeps an orthonormal Q (d x r)."""

    key: ClassVar[str] = "basis"

    def shape_of(self, view: MatrixView) -> tuple[int, ...]:
        """(d, r)."""
        return (view.d, self.rank_of(view.d, view.k))

    def dtype_of(self, dtype: torch.dtype) -> torch.dtype:
        """float32, and float64 for float64."""
        return compute_dtype(dtype)

    def down(self, m: Tensor, basis: Tensor) -> Tensor:
        """R = Q^T M; a gradient of lower precision is widened in column blocks."""
        if m.dtype == basis.dtype:
            return basis.mT @ m
        r = basis.new_empty(*m.shape[:-2], basis.shape[-1], m.shape[-1])
        for s in blocks(m, -1, basis.itemsize):
            r[..., s] = basis.mT @ m[..., s].to(basis.dtype)
        return r

    def up(self, r: Tensor, basis: Tensor, d: int) -> Tensor:
        """Q R; `d` is the basis' own."""
        return basis @ r

    def overlap(self, new: Tensor, old: Tensor) -> Tensor:
        """Q_new^T Q_old."""
        return new.mT @ old

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
        if p.dtype == basis.dtype and (w := matrix_in_place(p, view)) is not None:
            a, b = (u.mT, basis.mT) if view.transposed else (basis, u)
            addmm_(w, a, b, beta=beta, alpha=alpha)
            return
        pairs = zip(basis, u, strict=True) if view.lead else [(basis, u)]
        factors = [lambda pair=pair: [pair] for pair in pairs]
        add_products_(p, view, factors, basis.dtype, alpha=alpha, beta=beta, rounding=rounding)


class IndexProjection(Projection):
    """A projection that keeps which r of d orthonormal vectors, known without the gradient, it has chosen."""

    key: ClassVar[str] = "index"

    def shape_of(self, view: MatrixView) -> tuple[int, ...]:
        """(r,)."""
        return (self.rank_of(view.d, view.k),)

    def dtype_of(self, dtype: torch.dtype) -> torch.dtype:
        """int32, whatever the parameter's."""
        return torch.int32

    def overlap(self, new: Tensor, old: Tensor) -> Tensor:
        """1 where a new index was chosen before, 0 elsewhere (r x r)."""
        return (new[:, None] == old[None, :]).float()


def add_products_(
    p: Tensor,
    view: MatrixView,
    factors: Sequence[Factors],
    dtype: torch.dtype,
    *,
    alpha: Number,
    beta: Number,
    rounding: Rounding,
) -> None:
    """W <- beta W + alpha sum_i Q_i U_i, in place and without a temporary of W's size.

    Args:
        p: the parameter W, of any dtype and memory layout.
        view: how M and W are related.
        factors: of each matrix of the stack, or of the only one; called once for each block of W. Never empty.
        dtype: of the factors.
        alpha: factor of the update.
        beta: factor of the weight.
        rounding: how a low-precision weight is read and rounded.
    """

    def add_(w: Tensor, j: int, rows: slice) -> None:
        for i, (q, u) in enumerate(factors[j]()):
            a, b = (u.mT, q.mT) if view.transposed else (q, u)  # (rows, r) and (r, columns) of W as it is stored
            addmm_(w, a[rows], b, beta=beta if i == 0 else 1.0, alpha=alpha)

    rewrite_(p, view, add_, dtype, rounding, whole=True)


def rewrite_(
    p: Tensor,
    view: MatrixView,
    edit: Callable[[Tensor, int, slice], object],
    dtype: torch.dtype,
    rounding: Rounding,
    *,
    whole: bool = False,
) -> None:
    """Changes W in place and in `dtype`, without a temporary of W's size.

    Args:
        p: the parameter W, of any dtype and memory layout.
        view: how it is stored as matrices (rows x columns).
        edit: changes some rows of matrix j, given as (rows x columns) in `dtype`; called with them, j, and which.
        dtype: of the arithmetic.
        rounding: how a low-precision weight is read and rounded.
        whole: give all rows at once where W's own memory can be given.
    """
    if not p.numel():  # what a process may hold of W
        return
    in_place = matrix_in_place(p, view) if p.dtype == dtype else None
    if in_place is not None:
        for j, w in enumerate(in_place if view.lead else [in_place]):
            for s in [slice(0, view.rows)] if whole else blocks(w, 0, dtype.itemsize):
                edit(w[s], j, s)
        return
    lows = [None] * math.prod(view.lead) if rounding.low is None else view.members(rounding.low)
    for j, (w, low) in enumerate(zip(view.members(p), lows, strict=True)):
        for s in blocks(w, 0, dtype.itemsize):
            part = None if low is None else low[s]
            wide = widen(w[s], part, dtype).reshape(-1, view.columns)
            edit(wide, j, s)
            offset = (j * view.rows + s.start) * view.columns
            narrow_(w[s], wide.view(w[s].shape), rounding._replace(low=part), offset)


def matrix_in_place(p: Tensor, view: MatrixView) -> Tensor | None:
    """The parameter's own memory as rows x columns, or None where its layout has no such view (channels_last, say)."""
    shape = (*view.lead, view.rows, view.columns)
    return p.view(shape) if p.is_contiguous() or tuple(p.shape) == shape else None
