"""AdamP and SGDP. Heo et al., 2021. https://arxiv.org/abs/2006.08217"""

import math
from collections.abc import Iterator
from dataclasses import replace
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.optim.optimizer import ParamsT

from slimstate.ops.tangent import Parameter, TangentRule, tangent_dots, tangent_step_, tangent_takes
from slimstate.projections._base import compute_dtype
from slimstate.projections._blocks import blocks
from slimstate.projections._numbers import Number, lerp_
from slimstate.projections._rounding import narrow_, widen

from ._adam import (
    adamw_step_,
    check_adam,
    check_shared,
    is_number,
    moments_spec,
    rounding,
    take_,
    weight_spec,
)
from ._base import Entry, Group, Optimizer, Spec, refuse
from ._moments import EXP_AVG, EXP_AVG_SQ, MOMENTS, WEIGHT, moment_of, moment_spec
from ._sharding import Sums, together

__all__ = ["SGDP", "AdamP"]

ROUNDED = (WEIGHT, EXP_AVG, EXP_AVG_SQ)  # the purposes of random bits


class Views(NamedTuple):
    r"""What the test goes by.

    Args:
        dots: :math:`\langle w_i, g_i \rangle, \|g_i\|^2, \|w_i\|^2, \langle w_i, u_i \rangle` of each row (4, rows, 1,
            ...).
        channel: whether the channel view fires (0-d).
        layer: the sums of the dots over all rows (4, 1, 1, ...); None where that view is not tried.
    """

    dots: Tensor
    channel: Tensor
    layer: Tensor | None


class TangentOptimizer(Optimizer):
    r"""A step U that loses its radial part wherever the gradient says that the weight's length does not matter.

    With w, g and u the rows of W, G and U in the channel view (dim 0 against the rest), and else in the layer view (all
    of the tensor is one row),

    .. math::
        \max_i |\cos(g_i, w_i)| < \delta / \sqrt{d} \;\Rightarrow\;
        u_i \leftarrow u_i - \frac{w_i \langle w_i, u_i \rangle}{(\|w_i\| + \epsilon)^2}, \quad q = q_\text{wd};
        \quad \text{otherwise } q = 1; \qquad W \leftarrow (1 - \eta\lambda q) W - \eta U.

    What is removed is a multiple of the row itself, so that it and the decay are one factor for each row. A first pass
    over blocks of rows finds the dot products for these factors, a second one steps: no temporary of the weight's size.
    Dense memory goes through compiled passes where there are any.
    """

    def _rates(self, group: Group) -> tuple[Number, Number]:
        """The two numbers by which the moments go."""
        raise NotImplementedError

    def _direction(self, g: Tensor, moments: list[Tensor], t: Number, group: Group) -> Tensor:
        """Takes a block G of the gradient into the moments, its t-th, and returns U; may be one of the moments."""
        raise NotImplementedError

    def _has_shape(self, p: Tensor, group: Group) -> bool:
        return is_tested(p, group)

    def _decay(self, group: Group) -> Number:
        """The decoupled decay rate where no view fires."""
        rate: float = group["weight_decay"]
        return rate

    def _exchange(self, prepared: list[tuple[Group, list[Entry]]]) -> None:
        """Finds out about the views of parameters whose rows or columns are divided."""
        tested = [
            (entries, i, self._divided_views(x, group))
            for group, entries in prepared
            for i, x in enumerate(entries)
            if x.part is not None and x.part.held and x.param.numel() and is_tested(x.p, group)
        ]
        for (entries, i, _), views in zip(tested, together(views for *_, views in tested), strict=True):
            entries[i] = replace(entries[i], sums=views)

    def _divided_views(self, x: Entry, group: Group) -> Sums[Views]:
        """The views of a parameter of which this process holds a part, from two rounds of sums at most."""
        assert x.part is not None
        shape, across = x.part.shape, "".join(map(str, range(1, x.p.ndim)))
        dots = self._dots(x, group)
        if x.part.divides(across):
            yield [(dots, x.part.groups(across))]
        orthogonal, seen = looks(dots, math.prod(shape[1:]), group)
        # Summed, votes tell whether a row of any process keeps the view from firing, and if not whether one was seen.
        vote = torch.where(orthogonal, seen.to(dots.dtype), math.inf)
        layer = dots.sum(1, keepdim=True) if group["layer_view"] else None
        if x.part.divides("0"):
            yield [(y, x.part.groups("0")) for y in (vote, layer) if y is not None]
        return Views(dots, (vote > 0) & vote.isfinite(), layer)

    def _step_group(self, group: Group, entries: list[Entry]) -> None:
        alike: dict[Any, list[tuple[Entry, Parameter]]] = {}
        for x in entries:
            if not x.p.numel():
                continue
            parameter = parameter_of(x, group)
            if tangent_takes(parameter):
                dtypes = tuple(y.dtype for y in (x.p, *parameter.moments))
                alike.setdefault((x.p.device, dtypes, x.sums is None), []).append((x, parameter))
            else:
                self._update(x, group)
        for (_, dtypes, _), some in alike.items():
            tangent_step_(
                [parameter for _, parameter in some],
                self._rule(group),
                lr=group["lr"],
                decay=self._decay(group),
                **{key: group[key] for key in ("delta", "wd_ratio", "layer_view")},
                factors=[self._factor(x, x.sums, group).flatten() for x, _ in some if x.sums is not None],
                keys=[[x.key(i) for i in ROUNDED] for x, _ in some if set(dtypes) != {torch.float32}],
                stochastic=group["stochastic_rounding"] is not False,
            )

    def _rule(self, group: Group) -> TangentRule:
        return TangentRule(self._rates(group), group["eps"], group["nesterov"], group["maximize"])

    def _factor(self, x: Entry, views: Views, group: Group) -> Tensor:
        """What each row is multiplied by (rows, 1, ...)."""
        q, radial = radial_part(views, x.p.numel() if x.part is None else math.prod(x.part.shape), group)
        return 1 - group["lr"] * self._decay(group) * q + group["lr"] * radial

    def _blocks(
        self, x: Entry, group: Group, *, copy: bool
    ) -> Iterator[tuple[slice, Tensor, Tensor, list[Tensor], Tensor]]:
        """Rows of W: which, W and G there, the moments after this step (in their own memory, unless copied), and U."""
        p, dtype, low = x.p, compute_dtype(x.p.dtype), rounding(x, group).low
        w, g = map(torch.atleast_1d, (p, x.grad))
        moments = [moment_of(x, key) for key in MOMENTS if key in x.state]
        low = None if low is None else torch.atleast_1d(low)
        for s in blocks(w, 0, 4 * dtype.itemsize):  # several temporaries of a block live at once
            g_s = -g[s].to(dtype) if group["maximize"] else g[s].to(dtype)
            wide = [moment.rows(s).read(dtype, copy=copy) for moment in moments]
            w_s = w[s] if p.dtype == dtype else widen(w[s], None if low is None else low[s], dtype)
            yield s, w_s, g_s, wide, self._direction(g_s, wide, x.step, group)

    def _dots(self, x: Entry, group: Group) -> Tensor:
        """As in `Views`, over what this process holds of each row."""
        if tangent_takes(parameter := parameter_of(x, group)):
            return tangent_dots(parameter, self._rule(group))
        dots = [
            torch.stack([row_sums(y) for y in (w_s * g_s, g_s * g_s, w_s * w_s, w_s * u)])
            for _, w_s, g_s, _, u in self._blocks(x, group, copy=True)
        ]
        if not dots:
            return x.p.new_zeros((4, 0, *[1] * (x.p.ndim - 1)), dtype=compute_dtype(x.p.dtype))
        return torch.cat(dots, 1)

    def _update(self, x: Entry, group: Group) -> None:
        p, dtype, how = x.p, compute_dtype(x.p.dtype), rounding(x, group)
        lr = group["lr"]
        w, moments = torch.atleast_1d(p), [moment_of(x, key) for key in MOMENTS if key in x.state]
        low = None if how.low is None else torch.atleast_1d(how.low)

        factor: Number = 1 - lr * self._decay(group)
        columns = p.numel() // len(w)
        if is_tested(p, group):
            views = views_of(self._dots(x, group), columns, group) if x.sums is None else x.sums
            factor = self._factor(x, views, group)

        for s, w_s, _, wide, u in self._blocks(x, group, copy=False):
            w_s.mul_(factor[s] if isinstance(factor, Tensor) and factor.ndim else factor).sub_(u * lr)
            if p.dtype != dtype:
                narrow_(w[s], w_s, how._replace(low=None if low is None else low[s]), s.start * columns)
            for moment, value in zip(moments, wide, strict=True):
                moment.rows(s).write_(value)


def parameter_of(x: Entry, group: Group) -> Parameter:
    """An entry as the compiled passes take it."""
    moments = tuple(x.state[key] for key in MOMENTS if key in x.state)
    return Parameter(x.p, x.grad, moments, x.step, rounding(x, group).low)


def is_tested(p: Tensor, group: Group) -> bool:
    """Vectors never are; with delta = 0 no cosine is below the threshold."""
    return p.ndim > 1 and group["delta"] > 0


def row_sums(x: Tensor) -> Tensor:
    """(rows, ...) -> (rows, 1, ...), whatever the strides."""
    return x.sum(tuple(range(1, x.ndim)), keepdim=True)


def views_of(dots: Tensor, columns: int, group: Group) -> Views:
    """The views of a parameter that is whole, whose rows have this length."""
    orthogonal, seen = looks(dots, columns, group)
    return Views(dots, orthogonal & seen, dots.sum(1, keepdim=True) if group["layer_view"] else None)


def looks(dots: Tensor, columns: int, group: Group) -> tuple[Tensor, Tensor]:
    """Whether the gradients of all rows look orthogonal, and whether any row shows something (0-d); a view fires for
    both.

    A row whose gradient or weight is no longer than epsilon shows nothing: it does not keep a view from firing, and a
    view of such rows only does not fire.
    """
    eps, tiny = group["eps"], torch.finfo(dots.dtype).tiny
    wg, g_norm, w_norm = dots[0], dots[1].sqrt(), dots[2].sqrt()
    cosine = wg.abs() / g_norm.clamp(min=max(eps, tiny)) / w_norm.clamp(min=max(eps, tiny))
    seen = (g_norm > eps) & (w_norm > eps)
    return (cosine < group["delta"] / math.sqrt(columns)).all(), seen.any()


def multiples(dots: Tensor, eps: float) -> Tensor:
    """Of each row, the multiple that is its step's radial part."""
    return dots[3] / (dots[2].sqrt() + eps).square().clamp(min=torch.finfo(dots.dtype).tiny)


def radial_part(views: Views, entries: int, group: Group) -> tuple[Tensor, Tensor]:
    r"""What follows from the test, without a look at any value from Python.

    Args:
        views: of the parameter.
        entries: how many it has.
        group: the hyperparameters.

    Returns:
        The factor q of the decay (0-d), and the multiple of each row that is its step's radial part (rows, 1, ...);
        (1, 0) where neither view fired.
    """
    fired = views.channel
    radial = torch.where(fired, multiples(views.dots, group["eps"]), 0)
    if views.layer is not None:
        orthogonal, seen = looks(views.layer, entries, group)
        fires = ~fired & orthogonal & seen
        radial = torch.where(fires, multiples(views.layer, group["eps"]), radial)
        fired = fired | fires
    return 1 - (1 - group["wd_ratio"]) * fired.to(radial.dtype), radial


def check_tangent(group: Group) -> None:
    """Checks the hyperparameters of the test.

    Raises:
        ValueError: names the argument, its value and what is allowed.
    """
    for key in ("delta", "wd_ratio"):
        if not is_number(group[key]) or not group[key] >= 0:
            raise ValueError(f"{key} must be a number >= 0, got {group[key]!r}")
        group[key] = float(group[key])
    for key in ("nesterov", "layer_view"):
        if group[key] not in (True, False):
            raise ValueError(f"{key} must be True or False, got {group[key]!r}")


class AdamP(TangentOptimizer):
    r"""Adam that does not lengthen weights whose length does not matter.

    A weight in front of a normalisation is scale-invariant: its gradient is orthogonal to it, so that every step of
    momentum makes it longer and the next one smaller in effect. AdamP recognises such weights W (m x n) by the cosine
    of gradient and weight, and takes the radial part out of the step:

    .. math::
        M_t &= \beta_1 M_{t-1} + (1-\beta_1) G_t, \qquad V_t = \beta_2 V_{t-1} + (1-\beta_2) G_t^2, \\
        U_t &= \frac{M_t / (1-\beta_1^t)}{\sqrt{V_t / (1-\beta_2^t)} + \epsilon}
            \qquad (\text{nesterov: } \beta_1 M_t + (1-\beta_1) G_t \text{ for } M_t), \\
        (U_t, q) &\leftarrow \begin{cases}
            (U_t - \hat w \langle \hat w, U_t \rangle,\ q_\text{wd}) & \text{if } \max_i |\cos(g_i, w_i)| <
                \delta / \sqrt{d} \\
            (U_t, 1) & \text{otherwise,} \end{cases} \\
        W_t &= (1 - \eta\lambda q) W_{t-1} - \eta\, U_t,

    with :math:`w_i, g_i` the rows of W and G, :math:`\hat w = w_i / (\|w_i\| + \epsilon)` row by row, d the length of a
    row: first in the channel view (dim 0 against the rest), and if that does not fire in the layer view (the tensor as
    one row). Vectors and scalars get AdamW, and so does everything with `delta=0`.

    State of an m x n matrix: 2 m n elements in `moment_dtype`, and `step`, as AdamW; divided as the parameter is.

    Where rows are divided over processes, a step sums five numbers a matrix, in one message for all of them: the dot
    products of the layer view, and whether all rows pass in the channel view (`layer_view=False`: this one alone).
    Where columns are divided, it sums the four dot products of each row; where both are, one after the other.

    Where this differs from adamp 0.3: rows no longer than epsilon, of the gradient or the weight, show nothing (there a
    zero gradient or weight counts as orthogonal and cuts the decay); any memory layout works; nothing waits for the
    device; weights of low precision are rounded stochastically.

    Args:
        params: parameters, named parameters, or groups.
        lr: learning rate :math:`\eta`; a 1-element Tensor is read at every step.
        betas: decay rates of the moments. Default (0.9, 0.999), as in torch.optim.Adam and adamp.
        eps: :math:`\epsilon`. Default 1e-8, as in torch.optim.Adam and adamp.
        weight_decay: decoupled weight decay :math:`\lambda`. Default 0, as in adamp; its examples take 0.01.
        delta: :math:`\delta`, the threshold of the test. Default 0.1, the paper's.
        wd_ratio: :math:`q_\text{wd}`, the share of the decay that remains where a view fired. Default 0.1, the paper's.
        nesterov: look ahead with the gradient.
        layer_view: whether the layer view is tried. As published it is; on a weight that is not scale-invariant it
            fires by chance in 8 % of the steps at :math:`\delta = 0.1`, whatever the shape.
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
        ValueError: for a value out of range, an unknown group key, or a torch keyword that is not supported.

    Example:
        >>> import torch
        >>> weight = torch.nn.Parameter(torch.tensor([[3.0, 4.0]]))
        >>> optimizer = AdamP([weight], lr=0.1)
        >>> weight.grad = torch.tensor([[4.0, -3.0]])  # orthogonal to the weight
        >>> optimizer.step()  # Adam's first step is (0.1, -0.1); its part along (0.6, 0.8) is taken out
        >>> weight.data
        tensor([[2.8880, 4.0840]])
    """

    def __init__(
        self,
        params: ParamsT,
        lr: float | Tensor = 1e-3,
        betas: tuple[float, float] = (0.9, 0.999),
        eps: float = 1e-8,
        weight_decay: float = 0.0,
        *,
        delta: float = 0.1,
        wd_ratio: float = 0.1,
        nesterov: bool = False,
        layer_view: bool = True,
        maximize: bool = False,
        moment_dtype: str | torch.dtype | None = None,
        stochastic_rounding: bool | None = None,
        compensation: bool = False,
        nonfinite: str = "propagate",
        seed: int = 0,
        **torch_keywords: Any,
    ) -> None:
        refuse("AdamP", torch_keywords)
        defaults = dict(
            lr=lr,
            betas=betas,
            eps=eps,
            weight_decay=weight_decay,
            delta=delta,
            wd_ratio=wd_ratio,
            nesterov=nesterov,
            layer_view=layer_view,
            maximize=maximize,
            moment_dtype=moment_dtype,
            stochastic_rounding=stochastic_rounding,
            compensation=compensation,
            nonfinite=nonfinite,
            seed=seed,
        )
        super().__init__(params, defaults)

    def _check(self, group: Group) -> None:
        check_adam(group)
        check_tangent(group)

    def _spec(self, p: Tensor, group: Group) -> Spec:
        return moments_spec(p, group, tuple(p.shape)) | weight_spec(p, group)

    def _step_group(self, group: Group, entries: list[Entry]) -> None:
        if not group["nesterov"]:
            adamw_step_([x for x in entries if not is_tested(x.p, group)], group)
            entries = [x for x in entries if is_tested(x.p, group)]
        super()._step_group(group, entries)

    def _rates(self, group: Group) -> tuple[Number, Number]:
        beta1, beta2 = group["betas"]
        return beta1, beta2

    def _direction(self, g: Tensor, moments: list[Tensor], t: Number, group: Group) -> Tensor:
        m, v = moments
        beta1, beta2 = group["betas"]
        take_(m, v, g, beta1, beta2)
        if group["nesterov"]:
            m = lerp_(m.clone(), g, 1 - beta1)
        root = (v / (1 - beta2**t)).sqrt_().add_(group["eps"])
        return (m / (1 - beta1**t)).div_(root)


class SGDP(TangentOptimizer):
    r"""SGD with momentum that does not lengthen weights whose length does not matter: `AdamP` without the root.

    .. math::
        M_t = \mu M_{t-1} + (1-\tau) G_t, \qquad U_t = M_t \quad (\text{nesterov: } G_t + \mu M_t), \qquad
        W_t = \left(1 - \frac{\eta\lambda q}{1-\mu}\right) W_{t-1} - \eta\, U_t,

    after the test and the projection of `AdamP`. The decay is decoupled, and :math:`1/(1-\mu)` makes it as strong as
    what torch.optim.SGD accumulates in its momentum.

    State of an m x n matrix: m n elements in `moment_dtype`, none at `momentum=0`, and `step`; divided as the parameter
    is. What a step sums over processes is said in `AdamP`.

    Where this differs from adamp 0.3: as `AdamP`, and the momentum is never projected (there it is without nesterov,
    since the step is its memory). Where it differs from torch.optim.SGD: the momentum starts at zero, so that
    `dampening` acts on the first gradient too.

    Args:
        params: parameters, named parameters, or groups.
        lr: learning rate :math:`\eta`; a 1-element Tensor is read at every step. Default 1e-3, as in torch.optim.SGD;
            adamp's example takes 0.1.
        momentum: :math:`\mu` in [0, 1). Default 0, as in torch.optim.SGD and adamp; its example takes 0.9.
        dampening: :math:`\tau`. Default 0, as in torch.optim.SGD and adamp.
        weight_decay: :math:`\lambda`. Default 0, as in torch.optim.SGD and adamp; its example takes 1e-5.
        nesterov: look ahead with the gradient; needs momentum and no dampening, as in torch.optim.SGD.
        eps: :math:`\epsilon` of the cosine and of the unit vector. Default 1e-8, as in adamp.
        delta: :math:`\delta`, the threshold of the test. Default 0.1, the paper's.
        wd_ratio: :math:`q_\text{wd}`, the share of the decay that remains where a view fired. Default 0.1, the paper's.
        layer_view: whether the layer view is tried, see `AdamP`.
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
        torch_keywords: `foreach`, `fused`, `capturable` and `differentiable`, where they change nothing.

    Raises:
        ValueError: for a value out of range, an unknown group key, or a torch keyword that is not supported.

    Example:
        >>> import torch
        >>> weight = torch.nn.Parameter(torch.ones(2, 3))
        >>> optimizer = SGDP([weight], lr=0.1, momentum=0.9, nesterov=True)
        >>> weight.grad = torch.ones_like(weight)  # parallel to the weight: no view fires
        >>> optimizer.step()
        >>> weight.data
        tensor([[0.8100, 0.8100, 0.8100],
                [0.8100, 0.8100, 0.8100]])
    """

    def __init__(
        self,
        params: ParamsT,
        lr: float | Tensor = 1e-3,
        momentum: float = 0.0,
        dampening: float = 0.0,
        weight_decay: float = 0.0,
        nesterov: bool = False,
        *,
        eps: float = 1e-8,
        delta: float = 0.1,
        wd_ratio: float = 0.1,
        layer_view: bool = True,
        maximize: bool = False,
        moment_dtype: str | torch.dtype | None = None,
        stochastic_rounding: bool | None = None,
        compensation: bool = False,
        nonfinite: str = "propagate",
        seed: int = 0,
        **torch_keywords: Any,
    ) -> None:
        refuse("SGDP", torch_keywords)
        defaults = dict(
            lr=lr,
            momentum=momentum,
            dampening=dampening,
            weight_decay=weight_decay,
            nesterov=nesterov,
            eps=eps,
            delta=delta,
            wd_ratio=wd_ratio,
            layer_view=layer_view,
            maximize=maximize,
            moment_dtype=moment_dtype,
            stochastic_rounding=stochastic_rounding,
            compensation=compensation,
            nonfinite=nonfinite,
            seed=seed,
        )
        super().__init__(params, defaults)

    def _check(self, group: Group) -> None:
        check_shared(group)
        check_tangent(group)
        if not is_number(group["momentum"]) or not 0 <= group["momentum"] < 1:
            raise ValueError(f"momentum must be a number in [0, 1), got {group['momentum']!r}")
        if not is_number(group["dampening"]):
            raise ValueError(f"dampening must be a number, got {group['dampening']!r}")
        group["momentum"], group["dampening"] = float(group["momentum"]), float(group["dampening"])
        if group["nesterov"] and not (group["momentum"] > 0 and group["dampening"] == 0):
            raise ValueError("nesterov=True needs momentum > 0 and dampening = 0")

    def _spec(self, p: Tensor, group: Group) -> Spec:
        return moment_spec("momentum_buffer", p, group, tuple(p.shape), self._layout(p, group)) | weight_spec(p, group)

    def _passing(self, p: Tensor, group: Group) -> frozenset[str]:
        return frozenset(moment_spec("momentum_buffer", p, group, tuple(p.shape), self._layout(p, group)))

    def _select_states(self, group: Group, params: list[Tensor]) -> None:
        for p in params:  # a scheduler may have raised the momentum from zero, or brought it there
            keys = self._passing(p, group)
            if not group["momentum"]:
                for key in keys:
                    self.state[p].pop(key, None)
            elif not keys <= self.state[p].keys():
                self.state[p].update(self._zeros(p, group, keys))

    def _decay(self, group: Group) -> Number:
        rate: Number = group["weight_decay"] / (1 - group["momentum"])
        return rate

    def _rates(self, group: Group) -> tuple[Number, Number]:
        return group["momentum"], group["dampening"]

    def _direction(self, g: Tensor, moments: list[Tensor], t: Number, group: Group) -> Tensor:
        if not moments:
            return (1 - group["dampening"]) * g
        (m,) = moments
        m.mul_(group["momentum"]).add_(g, alpha=1 - group["dampening"])
        return g + group["momentum"] * m if group["nesterov"] else m
