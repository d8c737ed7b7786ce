# SPDX-License-Identifier: Apache-2.0
"""Moments in 8 bits: dynamic codes in blocks of 256, as in bitsandbytes. Dettmers et al., 2022.
https://arxiv.org/abs/2110.02861"""

import math
from collections.abc import Sequence
from functools import cache
from typing import Literal, NamedTuple, cast

import torch
from torch import Tensor
from torch.nn.functional import pad

__all__ = [
    "BLOCK",
    "Layout",
    "code_values",
    "decode",
    "decode_reference",
    "encode_",
    "encode_reference_",
    "scale_shape",
]

Layout = Literal["rows", "columns"]

BLOCK = 256  # elements that share a scale
DECADES = 7
HALVES = 1 << 15  # upper halves of float32 numbers of either sign


@cache
def code_values(signed: bool) -> Tensor:
    r"""The 256 float32 values that codes stand for, ascending, on the CPU: not to be changed.

    Decade i = 0..6 holds :math:`2^i` values with a sign, :math:`2^{i+1}` without: :math:`10^{i-6}` times the middles
    of as many equal parts of [0.1, 1]. Beside them and, with a sign, their negatives there are 0 and 1. So
    ``code_values(True)`` is for numbers of either sign, and has no -1; ``code_values(False)`` is for numbers >= 0, and
    twice as fine. Equal to ``bitsandbytes.functional.create_dynamic_map(signed)``, to the bit.
    """
    values = [torch.tensor([0.0, 1.0])]
    for i in range(DECADES):
        edges = torch.linspace(0.1, 1, 2 ** (i + (not signed)) + 1, dtype=torch.float32)
        middles = (edges[1:] + edges[:-1]) / 2 * 10 ** (i - DECADES + 1)
        values += [middles, -middles] if signed else [middles]
    return torch.cat(values).sort().values


class _Tables(NamedTuple):
    """How codes are read and found.

    The upper half of a float32 number's bits tells its code but for one question: within what they leave open lies at
    most one of the numbers half way between two values.
    """

    values: Tensor
    lower: Tensor  # of each upper half: the lower code
    between: Tensor  # and above what number it is the next one


@cache
def _tables(signed: bool, device: torch.device) -> _Tables:
    values = code_values(signed)
    between = (values[1:] + values[:-1]) / 2
    least = torch.arange(-HALVES, HALVES, dtype=torch.int32) << 16  # in magnitude
    ends = torch.bucketize(torch.stack((least, least | 0xFFFF)).view(torch.float32), between)
    lower = ends.amin(0)
    open_ = torch.where(ends[0] == ends[1], math.inf, between[lower.clamp(max=254)])
    return _Tables(*(x.to(device) for x in (values, lower.to(torch.uint8), open_)))


def scale_shape(shape: Sequence[int], layout: Layout) -> tuple[int, ...]:
    """The shape of the scales of a tensor of this shape (one dimension or more; ``columns``: two or more)."""
    if len(shape) < (1 if layout == "rows" else 2):
        raise ValueError(f"layout {layout!r} takes more dimensions than shape {tuple(shape)} has")
    if layout == "columns":
        return (*shape[:-2], _count(shape[-2]), shape[-1])
    if len(shape) == 1:
        return (_count(shape[0]),)
    return (shape[0], _count(math.prod(shape[1:])))


def encode_(codes: Tensor, scale: Tensor, x: Tensor, *, signed: bool, layout: Layout) -> None:
    r"""Rounds ``x`` to 8 bits: with s the largest magnitude in a block, and :math:`v_0 < \dots < v_{255}` the values of
    :func:`code_values`,

    .. math:: \mathrm{scale} = s, \qquad \mathrm{code}_i = \text{the } c \text{ whose } v_c \text{ is nearest to }
        x_i / s,

    the quotient rounded to float32 and the smaller c at half way between two (in float32, too). A block of zeros has
    the scale 0 and the codes of the value 0. One number that is not finite makes the scale so, and leaves no number of
    its block: decoded, all are NaN or infinite. Its codes are unspecified then.

    Blocks are runs of 256 elements, the last of a run may be shorter:

    - ``rows``: x (n0, ...) is seen as (n0, n), dim 0 against the rest, and runs go along n; scale (n0, ceil(n / 256)).
      A vector is one run; scale (ceil(n / 256),). So the blocks of some rows are those of the whole.
    - ``columns``: x (..., r, k), and runs go down r; scale (..., ceil(r / 256), k). So the blocks of some columns are
      those of the whole.

    Args:
        codes: uint8, overwritten.
        scale: float32, overwritten; of :func:`scale_shape`.
        x: of the shape of ``codes``; other dtypes than float32 are brought to that first.
        signed: which of the two maps.
        layout: ``rows`` or ``columns``.

    Raises:
        TypeError: a dtype is not one of the above.
        ValueError: shapes or devices do not belong together, or the layout is none of these.
    """
    _check(codes, scale, layout, x)
    if torch.compiler.is_compiling():
        torch.ops.slimstate.encode_whole_(codes, scale, x, signed, layout)
        return
    if not codes.numel():
        scale.zero_()
        return
    encode_reference_(codes, scale, x, signed=signed, layout=layout)


def decode(codes: Tensor, scale: Tensor, *, signed: bool, layout: Layout, dtype: torch.dtype = torch.float32) -> Tensor:
    r"""What :func:`encode_` has kept: :math:`s\, v_c`, the product rounded to float32, and then to ``dtype``.

    Args:
        codes: uint8.
        scale: float32; of :func:`scale_shape`.
        signed: which of the two maps.
        layout: ``rows`` or ``columns``.
        dtype: of the result. Default float32.

    Returns:
        A new contiguous tensor of the shape of ``codes``.

    Raises:
        TypeError: a dtype is not one of the above.
        ValueError: shapes or devices do not belong together, or the layout is none of these.
    """
    _check(codes, scale, layout)
    if torch.compiler.is_compiling():
        return torch.ops.slimstate.decode_whole(codes, scale, signed, layout, dtype)
    return decode_reference(codes, scale, signed=signed, layout=layout).to(dtype)


# One node of a compiled graph each: tables are made once, which a trace would do in every step.


@torch.library.custom_op("slimstate::encode_whole_", mutates_args=("codes", "scale"))
def _(codes: Tensor, scale: Tensor, x: Tensor, signed: bool, layout: str) -> None:
    encode_(codes, scale, x, signed=signed, layout=cast(Layout, layout))


@torch.library.custom_op("slimstate::decode_whole", mutates_args=())
def _decode_whole(codes: Tensor, scale: Tensor, signed: bool, layout: str, dtype: torch.dtype) -> Tensor:
    return decode(codes, scale, signed=signed, layout=cast(Layout, layout), dtype=dtype)


@_decode_whole.register_fake
def _(codes: Tensor, scale: Tensor, signed: bool, layout: str, dtype: torch.dtype) -> Tensor:
    return codes.new_empty(codes.shape, dtype=dtype)


def encode_reference_(codes: Tensor, scale: Tensor, x: Tensor, *, signed: bool, layout: Layout) -> None:
    """What :func:`encode_` computes, in PyTorch."""
    outer, length, inner = _runs(codes.shape, layout)
    blocks = _in_blocks(x.to(torch.float32).reshape(outer, length, inner))
    largest = blocks.abs().amax(2, keepdim=True)
    scale.copy_(largest.view(scale.shape))
    found = _nearest(blocks / torch.where(largest == 0, 1, largest), signed)
    codes.copy_(found.flatten(1, 2)[:, :length].reshape(codes.shape))


def decode_reference(codes: Tensor, scale: Tensor, *, signed: bool, layout: Layout) -> Tensor:
    """What :func:`decode` computes, in float32, in PyTorch."""
    outer, length, inner = _runs(codes.shape, layout)
    if not codes.numel():
        return torch.empty(codes.shape, device=codes.device)
    values = _tables(signed, codes.device).values
    wide = values.index_select(0, codes.reshape(-1).to(torch.int32))
    blocks = _in_blocks(wide.view(outer, length, inner))
    wide = blocks.mul_(scale.reshape(outer, -1, 1, inner)).flatten(1, 2)[:, :length]
    return wide.reshape(codes.shape).contiguous()


def _nearest(x: Tensor, signed: bool) -> Tensor:
    """The codes of numbers in [-1, 1], as ``torch.bucketize`` finds them in ten times the time; some code of NaN."""
    tables, flat = _tables(signed, x.device), x.reshape(-1)
    half = (flat.view(torch.int32) >> 16).add_(HALVES)
    above = flat > tables.between.index_select(0, half)
    return tables.lower.index_select(0, half).add_(above).view(x.shape)


def _count(length: int) -> int:
    return -(-length // BLOCK)


def _runs(shape: Sequence[int], layout: Layout) -> tuple[int, int, int]:
    """How a tensor of this shape is seen: (outer, length of a run, inner)."""
    if layout == "columns":
        return math.prod(shape[:-2]), shape[-2], shape[-1]
    return (1, shape[0], 1) if len(shape) == 1 else (shape[0], math.prod(shape[1:]), 1)


def _in_blocks(x: Tensor) -> Tensor:
    """(outer, length, inner) as (outer, blocks, 256, inner), filled up with zeros."""
    if rest := -x.shape[1] % BLOCK:
        x = pad(x, (0, 0, 0, rest))
    return x.reshape(x.shape[0], -1, BLOCK, x.shape[2])


def _check(codes: Tensor, scale: Tensor, layout: Layout, x: Tensor | None = None) -> None:
    if layout not in ("rows", "columns"):
        raise ValueError(f"layout must be 'rows' or 'columns', got {layout!r}")
    if codes.dtype != torch.uint8:
        raise TypeError(f"codes must be uint8, got {codes.dtype}")
    if scale.dtype != torch.float32:
        raise TypeError(f"scale must be float32, got {scale.dtype}")
    if tuple(scale.shape) != (shape := scale_shape(codes.shape, layout)):
        raise ValueError(f"scale must have shape {shape} for codes of {tuple(codes.shape)}, got {tuple(scale.shape)}")
    if x is not None and not x.is_floating_point():
        raise TypeError(f"x must be floating point, got {x.dtype}")
    if x is not None and x.shape != codes.shape:
        raise ValueError(f"codes and x must have one shape, got {tuple(codes.shape)} and {tuple(x.shape)}")
    for name, y in (("scale", scale), ("x", x)):
        if y is not None and y.device != codes.device:
            raise ValueError(f"codes and {name} must be on one device, got {codes.device} and {y.device}")
