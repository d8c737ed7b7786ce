"""How much an optimizer keeps."""

from collections.abc import Iterable

import torch
from torch import Tensor

from ._sharding import local

__all__ = ["state_bytes"]


def state_bytes(optimizer: torch.optim.Optimizer, params: Iterable[Tensor] | None = None) -> int:
    """The bytes that an optimizer's state holds alive: whole storages, each counted once.

    A slice of a large tensor therefore counts as the large tensor. Of a tensor that is divided over processes (DTensor)
    the part counts that this one holds.

    Args:
        optimizer: any torch optimizer.
        params: count the state of these parameters only; None means all.

    Returns:
        Bytes; 0 before the first step.
    """
    chosen = optimizer.state.values() if params is None else [optimizer.state.get(p, {}) for p in params]
    storages = {
        storage.data_ptr(): storage.nbytes()
        for state in chosen
        if isinstance(state, dict)
        for value in state.values()
        if isinstance(value, Tensor)
        for storage in [local(value).untyped_storage()]
    }
    return sum(storages.values())
