# SPDX-License-Identifier: Apache-2.0
"""Steps with what a subspace leaves out of a gradient, one block of a weight at a time."""

from collections.abc import Iterator

import torch
from torch import Tensor

from ._compiled import COMPILED, TAKEN
from ._samples import Sample

__all__ = ["scaled_residual_", "scaled_residual_reference_", "sign_residual_", "sign_residual_reference_"]

Number = float | Tensor
_GRADIENTS = (torch.float32, torch.bfloat16, torch.float16)


def sign_residual_(
    w: Tensor, g: Tensor, product: Tensor, limit: Tensor, *, beta: Number = 1.0, step: Number = 1.0
) -> None:
    r"""Steps against the sign of what a product leaves out of a gradient, in place:

    .. math::
        F = G - P, \qquad W \leftarrow \beta W - \eta\,\mathrm{sign}(F) \circ [\,|F| > \epsilon\,].

    The limit :math:`\epsilon` keeps rounding noise from getting a sign. One pass, in the arithmetic of W's dtype; a G
    of lower precision is widened on the way. An F that is not a number has sign 0, as in torch.

    Args:
        w: W (rows x columns), float32 or float64.
        g: G, of W's shape, any floating dtype.
        product: P, of W's shape and dtype.
        limit: :math:`\epsilon \ge 0`, of W's dtype: (rows, 1), (1, columns) or (1, 1).
        beta: factor of the weight; in compiled code a 0-d CPU tensor.
        step: :math:`\eta`, likewise.

    Raises:
        TypeError: a dtype is not one of the above.
        ValueError: a shape is not one of the above, or the devices differ.
    """
    _check(w, g, product=product, limit=limit)
    if isinstance(beta, Tensor) or isinstance(step, Tensor):
        if COMPILED:
            torch.ops.slimstate.sign_residual_of_(w, g, product, limit, _scalar(beta), _scalar(step))
        else:
            sign_residual_reference_(w, g, product, limit, beta, step)
    elif _fits(w, g, product, limit):
        torch.ops.slimstate.sign_residual_(w, g, product, limit, beta, step)
        torch.autograd.graph.increment_version(w)  # so that a backward that saved it raises
    else:
        sign_residual_reference_(w, g, product, limit, beta, step)


def scaled_residual_(w: Tensor, g: Tensor, factor: Tensor, *, beta: Number = 1.0) -> None:
    r"""Steps against a gradient whose rows or columns are scaled, in place:

    .. math:: W \leftarrow \beta W - F \circ G.

    With the columns' factors :math:`F = c\,s^\top` this is what is left to do of
    :math:`W \leftarrow \beta W + Q U - c\,(G - Q R)\,\mathrm{diag}(s)` after
    :math:`U' = U + c\,R\,\mathrm{diag}(s)`, since a Q R that is not looked at need not be there: Q U' is one product.

    Args:
        w: W (rows x columns), float32 or float64.
        g: G, of W's shape, any floating dtype.
        factor: F, of W's dtype: (rows, 1), (1, columns) or (1, 1).
        beta: factor of the weight; in compiled code a 0-d CPU tensor.

    Raises:
        TypeError: a dtype is not one of the above.
        ValueError: a shape is not one of the above, or the devices differ.
    """
    _check(w, g, factor=factor)
    if isinstance(beta, Tensor):
        if COMPILED:
            torch.ops.slimstate.scaled_residual_of_(w, g, factor, beta)
        else:
            scaled_residual_reference_(w, g, factor, beta)
    elif _fits(w, g, factor):
        torch.ops.slimstate.scaled_residual_(w, g, factor, beta)
        torch.autograd.graph.increment_version(w)
    else:
        scaled_residual_reference_(w, g, factor, beta)


def sign_residual_reference_(w: Tensor, g: Tensor, product: Tensor, limit: Tensor, beta: Number, step: Number) -> None:
    """What the op ``sign_residual_`` computes, in PyTorch; see :func:`sign_residual_`."""
    outside = g.to(w.dtype) - product
    sign = (outside > limit).to(w.dtype).sub_((outside < -limit).to(w.dtype))
    w.mul_(beta).sub_(sign.mul_(step))


def scaled_residual_reference_(w: Tensor, g: Tensor, factor: Tensor, beta: Number) -> None:
    """What the op ``scaled_residual_`` computes, in PyTorch; see :func:`scaled_residual_`."""
    w.mul_(beta).sub_(g.to(w.dtype) * factor)


@torch.library.custom_op("slimstate::sign_residual_of_", mutates_args=("w",))
def _(w: Tensor, g: Tensor, product: Tensor, limit: Tensor, beta: Tensor, step: Tensor) -> None:
    """One node of a compiled graph, whatever the numbers."""
    sign_residual_(w, g, product, limit, beta=beta.item(), step=step.item())


@torch.library.custom_op("slimstate::scaled_residual_of_", mutates_args=("w",))
def _(w: Tensor, g: Tensor, factor: Tensor, beta: Tensor) -> None:
    scaled_residual_(w, g, factor, beta=beta.item())


def _scalar(x: Number) -> Tensor:
    return x if isinstance(x, Tensor) else torch.tensor(x, dtype=torch.float64)


def _check(w: Tensor, g: Tensor, **others: Tensor) -> None:
    if w.dtype not in (torch.float32, torch.float64):
        raise TypeError(f"w must be float32 or float64, got {w.dtype}")
    if not g.is_floating_point():
        raise TypeError(f"g must be floating point, got {g.dtype}")
    if w.ndim != 2 or g.shape != w.shape:
        raise ValueError(f"w and g must be matrices of one shape, got {tuple(w.shape)} and {tuple(g.shape)}")
    for name, x in others.items():
        if x.dtype != w.dtype:
            raise TypeError(f"{name} must be {w.dtype}, as w is, got {x.dtype}")
        if name == "product":
            fits, allowed = x.shape == w.shape, "w's shape"
        else:
            fits = x.ndim == 2 and all(n in (1, size) for n, size in zip(x.shape, w.shape, strict=True))
            allowed = "1 or w's size in each dimension"
        if not fits:
            raise ValueError(f"{name} must have {allowed}, got {tuple(x.shape)} for {tuple(w.shape)}")
    for name, x in {"g": g, **others}.items():
        if x.device != w.device:
            raise ValueError(f"{name} must be on {w.device}, as w is, got {x.device}")


def _fits(w: Tensor, g: Tensor, *others: Tensor) -> bool:
    """Whether the compiled op takes these."""
    rows = all(x.stride(1) == 1 or x.shape[1] < 2 for x in (w, g, *others))
    return rows and w.device.type in TAKEN and w.dtype == torch.float32 and g.dtype in _GRADIENTS


if COMPILED:

    @torch.library.register_fake("slimstate::sign_residual_")
    def _(w: Tensor, g: Tensor, product: Tensor, limit: Tensor, beta: float, step: float) -> None:
        torch._check(w.shape == g.shape)

    @torch.library.register_fake("slimstate::scaled_residual_")
    def _(w: Tensor, g: Tensor, factor: Tensor, beta: float) -> None:
        torch._check(w.shape == g.shape)


def samples(device: str) -> Iterator[Sample]:
    """What the compiled ops are compared with their references by."""
    values = torch.linspace(-1, 1, 70 * 140, device=device).view(70, 140)
    limits = torch.linspace(0, 0.5, 140, device=device)
    for dtype in _GRADIENTS:
        for what, rows, columns in (
            ("", slice(64), slice(128)),
            (" unaligned", slice(1, 66), slice(3, 132)),
            (" empty", slice(0), slice(8)),
        ):
            w, product = values[rows, columns], values.roll(7, 0)[rows, columns]
            g = values.flip(1).to(dtype)[rows, columns]
            for side, along in (
                ("columns", limits[None, columns]),
                ("rows", limits[rows, None]),
                ("one", limits[5:6, None]),
            ):
                name = f"{dtype} {side}{what}"
                yield Sample("sign_residual_", name, (w, g, product, along, 0.99, 0.01), sign_residual_reference_)
                yield Sample("scaled_residual_", name, (w, g, along, 0.99), scaled_residual_reference_)
    w, g, numbers = values[:5], values[5:10], [torch.tensor(x, dtype=torch.float64) for x in (0.99, 0.01)]
    yield Sample("sign_residual_of_", "", (w, g, w, limits[None], *numbers), sign_residual_reference_)
    yield Sample("scaled_residual_of_", "", (w, g, limits[None], numbers[0]), scaled_residual_reference_)
