# SPDX-License-Identifier: Apache-2.0
"""AdamP's and SGDP's two passes over a list of parameters, where they are compiled.

The equations and the same in PyTorch, for any dtype and memory layout, are in ``slimstate.optim.AdamP``.
"""

from collections.abc import Iterator, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor

from ._compiled import COMPILED, TAKEN
from ._samples import Sample
from .keys import WHOLE, Key, PartKey, Place

__all__ = ["TangentRule", "tangent_dots", "tangent_step_", "tangent_takes"]

KEPT = (torch.float32, torch.bfloat16, torch.float16)


class TangentRule(NamedTuple):
    """What is common to the parameters of a call.

    Args:
        rates: beta1 and beta2 of Adam, or momentum and dampening of SGD; 0-d CPU tensors in compiled code.
        eps: of Adam's root and of the test.
        nesterov: look ahead with the gradient.
        maximize: ascend instead.
    """

    rates: tuple[float | Tensor, float | Tensor]
    eps: float
    nesterov: bool
    maximize: bool


class Parameter(NamedTuple):
    """One parameter of a call, all of it in one memory layout.

    Args:
        weight: W.
        grad: G, of W's dtype.
        moments: M and V of Adam, M of SGD, or nothing for SGD without momentum.
        age: the number of gradients in the moments, this one included.
        low: the compensation of W; None where there is none.
    """

    weight: Tensor
    grad: Tensor
    moments: tuple[Tensor, ...]
    age: float | Tensor
    low: Tensor | None = None


def tangent_takes(x: Parameter) -> bool:
    """Whether the ops take a parameter: dense memory, at most float32, and a device for which they are compiled."""
    every = (x.weight, x.grad, *x.moments) + (() if x.low is None else (x.low,))
    return (
        x.weight.device.type in TAKEN
        and x.grad.dtype == x.weight.dtype
        and all(y.dtype in KEPT for y in every[: 2 + len(x.moments)])
        and all(y.is_contiguous() for y in every)
    )


def tangent_dots(x: Parameter, rule: TangentRule) -> Tensor:
    r"""The dot products :math:`\langle w_i, g_i \rangle, \|g_i\|^2, \|w_i\|^2, \langle w_i, u_i \rangle` of each row.

    Args:
        x: the parameter (rows, ...), of two or more dimensions; left as it is.
        rule: that makes U of the gradient and the moments.

    Returns:
        (4, rows, 1, ...) in float32.
    """
    dots = x.weight.new_empty((4, len(x.weight), *[1] * (x.weight.ndim - 1)), dtype=torch.float32)
    lists = _lists([x])
    rates = map(float, rule.rates)
    torch.ops.slimstate.tangent_dots_([dots], *lists, [float(x.age)], *rates, rule.eps, rule.nesterov, rule.maximize)
    return dots


def tangent_step_(
    parameters: Sequence[Parameter],
    rule: TangentRule,
    *,
    lr: float | Tensor,
    decay: float | Tensor,
    delta: float,
    wd_ratio: float,
    layer_view: bool,
    factors: Sequence[Tensor] = (),
    keys: Sequence[Sequence[Key]] = (),
    stochastic: bool = True,
) -> None:
    r"""Takes a step with all parameters: :math:`w_i \leftarrow f_i w_i - \eta u_i`, and the moments that U comes from.

    Args:
        parameters: of one dtype, with moments of one dtype, on one device.
        rule: that makes U of the gradient and the moments.
        lr: :math:`\eta`.
        decay: :math:`\lambda`.
        delta: the threshold of the test; 0 tests nothing, and vectors are not tested either.
        wd_ratio: the share of the decay that remains where a view fires.
        layer_view: whether the layer view is tried.
        factors: :math:`f_i` of each row of each parameter; where there are none they follow from the test.
        keys: of the weight and its two moments, for each parameter; needed where something is rounded.
        stochastic: whether weights are rounded stochastically, else to nearest; of compensated ones nothing is lost.
    """
    lists = _lists(parameters)
    words = [key.word if isinstance(key, PartKey) else key for three in keys for key in three]
    divided = any(isinstance(key, PartKey) for three in keys for key in three)
    placed = [three[0].place if isinstance(three[0], PartKey) else WHOLE for three in keys] if divided else []
    places = [number for place in placed for number in place]
    numbers = [lr, decay, *rule.rates, *(x.age for x in parameters)]
    settings = (rule.eps, delta, wd_ratio, rule.nesterov, layer_view, rule.maximize, stochastic)
    if any(isinstance(x, Tensor) for x in (*numbers, *words)):
        stacked = torch.stack([torch.as_tensor(x, dtype=torch.float64) for x in numbers])
        bits = torch.stack([torch.as_tensor(x) for x in words]) if words else torch.empty(0, dtype=torch.int64)
        torch.ops.slimstate.tangent_keyed_(*lists, list(factors), bits, places, stacked, *settings)
    else:
        _step_(*lists, list(factors), words, places, numbers, *settings)  # type: ignore[arg-type, call-arg]


def _lists(parameters: Sequence[Parameter]) -> tuple[list[Tensor], ...]:
    """Weights, gradients, first moments, second moments, compensations."""
    moments = [[x.moments[i] for x in parameters if len(x.moments) > i] for i in range(2)]
    lows = [x.low for x in parameters if x.low is not None]
    return [x.weight for x in parameters], [x.grad for x in parameters], *moments, lows


def _step_(
    weights: list[Tensor],
    grads: list[Tensor],
    firsts: list[Tensor],
    seconds: list[Tensor],
    lows: list[Tensor],
    factors: list[Tensor],
    keys: list[int],
    places: list[int],
    numbers: list[float],
    eps: float,
    delta: float,
    wd_ratio: float,
    nesterov: bool,
    layer_view: bool,
    maximize: bool,
    stochastic: bool,
) -> None:
    lr, decay, rate1, rate2, *ages = numbers
    torch.ops.slimstate.tangent_step_(
        weights, grads, firsts, seconds, lows, factors, keys, places, ages, lr, decay, rate1, rate2, eps, delta,
        wd_ratio, nesterov, layer_view, maximize, stochastic,
    )  # fmt: skip
    torch.autograd.graph.increment_version(weights)  # so that a backward that saved one raises


@torch.library.custom_op("slimstate::tangent_keyed_", mutates_args=("weights", "firsts", "seconds", "lows"))
def _(
    weights: list[Tensor],
    grads: list[Tensor],
    firsts: list[Tensor],
    seconds: list[Tensor],
    lows: list[Tensor],
    factors: list[Tensor],
    keys: Tensor,
    places: list[int],
    numbers: Tensor,
    eps: float,
    delta: float,
    wd_ratio: float,
    nesterov: bool,
    layer_view: bool,
    maximize: bool,
    stochastic: bool,
) -> None:
    """One node of a compiled graph, whatever the numbers, which are on the CPU."""
    settings = (eps, delta, wd_ratio, nesterov, layer_view, maximize, stochastic)
    _step_(weights, grads, firsts, seconds, lows, factors, keys.tolist(), places, numbers.tolist(), *settings)


if COMPILED:

    @torch.library.register_fake("slimstate::tangent_dots_")
    def _(dots: list[Tensor], weights: list[Tensor], *rest: object) -> None:
        torch._check(len(dots) == len(weights))

    @torch.library.register_fake("slimstate::tangent_step_")
    def _(weights: list[Tensor], grads: list[Tensor], *rest: object) -> None:
        torch._check(len(grads) == len(weights))


def samples(device: str) -> Iterator[Sample]:
    """What the compiled ops are compared with the reference by."""
    generator = torch.Generator().manual_seed(0)

    def normal(*shape: int) -> Tensor:
        return torch.randn(shape, generator=generator)

    def gradient(w: Tensor, kind: str) -> Tensor:
        """Orthogonal to every row of W ("channel"), or to all of it only ("layer"); else to nothing."""
        noise = 0.1 * normal(*w.shape)
        rows, across = w.flatten(1), (noise + w).flatten(1) if kind == "none" else noise.flatten(1)
        if kind == "none":
            return across.view(w.shape)
        across = across - rows * ((rows * across).sum(1, keepdim=True) / rows.square().sum(1, keepdim=True))
        if kind == "layer":
            signs = torch.ones(len(rows), 1)
            signs[1::2] = -1
            signs[len(rows) - len(rows) % 2 :] = 0
            across = across + signs * rows / rows.square().sum(1, keepdim=True)
        return across.view(w.shape)

    def arguments(
        shapes: Sequence[tuple[int, ...]], kind: str, moments: int, weight: torch.dtype, moment: torch.dtype, low: bool
    ) -> tuple[list[Tensor], ...]:
        ws = [normal(*shape) for shape in shapes]
        gs = [gradient(w, kind) if w.ndim > 1 and w.numel() else normal(*w.shape) for w in ws]
        ms, vs = ([0.01 * normal(*w.shape).abs() for w in ws] for _ in range(2))
        lows = [torch.randint(-(2**14), 2**14, w.shape, dtype=torch.int16, generator=generator) for w in ws]
        lists = (ws, weight), (gs, weight), (ms[: moments * 9], moment), (vs[: max(moments - 1, 0) * 9], moment)
        cast = [[x.to(device, dtype) for x in xs] for xs, dtype in lists]
        return *cast, [x.to(device) for x in lows if low]

    float32, bfloat16, float16 = torch.float32, torch.bfloat16, torch.float16
    plain = ((5, 37), (2, 9001), (1030,))  # rows of one unit and of more, and what is not tested
    odd = ((4, 3, 5), (8, 64), (), (1, 1), (0, 3), (3, 0))
    for what, shapes, kind, moments, weight, moment, settings in (
        ("Adam", plain, "none", 2, float32, float32, {"dots": True}),
        ("Adam, odd shapes", odd, "channel", 2, float32, float32, {"dots": True}),
        ("Adam, channel view", plain, "channel", 2, float32, float32, {"keyed": True}),
        ("Adam, layer view, float16, of a part", plain, "layer", 2, float16, float32, {"places": (5, 7, 11)}),
        ("Adam, layer view left out", plain, "layer", 2, float32, float32, {"layer_view": False}),
        ("Adam, nesterov, maximize", plain, "channel", 2, float32, bfloat16, {"nesterov": True, "maximize": True}),
        ("Adam, bfloat16, to nearest", plain, "none", 2, bfloat16, float16, {"stochastic": False, "dots": True}),
        ("Adam, factors", plain, "none", 2, float32, float32, {"factors": True}),
        ("SGD", plain, "channel", 1, bfloat16, bfloat16, {"dots": True}),
        ("SGD, nesterov", plain, "layer", 1, float32, float32, {"nesterov": True}),
        ("SGD, bfloat16, compensated", plain, "none", 1, bfloat16, float32, {"low": True, "delta": 0.0}),
        ("SGD, float16, compensated", plain, "none", 1, float16, float16, {"low": True, "delta": 0.0}),
        ("SGD without momentum", plain, "channel", 0, float32, float32, {"maximize": True}),
    ):
        lists = arguments(shapes, kind, moments, weight, moment, "low" in settings)
        count = len(shapes)
        keys, ages = list(range(1, 3 * count + 1)), [3.0 + i for i in range(count)]
        rates = (0.9, 0.99) if moments == 2 else (0.9, 0.1)
        nesterov, maximize = "nesterov" in settings, "maximize" in settings
        factors = [torch.linspace(0.9, 1.1, _rows(w), device=device) for w in lists[0] if "factors" in settings]
        places = list(dict[str, Any](settings).get("places", ())) * count
        numbers = (0.1, 0.01, *rates)
        flags = (
            1e-8, settings.get("delta", 0.1), 0.2, nesterov, settings.get("layer_view", True), maximize,
            "stochastic" not in settings,
        )  # fmt: skip
        step = (*lists, factors, keys, places, ages, *numbers, *flags)
        # Where numbers are rounded, the last place of a sum may decide between neighbours; in these it does not.
        yield Sample("tangent_step_", what, step, _step_reference, 1e-5)
        if "keyed" in settings:
            keyed = (*lists, factors, torch.tensor(keys), places, torch.tensor([*numbers, *ages]).double(), *flags)
            yield Sample("tangent_keyed_", what, keyed, _keyed_reference, 1e-5)
        if "dots" in settings:
            matrices = [[x for x in xs if x.ndim > 1] for xs in lists]
            dots = [torch.zeros(4, len(w), *[1] * (w.ndim - 1), device=device) for w in matrices[0]]
            old = [age for age, w in zip(ages, lists[0], strict=True) if w.ndim > 1]
            given = (dots, *matrices, old, *rates, 1e-8, nesterov, maximize)
            yield Sample("tangent_dots_", what, given, _dots_reference, 1e-5)


def _rows(w: Tensor) -> int:
    return len(w) if w.ndim > 1 else 1


def _direction(
    g: Tensor, moments: list[Tensor], age: float, rates: tuple[float, float], eps: float, nesterov: bool, maximize: bool
) -> Tensor:
    """U; the moments become those after this step."""
    a, b = rates
    g = -g if maximize else g
    if not moments:
        return (1 - b) * g
    if len(moments) == 1:
        moments[0].mul_(a).add_((1 - b) * g)
        return g + a * moments[0] if nesterov else moments[0]
    m, v = moments
    m.lerp_(g, 1 - a)
    v.lerp_(g.square(), 1 - b)
    m = m.lerp(g, 1 - a) if nesterov else m
    return m / (1 - a**age) / ((v / (1 - b**age)).sqrt() + eps)


def _wide(lists: Sequence[list[Tensor]], i: int) -> tuple[Tensor, Tensor, list[Tensor]]:
    """Copies of W, G and the moments of one parameter in float32."""
    from slimstate.projections._rounding import widen

    ws, gs, firsts, seconds, lows = lists
    w = widen(ws[i], lows[i] if lows else None, torch.float32)
    return w, gs[i].float(), [xs[i].to(torch.float32, copy=True) for xs in (firsts, seconds) if xs]


def _row_dots(w: Tensor, g: Tensor, u: Tensor) -> Tensor:
    return torch.stack([y.flatten(1).double().sum(1).float() for y in (w * g, g * g, w * w, w * u)])


def _dots_reference(dots: list[Tensor], *arguments: Any) -> None:
    *lists, ages, rate1, rate2, eps, nesterov, maximize = arguments
    for i, out in enumerate(dots):
        w, g, moments = _wide(lists, i)
        u = _direction(g, moments, ages[i], (rate1, rate2), eps, nesterov, maximize)
        out.copy_(_row_dots(w, g, u).view(out.shape))


def _keyed_reference(*arguments: Any) -> None:
    *lists, factors, keys, places, numbers, eps, delta, wd_ratio, nesterov, layer_view, maximize, stochastic = arguments
    settings = (eps, delta, wd_ratio, nesterov, layer_view, maximize, stochastic)
    lr, decay, rate1, rate2, *ages = numbers.tolist()
    _step_reference(*lists, factors, keys.tolist(), places, ages, lr, decay, rate1, rate2, *settings)


def _step_reference(*arguments: Any) -> None:
    from slimstate.optim.adamp import radial_part, views_of
    from slimstate.projections._rounding import Rounding, narrow_

    *lists, factors, keys, places, ages, lr, decay, rate1, rate2, eps, delta, wd_ratio, nesterov = arguments[:-3]
    layer_view, maximize, stochastic = arguments[-3:]
    test = {"eps": eps, "delta": delta, "wd_ratio": wd_ratio, "layer_view": layer_view}
    weights, _, firsts, seconds, lows = lists
    for i, target in enumerate(weights):
        if not target.numel():
            continue
        w, g, moments = _wide(lists, i)
        u = _direction(g, moments, ages[i], (rate1, rate2), eps, nesterov, maximize)
        factor: float | Tensor = 1 - lr * decay
        if factors:
            factor = factors[i].view(-1, *[1] * (w.ndim - 1)) if w.ndim else factors[i][0]
        elif w.ndim > 1 and delta > 0:
            dots = _row_dots(w, g, u).view(4, -1, *[1] * (w.ndim - 1))
            q, radial = radial_part(views_of(dots, w[0].numel(), test), w.numel(), test)
            factor = 1 - lr * decay * q + lr * radial
        place = Place(*places[3 * i : 3 * i + 3]) if places else WHOLE
        words = [PartKey(key, place) for key in keys[3 * i : 3 * i + 3]]
        how = Rounding(words[0] if stochastic and words else None, lows[i] if lows else None)
        narrow_(target, w * factor - u * lr, how)
        for moment, value, word in zip([xs[i] for xs in (firsts, seconds) if xs], moments, words[1:], strict=False):
            narrow_(moment, value, Rounding(word))
