"""How moments are kept: in float32, in less, or as 8-bit codes with scales; read wide, and stored again."""

import math
from typing import TYPE_CHECKING, Any, NamedTuple

import torch
from torch import Tensor

from slimstate.ops import Key, decode, encode_
from slimstate.ops.codes import Layout, scale_shape
from slimstate.projections._base import compute_dtype
from slimstate.projections._rounding import Rounding, narrow_

if TYPE_CHECKING:
    from ._base import Entry, Spec, State

__all__ = [
    "CODED",
    "EXP_AVG",
    "EXP_AVG_SQ",
    "MOMENTS",
    "MOMENT_DTYPES",
    "SCALES",
    "WEIGHT",
    "Moment",
    "as_found",
    "decoded",
    "encoded",
    "holds_codes",
    "is_coded",
    "moment_of",
    "moment_spec",
    "store_",
]

# Purposes of random bits: what is rounded. `_projected` goes on from here; `_base` counts them.
WEIGHT, EXP_AVG, EXP_AVG_SQ = range(3)

CODED = {"8bit": torch.uint8, "8bit-companded": torch.int8}  # what holds the codes tells their format
MOMENT_DTYPES = ("float32", "bfloat16", "param", *CODED)

# What may be codes: purpose of random bits, and whether it has a sign.
MOMENTS = {"exp_avg": (EXP_AVG, True), "exp_avg_sq": (EXP_AVG_SQ, False), "momentum_buffer": (EXP_AVG, True)}
SCALES = {f"{key}_scale": key for key in MOMENTS}

SMALLEST_CODED = 4096  # elements; bitsandbytes' min_8bit_size
SHORTEST_CODED = 4  # elements of a run
VOCABULARY, PER_WIDTH = 16384, 5  # what an embedding has at least: rows, and rows for each column


def holds_codes(shape: tuple[int, ...], layout: Layout) -> bool:
    r"""Whether 8-bit moments of this shape are codes; float32 (float64 for float64) otherwise.

    The shape is the whole moment's, however processes divide it: so all of them keep the same, and what one number of
    processes saved is what another loads. Not kept as codes are

    - fewer than 4096 elements (of the moment: r x k where it is projected), as in bitsandbytes: norms, biases, small
      layers; they save nothing that shows, and their steps matter;
    - embeddings and heads: not projected, two dimensions, 16384 rows or more and five times as many rows as columns
      (LLaMA's 32000 x 4096). Rows of rare tokens have gradients in few steps and far smaller second moments than
      their neighbours; Dettmers et al. keep them in 32 bits;
    - runs of fewer than 4 elements, of which each would pay for a scale of 4 bytes, as in vectors, which are one
      element in each row: blocks never go from one row to the next, so that processes can divide rows anywhere.
    """
    if math.prod(shape) < SMALLEST_CODED:
        return False
    if layout == "columns":
        return shape[-2] >= SHORTEST_CODED
    embedding = len(shape) == 2 and shape[0] >= max(VOCABULARY, PER_WIDTH * shape[1])
    return math.prod(shape[1:]) >= SHORTEST_CODED and not embedding


def moment_spec(
    key: str, p: Tensor, group: dict[str, Any], shape: tuple[int, ...], layout: Layout
) -> dict[str, tuple[tuple[int, ...], torch.dtype]]:
    """What is kept of one moment of this shape: by default float32, and float64 for float64 parameters."""
    name = group["moment_dtype"]
    if name in CODED and holds_codes(shape, layout):
        return {key: (shape, CODED[name]), f"{key}_scale": (scale_shape(shape, layout), torch.float32)}
    if name is None or name in CODED:
        return {key: (shape, compute_dtype(p.dtype))}
    return {key: (shape, p.dtype if name == "param" else getattr(torch, name))}


def as_found(spec: "Spec", state: "State", layout: Layout) -> "Spec":
    """A state's spec with its moments in the form, numbers or codes, in which they are in a given state."""
    found = {key: entry for key, entry in spec.items() if key not in SCALES}
    for scale, key in SCALES.items():
        if key not in spec:
            continue
        shape, given = spec[key][0], state.get(key)
        if scale in state and len(shape) > (layout == "columns"):
            companded = isinstance(given, Tensor) and given.dtype == torch.int8
            dtype = torch.int8 if companded else torch.uint8
            found |= {key: (shape, dtype), scale: (scale_shape(shape, layout), torch.float32)}
        elif scale in spec and isinstance(given, Tensor) and given.is_floating_point():
            found[key] = (shape, torch.float32)
        elif scale in spec:
            found[scale] = spec[scale]
    return found


def encoded(x: Tensor, key: str, layout: Layout, dtype: torch.dtype) -> dict[str, Tensor]:
    """A moment of this name as codes, of the format that this dtype holds, and scales."""
    codes = torch.empty(x.shape, dtype=dtype, device=x.device)
    scale = torch.empty(scale_shape(x.shape, layout), dtype=torch.float32, device=x.device)
    encode_(codes, scale, x, signed=MOMENTS[key][1], layout=layout)
    return {key: codes, f"{key}_scale": scale}


def decoded(codes: Tensor, scale: Tensor, key: str, layout: Layout, dtype: torch.dtype) -> Tensor:
    """The numbers of a moment of this name."""
    return decode(codes, scale, signed=MOMENTS[key][1], layout=layout, dtype=dtype)


class Moment(NamedTuple):
    """A moment, or some rows of one, or that of one matrix of a stack.

    Args:
        x: whose it is.
        name: its key in the state.
        purpose: of the random bits that it is rounded with.
        kept: the numbers, or their codes.
        scale: the scales of codes; else None.
        first: index of the first element within all of it, for the random bits.
    """

    x: "Entry"
    name: str
    purpose: int
    kept: Tensor
    scale: Tensor | None = None
    first: int = 0

    def read(self, dtype: torch.dtype, *, copy: bool = False) -> Tensor:
        """Its numbers in the dtype of arithmetic: its own memory where it is that and no copy is asked for."""
        if self.scale is None:
            return self.kept.to(dtype, copy=copy)
        return decoded(self.kept, self.scale, self.name, self.x.layout, dtype)

    def write_(self, value: Tensor, *, copied: bool = False) -> None:
        """Stores what `read` has returned, changed; `copied` says that this was no memory of its own."""
        if self.scale is not None:
            encode_(self.kept, self.scale, value, signed=MOMENTS[self.name][1], layout=self.x.layout)
        elif copied or self.kept.dtype != value.dtype:
            store_(self.kept, value, self.x.key(self.purpose), self.first)

    def rows(self, s: slice) -> "Moment":
        """Of what is not projected, these indices of dim 0."""
        kept = torch.atleast_1d(self.kept)
        first = self.first + s.start * (kept.numel() // max(1, len(kept)))
        return self._replace(kept=kept[s], scale=None if self.scale is None else self.scale[s], first=first)

    def columns(self, s: slice) -> "Moment":
        """Of codes of what is projected, these indices of the last axis."""
        assert self.scale is not None
        return self._replace(kept=self.kept[..., s], scale=self.scale[..., s])

    def member(self, j: int) -> "Moment":
        """What belongs to matrix j of the stack, of which it is all where there is none."""
        if self.kept.ndim < 3:
            return self
        kept = self.kept[j]
        return self._replace(
            kept=kept, scale=None if self.scale is None else self.scale[j], first=self.first + j * kept.numel()
        )


def moment_of(x: "Entry", name: str, purpose: int | None = None) -> Moment:
    """The moment of a parameter in a step; one that is never rounded may have any name."""
    if purpose is None:
        purpose = MOMENTS[name][0] if name in MOMENTS else EXP_AVG
    return Moment(x, name, purpose, x.state[name], x.state.get(f"{name}_scale"))


def is_coded(moments: list[Moment]) -> bool:
    """Whether these are codes: all moments of a parameter are, or none."""
    return moments[0].scale is not None


def store_(target: Tensor, value: Tensor, key: Key, offset: int = 0) -> None:
    """A moment <- value; rounded stochastically where precision is lost.

    A second moment in bfloat16 needs it: with beta2 = 0.999 a step changes it by less than half a unit in the last
    place.
    """
    narrow_(target, value, Rounding(key), offset)
