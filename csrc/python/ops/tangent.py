# SPDX-License-Identifier: Apache-2.0
"""AdamP's and SGDP's two passes over a list of parameters, where they are compiled.

The equations and the same in PyTorch, for any dtype and memory layout, are in ``slimstate.optim.AdamP``.
"""

from collections.abc import Iterator, Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from ._compiled import COMPILED, DEVICES
from .keys import WHOLE, Key, PartKey

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
        x.weight.device.type in DEVICES
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
        _step_(*lists, list(factors), words, places, numbers, *settings)  # type: ignore[arg-type]


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


def check(device: str) -> Iterator[tuple[str, bool]]:
    """Compares optimizers with and without the ops, which do not take strided memory."""
    from slimstate.optim import SGDP, AdamP

    generator = torch.Generator().manual_seed(0)
    w, noise = (torch.randn((37, 129), generator=generator) for _ in range(2))
    orthogonal = noise - w * ((w * noise).sum(1, keepdim=True) / w.square().sum(1, keepdim=True))
    for kind, settings in ((AdamP, {"betas": (0.9, 0.99)}), (SGDP, {"momentum": 0.9})):
        for grad, fires in ((orthogonal, True), (noise + w, False)):
            ends = []
            for strided in (False, True):
                x = w.to(device)
                p = torch.nn.Parameter(x.mT.contiguous().mT if strided else x.clone())
                p.grad = grad.to(device)
                optimizer = kind([p], lr=0.01, weight_decay=0.1, **settings)  # type: ignore[operator]
                optimizer.step()
                ends.append(p.detach().cpu())
            same = torch.allclose(*ends, rtol=1e-5, atol=1e-6)
            yield f"{kind.__name__}, {'a view fires' if fires else 'no view fires'}", same
