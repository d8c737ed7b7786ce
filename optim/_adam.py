"""Adam: its hyperparameters, its step for dense parameters, and its direction for projected gradients."""

from collections.abc import Sequence
from numbers import Integral, Real
from typing import Any

import torch
from torch import Tensor
from torch.optim.adamw import adamw

from slimstate import ops
from slimstate.ops import Dense, Key, adam_directions_, takes_adamw
from slimstate.ops.codes import Layout
from slimstate.projections._base import compute_dtype
from slimstate.projections._blocks import blocks
from slimstate.projections._numbers import Number, lerp_, scalar
from slimstate.projections._rounding import LOW_PRECISION, NEAREST, Rounding, narrow_, widen

from ._base import Entry, Group, Spec
from ._moments import EXP_AVG, EXP_AVG_SQ, MOMENT_DTYPES, WEIGHT, moment_of, moment_spec

__all__ = [
    "adam_directions",
    "adamw_step_",
    "check_adam",
    "check_lr",
    "check_not_negative",
    "check_shared",
    "check_storage",
    "is_number",
    "moment_keys",
    "moments_spec",
    "rounding",
    "take_",
    "weight_spec",
]

FUSED_DEVICES = ("cpu", "cuda", "mps", "xpu", "meta")


def check_adam(group: Group) -> None:
    """Checks the hyperparameters that every Adam here has.

    Raises:
        ValueError: names the argument, its value and what is allowed.
    """
    check_shared(group)
    betas = group["betas"]
    if not (isinstance(betas, tuple | list) and len(betas) == 2 and all(is_number(b) and 0 <= b < 1 for b in betas)):
        raise ValueError(f"betas must be two numbers in [0, 1), got {betas!r}")
    group["betas"] = (float(betas[0]), float(betas[1]))


def check_shared(group: Group) -> None:
    """Checks the hyperparameters that every optimizer here has, and eps.

    Raises:
        ValueError: names the argument, its value and what is allowed.
    """
    check_lr(group)
    check_not_negative(group, "eps", "weight_decay")
    check_storage(group)


def check_lr(group: Group) -> None:
    """Checks the learning rate."""
    lr = group["lr"]
    if isinstance(lr, Tensor):
        if lr.numel() != 1:
            raise ValueError(f"Tensor lr must be 1-element, got shape {tuple(lr.shape)}")
    elif not is_number(lr) or not lr >= 0:
        raise ValueError(f"lr must be a number >= 0 or a 1-element Tensor, got {lr!r}")
    else:
        group["lr"] = float(lr)  # a number of numpy's would not load with weights_only=True; so for all others


def check_not_negative(group: Group, *keys: str) -> None:
    """Checks numbers >= 0."""
    for key in keys:
        if not is_number(group[key]) or not group[key] >= 0:
            raise ValueError(f"{key} must be a number >= 0, got {group[key]!r}")
        group[key] = float(group[key])


def check_storage(group: Group) -> None:
    """Checks how moments and weights are kept."""
    if isinstance(group["moment_dtype"], torch.dtype):
        group["moment_dtype"] = str(group["moment_dtype"]).removeprefix("torch.")
    if group["moment_dtype"] not in (None, *MOMENT_DTYPES):
        allowed = ", ".join(MOMENT_DTYPES)
        raise ValueError(f"moment_dtype must be None or one of {allowed}, got {group['moment_dtype']!r}")
    if group["maximize"] not in (True, False):
        raise ValueError(f"maximize must be True or False, got {group['maximize']!r}")
    if group["stochastic_rounding"] not in (None, True, False):
        raise ValueError(f"stochastic_rounding must be None, True or False, got {group['stochastic_rounding']!r}")
    if group["compensation"] not in (True, False):
        raise ValueError(f"compensation must be True or False, got {group['compensation']!r}")
    if group["compensation"] and group["stochastic_rounding"]:
        raise ValueError("compensation=True rounds to nearest and keeps the rest: leave stochastic_rounding None")
    if not isinstance(group["seed"], Integral) or isinstance(group["seed"], bool):
        raise ValueError(f"seed must be an int, got {group['seed']!r}")
    group["seed"] = int(group["seed"])


def is_number(x: Any) -> bool:
    return isinstance(x, Real) and not isinstance(x, bool)


def moments_spec(p: Tensor, group: Group, shape: tuple[int, ...], layout: Layout = "rows") -> Spec:
    """The two moments of something of this shape."""
    first, second = (moment_spec(key, p, group, shape, layout) for key in ("exp_avg", "exp_avg_sq"))
    return first | second


def weight_spec(p: Tensor, group: Group) -> Spec:
    """What is kept of a weight beside its moments: with compensation, the 16 bits that rounding takes away."""
    if group["compensation"] and p.dtype in LOW_PRECISION:
        return {"compensation": (tuple(p.shape), torch.int16)}
    return {}


def adamw_step_(entries: list[Entry], group: Group, *, scale: float = 1.0, aged: bool = False) -> None:
    r"""AdamW on whole parameters, as torch.optim.AdamW:

    .. math::
        M \leftarrow \beta_1 M + (1-\beta_1) G, \quad V \leftarrow \beta_2 V + (1-\beta_2) G^2, \quad
        W \leftarrow (1-\eta\lambda) W - \eta \frac{M / (1-\beta_1^t)}{\sqrt{V / (1-\beta_2^t)} + \epsilon}.

    float32 and float64 go through torch's fused kernel; lower precision and moments of another dtype through our own
    where it is compiled. The rest, and strided memory, goes through torch's kernel in wide copies of a few MiB, and is
    rounded on the way back.

    Args:
        entries: the parameters.
        group: the hyperparameters.
        scale: of the step, not of the decay.
        aged: whether t is the age of the moments; else it is the parameter's step.
    """
    lr, weight_decay = scale * group["lr"], group["weight_decay"] / scale
    whole: list[tuple[Tensor, Tensor, Tensor, Tensor]] = []
    ages: list[Number] = []
    passes: list[Dense] = []
    for x in entries:
        age = x.age if aged else x.step
        parts = (x.p, x.grad, x.state["exp_avg"], x.state["exp_avg_sq"])
        same = parts[1].dtype == parts[2].dtype == parts[3].dtype == x.p.dtype
        if same and x.p.dtype not in LOW_PRECISION and all(y.is_contiguous() for y in parts):
            whole.append(parts)
            ages.append(age)
        elif takes_adamw(one := _dense(x, age, group)):
            passes.append(one)
        else:
            _step_in_blocks_(x, age, lr, weight_decay, group)
    numbers = {key: group[key] for key in ("betas", "eps", "maximize")}
    ops.adamw_step_(passes, lr=lr, weight_decay=weight_decay, **numbers)
    if whole:
        ps, grads, exp_avgs, exp_avg_sqs = (list(tensors) for tensors in zip(*whole, strict=True))
        _fused_(ps, grads, exp_avgs, exp_avg_sqs, ages, lr, weight_decay, group)


def _dense(x: Entry, age: Number, group: Group) -> Dense:
    """What the compiled op goes by."""
    m, v, state = x.state["exp_avg"], x.state["exp_avg_sq"], x.state
    scales = (state["exp_avg_scale"], state["exp_avg_sq_scale"]) if "exp_avg_scale" in state else None
    keys = (x.key(EXP_AVG), x.key(EXP_AVG_SQ)) if m.dtype in LOW_PRECISION else None
    return Dense(x.p, x.grad, m, v, age, scales, rounding(x, group), keys)


def _step_in_blocks_(x: Entry, age: Number, lr: Number, weight_decay: float, group: Group) -> None:
    dtype, how = compute_dtype(x.p.dtype), rounding(x, group)
    ps, grads = map(torch.atleast_1d, (x.p, x.grad))
    moments = [moment_of(x, key) for key in ("exp_avg", "exp_avg_sq")]
    lows = None if how.low is None else torch.atleast_1d(how.low)
    for s in blocks(ps, 0, dtype.itemsize):
        low = None if lows is None else lows[s]
        parts = [moment.rows(s) for moment in moments]
        wide = (widen(ps[s], low, dtype), grads[s].to(dtype), *(part.read(dtype, copy=True) for part in parts))
        w, g, m, v = (y.contiguous() for y in wide)
        _fused_([w], [g], [m], [v], [age], lr, weight_decay, group)
        narrow_(ps[s], w, how._replace(low=low), s.start * (w.numel() // max(1, w.shape[0])))
        for part, value in zip(parts, (m, v), strict=True):
            part.write_(value, copied=True)


def _fused_(
    params: list[Tensor],
    grads: list[Tensor],
    exp_avgs: list[Tensor],
    exp_avg_sqs: list[Tensor],
    ages: list[Any],
    lr: Any,
    weight_decay: float,
    group: Group,
) -> None:
    """torch's AdamW kernel over lists; `ages` already count this step."""
    settings = (*group["betas"], group["eps"], weight_decay, group["maximize"])
    if isinstance(ages[0], Tensor):
        torch.ops.slimstate.adamw_(params, grads, exp_avgs, exp_avg_sqs, ages, scalar(lr), *settings)
    else:
        _adamw_(params, grads, exp_avgs, exp_avg_sqs, ages, lr, *settings)


def _adamw_(
    params: list[Tensor],
    grads: list[Tensor],
    exp_avgs: list[Tensor],
    exp_avg_sqs: list[Tensor],
    ages: list[float],
    lr: float,
    beta1: float,
    beta2: float,
    eps: float,
    weight_decay: float,
    maximize: bool,
) -> None:
    if params[0].device.type not in FUSED_DEVICES:
        before = [torch.full((), age - 1, dtype=torch.float32) for age in ages]  # one less: torch counts by itself
        adamw(
            params,
            grads,
            exp_avgs,
            exp_avg_sqs,
            [],
            before,
            foreach=False,
            fused=False,
            amsgrad=False,
            beta1=beta1,
            beta2=beta2,
            lr=lr,
            weight_decay=weight_decay,
            eps=eps,
            maximize=maximize,
        )
        return
    alike: dict[Any, list[int]] = {}
    for i, (p, age) in enumerate(zip(params, ages, strict=True)):
        alike.setdefault((p.device, p.dtype, age), []).append(i)
    for (device, _, age), places in alike.items():
        step = torch.full((), age, dtype=torch.float32, device=device)  # which the kernel only reads
        torch._fused_adamw_(
            [params[i] for i in places],
            [grads[i] for i in places],
            [exp_avgs[i] for i in places],
            [exp_avg_sqs[i] for i in places],
            [],
            [step] * len(places),
            lr=lr,
            beta1=beta1,
            beta2=beta2,
            weight_decay=weight_decay,
            eps=eps,
            amsgrad=False,
            maximize=maximize,
        )


@torch.library.custom_op("slimstate::adamw_", mutates_args=("params", "exp_avgs", "exp_avg_sqs"))
def _(
    params: list[Tensor],
    grads: list[Tensor],
    exp_avgs: list[Tensor],
    exp_avg_sqs: list[Tensor],
    ages: list[Tensor],
    lr: Tensor,
    beta1: Tensor,
    beta2: Tensor,
    eps: float,
    weight_decay: float,
    maximize: bool,
) -> None:
    """`_adamw_` as one node of a compiled graph; its numbers are on the CPU, so that nothing waits for a device."""
    numbers = [age.item() for age in ages], lr.item(), beta1.item(), beta2.item()
    _adamw_(params, grads, exp_avgs, exp_avg_sqs, *numbers, eps, weight_decay, maximize)


def adam_directions(
    entries: Sequence[Entry],
    rs: list[Tensor],
    group: Group,
    ages: Sequence[Number],
    keys: tuple[str, str] = ("exp_avg", "exp_avg_sq"),
) -> list[Tensor]:
    r"""Takes projected gradients R into the moments of their parameters, and returns the directions in the subspaces:

    .. math::
        M \leftarrow \beta_1 M + (1-\beta_1) R, \quad V \leftarrow \beta_2 V + (1-\beta_2) R^2, \quad
        U = -\frac{M / (1-\beta_1^t)}{\sqrt{V / (1-\beta_2^t)} + \epsilon}.

    Args:
        entries: the parameters.
        rs: R (r x k) of each, or a stack of them, in the dtype of arithmetic; overwritten.
        group: the hyperparameters; `maximize` turns U around.
        ages: t of each, the number of gradients in its moments, this one included: a number, or int32 (r,) or (b, r)
            where rows differ.
        keys: the names of M and V in the state; others than these must be in R's dtype.

    Returns:
        U of each, which takes the place of R.
    """
    coded = [i for i, x in enumerate(entries) if f"{keys[0]}_scale" in x.state]
    for chosen in (coded, sorted({*range(len(rs))} - {*coded})):
        some = [entries[i] for i in chosen]
        first, second = ([x.state[key] for x in some] for key in keys)
        adam_directions_(
            [rs[i] for i in chosen],
            first,
            second,
            [ages[i] for i in chosen],
            betas=group["betas"],
            eps=group["eps"],
            maximize=group["maximize"],
            keys=() if chosen is coded else moment_keys(some, first),
            scales=[(x.state[f"{keys[0]}_scale"], x.state[f"{keys[1]}_scale"]) for x in some if chosen is coded],
        )
    return rs


def moment_keys(entries: Sequence[Entry], moments: list[Tensor]) -> list[tuple[Key, Key]]:
    """What the random bits of moments go by, for a list of which any are rounded."""
    if all(moment.dtype in (torch.float32, torch.float64) for moment in moments):
        return []
    return [(x.key(EXP_AVG), x.key(EXP_AVG_SQ)) for x in entries]


def take_(m: Tensor, v: Tensor, g: Tensor, beta1: Number, beta2: Number) -> None:
    """M <- b1 M + (1-b1) G, V <- b2 V + (1-b2) G^2."""
    lerp_(m, g, 1 - beta1)
    lerp_(v, g.square(), 1 - beta2)


def rounding(x: Entry, group: Group, purpose: int = WEIGHT) -> Rounding:
    """How this step rounds the weight, where it is of low precision."""
    if x.p.dtype not in LOW_PRECISION:
        return NEAREST
    if group["compensation"]:
        return Rounding(low=x.state["compensation"])
    return NEAREST if group["stochastic_rounding"] is False else Rounding(x.key(purpose))
