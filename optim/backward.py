"""The per-layer mode: gradients are projected, and freed, while the backward pass runs."""

import math
import weakref
from collections.abc import Iterable
from typing import Any, NamedTuple

import torch
from torch import Tensor

from slimstate.projections import MatrixView, Projection
from slimstate.projections._base import compute_dtype

from ._adam import is_number
from ._base import Group, Optimizer
from ._projected import Arranged, Matrix, ProjectedOptimizer, due

__all__ = ["InBackward", "NeedsWhole", "in_backward"]


class NeedsWhole(ValueError):
    """This optimizer, or this setting of it, cannot work with projected gradients."""


def in_backward(
    optimizer: torch.optim.Optimizer, max_norm: float | None = None, *, early_bases: bool = False
) -> "InBackward":
    r"""Projects the gradients of an optimizer's matrices during the backward pass, and frees each at once.

    Only *when* a gradient is projected changes: as soon as autograd has finished with it, instead of in `step`. R, of
    rank rows, is added to a buffer, and `p.grad` is None again. `step` applies the sums. So the gradients of k
    micro-batches add up as ever, and all of schedulers, logging, `param_groups`, checkpoints and `state_dict` is the
    same optimizer's; with one micro-batch the weights are those of the ordinary mode bit for bit.

    Until the step, these keep whole gradients as usual: parameters that are not projected (embeddings, norms); a matrix
    whose basis is due in the next step, about 1 / `update_proj_gap` of them at a time; one that has no basis yet, that
    is all of them before the first step, unless `early_bases`. Gradient memory at any time is the buffers,

    .. math:: \sum_\text{matrices} 4\, r \max(m, n) \text{ bytes (8 for float64, and } m \text{ more in GradNormLoRP),}

    what is kept, and the layer that autograd is at.

    Gradients are clipped here, and by nothing else, since nothing else sees the buffers:

    .. math:: c = \min\Big(1, \frac{\text{max\_norm}}{\sqrt{\sum \|R\|^2 + \sum \|G\|^2} + 10^{-6}}\Big)

    scales the sums R of projected matrices, refreshed bases included, and the gradients G of all others, which is exact
    on what is applied; :math:`\|R\|` is the norm of the projected gradient :math:`Q Q^\top G`, and in GradNormLoRP that
    of the gradients of directions, projected, and of lengths.

    Works with `GaLoreAdamW`, `GradNormLoRP`, `GaLoreAdafactor`, `DCTAdamW` with a gap and without error feedback, and
    `FRUGAL` with `outer="none"`. A closure, `LISA` and `OwLore`, autocast, gradient checkpointing and
    `torch.compile(optimizer.step)` go with it. Not so `torch.nn.utils.clip_grad_norm_`, GradScaler and
    DistributedDataParallel: `step` raises where it finds that one of them was at work.

    Args:
        optimizer: one of the above; stays the optimizer to use.
        max_norm: the global norm to clip to; `math.inf` only measures it. Default None, neither.
        early_bases: fit the first basis of a matrix during the backward pass as well, to the first micro-batch's
            gradient instead of the sum. With one micro-batch nothing else differs; and no step needs all gradients.
            Default False, exact for any number of micro-batches.

    Returns:
        A handle, with the norm and the way back.

    Raises:
        TypeError: if `optimizer` is not one of this package.
        ValueError: if a step of it needs whole gradients, or parameters are divided over processes (DTensor); says why.
            For a `max_norm` that is not > 0, or `early_bases` that is not a bool.
        RuntimeError: if it is in this mode already.

    Example:
        >>> import torch
        >>> from slimstate.optim import GaLoreAdamW
        >>> model = torch.nn.Linear(16, 8)
        >>> optimizer = GaLoreAdamW(model.parameters(), lr=0.01, rank=4)
        >>> mode = in_backward(optimizer, max_norm=1.0, early_bases=True)
        >>> for _ in range(2):  # micro-batches
        ...     model(torch.ones(1, 16)).square().sum().backward()
        >>> model.weight.grad is None, mode.buffer_bytes  # 4 x 16 numbers
        (True, 256)
        >>> optimizer.step()
        >>> mode.buffer_bytes, mode.total_norm.ndim
        (0, 0)
    """
    name = type(optimizer).__name__
    if not isinstance(optimizer, ProjectedOptimizer):
        if isinstance(optimizer, Optimizer):
            raise NeedsWhole(f"{name} projects no gradients: a step of it needs whole ones")
        raise TypeError(f"optimizer must be one of slimstate.optim, got {type(optimizer).__module__}.{name}")
    if max_norm is not None and not (is_number(max_norm) and max_norm > 0):
        raise ValueError(f"max_norm must be None or a number > 0, got {max_norm!r}")
    if not isinstance(early_bases, bool):
        raise ValueError(f"early_bases must be True or False, got {early_bases!r}")
    if optimizer._in_backward is not None:
        raise RuntimeError(f"this {name} is in per-layer mode already: remove() its first handle to change it")
    return InBackward(optimizer, max_norm, early_bases)


class _Reducible(NamedTuple):
    """A matrix whose gradient need not be kept for the next step."""

    group: Group
    projection: Projection
    view: MatrixView


class InBackward:
    """The per-layer mode of an optimizer, which `in_backward` turns on.

    Attributes:
        max_norm: what the global norm is clipped to, from the next step on; None for neither norm nor clipping.
        total_norm: the norm in the last step that was taken, before clipping: a 0-d tensor, which no step waits for;
            None where there is no `max_norm`.
        reduced: parameter -> what was made of its gradients since the last step.
    """

    def __init__(self, optimizer: ProjectedOptimizer, max_norm: float | None, early_bases: bool) -> None:
        for group in optimizer.param_groups:
            self.check_group(optimizer, group)
        if not any(map(optimizer._places, optimizer.param_groups)):
            raise NeedsWhole(f"this {type(optimizer).__name__} projects no gradients: everything is selected")
        self.max_norm = max_norm
        self.total_norm: Tensor | None = None
        self.reduced: dict[Tensor, tuple[Tensor, ...]] = {}
        self._early_bases = early_bases
        self._kept: dict[Tensor, tuple[Tensor, int]] = {}
        self._reducible: dict[Tensor, _Reducible] | None = None
        self._handles: list[Any] = []
        # Parameters hold their hooks: an optimizer that was given up must not go on taking gradients.
        self._optimizer = weakref.ref(optimizer)
        optimizer._in_backward = self
        optimizer._step_supports_amp_scaling = True  # type: ignore[attr-defined]  # so that `check` hears of a GradScaler
        for group in optimizer.param_groups:
            self.watch(group["params"])

    @property
    def buffer_bytes(self) -> int:
        """The bytes that the buffers hold now."""
        return sum(r.numel() * r.itemsize for buffers in self.reduced.values() for r in buffers)

    def remove(self) -> None:
        """Returns the optimizer to its ordinary mode; what is in the buffers is dropped."""
        self.drop()
        for handle in self._handles:
            handle.remove()
        self._handles.clear()
        optimizer = self._optimizer()
        if optimizer is not None and optimizer._in_backward is self:
            optimizer._in_backward = None
            del optimizer._step_supports_amp_scaling  # type: ignore[attr-defined]

    # What follows is the optimizer's to call.

    def check_group(self, optimizer: ProjectedOptimizer, group: Group) -> None:
        """Whether a group's gradients can be projected before its step."""
        params = group["params"]
        for p in () if isinstance(params, Tensor) else params:
            if hasattr(p[1] if isinstance(p, tuple) else p, "placements"):
                raise ValueError(
                    f"{type(optimizer).__name__} has parameters that are divided over processes (DTensor): fully_shard "
                    "frees whole gradients during the backward pass by itself, and each process keeps its part; train "
                    "without in_backward"
                )
        projects = any(group[key] is not None for key in optimizer.shares)
        if projects and (reason := optimizer._needs_whole(group)):
            raise NeedsWhole(f"{type(optimizer).__name__} needs whole gradients: {reason}")

    def watch(self, params: Iterable[Tensor]) -> None:
        """Begins to take the gradients of parameters."""
        self._reducible = None
        for p in params:
            wanted = p.requires_grad
            p.requires_grad_(True)  # a frozen one may be thawed later
            self._handles.append(p.register_post_accumulate_grad_hook(self._take))
            p.requires_grad_(wanted)

    def drop(self, params: Iterable[Tensor] | None = None) -> None:
        """Forgets what was made of the gradients of parameters, or of all."""
        for p in list(self.reduced.keys() | self._kept.keys()) if params is None else params:
            self.reduced.pop(p, None)
            self._kept.pop(p, None)
        self._reducible = None

    @torch.no_grad()
    def _take(self, p: Tensor) -> None:
        """Reduces a gradient into its buffer and frees it; or leaves it until the step, and remembers its version."""
        optimizer = self._optimizer()
        if optimizer is None:
            return
        if p.grad is None:
            raise RuntimeError(f"the gradient of parameter {_name(optimizer, p)} has been taken by another hook")
        if self._reducible is None:
            self._reducible = self._planned(optimizer)
        found = self._reducible.get(p)
        reduced = None if found is None or p.grad.layout != torch.strided else self._reduced(optimizer, p, found)
        if reduced is None:
            # An accumulation is one version; after anything else the old entry stays, and does not pass `check`.
            version, before = p.grad._version, self._kept.get(p)
            if before is None or (before[0] is p.grad and before[1] == version - 1):
                self._kept[p] = p.grad, version
            return
        if p in self.reduced:
            for buffer, r in zip(self.reduced[p], reduced, strict=True):
                buffer.add_(r)
        else:
            self.reduced[p] = reduced
        p.grad = None

    def _planned(self, optimizer: ProjectedOptimizer) -> dict[Tensor, _Reducible]:
        """Whose gradients the next step does not need whole."""
        planned = {}
        for group in optimizer.param_groups:
            self.check_group(optimizer, group)  # a checkpoint may have brought another setting
            if not (places := optimizer._places(group)):
                continue
            projection = optimizer._projection(group)
            for p, place in places.items():
                state = optimizer.state.get(p, {})
                step = int(state["step"]) if "step" in state else 0
                kept = step > 0 and due(step + 1, place, len(places), group["update_proj_gap"])
                if not kept and (self._early_bases or _has_bases(state)):
                    planned[p] = _Reducible(group, projection, optimizer._view(p, group))
        return planned

    def _reduced(self, optimizer: ProjectedOptimizer, p: Tensor, found: _Reducible) -> tuple[Tensor, ...] | None:
        """What is made of a gradient; None where no basis can be fitted to it."""
        if "step" not in optimizer.state[p]:
            optimizer._create_states(only=p)
        state = optimizer.state[p]
        step = int(state["step"]) + 1
        draw = (found.group["seed"], state["stream"], step)
        matrix = Matrix(p, None, p, p.grad, state, float(step), draw, found.view)
        if not _has_bases(state):
            optimizer._refresh(matrix, found.group, found.projection, scheduled=False)
        return optimizer._reduce(matrix, found.group, found.projection) if _has_bases(state) else None

    def check(self, optimizer: ProjectedOptimizer) -> None:
        """Before a step: that what is in the buffers and what is left of the gradients belong together.

        Raises:
            RuntimeError: if somebody wrote to gradients after the backward pass.
            ValueError: if somebody changed a group to what this mode does not take.
        """
        # What GradScaler.step sets on optimizers that say they support it, and deletes only after a step.
        scaled = [vars(optimizer).pop(key, None) is not None for key in ("grad_scale", "found_inf")]
        if any(scaled):
            raise RuntimeError(
                "GradScaler does not see gradients that were projected during the backward pass, nor an overflow in "
                "them: train in bfloat16, which needs no scaling, or without in_backward"
            )
        for group in optimizer.param_groups:
            self.check_group(optimizer, group)  # somebody may have swapped its parameters
        for p in [p for p in self.reduced.keys() | self._kept.keys() if not p.requires_grad]:
            self.drop([p])
        for name, p, _ in optimizer._named():
            if p in self.reduced and p.grad is not None:
                raise RuntimeError(
                    f"parameter {name} has a gradient again, after its own was projected during the backward pass: "
                    "DistributedDataParallel, which writes one when it has reduced its buckets, does not go with "
                    "in_backward; train without one of them"
                )
            if p in self._kept:
                grad, version = self._kept[p]
                if p.grad is not grad or version != grad._version:
                    raise RuntimeError(
                        f"the gradient of parameter {name} was changed after the backward pass, those that were "
                        "projected during it were not. To clip, use in_backward(optimizer, max_norm=...), and no "
                        "clip_grad_norm_ (for a Trainer see docs/integrations.md); to drop gradients, "
                        "optimizer.zero_grad(), and not the model's; DistributedDataParallel does not go with "
                        "in_backward"
                    )

    def finish(self, prepared: list[tuple[Group, Arranged]]) -> None:
        """Clips what a step was prepared with, and empties the buffers; nothing is prepared where a step is skipped."""
        if self.max_norm is not None and prepared:
            tensors = [x.grad for _, arranged in prepared for x in arranged.dense]
            for _, arranged in prepared:
                tensors += [r for some, _ in arranged.matrices for x in some for r in x.reduced or ()]
            self.total_norm = _total_norm(tensors)
            if self.max_norm < math.inf:
                factor = (self.max_norm / (self.total_norm + 1e-6)).clamp(max=1)
                for x in tensors:
                    x.mul_(factor.to(x.device))
        self.drop()


def _has_bases(state: dict[str, Any]) -> bool:
    """Whether every matrix of a stack has a basis; read from a counter on the CPU."""
    return "refreshes" in state and all(state["refreshes"].view(-1).tolist())


def _name(optimizer: ProjectedOptimizer, p: Tensor) -> str:
    return next(name for name, q, _ in optimizer._named() if q is p)


def _total_norm(tensors: list[Tensor]) -> Tensor:
    """The global norm, in the dtype of arithmetic, where torch's has the three digits of bfloat16 gradients."""
    if not tensors:
        return torch.zeros(())
    norms = [torch.linalg.vector_norm(x, dtype=compute_dtype(x.dtype)).to(tensors[0].device) for x in tensors]
    return torch.linalg.vector_norm(torch.stack(norms))
