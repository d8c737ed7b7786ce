# SPDX-License-Identifier: Apache-2.0
"""Stochastic rounding of float32 to bfloat16 and float16."""

from collections.abc import Iterator
from typing import TypeVar

import torch
from torch import Tensor

from ._compiled import COMPILED, TAKEN
from ._samples import Sample
from .keys import WHOLE, Key, PartKey, Place, counter_key

__all__ = ["stochastic_round_", "stochastic_round_reference_"]

_Bits = TypeVar("_Bits", int, Tensor)
_WORD = 0xFFFFFFFF
_CHUNK = 1 << 17  # elements; an int64 temporary of the reference is 1 MiB


def stochastic_round_(out: Tensor, x: Tensor, key: Key, offset: int = 0) -> None:
    r"""Rounds ``x`` into ``out``, up or down at random and without bias.

    With :math:`a \le x_i \le b` the neighbours of :math:`x_i` in the format of ``out``,

    .. math::
        \mathrm{out}_i = b \text{ with probability } \frac{x_i - a}{b - a}, \text{ else } a,
        \qquad \mathbb{E}[\mathrm{out}_i] = x_i .

    The random bits of an element depend on ``key`` and on its global index ``offset + i`` alone, where ``i`` counts in
    row-major order whatever the strides. A tensor rounded in pieces, each with its offset, therefore equals the tensor
    rounded whole, on any device. :math:`-x` rounds to minus what :math:`x` rounds to. Representable values, infinities
    and NaN stay what they are. Values beyond the largest finite one have no upper neighbour and are rounded to nearest,
    as ``x.to(out.dtype)`` does. The probability is exact, but for float16 results below 2**-14, where it is to 2**-32.

    Not differentiable: autograd sees that ``out`` was changed, not how.

    Args:
        out: bfloat16 or float16, overwritten.
        x: float32, of the same shape and device.
        key: any int64, such as :func:`counter_key` returns, or a 0-d CPU tensor of one, so that compiled code does not
            depend on its value. One key per tensor and step. With :class:`PartKey` a part of a tensor that is divided
            over processes is rounded as in the whole.
        offset: index of the first element within the whole tensor, or within that part; at least 0.

    Raises:
        TypeError: a dtype is not one of the above.
        ValueError: the shapes or devices differ, ``offset`` is negative, or a place has a negative number or no
            width.
    """
    if out.dtype not in (torch.bfloat16, torch.float16):
        raise TypeError(f"out must be bfloat16 or float16, got {out.dtype}")
    if x.dtype != torch.float32:
        raise TypeError(f"x must be float32, got {x.dtype}")
    if out.shape != x.shape:
        raise ValueError(f"out and x must have one shape, got {tuple(out.shape)} and {tuple(x.shape)}")
    if out.device != x.device:
        raise ValueError(f"out and x must be on one device, got {out.device} and {x.device}")
    if offset < 0:
        raise ValueError(f"offset must be >= 0, got {offset}")
    word, place = key if isinstance(key, PartKey) else (key, WHOLE)
    if min(place) < 0 or place.width < 1:
        raise ValueError(f"place must have start and pitch >= 0 and width >= 1, got {place}")

    if isinstance(word, Tensor):
        torch.ops.slimstate.stochastic_round_keyed_(out, x, word, offset, *place)
        return
    target = out if out.is_contiguous() else torch.empty_like(out, memory_format=torch.contiguous_format)
    source = x.contiguous()
    if out.device.type in TAKEN:
        torch.ops.slimstate.stochastic_round_(target, source, word, offset, *place)
        torch.autograd.graph.increment_version(target)  # so that a backward that saved it raises
    else:
        stochastic_round_reference_(target, source, word, offset, place)
    if target is not out:
        out.copy_(target)


@torch.library.custom_op("slimstate::stochastic_round_keyed_", mutates_args=("out",))
def _(out: Tensor, x: Tensor, key: Tensor, offset: int, start: int, width: int, pitch: int) -> None:
    """One node of a compiled graph, whatever the key; traced, the reference would be a hundred for every tensor."""
    stochastic_round_(out, x, PartKey(int(key), Place(start, width, pitch)), offset)


def stochastic_round_reference_(
    out: Tensor,
    x: Tensor,
    key: int,
    offset: int = 0,
    place: Place = WHOLE,
) -> None:
    """What the op ``stochastic_round_`` computes, in PyTorch; see :func:`stochastic_round_`.

    ``out`` and ``x`` must be contiguous.
    """
    low = key & _WORD
    high = ((key >> 32) & _WORD) ^ _mix32(low)
    low = low ^ _mix32(high)
    round_bits = _bfloat16_bits if out.dtype == torch.bfloat16 else _float16_bits

    codes, bits = out.view(-1).view(torch.int16), x.view(-1).view(torch.int32)
    # A compiler keeps no temporaries, and would unroll the loop.
    chunk = max(codes.numel(), 1) if torch.compiler.is_compiling() else _CHUNK
    for start in range(0, codes.numel(), chunk):
        part = bits[start : start + chunk].to(torch.int64) & _WORD
        index = torch.arange(part.numel(), device=x.device) + (offset + start)
        if place != WHOLE:
            index = place.start + index // place.width * place.pitch + index % place.width
        random = _mix32(_mix32((index & _WORD) ^ low) ^ high ^ (index >> 32))
        magnitude = part & 0x7FFFFFFF
        rounded = round_bits(magnitude, random) | ((part >> 16) & 0x8000)
        codes[start : start + chunk].copy_(rounded)  # int64 to int16 keeps the low bits


def _mix32(x: _Bits) -> _Bits:
    # csrc/rounding.h. The second factor is 0x846ca68b less 2**32: the product then fits in int64.
    x = ((x ^ (x >> 16)) * 0x7FEB352D) & _WORD
    x = ((x ^ (x >> 15)) * -0x7B935975) & _WORD
    return x ^ (x >> 16)


def _bfloat16_bits(magnitude: Tensor, random: Tensor) -> Tensor:
    rounded = (magnitude + (random >> 16)) >> 16
    rounded = torch.where(magnitude > 0x7F7F0000, 0x7F7F + (magnitude >= 0x7F7F8000).long(), rounded)
    return torch.where(magnitude > 0x7F800000, (magnitude >> 16) | 0x40, rounded)


def _float16_bits(magnitude: Tensor, random: Tensor) -> Tensor:
    exponent = magnitude >> 23
    scale = exponent.clamp(min=113)
    shift = (13 + scale - exponent).clamp(max=63)
    fixed = (((magnitude & 0x7FFFFF) | 0x800000) << 32) >> shift
    rounded = ((scale - 113) << 10) + ((fixed + random) >> 32)
    rounded = torch.where(magnitude > 0x477FE000, 0x7BFF + (magnitude >= 0x477FF000).long(), rounded)
    return torch.where(magnitude > 0x7F800000, 0x7E00 | ((magnitude >> 13) & 0x3FF), rounded)


if COMPILED:

    @torch.library.register_fake("slimstate::stochastic_round_")
    def _(out: Tensor, x: Tensor, key: int, offset: int, start: int, width: int, pitch: int) -> None:
        torch._check(out.numel() == x.numel())


def samples(device: str) -> Iterator[Sample]:
    """What the compiled op is compared with its reference by."""
    # Every exponent, both signs, infinities and NaN: the bits of a float32 at even distances.
    x = torch.arange(-(2**31), 2**31, 16411, device=device).to(torch.int32).view(torch.float32)
    key, offset = counter_key(0, 1), 2**32 - 1000
    for dtype in (torch.bfloat16, torch.float16):
        out = torch.zeros_like(x, dtype=dtype)
        for what, start, stop, place in (
            ("", 0, None, WHOLE),
            (" unaligned", 1, 500, WHOLE),
            (" of a part", 0, 5000, Place(7, 129, 1000)),
            (" empty", 0, 0, WHOLE),
        ):
            arguments = (out[start:stop], x[start:stop], key, offset, *place)
            yield Sample("stochastic_round_", f"{dtype}{what}", arguments, _reference)
        keyed = (out[:500], x[:500], torch.tensor(key), offset, *WHOLE)
        yield Sample("stochastic_round_keyed_", str(dtype), keyed, _reference)


def _reference(out: Tensor, x: Tensor, key: int | Tensor, offset: int, start: int, width: int, pitch: int) -> None:
    stochastic_round_reference_(out, x, int(key), offset, Place(start, width, pitch))
