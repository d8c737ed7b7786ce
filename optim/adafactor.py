"""GaLore with Adafactor in the subspace. Zhao et al., 2024. https://arxiv.org/abs/2403.03507, after Shazeer and Stern,
2018. https://arxiv.org/abs/1804.04235"""

import math
from collections.abc import Iterable
from dataclasses import replace
from typing import Any, ClassVar, NamedTuple

import torch
from torch import Tensor
from torch.optim.optimizer import ParamsT

from slimstate.projections import MatrixView, Projection, matrix_view
from slimstate.projections._base import compute_dtype, rewrite_
from slimstate.projections._blocks import blocks
from slimstate.projections._numbers import Number, lerp_, smaller
from slimstate.projections._rounding import widen

from ._adam import check_lr, check_not_negative, check_storage, is_number, rounding
from ._base import Entry, Group, Spec, refuse
from ._moments import CODED, Moment, moment_of, moment_spec
from ._projected import DEFAULT_RANK, ROTATED_EXP_AVG, Arranged, Matrix, ProjectedOptimizer
from ._sharding import Part, Sums, part_of, together

__all__ = ["GaLoreAdafactor"]

DECAY = 5  # purpose of random bits: a weight that decays in a pass of its own; after `_projected`'s

DENSE_AXES = {"exp_avg_sq_row": "m", "exp_avg_sq_col": "n"}


class Factors(NamedTuple):
    """What a step needs of all parts of a matrix; of a stack of b, with a leading axis.

    Args:
        rows: mean squares of the rows that are here (rows, 1).
        columns: of the columns that are here (1, columns).
        mean: of a, as it is after this step (1, 1).
        clip: the factor that clips U (1, 1).
        weight: RMS(W) (b,); None where the step does not go by it.
    """

    rows: Tensor
    columns: Tensor
    mean: Tensor
    clip: Tensor
    weight: Tensor | None


class GaLoreAdafactor(ProjectedOptimizer):
    r"""Adafactor in a low-rank subspace that follows the gradient: of the second moment only sums over rows and columns
    are kept, and of the first one nothing, unless `beta1` is set.

    Every `update_proj_gap` steps the basis Q (d x r) is fitted to the gradient and the statistics are carried over. In
    each step, with G (d x k) seen so that its compressed axis comes first, and with t the age of the statistics,

    .. math::
        R_t &= Q^\top G_t, \qquad \rho_t = 1 - t^{c}, \qquad
        \operatorname{RMS}(X) = \|X\|_F / \sqrt{\text{number of entries}} \\
        a_t &= \rho_t\, a_{t-1} + (1-\rho_t) \operatorname{mean}_\text{columns}(R_t^2 + \epsilon_1), \qquad
        b_t = \rho_t\, b_{t-1} + (1-\rho_t) \operatorname{mean}_\text{rows}(R_t^2 + \epsilon_1) \\
        U_t &= \frac{R_t}{\sqrt{a_t b_t^\top / \operatorname{mean}(a_t)}}, \qquad
        \hat U_t = \frac{U_t}{\max(1, \operatorname{RMS}(U_t) / \kappa)}, \qquad
        \eta_t = \eta\, \max(\epsilon_2, \operatorname{RMS}(W_{t-1})) \\
        M_t &= \beta_1 M_{t-1} + (1-\beta_1)\, \eta_t \hat U_t
               \quad (\text{without } \beta_1\text{: } M_t = \eta_t \hat U_t) \\
        W_t &= (1-\eta_t\lambda) W_{t-1} - \alpha\, Q\, M_t.

    State of an m x n matrix: min(m,n) r for the basis and r + max(m,n) for the statistics, and max(m,n) r more with
    `beta1`; AdamW keeps 2 m n. What is not projected gets the same rule with Q = I, on dim 0 against the rest: m + n
    elements, and m n more with `beta1`. A vector is a matrix of one column, for which a and b are exact: n + 1.

    Where k is divided over processes, b is too, and a is on all of them; a step sums 2 r numbers a matrix: R^2 over
    columns, plain and as :math:`\|U\|` weights it. Where d is divided, it sums R (r x k). What is not projected has b
    on all processes where rows are divided, and sums 2 n + 1 numbers (one for mean(a)); where columns are, a and 2 m.
    `scale_parameter` takes one number more. One message takes this for all matrices; where both sides of one are
    divided, it is two for a projected one and three for another.

    Which parameters are projected is decided as in `GaLoreAdamW`. The first moment averages steps and not gradients, as
    in Adafactor's published code: a change of the learning rate takes about 1 / (1 - beta1) steps to arrive.

    Where this differs from galore-torch 1.0: `relative_step` is on where no `lr` is given; statistics are rotated at a
    refresh (`transport="keep"` is the published rule); tensors of more than two axes are factored as matrices, not
    along their last two axes; RMS(W) and the clipping never wait for the device. What `GaLoreAdamW` does about bases
    and about weights of low precision holds here too.

    Args:
        params: parameters, named parameters, or groups; groups of galore-torch work unchanged.
        lr: learning rate :math:`\eta`, the factor of every step. Default None, as in galore-torch: it is then the
            relative step :math:`\min(10^{-2}, 1/\sqrt t)`, t counting the steps of the parameter. Schedulers need a
            number. galore-torch's script for pretraining gives one, with `scale_parameter=False`.
        eps: :math:`(\epsilon_1, \epsilon_2)`. Default (1e-30, 1e-3), Adafactor's.
        clip_threshold: :math:`\kappa`, the largest RMS of a step in the subspace before it is scaled; infinity never
            clips. Default 1, Adafactor's.
        decay_rate: c <= 0 of the statistics' decay. Default -0.8, Adafactor's.
        beta1: decay rate of the first moment; None (or 0) keeps none. Default None, as in galore-torch; the paper runs
            with a first moment.
        weight_decay: decoupled weight decay :math:`\lambda`, times :math:`\eta_t`. Default 0, as in galore-torch.
        scale_parameter: whether :math:`\eta_t` is relative to RMS(W); else it is :math:`\eta`. Default True, as in
            galore-torch; its script for pretraining turns it off.
        relative_step: None, the default, means where `lr` is None. True or False only check that this is meant.
        warmup_init: start the relative step at :math:`10^{-6} t` instead of :math:`10^{-2}`. Default False.
        rank: r as a count (int >= 1) or as a share of d (float in (0, 1]); clamped to the smaller side; None: dense.
            Default 0.25, about what the paper takes (128 of 512 to 1024 of 4096).
        update_proj_gap: steps between two refreshes of a matrix, staggered over the group's matrices. Default 200, the
            paper's.
        scale: :math:`\alpha`, the step in the subspace relative to :math:`\eta_t`. Default 0.25, the paper's for
            pretraining.
        projection: `svd`, `power` or `random`, or an object of `slimstate.projections`; see `GaLoreAdamW`.
        side: `auto`, `left`, `right` or `reverse`, see `GaLoreAdamW`.
        batch_dims: how many leading axes of a parameter count matrices (1 for stacked experts); each has its own
            statistics, clipping and RMS.
        transport: what becomes of the statistics at a refresh: `rotate` (default) carries them into the new basis,
            `keep` leaves the numbers, `reset` forgets them and their age (in a stack of matrices those of all).
        maximize: ascend instead.
        moment_dtype: of the first moment: `float32`, `bfloat16` (rounded stochastically), `param` (the parameter's),
            `8bit` or `8bit-companded` (codes with a scale for 256 of them, see `docs/precision.md`; not of stacks that
            are not projected); None means float32, and float64 for float64 parameters. The statistics, few and of
            squares, are always so.
        basis_dtype: what bases are kept in: `bfloat16` or `8bit` (int8 codes, and a scale for each row of Q), which
            leaves them not quite orthonormal, see the guide to GaLoreAdamW; None means float32, and float64 for float64
            parameters. Q-GaLore, https://arxiv.org/abs/2407.08296, keeps them in 4 bits.
        stochastic_rounding: of weights in bfloat16 and float16; None means on.
        compensation: instead, round weights in bfloat16 and float16 to nearest and keep what that takes away: training
            is then that of float32 weights, at 2 bytes a weight more of state.
        nonfinite: what a gradient that is not finite does: `propagate` (default, as torch), `skip` (no parameter takes
            this step) or `raise` (FloatingPointError); the last two wait for the device once a step and count such
            steps in the group, `nonfinite_steps`.
        seed: of random bases and of the rounding.
        torch_keywords: `foreach`, `fused`, `capturable`, `differentiable` and `amsgrad`, where they change nothing.

    Raises:
        ValueError: for a value out of range, `lr` together with `relative_step=True`, neither of them, `warmup_init`
            with an `lr`, an unknown group key, a torch keyword that is not supported, or a rank where nothing can be
            projected.
        NotImplementedError: for galore-torch's `proj_type="full"` and `dim`.

    Example:
        >>> import torch
        >>> model = torch.nn.Linear(16, 8)
        >>> optimizer = GaLoreAdafactor(model.parameters(), lr=0.01, scale_parameter=False, rank=4)
        >>> _ = optimizer.step(lambda: model(torch.ones(1, 16)).square().sum().backward())
        >>> {key: tuple(x.shape) for key, x in optimizer.state[model.weight].items() if "exp_avg" in key}
        {'exp_avg_sq_row': (4,), 'exp_avg_sq_col': (16,)}
    """

    axes: ClassVar[dict[str, str]] = ProjectedOptimizer.axes | {"exp_avg_sq_row": "r", "exp_avg_sq_col": "k"}

    def __init__(
        self,
        params: ParamsT,
        lr: float | Tensor | None = None,
        eps: tuple[float, float] = (1e-30, 1e-3),
        clip_threshold: float = 1.0,
        decay_rate: float = -0.8,
        beta1: float | None = None,
        weight_decay: float = 0.0,
        scale_parameter: bool = True,
        relative_step: bool | None = None,
        warmup_init: bool = False,
        *,
        rank: int | float | None = DEFAULT_RANK,
        update_proj_gap: int = 200,
        scale: float = 0.25,
        projection: str | Projection = "svd",
        side: str = "auto",
        batch_dims: int = 0,
        transport: str = "rotate",
        maximize: bool = False,
        moment_dtype: str | torch.dtype | None = None,
        basis_dtype: str | torch.dtype | None = None,
        stochastic_rounding: bool | None = None,
        compensation: bool = False,
        nonfinite: str = "propagate",
        seed: int = 0,
        **torch_keywords: Any,
    ) -> None:
        refuse("GaLoreAdafactor", torch_keywords)
        defaults = dict(
            lr=lr,
            eps=eps,
            clip_threshold=clip_threshold,
            decay_rate=decay_rate,
            beta1=beta1,
            weight_decay=weight_decay,
            scale_parameter=scale_parameter,
            relative_step=relative_step,
            warmup_init=warmup_init,
            rank=rank,
            update_proj_gap=update_proj_gap,
            scale=scale,
            projection=projection,
            side=side,
            batch_dims=batch_dims,
            transport=transport,
            maximize=maximize,
            moment_dtype=moment_dtype,
            basis_dtype=basis_dtype,
            stochastic_rounding=stochastic_rounding,
            compensation=compensation,
            nonfinite=nonfinite,
            seed=seed,
        )
        super().__init__(params, defaults)

    def _has_shape(self, p: Tensor, group: Group) -> bool:
        return p.ndim > 1  # factored, projected or not

    def _check_rule(self, group: Group) -> None:
        check_adafactor(group)

    def _moments_spec(self, p: Tensor, group: Group) -> Spec:
        shape, dtype = self._moment_shape(p, group), compute_dtype(p.dtype)
        if self._is_projected(p, group):
            *lead, rows, columns = shape
        else:
            view = dense_view(p, group)
            lead, rows, columns = list(view.lead), view.rows, view.columns
            if lead and group["moment_dtype"] in CODED:  # its blocks of rows do not lie along dim 0
                group = group | {"moment_dtype": None}
        spec: Spec = {"exp_avg_sq_row": ((*lead, rows), dtype), "exp_avg_sq_col": ((*lead, columns), dtype)}
        if group["beta1"] is not None:
            spec |= moment_spec("exp_avg", p, group, shape, self._layout(p, group))
        return spec

    def _axes(self, key: str, p: Tensor, group: Group) -> str:
        if self._is_projected(p, group) or key not in DENSE_AXES:
            return super()._axes(key, p, group)
        return "b" * len(dense_view(p, group).lead) + DENSE_AXES[key]

    def _part(self, p: Tensor, group: Group) -> Part | None:
        return part_of(p, lambda: self._view(p, group) if self._is_projected(p, group) else dense_view(p, group))

    def _divided(self, matrix: Matrix, group: Group, projection: Projection) -> tuple[list[Matrix], Projection] | None:
        if matrix.part is None or matrix.part.divides("d") or not matrix.part.divides("k"):
            return super()._divided(matrix, group, projection)
        # An empty part too: it has its copy of a.
        return [replace(matrix, reduced=matrix.reduced or self._reduce(matrix, group, projection))], projection

    def _exchange(self, prepared: list[tuple[Group, Arranged]]) -> None:
        """Sums what R, the statistics, the clipping and the step size need of parameters that are divided."""
        divided: list[tuple[list[Any], int, Sums[Factors]]] = []
        for group, (dense, matrices) in prepared:
            lists: list[list[Any]] = [dense, *(some for some, _ in matrices)]
            for some in lists:
                for i, x in enumerate(some):
                    if x.part is not None and x.part.divides("mn") and x.param.numel():
                        divided.append((some, i, factors(x, group)))
        for (some, i, _), result in zip(divided, together(task for *_, task in divided), strict=True):
            some[i] = replace(some[i], sums=result)

    def _rotate_(self, matrix: Matrix, group: Group, j: int, overlap: Tensor) -> None:
        r"""With :math:`C = Q_\text{new}^\top Q_\text{old}`, and as if coordinates were uncorrelated,

        .. math::
            M \leftarrow C M, \qquad
            a_i \leftarrow \sum_l C_{il}^2\, a_l + \Big(1 - \sum_l C_{il}^2\Big) \operatorname{mean}(a).

        The second term is for what the old basis did not span: of it the best guess is the mean, and with a zero its
        first step would be 1 / sqrt(1 - rho) times too long. A rotation of rows does not mix columns, and b stays.
        """
        row = matrix.member(matrix.state["exp_avg_sq_row"], j)
        shares = overlap.square().to(row.dtype)
        row.copy_(shares @ row + (1 - shares.sum(1)).clamp_(min=0) * row.mean())
        if group["beta1"] is not None:
            exp_avg = moment_of(matrix, "exp_avg", ROTATED_EXP_AVG).member(j)
            exp_avg.write_(overlap @ exp_avg.read(overlap.dtype), copied=True)

    def _update(
        self, matrices: list[Matrix], reduced: list[tuple[Tensor, ...]], group: Group, projection: Projection
    ) -> None:
        for x, (r,) in zip(matrices, reduced, strict=True):
            state = x.state
            squares, sums = r.square(), x.sums
            a, b = inverse_roots_(
                state["exp_avg_sq_row"].unsqueeze(-1),
                state["exp_avg_sq_col"].unsqueeze(-2),
                squares.mean(-1, keepdim=True) if sums is None else sums.rows,
                squares.mean(-2, keepdim=True) if sums is None else sums.columns,
                x.age,
                group,
            )
            u = torch.mul(r, a, out=squares).mul_(b)
            eta = step_size(x, x.view, group)
            if sums is None:
                length = torch.linalg.vector_norm(u, dim=(-2, -1), keepdim=True)
                clip = clipping(length, u.shape[-2] * u.shape[-1], group)
            else:
                clip = sums.clip
            u.mul_(eta * clip)
            if group["beta1"] is not None:
                u = average_(moment_of(x, "exp_avg"), u, group["beta1"])
            if not x.p.numel():
                continue
            decay: Number = 1.0
            if group["scale_parameter"] and group["weight_decay"]:
                self._decay_(x, eta, group)
            elif not group["scale_parameter"]:
                decay = 1 - group["weight_decay"] * eta
            projection.write_back_(
                x.p,
                x.view,
                x.basis,
                u,
                alpha=group["scale"] if group["maximize"] else -group["scale"],
                beta=decay,
                rounding=rounding(x, group),
            )

    def _decay_(self, x: Matrix, eta: Number, group: Group) -> None:
        """W <- (1 - eta lambda) W, in a pass of its own: as a factor of the write-back, eta would have to be read."""
        assert isinstance(eta, Tensor)
        keep = (1 - group["weight_decay"] * eta).view(-1)

        def scale_(w: Tensor, j: int, rows: slice) -> None:
            w.mul_(keep[j])

        rewrite_(x.p, x.view, scale_, eta.dtype, rounding(x, group, DECAY), whole=True)

    def _dense_step_(self, entries: list[Entry], group: Group) -> None:
        for x in entries:
            if x.p.numel() or x.sums is not None:  # an empty part has its copy of a statistic
                self._step_in_rows_(x, group)

    def _step_in_rows_(self, x: Entry, group: Group) -> None:
        """The rule on whole matrices: a first pass over rows of G finds its mean squares, a second one the length of U,
        and a third one steps."""
        dtype, view, sums = compute_dtype(x.p.dtype), dense_view(x.p, group), x.sums
        grads = view.members(x.grad.reshape(view.shape))
        row, column = statistics(x, view)

        def gradient(j: int, rows: slice) -> Tensor:
            return grads[j][rows].to(dtype).flatten(1)

        eta = step_size(x, view, group)
        etas = eta.view(-1).unbind() if isinstance(eta, Tensor) and eta.ndim else [eta] * len(grads)
        left, right = [], []
        for j in range(len(grads)):
            if sums is not None:
                a, b = inverse_roots_(row[j], column[j], sums.rows[j], sums.columns[j], x.step, group, sums.mean[j])
                clip = sums.clip[j]
            else:
                row_means, column_sums = torch.empty_like(row[j]), torch.zeros_like(column[j])
                for s in blocks(grads[j], 0, dtype.itemsize):
                    squares = gradient(j, s).square()
                    row_means[s] = squares.mean(1, keepdim=True)
                    column_sums += squares.sum(0, keepdim=True)
                column_means = column_sums.div_(view.rows)
                a, b = inverse_roots_(row[j], column[j], row_means, column_means, x.step, group)
                length = joint_length(gradient(j, s).mul(a[s]).mul_(b) for s in blocks(grads[j], 0, dtype.itemsize))
                clip = clipping(length, grads[j].numel(), group)
            left.append(a.mul_(etas[j] * clip))
            right.append(b)
        if not x.p.numel():
            return

        exp_avg = None if group["beta1"] is None else moment_of(x, "exp_avg")
        exp_avgs = [] if exp_avg is None else view.members(exp_avg.kept.view(view.shape))

        def step_(rows_of_w: Tensor, j: int, s: slice) -> None:
            u = gradient(j, s).mul(left[j][s]).mul_(right[j])
            if exp_avg is not None:
                of_j = exp_avg._replace(kept=exp_avgs[j], first=j * view.rows * view.columns)
                u = average_(of_j.rows(s), u, group["beta1"])
            if group["weight_decay"]:
                rows_of_w.mul_(1 - group["weight_decay"] * etas[j])
            rows_of_w.add_(u, alpha=1 if group["maximize"] else -1)

        how = rounding(x, group)
        low = None if how.low is None else how.low.view(view.shape)
        rewrite_(x.p.reshape(view.shape), view, step_, dtype, how._replace(low=low))


def step_size(x: Entry, view: MatrixView, group: Group) -> Number:
    """eta_t: a number, or where it goes by RMS(W) one of each matrix (*lead, 1, 1), on the device."""
    lr = group["lr"]
    if lr is None:
        lr = smaller(1e-6 * x.step if group["warmup_init"] else 1e-2, x.step**-0.5)
    if not group["scale_parameter"]:  # two 0-d tensors would meet in float64
        return lr.to(compute_dtype(x.p.dtype)) if isinstance(lr, Tensor) else lr
    if x.sums is None:
        rms = weight_lengths(x, view).div_(math.sqrt(view.rows * view.columns))
    else:
        rms = x.sums.weight
    return rms.clamp_(min=group["eps"][1]).mul_(lr).view(*view.lead, 1, 1)


def weight_lengths(x: Entry, view: MatrixView) -> Tensor:
    """|W|_F of each matrix that is here (b,)."""
    dtype, low = compute_dtype(x.p.dtype), x.state.get("compensation")
    weights = view.members(x.p.reshape(view.shape))
    if not x.p.numel():
        return x.p.new_zeros(len(weights), dtype=dtype)
    lows = [None] * len(weights) if low is None else view.members(low.view(view.shape))
    lengths = [
        joint_length(widen(w[s], None if rest is None else rest[s], dtype) for s in blocks(w, 0, dtype.itemsize))
        for w, rest in zip(weights, lows, strict=True)
    ]
    return torch.stack(lengths)


def factors(x: Entry, group: Group) -> Sums[Factors]:
    r"""What the rule needs of X, which is R or a whole gradient, where this process holds a part of it.

    The clipping goes by

    .. math::
        \|U\|_F^2 = \operatorname{mean}(a) \sum_{ij} \frac{X_{ij}^2}{a_i\, b_j}.

    Where columns are divided, their b is known here, and where rows are, their a. Sums of X^2 over what is divided,
    weighted by what is known, are sent with the plain ones that the other factor waits for: one message, of two numbers
    for each of its entries, where the length alone would need another one.
    """
    assert x.part is not None
    assert x.part.view is not None
    view, dtype = x.view if isinstance(x, Matrix) else dense_view(x.p, group), compute_dtype(x.p.dtype)
    row, column = statistics(x, view)
    weights = [weight_lengths(x, view).square_()] if group["scale_parameter"] else []
    if isinstance(x, Matrix):
        assert x.reduced is not None
        (r,) = x.reduced
        if down := x.part.groups("d"):
            yield [(y, down) for y in (r, *weights)]
        over, across = x.part.groups(""), x.part.groups("k")
        xs, rows, columns = list(r.reshape(len(row), *r.shape[-2:])), r.shape[-2], x.part.view.k
    else:
        over, across = x.part.groups("m"), x.part.groups("n")
        xs, rows, columns = view.members(x.grad.reshape(view.shape)), x.part.view.rows, x.part.view.columns

    def sums(dim: int, by: Tensor | None = None) -> list[Tensor]:
        """Of X^2 over a dimension, and of X^2 / by."""
        found = [torch.zeros_like(column if dim == 0 else row) for _ in range(1 if by is None else 2)]
        for j, y in enumerate(xs):
            for s in blocks(y, 0, dtype.itemsize):
                squares = y[s].to(dtype).flatten(1).square()
                for into in found:
                    into[j][slice(None) if dim == 0 else s] += squares.sum(dim, keepdim=True)
                    if by is not None:
                        squares.div_(by[j][s] if dim == 0 else by[j])
        return found

    if across and not over:
        (of_columns,) = sums(0)
        b = taken(column, of_columns / rows, x.age, group)
        of_rows, weighted = sums(1, b)
        yield [(y, across) for y in (of_rows, weighted, *weights)]
        a = taken(row, of_rows / columns, x.age, group)
        mean = a.mean(1, keepdim=True)
        square = (weighted * (mean / a)).sum(1, keepdim=True)
    else:
        (of_rows,) = sums(1)
        if across:
            yield [(y, across) for y in (of_rows, *weights)]
        a = taken(row, of_rows / columns, x.age, group)
        of_columns, weighted = sums(0, a)
        mean = a.sum(1, keepdim=True)
        if over:
            yield [(y, over) for y in (of_columns, weighted, mean, *weights)]
        mean = mean / rows
        b = taken(column, of_columns / rows, x.age, group)
        square = (weighted * (mean / b)).sum(2, keepdim=True)
        if across:
            yield [(square, across)]
    clip = clipping(square.sqrt_(), rows * columns, group)
    lead = view.lead if isinstance(x, Matrix) else (len(row),)
    row_means, column_means, mean, clip = (
        y.reshape(*lead, *y.shape[1:]) for y in (of_rows / columns, of_columns / rows, mean, clip)
    )
    entries = x.part.view.rows * x.part.view.columns
    return Factors(row_means, column_means, mean, clip, (weights[0] / entries).sqrt_() if weights else None)


def statistics(x: Entry, view: MatrixView) -> tuple[Tensor, Tensor]:
    """What is kept of rows and of columns, as they are here (b, rows, 1) and (b, 1, columns)."""
    row, column, b = x.state["exp_avg_sq_row"], x.state["exp_avg_sq_col"], math.prod(view.lead)
    return row.view(b, row.shape[-1], 1), column.view(b, 1, column.shape[-1])


def taken(statistic: Tensor, means: Tensor, age: Number, group: Group) -> Tensor:
    """A statistic as it is after these mean squares were taken into it."""
    return lerp_(statistic.clone(), means + group["eps"][0], age ** group["decay_rate"])


def check_adafactor(group: Group) -> None:
    """Checks Adafactor's hyperparameters.

    Raises:
        ValueError: names the argument, its value and what is allowed.
    """
    for key, allowed in (
        ("scale_parameter", (True, False)),
        ("relative_step", (None, True, False)),
        ("warmup_init", (True, False)),
    ):
        if group[key] not in allowed:
            raise ValueError(f"{key} must be one of {', '.join(map(str, allowed))}, got {group[key]!r}")
    if group["lr"] is not None:
        check_lr(group)
        if group["relative_step"]:
            raise ValueError(f"lr={group['lr']!r} cannot be combined with relative_step=True: leave out one of the two")
        if group["warmup_init"]:
            raise ValueError(f"warmup_init=True is for the relative step: leave out lr={group['lr']!r}")
    elif group["relative_step"] is False:
        raise ValueError("relative_step=False needs an lr, got None")
    eps = group["eps"]
    if not (isinstance(eps, tuple | list) and len(eps) == 2 and all(map(is_number, eps)) and eps[0] > 0 <= eps[1]):
        raise ValueError(f"eps must be two numbers, the first > 0 and the second >= 0, got {eps!r}")
    group["eps"] = (float(eps[0]), float(eps[1]))
    if not is_number(group["clip_threshold"]) or not group["clip_threshold"] > 0:
        raise ValueError(f"clip_threshold must be a number > 0, got {group['clip_threshold']!r}")
    if not is_number(group["decay_rate"]) or not group["decay_rate"] <= 0:
        raise ValueError(f"decay_rate must be a number <= 0, got {group['decay_rate']!r}")
    if group["beta1"] is not None and not (is_number(group["beta1"]) and 0 <= group["beta1"] < 1):
        raise ValueError(f"beta1 must be None or a number in [0, 1), got {group['beta1']!r}")
    for key in ("clip_threshold", "decay_rate"):
        group[key] = float(group[key])
    group["beta1"] = float(group["beta1"]) if group["beta1"] else None
    check_not_negative(group, "weight_decay")
    check_storage(group)


def dense_view(p: Tensor, group: Group) -> MatrixView:
    """Dim 0 against the rest; vectors and scalars are matrices of one column."""
    if p.ndim < 2:
        return matrix_view((p.numel(), 1), "left")
    return matrix_view(tuple(p.shape), "left", group["batch_dims"] if p.ndim >= group["batch_dims"] + 2 else 0)


def inverse_roots_(
    row: Tensor,
    column: Tensor,
    row_means: Tensor,
    column_means: Tensor,
    age: Number,
    group: Group,
    mean: Tensor | None = None,
) -> tuple[Tensor, Tensor]:
    """Takes mean squares (r x 1 and 1 x k, or stacks) into the statistics, and returns the two factors, of the same
    shapes, by which R becomes U; mean(a) where not all rows are here."""
    weight = age ** group["decay_rate"]  # 1 at first: what the statistics were before does not count
    lerp_(row, row_means.add_(group["eps"][0]), weight)
    lerp_(column, column_means.add_(group["eps"][0]), weight)
    return (row / (row.mean(-2, keepdim=True) if mean is None else mean)).rsqrt_(), column.rsqrt()


def joint_length(parts: Iterable[Tensor]) -> Tensor:
    """|X|_F of what comes in parts, as a 0-d tensor."""
    return torch.linalg.vector_norm(torch.stack([torch.linalg.vector_norm(x) for x in parts]))


def clipping(length: Tensor, entries: int, group: Group) -> Tensor:
    """The factor that brings the RMS of something of this length to the threshold; 1 where it is below."""
    return (length / (math.sqrt(entries) * group["clip_threshold"])).clamp_(min=1).reciprocal_()


def average_(exp_avg: Moment, u: Tensor, beta1: float) -> Tensor:
    """M <- beta1 M + (1 - beta1) U; returns M in U's dtype."""
    m = exp_avg.read(u.dtype).reshape(u.shape).lerp_(u, 1 - beta1)
    exp_avg.write_(m.view(exp_avg.kept.shape), copied=not exp_avg.kept.is_contiguous())
    return m
