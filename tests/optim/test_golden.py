"""Trajectories of reference implementations; the format is in tests/golden/README.md."""

import json
from dataclasses import fields
from functools import partial
from pathlib import Path

import numpy as np
import pytest
import torch

from slimstate.optim import FRUGAL, SGDP, AdamP, AdamW, DCTAdamW, GaLoreAdafactor, GaLoreAdamW
from slimstate.projections import DCT, SVD

FOLDER = Path(__file__).parent.parent / "golden"
# SGDP's reference projects its own momentum, where the step is its memory: not the published rule, and not ours.
QUIRK = "sgdp_quirk_mixed_momentum"
FOLLOWED = ("adamw_", "adamp_", "sgdp_", "galore_", "frugal_", "dct_")
CASES = sorted(path.stem for path in FOLDER.glob("*.npz") if path.stem != QUIRK and path.stem.startswith(FOLLOWED))


def aligned_with(bases):
    """An SVD whose columns take the signs of the reference's basis of the same refresh."""

    class Aligned(SVD):
        def fit(self, m, old, counter):
            q = super().fit(m, old, counter)
            return q * (q * bases[counter[1]].to(q.dtype)).sum(0).sign()

    return Aligned()


def given(known, choices):
    """A projection like `known` that chooses what the reference chose at the same refresh."""

    class Given(type(known)):
        def fit(self, m, old, counter):
            chosen = choices[counter[1]].to(self.dtype_of(m.dtype))
            return chosen.sort().values if chosen.ndim == 1 else chosen

    return Given(**{f.name: getattr(known, f.name) for f in fields(known)})


def choosing(indices, **settings):
    """A DCT that chooses the reference's columns, and gives them in its order, which its moments depend on."""
    rest = iter(indices)

    class Chosen(DCT):
        def fit_down(self, a, old):
            index = next(rest)
            assert torch.equal(super().fit_down(a, old)[0], index.sort().values)
            return index, self.coefficients(a, index), torch.tensor(True)

    return Chosen(**settings)


def choosing_at(steps):
    """A DCTAdamW that chooses at the reference's steps."""

    class Scheduled(DCTAdamW):
        def _refresh(self, matrix, group, projection, *, scheduled):
            super()._refresh(matrix, group, projection, scheduled=int(matrix.step) in steps)

    return Scheduled


def dct(meta, tensors, p, common):
    hp = meta["hp"]
    basis, kind = {"matmul": ("dct3", 3), "makhoul": ("dct", 2)}[hp["sim_type"]]
    common |= dict(rank=hp["rank"], update_proj_gap=hp["gap"], side=hp["side"], transport=hp["transport"])
    settings = dict(projection=basis, norm=hp["ell_norm"], error_feedback="param" if hp["use_ef"] else None)
    optimizer = choosing_at(hp["refresh_steps"])([p], **common, **settings)
    if meta["inject"]:
        assert meta["inject"] == ["indices"]
        optimizer.projections = {basis: choosing(tensors["indices"], kind=kind)}
    return optimizer


def load(case):
    arrays = np.load(FOLDER / f"{case}.npz")
    meta = json.loads(str(arrays["meta"]))
    dtype = getattr(torch, meta["dtype"])
    tensors = {key: torch.from_numpy(arrays[key]) for key in arrays.files if key != "meta"}
    return meta, dtype, tensors


FRUGAL_NAMES = {"randk": "entries", "block": "blocks", "sgd": "sgdm", "sign_sgd": "sign", "no": "none"}


def nth_turn(active, tensors, count, order, seed, interval):
    return set(active[interval].nonzero().flatten().tolist())


def frugal(meta, tensors, params, monkeypatch):
    hp = meta["hp"]
    projection, inner, outer = (FRUGAL_NAMES.get(hp[key], hp[key]) for key in ("kind", "core", "rule"))
    outer = "sgd" if outer == "sgdm" else outer
    optimizer = FRUGAL(
        params,
        lr=hp["lr"],
        betas=(hp["momentum"], 0.999) if "momentum" in hp else tuple(hp["betas"]),
        eps=hp.get("eps", 1e-8),
        weight_decay=hp["weight_decay"],
        density=hp["density"],
        update_proj_gap=hp["gap"],
        scale=hp["s"],
        projection=projection,
        side=hp["side"] if projection in ("svd", "random") else "auto",
        inner=inner,
        outer=outer,
        outer_scale=hp["c"],
        order=hp.get("order", "random"),
    )
    for choice in meta.get("inject", ()):
        if choice == "active":
            monkeypatch.setattr("slimstate.optim.frugal._turn", partial(nth_turn, tensors["active"]))
        else:
            known = optimizer.projections[projection]
            optimizer.projections = {projection: given(known, tensors[choice])}
    return optimizer


def build(meta, tensors, params, monkeypatch):
    hp = meta["hp"]
    if meta.get("algo", "").startswith("frugal"):
        return frugal(meta, tensors, params, monkeypatch)
    (p,) = params
    if meta.get("algo") in ("adamp", "sgdp"):
        return {"adamp": AdamP, "sgdp": SGDP}[meta["algo"]]([p], **{k: hp[k] for k in hp if k != "alias_momentum"})
    adafactor = meta.get("algo") == "galore_adafactor"
    rule = ("beta1", "scale_parameter", "relative_step") if adafactor else ("betas", "eps")
    common = {key: hp[key] for key in ("lr", "weight_decay", *rule)}
    if "rank" not in hp:
        return AdamW([p], **common)
    if meta.get("algo") == "dct_adamw":
        return dct(meta, tensors, p, common)
    settings = dict(rank=hp["rank"], update_proj_gap=hp["gap"], scale=hp["scale"], side=hp["side"])
    kind = GaLoreAdafactor if adafactor else GaLoreAdamW
    optimizer = kind([p], **common, **settings, transport=hp["transport"])
    if meta["compare"] == "inject":
        assert meta["inject"] == ["basis"]
        optimizer.projections = {"svd": aligned_with(tensors["basis"])}
    return optimizer


def test_all_cases_are_here():
    assert len(CASES) == 70


def error_of(case, monkeypatch):
    """The largest error by step, relative to the distance travelled, and the tolerance."""
    meta, dtype, tensors = load(case)
    starts = [tensors[f"W0_{i}"].to(dtype) for i in range(len(meta["shapes"]))]
    params = [torch.nn.Parameter(start.clone()) for start in starts]
    optimizer = build(meta, tensors, params, monkeypatch)
    errors = {}
    for t in range(1, meta["T"] + 1):
        for i, p in enumerate(params):
            p.grad = tensors[f"G_{i}"][t - 1].to(dtype)
        optimizer.step()
        if t in meta["w_steps"]:
            errors[t] = 0.0
            for i, (p, start) in enumerate(zip(params, starts, strict=True)):
                reference = tensors[f"W_{i}"][meta["w_steps"].index(t)]
                error = (p.detach() - reference).abs().max() / (reference - start).abs().max()
                errors[t] = max(errors[t], error.item())
    return errors, meta["tolerance"]


@pytest.mark.parametrize("case", CASES)
def test_follows_the_reference(case, monkeypatch):
    errors, tolerance = error_of(case, monkeypatch)
    print(f"{case}: {max(errors.values()):.1e} of {tolerance:.0e} allowed")
    assert max(errors.values()) < tolerance, errors


def test_momentum_is_not_projected_as_the_references_is(monkeypatch):
    errors, tolerance = error_of(QUIRK, monkeypatch)
    assert errors[1] < tolerance < errors[2]  # the momentum of the first step is the first that differs


@pytest.mark.parametrize("case", [case for case in CASES if case.startswith("galore_") and "1d" not in case])
def test_ends_with_the_references_subspace_and_moments(case, monkeypatch):
    meta, dtype, tensors = load(case)
    p = torch.nn.Parameter(tensors["W0_0"].to(dtype))
    optimizer = build(meta, tensors, [p], monkeypatch)
    for grad in tensors["G_0"].to(dtype):
        p.grad = grad.clone()
        optimizer.step()
    state, basis = optimizer.state[p], tensors["basis"][-1].to(dtype)
    assert int(state["refreshes"]) == len(meta["hp"]["refresh_steps"]) == len(tensors["basis"])
    signs = (state["basis"] * basis).sum(0)
    torch.testing.assert_close(signs.abs(), torch.ones_like(signs), atol=1e-4, rtol=0)
    # our moments have the compressed axis first
    turned = meta["hp"]["side"] == "right"
    names = {"m_T": "exp_avg", "v_T": "exp_avg_sq"}
    names |= dict(zip(("row_T", "col_T"), ("exp_avg_sq_row", "exp_avg_sq_col")[:: -1 if turned else 1], strict=True))
    assert sum(key.startswith("exp_avg") for key in state) == sum(name in tensors for name in names)
    for name, key in names.items():
        if name not in tensors:
            continue
        ours = state[key] * signs[:, None].sign() if key == "exp_avg" else state[key]
        theirs = (tensors[name].mT if turned and tensors[name].ndim == 2 else tensors[name]).to(dtype)
        torch.testing.assert_close(ours, theirs, rtol=1e-3, atol=1e-4 * theirs.abs().max().item())


@pytest.mark.parametrize("case", [case for case in CASES if case.startswith("dct_")])
def test_ends_with_the_references_columns_moments_and_error(case, monkeypatch):
    meta, dtype, tensors = load(case)
    p = torch.nn.Parameter(tensors["W0_0"].to(dtype))
    optimizer = build(meta, tensors, [p], monkeypatch)
    for grad in tensors["G_0"].to(dtype):
        p.grad = grad.clone()
        optimizer.step()
    state, turn = optimizer.state[p], meta["hp"]["side"] == "right"
    index, order = tensors["indices"][-1].sort()
    ours = state["index"].argsort()
    assert torch.equal(state["index"][ours], index)
    assert int(state["refreshes"]) == len(meta["hp"]["refresh_steps"]) == len(tensors["indices"])
    assert state["ages"].eq(len(tensors["G_0"])).all()
    for key, reference in (("exp_avg", "m_T"), ("exp_avg_sq", "v_T")):
        expected = (tensors[reference].mT if turn else tensors[reference])[order]
        torch.testing.assert_close(state[key][ours], expected, rtol=1e-3, atol=1e-4 * expected.abs().max().item())
    assert ("error" in state) == ("error_T" in tensors)
    if "error" in state:
        expected = tensors["error_T"] if turn else tensors["error_T"].mT  # ours has a row for each column of G
        torch.testing.assert_close(state["error"], expected, rtol=1e-3, atol=1e-5 * expected.abs().max().item())
