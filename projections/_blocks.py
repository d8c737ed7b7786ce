"""Work on a large tensor in slices of a few MiB, so that nothing of its full size is ever allocated."""

from collections.abc import Iterator

import torch
from torch import Tensor

__all__ = ["BLOCK_BYTES", "blocks", "largest_magnitude"]

BLOCK_BYTES = 4 << 20


def blocks(x: Tensor, dim: int, itemsize: int = 4) -> Iterator[slice]:
    """Slices along `dim` whose copy in `itemsize` bytes an element stays within `BLOCK_BYTES` (at least one index)."""
    length = x.shape[dim]
    step = max(1, BLOCK_BYTES // max(1, x.numel() // max(1, length) * itemsize))
    for start in range(0, length, step):
        yield slice(start, min(start + step, length))


def largest_magnitude(m: Tensor) -> Tensor:
    """max|M| as a 0-d tensor, NaN if any entry is; one pass without a temporary."""
    low, high = torch.aminmax(m if m.is_contiguous() else m.mT)  # vectorised for contiguous memory only
    return torch.maximum(-low, high)
