"""How much an optimizer keeps."""

from collections.abc import Iterable

import torch
from torch import Tensor

__all__ = ["state_bytes"]


def state_bytes(optimizer: torch.optim.Optimizer, params: Iterable[Tensor] | None = None) -> int:
    """The bytes that an optimizer's state holds alive: whole storages, each counted once.

    A slice of a large tensor therefore counts as the large tensor.

    Args:
        optimizer: any torch optimizer.
        params: count the state of these parameters only; None means all.

    Returns:
        Bytes; 0 before the first step.
    """
    chosen = optimizer.state.values() if params is None else [optimizer.state.get(p, {}) for p in params]
    storages = {
        value.untyped_storage().data_ptr(): value.untyped_storage().nbytes()
        for state in chosen
        if isinstance(state, dict)
        for value in state.values()
        if isinstance(value, Tensor)
    }
    return sum(storages.values())
