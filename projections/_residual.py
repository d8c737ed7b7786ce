"""The step of a gradient's part in a dense subspace and of what lies outside of it, together."""

import torch
from torch import Tensor

from slimstate.ops import scaled_residual_, sign_residual_

from ._base import rewrite_
from ._bases import Basis, add_product_
from ._blocks import blocks
from ._matrix import MatrixView
from ._numbers import Number
from ._rounding import Rounding

__all__ = ["scaled_step_", "sign_step_"]

NOISE = 8  # roundings of float32: no more is left outside of a gradient that the subspace holds whole


def sign_step_(
    p: Tensor,
    view: MatrixView,
    basis: Basis,
    r: Tensor,
    u: Tensor,
    gradient: Tensor,
    *,
    beta: Number,
    alpha: Number,
    step: Number,
    rounding: Rounding,
) -> None:
    """W <- beta W + alpha Q U - step sign(M - Q R), in place: Q R is there a block at a time.

    Differences within a few roundings of their column's |R| have no sign.

    Args:
        p: the parameter W, of any dtype and memory layout.
        view: how M and W are related.
        basis: Q, or a stack of them.
        r: R (r x k), or a stack of them, in the dtype of arithmetic.
        u: U (r x k), likewise.
        gradient: of W's shape.
        beta: factor of the weight.
        alpha: factor of the step inside.
        step: the step outside.
        rounding: how a low-precision weight is read and rounded.
    """
    gradients, transposed = view.members(gradient), view.transposed
    limits = _lengths(r).mul_(NOISE * torch.finfo(r.dtype).eps)
    limits = limits.mT if transposed else limits
    product = r.new_empty(0)

    def edit(w: Tensor, j: int, s: slice) -> None:
        nonlocal product
        if product.shape[-1] != w.shape[-1] or len(product) < len(w):
            product = torch.empty_like(w)
        q = basis[j] if view.lead else basis
        rj, uj, limit = (x[j] if view.lead else x for x in (r, u, limits))
        outside = product[: len(w)]
        add_product_(outside, q, rj, transposed, s, beta=0.0, alpha=1.0)
        g = gradients[j][s].reshape(w.shape)
        sign_residual_(w, g, outside, limit[s] if transposed else limit, beta=beta, step=step)
        add_product_(w, q, uj, transposed, s, beta=1.0, alpha=alpha)

    rewrite_(p, view, edit, r.dtype, rounding)


def scaled_step_(
    p: Tensor,
    view: MatrixView,
    basis: Basis,
    r: Tensor,
    u: Tensor,
    gradient: Tensor,
    *,
    beta: Number,
    alpha: Number,
    scale: Tensor,
    rounding: Rounding,
) -> None:
    """W <- beta W + alpha Q U - (M - Q R) diag(scale), in place: two products with Q, since Q R is in that of

    Q (alpha U + R diag(scale)).

    Args:
        p: the parameter W, of any dtype and memory layout.
        view: how M and W are related.
        basis: Q, or a stack of them.
        r: R (r x k), or a stack of them, in the dtype of arithmetic.
        u: U (r x k), likewise; overwritten.
        gradient: of W's shape.
        beta: factor of the weight.
        alpha: factor of the step inside.
        scale: the step outside, of each column of M (1 x k) or of all (1 x 1), or of those of each of a stack.
        rounding: how a low-precision weight is read and rounded.
    """
    gradients, transposed = view.members(gradient), view.transposed
    scale = scale.expand(*view.lead, *scale.shape[-2:])
    u.mul_(alpha).addcmul_(r, scale)
    factors = scale.mT if transposed else scale

    def edit(w: Tensor, j: int, s: slice) -> None:
        q = basis[j] if view.lead else basis
        uj, factor = (x[j] if view.lead else x for x in (u, factors))
        g = gradients[j][s].reshape(w.shape)
        if len(factor) > 1:
            factor = factor[s]
        for t in blocks(w, 0, w.itemsize):
            scaled_residual_(w[t], g[t], factor[t] if len(factor) > 1 else factor, beta=beta)
        add_product_(w, q, uj, transposed, s, beta=1.0, alpha=1.0)

    rewrite_(p, view, edit, r.dtype, rounding, whole=True)


def _lengths(r: Tensor) -> Tensor:
    """The norms of R's columns (1 x k); torch's own norm along this axis takes nine times as long."""
    lengths = r.new_empty(*r.shape[:-2], 1, r.shape[-1])
    for s in blocks(r, -1, r.itemsize):
        torch.sum(r[..., s].square(), dim=-2, keepdim=True, out=lengths[..., s])
    return lengths.sqrt_()
