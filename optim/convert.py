"""State dicts of other packages."""

from typing import Any

import torch
from torch import Tensor

from slimstate.ops.codes import BLOCK, code_values, decode, scale_shape
from slimstate.projections._matrix import Side, matrix_view

from ._loading import check_layout
from ._moments import MOMENTS, decoded, encoded
from ._projected import PROJ_TYPES

__all__ = ["GALORE_TORCH", "GaLoreProjector", "from_bitsandbytes", "from_galore_torch", "to_bitsandbytes"]


class GaLoreProjector:
    """Stands in for galore-torch's class of this name where that package is not installed: a bag of attributes."""


GALORE_TORCH = [(GaLoreProjector, "galore_torch.galore_projector.GaLoreProjector")]
"""For `torch.serialization.safe_globals`: galore-torch's files are then read with `weights_only=True`, and without that
package."""

ENTRIES = {"step", "projector", "exp_avg", "exp_avg_sq"}
WRAPPED = "__bnb_optimizer_quant_state__"  # what bitsandbytes' state_dict() wraps a state's tensors in
BITSANDBYTES = {"lr": 1e-3, "betas": (0.9, 0.999), "eps": 1e-8, "weight_decay": 1e-2}
ADEMAMIX = {"alpha": 0.0, "t_alpha": None, "t_beta3": None}  # keys of every group, which AdamW leaves at these
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


def from_bitsandbytes(source: torch.optim.Optimizer | dict[str, Any]) -> dict[str, Any]:
    """The state of `bitsandbytes.optim.AdamW8bit` (`Adam8bit`, `AdamW`), as `slimstate.optim.AdamW` loads it.

    Taken over are the moments, the steps and the hyperparameters of the groups; the optimizer that loads it must have
    the same parameters, in the same order and groups, and decides how moments are kept: an `AdamW8bit` as codes where
    it keeps codes, an `AdamW` as float32. Codes go over as they are where a row (dim 0 against the rest) is a multiple
    of 256 elements, for then both divide it into the same blocks. bitsandbytes' blocks otherwise go on from one row to
    the next, and what is kept as codes is rounded again: by at most half the distance of two codes, 0.7 % of a block's
    largest magnitude for first moments and 0.4 % for second ones.

    Args:
        source: that optimizer, or its `state_dict()`.

    Returns:
        A new state dict, which shares tensors with the source.

    Raises:
        ValueError: for anything else, such as a state of one moment, of AdEMAMix, or with a map of its own; says what.

    Example:
        >>> import torch
        >>> from slimstate.optim import AdamW8bit
        >>> state = {"step": 7, "state1": torch.ones(8), "state2": torch.ones(8)}  # small ones it keeps in 32 bits
        >>> saved = {"state": {0: state}, "param_groups": [{"lr": 0.01, "params": [0]}]}
        >>> weight = torch.nn.Parameter(torch.zeros(8))
        >>> optimizer = AdamW8bit([weight])
        >>> optimizer.load_state_dict(from_bitsandbytes(saved))
        >>> int(optimizer.state[weight]["step"]), optimizer.param_groups[0]["lr"]
        (7, 0.01)
    """
    saved = _state_dict(source)
    groups = []
    for group in saved["param_groups"]:
        for key, value in ADEMAMIX.items():
            if group.get(key, value) != value:
                raise ValueError(f"{key}={group[key]!r} is AdEMAMix's, of which nothing can be taken over")
        groups.append({key: value for key, value in group.items() if key not in ADEMAMIX})
    return {"state": {key: _from_blocks(key, x) for key, x in saved["state"].items()}, "param_groups": groups}


def _from_blocks(key: int | str, state: dict[str, Any]) -> dict[str, Any]:
    state = {**state, **state.get(WRAPPED, {})}
    if not {"step", "state1", "state2"} <= state.keys():
        raise ValueError(f"the state of parameter {key} is not that of bitsandbytes' AdamW: it has {sorted(state)}")
    result: dict[str, Any] = {"step": state["step"]}
    for i, name in enumerate(("exp_avg", "exp_avg_sq"), start=1):
        x = state[f"state{i}"]
        if x.dtype != torch.uint8:
            result[name] = x
            continue
        signed, absmax, qmap = MOMENTS[name][1], state.get(f"absmax{i}"), state.get(f"qmap{i}")
        if not isinstance(absmax, Tensor) or tuple(absmax.shape) != scale_shape((x.numel(),), "rows"):
            raise ValueError(f"'absmax{i}' of parameter {key} must be of blocks of {BLOCK} of {x.numel()} codes")
        if not isinstance(qmap, Tensor) or not torch.allclose(qmap.cpu(), code_values(signed), rtol=1e-5, atol=0):
            raise ValueError(f"'qmap{i}' of parameter {key} is not bitsandbytes' dynamic map of 8 bits")
        if _same_blocks(x):
            result |= {name: x, f"{name}_scale": absmax.view(scale_shape(x.shape, "rows"))}
        else:
            result[name] = decode(x.reshape(-1), absmax, signed=signed, layout="rows").view(x.shape)
    return result


def to_bitsandbytes(source: torch.optim.Optimizer | dict[str, Any]) -> dict[str, Any]:
    """The state of `slimstate.optim.AdamW8bit` (`AdamW`), as `bitsandbytes.optim.AdamW8bit` loads it.

    As `from_bitsandbytes`, the other way round. What is not codes here (embeddings, vectors, fewer than 4096 elements;
    all of an `AdamW`) is float32 there too: bitsandbytes goes on with each state in the form that it has.

    Args:
        source: that optimizer, or its `state_dict()`.

    Returns:
        A new state dict, which may share tensors with the source.

    Raises:
        ValueError: for anything else, such as the state of a projected parameter or of a compensated weight, or for
            `maximize=True`; says what.

    Example:
        >>> import torch
        >>> from slimstate.optim import AdamW8bit
        >>> weight = torch.nn.Parameter(torch.zeros(16, 512))
        >>> optimizer = AdamW8bit([weight])
        >>> weight.grad = torch.ones_like(weight)
        >>> optimizer.step()
        >>> state = to_bitsandbytes(optimizer)["state"][0]
        >>> state["state1"].dtype, tuple(state["absmax1"].shape)
        (torch.uint8, (32,))
    """
    saved = _state_dict(source)
    groups = []
    for group in saved["param_groups"]:
        if group.get("maximize"):
            raise ValueError("maximize=True has no counterpart in bitsandbytes")
        kept = {key: group[key] for key in ("initial_lr", *BITSANDBYTES) if key in group}
        kept["lr"] = float(kept["lr"])
        groups.append(BITSANDBYTES | ADEMAMIX | kept | {"params": list(group["params"])})
    states = {key: _to_blocks(key, x) for key, x in saved["state"].items() if "step" in x}
    return {"state": states, "param_groups": groups}


def _to_blocks(key: int | str, state: dict[str, Any]) -> dict[str, Any]:
    scales = {f"{name}_scale" for name in ("exp_avg", "exp_avg_sq") if f"{name}_scale" in state}
    if state.keys() - scales != {"step", "stream", "exp_avg", "exp_avg_sq"}:
        raise ValueError(f"the state of parameter {key} is not that of an AdamW: it has {sorted(state)}")
    result: dict[str, Any] = {"step": int(state["step"])}
    for i, name in enumerate(("exp_avg", "exp_avg_sq"), start=1):
        x, scale = state[name], state.get(f"{name}_scale")
        if scale is None:
            result[f"state{i}"] = x.float()
            continue
        codes, absmax = x, scale.reshape(-1)
        if x.dtype != torch.uint8 or not _same_blocks(x):
            flat = encoded(decoded(x, scale, name, "rows", torch.float32).view(-1), name, "rows", torch.uint8)
            codes, absmax = flat[name].view(x.shape), flat[f"{name}_scale"]
        qmap = code_values(MOMENTS[name][1]).to(x.device, copy=True)
        result |= {f"state{i}": codes, f"absmax{i}": absmax, f"qmap{i}": qmap}
    return result


def _same_blocks(x: Tensor) -> bool:
    """Whether blocks along rows are those of the tensor as one row."""
    return x[:1].numel() % BLOCK == 0


def _state_dict(source: torch.optim.Optimizer | dict[str, Any]) -> dict[str, Any]:
    saved = source.state_dict() if isinstance(source, torch.optim.Optimizer) else source
    if not isinstance(saved, dict):
        raise TypeError(f"source must be an optimizer or its state_dict(), got {type(source).__name__}")
    check_layout(saved)
    return saved


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
