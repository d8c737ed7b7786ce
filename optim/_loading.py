"""State dicts from anywhere: matched by name where there are names, and refused with a reason where they do not fit."""

import math
from collections.abc import Iterable
from itertools import pairwise
from numbers import Integral, Real
from typing import Any

import torch
from torch import Tensor

from ._sharding import Part

__all__ = [
    "check_layout",
    "check_plain",
    "misfit",
    "other_entries",
    "read_step",
    "read_stream",
    "read_tensor",
    "regrouped",
    "unwrapped",
]

LABELS = frozenset({"params", "param_names", "name", "nonfinite_steps"})  # of a group as it was divided then


def misfit(reason: str) -> ValueError:
    """The error that a checkpoint is refused with."""
    return ValueError(f"the checkpoint does not fit this optimizer: {reason}")


def unwrapped(name: str) -> str:
    """A name as it is without DistributedDataParallel and torch.compile around the model."""
    return ".".join(part for part in name.split(".") if part not in ("module", "_orig_mod"))


def check_layout(state_dict: dict[str, Any]) -> None:
    """Checks that there are states and groups at all, of the types that torch.optim saves.

    Raises:
        ValueError: says what is missing or of another type.
    """
    for key, kind in (("state", dict), ("param_groups", list)):
        if not isinstance(state_dict.get(key), kind):
            raise misfit(f"{key!r} must be a {kind.__name__}, found {_found(state_dict.get(key))}")
    for i, group in enumerate(state_dict["param_groups"]):
        if not isinstance(group, dict) or not all(isinstance(key, str) for key in group):
            raise misfit(f"group {i} must be a dict with strings as keys, found {_found(group)}")
        for key, kinds in (("params", int | str), ("param_names", str)):
            entries = group.get(key, None if key == "params" else [])
            if not isinstance(entries, list) or not all(isinstance(x, kinds) for x in entries):
                raise misfit(f"{key!r} of group {i} must be a list of parameters' numbers or names, found {entries!r}")


def regrouped(saved: list[dict[str, Any]], own: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """The saved groups in the order and the division of the optimizer's own: by the parameters' names where both have
    them, else as they come.

    Args:
        saved: the groups of a state dict. `params` are numbers, or names as `torch.distributed.checkpoint` has them.
        own: the optimizer's groups.

    Returns:
        For each own group its hyperparameters and, as `params`, what its parameters are called in the state dict.

    Raises:
        ValueError: if numbers of parameters differ; and by name if parameters are missing, left over or ambiguous, or
            if groups that differ would become one.
    """
    ours, theirs = (_names(groups) for groups in (own, saved))
    resharded = any(isinstance(key, str) for group in saved for key in group["params"])
    if ours is None or theirs is None or ours == theirs or (resharded and _flat(ours) != _flat(theirs)):
        sizes = [[len(group["params"]) for group in groups] for groups in (saved, own)]
        if sizes[0] != sizes[1]:
            raise misfit(f"its groups hold {sizes[0]} parameters, this optimizer's {sizes[1]}")
        groups = [dict(group) for group in saved]
    else:
        groups = _by_name(saved, theirs, ours)
    for group, mine in zip(groups, own, strict=True):
        if resharded or "param_names" in mine:
            group.pop("param_names", None)  # torch fills in the optimizer's own
        elif len(group.get("param_names", group["params"])) != len(group["params"]):
            raise misfit(f"a group has {len(group['params'])} parameters and {len(group['param_names'])} names")
    return groups


def _names(groups: list[dict[str, Any]]) -> list[list[str]] | None:
    """The names of the parameters of each group, where all have one."""
    names = []
    for group in groups:
        key = "params" if all(isinstance(x, str) for x in group["params"]) else "param_names"
        if len(group.get(key, ())) != len(group["params"]):
            return None
        names.append([unwrapped(name) for name in group.get(key, ())])
    return names


def _flat(names: list[list[str]]) -> list[str]:
    return sorted(name for group in names for name in group)


def _by_name(saved: list[dict[str, Any]], theirs: list[list[str]], ours: list[list[str]]) -> list[dict[str, Any]]:
    for whose, names in (("its", _flat(theirs)), ("this optimizer's", _flat(ours))):
        if twice := [a for a, b in pairwise(names) if a == b]:
            raise misfit(f"parameters are in another order, and two of {whose} have the name {twice[0]!r}")
    place = {
        name: (group, key)
        for names, group in zip(theirs, saved, strict=True)
        for name, key in zip(names, group["params"], strict=True)
    }
    wanted = set(_flat(ours))
    if wanted != place.keys():
        lists = [_some(names) for names in (wanted - place.keys(), place.keys() - wanted)]
        raise misfit(f"parameters that it lacks: {lists[0]}; parameters that are not here: {lists[1]}")
    groups = []
    for names in ours:
        sources = [place[name][0] for name in names]
        settings = [{k: v for k, v in group.items() if k not in LABELS} for group in sources]
        for name, other in zip(names, settings, strict=True):
            for key in sorted(settings[0].keys() | other.keys()):
                if not _same(a := settings[0].get(key), b := other.get(key)):
                    raise misfit(
                        f"parameters {names[0]} and {name} are in one group here and in two of the checkpoint, with "
                        f"{key}={a!r} and {key}={b!r}: group them as they were saved"
                    )
        groups.append({**(settings[0] if settings else {}), "params": [place[name][1] for name in names]})
    return groups


def _same(a: Any, b: Any) -> bool:
    if isinstance(a, Tensor) or isinstance(b, Tensor):
        return isinstance(a, Tensor) and isinstance(b, Tensor) and torch.equal(a, b)
    return bool(a == b)


def _some(names: Iterable[str]) -> str:
    names = sorted(names)
    return ", ".join(names[:4]) + f" and {len(names) - 4} more" * (len(names) > 4) if names else "none"


def check_plain(key: str, value: Any) -> None:
    """Checks that a hyperparameter is something that a group may hold, so that it can be compared and printed.

    Raises:
        ValueError: names it.
    """
    if isinstance(value, tuple | list):
        fits = all(isinstance(x, Real) for x in value)
    elif isinstance(value, Tensor):
        fits = key == "lr" and value.numel() == 1 and not value.is_complex()
    else:
        fits = value is None or isinstance(value, Real | str)
    if not fits:
        raise ValueError(f"{key} must be a number, a string or None, found {_found(value)}")


def other_entries(state: dict[Any, Any], listed: Iterable[int | str]) -> dict[Any, Any]:
    """What a state dict's states hold that belongs to no parameter: torch.optim lets users keep such entries.

    Raises:
        ValueError: for the state of a parameter that no group has.
    """
    others = {key: value for key, value in state.items() if key not in set(listed)}
    for key, value in others.items():
        if isinstance(key, int) or isinstance(value, dict):
            raise misfit(f"there is a state of parameter {key!r}, which is in no group")
    return others


def read_step(value: Any, name: str) -> Tensor:
    """A step counter as states keep it: 0-d float32, on the CPU.

    Raises:
        ValueError: unless it is a whole number >= 0.
    """
    number = value
    if isinstance(value, Tensor) and value.layout == torch.strided and value.numel() == 1 and not value.is_meta:
        number = value.item()
    if not isinstance(number, int | float) or isinstance(number, bool) or not 0 <= number < math.inf or number % 1:
        raise misfit(f"'step' of parameter {name} must be a whole number >= 0, found {_found(value)}")
    return torch.tensor(min(number, torch.finfo(torch.float32).max), dtype=torch.float32)


def read_stream(value: Any, name: str) -> int:
    """The number of a parameter's random draws.

    Raises:
        ValueError: unless it is an int.
    """
    if not isinstance(value, Integral) or isinstance(value, bool):
        raise misfit(f"'stream' of parameter {name} must be an int, found {_found(value)}")
    return int(value)


def read_tensor(
    entry: str,
    value: Any,
    shape: tuple[int, ...],
    dtype: torch.dtype,
    device: torch.device,
    name: str,
    part: Part | None = None,
    axes: str | None = None,
) -> Tensor:
    """A copy of a state's tensor, of its own memory, on the device where it belongs. Floating point is brought to the
    dtype that the state has here: torch.optim.AdamW keeps moments in the parameter's.

    Raises:
        ValueError: for another type or shape, for another dtype of indices, codes and counters, and for counters and
            indices below zero.
    """
    whole = value
    if isinstance(value, Tensor) and tuple(value.shape) == shape:
        if part is not None and axes is not None:
            value = part.own(value, axes)
        elif hasattr(value, "full_tensor"):
            value = value.full_tensor()
    sizes = shape if value is whole or part is None or axes is None else tuple(part.sizes(shape, axes))
    fits = isinstance(value, Tensor) and value.layout == torch.strided and not value.is_meta and not value.is_nested
    if not fits or tuple(value.shape) != sizes:
        raise misfit(f"{entry!r} of parameter {name} must have shape {shape}, found {_found(value)}")
    if value.dtype != dtype and not (value.is_floating_point() and dtype.is_floating_point):
        raise misfit(f"{entry!r} of parameter {name} must be {dtype}, found {value.dtype}")
    if dtype == torch.int32 and value.numel() and value.min() < 0:
        raise misfit(f"{entry!r} of parameter {name} counts, and cannot be {value.min().item()}")
    copied = torch.empty(sizes, dtype=dtype, device=device).copy_(value.detach())
    return copied if part is None or axes is None else part.join(copied, axes, shape)


def _found(value: Any) -> str:
    if value is None:
        return "none"
    if isinstance(value, Tensor) and value.layout == torch.strided and not value.is_nested:
        return f"{tuple(value.shape)} of {value.dtype}" if value.numel() != 1 or value.is_meta else repr(value)
    return repr(value) if isinstance(value, str | Real | complex) else f"a {type(value).__name__}"
