"""Parameters that are divided over processes: where the part of this process lies, what its state's placements are, and
the few sums that steps and refreshes need. Nothing here knows an optimizer."""

import math
from collections.abc import Callable, Generator, Iterable, Sequence
from dataclasses import dataclass, field
from functools import lru_cache
from typing import TYPE_CHECKING, Any, TypeVar

import torch
from torch import Tensor

from slimstate.ops import WHOLE, Place
from slimstate.projections import MatrixView

if TYPE_CHECKING:
    from torch.distributed import ProcessGroup
    from torch.distributed.tensor import DeviceMesh, Placement

__all__ = ["Part", "Ranks", "Sums", "local", "part_of", "together", "total_"]

T = TypeVar("T")

Sums = Generator[list[tuple[Tensor, tuple["ProcessGroup", ...]]], None, T]
"""Yields tensors and the groups over which they are to be summed, goes on when they are, and returns what follows."""


def local(x: Tensor) -> Tensor:
    """What this process holds of a tensor: its part, or the tensor itself."""
    if not hasattr(x, "placements"):
        return x
    held: Tensor = x.to_local()  # type: ignore[attr-defined]
    return held.wait() if hasattr(held, "wait") else held  # what is still on its way after a reduction


@dataclass(frozen=True, eq=False)
class Part:
    """What this process holds of a parameter, and of the state that goes with it.

    Axes are letters: of a matrix d is the compressed one and k the other, m its rows and n its columns as stored, b
    counts the matrices of a stack; of anything else each dimension has a number.

    Args:
        mesh: the processes.
        placements: how the parameter is divided, for each dimension of the mesh.
        shape: of the whole parameter.
        view: of the whole parameter as a matrix; None where it is not projected.
        held: axis -> which of its entries are here: a slice, or indices where they do not lie together.
    """

    mesh: "DeviceMesh"
    placements: tuple["Placement", ...]
    shape: tuple[int, ...]
    view: MatrixView | None
    held: dict[str, slice | Tensor]

    def divides(self, axes: str) -> bool:
        """Whether any of these axes is divided."""
        return not self.held.keys().isdisjoint(axes)

    def groups(self, axes: str) -> tuple["ProcessGroup", ...]:
        """The processes that share these axes: sums over them go through one group after the other."""
        return tuple(self.mesh.get_group(i) for i in self._dims(axes))

    def _dims(self, axes: str) -> list[int]:
        dims = [getattr(placement, "dim", None) for placement in self.placements]
        return [i for i, dim in enumerate(dims) if dim is not None and not _names(self.view, dim).isdisjoint(axes)]

    def placed(self, axes: str) -> list["Placement"]:
        """The placements of a state tensor with these axes; one that the parameter does not divide is replicated."""
        from torch.distributed.tensor import Replicate

        placed: list[Placement] = []
        for placement in self.placements:
            names = set() if (dim := getattr(placement, "dim", None)) is None else _names(self.view, dim)
            at = next((i for i, axis in enumerate(axes) if axis in names), None)
            placed.append(Replicate() if at is None else _moved(placement, at))
        return placed

    def cut(self, x: Tensor, axes: str) -> Tensor:
        """The part of a whole state tensor that is here: a view where the entries lie together."""
        for i, axis in enumerate(axes):
            where = self.held.get(axis)
            if isinstance(where, slice):
                x = x.narrow(i, where.start, where.stop - where.start)
            elif where is not None:
                x = x.index_select(i, where.to(x.device))
        return x

    def own(self, x: Tensor, axes: str) -> Tensor:
        """The part of a whole state tensor that is here, however it is divided now."""
        if not hasattr(x, "placements"):
            return self.cut(x, axes)
        return local(x.redistribute(self.mesh, self.placed(axes)))  # type: ignore[attr-defined]

    def join(self, x: Tensor, axes: str, shape: Sequence[int]) -> Tensor:
        """The DTensor whose part here is `x`."""
        from torch.distributed.tensor import DTensor

        stride = [math.prod(shape[i + 1 :]) for i in range(len(shape))]
        return DTensor.from_local(
            x.contiguous(), self.mesh, self.placed(axes), run_check=False, shape=torch.Size(shape), stride=tuple(stride)
        )

    def zeros(self, shape: Sequence[int], dtype: torch.dtype, device: torch.device, axes: str) -> Tensor:
        """A state tensor of this whole shape."""
        return self.join(torch.zeros(self.sizes(shape, axes), dtype=dtype, device=device), axes, shape)

    def sizes(self, shape: Sequence[int], axes: str) -> list[int]:
        """The sizes here of a state tensor of this whole shape."""
        return [_length(self.held[axis]) if axis in self.held else n for n, axis in zip(shape, axes, strict=True)]

    def place(self, axes: str, sizes: Sequence[int]) -> Place:
        """Where the part here of a state tensor with these axes, and these sizes here, lies in the whole.

        Exact where one axis is divided, or two of which nothing but the first is before the second; else parts of
        different processes may share random bits.
        """
        start, width, pitch, inner = 0, WHOLE.width, 0, 1
        for axis, size in zip(reversed(axes), reversed(sizes), strict=True):
            whole = size
            if (where := self.held.get(axis)) is not None:
                first = where.start if isinstance(where, slice) else int(where[0])
                start += first * inner
                whole = self.whole(axis)
                if width == WHOLE.width:
                    width, pitch = max(1, size * inner), whole * inner
            inner *= whole
        return Place(start, width, pitch)

    def whole(self, axis: str) -> int:
        """The length of an axis of the whole parameter."""
        if axis.isdigit():
            return self.shape[int(axis)]
        view = self.view
        assert view is not None
        return {"b": math.prod(view.lead), "m": view.rows, "n": view.columns, "d": view.d, "k": view.k}[axis]

    @property
    def ranks(self) -> "Ranks | None":
        """The processes that refresh a basis together: those that hold other parts of a matrix, or the same one."""
        summing = self._dims("dk")
        dims = [i for i, x in enumerate(self.placements) if i in summing or getattr(x, "dim", None) is None]
        return _ranks(tuple(self.mesh.get_group(i) for i in dims), tuple(i in summing for i in dims)) if dims else None

    def along_k(self, m: Tensor) -> Tensor:
        """A matrix (d x k) of which this process has rows d, as columns k: the same bytes, sent once."""
        if not self.divides("d"):
            return m
        from torch.distributed.tensor import Shard

        assert self.view is not None
        across = [Shard(1) if i in self._dims("d") else x for i, x in enumerate(self.placed("dk"))]
        return local(self.join(m, "dk", (self.view.d, self.view.k)).redistribute(self.mesh, across))  # type: ignore[attr-defined]

    @property
    def here(self) -> MatrixView:
        """The view of what is here; its orientation is the whole parameter's."""
        assert self.view is not None
        rows, columns = self.sizes((self.view.rows, self.view.columns), "mn")
        shape = list(self.view.shape)
        for i in range(len(shape)):
            shape[i] = _length(self.held[str(i)]) if str(i) in self.held else shape[i]
        return self.view._replace(shape=tuple(shape), rows=rows, columns=columns)


@dataclass(frozen=True)
class Ranks:
    """Processes that share the work of a refresh: one of them decomposes, the others are told.

    Args:
        groups: their process groups, one for each dimension of a mesh.
        parts: whether the processes of a group hold parts, that have to be summed, or all the same.
    """

    groups: tuple["ProcessGroup", ...]
    parts: tuple[bool, ...]
    sizes: tuple[int, ...] = field(init=False)
    place: tuple[int, ...] = field(init=False)

    def __post_init__(self) -> None:
        import torch.distributed as dist

        object.__setattr__(self, "sizes", tuple(dist.get_world_size(group) for group in self.groups))
        object.__setattr__(self, "place", tuple(dist.get_rank(group) for group in self.groups))

    def __len__(self) -> int:
        return math.prod(self.sizes)

    def owner(self, i: int) -> tuple[int, ...]:
        """The place of the process that task i falls to."""
        place = []
        for size in reversed(self.sizes):
            place.append(i % size)
            i //= size
        return tuple(reversed(place))

    @property
    def summing(self) -> tuple["ProcessGroup", ...]:
        """The groups over which parts are summed."""
        return tuple(group for group, part in zip(self.groups, self.parts, strict=True) if part)

    def sum_(self, x: Tensor, owner: tuple[int, ...]) -> None:
        """x <- the sum of all parts, for the owner; for others what was left of it on the way."""
        import torch.distributed as dist

        settled = [i for i, part in enumerate(self.parts) if not part]  # where only the owner's own group counts
        for i, group in enumerate(self.groups):
            if not self.parts[i]:
                continue
            if all(self.place[j] == owner[j] for j in settled):
                dist.reduce(x, group=group, group_dst=owner[i])
            settled.append(i)

    def broadcast_(self, x: Tensor, owner: tuple[int, ...]) -> None:
        """x <- the owner's."""
        import torch.distributed as dist

        for i in reversed(range(len(self.groups))):
            if self.place[:i] == owner[:i]:
                dist.broadcast(x, group=self.groups[i], group_src=owner[i])


_ranks = lru_cache(maxsize=256)(Ranks)


def part_of(p: Tensor, view: Callable[[], MatrixView | None] = lambda: None) -> Part | None:
    """The part of a parameter that is here; None where it is not divided but whole, as most are: nobody asks for their
    view then.

    Raises:
        NotImplementedError: for a way to divide it in which a state's axis would not lie together.
    """
    if not hasattr(p, "placements"):
        return None
    return _part(p.device_mesh, tuple(p.placements), tuple(p.shape), view())  # type: ignore[attr-defined]


@lru_cache(maxsize=4096)
def _part(
    mesh: "DeviceMesh", placements: tuple["Placement", ...], shape: tuple[int, ...], view: MatrixView | None
) -> Part:
    held: dict[str, slice | Tensor] = {}
    for dim, size in enumerate(shape):
        if not any(getattr(placement, "dim", None) == dim for placement in placements):
            continue
        index = _indices(mesh, placements, dim, size)
        held[str(dim)] = _together(index)
        if view is None:
            continue
        (name,) = _names(view, dim) & {"b", "m", "n"}
        if name == "b" and dim > 0:
            raise NotImplementedError(f"a stack of shape {shape} that is sharded on dim {dim}: shard dim 0 of it")
        inner = {"b": math.prod(shape[1 : view.batch_dims]), "m": 1, "n": math.prod(shape[dim + 1 :])}[name]
        if name == "n" and (dim != view.batch_dims + 1 or (inner > 1 and size % _parts(mesh, placements, dim))):
            raise NotImplementedError(
                f"a parameter of shape {shape} that is sharded on dim {dim}, unevenly or behind its columns' first "
                "dimension: shard its rows, or a dimension that the processes divide evenly"
            )
        if inner > 1:
            index = (index[:, None] * inner + torch.arange(inner)).view(-1)
        held |= dict.fromkeys(_names(view, dim) - {str(dim)}, _together(index))
    return Part(mesh, placements, shape, view, held)


def _names(view: MatrixView | None, dim: int) -> set[str]:
    """The axes that a dimension of a parameter belongs to."""
    if view is None:
        return {str(dim)}
    if dim < view.batch_dims:
        return {"b", str(dim)}
    if dim == view.batch_dims:
        return {"m", "k" if view.transposed else "d", str(dim)}
    return {"n", "d" if view.transposed else "k", str(dim)}


def _indices(mesh: "DeviceMesh", placements: tuple["Placement", ...], dim: int, size: int) -> Tensor:
    """Which entries of a dimension are here."""
    from torch.distributed.tensor import Replicate, distribute_tensor

    alone = [_moved(x, 0) if getattr(x, "dim", None) == dim else Replicate() for x in placements]
    index = torch.arange(size, device=mesh.device_type)
    return distribute_tensor(index, mesh, alone, src_data_rank=None).to_local().cpu()


def _parts(mesh: "DeviceMesh", placements: tuple["Placement", ...], dim: int) -> int:
    return math.prod(mesh.size(i) for i, x in enumerate(placements) if getattr(x, "dim", None) == dim)


def _moved(placement: Any, dim: int) -> Any:
    """The same division of another dimension."""
    if (factor := getattr(placement, "split_factor", None)) is not None:
        return type(placement)(dim, split_factor=factor)
    return type(placement)(dim)


def _together(index: Tensor) -> slice | Tensor:
    if not index.numel():
        return slice(0, 0)
    start, stop = int(index[0]), int(index[-1]) + 1
    return slice(start, stop) if stop - start == index.numel() else index


def _length(where: slice | Tensor) -> int:
    return where.stop - where.start if isinstance(where, slice) else where.numel()


def total_(tensors: Iterable[tuple[Tensor, tuple["ProcessGroup", ...]]], *, largest: bool = False) -> None:
    """Sums tensors over their processes in place, or takes the largest: one message for all that go the same way.

    Args:
        tensors: each with the groups over which it is summed, one after the other.
        largest: take the largest entries instead.
    """
    import torch.distributed as dist

    ways: dict[Any, list[Tensor]] = {}
    for x, groups in tensors:
        if groups:
            ways.setdefault((groups, x.dtype, x.device), []).append(x)
    for (groups, *_), some in ways.items():
        message = torch.cat([x.reshape(-1) for x in some])
        for group in groups:
            dist.all_reduce(message, dist.ReduceOp.MAX if largest else dist.ReduceOp.SUM, group=group)
        for x, y in zip(some, message.split([x.numel() for x in some]), strict=True):
            x.copy_(y.view(x.shape))


def together(tasks: Iterable[Sums[T]]) -> list[T]:
    """What the tasks return: what they yield is summed in place, in rounds, one message for all tasks of a round."""
    running, results = dict(enumerate(tasks)), {}
    while running:
        parts = []
        for i, task in list(running.items()):
            try:
                parts += next(task)
            except StopIteration as end:
                results[i] = end.value
                del running[i]
        total_(parts)
    return [results[i] for i in sorted(results)]
