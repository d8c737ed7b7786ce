"""AdamW, the full-rank baseline. Loshchilov and Hutter, 2019. https://arxiv.org/abs/1711.05101"""

from typing import Any

import torch
from torch import Tensor
from torch.optim.optimizer import ParamsT

from ._adam import adamw_step_, check_adam, moments_spec, weight_spec
from ._base import Entry, Group, Optimizer, Spec, refuse

__all__ = ["AdamW", "AdamW8bit"]


class AdamW(Optimizer):
    r"""torch.optim.AdamW, bit for bit in float32 and float64, with bfloat16 and float16 weights that do move.

    .. math::
        M_t = \beta_1 M_{t-1} + (1-\beta_1) G_t, \qquad V_t = \beta_2 V_{t-1} + (1-\beta_2) G_t^2, \\
        W_t = (1-\eta\lambda) W_{t-1} - \eta\,\frac{M_t / (1-\beta_1^t)}{\sqrt{V_t / (1-\beta_2^t)} + \epsilon}.

    Weights of low precision are updated in float32 and rounded stochastically: rounding to nearest swallows every
    update below half a unit in the last place (a bfloat16 weight of 1 never moves by steps of 1e-3).

    State of a parameter of n elements: 2 n elements in `moment_dtype`, and `step`.

    Args:
        params: parameters, named parameters, or groups.
        lr: learning rate :math:`\eta`; a 1-element Tensor is read at every step.
        betas: decay rates of the moments. Default (0.9, 0.999), as all defaults here torch.optim.AdamW's.
        eps: :math:`\epsilon`, added to the root.
        weight_decay: decoupled weight decay :math:`\lambda`.
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
        >>> weight = torch.nn.Parameter(torch.ones(4, dtype=torch.bfloat16))
        >>> optimizer = AdamW([weight], lr=1e-3)
        >>> weight.grad = torch.ones_like(weight)
        >>> optimizer.step()
        >>> optimizer.state[weight]["exp_avg"].dtype
        torch.float32
    """

    def __init__(
        self,
        params: ParamsT,
        lr: float | Tensor = 1e-3,
        betas: tuple[float, float] = (0.9, 0.999),
        eps: float = 1e-8,
        weight_decay: float = 1e-2,
        *,
        maximize: bool = False,
        moment_dtype: str | torch.dtype | None = None,
        stochastic_rounding: bool | None = None,
        compensation: bool = False,
        nonfinite: str = "propagate",
        seed: int = 0,
        **torch_keywords: Any,
    ) -> None:
        refuse(type(self).__name__, torch_keywords)
        defaults = dict(
            lr=lr,
            betas=betas,
            eps=eps,
            weight_decay=weight_decay,
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

    def _spec(self, p: Tensor, group: Group) -> Spec:
        return moments_spec(p, group, tuple(p.shape)) | weight_spec(p, group)

    def _step_group(self, group: Group, entries: list[Entry]) -> None:
        adamw_step_(entries, group)


class AdamW8bit(AdamW):
    r"""`AdamW` with `moment_dtype="8bit"` for a default: bitsandbytes' name for bitsandbytes' codes.

    State of a parameter of n elements: :math:`2n + 8 n_0 \lceil n / (256\, n_0) \rceil` bytes, :math:`n_0` being its
    dim 0, where `AdamW` keeps 8 n; 8 n too of vectors, of embeddings and of what has fewer than 4096 elements. See
    `docs/precision.md`; `from_bitsandbytes` and `to_bitsandbytes` exchange states with `bitsandbytes.optim.AdamW8bit`.

    Args:
        params: parameters, named parameters, or groups.
        lr: learning rate.
        betas: decay rates of the moments.
        eps: added to the root.
        weight_decay: decoupled weight decay. Default 0.01, as in `AdamW` and in bitsandbytes.
        moment_dtype: see `AdamW`.
        settings: the others of `AdamW`.

    Raises:
        ValueError: as `AdamW`, and for a parameter that processes divide along another dimension than dim 0.

    Example:
        >>> import torch
        >>> weight = torch.nn.Parameter(torch.ones(64, 512))
        >>> optimizer = AdamW8bit([weight], lr=1e-3)
        >>> weight.grad = torch.ones_like(weight)
        >>> optimizer.step()
        >>> optimizer.state[weight]["exp_avg"].dtype, tuple(optimizer.state[weight]["exp_avg_scale"].shape)
        (torch.uint8, (64, 2))
    """

    def __init__(
        self,
        params: ParamsT,
        lr: float | Tensor = 1e-3,
        betas: tuple[float, float] = (0.9, 0.999),
        eps: float = 1e-8,
        weight_decay: float = 1e-2,
        *,
        moment_dtype: str | torch.dtype | None = "8bit",
        **settings: Any,
    ) -> None:
        super().__init__(params, lr, betas, eps, weight_decay, moment_dtype=moment_dtype, **settings)
