"""Adam: its hyperparameters, its step for dense parameters, and its direction for projected gradients."""

import math
from numbers import Integral, Real
from typing import Any

import torch
from torch import Tensor
from torch.optim.adamw import adamw

from slimstate.ops import stochastic_round_
from slimstate.projections._base import compute_dtype
from slimstate.projections._blocks import blocks

from ._base import Group, Optimizer, Spec, State

__all__ = [
    "adam_directions",
    "adamw_step_",
    "aged_direction_",
    "check_adam",
    "check_lr",
    "check_not_negative",
    "check_shared",
    "check_storage",
    "is_number",
    "moment_dtype",
    "moments_spec",
    "store_",
    "weight_rounding",
]

# Purposes of random bits: what is rounded. `_projected` goes on from here.
WEIGHT, EXP_AVG, EXP_AVG_SQ = range(3)

LOW_PRECISION = (torch.bfloat16, torch.float16)
FUSED_DEVICES = ("cpu", "cuda", "mps", "xpu")
MOMENT_DTYPES = ("float32", "bfloat16", "param")


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
    if not isinstance(group["seed"], Integral) or isinstance(group["seed"], bool):
        raise ValueError(f"seed must be an int, got {group['seed']!r}")
    group["seed"] = int(group["seed"])


def is_number(x: Any) -> bool:
    return isinstance(x, Real) and not isinstance(x, bool)


def moment_dtype(p: Tensor, group: Group) -> torch.dtype:
    """What moments are kept in: by default float32, and float64 for float64 parameters."""
    match group["moment_dtype"]:
        case None:
            return compute_dtype(p.dtype)
        case "param":
            return p.dtype
        case name:
            return getattr(torch, name)


def moments_spec(p: Tensor, group: Group, shape: tuple[int, ...]) -> Spec:
    """The two moments of something of this shape."""
    dtype = moment_dtype(p, group)
    return {"exp_avg": (shape, dtype), "exp_avg_sq": (shape, dtype)}


def adamw_step_(
    optimizer: Optimizer, params: list[Tensor], group: Group, *, scale: float = 1.0, clock: str = "step"
) -> None:
    r"""AdamW on whole parameters, as torch.optim.AdamW:

    .. math::
        M \leftarrow \beta_1 M + (1-\beta_1) G, \quad V \leftarrow \beta_2 V + (1-\beta_2) G^2, \quad
        W \leftarrow (1-\eta\lambda) W - \eta \frac{M / (1-\beta_1^t)}{\sqrt{V / (1-\beta_2^t)} + \epsilon}.

    float32 and float64 go through torch's fused kernel. Lower precision, moments of another dtype and strided memory
    go through the same kernel in wide copies of a few MiB, and are rounded stochastically on the way back.

    Args:
        optimizer: whose state holds the moments.
        params: the parameters.
        group: the hyperparameters.
        scale: of the step, not of the decay.
        clock: the counter in the state that is t: how many gradients are in the moments, this one included.
    """
    rates = dict(lr=scale * float(group["lr"]), weight_decay=group["weight_decay"] / scale)
    whole: list[tuple[Tensor, ...]] = []
    for p in params:
        state = optimizer.state[p]
        assert p.grad is not None
        parts = (p, p.grad, state["exp_avg"], state["exp_avg_sq"])
        if all(x.is_contiguous() and x.dtype == p.dtype for x in parts) and p.dtype not in LOW_PRECISION:
            whole.append((*parts, state[clock]))
        else:
            _step_in_blocks_(optimizer, p, p.grad, state, group, clock, **rates)
    if whole:
        _fused_(*map(list, zip(*whole, strict=True)), group=group, **rates)


def _step_in_blocks_(
    optimizer: Optimizer, p: Tensor, grad: Tensor, state: State, group: Group, clock: str, **rates: float
) -> None:
    dtype = compute_dtype(p.dtype)
    keys = [weight_rounding(optimizer, p, group), *(optimizer._draw(p, group, x) for x in (EXP_AVG, EXP_AVG_SQ))]
    targets = [x if x.ndim else x[None] for x in (p, grad, state["exp_avg"], state["exp_avg_sq"])]
    for s in blocks(targets[0], 0, dtype.itemsize):
        stored = [x[s] for x in targets]
        w, g, m, v = (x.to(dtype).contiguous() for x in stored)
        _fused_([w], [g], [m], [v], [state[clock]], group=group, **rates)
        offset = s.start * (w.numel() // max(1, w.shape[0]))
        for target, value, key in zip((stored[0], *stored[2:]), (w, m, v), keys, strict=True):
            store_(target, value, key, offset)


def _fused_(
    params: list[Tensor],
    grads: list[Tensor],
    exp_avgs: list[Tensor],
    exp_avg_sqs: list[Tensor],
    steps: list[Tensor],
    *,
    group: Group,
    lr: float,
    weight_decay: float,
) -> None:
    """torch's AdamW kernel over lists; `steps` already count this step and are not changed."""
    before = [  # on the parameter's device, and one less, since the kernel counts by itself
        torch.full((), step.item() - 1, dtype=torch.float32, device=p.device)
        for p, step in zip(params, steps, strict=True)
    ]
    adamw(
        params,
        grads,
        exp_avgs,
        exp_avg_sqs,
        [],
        before,
        fused=params[0].device.type in FUSED_DEVICES,
        foreach=False,
        amsgrad=False,
        beta1=group["betas"][0],
        beta2=group["betas"][1],
        lr=lr,
        weight_decay=weight_decay,
        eps=group["eps"],
        maximize=group["maximize"],
    )


def adam_directions(
    optimizer: Optimizer,
    params: list[Tensor],
    rs: list[Tensor],
    group: Group,
    ages: list[Tensor],
    keys: tuple[str, str] = ("exp_avg", "exp_avg_sq"),
) -> list[Tensor]:
    r"""Takes projected gradients R into the moments of their parameters, and returns the directions in the subspaces:

    .. math::
        M \leftarrow \beta_1 M + (1-\beta_1) R, \quad V \leftarrow \beta_2 V + (1-\beta_2) R^2, \quad
        U = -\frac{M / (1-\beta_1^t)}{\sqrt{V / (1-\beta_2^t)} + \epsilon}.

    Args:
        optimizer: whose state holds the moments.
        params: the parameters.
        rs: R (r x k) of each, in the dtype of arithmetic.
        group: the hyperparameters; `maximize` turns U around.
        ages: t of each, the number of gradients in its moments, this one included.
        keys: the names of M and V in the state; others than these must be in R's dtype.

    Returns:
        U of each, of R's shape.
    """
    kept = [[optimizer.state[p][key] for p in params] for key in keys]
    m, v = wide = [[x.to(r.dtype) for x, r in zip(moments, rs, strict=True)] for moments in kept]
    us = [torch.zeros_like(r) for r in rs]  # a weight of zero that takes one step of size 1 becomes the direction
    _fused_(us, rs, m, v, ages, group=group, lr=1.0, weight_decay=0.0)
    for moments, values, purpose in zip(kept, wide, (EXP_AVG, EXP_AVG_SQ), strict=True):
        for p, moment, value in zip(params, moments, values, strict=True):
            if moment is not value:
                store_(moment, value, optimizer._draw(p, group, purpose))
    return us


def aged_direction_(optimizer: Optimizer, p: Tensor, r: Tensor, group: Group, ages: Tensor) -> Tensor:
    r"""As `adam_directions`, for one parameter whose moments differ in age from row to row; U takes the place of R.

    Row i is corrected by its own :math:`1-\beta^{t_i}`, which no fused kernel does.

    Args:
        optimizer: whose state holds the moments.
        p: the parameter.
        r: R (r x k) or a stack of them, in the dtype of arithmetic; overwritten.
        group: the hyperparameters; `maximize` turns U around.
        ages: t of each row (r,) or (b, r), at least 1, this step included.

    Returns:
        U, of R's shape.
    """
    beta1, beta2 = group["betas"]
    moments = [optimizer.state[p][key].flatten(0, -2) for key in ("exp_avg", "exp_avg_sq")]
    rows, t = r.flatten(0, -2), ages.flatten()[:, None].to(r.dtype)
    bias1, bias2 = (torch.expm1(t * (math.log(beta) if beta else -math.inf)).neg_() for beta in (beta1, beta2))
    if not group["maximize"]:
        bias1.neg_()
    for s in blocks(rows, 0, r.itemsize):
        g = rows[s]
        m, v = (x[s].to(r.dtype) for x in moments)
        m.lerp_(g, 1 - beta1)
        v.mul_(beta2).addcmul_(g, g, value=1 - beta2)
        root = (v / bias2[s]).sqrt_().add_(group["eps"])
        torch.div(m, bias1[s], out=g).div_(root)
        for moment, value, purpose in zip(moments, (m, v), (EXP_AVG, EXP_AVG_SQ), strict=True):
            if moment.dtype != value.dtype:
                store_(moment[s], value, optimizer._draw(p, group, purpose), s.start * rows.shape[1])
    return r


def weight_rounding(optimizer: Optimizer, p: Tensor, group: Group, purpose: int = WEIGHT) -> int | None:
    """The key of this step's stochastic rounding of the weight; None where it is not rounded, or to nearest."""
    if p.dtype not in LOW_PRECISION or group["stochastic_rounding"] is False:
        return None
    return optimizer._draw(p, group, purpose)


def store_(target: Tensor, value: Tensor, key: int | None, offset: int = 0) -> None:
    """target <- value; rounded stochastically where precision is lost, to nearest without a key.

    A second moment in bfloat16 needs it: with beta2 = 0.999 a step changes it by less than half a unit in the last
    place.
    """
    if target.data_ptr() == value.data_ptr():
        return
    if key is not None and target.dtype in LOW_PRECISION and value.dtype == torch.float32:
        stochastic_round_(target, value, key, offset)
    else:
        target.copy_(value)
