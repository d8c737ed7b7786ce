"""GaLore. Zhao et al., 2024. https://arxiv.org/abs/2403.03507"""

from typing import Any

import torch
from torch import Tensor
from torch.optim.optimizer import ParamsT

from slimstate.projections import Projection

from ._adam import adam_directions, rounding
from ._base import Group, refuse
from ._projected import DEFAULT_RANK, Matrix, ProjectedOptimizer

__all__ = ["GaLoreAdamW", "GaLoreAdamW8bit"]


class GaLoreAdamW(ProjectedOptimizer):
    r"""AdamW whose moments live in a low-rank subspace that follows the gradient.

    Every `update_proj_gap` steps the basis Q (d x r) is fitted to the gradient and the moments are carried over. In
    each step, with G seen so that its compressed axis d comes first,

    .. math::
        R_t &= Q^\top G_t \\
        M_t &= \beta_1 M_{t-1} + (1-\beta_1) R_t, \qquad V_t = \beta_2 V_{t-1} + (1-\beta_2) R_t^2 \\
        W_t &= (1-\eta\lambda) W_{t-1}
               - \eta\,\alpha\, Q\,\frac{M_t / (1-\beta_1^t)}{\sqrt{V_t / (1-\beta_2^t)} + \epsilon}.

    State of an m x n matrix: 2 max(m,n) r + min(m,n) r elements, where AdamW keeps 2 m n. What is not projected
    (vectors, groups without a rank) gets AdamW.

    Which matrices are projected: those of two or more dimensions in groups with a `rank`. If any group given here sets
    `rank`, groups without one are dense, as in galore-torch; if none does, `rank` below applies to every matrix,
    embeddings too. `slimstate.optim.param_groups(model)` makes the usual choice from the model's modules.

    Where this differs from galore-torch 1.0: epsilon is added to the corrected root and decay comes before the step, as
    in torch.optim.AdamW and the paper; moments are rotated at a refresh (`transport="keep"` is the published rule);
    bases come from a Gram matrix, at different steps for different matrices; weights of low precision are rounded
    stochastically; a zero or non-finite gradient never reaches a decomposition.

    Args:
        params: parameters, named parameters, or groups; groups of galore-torch work unchanged.
        lr: learning rate :math:`\eta`. The paper uses 0.01 for pretraining at scale 0.25.
        betas: decay rates of the moments. Default (0.9, 0.999), as in torch.optim.AdamW and galore-torch.
        eps: :math:`\epsilon`. Default 1e-8, as in torch.optim.AdamW and the paper.
        weight_decay: decoupled weight decay :math:`\lambda`. Default 0.01, as in torch.optim.AdamW.
        rank: r as a count (int >= 1) or as a share of d (float in (0, 1]); clamped to the smaller side; None: dense.
            Default 0.25, about what the paper takes (128 of 512 to 1024 of 4096).
        update_proj_gap: steps between two refreshes of a matrix, staggered over the group's matrices. Default 200, the
            paper's.
        scale: :math:`\alpha`, the step in the subspace relative to `lr`. Default 0.25, the paper's for pretraining.
        projection: `svd` (exact), `power` (tracked by power iteration: cheap for sides above 2048, where an exact
            decomposition is a stall) or `random`; or an object of `slimstate.projections`, whose rank, side and seed
            then hold.
        side: `auto` compresses the shorter side (the columns of a square matrix), `left` the rows, `right` the columns,
            `reverse` the longer side. galore-torch's `proj_type` is understood in groups.
        batch_dims: how many leading axes of a parameter count matrices (1 for stacked experts).
        transport: what becomes of the moments at a refresh: `rotate` (default) carries them into the new basis, `keep`
            leaves the numbers, `reset` forgets them and their age (in a stack of matrices those of all).
        maximize: ascend instead.
        moment_dtype: `float32`, `bfloat16` (rounded stochastically), `param` (the parameter's), `8bit` or
            `8bit-companded` (bitsandbytes' codes or finer and faster ones, with a scale for 256 of them; float32 where
            those would save little or harm, see `docs/precision.md`); None means float32, and float64 for float64
            parameters.
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
        ValueError: for a value out of range, an unknown group key, a torch keyword that is not supported, or a rank
            where nothing can be projected.
        NotImplementedError: for galore-torch's `proj_type="full"` and `dim`.

    Example:
        >>> import torch
        >>> model = torch.nn.Linear(16, 8)
        >>> optimizer = GaLoreAdamW(model.parameters(), lr=0.01, rank=4)
        >>> _ = optimizer.step(lambda: model(torch.ones(1, 16)).square().sum().backward())
        >>> tuple(optimizer.state[model.weight]["exp_avg"].shape), tuple(optimizer.state[model.weight]["basis"].shape)
        ((4, 16), (8, 4))
    """

    def __init__(
        self,
        params: ParamsT,
        lr: float | Tensor = 1e-3,
        betas: tuple[float, float] = (0.9, 0.999),
        eps: float = 1e-8,
        weight_decay: float = 1e-2,
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
        refuse(type(self).__name__, torch_keywords)
        defaults = dict(
            lr=lr,
            betas=betas,
            eps=eps,
            weight_decay=weight_decay,
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

    def _update(
        self, matrices: list[Matrix], reduced: list[tuple[Tensor, ...]], group: Group, projection: Projection
    ) -> None:
        lr = group["lr"]
        us = adam_directions(matrices, [r for (r,) in reduced], group, [x.age for x in matrices])
        for x, u in zip(matrices, us, strict=True):
            projection.write_back_(
                x.p,
                x.view,
                x.basis,
                u,
                alpha=lr * group["scale"],
                beta=1 - lr * group["weight_decay"],
                rounding=rounding(x, group),
            )


class GaLoreAdamW8bit(GaLoreAdamW):
    r"""`GaLoreAdamW` with `moment_dtype="8bit"` for a default, galore-torch's name.

    State of an m x n matrix: :math:`2 k r + 8 k \lceil r / 256 \rceil` bytes of moments, k = max(m,n), and min(m,n) r
    elements for the basis; of what is not projected, as `AdamW8bit`. See `docs/precision.md`.

    Args:
        params: parameters, named parameters, or groups; groups of galore-torch work unchanged.
        lr: learning rate.
        betas: decay rates of the moments.
        eps: added to the root.
        weight_decay: decoupled weight decay.
        moment_dtype: see `GaLoreAdamW`.
        settings: the others of `GaLoreAdamW`.

    Raises:
        ValueError: as `GaLoreAdamW`, and for a parameter that is not projected and that processes divide along another
            dimension than dim 0.

    Example:
        >>> import torch
        >>> model = torch.nn.Linear(1024, 64, bias=False)
        >>> optimizer = GaLoreAdamW8bit(model.parameters(), lr=0.01, rank=16)
        >>> _ = optimizer.step(lambda: model(torch.ones(1, 1024)).square().sum().backward())
        >>> state = optimizer.state[model.weight]
        >>> state["exp_avg"].dtype, tuple(state["exp_avg"].shape), tuple(state["exp_avg_scale"].shape)
        (torch.uint8, (16, 1024), (1, 1024))
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
