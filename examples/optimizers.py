"""The optimizers that the examples know by name, and what is measured of any of them."""

from argparse import Namespace
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from functools import partial

import torch
from torch import Tensor, nn
from torch.distributed.tensor import Shard

from slimstate.optim import (
    FRUGAL,
    LISA,
    SGDP,
    AdamP,
    AdamW,
    DCTAdamW,
    GaLoreAdafactor,
    GaLoreAdamW,
    GradNormLoRP,
    OwLore,
    param_groups,
    shard_placement,
    state_bytes,
)
from slimstate.optim.layer_sampling import LayerSampler


@dataclass(frozen=True)
class Recipe:
    """How an optimizer is made for a model.

    Attributes:
        build: from the model, the learning rate and the command line.
        lr_factor: its learning rate where the preset's is AdamW's.
        options: what it takes from the command line beside the learning rate.
        sampler: of layers, beside the optimizer.
        placement: the dimension that each parameter is sharded on, as `fully_shard` asks for it; None for dim 0, which
            FRUGAL's columns need.
        sharded: whether it can step on parameters that are divided over processes.
    """

    build: Callable[[nn.Module, float, Namespace], torch.optim.Optimizer]
    lr_factor: float
    options: tuple[str, ...] = ()
    sampler: Callable[[nn.Module, torch.optim.Optimizer, Namespace], LayerSampler] | None = None
    placement: Callable[[nn.Parameter], Shard | None] | None = shard_placement
    sharded: bool = True


def adamw(model: nn.Module, lr: float, args: Namespace, **settings: str) -> torch.optim.Optimizer:
    """Full-rank AdamW."""
    return AdamW(model.named_parameters(), lr=lr, **settings)


def adamp(model: nn.Module, lr: float, args: Namespace) -> torch.optim.Optimizer:
    """AdamP on everything, with AdamW's decay."""
    return AdamP(model.named_parameters(), lr=lr, weight_decay=0.01)


def sgd(model: nn.Module, lr: float, args: Namespace) -> torch.optim.Optimizer:
    """PyTorch's SGD with Nesterov's momentum."""
    return torch.optim.SGD(model.named_parameters(), lr=lr, momentum=0.9, nesterov=True)


def sgdp(model: nn.Module, lr: float, args: Namespace) -> torch.optim.Optimizer:
    """SGDP on everything, with Nesterov's momentum as in its paper."""
    return SGDP(model.named_parameters(), lr=lr, momentum=0.9, nesterov=True)


def galore(model: nn.Module, lr: float, args: Namespace) -> torch.optim.Optimizer:
    """GaLore on the linear layers, AdamW on embeddings, output head and norms."""
    return GaLoreAdamW(low_rank_groups(model, args), lr=lr)


def frugal(model: nn.Module, lr: float, args: Namespace, **settings: str | bool) -> torch.optim.Optimizer:
    """FRUGAL on the linear layers, AdamW on embeddings, output head and norms."""
    groups = param_groups(model, rank=args.rank, update_proj_gap=args.update_proj_gap)
    return FRUGAL(groups, lr=lr, **settings)


def galore_adafactor(model: nn.Module, lr: float, args: Namespace) -> torch.optim.Optimizer:
    """GaLore with Adafactor, on all parameters, set as in galore-torch's script for pretraining."""
    return GaLoreAdafactor(low_rank_groups(model, args), lr=lr, beta1=0.9, scale_parameter=False, relative_step=False)


def galore_torch(model: nn.Module, lr: float, args: Namespace) -> torch.optim.Optimizer:
    """The authors' own package on the same matrices. It takes ranks as counts, so that each size has a group."""
    try:
        from galore_torch import GaLoreAdamW as Original
        from galore_torch.galore_projector import GaLoreProjector
    except ImportError as error:
        raise SystemExit(f"galore-torch cannot be imported ({error}): pip install galore-torch") from error
    torch.serialization.add_safe_globals([GaLoreProjector])  # its state holds these objects
    groups = []
    for group in low_rank_groups(model, args):
        if "rank" not in group:
            groups.append({"params": [p for _, p in group["params"]]})
            continue
        by_rank: dict[int, list[Tensor]] = {}
        for _, p in group["params"]:
            rank = group["rank"] if isinstance(group["rank"], int) else int(group["rank"] * min(p.shape))
            by_rank.setdefault(max(1, rank), []).append(p)
        settings = {"update_proj_gap": args.update_proj_gap, "scale": args.scale, "proj_type": "std"}
        groups += [{"params": params, "rank": rank, **settings} for rank, params in by_rank.items()]
    return Original(groups, lr=lr, eps=1e-8, weight_decay=0.01, no_deprecation_warning=True)


def gradnorm(model: nn.Module, lr: float, args: Namespace) -> torch.optim.Optimizer:
    """GradNormLoRP on the linear layers, AdamW on embeddings, output head and norms."""
    return GradNormLoRP(low_rank_groups(model, args), lr=lr)


def dct(model: nn.Module, lr: float, args: Namespace, **settings: str) -> torch.optim.Optimizer:
    """DCT-AdamW on the linear layers, with a choice of columns in every step."""
    return DCTAdamW(param_groups(model, rank=args.rank, scale=args.scale), lr=lr, **settings)


def lisa(model: nn.Module, optimizer: torch.optim.Optimizer, args: Namespace) -> LayerSampler:
    """One layer at a time, embeddings and output head always."""
    return LISA(model, optimizer, active=1, seed=args.seed)


def owlore(model: nn.Module, optimizer: torch.optim.Optimizer, args: Namespace) -> LayerSampler:
    """One layer at a time, by the outliers of its weights."""
    return OwLore(model, optimizer, active=1, seed=args.seed)


def low_rank_groups(model: nn.Module, args: Namespace) -> list[dict]:
    """The model's parameters, split into projected matrices and the rest."""
    return param_groups(model, rank=args.rank, update_proj_gap=args.update_proj_gap, scale=args.scale)


class SignSGD(torch.optim.Optimizer):
    """W <- (1 - lr * weight_decay) W - lr * sign(G): the yardstick that keeps no state at all."""

    def __init__(self, params: Iterable, lr: float, weight_decay: float = 0.01) -> None:
        super().__init__(params, {"lr": lr, "weight_decay": weight_decay})

    @torch.no_grad()
    def step(self) -> None:
        """Performs one step."""
        for group in self.param_groups:
            for p in group["params"]:
                if p.grad is not None:
                    p.mul_(1 - group["lr"] * group["weight_decay"]).sub_(p.grad.sign(), alpha=group["lr"])


LOW_RANK = ("rank", "update_proj_gap", "scale")

# The factors of adamw, galore, frugal, gradnorm, dct and signsgd come from sweeps of the preset `tiny`
# (docs/benchmarks/pretrain.md); the others' are those of their kin, or of their papers.
RECIPES = {
    "adamw": Recipe(adamw, lr_factor=1),
    "adamw-8bit": Recipe(partial(adamw, moment_dtype="8bit"), lr_factor=1, placement=None),
    "adamw-companded": Recipe(partial(adamw, moment_dtype="8bit-companded"), lr_factor=1, placement=None),
    "adamp": Recipe(adamp, lr_factor=1),
    "sgd": Recipe(sgd, lr_factor=30),
    "sgdp": Recipe(sgdp, lr_factor=30),
    "galore": Recipe(galore, lr_factor=4, options=LOW_RANK),
    "frugal": Recipe(frugal, lr_factor=5 / 3, options=("rank", "update_proj_gap"), placement=None),
    "frugal-contiguous": Recipe(
        partial(frugal, contiguous=True), lr_factor=5 / 3, options=("rank", "update_proj_gap"), placement=None
    ),
    "galore-adafactor": Recipe(galore_adafactor, lr_factor=4, options=LOW_RANK),
    "galore-torch": Recipe(galore_torch, lr_factor=4, options=LOW_RANK, sharded=False),
    "gradnorm": Recipe(gradnorm, lr_factor=4, options=LOW_RANK),
    "dct": Recipe(dct, lr_factor=4, options=("rank", "scale")),
    "dct-hadamard": Recipe(partial(dct, projection="hadamard"), lr_factor=4, options=("rank", "scale")),
    "dct-ef": Recipe(partial(dct, error_feedback="8bit"), lr_factor=4, options=("rank", "scale")),
    "lisa": Recipe(adamw, lr_factor=1, sampler=lisa),
    "owlore": Recipe(galore, lr_factor=4, options=LOW_RANK, sampler=owlore),
    "signsgd": Recipe(lambda model, lr, args: SignSGD(model.parameters(), lr), lr_factor=1),
}


# ---------------------------------------------------------------------------------------------------- measures


def projected_matrices(model: nn.Module) -> list[Tensor]:
    """The matrices that a low-rank optimizer projects; the others hold the same state under any of them."""
    return [p for group in param_groups(model) if "rank" in group for _, p in group["params"]]


def held_bytes(optimizer: torch.optim.Optimizer, params: Iterable[Tensor] | None = None) -> int:
    """Bytes of optimizer state, of all parameters or of some; galore-torch keeps its bases in objects."""
    params = list(optimizer.state) if params is None else list(params)
    projectors = [optimizer.state[p]["projector"] for p in params if "projector" in optimizer.state[p]]
    bases = {i: {"basis": projector.ortho_matrix} for i, projector in enumerate(projectors)}
    return state_bytes(optimizer, params) + state_bytes(Namespace(state=bases))


def refreshes(optimizer: torch.optim.Optimizer) -> int:
    """How many bases have been computed so far."""
    count = 0
    for group in optimizer.param_groups:
        for p in group["params"]:
            state = optimizer.state.get(p, {})
            if "refreshes" in state:
                count += int(state["refreshes"].sum())
            elif "projector" in state:  # galore-torch counts from its first step on
                count += 1 + (int(state["step"]) - 1) // group["update_proj_gap"]
    return count
