"""The Walsh-Hadamard transform as a basis: additions only."""

import math
from dataclasses import dataclass

import torch
from torch import Tensor

from ._dictionary import FixedDictionary

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
    is never built. It gives R and the write-back too, at a cost that does not depend on r; below a rank of 64 a product
    with the r chosen rows is faster, and it alone writes weights of low precision, which are rounded in runs of rows.

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
        x = x.contiguous()
        for start, size in powers_of_two(x.shape[0]):
            _walsh_hadamard_(x[start : start + size])
        return x

    def _inverse(self, x: Tensor) -> Tensor:
        return self._transform(x)

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


def powers_of_two(d: int) -> list[tuple[int, int]]:
    """(start, size) of the blocks that d is cut into: its binary digits, the largest first."""
    cuts, start = [], 0
    for bit in reversed(range(d.bit_length())):
        if d >> bit & 1:
            cuts.append((start, 1 << bit))
            start += 1 << bit
    return cuts


def _walsh_hadamard_(x: Tensor) -> None:
    """The orthonormal transform of the columns (d x c), d a power of two, in place; x is contiguous."""
    d, c = x.shape
    x.mul_(1 / math.sqrt(d))
    half = 1
    while half < d:
        pairs = x.view(-1, 2, half, c)
        first, second = pairs[:, 0], pairs[:, 1]
        first += second
        if torch.compiler.is_compiling():  # which does not take a strided `out`
            second.mul_(-2).add_(first)
        else:
            torch.sub(first, second, alpha=2, out=second)
        half *= 2
