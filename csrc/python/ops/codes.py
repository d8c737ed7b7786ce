# SPDX-License-Identifier: Apache-2.0
"""Moments in 8 bits, in blocks of 256: dynamic codes as in bitsandbytes, and companded ones. Dettmers et al., 2022.
https://arxiv.org/abs/2110.02861"""

import math
from collections.abc import Iterator, Sequence
from functools import cache
from itertools import product
from typing import Literal, NamedTuple, cast

import torch
from torch import Tensor
from torch.nn.functional import pad

from ._compiled import COMPILED, TAKEN
from ._samples import Sample

__all__ = [
    "BLOCK",
    "CODES",
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
CODES = (torch.uint8, torch.int8)  # dynamic, companded
DECADES = 7
_CONTIGUOUS = torch.contiguous_format
HALVES = 1 << 15  # upper halves of float32 numbers of either sign
ONE = 127 << 23  # the bits of 1.0
SMALLEST = torch.finfo(torch.float32).tiny


@cache
def code_values(signed: bool, *, companded: bool = False) -> Tensor:
    r"""The 256 float32 values that codes stand for, ascending, on the CPU: not to be changed.

    Of *dynamic* codes 0..255 (uint8) decade i = 0..6 holds :math:`2^i` values with a sign, :math:`2^{i+1}` without:
    :math:`10^{i-6}` times the middles of as many equal parts of [0.1, 1]. Beside them and, with a sign, their negatives
    there are 0 and 1. So ``code_values(True)`` is for numbers of either sign, and has no -1; ``code_values(False)`` is
    for numbers >= 0, and twice as fine. Equal to ``bitsandbytes.functional.create_dynamic_map(signed)``, to the bit.

    *Companded* codes -128..127 (int8) are linear in a root. A float's bits tell it when the square is replaced by
    straight lines between some of its points, with e an integer and 0 <= f < 1:

    .. math:: \psi(2^e (1+f)) = \begin{cases} 4^e (1 + 2f) & f < 1/2 \\ 4^e \cdot 4f & f \ge 1/2 \end{cases}
        \qquad \tfrac{8}{9} x^2 \le \psi(x) \le x^2.

    The values are :math:`\pm\psi(|c|/128)` with a sign, of which -128 is never used, and without one
    :math:`\psi(\psi((c+129)/256))`. The latter has no 0: a second moment that becomes 0 makes its update far too large.
    """
    if companded:
        levels = torch.arange(-128, 128, dtype=torch.float32, device="cpu")
        return levels.sign() * _square(levels.abs() / 128) if signed else _square(_square((levels + 129) / 256))
    values = [torch.tensor([0.0, 1.0], dtype=torch.float32, device="cpu")]  # whatever the defaults are
    low, high = (torch.tensor(x, dtype=torch.float32, device="cpu").double() for x in (0.1, 1.0))
    for i in range(DECADES):
        parts = 2 ** (i + (not signed))
        # torch.linspace in float32, which rounds once where the processor multiplies and adds at once.
        width, j = ((high.float() - low.float()) / parts).double(), torch.arange(parts + 1, device="cpu")
        edges = torch.where(j < (parts + 1) // 2, low + width * j, high - width * (parts - j)).float()
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
    # Half way between two negative numbers, too, it is the one of smaller magnitude.
    between = torch.where(between < 0, torch.nextafter(between, torch.full_like(between, -math.inf)), between)
    least = torch.arange(-HALVES, HALVES, dtype=torch.int32, device="cpu") << 16  # in magnitude
    ends = torch.bucketize(torch.stack((least, least | 0xFFFF)).view(torch.float32), between)
    lower = ends.amin(0)
    open_ = torch.where(ends[0] == ends[1], math.inf, between[lower.clamp(max=254)])
    return _Tables(*(x.to(device) for x in (values, lower.to(torch.uint8), open_)))


def _square(x: Tensor) -> Tensor:
    """psi, of numbers >= 0."""
    return ((x.view(torch.int32).clamp(min=ONE // 2) - ONE // 2) << 1).view(torch.float32)


def _root(x: Tensor) -> Tensor:
    """Of numbers >= 0 what psi takes them from."""
    return ((x.view(torch.int32) >> 1) + ONE // 2).view(torch.float32)


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
    r"""Rounds ``x`` to 8 bits: with a the largest magnitude in a block, and :math:`v_c` the values of
    :func:`code_values`,

    .. math:: \mathrm{scale} = s = a / \max_c v_c, \qquad \mathrm{code}_i = \text{the } c \text{ whose } v_c
        \text{ is nearest to } x_i / s,

    - *dynamic* (``codes`` uint8): the quotient rounded to float32, and the value of smaller magnitude half way between
      two (in float32, too). :math:`\max_c v_c = 1`.
    - *companded* (``codes`` int8): the product with 1 / s, both rounded to float32; and nearest is the code that is
      nearest in the root, with a sign :math:`128\,\psi^{-1}(|x_i| / s)`, without one
      :math:`256\,\psi^{-1}(\psi^{-1}(|x_i| / s))`, the even number half way between two. :math:`\max_c v_c` is 63/64
      with a sign, else 1. A block of which no magnitude reaches :math:`2^{-126}` counts as one of zeros.

    A block of zeros has the scale 0, and decodes to zeros. One number that is not finite makes the scale so, and leaves
    no number of its block: decoded, all are NaN or infinite. Its codes are unspecified then.

    Blocks are runs of 256 elements, the last of a run may be shorter:

    - ``rows``: x (n0, ...) is seen as (n0, n), dim 0 against the rest, and runs go along n; scale (n0, ceil(n / 256)).
      A vector is one run; scale (ceil(n / 256),). So the blocks of some rows are those of the whole.
    - ``columns``: x (..., r, k), and runs go down r; scale (..., ceil(r / 256), k). So the blocks of some columns are
      those of the whole.

    Args:
        codes: uint8 or int8, overwritten.
        scale: float32, overwritten; of :func:`scale_shape`.
        x: of the shape of ``codes``; other dtypes than float32 are brought to that first.
        signed: which of the two maps; without a sign x must not be negative.
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
    if codes.device.type not in TAKEN:
        encode_reference_(codes, scale, x, signed=signed, layout=layout)
        return
    targets = [y if y.is_contiguous() else torch.empty_like(y, memory_format=_CONTIGUOUS) for y in (codes, scale)]
    torch.ops.slimstate.encode_(*targets, x.float().contiguous(), signed, layout == "columns")
    for y, target in zip((codes, scale), targets, strict=True):
        if target is not y:
            y.copy_(target)


def decode(codes: Tensor, scale: Tensor, *, signed: bool, layout: Layout, dtype: torch.dtype = torch.float32) -> Tensor:
    r"""What :func:`encode_` has kept: :math:`s\, v_c`, the product rounded to float32, and then to ``dtype``.

    Args:
        codes: uint8 (dynamic) or int8 (companded).
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
    if codes.device.type not in TAKEN:
        return decode_reference(codes, scale, signed=signed, layout=layout).to(dtype)
    x = torch.empty(codes.shape, dtype=torch.float32, device=codes.device)
    if x.numel():
        torch.ops.slimstate.decode_(x, codes.contiguous(), scale.contiguous(), signed, layout == "columns")
    return x.to(dtype)


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
    runs = _runs(codes.shape, layout)
    wide, found = x.to(torch.float32).reshape(runs), torch.empty(runs, dtype=codes.dtype, device=x.device)
    scales = wide.new_empty(runs[0], _count(runs[1]), runs[2])
    for blocks, into, own in zip(_blocks(wide), _blocks(found), _scales(scales, runs[1]), strict=True):
        torch.amax(blocks.abs(), 2, keepdim=True, out=own)
        if codes.dtype == torch.uint8:
            into.copy_(_nearest(blocks / torch.where(own == 0, 1, own), signed))
        else:
            own.copy_(torch.where(own < SMALLEST, 0, own / (63 / 64 if signed else 1)))
            into.copy_(_nearest_root(blocks * torch.where(own == 0, 0, 1 / own), signed))
    codes.copy_(found.view(codes.shape))
    scale.copy_(scales.view(scale.shape))


def decode_reference(codes: Tensor, scale: Tensor, *, signed: bool, layout: Layout) -> Tensor:
    """What :func:`decode` computes, in float32, in PyTorch."""
    runs = _runs(codes.shape, layout)
    flat = codes.reshape(-1).to(torch.int32)
    if codes.dtype == torch.uint8:
        wide = _tables(signed, codes.device).values.index_select(0, flat).view(runs)
    else:
        wide = _companded_values(signed, codes.device).index_select(0, flat + 128).view(runs)
    scales = scale.reshape(runs[0], _count(runs[1]), runs[2])
    for blocks, largest in zip(_blocks(wide), _scales(scales, runs[1]), strict=True):
        blocks.mul_(largest)
    return wide.view(codes.shape)


def _nearest(x: Tensor, signed: bool) -> Tensor:
    """The codes of numbers in [-1, 1], as ``torch.bucketize`` finds them in ten times the time; some code of NaN."""
    tables, flat = _tables(signed, x.device), x.reshape(-1)
    half = (flat.view(torch.int32) >> 16).add_(HALVES)
    above = flat > tables.between.index_select(0, half)
    return tables.lower.index_select(0, half).add_(above).view(x.shape)


def _nearest_root(x: Tensor, signed: bool) -> Tensor:
    """Companded codes of numbers in [-1, 1]."""
    root = _root(x.abs())
    if signed:
        return (root * 128).round() * x.sign()
    return (_root(root) * 256).round().clamp(min=1) - 129


@cache
def _companded_values(signed: bool, device: torch.device) -> Tensor:
    return code_values(signed, companded=True).to(device)


def _count(length: int) -> int:
    return -(-length // BLOCK)


def _runs(shape: Sequence[int], layout: Layout) -> tuple[int, int, int]:
    """How a tensor of this shape is seen: (outer, length of a run, inner)."""
    if layout == "columns":
        return math.prod(shape[:-2]), shape[-2], shape[-1]
    return (1, shape[0], 1) if len(shape) == 1 else (shape[0], math.prod(shape[1:]), 1)


def _blocks(x: Tensor) -> list[Tensor]:
    """(outer, length, inner) as (outer, blocks, 256, inner), and the shorter ones that may be left over: views."""
    whole = x.shape[1] // BLOCK * BLOCK
    return [x[:, :whole].unflatten(1, (whole // BLOCK, BLOCK)), x[:, None, whole:]][: 1 + (whole < x.shape[1])][
        not whole :
    ]


def _scales(scales: Tensor, length: int) -> list[Tensor]:
    """(outer, blocks, inner) as what goes with `_blocks`: views."""
    whole = length // BLOCK
    return [scales[:, :whole, None], scales[:, whole:, None]][: 1 + (whole * BLOCK < length)][not whole :]


def _check(codes: Tensor, scale: Tensor, layout: Layout, x: Tensor | None = None) -> None:
    if layout not in ("rows", "columns"):
        raise ValueError(f"layout must be 'rows' or 'columns', got {layout!r}")
    if codes.dtype not in CODES:
        raise TypeError(f"codes must be uint8 or int8, got {codes.dtype}")
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


if COMPILED:

    @torch.library.register_fake("slimstate::encode_")
    def _(codes: Tensor, scale: Tensor, x: Tensor, signed: bool, columns: bool) -> None:
        torch._check(codes.numel() == x.numel())

    @torch.library.register_fake("slimstate::decode_")
    def _(x: Tensor, codes: Tensor, scale: Tensor, signed: bool, columns: bool) -> None:
        torch._check(codes.numel() == x.numel())


def samples(device: str) -> Iterator[Sample]:
    """What the compiled ops are compared with their references by."""
    generator = torch.Generator().manual_seed(0)
    shapes: tuple[tuple[Layout, tuple[int, ...]], ...] = (
        ("rows", (3, 1000)),
        ("rows", (257,)),
        ("rows", (2, 5, 60)),
        ("rows", (4, 1)),
        ("columns", (300, 37)),
        ("columns", (2, 256, 300)),
        ("columns", (1, 5)),
    )
    for dtype, signed in product(CODES, (True, False)):
        # Half way between two values and as near as float32 comes, the first of a block of the largest.
        numbers = _near(_edges(dtype, signed))
        edges = torch.cat((torch.ones(-(-len(numbers) // 255), 1), _filled(numbers, 255)), 1)
        for layout, shape in (*shapes, ("rows", tuple(edges.shape))):
            x = torch.randn(shape, generator=generator) ** 5 if shape != edges.shape else edges
            for factor in (1.0, 1e-35, 1e-42, 0.0) if x is not edges else (1.0,):
                y = (x if signed else x.abs()) * factor
                codes, scale = torch.zeros(shape, dtype=dtype), torch.zeros(scale_shape(shape, layout))
                own = [z.to(device) for z in (codes, scale, y)]
                what = f"{dtype} {'signed' if signed else 'unsigned'} {layout} {tuple(shape)} by {factor}"
                yield Sample("encode_", what, (*own, signed, layout == "columns"), _encode_reference_)
            if x is not edges:
                codes = torch.randint(0, 256, shape, generator=generator, dtype=torch.uint8).view(dtype)
                own = [z.to(device) for z in (torch.zeros(shape), codes, torch.rand(scale.shape, generator=generator))]
                yield Sample("decode_", what, (*own, signed, layout == "columns"), _decode_reference_)

    codes, scale, x = (
        torch.zeros(300, 5, dtype=torch.uint8),
        torch.zeros(2, 5),
        torch.randn(300, 5, generator=generator),
    )
    own = [z.to(device) for z in (codes, scale, x)]
    yield Sample("encode_whole_", "", (*own, True, "columns"), _encode_whole_reference_)
    decoded = (*own[:2], True, "columns", torch.bfloat16)
    yield Sample("decode_whole", "", decoded, _decode_whole_reference)


def _edges(dtype: torch.dtype, signed: bool) -> Tensor:
    """What lies half way between two values, or two roots, of a block whose scale is 1."""
    if dtype == torch.uint8:
        between = _tables(signed, torch.device("cpu")).between
        return between[between.isfinite()]
    levels = torch.arange(-126.5 if signed else 0.5, 127 if signed else 256)
    return levels.sign() * _square(levels.abs() / 128) * 64 / 63 if signed else _square(_square(levels / 256))


def _near(x: Tensor) -> Tensor:
    """Float32 numbers and those around them."""
    return (x.view(torch.int32)[:, None] + torch.arange(-3, 4, dtype=torch.int32)).flatten().view(torch.float32)


def _filled(x: Tensor, width: int) -> Tensor:
    return pad(x, (0, -len(x) % width)).view(-1, width)


def _encode_reference_(codes: Tensor, scale: Tensor, x: Tensor, signed: bool, columns: bool) -> None:
    encode_reference_(codes, scale, x, signed=signed, layout="columns" if columns else "rows")


def _decode_reference_(x: Tensor, codes: Tensor, scale: Tensor, signed: bool, columns: bool) -> None:
    x.copy_(decode_reference(codes, scale, signed=signed, layout="columns" if columns else "rows"))


def _encode_whole_reference_(codes: Tensor, scale: Tensor, x: Tensor, signed: bool, layout: Layout) -> None:
    encode_reference_(codes, scale, x, signed=signed, layout=layout)


def _decode_whole_reference(codes: Tensor, scale: Tensor, signed: bool, layout: Layout, dtype: torch.dtype) -> Tensor:
    return decode_reference(codes, scale, signed=signed, layout=layout).to(dtype)
