"""State dicts of other packages."""

from typing import Any

import torch
from torch import Tensor

from slimstate.projections._matrix import Side, matrix_view

from ._loading import check_layout
from ._projected import PROJ_TYPES

__all__ = ["GALORE_TORCH", "GaLoreProjector", "from_galore_torch"]


class GaLoreProjector:
    """Stands in for galore-torch's class of this name where that package is not installed: a bag of attributes."""


GALORE_TORCH = [(GaLoreProjector, "galore_torch.galore_projector.GaLoreProjector")]
"""For `torch.serialization.safe_globals`: galore-torch's files are then read with `weights_only=True`, and without that
package."""

ENTRIES = {"step", "projector", "exp_avg", "exp_avg_sq"}
OTHERS = {"state1": "its 8-bit AdamW", "RMS": "its Adafactor"}  # which no other of its optimizers has


def from_galore_torch(state_dict: dict[str, Any]) -> dict[str, Any]:
    r"""The state dict of galore-torch 1.0's `GaLoreAdamW`, as `slimstate.optim.GaLoreAdamW` loads it.

    Taken over are the bases, the moments, the steps and the hyperparameters of the groups; the optimizer that loads it
    must have the same parameters, in the same order and groups. What galore-torch does not have (`projection`,
    `transport`, ...) stays as that optimizer was constructed.

    Training goes on as it would there until the first refresh, with :math:`\epsilon / \sqrt{1-\beta_2^t}` there where
    :math:`\epsilon` is here, and with decay before the step instead of after it, a difference of
    :math:`\eta^2\lambda` times the direction. From the first refresh on it is our algorithm: a matrix is refreshed in
    other steps (staggered, where galore-torch refreshes all at once), and its moments are rotated unless the optimizer
    has `transport="keep"`, when they remain as they are, in a basis whose signs galore-torch leaves to chance.

    Args:
        state_dict: what its `state_dict()` returned, and a file brought back.

    Returns:
        A new state dict, which shares tensors with the given one.

    Raises:
        ValueError: for anything else, such as states of its 8-bit AdamW and of its Adafactor, or for
            `correct_bias=False`; says what.
        NotImplementedError: for `proj_type="full"`.

    Example:
        >>> import torch
        >>> from slimstate.optim import GaLoreAdamW
        >>> projector = GaLoreProjector()
        >>> projector.ortho_matrix, projector.proj_type = torch.eye(2, 6), "std"  # of an 8 x 6 matrix
        >>> state = {"step": 5, "projector": projector, "exp_avg": torch.ones(8, 2), "exp_avg_sq": torch.ones(8, 2)}
        >>> group = {"lr": 0.01, "betas": (0.9, 0.999), "eps": 1e-6, "weight_decay": 0.0, "correct_bias": True}
        >>> group |= {"rank": 2, "update_proj_gap": 200, "scale": 0.25, "proj_type": "std", "params": [0]}
        >>> weight = torch.nn.Parameter(torch.zeros(8, 6))
        >>> optimizer = GaLoreAdamW([weight])
        >>> optimizer.load_state_dict(from_galore_torch({"state": {0: state}, "param_groups": [group]}))
        >>> {key: tuple(x.shape) for key, x in optimizer.state[weight].items() if key in ("basis", "exp_avg")}
        {'exp_avg': (2, 8), 'basis': (6, 2)}
    """
    if not isinstance(state_dict, dict):
        raise TypeError(f"state_dict must be a dict, got {type(state_dict).__name__}")
    check_layout(state_dict)
    groups, states = [], {}
    for saved in state_dict["param_groups"]:
        groups.append(_group(saved))
        for key in saved["params"]:
            if state := state_dict["state"].get(key):
                states[key] = _state(key, state, groups[-1])
    return {"state": states, "param_groups": groups}


def _group(saved: dict[str, Any]) -> dict[str, Any]:
    group = dict(saved)
    if group.pop("correct_bias", True) is not True:
        raise ValueError("correct_bias=False has no counterpart here: moments are always corrected for their age")
    proj_type = group.pop("proj_type", "std")
    if proj_type == "full":
        raise NotImplementedError("proj_type='full' (both sides) is not supported")
    if proj_type not in PROJ_TYPES:
        raise ValueError(f"proj_type must be one of {', '.join(PROJ_TYPES)}, got {proj_type!r}")
    if group.setdefault("rank", None) is not None:
        group["side"] = PROJ_TYPES[proj_type]
    return group


def _state(key: int | str, state: dict[str, Any], group: dict[str, Any]) -> dict[str, Any]:
    if not isinstance(state, dict) or not {"step", "exp_avg", "exp_avg_sq"} <= state.keys() <= ENTRIES:
        kind = next((name for entry, name in OTHERS.items() if isinstance(state, dict) and entry in state), None)
        kind = f"{kind} cannot be taken over" if kind else "it must have step, exp_avg, exp_avg_sq, and may a projector"
        raise ValueError(f"the state of parameter {key} is not that of galore-torch's AdamW: {kind}")
    if ("projector" in state) != (group["rank"] is not None):
        raise ValueError(f"parameter {key} has a projector and its group has no rank, or the reverse")
    step, gap = state["step"], group.get("update_proj_gap")
    if "projector" not in state:
        return dict(state)
    if not all(isinstance(x, int) and x >= 1 for x in (step, gap)):
        raise ValueError(f"step and update_proj_gap of parameter {key} must be ints >= 1, got {step!r} and {gap!r}")
    basis, exp_avg, exp_avg_sq = _oriented(key, state, group["side"])
    refreshes = torch.tensor(1 + (step - 1) // gap, dtype=torch.int32)
    return {"step": step, "exp_avg": exp_avg, "exp_avg_sq": exp_avg_sq, "basis": basis, "refreshes": refreshes}


def _oriented(key: int | str, state: dict[str, Any], side: Side) -> tuple[Tensor, Tensor, Tensor]:
    """Q (d x r) and the moments (r x k), which galore-torch keeps transposed where columns are compressed."""
    given: list[Any] = [getattr(state["projector"], "ortho_matrix", None), state["exp_avg"], state["exp_avg_sq"]]
    if not all(isinstance(x, Tensor) and x.ndim == 2 for x in given):
        raise ValueError(f"the projector and the moments of parameter {key} must hold matrices")
    for transposed in (False, True):
        q, m, v = (x.mT if transposed else x for x in given)
        d, k = len(q), m.shape[1]
        view = matrix_view((k, d) if transposed else (d, k), side)
        if view.transposed == transposed and q.shape[1] == len(m) and m.shape == v.shape:
            return q, m, v
    shapes = ", ".join(str(tuple(x.shape)) for x in given)
    raise ValueError(f"the basis and the moments of parameter {key} do not fit each other at side={side!r}: {shapes}")
