"""Training that began with galore-torch goes on here."""

import copy
import io
import sys
from pathlib import Path

import pytest
import torch

from cases import assert_equal
from slimstate.optim import GaLoreAdamW, from_galore_torch
from slimstate.optim.convert import GALORE_TORCH
from training import gradients, parameter, run

TALL, WIDE, SQUARE, VECTOR = (20, 12), (12, 20), (12, 12), (7,)
TYPES = ["std", "reverse_std", "left", "right"]
GAP, SAVED, UNTIL = 10, 14, 25


def groups(params, proj_type, **more):
    projected = {"rank": 4, "update_proj_gap": GAP, "scale": 0.5, "proj_type": proj_type} | more
    return [{"params": params[:3], **projected}, {"params": params[3:]}]


def there(dtype=torch.float32, proj_type="std", steps=SAVED, **settings):
    """Parameters trained by galore-torch, its optimizer, and all gradients."""
    galore_torch = pytest.importorskip("galore_torch")
    params = [parameter(shape, dtype, seed=i) for i, shape in enumerate((TALL, WIDE, SQUARE, VECTOR))]
    grads = [gradients(p.shape, UNTIL, dtype, i) for i, p in enumerate(params[:3])]
    grads.append(list(torch.randn(UNTIL, *VECTOR).to(dtype)))
    grads = list(zip(*grads, strict=True))
    optimizer = galore_torch.GaLoreAdamW(
        groups(params, proj_type), no_deprecation_warning=True, **{"lr": 0.02, "eps": 1e-12, **settings}
    )
    run(optimizer, params, grads[:steps])
    return params, optimizer, grads


def here(params, **settings):
    """The same parameters, and an optimizer of ours that has taken no step."""
    copies = [torch.nn.Parameter(p.detach().clone()) for p in params]
    return copies, GaLoreAdamW(groups(copies, "std", rank=3), lr=0.5, **{"transport": "keep", **settings})


def distance(params, others, starts):
    """How far apart two runs are, relative to how far they went."""
    return max(
        ((p - q).abs().max() / (p - s).abs().max()).item() for p, q, s in zip(params, others, starts, strict=True)
    )


@pytest.mark.parametrize("proj_type", TYPES)
@pytest.mark.parametrize("transport", ["keep", "rotate"])
def test_until_the_next_refresh_the_weights_go_where_galore_torch_takes_them(proj_type, transport):
    params, theirs, grads = there(proj_type=proj_type)
    starts = [p.detach().clone() for p in params]
    copies, ours = here(params, transport=transport, update_proj_gap=1)
    ours.load_state_dict(from_galore_torch(theirs.state_dict()))
    assert [group["rank"] for group in ours.param_groups] == [4, None]
    assert [group["lr"] for group in ours.param_groups] == [0.02, 0.02]
    assert [ours.state[p]["step"].item() for p in copies] == [SAVED] * 4
    assert [ours.state[p]["refreshes"].item() for p in copies[:3]] == [2, 2, 2]
    # Ours are staggered, refreshed next in steps 21, 24 and 17; theirs all in step 21.
    run(theirs, params, grads[SAVED:16])
    run(ours, copies, grads[SAVED:16])
    assert distance(params, copies, starts) < 1e-5
    others = [(g[0], g[1], None, g[3]) for g in grads[16:20]]
    run(theirs, params, others)
    run(ours, copies, others)
    assert distance(params, copies, starts) < 1e-5
    run(theirs, params, grads[20:])
    run(ours, copies, grads[20:])
    assert distance(params, copies, starts) > 1e-3


def test_decay_and_epsilon_differ_as_documented():
    params, theirs, grads = there(weight_decay=0.1, eps=1e-6)
    starts = [p.detach().clone() for p in params]
    copies, ours = here(params)
    ours.load_state_dict(from_galore_torch(theirs.state_dict()))
    assert [group["eps"] for group in ours.param_groups] == [1e-6] * 2
    run(theirs, params, grads[SAVED : SAVED + 2])
    run(ours, copies, grads[SAVED : SAVED + 2])
    assert distance(params, copies, starts) < 0.02 * 0.1 * 2


def test_bfloat16_states_become_float32():
    params, theirs, grads = there(torch.bfloat16)
    copies, ours = here(params)
    ours.load_state_dict(from_galore_torch(theirs.state_dict()))
    for p, q, transposed in zip(params[:3], copies, (True, False, True), strict=False):
        assert ours.state[q]["basis"].dtype == torch.float32
        for key in ("exp_avg", "exp_avg_sq"):
            moment = ours.state[q][key]
            assert torch.equal(moment.mT if transposed else moment, theirs.state[p][key].float())
            assert moment.is_contiguous()
    run(ours, copies, grads[SAVED:])


GOLDEN = Path(__file__).parents[1] / "golden" / "galore_torch_checkpoint.pt"


def test_a_recorded_checkpoint_goes_on_as_recorded():
    """Where galore-torch is not installed; the other tests ask it itself."""
    with torch.serialization.safe_globals(GALORE_TORCH):
        golden = torch.load(GOLDEN, weights_only=True)
    params, ours = here(golden["saved"])
    ours.load_state_dict(from_galore_torch(golden["optimizer"]))
    run(ours, params, golden["grads"])
    assert distance(golden["after"], params, golden["saved"]) < 1e-5


def test_its_files_are_read_where_galore_torch_is_not_installed(monkeypatch):
    params, theirs, _ = there()
    file = io.BytesIO()
    torch.save(theirs.state_dict(), file)
    file.seek(0)
    for module in ("galore_torch", "galore_torch.galore_projector"):
        monkeypatch.setitem(sys.modules, module, None)  # cannot be imported
    with torch.serialization.safe_globals(GALORE_TORCH):
        read = from_galore_torch(torch.load(file, weights_only=True))
    (_, ours), (_, direct) = here(params), here(params)
    ours.load_state_dict(read)
    direct.load_state_dict(from_galore_torch(theirs.state_dict()))
    assert_equal(ours.state_dict(), direct.state_dict())


def test_its_files_are_read_where_it_is_installed():
    _, theirs, _ = there()
    file = io.BytesIO()
    torch.save(theirs.state_dict(), file)
    for settings in ({"weights_only": False}, {"weights_only": True}):
        file.seek(0)
        with torch.serialization.safe_globals(GALORE_TORCH):
            saved = from_galore_torch(torch.load(file, **settings))
        assert saved["state"][0]["basis"].shape == (12, 4)


def eight_bits(saved):
    saved["state"][0] = {"step": 3, "projector": saved["state"][0]["projector"], "state1": torch.zeros(1)}


def adafactor(saved):
    saved["state"][0] = {"step": 3, "RMS": 0.1, "exp_avg_sq_row": torch.zeros(1), "exp_avg_sq_col": torch.zeros(1)}


def no_projector(saved):
    del saved["state"][1]["projector"]


def lost_basis(saved):
    saved["state"][1]["projector"].ortho_matrix = None


def other_basis(saved):
    saved["state"][1]["projector"].ortho_matrix = torch.ones(5, 5)


@pytest.mark.parametrize(
    ("change", "error", "message"),
    [
        (eight_bits, ValueError, "parameter 0 is not that of galore-torch's AdamW: its 8-bit AdamW cannot be taken"),
        (adafactor, ValueError, "parameter 0 is not that of galore-torch's AdamW: its Adafactor cannot be taken over"),
        (lambda s: s["state"].update({2: [1]}), ValueError, "parameter 2 is not that of galore-torch's AdamW: it must"),
        (no_projector, ValueError, "parameter 1 has a projector and its group has no rank, or the reverse"),
        (lost_basis, ValueError, "the projector and the moments of parameter 1 must hold matrices"),
        (other_basis, ValueError, "the basis and the moments of parameter 1 do not fit each other at side='auto'"),
        (lambda s: s["state"][0].update(step=0.5), ValueError, "must be ints >= 1, got 0.5 and 10"),
        (lambda s: s["param_groups"][0].update(correct_bias=False), ValueError, "correct_bias=False has no counter"),
        (lambda s: s["param_groups"][0].update(proj_type="full"), NotImplementedError, "proj_type='full'"),
        (lambda s: s["param_groups"][0].update(proj_type="up"), ValueError, "proj_type must be one of std, reverse"),
        (lambda s: s.pop("state"), ValueError, "'state' must be a dict"),
    ],
)
def test_what_cannot_be_taken_over_is_refused(change, error, message):
    _, theirs, _ = there(steps=2)
    saved = copy.deepcopy(theirs.state_dict())
    change(saved)
    with pytest.raises(error, match=message):
        from_galore_torch(saved)
