"""Trajectories of reference implementations; the format is in tests/golden/README.md."""

import json
from pathlib import Path

import numpy as np
import pytest
import torch

from slimstate.optim import SGDP, AdamP, AdamW, GaLoreAdamW
from slimstate.projections import SVD

FOLDER = Path(__file__).parent.parent / "golden"
# SGDP's reference projects its own momentum, where the step is its memory: not the published rule, and not ours.
QUIRK = "sgdp_quirk_mixed_momentum"
# What the optimizers follow whole. Of the DCT cases tests/projections/test_dct.py compares the bases and the choices.
FOLLOWED = ("adamw_", "adamp_", "sgdp_", "galore_adamw_")
CASES = sorted(path.stem for path in FOLDER.glob("*.npz") if path.stem != QUIRK and path.stem.startswith(FOLLOWED))


def aligned_with(bases):
    """An SVD whose columns take the signs of the reference's basis of the same refresh."""

    class Aligned(SVD):
        def fit(self, m, old, counter):
            q = super().fit(m, old, counter)
            return q * (q * bases[counter[1]].to(q.dtype)).sum(0).sign()

    return Aligned()


def load(case):
    arrays = np.load(FOLDER / f"{case}.npz")
    meta = json.loads(str(arrays["meta"]))
    dtype = getattr(torch, meta["dtype"])
    tensors = {key: torch.from_numpy(arrays[key]) for key in arrays.files if key != "meta"}
    return meta, dtype, tensors


def build(meta, tensors, p):
    hp = meta["hp"]
    if meta.get("algo") in ("adamp", "sgdp"):
        return {"adamp": AdamP, "sgdp": SGDP}[meta["algo"]]([p], **{k: hp[k] for k in hp if k != "alias_momentum"})
    common = dict(lr=hp["lr"], betas=tuple(hp["betas"]), eps=hp["eps"], weight_decay=hp["weight_decay"])
    if "rank" not in hp:
        return AdamW([p], **common)
    settings = dict(rank=hp["rank"], update_proj_gap=hp["gap"], scale=hp["scale"], side=hp["side"])
    optimizer = GaLoreAdamW([p], **common, **settings, transport=hp["transport"])
    if meta["compare"] == "inject":
        assert meta["inject"] == ["basis"]
        optimizer.projections = {"svd": aligned_with(tensors["basis"])}
    return optimizer


def test_all_cases_are_here():
    assert len(CASES) == 32


def error_of(case):
    """The largest error by step, and the tolerance."""
    meta, dtype, tensors = load(case)
    start = tensors["W0_0"].to(dtype)
    p = torch.nn.Parameter(start.clone())
    optimizer = build(meta, tensors, p)
    errors = {}
    for t, grad in enumerate(tensors["G_0"].to(dtype), start=1):
        p.grad = grad.clone()
        optimizer.step()
        if t in meta["w_steps"]:
            reference = tensors["W_0"][meta["w_steps"].index(t)]
            travelled = (reference - start).abs().max()
            errors[t] = ((p.detach() - reference).abs().max() / travelled).item()
    return errors, meta["tolerance"]


@pytest.mark.parametrize("case", CASES)
def test_follows_the_reference(case):
    errors, tolerance = error_of(case)
    print(f"{case}: {max(errors.values()):.1e} of {tolerance:.0e} allowed")
    assert max(errors.values()) < tolerance, errors


def test_momentum_is_not_projected_as_the_references_is():
    errors, tolerance = error_of(QUIRK)
    assert errors[1] < tolerance < errors[2]  # the momentum of the first step is the first that differs


@pytest.mark.parametrize("case", [case for case in CASES if case.startswith("galore_adamw") and "1d" not in case])
def test_ends_with_the_references_subspace_and_moments(case):
    meta, dtype, tensors = load(case)
    p = torch.nn.Parameter(tensors["W0_0"].to(dtype))
    optimizer = build(meta, tensors, p)
    for grad in tensors["G_0"].to(dtype):
        p.grad = grad.clone()
        optimizer.step()
    state, basis = optimizer.state[p], tensors["basis"][-1].to(dtype)
    assert int(state["refreshes"]) == len(meta["hp"]["refresh_steps"]) == len(tensors["basis"])
    signs = (state["basis"] * basis).sum(0)
    torch.testing.assert_close(signs.abs(), torch.ones_like(signs), atol=1e-4, rtol=0)
    # our moments have the compressed axis first
    m, v = (x.mT if meta["hp"]["side"] == "right" else x for x in (tensors["m_T"], tensors["v_T"]))
    torch.testing.assert_close(state["exp_avg"] * signs[:, None].sign(), m.to(dtype), rtol=1e-3, atol=1e-4)
    torch.testing.assert_close(state["exp_avg_sq"], v.to(dtype), rtol=1e-3, atol=1e-4 * v.max().item())
