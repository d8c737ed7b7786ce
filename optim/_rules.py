"""Lion and SGD with momentum: their directions for projected gradients, and their steps for whole parameters."""

from collections.abc import Callable, Sequence

from torch import Tensor

from slimstate.projections import MatrixView
from slimstate.projections._base import compute_dtype, rewrite_
from slimstate.projections._numbers import Number, lerp_

from ._adam import EXP_AVG, adam_directions, adamw_step_, moment_dtype, moments_spec, rounding, store_
from ._base import Entry, Group, Spec

__all__ = ["RULES", "directions", "rule_spec", "whole_step_"]


def _lion_(m: Tensor, g: Tensor, betas: tuple[Number, Number]) -> Tensor:
    """U = sign(b1 M + (1-b1) G), then M <- b2 M + (1-b2) G. https://arxiv.org/abs/2302.06675"""
    u = lerp_(g.clone(), m, betas[0]).sign_()
    lerp_(m, g, 1 - betas[1])
    return u


def _sgdm_(m: Tensor, g: Tensor, betas: tuple[Number, Number]) -> Tensor:
    """M <- b1 M + G, U = M."""
    return m.mul_(betas[0]).add_(g)


# name -> what its only moment is called, and its direction from that moment, which it updates, and the gradient
ONE_MOMENT: dict[str, tuple[str, Callable[[Tensor, Tensor, tuple[Number, Number]], Tensor]]] = {
    "lion": ("exp_avg", _lion_),
    "sgdm": ("momentum_buffer", _sgdm_),
}
RULES = ("adamw", *ONE_MOMENT)


def rule_spec(p: Tensor, group: Group, shape: tuple[int, ...]) -> Spec:
    """The moments that the group's rule, `group["inner"]`, keeps of something of this shape."""
    if group["inner"] == "adamw":
        return moments_spec(p, group, shape)
    return {ONE_MOMENT[group["inner"]][0]: (shape, moment_dtype(p, group))}


def directions(entries: Sequence[Entry], rs: list[Tensor], group: Group, ages: list[Number]) -> list[Tensor]:
    """Takes projected gradients R into the moments of their parameters; returns the steps U of each, for lr 1.

    Args:
        entries: the parameters.
        rs: R (r x k) of each, in the dtype of arithmetic; overwritten.
        group: the hyperparameters; `maximize` turns U around.
        ages: the number of gradients in the moments of each, this one included.
    """
    if group["inner"] == "adamw":
        return adam_directions(entries, rs, group, ages)
    key, rule = ONE_MOMENT[group["inner"]]
    us = []
    for x, r in zip(entries, rs, strict=True):
        moment = x.state[key]
        wide = moment.to(r.dtype)
        us.append(rule(wide, -r if group["maximize"] else r, group["betas"]).neg())
        if moment.dtype != wide.dtype:
            store_(moment, wide, x.key(EXP_AVG))
    return us


def whole_step_(entries: list[Entry], group: Group, *, scale: float = 1.0, aged: bool = False) -> None:
    r"""The group's rule on whole parameters, without a temporary of their size:

    .. math:: W \leftarrow (1-\eta\lambda) W - \eta\, s\, U.

    Args:
        entries: the parameters.
        group: the hyperparameters.
        scale: s, of the step and not of the decay.
        aged: whether bias correction goes by the age of the moments; else it goes by the parameter's step.
    """
    if group["inner"] == "adamw":
        adamw_step_(entries, group, scale=scale, aged=aged)
        return
    key, rule = ONE_MOMENT[group["inner"]]
    lr = group["lr"]
    for x in entries:
        w, g, m = (y if y.ndim else y[None] for y in (x.p, x.grad, x.state[key]))
        rows = w.shape[0]
        view = MatrixView(tuple(w.shape), 0, rows, w.numel() // max(1, rows), transposed=False)

        def edit(w: Tensor, j: int, s: slice, g: Tensor = g, m: Tensor = m, x: Entry = x) -> None:
            gradient = g[s].to(w.dtype).reshape(w.shape)
            wide = m[s].to(w.dtype).reshape(w.shape)
            u = rule(wide, -gradient if group["maximize"] else gradient, group["betas"])
            w.mul_(1 - lr * group["weight_decay"]).sub_(u * (lr * scale))
            store_(m[s], wide.view(m[s].shape), x.key(EXP_AVG), s.start * w.shape[1])

        if w.numel():
            how = rounding(x, group)
            low = how.low if how.low is None or x.p.ndim else how.low[None]
            rewrite_(w, view, edit, compute_dtype(x.p.dtype), how._replace(low=low))
