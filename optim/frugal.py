"""FRUGAL. Zmushko et al., 2024. https://arxiv.org/abs/2411.07837"""

import math
from collections.abc import Callable
from functools import lru_cache
from typing import Any, ClassVar

import torch
from torch import Tensor
from torch.optim.optimizer import ParamsT

from slimstate.ops import Split, SplitRule, counter_key, split_, takes_split
from slimstate.projections import (
    SVD,
    Coordinates,
    MatrixView,
    PowerIteration,
    Projection,
    RandomOrthogonal,
    matrix_view,
)
from slimstate.projections._base import compute_dtype, rewrite_
from slimstate.projections._numbers import scalar
from slimstate.projections._residual import scaled_step_, sign_step_
from slimstate.projections._rounding import LOW_PRECISION

from ._adam import check_adam, is_number, moment_keys, rounding, weight_spec
from ._base import Entry, Group, Spec, State, refuse
from ._loading import misfit
from ._projected import Arranged, Matrix, ProjectedOptimizer, view_of
from ._rules import RULES, directions, rule_spec, whole_step_
from ._sharding import Part

__all__ = ["FRUGAL"]

DEFAULT_DENSITY = 0.25
OUTER = ("sign", "sgd", "none")
ORDERS = ("random", "ascending", "descending", "mirror")


class FRUGAL(ProjectedOptimizer):
    r"""An optimizer with state in a small subspace that keeps changing, and one without state in the rest.

    Every `update_proj_gap` steps a new subspace Q is selected and the moments in it start afresh. In each step, with
    :math:`P = Q Q^\top` and, by default, U from AdamW and the sign outside,

    .. math::
        R_t &= Q^\top G_t, \qquad U_t = \text{inner}(R_t) \\
        W_t &= (1-\eta\lambda) W_{t-1} - \eta\, s\, Q U_t - \eta\, s\, c\; \text{outer}(G_t - P G_t).

    So every weight moves in every step, with a fraction of AdamW's state. `inner` is AdamW, Lion
    (:math:`U = \mathrm{sign}(\beta_1 M + (1-\beta_1) R)`, then :math:`M \leftarrow \beta_2 M + (1-\beta_2) R`) or SGD
    with momentum (:math:`U = M \leftarrow \beta_1 M + R`); `outer` is sign, SGD (the identity) or nothing.

    What is selected, `projection`:

    - `columns` (default, the paper's code), `rows` or `entries`, at random: Q is made of unit vectors, the split is
      exact, and nothing is multiplied;
    - `svd`, `power` or `random`: a dense basis of the compressed side, as in GaLoreAdamW;
    - `blocks`: whole tensors have state, the others none, in the `order` given.

    State of an m x n matrix with AdamW inside: columns :math:`2 m c` elements and c int32 indices,
    :math:`c = \max(1, \lfloor \rho n \rfloor)` (rows alike); entries 2 c and c indices; dense bases
    2 max(m,n) r + min(m,n) r; blocks 2 m n for selected tensors, which are
    :math:`\max(1, \lfloor \rho N \rfloor)` of N. Lion and SGD keep one moment instead of two. Density 1 is the inner
    rule on the whole matrix, exactly and with no refresh; density 0 is the outer rule alone, without state.

    Of parameters that are divided over processes, a step sends nothing, but R of a dense basis whose compressed side is
    divided, in one message for all matrices. Columns are selected where rows are divided (FSDP2's default) and rows
    where columns are, entries where neither is.

    Which matrices are split: those of two or more dimensions in groups with a `density` or a `rank`. If any group given
    here sets one, groups without are state-full; if none does, the default applies to every matrix, embeddings too.
    `slimstate.optim.param_groups(model, rank=0.25)` makes the usual choice: embeddings, norms and the output head get
    the inner rule on all of their weights, which the paper finds to matter for the head.

    Where this differs from the authors' code: random choices are counter-based and sorted; a selection holds at least
    one index; a selection of everything is never refreshed; with a dense basis, rounding noise outside gets no sign;
    momentum starts at zero (theirs starts at the weights) and decay is always decoupled.

    Args:
        params: parameters, named parameters, or groups.
        lr: learning rate :math:`\eta`. The paper uses 1e-3 for pretraining.
        betas: decay rates of AdamW's moments, or of Lion's (whose paper takes (0.9, 0.99)); the first is the momentum
            of `sgdm`. Default (0.9, 0.999), as in torch.optim.AdamW and the paper.
        eps: :math:`\epsilon` of AdamW. Default 1e-8, as in torch.optim.AdamW and the paper.
        weight_decay: decoupled weight decay :math:`\lambda`. Default 0.01, as in torch.optim.AdamW and the code.
        density: :math:`\rho` in [0, 1], the share of columns, rows, entries, of the compressed side, or of the tensors.
            Default 0.25, the paper's, unless `rank` is given.
        rank: the same as a count (int >= 1) or a share (float in (0, 1]). Exclusive with `density`.
        update_proj_gap: steps between two selections, staggered over the group's matrices except for `blocks`. Default
            200, the paper's.
        scale: s, the step of the split matrices relative to `lr`. Default 1, the paper's (0.3 for 7B).
        projection: what is selected, see above; or an object of `slimstate.projections`.
        contiguous: select one run of neighbouring columns, rows or entries, which is faster in memory.
        order: of `blocks`: `random` draws tensors anew each time; `ascending` and `descending` take turns through the
            list; `mirror` goes up and down. Default `random`, the code's; the paper's pretraining uses `descending`.
        side: which side dense bases compress, as in GaLoreAdamW.
        batch_dims: how many leading axes of a parameter count matrices (1 for stacked experts).
        inner: `adamw` (default), `lion` or `sgdm`, the rule with state; also of everything that is not split.
        outer: `sign` (default), `sgd` or `none`, the rule without.
        outer_scale: c, the step outside relative to inside. Default 1, the paper's for pretraining (0.1 on GLUE).
        maximize: ascend instead.
        moment_dtype: `float32`, `bfloat16` (rounded stochastically), `param` (the parameter's), `8bit` or
            `8bit-companded` (bitsandbytes' codes or finer and faster ones, with a scale for 256 of them; float32 where
            those would save little or harm, see `docs/precision.md`); None means float32, and float64 for float64
            parameters.
        basis_dtype: what dense bases are kept in: `bfloat16` or `8bit` (int8 codes, and a scale for each row of Q),
            which leaves them not quite orthonormal, see the guide to GaLoreAdamW; None means float32, and float64 for
            float64 parameters. Q-GaLore, https://arxiv.org/abs/2407.08296, keeps them in 4 bits.
        stochastic_rounding: of weights in bfloat16 and float16; None means on.
        compensation: instead, round weights in bfloat16 and float16 to nearest and keep what that takes away: training
            is then that of float32 weights, at 2 bytes a weight more of state.
        nonfinite: what a gradient that is not finite does: `propagate` (default, as torch), `skip` (no parameter takes
            this step) or `raise` (FloatingPointError); the last two wait for the device once a step and count such
            steps in the group, `nonfinite_steps`.
        seed: of the selections and of the rounding.
        torch_keywords: `foreach`, `fused`, `capturable`, `differentiable` and `amsgrad`, where they change nothing.

    Raises:
        ValueError: for a value out of range, `density` beside `rank`, an option that its projection does not have, an
            unknown group key, a torch keyword that is not supported, a density where nothing can be split, or a
            selection along an axis that processes divide.

    Example:
        >>> import torch
        >>> model = torch.nn.Linear(16, 8)
        >>> optimizer = FRUGAL(model.parameters(), lr=1e-3, density=0.25)
        >>> _ = optimizer.step(lambda: model(torch.ones(1, 16)).square().sum().backward())
        >>> tuple(optimizer.state[model.weight]["exp_avg"].shape), tuple(optimizer.state[model.weight]["index"].shape)
        ((4, 8), (4,))
    """

    projections: ClassVar[dict[str, Projection]] = {
        "columns": Coordinates(axis="columns"),
        "rows": Coordinates(axis="rows"),
        "entries": Coordinates(axis="entries"),
        "svd": SVD(),
        "power": PowerIteration(),
        "random": RandomOrthogonal(),
        "blocks": Coordinates(axis="rows"),  # of the list of tensors
    }
    transports: ClassVar[tuple[str, ...]] = ("reset",)
    axes: ClassVar[dict[str, str]] = ProjectedOptimizer.axes | {"momentum_buffer": "rk"}
    shares: ClassVar[tuple[str, ...]] = ("density", "rank")

    def __init__(
        self,
        params: ParamsT,
        lr: float | Tensor = 1e-3,
        betas: tuple[float, float] = (0.9, 0.999),
        eps: float = 1e-8,
        weight_decay: float = 1e-2,
        *,
        density: float | None = None,
        rank: int | float | None = None,
        update_proj_gap: int = 200,
        scale: float = 1.0,
        projection: str | Projection = "columns",
        contiguous: bool = False,
        order: str = "random",
        side: str = "auto",
        batch_dims: int = 0,
        inner: str = "adamw",
        outer: str = "sign",
        outer_scale: float = 1.0,
        maximize: bool = False,
        moment_dtype: str | torch.dtype | None = None,
        basis_dtype: str | torch.dtype | None = None,
        stochastic_rounding: bool | None = None,
        compensation: bool = False,
        nonfinite: str = "propagate",
        seed: int = 0,
        **torch_keywords: Any,
    ) -> None:
        refuse("FRUGAL", torch_keywords)
        if isinstance(projection, Projection):
            if density is not None:
                raise ValueError(f"density={density!r} contradicts projection={projection!r}, which has a rank")
            rank = projection.rank if rank is None else rank
        elif density is None and rank is None:
            density = DEFAULT_DENSITY
        defaults = dict(
            lr=lr,
            betas=betas,
            eps=eps,
            weight_decay=weight_decay,
            density=density,
            rank=rank,
            update_proj_gap=update_proj_gap,
            scale=scale,
            projection=projection,
            contiguous=contiguous,
            order=order,
            side=side,
            batch_dims=batch_dims,
            transport="reset",
            inner=inner,
            outer=outer,
            outer_scale=outer_scale,
            maximize=maximize,
            moment_dtype=moment_dtype,
            basis_dtype=basis_dtype,
            stochastic_rounding=stochastic_rounding,
            compensation=compensation,
            nonfinite=nonfinite,
            seed=seed,
        )
        super().__init__(params, defaults)

    def _needs_whole(self, group: Group) -> str | None:
        if group["density"] == 0:
            return "density=0 projects nothing"
        if group["projection"] == "blocks":
            return "projection='blocks' gives a state to whole tensors"
        if group["outer"] != "none":
            return f"outer={group['outer']!r} steps with what the subspace leaves out of them; outer='none' does not"
        return super()._needs_whole(group)

    # Groups.

    def add_param_group(self, param_group: Group) -> None:
        """As `ProjectedOptimizer.add_param_group`; a group's own `density` or `rank` replaces either default."""
        if isinstance(param_group, dict) and (own := param_group.keys() & set(self.shares)):
            param_group = dict.fromkeys(self.shares) | param_group if len(own) == 1 else param_group
        super().add_param_group(param_group)

    def _check_rule(self, group: Group) -> None:
        check_adam(group)
        for key, allowed in (("inner", RULES), ("outer", OUTER), ("order", ORDERS)):
            if group[key] not in allowed:
                raise ValueError(f"{key} must be one of {', '.join(allowed)}, got {group[key]!r}")
        density = group["density"]
        if density is not None:
            if not is_number(density) or not 0 <= density <= 1:
                raise ValueError(f"density must be a number in [0, 1], got {density!r}")
            if group["rank"] is not None:
                raise ValueError(f"density={density!r} and rank={group['rank']!r} say the same: give one of them")
            group["density"] = float(density)
        for key in ("scale", "outer_scale"):
            if not is_number(group[key]) or not group[key] > 0:
                raise ValueError(f"{key} must be a number > 0, got {group[key]!r}")
            group[key] = float(group[key])
        if not isinstance(group["contiguous"], bool):
            raise ValueError(f"contiguous must be True or False, got {group['contiguous']!r}")
        blocks = group["projection"] == "blocks"
        coordinates = isinstance(self.projections.get(group["projection"]), Coordinates) and not blocks
        if group["contiguous"] and not coordinates:
            raise ValueError(f"contiguous=True needs projection columns, rows or entries, got {group['projection']!r}")
        if group["order"] != "random" and not blocks:
            raise ValueError(f"order={group['order']!r} needs projection='blocks', got {group['projection']!r}")
        if group["side"] != "auto" and (coordinates or blocks):
            raise ValueError(f"side={group['side']!r} means nothing for projection={group['projection']!r}")

    def _projection(self, group: Group) -> Projection:
        share = group["density"] if group["rank"] is None else group["rank"]
        return super()._projection(group | {"rank": share or 1.0})

    def _is_projected(self, p: Tensor, group: Group) -> bool:
        """Whether it is split: chosen, and neither all of it nor nothing is selected."""
        return self._is_chosen(p, group) and group["projection"] != "blocks" and 0 < self._selected(p, group) < 1

    def _selected(self, p: Tensor, group: Group) -> float:
        """The share of a chosen matrix that is selected."""
        if group["density"] == 0:
            return 0.0
        projection = self._projection(group)
        view = view_of(projection, tuple(p.shape), group["batch_dims"])
        return projection.rank_of(view.d, view.k) / view.d

    def _report_clamped(self, group: Group) -> None:
        if group["projection"] != "blocks":
            super()._report_clamped(group)

    def _how(self, p: Tensor, group: Group) -> str:
        if not self._is_chosen(p, group):
            return group["inner"]
        if group["projection"] == "blocks":
            tensors = [q for q in group["params"] if self._is_chosen(q, group)]
            return f"blocks: {self._count(group, len(tensors))} of {len(tensors)} tensors"
        if group["density"] == 0:
            return f"no state, {group['outer']}"
        return super()._how(p, group) if self._is_projected(p, group) else f"{group['inner']}, all selected"

    def _part(self, p: Tensor, group: Group) -> Part | None:
        part = super()._part(p, group)
        if part is None or not self._is_projected(p, group):
            return part
        projection = self._projection(group)
        if not isinstance(projection, Coordinates) or not part.divides("mn" if projection.axis == "entries" else "d"):
            return part
        if part.divides("m") and part.divides("n"):
            advice = "projection='svd', 'power' or 'random'"
        else:
            advice = "projection='columns'" if part.divides("m") else "projection='rows'"
        raise ValueError(
            f"projection={projection.axis!r} selects along what processes divide of a parameter of shape "
            f"{tuple(p.shape)}, {', '.join(map(str, part.placements))}: use {advice}, or shard another dimension of it "
            "(shard_placement_fn of fully_shard)"
        )

    # State.

    def _moments_spec(self, p: Tensor, group: Group) -> Spec:
        return rule_spec(p, group, self._moment_shape(p, group), self._layout(p, group))

    def _spec(self, p: Tensor, group: Group) -> Spec:
        if not self._is_chosen(p, group) or self._is_projected(p, group):
            return super()._spec(p, group)
        spec = weight_spec(p, group)
        if group["projection"] == "blocks":
            return self._moments_spec(p, group) | {"age": ((), torch.int32)} | spec
        return spec if group["density"] == 0 else self._moments_spec(p, group) | spec

    def _held(self, p: Tensor, group: Group) -> Spec:
        spec, passing = super()._held(p, group), self._passing(p, group)
        if passing:
            tensors = [q for q in group["params"] if self._is_chosen(q, group)]
            place = next(i for i, q in enumerate(tensors) if q is p)
            if not self._has_turn(place, len(tensors), group, int(self.state.get(p, {}).get("step", 1))):
                return {key: entry for key, entry in spec.items() if key not in passing}
        return spec

    def _passing(self, p: Tensor, group: Group) -> frozenset[str]:
        if self._is_chosen(p, group) and group["projection"] == "blocks":
            return frozenset(self._moments_spec(p, group))
        return frozenset()

    def _check_state(self, name: str, p: Tensor, group: Group, state: State) -> None:
        super()._check_state(name, p, group, state)
        passing = self._passing(p, group)
        if passing and bool(state["age"]) != (passing <= state.keys()):
            raise misfit(f"the state of parameter {name} has age {int(state['age'])} and no moments, or the reverse")

    # Steps.

    def _select_states(self, group: Group, params: list[Tensor]) -> None:
        """Gives moments to the tensors whose turn it is, and takes them from the others."""
        if group["projection"] != "blocks":
            return
        tensors, present = [p for p in group["params"] if self._is_chosen(p, group)], set(params)
        for place, p in enumerate(tensors):
            if p not in present:
                continue
            state, moments = self.state[p], self._moments_spec(p, group)
            step = int(state["step"])
            if not self._has_turn(place, len(tensors), group, step):
                for key in moments:
                    state.pop(key, None)
                state["age"].zero_()
                continue
            selecting = (step - 1) % group["update_proj_gap"] == 0 and self._count(group, len(tensors)) < len(tensors)
            if selecting or not moments.keys() <= state.keys():
                state["age"].zero_()
                state.update(self._zeros(p, group, moments))
            state["age"] += 1

    def _dense_step_(self, entries: list[Entry], group: Group) -> None:
        chosen = [x for x in entries if self._is_chosen(x.param, group)]
        whole_step_([x for x in entries if not self._is_chosen(x.param, group)], group)
        if group["projection"] == "blocks":
            self._step_in_turns_(chosen, group)
        elif group["density"] != 0:
            whole_step_(chosen, group, scale=group["scale"])
        else:
            outer_steps_(chosen, group)

    @torch.compiler.disable  # which tensors have moments changes, and would be compiled anew each time
    def _step_in_turns_(self, entries: list[Entry], group: Group) -> None:
        selected = [x for x in entries if self._moments_spec(x.param, group).keys() <= x.state.keys()]
        whole_step_(selected, group, scale=group["scale"], aged=True)
        outer_steps_([x for x in entries if x not in selected], group)

    def _has_turn(self, place: int, tensors: int, group: Group, step: int) -> bool:
        """Whether the tensor at this place among so many has moments in this step of its own."""
        interval = (step - 1) // group["update_proj_gap"]
        return place in _turn(tensors, self._count(group, tensors), group["order"], group["seed"], interval)

    def _count(self, group: Group, tensors: int) -> int:
        """How many of so many tensors are selected at a time."""
        return 0 if group["density"] == 0 else self._projection(group).rank_of(tensors, tensors)

    def _step_group(self, group: Group, entries: Arranged) -> None:
        """Coordinates take one pass over weights and gradients, all matrices together, where nothing has to be known
        of R before."""
        splits: list[Split] = []
        left: list[tuple[list[Matrix], Projection]] = []
        for some, projection in entries.matrices:
            others = []
            for x in some:
                split = None
                if x.reduced is None and group["inner"] == "adamw" and isinstance(projection, Coordinates):
                    split = split_of(x, group, projection, x.state["exp_avg"], x.state["exp_avg_sq"])
                if split is None:
                    others.append(x)
                else:
                    splits.append(split)
            if others:
                left.append((others, projection))
        if splits:
            split_(splits, _rule(group, columns=group["projection"] != "rows"))
        super()._step_group(group, entries._replace(matrices=left))

    def _update(
        self, matrices: list[Matrix], reduced: list[tuple[Tensor, ...]], group: Group, projection: Projection
    ) -> None:
        lr = group["lr"]
        rs = [r for (r,) in reduced]
        if group["outer"] != "none" and not isinstance(projection, Coordinates):
            rs = [r.clone() for r in rs]  # what lies outside is found by R
        us = directions(matrices, rs, group, [x.age for x in matrices])
        for x, (r,), u in zip(matrices, reduced, us, strict=True):
            how = rounding(x, group)
            decay, step = 1 - lr * group["weight_decay"], lr * group["scale"]
            if isinstance(projection, Coordinates):
                if (split := split_of(x, group, projection, u)) is not None:
                    split_([split], _rule(group, columns=projection.axis != "rows"))
                else:
                    index = x.state[projection.key]
                    rows = projection.take(x.p, x.view, index, how.low).mul_(decay).add_(u.mul_(step))
                    projection.rewrite_(x.p, x.view, index, rows, _outside(x, group), how)
            elif group["outer"] == "none":
                projection.write_back_(x.p, x.view, x.basis, u, alpha=step, beta=decay, rounding=how)
            else:
                split_step_(x, r, u, group)


def split_of(
    x: Matrix, group: Group, projection: Coordinates, first: Tensor, second: Tensor | None = None
) -> Split | None:
    """A matrix in a split step by the moments of its kept coordinates, or by their direction alone; None where the
    compiled op does not take it, or what changes from step to step is not to be compiled in."""
    if isinstance(x.step, Tensor):
        return None
    members, view = math.prod(x.view.lead), x.view
    split = Split(
        x.p,
        x.p if x.gradient is None else x.gradient,  # which outer="none" does not read
        (members, 1, view.rows) if projection.axis == "entries" else (members, view.rows, view.columns),
        x.state[projection.key],
        first,
        second,
        1 if second is None else float(x.age),
        rounding(x, group),
        moment_keys([x], [first])[0] if second is not None and first.dtype in LOW_PRECISION else None,
    )
    return split if takes_split(split) else None


def _rule(group: Group, *, columns: bool) -> SplitRule:
    """What a split step does."""
    step = group["lr"] * group["scale"]
    return SplitRule(
        columns=columns,
        outer=group["outer"],
        decay=1 - group["lr"] * group["weight_decay"],
        step=step,
        outside=step * group["outer_scale"] * (-1 if group["maximize"] else 1),
        betas=group["betas"],
        eps=group["eps"],
        maximize=group["maximize"],
    )


def outer_steps_(entries: list[Entry], group: Group) -> None:
    """W <- (1 - lr wd) W - lr s c outer(G)."""
    splits: list[Split] = []
    for x in entries:
        view, how = _plain(x, group), rounding(x, group)
        index, direction = nothing(x.p.device)
        shape = (math.prod(view.lead), view.rows, view.columns)
        split = Split(x.p, x.grad, shape, index, direction, rounding=how)
        if not isinstance(x.step, Tensor) and takes_split(split):
            splits.append(split)
        elif (edit := _outside(x, group)) is not None:
            rewrite_(x.p, view, edit, compute_dtype(x.p.dtype), how)
    if splits:
        split_(splits, _rule(group, columns=False))


def _plain(x: Entry, group: Group) -> MatrixView:
    return matrix_view(tuple(x.p.shape), "left", group["batch_dims"])


@lru_cache(maxsize=64)
def nothing(device: torch.device) -> tuple[Tensor, Tensor]:
    """No index, and no direction."""
    return torch.empty(0, dtype=torch.int32, device=device), torch.empty(0, device=device)


def _outside(x: Entry, group: Group) -> Callable[[Tensor, int, slice], object] | None:
    """The outer rule and the decay of some rows of a weight, as `rewrite_` calls it; None where nothing happens."""
    lr = group["lr"]
    step = lr * group["scale"] * group["outer_scale"] * (-1 if group["maximize"] else 1)
    if group["outer"] == "none" and not group["weight_decay"]:
        return None
    gradients = _plain(x, group).members(x.grad) if group["outer"] != "none" else []

    def edit(w: Tensor, j: int, s: slice) -> None:
        if group["weight_decay"]:
            w.mul_(1 - lr * group["weight_decay"])
        if group["outer"] != "none":
            g = gradients[j][s].to(w.dtype).reshape(w.shape)
            w.sub_(g.sign().mul_(step) if group["outer"] == "sign" else g * step)

    return edit


def split_step_(x: Matrix, r: Tensor, u: Tensor, group: Group) -> None:
    """W <- (1 - lr wd) W + lr s Q U - lr s c outer(G - Q R), for a dense basis; U is overwritten."""
    lr = group["lr"]
    inside = lr * group["scale"]
    outside = inside * group["outer_scale"] * (-1 if group["maximize"] else 1)
    given, numbers = (x.p, x.view, x.basis, r, u, x.grad), dict(beta=1 - lr * group["weight_decay"], alpha=inside)
    if group["outer"] == "sign":
        sign_step_(*given, **numbers, step=outside, rounding=rounding(x, group))
    else:
        scale = scalar(outside).to(r).view(1, 1)
        scaled_step_(*given, **numbers, scale=scale, rounding=rounding(x, group))


@lru_cache(maxsize=1024)
def _turn(tensors: int, count: int, order: str, seed: int, interval: int) -> frozenset[int]:
    """Which `count` of so many tensors have state in this interval."""
    match order:
        case "random":
            generator = torch.Generator().manual_seed(counter_key(seed, interval))
            return frozenset(torch.randperm(tensors, generator=generator)[:count].tolist())
        case "mirror":
            runs = max(1, -(-tensors // max(1, count)))
            place = interval % max(1, 2 * runs - 2)
            start = min(min(place, 2 * runs - 2 - place) * count, tensors - count)
            return frozenset(range(start, start + count))
    places = {(interval * count + j) % tensors for j in range(count)}
    return frozenset(tensors - 1 - place for place in places) if order == "descending" else frozenset(places)
