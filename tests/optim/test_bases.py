"""Bases that are kept in bfloat16 or 8 bits."""

import copy
import math

import pytest
import torch

from cases import backward, model, train, weights
from slimstate.optim import FRUGAL, GaLoreAdafactor, GaLoreAdamW, GradNormLoRP, in_backward, state_bytes
from slimstate.projections._bases import decode

KINDS = [GaLoreAdamW, GaLoreAdafactor, GradNormLoRP, FRUGAL]
FORMS = ["bfloat16", "8bit"]


def built(kind, params, **settings):
    own = {"scale_parameter": False} if kind is GaLoreAdafactor else {}
    own |= {"projection": "svd"} if kind is FRUGAL else {}
    return kind(params, **{"lr": 0.02, "rank": 0.5, "update_proj_gap": 2, **own, **settings})


def of_basis(state):
    """What is kept of Q, in float32."""
    if state["basis"].dtype == torch.int8:
        return decode(state["basis"], state["basis_scale"], torch.float32)
    return state["basis"].float()


@pytest.mark.parametrize("kind", KINDS)
def test_the_state_has_the_bytes_that_the_report_says(kind):
    for form, size in ((None, lambda d, r: 4 * d * r), ("bfloat16", lambda d, r: 2 * d * r)):
        assert_bytes(kind, form, size)
    assert_bytes(kind, "8bit", lambda d, r: d * (r + 4))


def assert_bytes(kind, form, size):
    p = torch.nn.Parameter(torch.randn(40, 24))
    optimizer = built(kind, [p], basis_dtype=form)
    said = optimizer.report()
    p.grad = torch.randn(40, 24)
    optimizer.step()
    state = optimizer.state[p]
    assert f"state in total: {state_bytes(optimizer):,} B" in said
    kept = [state[key] for key in ("basis", "basis_scale") if key in state]
    assert sum(x.numel() * x.itemsize for x in kept) == size(24, 12)
    assert ("basis" in said) == (form is not None)


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("kind", KINDS)
def test_a_checkpoint_with_float32_bases_goes_on_with_smaller_ones_and_back(kind, form):
    net = model()
    optimizer = built(kind, net.parameters())
    train(net, optimizer, 0, 3)
    saved = copy.deepcopy(optimizer.state_dict())
    for group in saved["param_groups"]:
        del group["basis_dtype"]  # of an older version
    smaller = built(kind, net.parameters(), basis_dtype=form)
    smaller.load_state_dict(copy.deepcopy(saved))
    wider = built(kind, net.parameters())
    again = copy.deepcopy(smaller.state_dict())
    for group in again["param_groups"]:
        del group["basis_dtype"]
    wider.load_state_dict(again)
    for p in net.parameters():
        if "basis" not in optimizer.state[p]:
            continue
        states = [x.state[p] for x in (optimizer, smaller, wider)]
        assert states[1]["basis"].dtype == (torch.int8 if form == "8bit" else torch.bfloat16)
        assert states[2].keys() == states[0].keys()
        assert torch.equal(of_basis(states[2]), of_basis(states[1]))
        bound = states[0]["basis"].abs().amax(-1, keepdim=True) / (2 * 127 if form == "8bit" else 256)
        assert ((of_basis(states[1]) - states[0]["basis"]).abs() <= 1.001 * bound).all()
    train(net, smaller, 3, 5)
    train(net, wider, 5, 7)


@pytest.mark.parametrize("kind", KINDS)
def test_a_group_may_change_its_mind(kind):
    net = model()
    optimizer = built(kind, net.parameters())
    for i, form in enumerate(["8bit", "bfloat16", None, "8bit"]):
        optimizer.param_groups[0]["basis_dtype"] = form
        train(net, optimizer, i, i + 1)
        dtypes = {x["basis"].dtype for x in optimizer.state.values() if "basis" in x}
        assert dtypes == {{"8bit": torch.int8, "bfloat16": torch.bfloat16, None: torch.float32}[form]}
        assert any("basis_scale" in x for x in optimizer.state.values()) == (form == "8bit")
        assert all(x.isfinite().all() for x in weights(net))
        fitted = [of_basis(x) for x in optimizer.state.values() if "basis" in x]
        assert all(torch.allclose(q.mT @ q, torch.eye(q.shape[1]), atol=0.05) for q in fitted)


@pytest.mark.parametrize("form", FORMS)
def test_gradients_may_be_projected_during_the_backward_pass(form):
    ends = []
    for way in (lambda optimizer: None, in_backward):
        net = model()
        optimizer = built(GaLoreAdamW, net.parameters(), basis_dtype=form)
        way(optimizer)
        for i in range(5):
            backward(net, i)
            optimizer.step()
        ends.append(weights(net))
    for p, q in zip(*ends, strict=True):
        torch.testing.assert_close(p, q)


@pytest.mark.parametrize("kind", KINDS)
def test_8_bit_bases_train_as_well_as_float32_ones(kind):
    """A matrix is recovered from noisy products with it."""
    losses = {}
    target = torch.randn(32, 48, generator=torch.Generator().manual_seed(0))
    for form in (None, "8bit"):
        w = torch.nn.Parameter(torch.full((32, 48), 0.1))
        optimizer = built(kind, [w], basis_dtype=form, rank=8, update_proj_gap=10, weight_decay=0.0, scale=1.0)
        generator = torch.Generator().manual_seed(1)
        for t in range(300):
            optimizer.param_groups[0]["lr"] = 0.1 * (1 + math.cos(math.pi * t / 300)) / 2
            x = torch.randn(48, 64, generator=generator)
            optimizer.zero_grad()
            ((w - target) @ x).square().mean().backward()
            optimizer.step()
        losses[form] = (w.detach() - target).square().mean().item()
    assert losses[None] < 0.1
    assert losses["8bit"] < 1.1 * losses[None] + 1e-4


@pytest.mark.parametrize(
    ("kind", "settings", "message"),
    [
        (GaLoreAdamW, {"basis_dtype": "4bit"}, "basis_dtype must be None or one of bfloat16, 8bit, got '4bit'"),
        (GaLoreAdamW, {"basis_dtype": torch.float16}, "basis_dtype must be None or one of bfloat16, 8bit, got 'float"),
        (FRUGAL, {"basis_dtype": "8bit", "projection": "columns"}, "needs a projection with a dense basis"),
        (FRUGAL, {"basis_dtype": "8bit", "projection": "blocks"}, "needs a projection with a dense basis"),
    ],
)
def test_refuses_what_is_not_kept(kind, settings, message):
    with pytest.raises(ValueError, match=message):
        built(kind, [torch.nn.Parameter(torch.zeros(4, 4))], **settings)


def test_a_dtype_is_a_name():
    optimizer = built(GaLoreAdamW, [torch.nn.Parameter(torch.zeros(4, 4))], basis_dtype=torch.bfloat16)
    assert optimizer.param_groups[0]["basis_dtype"] == "bfloat16"
