# SPDX-License-Identifier: Apache-2.0
"""AdamW on dense parameters, whatever they and their moments are kept in."""

import math
from collections.abc import Iterator, Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from ._compiled import COMPILED, TAKEN
from ._samples import Sample
from .codes import CODES, decode_reference, encode_reference_, scale_shape
from .keys import WHOLE, Key, PartKey, Place, counter_key
from .weights import LOW_PRECISION, NEAREST, Rounding, narrow_, widen

__all__ = ["Dense", "adamw_reference_", "adamw_step_", "takes_adamw"]

_NUMBERS = (torch.float32, *LOW_PRECISION)


class Dense(NamedTuple):
    """A dense parameter in a step.

    Args:
        p: W.
        grad: G, of W's shape.
        exp_avg: M, of W's shape; as codes (uint8, int8) in the layout ``rows`` of :func:`slimstate.ops.encode_`.
        exp_avg_sq: V, likewise.
        age: t, the number of gradients in the moments, this one included. A number, or a 0-d CPU tensor.
        scales: of codes, those of M and V; else None.
        rounding: how W stands for a float32 number, if it is bfloat16 or float16.
        keys: of the random bits by which M and V are rounded, if they are bfloat16 or float16.
    """

    p: Tensor
    grad: Tensor
    exp_avg: Tensor
    exp_avg_sq: Tensor
    age: float | Tensor
    scales: tuple[Tensor, Tensor] | None = None
    rounding: Rounding = NEAREST
    keys: tuple[Key, Key] | None = None


def takes_adamw(x: Dense) -> bool:
    """Whether :func:`adamw_step_` is one compiled pass for these: contiguous memory; W, M and V in float32, bfloat16 or
    float16, M and V also as codes, G in W's dtype or float32."""
    p, m, v = x.p, x.exp_avg, x.exp_avg_sq
    if (
        p.dtype not in _NUMBERS
        or x.grad.dtype not in (p.dtype, torch.float32)
        or m.dtype != v.dtype
        or m.dtype not in (_NUMBERS if x.scales is None else CODES)
        or (x.scales is not None and not p.ndim)
    ):
        return False
    device = p.device
    if device.type not in TAKEN:
        return False
    others = (x.grad, m, v, *(x.scales or ()), *(() if x.rounding.low is None else (x.rounding.low,)))
    for y in others:  # a generator would take longer than all the rest
        if not y.is_contiguous() or y.device != device:
            return False
    return p.is_contiguous()


def adamw_step_(
    xs: Sequence[Dense],
    *,
    lr: float | Tensor,
    betas: tuple[float, float] | tuple[Tensor, Tensor],
    eps: float,
    weight_decay: float,
    maximize: bool = False,
) -> None:
    r"""A step of AdamW on parameters that :func:`takes_adamw` takes, in one pass over their memory:

    .. math::
        M \leftarrow \beta_1 M + (1-\beta_1) G, \quad V \leftarrow \beta_2 V + (1-\beta_2) G^2, \quad
        W \leftarrow (1-\eta\lambda) W - \eta \frac{M / (1-\beta_1^t)}{\sqrt{V / (1-\beta_2^t)} + \epsilon},

    in float32. M and V in bfloat16 and float16 are rounded stochastically, W as its ``rounding`` says, M and V as codes
    to the nearest. lr, betas and ages may be 0-d CPU tensors, all of them, so that compiled code does not depend on
    their values.

    Args:
        xs: the parameters.
        lr: :math:`\eta`.
        betas: :math:`\beta_1, \beta_2` in [0, 1).
        eps: :math:`\epsilon`.
        weight_decay: :math:`\lambda`.
        maximize: takes -G for G.

    Raises:
        RuntimeError: dtypes, shapes or devices do not belong together.
    """
    kinds: dict[tuple[object, ...], list[Dense]] = {}
    for x in xs:
        low = x.p.dtype in LOW_PRECISION
        how = (x.rounding.low is not None, x.rounding.key is not None) if low else ()
        kinds.setdefault((x.p.device, x.p.dtype, x.grad.dtype, x.exp_avg.dtype, how), []).append(x)
    for some in kinds.values():
        arguments = _tensors(some)
        words, places = _keys(some)
        stochastic = _is_stochastic(some[0])
        if isinstance(lr, Tensor):
            ages = [x.age for x in some]
            tensors = [word if isinstance(word, Tensor) else torch.tensor(word) for word in words]
            op = torch.ops.slimstate.adamw_step_keyed_
            op(*arguments, ages, tensors, places, stochastic, lr, *betas, eps, weight_decay, maximize)
        else:
            biases = _corrections([float(x.age) for x in some], *betas)
            settings = (stochastic, 1 - lr * weight_decay, lr, *betas, eps, maximize)
            torch.ops.slimstate.adamw_step_(*arguments, biases, words, places, *settings)
            torch.autograd.graph.increment_version(arguments[0])  # so that a backward that saved one raises


def _tensors(xs: list[Dense]) -> tuple[list[Tensor], ...]:
    """The lists of tensors that the op takes first."""
    compensated = xs[0].p.dtype in LOW_PRECISION and xs[0].rounding.low is not None
    return (
        [x.p for x in xs],
        [x.grad for x in xs],
        [x.exp_avg for x in xs],
        [x.exp_avg_sq for x in xs],
        [scale for x in xs for scale in x.scales or ()],
        [x.rounding.low for x in xs if x.rounding.low is not None] if compensated else [],
    )


def _is_stochastic(x: Dense) -> bool:
    return x.p.dtype in LOW_PRECISION and x.rounding.low is None and x.rounding.key is not None


def _keys(xs: list[Dense]) -> tuple[list[int | Tensor], list[int]]:
    """Three keys of each, of W, M and V, and their place; none where nothing is rounded stochastically."""
    stochastic, low = _is_stochastic(xs[0]), xs[0].exp_avg.dtype in LOW_PRECISION
    words: list[int | Tensor] = []
    places: list[int] = []
    for x in xs if stochastic or low else []:
        keys = (x.rounding.key if stochastic else None, *(x.keys if low and x.keys is not None else (None, None)))
        parts = [key if isinstance(key, PartKey) else PartKey(0 if key is None else key, WHOLE) for key in keys]
        words += [part.word for part in parts]
        places += next((part.place for part, key in zip(parts, keys, strict=True) if key is not None), WHOLE)
    return words, places


def _corrections(ages: list[float], beta1: float, beta2: float) -> list[float]:
    """s1, s2 of each age: W <- (1 - lr decay) W + lr s1 M / (s2 sqrt(V) + eps)."""
    known = {age: (-1 / (1 - beta1**age), 1 / math.sqrt(1 - beta2**age)) for age in set(ages)}
    return [s for age in ages for s in known[age]]


@torch.library.custom_op(
    "slimstate::adamw_step_keyed_", mutates_args=("ps", "exp_avgs", "exp_avg_sqs", "scales", "lows")
)
def _(
    ps: list[Tensor],
    grads: list[Tensor],
    exp_avgs: list[Tensor],
    exp_avg_sqs: list[Tensor],
    scales: list[Tensor],
    lows: list[Tensor],
    ages: list[Tensor],
    words: list[Tensor],
    places: list[int],
    stochastic: bool,
    lr: Tensor,
    beta1: Tensor,
    beta2: Tensor,
    eps: float,
    weight_decay: float,
    maximize: bool,
) -> None:
    """One node of a compiled graph; its numbers are on the CPU, so that nothing waits for a device."""
    xs = _listed(
        (ps, grads, exp_avgs, exp_avg_sqs, scales, lows),
        [x.item() for x in ages],
        [int(x) for x in words],
        places,
        stochastic,
    )
    betas = (beta1.item(), beta2.item())
    adamw_step_(xs, lr=lr.item(), betas=betas, eps=eps, weight_decay=weight_decay, maximize=maximize)


def _listed(
    tensors: tuple[list[Tensor], ...],
    ages: Sequence[float],
    words: Sequence[int],
    places: Sequence[int],
    stochastic: bool,
) -> list[Dense]:
    """The parameters that the op's arguments describe."""
    ps, grads, exp_avgs, exp_avg_sqs, scales, lows = tensors
    xs = []
    for i, p in enumerate(ps):
        keys = [PartKey(word, Place(*places[3 * i : 3 * i + 3])) for word in words[3 * i : 3 * i + 3]]
        rounding = Rounding(low=lows[i]) if lows else Rounding(keys[0] if keys and stochastic else None)
        scale = (scales[2 * i], scales[2 * i + 1]) if scales else None
        own = (keys[1], keys[2]) if keys else None
        xs.append(Dense(p, grads[i], exp_avgs[i], exp_avg_sqs[i], ages[i], scale, rounding, own))
    return xs


def adamw_reference_(
    x: Dense,
    bias: Sequence[float],
    decay: float,
    lr: float,
    beta1: float,
    beta2: float,
    eps: float,
    maximize: bool,
) -> None:
    """What the op does with one parameter, in PyTorch."""
    if not x.p.numel():
        return
    g = x.grad.float()
    g = -g if maximize else g
    moments = []
    for j, kept in enumerate((x.exp_avg, x.exp_avg_sq)):
        coded = None if x.scales is None else decode_reference(kept, x.scales[j], signed=j == 0, layout="rows")
        moments.append(kept.float() if coded is None else coded)
    m = moments[0] * beta1 + g * (1 - beta1)
    v = moments[1] * beta2 + g * g * (1 - beta2)
    # Through float64: what torch calls for float32 on the CPU, MKL's, is off by a unit in the last place at times.
    root = v.double().sqrt().float() if v.device.type == "cpu" else v.sqrt()
    u = m * (bias[0] * lr) / (root * bias[1] + eps)
    w = widen(x.p, x.rounding.low if x.p.dtype in LOW_PRECISION else None, torch.float32)
    narrow_(x.p, w * decay + u, x.rounding)
    for j, (kept, value) in enumerate(zip((x.exp_avg, x.exp_avg_sq), (m, v), strict=True)):
        if x.scales is not None:
            encode_reference_(kept, x.scales[j], value, signed=j == 0, layout="rows")
        else:
            narrow_(kept, value, Rounding(None if x.keys is None else x.keys[j]))


if COMPILED:

    @torch.library.register_fake("slimstate::adamw_step_")
    def _(
        ps: list[Tensor],
        grads: list[Tensor],
        exp_avgs: list[Tensor],
        exp_avg_sqs: list[Tensor],
        scales: list[Tensor],
        lows: list[Tensor],
        biases: list[float],
        keys: list[int],
        places: list[int],
        stochastic: bool,
        decay: float,
        lr: float,
        beta1: float,
        beta2: float,
        eps: float,
        maximize: bool,
    ) -> None:
        torch._check(len(ps) == len(grads) == len(exp_avgs) == len(exp_avg_sqs))


def _reference(*arguments: object) -> None:
    tensors, (biases, words, places, stochastic, *settings) = arguments[:6], arguments[6:]
    xs = _listed(tensors, [0.0] * len(tensors[0]), words, places, stochastic)  # type: ignore[arg-type]
    for i, x in enumerate(xs):
        adamw_reference_(x, biases[2 * i : 2 * i + 2], *settings)  # type: ignore[index, arg-type]


def _keyed_reference(*arguments: object) -> None:
    tensors = arguments[:6]
    ages, words, places, stochastic, lr, beta1, beta2, eps, weight_decay, maximize = arguments[6:]
    eta, b1, b2 = (float(x) for x in (lr, beta1, beta2))  # type: ignore[arg-type]
    biases = _corrections([float(age) for age in ages], b1, b2)  # type: ignore[attr-defined]
    settings = (stochastic, 1 - eta * weight_decay, eta, b1, b2, eps, maximize)  # type: ignore[operator]
    _reference(*tensors, biases, [int(word) for word in words], places, *settings)  # type: ignore[attr-defined]


# Weights, gradients, how weights are rounded, and moments.
_KINDS = (
    *((torch.float32, torch.float32, "", moment) for moment in (*LOW_PRECISION, *CODES)),
    *(
        (dtype, grad, how, moment)
        for dtype in LOW_PRECISION
        for how, grad, moment in (
            ("to nearest", dtype, torch.float32),
            ("stochastic", dtype, torch.float32),
            ("stochastic", torch.float32, dtype),
            ("compensated", dtype, torch.float32),
            ("stochastic", dtype, torch.uint8),
            ("compensated", torch.float32, torch.uint8),
            ("stochastic", torch.float32, torch.int8),
        )
    ),
)
_SHAPES = ((7, 129), (3, 600), (2, 256), (1, 1), (5, 0), (300,), (2, 3, 100), (40, 512))


def samples(device: str) -> Iterator[Sample]:
    """What the compiled op is compared with its reference by."""
    generator = torch.Generator().manual_seed(0)
    for dtype, grad, how, moment in _KINDS:
        for maximize in (False, True):
            xs = []
            for i, shape in enumerate(_SHAPES):
                g = torch.randn(shape, generator=generator)
                first, second = g * torch.rand(shape, generator=generator), g.square() * 0.5
                scales = None
                if moment in CODES:
                    codes, scales = zip(
                        *(_coded(y, moment, j == 0) for j, y in enumerate((first, second))), strict=True
                    )
                    first, second = codes
                p = torch.randn(shape, generator=generator).to(device, dtype)
                key = PartKey(counter_key(0, i), Place(3, max(1, shape[-1]) * (1 + i), 5000))
                low = torch.randint(-(2**15), 2**15, shape, generator=generator).to(device, torch.int16)
                rounding = {"stochastic": Rounding(key), "compensated": Rounding(low=low)}.get(how, NEAREST)
                xs.append(
                    Dense(
                        p,
                        g.to(device, grad),
                        first.to(device, moment),
                        second.to(device, moment),
                        1.0 + i,
                        None if scales is None else (scales[0].to(device), scales[1].to(device)),
                        rounding,
                        (key._replace(word=counter_key(1, i)), key._replace(word=counter_key(2, i))),
                    )
                )
            words, places = _keys(xs)
            tensors, stochastic = _tensors(xs), _is_stochastic(xs[0])
            biases = _corrections([float(x.age) for x in xs], 0.9, 0.999)
            what = f"{dtype} {how}, gradients {grad}, moments {moment}{', maximize' if maximize else ''}"
            settings = (stochastic, 0.999, 0.01, 0.9, 0.999, 1e-8, maximize)
            yield Sample("adamw_step_", what, (*tensors, biases, words, places, *settings), _reference)
            if not maximize and COMPILED:
                ages, keys = [torch.tensor(x.age) for x in xs], [torch.tensor(word) for word in words]
                numbers = [torch.tensor(x, dtype=torch.float64) for x in (0.01, 0.9, 0.999)]
                keyed = (*tensors, ages, keys, places, stochastic, *numbers, 1e-8, 0.1, maximize)
                yield Sample("adamw_step_keyed_", what, keyed, _keyed_reference)


def _coded(x: Tensor, dtype: torch.dtype, signed: bool) -> tuple[Tensor, Tensor]:
    codes, scale = torch.empty(x.shape, dtype=dtype), torch.zeros(scale_shape(x.shape, "rows"))
    if x.numel():
        encode_reference_(codes, scale, x, signed=signed, layout="rows")
    return codes, scale
