"""Memory-efficient optimizers with the interface of torch.optim."""

if __name__ != "slimstate.optim":
    raise ImportError(
        f"this folder is the package slimstate.optim, not {__name__!r}: install it (pip install -e .) "
        "and import slimstate.optim"
    )

from .adafactor import GaLoreAdafactor
from .adamp import SGDP, AdamP
from .adamw import AdamW
from .backward import InBackward, in_backward
from .convert import from_galore_torch
from .dct import DCTAdamW
from .distributed import shard_placement, share_refreshes
from .frugal import FRUGAL
from .galore import GaLoreAdamW
from .gradnorm import GradNormLoRP
from .groups import ParamGroups, param_groups
from .layer_sampling import LISA, OwLore, outlier_scores
from .memory import state_bytes

__all__ = [
    "FRUGAL",
    "LISA",
    "SGDP",
    "AdamP",
    "AdamW",
    "DCTAdamW",
    "GaLoreAdafactor",
    "GaLoreAdamW",
    "GradNormLoRP",
    "InBackward",
    "OwLore",
    "ParamGroups",
    "from_galore_torch",
    "in_backward",
    "outlier_scores",
    "param_groups",
    "shard_placement",
    "share_refreshes",
    "state_bytes",
]
