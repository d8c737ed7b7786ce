"""DCT-AdamW. Modoranu et al., 2025. https://arxiv.org/abs/2505.17967"""

import math
from numbers import Integral
from typing import Any, ClassVar

import torch
from torch import Tensor
from torch.nn.functional import pad
from torch.optim.optimizer import ParamsT

from slimstate.ops import PartKey, hadamard_adam_
from slimstate.ops import carry_ as carry_rows_
from slimstate.ops.codes import BLOCK
from slimstate.ops.hadamard import takes_hadamard_adam
from slimstate.projections import DCT, Hadamard, Projection
from slimstate.projections._base import compute_dtype, matrix_in_place
from slimstate.projections._blocks import blocks, largest_magnitude
from slimstate.projections._dictionary import Columns, FixedDictionary, SomeRows

from ._adam import adam_directions, rounding
from ._base import Group, Spec, refuse
from ._moments import Moment, is_coded, moment_of, store_
from ._projected import DEFAULT_RANK, Arranged, Matrix, ProjectedOptimizer, Task, counts_apart, tasks_of
from ._quantize import LEVELS, codes_shape, decode, encode
from ._sharding import Part, total_

__all__ = ["DCTAdamW"]

ERROR_FEEDBACK = (None, "param", *LEVELS)
STEPPED = ("exp_avg", "exp_avg_sq", "ages", "index")
ERROR = 5  # purpose of random bits, after `_projected`'s


class DCTAdamW(ProjectedOptimizer):
    r"""AdamW whose moments live on a few columns of a fixed orthonormal matrix, chosen anew in every step.

    Q (d x d) is the cosine matrix, known from its size. With G seen so that its compressed axis d comes first, and
    :math:`\|\cdot\|` the l1 or l2 norm of a row,

    .. math::
        A_t &= G_t + E_{t-1} \\
        J_t &= \text{the } r \text{ largest of } \|(Q^\top A_t)_j\|, \qquad R_t = Q_{J_t}^\top A_t, \qquad
               E_t = A_t - Q_{J_t} R_t \\
        M_t &= \beta_1 C_t M_{t-1} + (1-\beta_1) R_t, \qquad V_t = \beta_2 C_t V_{t-1} + (1-\beta_2) R_t^2 \\
        W_t &= (1-\eta\lambda) W_{t-1} - \eta\,\alpha\, Q_{J_t}\,
               \frac{M_t / (1-\beta_1^{a_t})}{\sqrt{V_t / (1-\beta_2^{a_t})} + \epsilon},

    where :math:`C_t = Q_{J_t}^\top Q_{J_{t-1}}` is 0 or 1: a column that stays chosen keeps its moments, one that is
    new starts at zero, and the age a, one number a column, counts the steps since. E is the error feedback, zero
    without it: what the columns leave out of a gradient is not lost, but added to the next one.

    State of an m x n matrix: 2 max(m,n) r elements and 2 r int32 (J and a), where AdamW keeps 2 m n. Error feedback
    adds m n elements of the parameter's dtype, or m n bytes (8 bits) or m n / 2 (4 bits) and one number for each of the
    max(m,n) columns of G: at a quarter of the side it is the larger part. Which matrices are projected: see
    `GaLoreAdamW`; any mixture of sizes shares the matrices Q, which are rebuilt and never saved.

    A gradient of zeros keeps J, and so does one that is not finite; its columns that are not finite keep their error
    too, while the moments take them as AdamW's do. Errors are added to the gradient as `step` finds it: after
    accumulation, unscaling and clipping, so that G + E may exceed the norm that was clipped to. A change of loss scale
    that is not undone before `step` would misread them.

    Of parameters that are divided over processes, only a step with choices sends anything, in two messages for all
    matrices of a group, d + 1 numbers each. Where the compressed axis is divided, it also turns rows of G into columns
    for that, and every step sums R, in one message.

    Where this differs from the authors' code: `docs/dct.md`.

    Args:
        params: parameters, named parameters, or groups.
        lr: learning rate :math:`\eta`.
        betas: decay rates of the moments. Default (0.9, 0.999), the code's.
        eps: :math:`\epsilon`. Default 1e-8, the code's.
        weight_decay: decoupled weight decay :math:`\lambda`. Default 0.01, as in torch.optim.AdamW.
        rank: r as a count (int >= 1) or as a share of d (float in (0, 1]); clamped to the smaller side; None: dense.
            Default 0.25.
        update_proj_gap: steps between two choices of J, staggered over the group's matrices. Default 1, the paper's and
            the code's: then no step waits for the device. Above 1 those with a choice do, and a matrix is given its
            first J by the first gradient that is finite and not zero.
        scale: :math:`\alpha`, the step in the subspace relative to `lr`. Default 1, the paper has none.
        projection: `dct`, the cosines (the code's `makhoul`); `dct3`, their transpose (the code's `matmul`);
            `hadamard`, the Walsh-Hadamard matrix, which needs additions only; or an object of
            `slimstate.projections`, whose rank, side and norm then hold.
        norm: 1 or 2, what J is ranked by. Default 1, the code's; 2 leaves the least out of R.
        side: `auto` compresses the shorter side (the columns of a square matrix), `left` the rows, `right` the columns,
            `reverse` the longer side.
        batch_dims: how many leading axes of a parameter count matrices (1 for stacked experts).
        transport: what becomes of the moments when J changes: `rotate` (default) is the equation above; `keep` leaves
            the numbers and their ages where they are, C = 1, which is the code's default: row i then belongs to
            whichever column is the i-th.
        error_feedback: how E is kept: None (default, the code's) for no error feedback; `param`, in the parameter's
            dtype; `8bit` or `4bit`, rounded at random and without bias to 255 or 15 levels between plus and minus the
            largest magnitude in each column of G.
        maximize: ascend instead.
        moment_dtype: `float32`, `bfloat16` (rounded stochastically), `param` (the parameter's), `8bit` or
            `8bit-companded` (bitsandbytes' codes or finer and faster ones, with a scale for 256 of them; float32 where
            those would save little or harm, see `docs/precision.md`); None means float32, and float64 for float64
            parameters.
        stochastic_rounding: of weights in bfloat16 and float16; None means on.
        compensation: instead, round weights in bfloat16 and float16 to nearest and keep what that takes away: training
            is then that of float32 weights, at 2 bytes a weight more of state.
        nonfinite: what a gradient that is not finite does: `propagate` (default, as torch), `skip` (no parameter takes
            this step) or `raise` (FloatingPointError); the last two wait for the device once a step and count such
            steps in the group, `nonfinite_steps`.
        seed: of the rounding.
        torch_keywords: `foreach`, `fused`, `capturable`, `differentiable` and `amsgrad`, where they change nothing.

    Raises:
        ValueError: for a value out of range, an unknown group key, a torch keyword that is not supported, a rank where
            nothing can be projected, or `8bit` or `4bit` errors along an axis that processes divide.

    Example:
        >>> import torch
        >>> model = torch.nn.Linear(16, 8)
        >>> optimizer = DCTAdamW(model.parameters(), lr=0.01, rank=4, error_feedback="8bit")
        >>> _ = optimizer.step(lambda: model(torch.ones(1, 16)).square().sum().backward())
        >>> state = optimizer.state[model.weight]
        >>> tuple(state["exp_avg"].shape), tuple(state["index"].shape), state["error"].dtype
        ((4, 16), (4,), torch.int8)
    """

    projections: ClassVar[dict[str, Projection]] = {"dct": DCT(), "dct3": DCT(kind=3), "hadamard": Hadamard()}
    transports: ClassVar[tuple[str, ...]] = ("rotate", "keep")
    axes: ClassVar[dict[str, str]] = ProjectedOptimizer.axes | {"ages": "r", "error": "kd", "error_scale": "k"}

    def __init__(
        self,
        params: ParamsT,
        lr: float | Tensor = 1e-3,
        betas: tuple[float, float] = (0.9, 0.999),
        eps: float = 1e-8,
        weight_decay: float = 1e-2,
        *,
        rank: int | float | None = DEFAULT_RANK,
        update_proj_gap: int = 1,
        scale: float = 1.0,
        projection: str | Projection = "dct",
        norm: int = 1,
        side: str = "auto",
        batch_dims: int = 0,
        transport: str = "rotate",
        error_feedback: str | None = None,
        maximize: bool = False,
        moment_dtype: str | torch.dtype | None = None,
        stochastic_rounding: bool | None = None,
        compensation: bool = False,
        nonfinite: str = "propagate",
        seed: int = 0,
        **torch_keywords: Any,
    ) -> None:
        refuse("DCTAdamW", torch_keywords)
        defaults = dict(
            lr=lr,
            betas=betas,
            eps=eps,
            weight_decay=weight_decay,
            rank=rank,
            update_proj_gap=update_proj_gap,
            scale=scale,
            projection=projection,
            norm=norm,
            side=side,
            batch_dims=batch_dims,
            transport=transport,
            error_feedback=error_feedback,
            maximize=maximize,
            moment_dtype=moment_dtype,
            stochastic_rounding=stochastic_rounding,
            compensation=compensation,
            nonfinite=nonfinite,
            seed=seed,
        )
        super().__init__(params, defaults)

    def _check(self, group: Group) -> None:
        super()._check(group)
        norm = group["norm"]
        if not isinstance(norm, Integral) or isinstance(norm, bool) or norm not in (1, 2):
            raise ValueError(f"norm must be 1 or 2, got {norm!r}")
        group["norm"] = int(norm)
        if group["error_feedback"] not in ERROR_FEEDBACK:
            allowed = ", ".join(map(str, ERROR_FEEDBACK))
            raise ValueError(f"error_feedback must be one of {allowed}, got {group['error_feedback']!r}")

    def _needs_whole(self, group: Group) -> str | None:
        if group["error_feedback"] is not None:
            return f"error_feedback={group['error_feedback']!r} keeps what the columns leave out of them"
        return super()._needs_whole(group)

    def _spec(self, p: Tensor, group: Group) -> Spec:
        spec = super()._spec(p, group)
        if not self._is_projected(p, group):
            return spec
        view = self._view(p, group)
        spec["ages"] = spec["index"][0], torch.int32
        match group["error_feedback"]:  # a row of E is a column of G, so that blocks of columns lie together
            case "param":
                spec["error"] = (*view.lead, view.k, view.d), p.dtype
            case "8bit" | "4bit" as bits:
                length, dtype = codes_shape(view.d, bits)
                spec["error"] = (*view.lead, view.k, length), dtype
                spec["error_scale"] = (*view.lead, view.k), compute_dtype(p.dtype)
        return spec

    def _part(self, p: Tensor, group: Group) -> Part | None:
        part, kind = super()._part(p, group), group["error_feedback"]
        if part is not None and kind in LEVELS and part.divides("d"):
            raise ValueError(
                f"error_feedback={kind!r} rounds along the compressed side, which processes divide of a parameter of "
                f"shape {tuple(p.shape)}, {', '.join(map(str, part.placements))}: use error_feedback='param', another "
                "side, or shard another dimension of it (shard_placement_fn of fully_shard)"
            )
        return part

    def _refresh_all(self, matrices: list[tuple[Matrix, bool]], group: Group, projection: Projection) -> None:
        """Chooses J where it is due, and together where the scores are sums over processes."""
        assert isinstance(projection, FixedDictionary)
        stacks = [x for x, scheduled in matrices if counts_apart(x, scheduled) and group["update_proj_gap"] > 1]
        divided: list[Task] = []
        for matrix, scheduled in matrices:
            if _is_divided(matrix):
                divided += self._begun(matrix, group, projection, scheduled)
            else:
                self._refresh(matrix, group, projection, scheduled=scheduled)
        self._choose_together(divided, group, projection)
        self._share_counts(stacks, group)

    def _refresh(self, matrix: Matrix, group: Group, projection: Projection, *, scheduled: bool) -> None:
        """Chooses J, if not in every step: then it is chosen where R is computed, from the same coefficients."""
        assert isinstance(projection, FixedDictionary)
        tasks = self._begun(matrix, group, projection, scheduled)
        for task in tasks if group["update_proj_gap"] > 1 else ():
            index = matrix.member(matrix.state["index"], task.j)
            new, _, usable = projection.fit_down(self._corrected(matrix, group, task.j), index)
            if usable:
                self._change_(matrix, group, task.j, new)
                matrix.state["refreshes"].view(-1)[task.place] += 1

    def _begun(self, matrix: Matrix, group: Group, projection: FixedDictionary, scheduled: bool) -> list[Task]:
        """The choices that are due, of which each finds an index; those of every step are counted."""
        if isinstance(matrix.step, Tensor):
            projection.prepare(matrix.whole.d, compute_dtype(matrix.p.dtype), matrix.p.device)
        always = group["update_proj_gap"] == 1
        tasks = tasks_of(matrix, scheduled or always)
        for task in tasks:
            if not task.count:
                index = matrix.member(matrix.state["index"], task.j)
                torch.arange(len(index), dtype=index.dtype, out=index)
        if always:
            matrix.state["refreshes"] += 1
        return tasks

    def _choose_together(self, tasks: list[Task], group: Group, projection: FixedDictionary) -> None:
        """Chooses J of matrices whose scores are sums over processes, with two messages for all of them: the largest
        magnitudes, and the scores. Where the compressed axis is divided, rows of A become columns for that."""
        parts = [(task, part) for task in tasks if (part := task.matrix.part) is not None]
        of = [part.groups("dk") for _, part in parts]
        sizes = [self._corrected(task.matrix, group, task.j).largest for task, _ in parts]
        total_(zip(sizes, of, strict=True), largest=True)
        scores = []
        for (task, part), size in zip(parts, sizes, strict=True):
            a = self._corrected(task.matrix, group, task.j)
            if part.divides("d"):
                a = Columns(part.along_k(a.m if a.added is None else a.read(slice(None))))
            scores.append(projection.scores(a, size))
        total_(zip(scores, of, strict=True))
        for (task, _), score in zip(parts, scores, strict=True):
            matrix, j = task.matrix, task.j
            index = matrix.member(matrix.state["index"], j)
            new, usable = projection.choose(score, len(index), index)
            self._change_(matrix, group, j, new)
            if group["update_proj_gap"] > 1:
                matrix.state["refreshes"].view(-1)[task.place] += int(usable)

    def _divided(self, matrix: Matrix, group: Group, projection: Projection) -> tuple[list[Matrix], Projection] | None:
        if 0 in matrix.view.lead:
            return None
        # Who has no column of G counts the ages of Q's all the same.
        return super()._divided(matrix, group, projection) or ([matrix], projection)

    def _on_rows(self, matrix: Matrix, projection: Projection) -> tuple[Matrix, Projection]:
        assert matrix.part is not None
        assert isinstance(projection, FixedDictionary)
        return matrix, SomeRows(whole=projection, d=matrix.whole.d, held=matrix.part.held["d"])

    def _change_(self, matrix: Matrix, group: Group, j: int, new: Tensor) -> None:
        """Gives matrix j of the stack its new J, and carries the moments over."""
        state = matrix.state
        index = matrix.member(state["index"], j)
        if group["transport"] == "rotate":
            moments = [moment_of(matrix, key).member(j) for key in ("exp_avg", "exp_avg_sq")]
            carry_(moments, matrix.member(state["ages"], j), index, new)
        index.copy_(new)

    def _reduce(self, matrix: Matrix, group: Group, projection: Projection) -> tuple[Tensor, ...]:
        """R (r x k), or a stack of them, after the choice of J if that is made in every step."""
        assert isinstance(projection, FixedDictionary)
        rs = []
        for j in range(math.prod(matrix.view.lead)):
            a, index = self._corrected(matrix, group, j), matrix.member(matrix.state["index"], j)
            if group["update_proj_gap"] == 1 and not _is_divided(matrix):
                new, r, _ = projection.fit_down(a, index)
                self._change_(matrix, group, j, new)
            else:
                r = projection.coefficients(a, index)
            rs.append(r)
        return (torch.stack(rs) if matrix.view.lead else rs[0],)

    def _step_group(self, group: Group, entries: Arranged) -> None:
        """Matrices that an op steps whole go to it, all at once; the others as in every projected optimizer."""
        rest, whole = [], []
        for some, projection in entries.matrices:
            others = []
            for x in some:
                lists = _whole(x, group, projection)
                whole += lists
                others += [] if lists else [x]
            rest += [(others, projection)] if others else []
        if whole:
            always = group["update_proj_gap"] == 1
            hadamard_adam_(
                *zip(*whole, strict=True),
                norm=group["norm"] if always else 0,
                carry=always and group["transport"] == "rotate",
                alpha=group["lr"] * group["scale"],
                beta=1 - group["lr"] * group["weight_decay"],
                betas=group["betas"],
                eps=group["eps"],
                maximize=group["maximize"],
            )
        super()._step_group(group, Arranged(entries.dense, rest))

    def _update(
        self, matrices: list[Matrix], reduced: list[tuple[Tensor, ...]], group: Group, projection: Projection
    ) -> None:
        assert isinstance(projection, FixedDictionary)
        lr = group["lr"]
        for x, (r,) in zip(matrices, reduced, strict=True):
            if group["error_feedback"] and x.p.numel():
                for j in range(math.prod(x.view.lead)):
                    self._keep_error_(x, group, j, projection, x.member(r, j))
            x.state["ages"] += 1
            (u,) = adam_directions([x], [r], group, [x.state["ages"]])
            projection.write_back_(
                x.p,
                x.view,
                x.state["index"],
                u,
                alpha=lr * group["scale"],
                beta=1 - lr * group["weight_decay"],
                rounding=rounding(x, group),
            )

    def _corrected(self, matrix: Matrix, group: Group, j: int) -> Columns:
        """A = G + E of matrix j of the stack."""
        m, kind = matrix.member(matrix.m, j), group["error_feedback"]
        if kind is None:
            return Columns(m)
        error = matrix.member(matrix.state["error"], j)
        if kind == "param":
            return Columns(m, lambda s: error[s].mT, lambda: largest_magnitude(error))
        largest = matrix.member(matrix.state["error_scale"], j)
        return Columns(m, lambda s: decode(error[s], largest[s], len(m), kind).mT, lambda: largest.amax())

    def _keep_error_(self, matrix: Matrix, group: Group, j: int, projection: FixedDictionary, r: Tensor) -> None:
        """E <- A - Q_J R, but in columns that are not finite, or not in the parameter's dtype."""
        a = self._corrected(matrix, group, j)
        error, index = matrix.member(matrix.state["error"], j), matrix.member(matrix.state["index"], j)
        key, d = matrix.key(ERROR), matrix.view.d
        if isinstance(key, PartKey) and matrix.part is not None:
            axes = "b" * len(matrix.view.lead) + "kd"
            key = key._replace(place=matrix.part.place(axes, (*matrix.view.lead, matrix.view.k, d)))
        for s in a.blocks():
            e = a.read(s).sub_(projection.up(r[:, s], index, d)).mT.contiguous()
            finite = e.abs().amax(1) <= torch.finfo(matrix.p.dtype).max
            offset = (j * matrix.view.k + s.start) * d
            if group["error_feedback"] == "param":
                store_(error[s], torch.where(finite[:, None], e, error[s].to(e.dtype)), key, offset)
                continue
            e.masked_fill_(~finite[:, None], 0)
            largest = matrix.member(matrix.state["error_scale"], j)[s]
            codes, scale = encode(e, group["error_feedback"], key, offset)
            error[s] = torch.where(finite[:, None], codes, error[s])
            largest.copy_(torch.where(finite, scale, largest))


def _is_divided(matrix: Matrix) -> bool:
    """Whether the scores of its columns are sums over processes."""
    return matrix.part is not None and matrix.part.divides("dk")


def carry_(moments: list[Moment], ages: Tensor, old: Tensor, new: Tensor) -> None:
    """Gives the rows of the moments (r x k) and their ages (r,) to the columns `new` that were chosen as `old` before,
    both sorted; rows of columns that were not become zeros of age 0."""
    if not is_coded(moments):
        carry_rows_([moment.kept for moment in moments], ages, old, new)
        return
    place = torch.searchsorted(old, new).clamp_(max=len(old) - 1)
    fresh = old.index_select(0, place) != new
    ages.copy_(ages.index_select(0, place).masked_fill_(fresh, 0))

    def carried(x: Tensor) -> Tensor:
        return x.index_select(0, place).masked_fill_(fresh[:, None], 0)

    # Blocks in which nothing moves keep their codes: rounded once more, they may be others.
    moves = fresh | (place != torch.arange(len(new), device=new.device))
    moves = pad(moves, (0, -len(new) % BLOCK)).view(-1, BLOCK).any(1, keepdim=True)
    rows = moves.repeat_interleave(BLOCK, 0)[: len(new)]
    for moment in moments:
        for s in blocks(moment.kept, 1):
            part = moment.columns(s)
            assert part.scale is not None
            before, scale = part.kept.clone(), part.scale.clone()
            part.write_(carried(part.read(torch.float32)))
            part.kept.copy_(torch.where(rows, part.kept, before))
            part.scale.copy_(torch.where(moves, part.scale, scale))


def _whole(matrix: Matrix, group: Group, projection: Projection) -> list[tuple[Tensor, ...]]:
    """What `hadamard_adam_` takes of a matrix, or of each of a stack; nothing where it does not."""
    view, state = matrix.view, matrix.state
    if (
        not isinstance(projection, Hadamard)
        or matrix.gradient is None
        or matrix.part is not None
        or isinstance(matrix.step, Tensor)
        or group["error_feedback"] is not None
        or (w := matrix_in_place(matrix.p, view)) is None
    ):
        return []
    parts = (w.mT if view.transposed else w, matrix.m, *(state[key] for key in STEPPED))
    each: list[tuple[Tensor, ...]] = list(zip(*parts, strict=True)) if view.lead else [parts]
    return each if all(takes_hadamard_adam(*one[:4]) for one in each) else []
