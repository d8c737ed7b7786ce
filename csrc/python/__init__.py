# SPDX-License-Identifier: Apache-2.0
"""Memory-efficient optimizers for PyTorch.

    from slimstate.optim import GaLoreAdamW, param_groups

    optimizer = GaLoreAdamW(param_groups(model), lr=1e-3)

``slimstate.optim`` holds the optimizers, ``slimstate.projections`` the bases they work in, and ``slimstate.ops`` the
element-wise kernels, compiled where a compiler was at hand and plain PyTorch elsewhere.
"""

from importlib import import_module
from types import ModuleType
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from slimstate import ops, optim, projections

__version__ = "0.1.0"
__all__ = ["__version__", "ops", "optim", "projections"]


def __getattr__(name: str) -> ModuleType:
    # On first use, so that `python -m slimstate.ops` does not run a module that is already loaded.
    if name in {"ops", "optim", "projections"}:
        return import_module(f"slimstate.{name}")
    raise AttributeError(f"module 'slimstate' has no attribute {name!r}")
