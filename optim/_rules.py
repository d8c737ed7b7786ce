"""Lion and SGD with momentum: their directions for projected gradients, and their steps for whole parameters."""

from collections.abc import Callable

import torch
from torch import Tensor

from slimstate.projections import MatrixView
from slimstate.projections._base import compute_dtype, rewrite_

from ._adam import EXP_AVG, adam_directions, adamw_step_, moment_dtype, moments_spec, store_, weight_rounding
from ._base import Group, Optimizer, Spec

__all__ = ["RULES", "directions", "rule_spec", "whole_step_"]


def _lion_(m: Tensor, g: Tensor, betas: tuple[float, float]) -> Tensor:
    """U = sign(b1 M + (1-b1) G), then M <- b2 M + (1-b2) G. https://arxiv.org/abs/2302.06675"""
    u = torch.lerp(g, m, betas[0]).sign_()
    m.lerp_(g, 1 - betas[1])
    return u


def _sgdm_(m: Tensor, g: Tensor, betas: tuple[float, float]) -> Tensor:
    """M <- b1 M + G, U = M."""
    return m.mul_(betas[0]).add_(g)


# name -> what its only moment is called, and its direction from that moment, which it updates, and the gradient
ONE_MOMENT: dict[str, tuple[str, Callable[[Tensor, Tensor, tuple[float, float]], Tensor]]] = {
    "lion": ("exp_avg", _lion_),
    "sgdm": ("momentum_buffer", _sgdm_),
}
RULES = ("adamw", *ONE_MOMENT)


def rule_spec(p: Tensor, group: Group, shape: tuple[int, ...]) -> Spec:
    """The moments that the group's rule, `group["inner"]`, keeps of something of this shape."""
    if group["inner"] == "adamw":
        return moments_spec(p, group, shape)
    return {ONE_MOMENT[group["inner"]][0]: (shape, moment_dtype(p, group))}


def directions(
    optimizer: Optimizer, params: list[Tensor], rs: list[Tensor], group: Group, ages: list[Tensor]
) -> list[Tensor]:
    """Takes projected gradients R into the moments of their parameters; returns the steps U of each, for lr 1.

    Args:
        optimizer: whose state holds the moments.
        params: the parameters.
        rs: R (r x k) of each, in the dtype of arithmetic.
        group: the hyperparameters; `maximize` turns U around.
        ages: the number of gradients in the moments of each, this one included.
    """
    if group["inner"] == "adamw":
        return adam_directions(optimizer, params, rs, group, ages)
    key, rule = ONE_MOMENT[group["inner"]]
    us = []
    for p, r in zip(params, rs, strict=True):
        moment = optimizer.state[p][key]
        wide = moment.to(r.dtype)
        us.append(rule(wide, -r if group["maximize"] else r, group["betas"]).neg())
        store_(moment, wide, optimizer._draw(p, group, EXP_AVG))
    return us


def whole_step_(
    optimizer: Optimizer, params: list[Tensor], group: Group, *, scale: float = 1.0, clock: str = "step"
) -> None:
    r"""The group's rule on whole parameters, without a temporary of their size:

    .. math:: W \leftarrow (1-\eta\lambda) W - \eta\, s\, U.

    Args:
        optimizer: whose state holds the moments.
        params: the parameters.
        group: the hyperparameters.
        scale: s, of the step and not of the decay.
        clock: the counter in the state that says how many gradients are in the moments, this one included.
    """
    if group["inner"] == "adamw":
        adamw_step_(optimizer, params, group, scale=scale, clock=clock)
        return
    key, rule = ONE_MOMENT[group["inner"]]
    lr = float(group["lr"])
    for p in params:
        w, g, m = (x if x.ndim else x[None] for x in (p, p.grad, optimizer.state[p][key]) if x is not None)
        rows = w.shape[0]
        view = MatrixView(tuple(w.shape), 0, rows, w.numel() // max(1, rows), transposed=False)

        def edit(w: Tensor, j: int, s: slice, g: Tensor = g, m: Tensor = m, p: Tensor = p) -> None:
            gradient = g[s].to(w.dtype).reshape(w.shape)
            wide = m[s].to(w.dtype).reshape(w.shape)
            u = rule(wide, -gradient if group["maximize"] else gradient, group["betas"])
            store_(m[s], wide.view(m[s].shape), optimizer._draw(p, group, EXP_AVG), s.start * w.shape[1])
            w.mul_(1 - lr * group["weight_decay"]).add_(u, alpha=-lr * scale)

        if w.numel():
            rewrite_(w, view, edit, compute_dtype(p.dtype), weight_rounding(optimizer, p, group))
