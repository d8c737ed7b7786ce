"""What makes optimizers cheap over many processes: how parameters are sharded, and who refreshes which basis."""

from typing import TYPE_CHECKING

import torch
from torch import Tensor

from slimstate.projections import DenseProjection, Projection, matrix_view

from ._projected import ProjectedOptimizer
from ._sharding import Ranks

if TYPE_CHECKING:
    from torch.distributed import ProcessGroup
    from torch.distributed.tensor import Shard

__all__ = ["shard_placement", "share_refreshes"]


def shard_placement(param: Tensor, processes: int | None = None) -> "Shard | None":
    r"""The dimension to shard a parameter on so that an optimizer step sends nothing: the one that is not compressed.

    For ``fully_shard(module, shard_placement_fn=shard_placement)``. ``side="auto"``, the default everywhere here,
    compresses the shorter axis d of a matrix (d x k). Sharded along k, every process has all of d and some columns:
    Q^T G, the moments and Q U are its own. Sharded along d, which is what FSDP2 does to matrices wider than tall, each
    step sums R, r k numbers a matrix, over the processes, and each of them keeps the moments of all k columns.

    - m x n with m >= n: rows, dim 0.
    - m x n with m < n: columns, dim 1. A convolution (out, in, ...) counts as out x (in ...), and is sharded on `in`.
    - Three dimensions, experts as a rule: dim 0, whole matrices; where there are fewer of them than processes, the
      longer side of each. A wide Conv1d weight is taken for experts too; its rows are then summed over in each step.
    - FRUGAL's ``columns``, its default, are selected where rows are divided: leave this out there.
    - Vectors, scalars, and what the processes do not divide evenly (FSDP2 takes uneven shards on dim 0 only): dim 0.

    Args:
        param: of any shape.
        processes: over which FSDP shards. None counts all there are, and serves wherever these divide the columns. With
            HSDP say how many hold one copy: ``functools.partial(shard_placement, processes=8)``.

    Returns:
        A ``Shard``, or None for dim 0, FSDP2's own choice.

    Raises:
        ValueError: for `processes` below 1, or None where there is no process group yet.

    Example:
        >>> shard_placement(torch.empty(64, 256), processes=8)
        Shard(dim=1)
        >>> [shard_placement(torch.empty(shape), processes=8) for shape in [(256, 64), (64, 250), (64,)]]
        [None, None, None]
    """
    from torch.distributed.tensor import Shard

    processes = torch.distributed.get_world_size() if processes is None else processes
    if not isinstance(processes, int) or processes < 1:
        raise ValueError(f"processes must be None or an int >= 1, got {processes!r}")
    shape = tuple(param.shape)
    if len(shape) < 2:
        return None
    stack = len(shape) == 3
    if stack and shape[0] >= processes:
        return None
    view = matrix_view(shape, batch_dims=int(stack))
    dim = view.batch_dims + int(not view.transposed)
    return Shard(dim) if dim > 0 and shape[dim] % processes == 0 else None


def share_refreshes(optimizer: torch.optim.Optimizer, process_group: "ProcessGroup | None" = None) -> None:
    """Spreads the decompositions of refreshes over the processes of DistributedDataParallel, from the next step on.

    Each of n processes decomposes every n-th basis that is due in a step and broadcasts it, 4 d r bytes in float32, to
    the others. Without it every process decomposes all of them, and replicas agree only as far as their libraries give
    the same bits; with it they have the same basis for certain. It pays where a decomposition takes longer than a
    broadcast: SVD on a GPU.

    Parameters that are sharded (DTensors) are refreshed together in any case, and are not affected. The setting is not
    part of a checkpoint, and a copy of the optimizer is without it.

    Args:
        optimizer: with the same parameters and gradients in every process.
        process_group: the processes. None takes all there are.

    Raises:
        ValueError: for an optimizer that decomposes nothing (no bases, fixed or random ones), or one whose bases are
            fitted during the backward pass (`in_backward`), where processes do not come by in the same order.
        RuntimeError: if there is no process group.

    Example:
        >>> import torch.distributed as dist
        >>> from slimstate.optim import GaLoreAdamW
        >>> dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)
        >>> optimizer = GaLoreAdamW(torch.nn.Linear(64, 64).parameters())
        >>> share_refreshes(optimizer)
        >>> dist.destroy_process_group()
    """
    import torch.distributed as dist

    name = type(optimizer).__name__
    if not isinstance(optimizer, ProjectedOptimizer):
        raise ValueError(f"{name} has no bases to refresh; share_refreshes is for optimizers that project")
    if not any(_decomposes(optimizer._projection(group)) for group in optimizer.param_groups):
        named = ", ".join(sorted({repr(group["projection"]) for group in optimizer.param_groups}))
        raise ValueError(
            f"{name} with projection {named} decomposes nothing: each process draws or knows the same bases, and "
            "there is nothing to share"
        )
    if optimizer._in_backward is not None:
        raise ValueError("in_backward fits bases during the backward pass, and cannot share them: use one of both")
    if not dist.is_available() or not dist.is_initialized():
        raise RuntimeError("share_refreshes needs a process group: call torch.distributed.init_process_group before")
    group = dist.group.WORLD if process_group is None else process_group
    assert group is not None
    optimizer._sharing = Ranks((group,), (False,))


def _decomposes(projection: Projection) -> bool:
    return isinstance(projection, DenseProjection) and not projection.blind
