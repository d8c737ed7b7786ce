"""What the optimizers share whose moments live in a subspace: which matrices are projected, when their bases change,
and what then becomes of the moments."""

import math
import warnings
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass, fields, replace
from functools import lru_cache, partial
from numbers import Integral
from typing import TYPE_CHECKING, Any, ClassVar, NamedTuple, TypeVar

import torch
from torch import Tensor
from torch.optim.optimizer import ParamsT

from slimstate.ops import Place
from slimstate.ops.codes import Layout
from slimstate.projections import SVD, MatrixView, PowerIteration, Projection, RandomOrthogonal
from slimstate.projections._base import DenseProjection, IndexProjection, check_rank, compute_dtype
from slimstate.projections._bases import BASIS_DTYPES, Basis, Kept, decode, encode, wide
from slimstate.projections._blocks import largest_magnitude
from slimstate.projections._matrix import SIDES

from ._adam import adamw_step_, check_adam, is_number, moments_spec, weight_spec
from ._base import Entry, Group, Optimizer, Spec, State
from ._loading import misfit
from ._moments import EXP_AVG, EXP_AVG_SQ, SCALES, moment_of
from ._sharding import Part, Ranks, local, part_of, total_
from .groups import shape_text, table

if TYPE_CHECKING:
    from .backward import InBackward

__all__ = [
    "DEFAULT_RANK",
    "Arranged",
    "Matrix",
    "ProjectedOptimizer",
    "Task",
    "counts_apart",
    "due",
    "matrix_of",
    "rotated",
    "tasks_of",
    "view_of",
]

DEFAULT_RANK = 0.25  # of the smaller side: about what GaLore takes, 128 of 512 to 1024 of 4096
TOGETHER_BYTES = 1 << 20  # of projected gradients; larger ones are given back to the system and faulted in again
ROTATED_EXP_AVG, ROTATED_EXP_AVG_SQ = 3, 4  # purposes of random bits, after `_adam`'s
PROJECTED = (EXP_AVG, EXP_AVG_SQ, ROTATED_EXP_AVG, ROTATED_EXP_AVG_SQ)  # those of what has R's shape

KEPT = frozenset({"basis", "basis_scale"})  # of a dense projection

BasisT = TypeVar("BasisT", bound=Basis)

# galore-torch's names for the side
PROJ_TYPES = {"std": "auto", "reverse_std": "reverse", "left": "left", "right": "right"}


@dataclass(frozen=True, slots=True, eq=False)
class Matrix(Entry):
    """A projected parameter in a step.

    Args:
        view: how p is seen as a matrix, or a stack of them.
        reduced: what `_reduce` made of its gradient where that was needed, or is gone, already.
    """

    layout: ClassVar[Layout] = "columns"

    view: MatrixView
    reduced: tuple[Tensor, ...] | None = None

    @property
    def whole(self) -> MatrixView:
        """How the whole parameter is seen."""
        return self.view if self.part is None or self.part.view is None else self.part.view

    def place(self, purpose: int) -> Place:
        """As `Entry.place`; what is kept of the projection has axes of its own."""
        if self.part is None or purpose not in PROJECTED:
            return super(Matrix, self).place(purpose)
        rank = self.basis.shape[-1]
        return self.part.place("b" * len(self.view.lead) + "rk", (*self.view.lead, rank, self.view.k))

    @property
    def basis(self) -> Basis:
        """What is kept of the projection."""
        kept: Tensor = self.state["basis" if "basis" in self.state else "index"]
        dtype = compute_dtype(self.p.dtype)
        if kept.dtype in (dtype, torch.int32):
            return kept
        return Kept(kept, self.state.get("basis_scale"), dtype)

    @property
    def m(self) -> Tensor:
        """The gradient M (d x k), or a stack of them; a copy only where memory has no such view: not to be kept."""
        return self.view.open(self.grad)

    def member(self, x: BasisT, j: int) -> BasisT:
        """What belongs to matrix j of the stack; all of it where there is one matrix."""
        return x[j] if self.view.lead else x  # type: ignore[return-value]


class Arranged(NamedTuple):
    """A group's parameters in a step: those without a basis, and the others in lists that are updated together."""

    dense: list[Entry]
    matrices: list[tuple[list[Matrix], Projection]]


class ProjectedOptimizer(Optimizer):
    """Projects the matrices of groups that have a rank, gives AdamW to everything else, and refreshes the bases.

    A method says what it does with projected gradients in `_update`; where its moments, its dense rule or what its
    bases are fitted to are not AdamW's, it says so in the other hooks.
    """

    projections: ClassVar[dict[str, Projection]] = {
        "svd": SVD(),
        "power": PowerIteration(),
        "random": RandomOrthogonal(),
    }
    """What a group may name; it sets those of their hyperparameters that it has keys for."""

    transports: ClassVar[tuple[str, ...]] = ("rotate", "keep", "reset")

    axes: ClassVar[dict[str, str]] = {
        "exp_avg": "rk",
        "exp_avg_sq": "rk",
        "basis": ".r",
        "basis_scale": "..",
        "index": "r",
    }
    """The axes of what is kept of a projected matrix, where they are not the parameter's own; see `Part`."""

    shares: ClassVar[tuple[str, ...]] = ("rank",)
    """The keys of which one, where it is not None, says how much of a group's matrices is selected."""

    _in_backward: "InBackward | None" = None
    """The per-layer mode, while it is on; a copy of the optimizer is without."""

    _sharing: Ranks | None = None
    """Who shares the work of refreshes of parameters that everyone has; a copy of the optimizer is without."""

    def __init__(self, params: ParamsT, defaults: Group) -> None:
        defaults = defaults | self._unfolded(defaults)
        if not isinstance(params, Tensor):
            params = list(params)  # type: ignore[assignment]
            asked = [group for group in params if isinstance(group, dict) and not group.keys().isdisjoint(self.shares)]
            for key in self.shares if asked else ():
                if defaults[key] not in (None, DEFAULT_RANK, *(group.get(key) for group in asked)):
                    raise ValueError(f"{key}={defaults[key]!r} applies to no group: the projected ones set their own")
                defaults[key] = None  # as in galore-torch: then groups without one are dense
        super().__init__(params, defaults)
        if not any(self._is_chosen(p, group) for _, p, group in self._named()):
            raise ValueError(
                "no parameter can be projected: a rank needs a non-empty parameter of two or more dimensions "
                f"(flat partitions have lost theirs); got shapes {[tuple(p.shape) for _, p, _ in self._named()][:4]}"
            )

    def _reduce(self, matrix: Matrix, group: Group, projection: Projection) -> tuple[Tensor, ...]:
        """What `_update` needs of a gradient, and linear in it: R (r x k), or a stack of them."""
        return (projection.down(matrix.m, matrix.basis),)

    def _update(
        self, matrices: list[Matrix], reduced: list[tuple[Tensor, ...]], group: Group, projection: Projection
    ) -> None:
        """Updates projected parameters, from what `_reduce` made of their gradients after the bases that were due have
        been refreshed."""
        raise NotImplementedError

    def _check_rule(self, group: Group) -> None:
        """Checks the hyperparameters of the rule that turns gradients into steps."""
        check_adam(group)

    def _moments_spec(self, p: Tensor, group: Group) -> Spec:
        """The moments that the rule keeps of a gradient, projected or not."""
        return moments_spec(p, group, self._moment_shape(p, group), self._layout(p, group))

    def _dense_step_(self, entries: list[Entry], group: Group) -> None:
        """Updates the parameters that are not projected."""
        adamw_step_(entries, group)

    def _inform(self, matrices: list[Matrix]) -> None:
        """Puts into their dicts what has to be known of other processes' parts before `_fitted_to`."""

    def _fitted_to(self, matrix: Matrix, group: Group, j: int) -> Tensor:
        """What the basis of matrix j of the stack is fitted to (d x k)."""
        m = matrix.view.members(matrix.grad)[j].reshape(matrix.view.rows, matrix.view.columns)
        return m.mT if matrix.view.transposed else m

    def _rotate_(self, matrix: Matrix, group: Group, j: int, overlap: Tensor) -> None:
        """Carries the moments of matrix j of the stack into a new basis; overlap = Q_new^T Q_old."""
        mean = moment_of(matrix, "exp_avg", ROTATED_EXP_AVG).member(j)
        second = moment_of(matrix, "exp_avg_sq", ROTATED_EXP_AVG_SQ).member(j)
        wide = mean.read(overlap.dtype), second.read(overlap.dtype)
        for moment, value in zip(
            (mean, second), rotated(*wide, overlap, group["betas"], float(matrix.step) - 1), strict=True
        ):
            moment.write_(value, copied=True)

    def _needs_whole(self, group: Group) -> str | None:
        """Why a step needs whole gradients of the matrices that this group projects, if it does."""
        if group["update_proj_gap"] == 1:
            return "update_proj_gap=1 chooses a subspace for the whole gradient in every step"
        return None

    # Groups.

    def _unfolded(self, defaults: Group) -> Group:
        """A projection object as the primitives that groups hold."""
        projection = defaults["projection"]
        if not isinstance(projection, Projection):
            return {}
        values = {f.name: getattr(projection, f.name) for f in fields(projection) if f.name in defaults}
        for f in fields(projection):
            if f.name in values and defaults[f.name] not in (f.default, values[f.name]):
                raise ValueError(f"{f.name}={defaults[f.name]!r} contradicts projection={projection!r}")
        for name, known in self.projections.items():
            if type(known) is type(projection) and replace(known, **values) == projection:
                return {"projection": name, **values}
        raise ValueError(f"projection must be one of {', '.join(self.projections)}, got {projection!r}")

    def add_param_group(self, param_group: Group) -> None:
        """As `Optimizer.add_param_group`; understands galore-torch's `proj_type`."""
        if isinstance(param_group, dict):
            param_group = dict(param_group)
            if "dim" in param_group:
                raise NotImplementedError("dim: leave it out; a tensor is seen as a matrix, dim 0 against the rest")
            if "proj_type" in param_group:
                proj_type = param_group.pop("proj_type")
                if proj_type == "full":
                    raise NotImplementedError("proj_type='full' (both sides) is not supported; use 'std'")
                if proj_type not in PROJ_TYPES:
                    raise ValueError(f"proj_type must be one of {', '.join(PROJ_TYPES)}, got {proj_type!r}")
                if param_group.setdefault("side", PROJ_TYPES[proj_type]) != PROJ_TYPES[proj_type]:
                    raise ValueError(f"proj_type={proj_type!r} contradicts side={param_group['side']!r}")
            self._check_explicit_share(param_group)
            if self._in_backward is not None:
                self._in_backward.check_group(self, self.defaults | param_group)
        super().add_param_group(param_group)
        try:
            self._report_clamped(self.param_groups[-1])
        except UserWarning:  # where warnings are errors
            self.param_groups.pop()
            raise
        if self._in_backward is not None:
            self._in_backward.watch(self.param_groups[-1]["params"])

    def _check_explicit_share(self, param_group: Group) -> None:
        key = next((key for key in self.shares if param_group.get(key) is not None), None)
        if key is None or isinstance(param_group["params"], Tensor | set):
            return
        param_group["params"] = list(param_group["params"])
        tensors = [p[1] if isinstance(p, tuple) else p for p in param_group["params"]]
        group = self.defaults | param_group
        self._check(group)
        if not any(isinstance(p, Tensor) and self._is_chosen(p, group) for p in tensors):
            raise ValueError(
                f"{key}={group[key]!r} is set for a group without a non-empty parameter of two or more dimensions "
                f"(beside batch_dims={group['batch_dims']}); leave it out there"
            )

    def _check(self, group: Group) -> None:
        self._check_rule(group)
        if group["rank"] is not None:
            group["rank"] = check_rank(group["rank"])
        gap = group["update_proj_gap"]
        if not isinstance(gap, Integral) or isinstance(gap, bool) or gap < 1:
            raise ValueError(f"update_proj_gap must be an int >= 1 (steps), got {gap!r}")
        group["update_proj_gap"] = int(gap)
        if not is_number(group["scale"]) or not group["scale"] >= 0:
            raise ValueError(f"scale must be a number >= 0, got {group['scale']!r}")
        group["scale"] = float(group["scale"])
        if group["projection"] not in self.projections:
            raise ValueError(f"projection must be one of {', '.join(self.projections)}, got {group['projection']!r}")
        if group.get("basis_dtype") is not None:
            self._check_basis_dtype(group)
        if group["side"] not in SIDES:
            raise ValueError(f"side must be one of {', '.join(SIDES)}, got {group['side']!r}")
        if group["transport"] not in self.transports:
            raise ValueError(f"transport must be one of {', '.join(self.transports)}, got {group['transport']!r}")
        if not isinstance(group["batch_dims"], Integral) or group["batch_dims"] < 0:
            raise ValueError(f"batch_dims must be an int >= 0, got {group['batch_dims']!r}")
        group["batch_dims"] = int(group["batch_dims"])

    def _check_basis_dtype(self, group: Group) -> None:
        if isinstance(group["basis_dtype"], torch.dtype):
            group["basis_dtype"] = str(group["basis_dtype"]).removeprefix("torch.")
        if group["basis_dtype"] not in BASIS_DTYPES:
            allowed = ", ".join(BASIS_DTYPES)
            raise ValueError(f"basis_dtype must be None or one of {allowed}, got {group['basis_dtype']!r}")
        if not isinstance(self.projections[group["projection"]], DenseProjection):
            raise ValueError(
                f"basis_dtype={group['basis_dtype']!r} needs a projection with a dense basis (svd, power or random), "
                f"got {group['projection']!r}"
            )

    def _report_clamped(self, group: Group) -> None:
        if not isinstance(group["rank"], int):
            return
        views = [self._view(p, group) for p in group["params"] if self._is_chosen(p, group)]
        clamped = [view for view in views if group["rank"] > self._projection(group).rank_of(view.d, view.k)]
        if clamped:
            warnings.warn(
                f"rank {group['rank']} is above the smaller side of {len(clamped)} of {len(views)} matrices, such as "
                f"{clamped[0].shape}, and is clamped to it there: nothing is saved",
                stacklevel=2,
            )

    def _is_chosen(self, p: Tensor, group: Group) -> bool:
        """Whether the group wants this parameter's state compressed, and its shape allows it."""
        if p.ndim < group["batch_dims"] + 2 or not p.numel():
            return False
        return any(group[key] is not None for key in self.shares)

    def _has_shape(self, p: Tensor, group: Group) -> bool:
        return self._is_chosen(p, group)

    def _is_projected(self, p: Tensor, group: Group) -> bool:
        """Whether it has a basis."""
        return self._is_chosen(p, group)

    def _layout(self, p: Tensor, group: Group) -> Layout:
        return Matrix.layout if self._is_projected(p, group) else super()._layout(p, group)

    def _moment_shape(self, p: Tensor, group: Group) -> tuple[int, ...]:
        """R's, a stack of them's, or the parameter's own."""
        if not self._is_projected(p, group):
            return tuple(p.shape)
        projection, view = self._projection(group), self._view(p, group)
        return (*view.lead, projection.rank_of(view.d, view.k), view.k)

    def _projection(self, group: Group) -> Projection:
        known = self.projections[group["projection"]]
        return _adapted(known, **{key: group[key] for key in known.__dataclass_fields__ if key in group})

    def _view(self, p: Tensor, group: Group) -> MatrixView:
        return self._projection(group).view(tuple(p.shape), group["batch_dims"])

    def report(self) -> str:
        """A table of what every parameter gets: its shape, how it is compressed, and the bytes of its state."""
        rows, total = [], 0
        for name, p, group in self._named():
            held = self._held(p, group).values()
            size = sum(math.prod(shape) * dtype.itemsize for shape, dtype in held)
            rows.append((name, shape_text(tuple(p.shape)), self._how(p, group), f"{size:,} B"))
            total += size
        return f"{table(rows)}\nstate in total: {total:,} B"

    def _held(self, p: Tensor, group: Group) -> Spec:
        """The tensors that the state consists of now, or after a first step."""
        return self._spec(p, group) | {"step": ((), torch.float32)}

    def _how(self, p: Tensor, group: Group) -> str:
        """How a parameter's state is compressed."""
        if not self._is_projected(p, group):
            return "dense"
        projection, view = self._projection(group), self._view(p, group)
        side = "right" if view.transposed else "left"
        kept = "" if group.get("basis_dtype") is None else f", {group['basis_dtype']} basis"
        return f"{group['projection']}, {side}: {projection.rank_of(view.d, view.k)} of {view.d}{kept}"

    def __repr__(self) -> str:
        everything = list(self._named())
        projected = sum(self._is_chosen(p, group) for _, p, group in everything)
        return (
            f"{super().__repr__()}\n{projected} of {len(everything)} parameters are projected, every matrix of a group "
            "with a rank (embeddings too); see report()"
        )

    # State.

    def _spec(self, p: Tensor, group: Group) -> Spec:
        if not self._is_projected(p, group):
            return self._moments_spec(p, group) | weight_spec(p, group)
        projection, view = self._projection(group), self._view(p, group)
        spec = self._moments_spec(p, group)
        basis, kept = (*view.lead, *projection.shape_of(view)), group.get("basis_dtype")
        spec[projection.key] = (basis, BASIS_DTYPES[kept] if kept else projection.dtype_of(p.dtype))
        if kept == "8bit":
            spec["basis_scale"] = ((*basis[:-1], 1), compute_dtype(p.dtype))
        spec["refreshes"] = (view.lead, torch.int32)
        if group["transport"] == "reset":
            spec["age"] = ((), torch.int32)
        return spec | weight_spec(p, group)

    def _reformed(self, state: State, spec: Spec, dtype: torch.dtype) -> State:
        """Bases that are kept in another dtype than the spec's are brought to it."""
        basis, scale = state.get("basis"), state.get("basis_scale")
        if not isinstance(basis, Tensor) or "basis" not in spec:
            return state
        to = spec["basis"][1]
        if to == torch.int8 and basis.is_floating_point() and basis.ndim > 1:
            codes, scale = encode(basis.to(dtype))
            return state | {"basis": codes, "basis_scale": scale}
        if to != torch.int8 and basis.dtype == torch.int8 and isinstance(scale, Tensor):
            rest = {key: x for key, x in state.items() if key != "basis_scale"}
            return rest | {"basis": decode(basis, scale, dtype).to(to)}
        return state

    def zero_grad(self, set_to_none: bool = True) -> None:
        """As torch's; what was made of gradients during the backward pass is dropped too."""
        if self._in_backward is not None:
            self._in_backward.drop()
        super().zero_grad(set_to_none)

    def forget(self, params: Iterable[Tensor]) -> None:
        """As `Optimizer.forget`; what was made of their gradients during the backward pass is dropped too."""
        params = list(params)
        super().forget(params)
        if self._in_backward is not None:
            self._in_backward.drop(params)

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """As `Optimizer.load_state_dict`; what was made of gradients during the backward pass is dropped."""
        super().load_state_dict(state_dict)
        if self._in_backward is not None:
            self._in_backward.drop()

    def _axes(self, key: str, p: Tensor, group: Group) -> str:
        axes = ".k" if key in SCALES else self.axes.get(key)
        if axes is None or not self._is_projected(p, group):
            return super()._axes(key, p, group)
        return "b" * len(self._view(p, group).lead) + axes

    def _part(self, p: Tensor, group: Group) -> Part | None:
        return part_of(p, lambda: self._view(p, group) if self._is_projected(p, group) else None)

    def _check_state(self, name: str, p: Tensor, group: Group, state: State) -> None:
        super()._check_state(name, p, group, state)
        if not self._is_projected(p, group):
            return
        state = {key: local(x) if isinstance(x, Tensor) else x for key, x in state.items()}
        if not state["step"]:  # a basis may be there, see `in_backward`
            for key in self._moments_spec(p, group):  # codes are of zeros where their scale is
                if f"{key}_scale" not in state and state[key].any():
                    raise misfit(f"{key!r} of parameter {name} is not zero, which cannot be at its 'step' 0")
        if (index := state.get(IndexProjection.key)) is None:
            return
        d, part, fitted = self._view(p, group).d, self._part(p, group), state["refreshes"].to(index.device) > 0
        if part is not None:
            fitted = part.cut(fitted, "b" * fitted.ndim)
        if (index >= d).any() or ((index.diff() <= 0).any(-1) & fitted).any():
            raise misfit(f"'index' of parameter {name} must be sorted, without repetitions and below {d}")

    # Steps.

    @torch.compiler.disable
    def _prepared(self, *, compiling: bool) -> list[tuple[Group, Any]]:
        if self._in_backward is None:
            return super()._prepared(compiling=compiling)
        self._in_backward.check(self)
        prepared = super()._prepared(compiling=compiling)
        self._in_backward.finish(prepared)
        return prepared

    def _gradients(self, p: Tensor) -> tuple[Tensor, ...]:
        reduced = None if self._in_backward is None else self._in_backward.reduced.get(p)
        return reduced or super()._gradients(p)

    def _places(self, group: Group) -> dict[Tensor, int]:
        """The projected matrices of a group, and the order in which they are refreshed."""

        def is_projected(p: Tensor) -> bool:  # a state that is there says so, in less time
            state = self.state.get(p, {})
            return "refreshes" in state if "step" in state else self._is_projected(p, group)

        return {p: i for i, p in enumerate(p for p in group["params"] if is_projected(p))}

    def _arranged(self, group: Group, entries: list[Entry]) -> Arranged:
        """Refreshes the bases that are due, and one that is not there yet."""
        places = self._places(group)
        if not places:
            return Arranged(entries, [])
        projection = self._projection(group)
        dense: list[Entry] = []
        matrices: list[Matrix] = []
        due_now: list[tuple[Matrix, bool]] = []
        for x in entries:
            if (place := places.get(x.param)) is None:
                dense.append(x)
                continue
            matrix = matrix_of(x, projection, group)
            matrices.append(matrix)
            if x.gradient is not None:
                step = int(x.state["step"])  # at the first, a basis that is there already is one of this gradient
                scheduled = step > 1 and due(step, place, len(places), group["update_proj_gap"])
                due_now.append((matrix, scheduled))
        self._refresh_all(due_now, group, projection)
        if self._in_backward is not None:
            for i, x in enumerate(matrices):  # those that kept their gradients too: for the norm, and for compilers
                reduced = self._in_backward.reduced.get(x.param) or self._reduce(x, group, projection)
                matrices[i] = replace(x, gradient=None, reduced=reduced)
        if ages := [x.state["age"] for x in matrices if "age" in x.state]:
            torch._foreach_add_(ages, 1)
        whole = [x for x in matrices if x.part is None]
        divided = [self._divided(x, group, projection) for x in matrices if x.part is not None]
        lists = [(some, projection) for some in _in_blocks(whole, projection)]
        return Arranged(dense, lists + [pair for pair in divided if pair is not None])

    def _divided(self, matrix: Matrix, group: Group, projection: Projection) -> tuple[list[Matrix], Projection] | None:
        """A matrix of which this process holds a part, and the projection as it acts on that; None for an empty one.

        Where the compressed axis is divided, this process has some rows of Q, and adds its share to R.
        """
        assert matrix.part is not None
        if not matrix.part.divides("d"):
            return ([matrix], projection) if matrix.p.numel() else None
        matrix, projection = self._on_rows(matrix, projection)
        return [replace(matrix, reduced=self._reduce(matrix, group, projection))], projection

    def _on_rows(self, matrix: Matrix, projection: Projection) -> tuple[Matrix, Projection]:
        """A matrix of which this process has some rows d, with these rows of its basis."""
        assert matrix.part is not None
        axes = "." * len(matrix.view.lead) + "dr"
        kept = {key: matrix.part.cut(matrix.state[key], axes) for key in KEPT & matrix.state.keys()}
        return replace(matrix, state=matrix.state | kept), projection

    def _exchange(self, prepared: list[tuple[Group, Any]]) -> None:
        """Sums the projections R of matrices whose compressed axis is divided."""
        matrices = [x for _, arranged in prepared for some, _ in arranged.matrices for x in some if x.part is not None]
        total_([(x.reduced[0], x.part.groups("d")) for x in matrices if x.reduced is not None and x.part is not None])

    def _step_group(self, group: Group, entries: Arranged) -> None:
        self._dense_step_(entries.dense, group)
        for some, projection in entries.matrices:
            reduced = [x.reduced or self._reduce(x, group, projection) for x in some]
            self._update(some, reduced, group, projection)

    def _refresh_all(self, matrices: list[tuple[Matrix, bool]], group: Group, projection: Projection) -> None:
        """Fits the bases that are due, as the flags say, together with the processes that hold or share them."""
        stacks = [x for x, scheduled in matrices if counts_apart(x, scheduled)]
        together: dict[Ranks, list[Task]] = {}
        for matrix, scheduled in matrices:
            if (ranks := self._ranks(matrix)) is None:
                self._refresh(matrix, group, projection, scheduled=scheduled)
            else:
                together.setdefault(ranks, []).extend(tasks_of(matrix, scheduled))
        for ranks, tasks in together.items():
            for i in range(0, len(tasks), len(ranks)):
                self._refresh_together(tasks[i : i + len(ranks)], ranks, group, projection)
        self._share_counts(stacks, group)

    def _share_counts(self, stacks: list[Matrix], group: Group) -> None:
        """Brings the counts of stacks together whose matrices were refreshed by several processes."""
        counted = [(x, x.state["refreshes"].to(x.p.device)) for x in stacks]
        # Negated: where one process has begun anew, the moments of all matrices do.
        ages = [(x, -x.state["age"].to(x.p.device)) for x in stacks if "age" in x.state]
        total_([(mark, x.part.groups("b")) for x, mark in counted + ages if x.part], largest=True)
        for x, counts in counted:
            x.state["refreshes"].copy_(counts)
        for x, negated in ages:
            if x.state["age"] > -negated.cpu():
                self._reset_(x, group)

    def _ranks(self, matrix: Matrix) -> Ranks | None:
        """The processes that refresh a matrix together; None where this one does it alone."""
        return self._sharing if matrix.part is None else matrix.part.ranks

    def _refresh(self, matrix: Matrix, group: Group, projection: Projection, *, scheduled: bool) -> None:
        """Fits a new basis where it is due, and carries the moments over.

        A matrix that has no basis yet is due at every step. One whose gradient is zero or not finite keeps what it has.
        """
        for task in tasks_of(matrix, scheduled):
            gradient = self._fitted_to(matrix, group, task.j)
            if _usable(largest_magnitude(gradient).item()):
                self._renew_(task, group, projection, projection.fit(gradient, task.old(projection), task.counter))

    def _refresh_together(self, tasks: list["Task"], ranks: Ranks, group: Group, projection: Projection) -> None:
        """As `_refresh`, at most one matrix for each process: what a fit needs of the parts is summed where it is
        fitted, and everyone gets the basis from there."""
        gradients = [self._fitted_to(task.matrix, group, task.j) for task in tasks]
        sizes = torch.stack([_largest(gradient) for gradient in gradients])
        total_([(sizes, ranks.summing)], largest=True)
        mine: Callable[[], Tensor] | None = None
        work: list[tuple[Task, tuple[int, ...]]] = []
        for i, (task, gradient, size) in enumerate(zip(tasks, gradients, sizes.tolist(), strict=True)):
            if not _usable(size):
                continue
            owner, old, view, part = ranks.owner(i), task.old(projection), task.matrix.whole, task.matrix.part
            if projection.blind:
                shape = gradient.new_zeros(()).expand(view.d, view.k)
                self._renew_(task, group, projection, projection.fit(shape, old, task.counter))
                continue
            fit = partial(projection.fit, gradient, old, task.counter)
            if part is not None and ranks.summing:
                m, rank = part.along_k(gradient), projection.rank_of(view.d, view.k)
                sketch = projection.sketch(m, rank, size, old, task.counter, lambda x: total_([(x, ranks.summing)]))
                ranks.sum_(sketch, owner)
                fit = partial(projection.solve, sketch, rank)
            if ranks.place == owner:
                mine = fit
            work.append((task, owner))
        fitted = None if mine is None else mine()  # all processes at once
        for task, owner in work:
            if ranks.place == owner and fitted is not None:
                new = fitted
            else:
                kept = task.matrix.member(task.matrix.state[projection.key], task.j)
                new = torch.empty_like(kept, dtype=projection.dtype_of(task.matrix.p.dtype))
            ranks.broadcast_(new, owner)
            self._renew_(task, group, projection, new)

    def _renew_(self, task: "Task", group: Group, projection: Projection, new: Tensor) -> None:
        """Gives a matrix its new basis, and carries the moments over."""
        matrix, j = task.matrix, task.j
        state = matrix.state
        old = None if (old := task.old(projection)) is None else old.clone()
        values = {projection.key: new}
        if "basis_scale" in state:
            values["basis"], values["basis_scale"] = encode(new)
        for key, value in values.items():
            matrix.member(state[key], j).copy_(value)
        state["refreshes"].view(-1)[task.place] += 1
        if old is not None and group["transport"] == "rotate":
            # Of the bases as they are kept: what moments have seen, and what they will see.
            self._rotate_(matrix, group, j, projection.overlap(task.basis, old))
        if old is not None and group["transport"] == "reset":
            self._reset_(matrix, group)

    def _reset_(self, matrix: Matrix, group: Group) -> None:
        """The moments of all matrices of a stack begin anew."""
        for key in (*self._moments_spec(matrix.param, group), "age"):
            matrix.state[key].zero_()


@dataclass(frozen=True, slots=True, eq=False)
class Task:
    """A basis that is due.

    Args:
        matrix: whose it is.
        j: which matrix of the stack that is here.
        place: which matrix of the whole stack.
        count: how many bases it has had.
    """

    matrix: Matrix
    j: int
    place: int
    count: int

    @property
    def counter(self) -> tuple[int, int, int]:
        """What its random draws depend on."""
        return (self.matrix.state["stream"], self.count, self.place)

    @property
    def basis(self) -> Tensor:
        """What is kept of it, in the dtype of arithmetic."""
        return wide(self.matrix.member(self.matrix.basis, self.j))

    def old(self, projection: Projection) -> Tensor | None:
        """The basis that it has."""
        return self.basis if self.count else None


def tasks_of(matrix: Matrix, scheduled: bool) -> list[Task]:
    """The bases that are due of what is here of a matrix or a stack: all as scheduled, else those not there yet."""
    refreshes = matrix.state["refreshes"]
    counts = refreshes.tolist() if refreshes.ndim else [refreshes.item()]
    here = list(range(len(counts)))
    if matrix.part is not None and matrix.part.divides("b"):
        here = matrix.part.cut(torch.arange(len(counts)), "b").tolist()
    return [Task(matrix, j, i, counts[i]) for j, i in enumerate(here) if scheduled or not counts[i]]


def counts_apart(matrix: Matrix, scheduled: bool) -> bool:
    """Whether processes are about to refresh other matrices of a stack than this one."""
    divided = matrix.part is not None and matrix.part.divides("b")
    return divided and (scheduled or not matrix.state["refreshes"].all())


def _largest(gradient: Tensor) -> Tensor:
    """max|G|, of an empty part too; infinite where an entry is not a number, which a maximum over processes loses."""
    if not gradient.numel():
        return gradient.new_zeros((), dtype=torch.float64)
    return largest_magnitude(gradient).double().nan_to_num(math.inf, math.inf)


def _usable(largest: float) -> bool:
    """Whether a basis can be fitted to a gradient whose largest entry this is."""
    return torch.finfo(torch.float32).tiny <= largest < math.inf


def matrix_of(x: Entry, projection: Projection, group: Group) -> Matrix:
    """A parameter that is projected, seen as a matrix."""
    view = view_of(projection, tuple(x.p.shape), group["batch_dims"]) if x.part is None else x.part.here
    return Matrix(x.param, x.part, x.p, x.gradient, x.state, x.step, x.draw, view)


@lru_cache(maxsize=4096)
def view_of(projection: Projection, shape: tuple[int, ...], batch_dims: int) -> MatrixView:
    """`projection.view`, remembered; not for code that is traced."""
    return projection.view(shape, batch_dims)


@lru_cache(maxsize=256, typed=True)  # rank 1 and rank 1.0 are not the same
def _adapted(known: Projection, **settings: Any) -> Projection:
    return replace(known, **settings)


def _in_blocks(matrices: list[Matrix], projection: Projection) -> Iterator[list[Matrix]]:
    """Lists of matrices whose projected gradients are small together, or of one: few calls, and little memory."""
    some: list[Matrix] = []
    size = 0
    for matrix in matrices:
        rank = matrix.state[projection.key].shape[-1]
        own = matrix.p.numel() // matrix.view.d * rank * compute_dtype(matrix.p.dtype).itemsize
        if some and size + own > TOGETHER_BYTES:
            yield some
            some, size = [], 0
        some.append(matrix)
        size += own
    if some:
        yield some


def due(step: int, place: int, count: int, gap: int) -> bool:
    """Whether matrix `place` of `count` gets a new basis at its `step`: at step 1, and every `gap` steps from
    1 + floor(place * gap / count), so that no step pays for all of them."""
    return step == 1 or (step > 1 and (step - 1 - place * gap // count) % gap == 0)


def rotated(
    mean: Tensor, second: Tensor, overlap: Tensor, betas: tuple[float, float], age: float
) -> tuple[Tensor, Tensor]:
    r"""The moments M, V (r x k) in a new basis; C = Q_new^T Q_old (r x r) is the overlap.

    V is read as a variance around the mean, and both are rotated, as in LDAdam, https://arxiv.org/abs/2410.16103

    .. math::
        M \leftarrow C M, \qquad
        V \leftarrow (1-\beta_2^t) \left| C^{\circ 2} (\hat V - \hat M^{\circ 2}) + (C \hat M)^{\circ 2} \right|,

    with hats for the bias-corrected moments of age t >= 1. For C = I nothing changes.
    """
    bias1, bias2 = (1 - beta**age for beta in betas)
    excess = (mean / bias1).square_().sub_(second, alpha=1 / bias2)  # the variance, negated
    carried = overlap.square() @ excess
    mean = overlap @ mean
    return mean, torch.div(mean, bias1, out=excess).square_().sub_(carried).abs_().mul_(bias2)
