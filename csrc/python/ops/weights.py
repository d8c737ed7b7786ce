# SPDX-License-Identifier: Apache-2.0
"""Weights of low precision: how they are read into arithmetic, and written back."""

from typing import NamedTuple

import torch
from torch import Tensor

from .keys import Key
from .rounding import stochastic_round_

__all__ = ["LOW_PRECISION", "NEAREST", "Rounding", "narrow_", "widen"]

LOW_PRECISION = (torch.bfloat16, torch.float16)
FRACTION_BITS = 10  # of float16
SMALLEST_NORMAL = 2.0**-14


class Rounding(NamedTuple):
    """How a weight of low precision stands for a float32 number.

    Args:
        key: of stochastic rounding; None rounds to nearest.
        low: int16, of the weight's shape: what rounding to nearest took away, so that nothing is lost; or None.
    """

    key: Key | None = None
    low: Tensor | None = None


NEAREST = Rounding()


def widen(w: Tensor, low: Tensor | None, dtype: torch.dtype, *, copy: bool = True) -> Tensor:
    """W in `dtype`, with `low` the float32 number that it stands for; a copy, or without `copy` maybe W itself."""
    if low is None:
        return w.to(dtype, copy=copy)
    if w.dtype == torch.bfloat16:
        return (w.view(torch.int16).to(torch.int32) << 16).add_(low).view(torch.float32)
    return w.to(dtype).addcmul_(low.to(dtype), _unit(w, dtype))


def narrow_(w: Tensor, x: Tensor, how: Rounding, offset: int = 0) -> None:
    r"""W <- X, float32 or float64.

    With `how.low`, W is X rounded to nearest, and `low` keeps the rest: of bfloat16 the lower half of X's bits, as a
    signed number; of float16 the difference in units of :math:`2^{-16}` of a unit in the last place, which is exact
    down to :math:`2^{-17}` and off by at most :math:`2^{-41}` below.

    Args:
        w: overwritten.
        x: of W's shape.
        how: see `Rounding`.
        offset: index of the first element within the whole weight, for the random bits.
    """
    if how.low is not None and w.dtype == torch.bfloat16:
        bits = torch.where(x.isnan(), 0x7FC00000, x.contiguous().view(torch.int32))
        high = (bits + 0x8000) >> 16
        w.copy_(high.to(torch.int16).view(torch.bfloat16))
        how.low.copy_(bits - (high << 16))
    elif how.low is not None:
        w.copy_(x)
        rest = (x - w.to(x.dtype)).div_(_unit(w, x.dtype)).nan_to_num_(0, 0, 0)
        how.low.copy_(rest.round_().clamp_(-(2**15), 2**15 - 1))
    elif how.key is not None and w.dtype in LOW_PRECISION and x.dtype == torch.float32:
        stochastic_round_(w, x, how.key, offset)
    else:
        w.copy_(x)


def _unit(w: Tensor, dtype: torch.dtype) -> Tensor:
    """2^-16 of the unit in the last place of float16 numbers."""
    exponent = torch.frexp(w.to(dtype).abs().clamp_(min=SMALLEST_NORMAL)).exponent - 1
    return torch.ldexp(torch.ones_like(w, dtype=dtype), exponent - FRACTION_BITS - 16)
