"""Coordinates: keep some rows, columns or entries of the gradient as they are."""

import math
from dataclasses import dataclass
from typing import Literal, get_args

import torch
from torch import Tensor

from slimstate.ops import counter_key

from ._base import IndexProjection
from ._matrix import MatrixView, matrix_view

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

    Raises:
        ValueError: for a rank or an axis out of range, or a side beside `auto`.
    """

    axis: Axis = "columns"

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
        generator = torch.Generator().manual_seed(counter_key(self.seed, *counter))
        chosen = torch.randperm(m.shape[0], generator=generator)[: self.rank_of(*m.shape)]
        return chosen.sort().values.to(m.device, torch.int32)

    def down(self, m: Tensor, basis: Tensor) -> Tensor:
        """The chosen rows of M."""
        return m.index_select(0, basis)

    def up(self, r: Tensor, basis: Tensor, d: int) -> Tensor:
        """R put back on its rows, zeros on the others."""
        return r.new_zeros(d, r.shape[1]).index_add_(0, basis, r)
