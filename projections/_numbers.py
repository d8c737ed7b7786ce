"""Arithmetic with numbers that change from step to step, and that a compiler must not take for constants."""

import torch
from torch import Tensor

__all__ = ["Number", "addmm_", "lerp_", "scalar", "smaller"]

Number = float | Tensor
"""A float; in compiled code a 0-d float64 tensor on the CPU, which no guard looks at and no device waits for."""


def scalar(x: Number) -> Tensor:
    """As a tensor."""
    return x if isinstance(x, Tensor) else torch.tensor(x, dtype=torch.float64)


def smaller(a: Number, b: Number) -> Number:
    """The smaller of two."""
    if isinstance(a, Tensor) or isinstance(b, Tensor):
        return torch.minimum(scalar(a), scalar(b))
    return min(a, b)


def lerp_(x: Tensor, end: Tensor, weight: Number) -> Tensor:
    """x <- (1 - weight) x + weight end."""
    return x.lerp_(end, weight.to(x) if isinstance(weight, Tensor) else weight)


def addmm_(w: Tensor, a: Tensor, b: Tensor, *, beta: Number, alpha: Number) -> None:
    """W <- beta W + alpha A B, or of stacks of them, in place."""
    if isinstance(beta, Tensor) or isinstance(alpha, Tensor):
        torch.ops.slimstate.addmm_(w, a, b, scalar(beta), scalar(alpha))
    else:
        _addmm_(w, a, b, beta, alpha)


def _addmm_(w: Tensor, a: Tensor, b: Tensor, beta: float, alpha: float) -> None:
    if w.ndim > 2:
        w.baddbmm_(a, b, beta=beta, alpha=alpha)
    else:
        w.addmm_(a, b, beta=beta, alpha=alpha)


@torch.library.custom_op("slimstate::addmm_", mutates_args=("w",))
def _(w: Tensor, a: Tensor, b: Tensor, beta: Tensor, alpha: Tensor) -> None:
    _addmm_(w, a, b, beta.item(), alpha.item())
