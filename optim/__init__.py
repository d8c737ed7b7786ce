"""Memory-efficient optimizers with the interface of torch.optim."""

if __name__ != "slimstate.optim":
    raise ImportError(
        f"this folder is the package slimstate.optim, not {__name__!r}: install it (pip install -e .) "
        "and import slimstate.optim"
    )

from .adafactor import GaLoreAdafactor
from .adamp import SGDP, AdamP
from .adamw import AdamW, AdamW8bit
from .backward import InBackward, in_backward
from .by_name import create, for_trainer
from .convert import from_bitsandbytes, from_galore_torch, to_bitsandbytes
from .dct import DCTAdamW
from .differences import UpdateSparsity, intruder_dimensions, update_sparsity
from .distributed import shard_placement, share_refreshes
from .frugal import FRUGAL
from .galore import GaLoreAdamW, GaLoreAdamW8bit
from .gradnorm import GradNormLoRP
from .groups import ParamGroups, param_groups
from .layer_sampling import LISA, OwLore, outlier_scores
from .memory import state_bytes
from .monitor import Monitor

__all__ = [
    "FRUGAL",
    "LISA",
    "SGDP",
    "AdamP",
    "AdamW",
    "AdamW8bit",
    "DCTAdamW",
    "GaLoreAdafactor",
    "GaLoreAdamW",
    "GaLoreAdamW8bit",
    "GradNormLoRP",
    "InBackward",
    "Monitor",
    "OwLore",
    "ParamGroups",
    "UpdateSparsity",
    "create",
    "for_trainer",
    "from_bitsandbytes",
    "from_galore_torch",
    "in_backward",
    "intruder_dimensions",
    "outlier_scores",
    "param_groups",
    "shard_placement",
    "share_refreshes",
    "state_bytes",
    "to_bitsandbytes",
    "update_sparsity",
]
