"""How a parameter of any shape is seen as a matrix whose first axis is compressed."""

import itertools
import math
from typing import Literal, NamedTuple, get_args

from torch import Tensor

__all__ = ["SIDES", "MatrixView", "Side", "matrix_view"]

Side = Literal["auto", "left", "right", "reverse"]
SIDES: tuple[str, ...] = get_args(Side)


class MatrixView(NamedTuple):
    """A parameter seen as M (d x k), or as a stack of them (b x d x k); axis d is the one that is compressed.

    Orientation is settled here, once: nothing downstream asks "left or right?".

    Args:
        shape: the parameter's shape.
        batch_dims: how many leading axes count matrices (0: one matrix, dim 0 against the rest).
        rows: of one matrix as the parameter stores it.
        columns: of one matrix as the parameter stores it.
        transposed: whether M is the transpose of the parameter's matrix (the right side).
    """

    shape: tuple[int, ...]
    batch_dims: int
    rows: int
    columns: int
    transposed: bool

    @property
    def lead(self) -> tuple[int, ...]:
        """`()` for one matrix, `(b,)` for a stack."""
        return (math.prod(self.shape[: self.batch_dims]),) if self.batch_dims else ()

    @property
    def d(self) -> int:
        """Length of the compressed axis."""
        return self.columns if self.transposed else self.rows

    @property
    def k(self) -> int:
        """Length of the axis that is kept."""
        return self.rows if self.transposed else self.columns

    def open(self, x: Tensor) -> Tensor:
        """The parameter's shape -> M. A view wherever the memory of `x` allows one."""
        m = x.reshape(*self.lead, self.rows, self.columns)
        return m.mT if self.transposed else m

    def members(self, x: Tensor) -> list[Tensor]:
        """The matrices of a stack in the parameter's own shape and memory; the parameter itself where it is one."""
        return [x[i] for i in itertools.product(*map(range, self.shape[: self.batch_dims]))] if self.lead else [x]

    def close(self, m: Tensor) -> Tensor:
        """M -> the parameter's shape."""
        return (m.mT if self.transposed else m).reshape(self.shape)


def matrix_view(shape: tuple[int, ...], side: Side = "auto", batch_dims: int = 0) -> MatrixView:
    """Chooses the orientation of a parameter.

    Args:
        shape: at least `batch_dims + 2` axes; after the leading ones, dim 0 is set against the rest.
        side: `left` compresses the rows (R = Q^T G), `right` the columns (R = G Q); `auto` the shorter of the two, and
            the columns of a square matrix, as galore-torch's `std`; `reverse` the other one, its `reverse_std`.
        batch_dims: leading axes that count matrices, such as the experts of a stacked layer.

    Raises:
        ValueError: for an unknown side or a shape with too few axes.
    """
    if len(shape) < batch_dims + 2:
        raise ValueError(f"a matrix view needs at least {batch_dims + 2} axes (batch_dims={batch_dims}), got {shape}")
    rows, columns = shape[batch_dims], math.prod(shape[batch_dims + 1 :])
    tall = rows >= columns
    match side:
        case "auto":
            transposed = tall
        case "reverse":
            transposed = not tall
        case "left":
            transposed = False
        case "right":
            transposed = True
        case _:
            raise ValueError(f"side must be one of {', '.join(SIDES)}, got {side!r}")
    return MatrixView(tuple(shape), batch_dims, rows, columns, transposed)
