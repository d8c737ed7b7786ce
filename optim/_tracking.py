"""Steps on the meta device, which has shapes and no memory, and the bytes that they would have held."""

import warnings
import weakref
from collections.abc import Callable, Iterable
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from ._base import Group, Optimizer
from ._projected import TOGETHER_BYTES, ProjectedOptimizer
from ._sharding import local
from .backward import in_backward

__all__ = ["Tracking", "alike", "buffer_bytes", "bytes_of", "on_meta", "steps_of"]

STANDING = 8  # so many small parameters of one shape and group stand for all of them


def bytes_of(values: Iterable[Any]) -> int:
    """The bytes of the storages of those values that are tensors, each counted once; of DTensors the part here."""
    storages = [local(value).untyped_storage() for value in values if isinstance(value, Tensor)]
    # Not by address, which is 0 on the meta device.
    return sum({storage._cdata: storage.nbytes() for storage in storages}.values())


def on_meta(x: Tensor, dtype: torch.dtype | None = None) -> Tensor:
    """A tensor of x's shape and strides; a parameter for a parameter. Only floating-point ones take the dtype."""
    to = dtype if dtype is not None and x.is_floating_point() else x.dtype
    y = torch.empty_like(x, device="meta", dtype=to, requires_grad=False)
    return nn.Parameter(y, requires_grad=x.requires_grad) if isinstance(x, nn.Parameter) else y


def alike(p: Tensor) -> Any:
    """The same for parameters that a step of one group treats alike."""
    return p.shape, p.stride(), p.dtype


class Tracking(TorchDispatchMode):
    """Counts the storages that operations allocate and that are alive at a time.

    The meta device computes shapes and no values. What Python asks a tensor for is 1, or False: gradients are then
    finite and not zero, and no short cut is taken.

    Attributes:
        peak: the most bytes alive at once, of those that were allocated and given back.
        shared: the bytes of tensors that were there and are nobody's, such as cosine matrices, or that stayed.
    """

    def __init__(self, known: Iterable[Tensor]) -> None:
        super().__init__()
        self.shared = 0
        self._alive = self._most = 0
        self._known = {x.untyped_storage()._cdata for x in known}

    @property
    def peak(self) -> int:
        """See above."""
        return max(0, self._most - self._alive)

    def __torch_dispatch__(
        self, function: Any, types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        """Runs an operation, and counts what it returns."""
        if function is torch.ops.aten._local_scalar_dense.default and args[0].is_meta:
            return args[0].dtype != torch.bool and 1
        for x in _tensors((args, kwargs)):
            self._count(x, self._found)
        result = function(*args, **(kwargs or {}))
        for x in _tensors(result):
            self._count(x, self._allocated)
        return result

    def __exit__(self, *exception: Any) -> None:
        """What is still there stays."""
        super().__exit__(*exception)
        self.shared += self._alive

    def _count(self, x: Tensor, how: Callable[[torch.UntypedStorage], None]) -> None:
        storage = x.untyped_storage()
        if storage._cdata not in self._known:
            self._known.add(storage._cdata)
            how(storage)

    def _found(self, storage: torch.UntypedStorage) -> None:
        if storage.device.type == "meta":
            self.shared += storage.nbytes()

    def _allocated(self, storage: torch.UntypedStorage) -> None:
        size = storage.nbytes()
        self._alive += size
        self._most = max(self._most, self._alive)
        weakref.finalize(storage, self._freed, storage._cdata, size)

    def _freed(self, key: int, size: int) -> None:
        self._known.discard(key)
        self._alive -= size


def _tensors(x: Any) -> list[Tensor]:
    return [leaf for leaf in tree_leaves(x) if isinstance(leaf, Tensor)]


def steps_of(optimizer: Optimizer) -> dict[str, int]:
    """The most bytes that a step holds for a moment, how many more one does that fits bases, and what both share.

    A few parameters of each shape stand for all of them: single ones where they are large, since those are stepped one
    after another.

    Args:
        optimizer: over parameters on the meta device; those with a gradient take part. It is not changed.
    """
    peak = fitting = shared = 0
    gaps = [group.get("update_proj_gap", 1) for group in optimizer.param_groups]
    for usual in (True, False) if max(gaps) > 1 else (True,):
        some = _standing(optimizer, STANDING if usual else 1)
        if not usual:  # bases are due in one of two steps
            some = [group | {"update_proj_gap": min(group.get("update_proj_gap", 1), 2)} for group in some]
        if not some:
            break
        one = _again(optimizer, some)
        one._create_states()
        for state in one.state.values():
            state["step"].fill_(1 if usual else 2)
            if "refreshes" in state:
                state["refreshes"].fill_(1)
        for _ in range(1 if usual else 2):
            with Tracking(_kept(one)) as tracking, torch.no_grad():
                one._step_groups(one._started(compiling=False))
            fitting, shared = max(fitting, tracking.peak), max(shared, tracking.shared)
        peak = tracking.peak if usual else peak
    return {"temporaries": peak, "refresh": fitting - peak, "shared": shared}


def buffer_bytes(optimizer: ProjectedOptimizer, group: Group, p: Tensor) -> int:
    """The bytes of what is made of a gradient in the per-layer mode."""
    one = _again(optimizer, [group | {"params": [p]}])
    assert isinstance(one, ProjectedOptimizer)
    mode = in_backward(one)
    one._create_states()
    one.state[p]["refreshes"].fill_(1)
    with Tracking(_kept(one)), torch.no_grad():
        reduced = mode._reduced(one, p, mode._planned(one)[p])
    mode.remove()
    assert reduced is not None
    return bytes_of(reduced)


def _again(optimizer: Optimizer, groups: list[Group]) -> Optimizer:
    """Another optimizer of the same kind."""
    make: Callable[..., Optimizer] = type(optimizer)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # the first one has warned
        return make([{key: x for key, x in group.items() if key != "param_names"} for group in groups])


def _standing(optimizer: Optimizer, count: int) -> list[Group]:
    """The groups with the first few parameters of each shape that have a gradient."""
    groups = []
    for group in optimizer.param_groups:
        chosen: dict[Any, list[Tensor]] = {}
        for p in group["params"]:
            kind = chosen.setdefault(alike(p), [])
            if p.grad is not None and len(kind) < (count if p.numel() <= TOGETHER_BYTES else 1):
                kind.append(p)
        if params := [p for p in group["params"] if any(p is q for q in chosen[alike(p)])]:
            groups.append(group | {"params": params})
    return groups


def _kept(optimizer: Optimizer) -> list[Tensor]:
    """Parameters, gradients and states."""
    params = [p for group in optimizer.param_groups for p in group["params"]]
    states = [x for state in optimizer.state.values() for x in state.values() if isinstance(x, Tensor)]
    return [*params, *(p.grad for p in params if p.grad is not None), *states]
