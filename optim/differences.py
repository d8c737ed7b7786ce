"""What training has done to weights: which singular vectors are new, and how many weights never moved."""

import math
from collections.abc import Iterator, Mapping
from numbers import Integral
from typing import NamedTuple

import torch
from torch import Tensor, nn

from slimstate.projections._base import compute_dtype
from slimstate.projections._blocks import blocks

from ._adam import is_number
from ._sharding import local

__all__ = ["UpdateSparsity", "intruder_dimensions", "update_sparsity"]

Weights = nn.Module | Mapping[str, Tensor]


class UpdateSparsity(NamedTuple):
    """What `update_sparsity` returns.

    Args:
        total: the share of all weights that have not changed.
        each: that of each parameter.
    """

    total: float
    each: dict[str, float]


@torch.no_grad()
def intruder_dimensions(before: Weights, after: Weights, *, top: int = 10, epsilon: float = 0.5) -> dict[str, int]:
    r"""How many of the leading singular vectors of each matrix are like none that it had before.

    Shuttleworth et al., 2024, https://arxiv.org/abs/2410.21228: with :math:`W_0 = \sum_i \sigma_i x_i v_i^\top` before
    and :math:`W = \sum_j \tau_j y_j z_j^\top` after, :math:`y_j` is an intruder dimension if

    .. math:: \max_i |\langle y_j, x_i \rangle| < \epsilon .

    Counted are those among the `top` largest :math:`\tau_j`. The x_i are the left singular vectors that the economic
    SVD gives, min(m, n) of them, so that in a matrix with more rows than columns a vector outside the column space of
    W_0 is an intruder too. Singular vectors of equal singular values are only known up to a rotation: of random
    matrices, whose singular values lie close together, small changes make intruders.

    Compared are the entries of two or more dimensions that both have, the first dimension against the rest. Of LoRA
    adapters give the merged model.

    Args:
        before: a module, or a dict of named tensors.
        after: the same one later.
        top: how many vectors of each matrix, an int >= 1. Default 10, the authors' code's.
        epsilon: in (0, 1]. Default 0.5, the authors' code's; the paper shows a range of them.

    Returns:
        Name -> count.

    Raises:
        ValueError: for a value out of range, if names or shapes differ, or a tensor is divided over processes.

    Example:
        >>> before = {"weight": torch.diag(torch.arange(16.0))}
        >>> after = {"weight": before["weight"] + 10 * torch.ones(16, 16)}
        >>> intruder_dimensions(before, after, top=1)
        {'weight': 1}
    """
    if not isinstance(top, Integral) or isinstance(top, bool) or top < 1:
        raise ValueError(f"top must be an int >= 1 (vectors), got {top!r}")
    if not is_number(epsilon) or not 0 < epsilon <= 1:
        raise ValueError(f"epsilon must be a number in (0, 1], got {epsilon!r}")
    counts = {}
    for name, old, new in _pairs(before, after):
        if old.ndim < 2 or not old.numel():
            continue
        x, y = (torch.linalg.svd(w.flatten(1).to(compute_dtype(w.dtype)), full_matrices=False).U for w in (old, new))
        cosines = (y[:, :top].mT @ x).abs_()
        counts[name] = int((cosines.amax(1) < epsilon).sum())
    return counts


@torch.no_grad()
def update_sparsity(before: Weights, after: Weights, *, tolerance: float = 1e-5) -> UpdateSparsity:
    r"""The share of weights that training has left as they were.

    Mukherjee et al., 2025, https://arxiv.org/abs/2505.11711:

    .. math:: 1 - \|\theta_1 - \theta_0\|_0 / n,

    where a weight counts as unchanged if :math:`|\theta_1 - \theta_0| \le` `tolerance`. They find that
    reinforcement learning changes 5 to 30 % of the weights.

    Args:
        before: a module, or a dict of named tensors.
        after: the same one later, of the same dtypes: a change of dtype alone rounds most weights.
        tolerance: >= 0. Default 1e-5, the paper's for bfloat16 weights; 0 counts those that are the same number.

    Returns:
        The share of all weights, and of each parameter.

    Raises:
        ValueError: for a value out of range, if names, shapes or dtypes differ, if there are no weights, or a tensor is
            divided over processes.

    Example:
        >>> before = {"weight": torch.zeros(4, 4)}
        >>> update_sparsity(before, {"weight": torch.eye(4)}).total
        0.75
    """
    if not is_number(tolerance) or not 0 <= tolerance < math.inf:
        raise ValueError(f"tolerance must be a number >= 0, got {tolerance!r}")
    same, sizes = {}, {}
    for name, old, new in _pairs(before, after):
        if old.dtype != new.dtype:
            raise ValueError(f"{name!r} is {old.dtype} before and {new.dtype} after: load both in the same dtype")
        if not old.is_floating_point() or not old.numel():
            continue
        a, b = old.reshape(-1), new.reshape(-1)
        dtype = compute_dtype(old.dtype)
        unchanged = [((b[s].to(dtype) - a[s].to(dtype)).abs() <= tolerance).sum() for s in blocks(a, 0, dtype.itemsize)]
        same[name], sizes[name] = sum(int(x) for x in unchanged), old.numel()
    if not sizes:
        raise ValueError("there are no weights to compare")
    return UpdateSparsity(sum(same.values()) / sum(sizes.values()), {name: same[name] / n for name, n in sizes.items()})


def _pairs(before: Weights, after: Weights) -> Iterator[tuple[str, Tensor, Tensor]]:
    """(name, before, after), each checked."""
    old, new = (dict(x.named_parameters()) if isinstance(x, nn.Module) else dict(x) for x in (before, after))
    if different := sorted(old.keys() ^ new.keys()):
        where = "before" if different[0] in old else "after"
        raise ValueError(f"{different[0]!r} is only in `{where}`: both must have the same names (merge adapters first)")
    for name, a in old.items():
        b = new[name]
        if a.shape != b.shape:
            raise ValueError(f"{name!r} has shape {tuple(a.shape)} before and {tuple(b.shape)} after")
        if local(a) is not a or local(b) is not b:
            raise ValueError(f"{name!r} is divided over processes: give full tensors (`full_tensor()`)")
        yield name, a, b.to(a.device)
