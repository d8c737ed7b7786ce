"""Training that began with galore-torch goes on here."""

import copy
import io
import sys
from pathlib import Path

import pytest
import torch

from cases import assert_equal
from slimstate.optim import (
    AdamW,
    AdamW8bit,
    GaLoreAdamW,
    _moments,
    from_bitsandbytes,
    from_galore_torch,
    to_bitsandbytes,
)
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


# bitsandbytes.

SHAPES = [(24, 512), (40, 300), (4, 3, 512), (5000,), (8, 8)]  # the same blocks, others, the same; no codes here


def eight_bit(params, grads, kind=None, steps=4, **settings):
    """An optimizer of bitsandbytes or of this package that has trained with the first gradients."""
    kind = kind or pytest.importorskip("bitsandbytes").optim.AdamW8bit
    optimizer = kind(params, lr=0.01, weight_decay=0.1, **settings)
    run(optimizer, params, grads[:steps])
    return optimizer


def problem():
    params = [parameter(shape, seed=i) for i, shape in enumerate(SHAPES)]
    return params, list(zip(*(torch.randn(8, *shape) * (0.5 + torch.rand(shape)) for shape in SHAPES), strict=True))


def copies(params):
    return [torch.nn.Parameter(p.detach().clone()) for p in params]


def moved(params, others, start):
    """How far apart the weights are, over how far they went."""
    return max(((p - q).norm() / (p - s).norm()).item() for p, q, s in zip(params, others, start, strict=True))


def dequantised(state, i):
    functional = pytest.importorskip("bitsandbytes.functional")
    x = state[f"state{i}"]
    if x.dtype != torch.uint8:
        return x
    flat = functional.dequantize_blockwise(
        x.view(-1), absmax=state[f"absmax{i}"], code=state[f"qmap{i}"], blocksize=256
    )
    return flat.view(x.shape)


@pytest.mark.parametrize("of", ["optimizer", "state dict", "file"])
def test_moments_of_bitsandbytes_are_taken_over_and_training_goes_on_here(of):
    params, grads = problem()
    theirs = eight_bit(params, grads)
    source = theirs if of == "optimizer" else theirs.state_dict()
    if of == "file":
        torch.save(source, file := io.BytesIO())
        file.seek(0)
        source = torch.load(file, weights_only=True)
    mine = copies(params)
    ours = AdamW8bit(mine)
    ours.load_state_dict(from_bitsandbytes(source))
    assert ours.param_groups[0]["lr"] == 0.01
    assert ours.param_groups[0]["weight_decay"] == 0.1
    for p, q, shape in zip(params, mine, SHAPES, strict=True):
        there, here = theirs.state[p], ours.state[q]
        assert here["step"] == 4
        for i, key in enumerate(("exp_avg", "exp_avg_sq"), start=1):
            coded = f"{key}_scale" in here
            assert coded == ((len(shape) > 1 and q.numel() >= 4096) or q.numel() == 64)  # cases.SMALLEST_CODED
            if shape in SHAPES[::2][:2]:
                assert torch.equal(here[key], there[f"state{i}"])
                assert torch.equal(here[f"{key}_scale"].view(-1), there[f"absmax{i}"])
                continue
            known = dequantised(there, i)
            found = (
                _moments.decoded(here[key], here[f"{key}_scale"], key, "rows", torch.float32) if coded else here[key]
            )
            assert (found - known).abs().max() <= (0.008 if coded else 0) * known.abs().max()
    start = copies(params)
    run(theirs, params, grads[4:])
    run(ours, mine, grads[4:])
    assert moved(params, mine, start) < 0.03


def test_moments_from_here_are_taken_over_by_bitsandbytes_and_training_goes_on_there():
    params, grads = problem()
    ours = eight_bit(params, grads, AdamW8bit)
    mine = copies(params)
    theirs = eight_bit(mine, grads, steps=0)
    theirs.load_state_dict(to_bitsandbytes(ours))
    for p, q in zip(params, mine, strict=True):
        here, there = ours.state[p], theirs.state[q]
        assert there["step"] == 4
        if "exp_avg_scale" not in here:
            assert torch.equal(there["state1"], here["exp_avg"])
        elif p.shape[1:].numel() % 256 == 0:
            assert torch.equal(there["state2"], here["exp_avg_sq"])
            assert torch.equal(there["absmax2"], here["exp_avg_sq_scale"].view(-1))
        else:
            known = _moments.decoded(here["exp_avg"], here["exp_avg_scale"], "exp_avg", "rows", torch.float32)
            assert (dequantised(there, 1) - known).abs().max() <= 0.008 * known.abs().max()
    start = copies(params)
    run(ours, params, grads[4:])
    run(theirs, mine, grads[4:])
    assert moved(params, mine, start) < 0.03


def test_an_exchange_there_and_back_changes_no_bit_where_blocks_are_the_same():
    params, grads = problem()
    ours = eight_bit(params, grads, AdamW8bit)
    again = AdamW8bit(copies(params))
    again.load_state_dict(from_bitsandbytes(to_bitsandbytes(ours)))
    for p, (_q, state) in zip(params, again.state.items(), strict=True):
        if p.ndim < 2 or p.shape[1:].numel() % 256 == 0:
            assert_equal(
                {k: x for k, x in state.items() if k != "stream"},
                {k: x for k, x in ours.state[p].items() if k != "stream"},
            )


def test_companded_moments_become_bitsandbytes_codes():
    p, q = (torch.nn.Parameter(torch.zeros(64, 512)) for _ in range(2))
    ours = AdamW([p], moment_dtype="8bit-companded")
    p.grad = torch.randn_like(p)
    ours.step()
    again = AdamW8bit([q])
    again.load_state_dict(from_bitsandbytes(to_bitsandbytes(ours)))
    for key in ("exp_avg", "exp_avg_sq"):
        known, found = (
            _moments.decoded(state[key], state[f"{key}_scale"], key, "rows", torch.float32)
            for state in (ours.state[p], again.state[q])
        )
        assert (ours.state[p][key].dtype, again.state[q][key].dtype) == (torch.int8, torch.uint8)
        assert 0 < (found - known).abs().max() <= 0.008 * known.abs().max()


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda s, g: g.update(alpha=5.0), "alpha=5.0 is AdEMAMix's"),
        (lambda s, g: s.pop("state2"), "not that of bitsandbytes' AdamW: it has"),
        (lambda s, g: s.update(absmax1=s["absmax1"][1:]), "'absmax1' of parameter 0 must be of blocks of 256"),
        (lambda s, g: s.update(qmap2=s["qmap1"]), "'qmap2' of parameter 0 is not"),
    ],
)
def test_what_cannot_be_taken_over_from_bitsandbytes_is_refused_with_the_reason(change, message):
    params, grads = problem()
    saved = to_bitsandbytes(eight_bit(params, grads, AdamW8bit, 1))
    change(saved["state"][0], saved["param_groups"][0])
    with pytest.raises(ValueError, match=message):
        from_bitsandbytes(saved)


@pytest.mark.parametrize(
    ("settings", "message"), [({"maximize": True}, "maximize=True has no"), ({"compensation": True}, "compensation")]
)
def test_what_bitsandbytes_does_not_have_is_refused_with_the_reason(settings, message):
    p = torch.nn.Parameter(torch.zeros(4, 4, dtype=torch.bfloat16))
    p.grad = torch.ones_like(p)
    optimizer = AdamW8bit([p], **settings)
    optimizer.step()
    with pytest.raises(ValueError, match=message):
        to_bitsandbytes(optimizer)
    with pytest.raises(TypeError, match="source must be an optimizer or its state_dict"):
        to_bitsandbytes([p])
