# SPDX-License-Identifier: Apache-2.0
"""The split step: a rule with state on some rows, columns or entries of a matrix, one without on the others."""

import itertools
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
from torch import Tensor

from ._compiled import COMPILED, TAKEN
from ._samples import Sample
from .directions import adam_direction_reference_, corrections
from .keys import WHOLE, Key, PartKey, Place, counter_key
from .weights import LOW_PRECISION, NEAREST, Rounding, narrow_, widen

__all__ = ["OUTER", "Split", "SplitRule", "split_", "takes_split"]

OUTER = ("sign", "sgd", "none")
_MOMENTS = (torch.float32, torch.bfloat16)
_WEIGHTS = (torch.float32, *LOW_PRECISION)


class Split(NamedTuple):
    """A matrix, or a stack of them, in a split step. All of its memory is contiguous.

    Args:
        p: the weight W, float32, bfloat16 or float16.
        grad: its gradient, of W's dtype.
        shape: W as (matrices, rows, columns).
        chosen: which rows, or columns, are kept of each matrix: int32, sorted, as many of each. Entries are the columns
            of matrices of one row.
        first: M of what is kept, in float32 or bfloat16: of rows (matrices, kept, columns), of columns their
            transpose (matrices, kept, rows). Without `second` the direction U, in float32.
        second: V of it.
        age: the number of gradients in the moments, this one included.
        rounding: how a weight of low precision is rounded.
        keys: of the random bits of moments in bfloat16.
    """

    p: Tensor
    grad: Tensor
    shape: tuple[int, int, int]
    chosen: Tensor
    first: Tensor
    second: Tensor | None = None
    age: float = 1
    rounding: Rounding = NEAREST
    keys: tuple[Key, Key] | None = None


@dataclass(frozen=True, kw_only=True)
class SplitRule:
    r"""What a split step does; see :func:`split_`.

    Args:
        columns: whether columns are kept; else rows.
        outer: `sign`, `sgd` (the identity) or `none`, elsewhere.
        decay: factor of the weight, everywhere.
        step: factor of the direction U.
        outside: factor of outer(G).
        betas, eps, maximize: of Adam, for those that bring moments.
    """

    columns: bool
    outer: str
    decay: float
    step: float
    outside: float
    betas: tuple[float, float] = (0.0, 0.0)
    eps: float = 0.0
    maximize: bool = False


def takes_split(x: Split) -> bool:
    """Whether :func:`split_` takes it: whether the op is compiled for it, and its memory contiguous."""
    p, low = x.p, x.rounding.low
    return (
        p.device.type in TAKEN
        and p.dtype in _WEIGHTS
        and x.grad.dtype == p.dtype
        and p.is_contiguous()
        and x.grad.is_contiguous()
        and x.first.is_contiguous()
        and (x.second is None or (x.first.dtype in _MOMENTS and x.second.is_contiguous()))
        and (low is None or low.is_contiguous())
        and (not isinstance(x.rounding.key, PartKey) or _evenly_spaced(x.rounding.key.place, x.shape[2]))
        and (x.keys is None or not isinstance(x.keys[0], PartKey) or _evenly_spaced(x.keys[0].place, x.shape[1]))
    )


def _evenly_spaced(place: Place, length: int) -> bool:
    """Whether the rows of a part begin where those of this length do, or several make up one of these."""
    return length == 0 or place.width % length == 0 or length % place.width == 0 or place == WHOLE


def split_(xs: Sequence[Split], rule: SplitRule) -> None:
    r"""The split step of a list of matrices, in one pass over weights and gradients: with Q the unit vectors of what is
    kept and :math:`R = Q^\top G`,

    .. math::
        M \leftarrow \beta_1 M + (1-\beta_1) R, \quad V \leftarrow \beta_2 V + (1-\beta_2) R^2, \quad
        U = -\frac{M / (1-\beta_1^t)}{\sqrt{V / (1-\beta_2^t)} + \epsilon}, \\
        W \leftarrow a W + s\, Q U - c\, \text{outer}(G - Q R),

    a, s and c being `decay`, `step` and `outside`. Those without V bring U. Random bits of rounding go by an element's
    own place in the weight, and in the moments.

    Args:
        xs: the matrices, such as :func:`takes_split` says.
        rule: what is done.

    Raises:
        ValueError: for an outer rule that is unknown.
        RuntimeError: for what the compiled op does not take.
    """
    if rule.outer not in OUTER:
        raise ValueError(f"outer must be one of {', '.join(OUTER)}, got {rule.outer!r}")
    lists: dict[tuple[Any, ...], list[Split]] = {}
    for x in xs:
        kind = (x.p.device, x.p.dtype, x.first.dtype, x.second is None, *_rounded(x))
        lists.setdefault(kind, []).append(x)
    for (device, *_), some in lists.items():
        if device.type in TAKEN:
            _split_(some, rule)
        else:
            for x in some:
                _one_reference_(x, rule)


def _split_(xs: list[Split], rule: SplitRule) -> None:
    """The compiled op, on matrices of one kind."""
    random, compensated = _rounded(xs[0])
    adam = xs[0].second is not None
    moment_keys = [x.keys for x in xs if x.keys is not None] if adam and xs[0].first.dtype == torch.bfloat16 else []
    ps = [x.p for x in xs]
    torch.ops.slimstate.split_(
        ps,
        [x.grad for x in xs],
        [x.chosen for x in xs],
        [x.first for x in xs],
        [x.second for x in xs] if adam else [],
        [x.rounding.low for x in xs] if compensated else [],
        [n for x in xs for n in x.shape],
        corrections([x.age for x in xs], *rule.betas, rule.maximize) if adam else [],
        [_word(x.rounding.key) for x in xs] if random else [],
        [n for x in xs for n in _place(x.rounding.key)] if random else [],
        [_word(key) for keys in moment_keys for key in keys],
        [n for keys in moment_keys for n in _place(keys[0])],
        rule.columns,
        OUTER.index(rule.outer),
        rule.decay,
        rule.step,
        rule.outside,
        *rule.betas,
        rule.eps,
    )
    torch.autograd.graph.increment_version(ps)  # so that a backward that saved one raises


def _rounded(x: Split) -> tuple[bool, bool]:
    """Whether its weight is rounded at random, and whether what rounding takes away is kept."""
    low = x.p.dtype in LOW_PRECISION
    compensated = low and x.rounding.low is not None
    return low and not compensated and x.rounding.key is not None, compensated


def _word(key: Key | None) -> int:
    word = key.word if isinstance(key, PartKey) else key
    assert isinstance(word, int)
    return word


def _place(key: Key | None) -> Place:
    return key.place if isinstance(key, PartKey) else WHOLE


def _one_reference_(x: Split, rule: SplitRule) -> None:
    """The op on one matrix or stack in PyTorch, by whole matrices."""
    bias = corrections([x.age], *rule.betas, rule.maximize) if x.second is not None else []
    _reference_(x, rule, bias)


def _reference_(x: Split, rule: SplitRule, bias: Sequence[float]) -> None:
    members, rows, columns = x.shape
    if not x.p.numel():
        return
    dim, wide = int(rule.columns), torch.float64 if x.p.dtype == torch.float64 else torch.float32
    w, g = x.p.view(x.shape), x.grad.view(x.shape)
    index = x.chosen.view(members, x.chosen.numel() // members).long()
    u = x.first.view(members, index.shape[1], rows if rule.columns else columns)
    if x.second is not None:
        r = torch.stack([g[j].index_select(dim, index[j]) for j in range(members)]).to(wide)
        r = (r.mT if rule.columns else r).contiguous()
        adam_direction_reference_(r, u, x.second.view(r.shape), bias, rule.betas, rule.eps, x.keys)
        u = r
    for j in range(members):
        low = None if x.rounding.low is None else x.rounding.low.view(x.shape)[j]
        old, gradient = widen(w[j], low, wide), g[j].to(wide)
        kept = old.index_select(dim, index[j]).mul_(rule.decay).add_((u[j].mT if rule.columns else u[j]) * rule.step)
        old.mul_(rule.decay)
        if rule.outer != "none":
            old.sub_((gradient.sign() if rule.outer == "sign" else gradient) * rule.outside)
        old.index_copy_(dim, index[j], kept)
        narrow_(w[j], old, x.rounding._replace(low=low), j * rows * columns)


if COMPILED:

    @torch.library.register_fake("slimstate::split_")
    def _(ps: list[Tensor], grads: list[Tensor], indices: list[Tensor], exp_avgs: list[Tensor], *_: object) -> None:
        torch._check(len(ps) == len(grads) == len(indices) == len(exp_avgs))


def _reference(
    ps: list[Tensor],
    grads: list[Tensor],
    indices: list[Tensor],
    exp_avgs: list[Tensor],
    exp_avg_sqs: list[Tensor],
    lows: list[Tensor],
    shapes: list[int],
    biases: list[float],
    words: list[int],
    places: list[int],
    moment_words: list[int],
    moment_places: list[int],
    columns: bool,
    outer: int,
    decay: float,
    step: float,
    outside: float,
    beta1: float,
    beta2: float,
    eps: float,
) -> None:
    rule = SplitRule(
        columns=columns,
        outer=OUTER[outer],
        decay=decay,
        step=step,
        outside=outside,
        betas=(beta1, beta2),
        eps=eps,
    )

    def key(words: list[int], places: list[int], i: int, j: int) -> PartKey:
        return PartKey(words[j], Place(*places[3 * i : 3 * i + 3]))

    for i, p in enumerate(ps):
        x = Split(
            p,
            grads[i],
            (shapes[3 * i], shapes[3 * i + 1], shapes[3 * i + 2]),
            indices[i],
            exp_avgs[i],
            exp_avg_sqs[i] if exp_avg_sqs else None,
            rounding=Rounding(key(words, places, i, i) if words else None, lows[i] if lows else None),
            keys=(
                (key(moment_words, moment_places, i, 2 * i), key(moment_words, moment_places, i, 2 * i + 1))
                if moment_words
                else None
            ),
        )
        _reference_(x, rule, biases[2 * i : 2 * i + 2])


# Weights, how they are rounded, and moments (None: the direction is given).
_KINDS: tuple[tuple[torch.dtype, str, torch.dtype | None], ...] = (
    (torch.float32, "", torch.float32),
    (torch.float32, "", None),
    (torch.bfloat16, "to nearest", torch.float32),
    (torch.bfloat16, "stochastic", torch.bfloat16),
    (torch.bfloat16, "compensated", torch.bfloat16),
    (torch.float16, "to nearest", torch.bfloat16),
    (torch.float16, "stochastic", torch.float32),
    (torch.float16, "compensated", None),
)
# Kept (columns, or else rows), the matrices, and how many are kept.
_SHAPES = (
    ("rows", False, [((1, 37, 129), 9), ((3, 7, 5), 2), ((1, 4, 0), 2)]),
    ("columns", True, [((1, 70, 33), 9), ((2, 50, 7), 3), ((1, 3, 1100), 275), ((1, 1, 1), 1)]),
    ("entries", True, [((1, 1, 9001), 2000), ((2, 1, 35), 9)]),
    ("nothing", False, [((1, 37, 129), 0), ((3, 7, 5), 0)]),
)


def samples(device: str) -> Iterator[Sample]:
    """What the compiled op is compared with its reference by."""
    generator = torch.Generator().manual_seed(0)
    for (number, (what, columns, matrices)), (turn, kind) in itertools.product(enumerate(_SHAPES), enumerate(_KINDS)):
        dtype, how, moments = kind
        for outer in OUTER if turn + number == 0 else (OUTER[(number + turn) % 3],):
            ps, grads, indices, firsts, seconds, lows = ([] for _ in range(6))
            for (members, rows, width), kept in matrices:
                shape, other = (members, rows, width), rows if columns else width
                ps.append(torch.randn(shape, generator=generator).to(device, dtype))
                g = torch.randn(shape, generator=generator)
                grads.append(g.masked_fill_(g.abs() < 0.1, 0).to(device, dtype))
                drawn = [
                    torch.randperm(width if columns else rows, generator=generator)[:kept].sort().values
                    for _ in range(members)
                ]
                indices.append(torch.stack(drawn).to(device, torch.int32))
                inside = (members, kept, other)
                firsts.append((torch.randn(inside, generator=generator) * 0.1).to(device, moments or torch.float32))
                if moments is not None:
                    seconds.append(torch.rand(inside, generator=generator).to(device, moments))
                if how == "compensated":
                    rest = torch.randint(-(2**15), 2**15, shape, generator=generator)
                    lows.append(rest.to(device, torch.int16))
            count, random, coarse = len(ps), how == "stochastic", moments == torch.bfloat16
            arguments = (
                *(ps, grads, indices, firsts, seconds, lows),
                [n for shape, _ in matrices for n in shape],
                corrections([float(1 + i) for i in range(count)], 0.9, 0.999, False) if moments else [],
                [counter_key(0, i) for i in range(count)] if random else [],
                [n for i, (s, _) in enumerate(matrices) for n in (3, max(1, s[2]) * (1 + i), 5000)] if random else [],
                [counter_key(1, i) for i in range(2 * count)] if coarse else [],
                [n for i, (s, _) in enumerate(matrices) for n in (i, s[1] * (1 + i), 5000)] if coarse else [],
                *(columns, OUTER.index(outer), 0.99, 0.01, 0.02, 0.9, 0.999, 1e-8),
            )
            rounded = f"{dtype} {how}".strip()
            yield Sample("split_", f"{what}, {outer}, {rounded}, moments {moments}", arguments, _reference)
