"""The per-layer mode: when a gradient is projected changes nothing else, and what cannot go with it says so."""

import copy
import gc
import inspect
import io
import math
import pickle
import subprocess
import sys
import weakref

import pytest
import torch
from torch.distributed.checkpoint.state_dict import get_optimizer_state_dict, set_optimizer_state_dict
from torch.utils.checkpoint import checkpoint

from cases import contract
from slimstate.optim import (
    FRUGAL,
    LISA,
    SGDP,
    AdamP,
    AdamW,
    AdamW8bit,
    DCTAdamW,
    GaLoreAdafactor,
    GaLoreAdamW,
    GaLoreAdamW8bit,
    GradNormLoRP,
    OwLore,
    in_backward,
    param_groups,
)
from slimstate.optim._projected import due

GAP = 3
SHARED = {"rank": 4, "update_proj_gap": GAP}
ROWS = {
    f"GaLoreAdamW, {projection}, {transport}": (GaLoreAdamW, {"projection": projection, "transport": transport})
    for projection, transport in (("svd", "rotate"), ("power", "keep"), ("random", "reset"))
} | {
    "GaLoreAdamW, left, bfloat16 moments": (GaLoreAdamW, {"side": "left", "moment_dtype": "bfloat16"}),
    "GaLoreAdamW8bit": (GaLoreAdamW8bit, {}),
    "GaLoreAdamW, compensation": (GaLoreAdamW, {"compensation": True, "maximize": True}),
    "GradNormLoRP, svd": (GradNormLoRP, {}),
    "GradNormLoRP, random, reset": (GradNormLoRP, {"projection": "random", "transport": "reset"}),
    "GaLoreAdafactor": (GaLoreAdafactor, {"scale_parameter": False}),
    "GaLoreAdafactor, relative step, beta1": (GaLoreAdafactor, {"lr": None, "beta1": 0.9}),
    "DCTAdamW": (DCTAdamW, {}),
    "DCTAdamW, hadamard, keep": (DCTAdamW, {"projection": "hadamard", "transport": "keep"}),
    "FRUGAL, columns": (FRUGAL, {"outer": "none"}),
    "FRUGAL, rows, lion": (FRUGAL, {"outer": "none", "projection": "rows", "contiguous": True, "inner": "lion"}),
    "FRUGAL, entries, sgdm": (FRUGAL, {"outer": "none", "projection": "entries", "inner": "sgdm"}),
    "FRUGAL, svd": (FRUGAL, {"outer": "none", "projection": "svd"}),
}
KINDS = sorted({kind.__name__ for kind, _ in ROWS.values()})
every = pytest.mark.parametrize("name", ROWS)
few = pytest.mark.parametrize("name", ["GaLoreAdamW, svd, rotate", "GradNormLoRP, svd", "DCTAdamW", "FRUGAL, columns"])


class Net(torch.nn.Module):
    """A convolution, matrices, a stack of experts and what stays dense."""

    def __init__(self):
        super().__init__()
        self.conv = torch.nn.Conv2d(2, 8, 3)
        self.wide = torch.nn.Linear(128, 24)
        self.norm = torch.nn.LayerNorm(24)
        self.experts = torch.nn.Parameter(torch.randn(3, 16, 24) / 5)
        self.out = torch.nn.Linear(16, 20)

    def forward(self, x):
        x = self.norm(self.wide(self.conv(x).tanh().flatten(1)).tanh())
        return self.out(torch.einsum("bi,eoi->beo", x, self.experts).tanh().sum(1))


def net(dtype=torch.float32):
    torch.manual_seed(0)
    return Net().to(dtype)


def build(name, model, **settings):
    kind, own = ROWS[name]
    others = [p for p in model.parameters() if p is not model.experts]
    groups = [{"params": others, **SHARED}, {"params": [model.experts], **SHARED, "batch_dims": 1}]
    return kind(groups, **{"lr": 0.01, **own, **settings})


def pair(name, dtype=torch.float32, **settings):
    """Two equal models with their optimizers."""
    models = net(dtype), net(dtype)
    return models, [build(name, model, **settings) for model in models]


def backward(model, i, pieces=1, scale=1.0):
    """The gradients of batch i, in so many micro-batches."""
    dtype = next(model.parameters()).dtype
    generator = torch.Generator().manual_seed(i)
    x = torch.randn(8, 2, 6, 6, generator=generator).to(dtype)
    y = torch.randn(8, 20, generator=generator).to(dtype)
    for inputs, targets in zip(x.chunk(pieces), y.chunk(pieces), strict=True):
        (scale * torch.nn.functional.mse_loss(model(inputs), targets) / pieces).backward()


def train(model, optimizer, start, stop, pieces=1):
    for i in range(start, stop):
        backward(model, i, pieces)
        optimizer.step()
        optimizer.zero_grad()


def weights(model):
    return [p.detach().clone() for p in model.parameters()]


def assert_same(model, optimizer, other, resumed):
    """The same weights and states, to the bit."""
    for p, q in zip(model.parameters(), other.parameters(), strict=True):
        assert torch.equal(p, q)
    a, b = optimizer.state_dict()["state"], resumed.state_dict()["state"]
    assert a.keys() == b.keys()
    for key in a:
        assert a[key].keys() == b[key].keys()
        for entry, value in a[key].items():
            assert torch.equal(torch.as_tensor(value), torch.as_tensor(b[key][entry])), entry


# The mode changes nothing.


@contract("per-layer mode: as the ordinary one to the bit, or refused with the reason", *KINDS)
@every
@pytest.mark.parametrize(
    ("dtype", "early"), [(torch.float32, False), (torch.float32, True), (torch.bfloat16, True)], ids=str
)
def test_one_micro_batch_trains_as_ever_bit_for_bit(name, dtype, early):
    (model, other), (optimizer, ordinary) = pair(name, dtype)
    mode = in_backward(optimizer, early_bases=early)
    for i in range(7):
        backward(model, i)
        whole = {key for key, p in model.named_parameters() if p.grad is not None}
        matrices = {key for key, p in model.named_parameters() if p.ndim > 1}
        assert (whole & matrices == matrices) if i == 0 and not early else whole & matrices < matrices
        assert {model.get_parameter(key) for key in matrices - whole} == mode.reduced.keys()
        optimizer.step()
        assert mode.buffer_bytes == 0
        optimizer.zero_grad()
        train(other, ordinary, i, i + 1)
    assert_same(model, optimizer, other, ordinary)


@pytest.mark.parametrize("name", [x for x in ROWS if "bfloat16" not in x and "8bit" not in x])  # they are rounded
@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.float32, 1e-6), (torch.float64, 1e-12)])
def test_micro_batches_equal_one_batch(name, dtype, tolerance):
    (model, other), (optimizer, ordinary) = pair(name, dtype)
    in_backward(optimizer)
    train(model, optimizer, 0, 8, pieces=4)
    train(other, ordinary, 0, 8)
    assert all(state["refreshes"].min() >= 3 for state in optimizer.state.values() if "refreshes" in state)
    for p, q in zip(model.parameters(), other.parameters(), strict=True):
        torch.testing.assert_close(p, q, rtol=tolerance, atol=tolerance)


def test_bfloat16_gradients_add_up_in_float32():
    errors = []
    for per_layer in (True, False):
        p = torch.nn.Parameter(torch.zeros(8, 64, dtype=torch.bfloat16))
        optimizer = GaLoreAdamW([p], rank=4, betas=(0.0, 0.0))
        p.grad = torch.randn(8, 64).bfloat16()
        optimizer.step()  # has a basis now
        optimizer.zero_grad()
        if per_layer:
            in_backward(optimizer)
        pieces = torch.randn(64, 8, 64, generator=torch.Generator().manual_seed(3)).bfloat16()
        for g in pieces:
            (p * g).sum().backward()
        optimizer.step()
        true = optimizer.state[p]["basis"].mT @ pieces.float().sum(0)
        errors.append((optimizer.state[p]["exp_avg"] - true).abs().max().item())
    assert errors[0] < 1e-4
    assert errors[1] > 1e-2


def llama(layers=2):
    transformers = pytest.importorskip("transformers")
    torch.manual_seed(0)
    config = transformers.LlamaConfig(
        vocab_size=97, hidden_size=48, intermediate_size=112, num_hidden_layers=layers, num_attention_heads=4
    )
    return transformers.LlamaForCausalLM(config)


def tokens(i, pieces):
    generator = torch.Generator().manual_seed(i)
    start = torch.randint(97, (8, 1), generator=generator)
    return ((start + 3 * torch.arange(16)) % 97).chunk(pieces)


def test_a_llama_trains_alike_with_schedulers_and_four_micro_batches():
    runs = []
    for per_layer in (False, True):
        model = llama()
        optimizer = GaLoreAdamW(param_groups(model, update_proj_gap=7), lr=3e-3)
        scheduler = torch.optim.lr_scheduler.OneCycleLR(optimizer, max_lr=3e-3, total_steps=40)
        if per_layer:
            in_backward(optimizer)
        losses = []
        for i in range(21):
            for piece in tokens(i, 4):
                loss = model(piece, labels=piece).loss / 4
                loss.backward()
            losses.append(loss.item())
            optimizer.step()
            scheduler.step()
            optimizer.zero_grad()
        runs.append((losses, weights(model), optimizer.param_groups[0]["betas"]))
    (losses, ordinary, _), (others, per_layer, _) = runs
    assert losses[-1] < losses[0] - 0.2
    assert others == pytest.approx(losses, abs=1e-5)
    assert runs[0][2] == runs[1][2] != (0.9, 0.999)  # the cycle moves them
    for p, q in zip(ordinary, per_layer, strict=True):
        torch.testing.assert_close(p, q, rtol=0, atol=1e-6)


@pytest.mark.parametrize("reentrant", [False, True])
def test_gradient_checkpointing_and_shared_weights_change_nothing(reentrant):
    results = []
    for per_layer in (False, True):
        torch.manual_seed(0)
        shared, out = torch.nn.Linear(24, 24).double(), torch.nn.Linear(24, 16).double()
        params = [*shared.parameters(), *out.parameters()]
        optimizer = GaLoreAdamW(params, lr=0.01, rank=4, update_proj_gap=3)
        if per_layer:
            in_backward(optimizer)
        for i in range(5):
            x = torch.randn(8, 24, generator=torch.Generator().manual_seed(i), dtype=torch.float64).requires_grad_()
            for _ in range(2):  # with reentrant checkpoints a backward pass of its own each
                x = checkpoint(lambda y, layer=shared: layer(y).tanh(), x, use_reentrant=reentrant)
            out(x).square().mean().backward()
            optimizer.step()
            optimizer.zero_grad()
        results.append([p.detach().clone() for p in params])
    for p, q in zip(*results, strict=True):
        torch.testing.assert_close(p, q, rtol=1e-12, atol=1e-12)


def test_a_gradient_is_kept_where_the_next_step_needs_it():
    model = net()
    optimizer = build("GaLoreAdamW, svd, rotate", model)
    group = optimizer.param_groups[0]
    in_backward(optimizer)
    places = {p: i for i, p in enumerate(p for p in group["params"] if p.ndim > 1)}
    train(model, optimizer, 0, 1)
    for step in range(2, 12):
        backward(model, step, pieces=2)
        for p in group["params"]:
            keeps = p not in places or due(step, places[p], len(places), GAP)
            assert (p.grad is not None) == keeps
        optimizer.step()
        optimizer.zero_grad()


def test_a_stack_with_an_unused_matrix_keeps_its_gradient_until_all_have_bases():
    stack = torch.nn.Parameter(torch.randn(3, 8, 12))
    optimizer = GaLoreAdamW([stack], rank=2, batch_dims=1, update_proj_gap=50)
    in_backward(optimizer, early_bases=True)
    for used, kept in ((2, True), (2, True), (3, False), (3, False)):
        optimizer.zero_grad()
        (stack[:used] ** 2).sum().backward()
        assert (stack.grad is not None) == kept
        optimizer.step()


# Clipping.


def projected_norm(name, model, twin_model, twin):
    """The norm of what a step of this optimizer applies, from the bases that a twin has after it."""
    squares = 0.0
    for p, other in zip(model.parameters(), twin_model.parameters(), strict=True):
        state, g = twin.state[other], p.grad
        if "refreshes" not in state:
            squares += g.square().sum()
            continue
        lead = p.shape[: p is model.experts]
        g, w = (x.reshape(*lead, p.shape[len(lead)], -1) for x in (g, p.detach()))
        if "GradNorm" in name:
            length = w.norm(dim=-1, keepdim=True)
            of_lengths = (g * w / length).sum(-1, keepdim=True)
            squares += of_lengths.square().sum()
            g = length * g - of_lengths * w
        if "basis" in state:
            basis = state["basis"]
            r = basis.mT @ g if basis.shape[-2] == g.shape[-2] else g @ basis
        else:
            if "DCT" in name:
                m = g if g.shape[-2] < g.shape[-1] else g.mT
                i = torch.arange(m.shape[-2], dtype=m.dtype)
                cosines = torch.cos(torch.pi / len(i) * i[:, None] * (i + 0.5)) * math.sqrt(2 / len(i))
                cosines[0] /= math.sqrt(2)
                g = (cosines @ m).mT
            index = state["index"].long().unsqueeze(-2).expand(*lead, g.shape[-2], -1)
            r = g.gather(-1, index)
        squares += r.square().sum()
    return squares.sqrt()


@few
def test_clipping_is_that_of_the_projected_gradients_by_hand(name):
    (model, other), (optimizer, ordinary) = pair(name, torch.float64)
    scale = 50.0
    mode = in_backward(optimizer, max_norm=scale / 4)
    clipped = 0
    for i in range(8):
        backward(model, i, pieces=2, scale=scale / 8 ** (i % 2))
        optimizer.step()
        optimizer.zero_grad()
        backward(other, i, scale=scale / 8 ** (i % 2))
        twin_model, twin = copy.deepcopy((other, ordinary))
        for p, q in zip(twin_model.parameters(), other.parameters(), strict=True):
            p.grad = q.grad.clone()
        twin.step()
        norm = projected_norm(name, other, twin_model, twin)
        torch.testing.assert_close(mode.total_norm, norm, rtol=1e-10, atol=0)
        factor = min(1.0, scale / 4 / (norm.item() + 1e-6))
        clipped += factor < 1
        for p in other.parameters():
            p.grad.mul_(factor)
        ordinary.step()
        ordinary.zero_grad()
    assert 0 < clipped < 8
    for p, q in zip(model.parameters(), other.parameters(), strict=True):
        torch.testing.assert_close(p, q, rtol=1e-9, atol=1e-9)


def test_an_infinite_max_norm_measures_and_changes_nothing():
    (model, other), (optimizer, ordinary) = pair("GaLoreAdamW, svd, rotate")
    mode, silent = in_backward(optimizer, max_norm=math.inf), in_backward(ordinary)
    train(model, optimizer, 0, 4)
    train(other, ordinary, 0, 4)
    assert_same(model, optimizer, other, ordinary)
    assert mode.total_norm > 0
    assert silent.total_norm is None
    backward(model, 9)
    mode.max_norm = mode.total_norm.item() / 1e3  # as a schedule of it would
    optimizer.step()
    dense = [p.grad for p in model.parameters() if p.ndim == 1]
    assert torch.nn.utils.get_total_norm(dense) <= mode.max_norm


def test_the_norm_of_bfloat16_gradients_has_the_digits_of_float32():
    p = torch.nn.Parameter(torch.zeros(1000, dtype=torch.bfloat16))
    matrix = torch.nn.Parameter(torch.zeros(8, 8))
    optimizer = GaLoreAdamW([p, matrix], rank=4)
    mode = in_backward(optimizer, max_norm=math.inf)
    g = torch.randn(1000).bfloat16()
    (p * g).sum().backward()
    optimizer.step()
    assert mode.total_norm.item() == pytest.approx(g.double().norm().item(), rel=1e-6)


# Memory.


def storage_bytes(tensors):
    return sum({x.untyped_storage().data_ptr(): x.untyped_storage().nbytes() for x in tensors}.values())


class Meter:
    """The most bytes of gradients and buffers that were alive when a gradient was ready, by hooks of its own."""

    def __init__(self, model):
        self.params, self.mode, self.most = list(model.parameters()), None, 0
        for p in self.params:
            p.register_post_accumulate_grad_hook(self)

    def __call__(self, _):
        held = [p.grad for p in self.params if p.grad is not None]
        held += [r for buffers in self.mode.reduced.values() for r in buffers] if self.mode else []
        self.most = max(self.most, storage_bytes(held))


def most_allocated(run):
    """The most bytes that a call had allocated at once, as torch's profiler records it."""
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU], profile_memory=True) as profiler:
        run()
    events = [e for e in profiler.profiler.kineto_results.events() if e.name() == "[memory]"]
    total = most = 0
    for event in sorted(events, key=lambda e: e.start_ns()):
        total += event.nbytes()
        most = max(most, total)
    return most


@pytest.mark.parametrize("early", [False, True])
def test_gradients_take_no_more_than_buffers_a_layer_and_what_is_kept(early):
    """Of 8 layers with 256 KiB each, where a buffer has 16."""
    layer, bias, buffer = 256 * 256 * 4, 256 * 4, 16 * 256 * 4
    gradients, allocated = {}, {}
    for per_layer in (False, True):
        torch.manual_seed(0)
        model = torch.nn.Sequential(*[torch.nn.Linear(256, 256) for _ in range(8)])
        optimizer = GaLoreAdamW(model.parameters(), lr=1e-3, rank=16, update_proj_gap=16)
        meter = Meter(model)  # before the mode, whose hooks then come after its own
        meter.mode = in_backward(optimizer, early_bases=early) if per_layer else None
        gradients[per_layer], allocated[per_layer] = [], []
        for _ in range(4):  # bases: all at the first step, the second layer's at the third

            def run(model=model):
                for x in torch.randn(3, 2, 256):
                    model(x).square().mean().backward()

            meter.most = 0
            run()
            gradients[per_layer].append(meter.most)
            optimizer.step()
            optimizer.zero_grad()
        for _ in range(2):
            allocated[per_layer].append(most_allocated(run))
            optimizer.step()
            optimizer.zero_grad()
    whole, small = 8 * (layer + bias), 8 * (buffer + bias)
    assert gradients[False] == [whole] * 4
    assert gradients[True][0] == (small + layer if early else whole)
    assert gradients[True][1] == gradients[True][3] == small + layer
    assert gradients[True][2] == small - buffer + 2 * layer
    for ordinary, steady in zip(allocated[False], allocated[True], strict=True):
        others = ordinary - whole  # activations, and the gradient that is being added
        assert 0 < others < 2 * layer
        assert steady <= small + layer + others


# What does not go with it.


def matrix(dtype=torch.float32):
    return torch.nn.Parameter(torch.randn(16, 24).to(dtype))


@contract(
    "per-layer mode: as the ordinary one to the bit, or refused with the reason", "AdamW", "AdamW8bit", "AdamP", "SGDP"
)
@pytest.mark.parametrize(
    ("kind", "settings", "message"),
    [
        (AdamW, {}, "AdamW projects no gradients"),
        (AdamW8bit, {}, "AdamW8bit projects no gradients"),
        (AdamP, {}, "AdamP projects no gradients"),
        (SGDP, {}, "SGDP projects no gradients"),
        (FRUGAL, {}, "FRUGAL needs whole gradients: outer='sign'"),
        (FRUGAL, {"outer": "sgd", "projection": "svd"}, "outer='sgd'"),
        (FRUGAL, {"outer": "none", "projection": "blocks"}, "projection='blocks'"),
        (FRUGAL, {"outer": "none", "density": 0.0}, "density=0"),
        (FRUGAL, {"outer": "none", "density": 1.0}, "projects no gradients: everything is selected"),
        (DCTAdamW, {}, "DCTAdamW needs whole gradients: update_proj_gap=1"),
        (DCTAdamW, {"update_proj_gap": 5, "error_feedback": "8bit"}, "error_feedback='8bit'"),
        (GaLoreAdamW, {"update_proj_gap": 1}, "GaLoreAdamW needs whole gradients: update_proj_gap=1"),
    ],
)
def test_refuses_what_needs_whole_gradients_and_says_why(kind, settings, message):
    p = matrix()
    optimizer = kind([p], **settings)
    with pytest.raises(ValueError, match=message):
        in_backward(optimizer)
    p.sum().backward()
    assert p.grad is not None  # and nothing was changed


def test_refuses_a_mixture_and_a_group_that_is_added_or_loaded():
    a, b, dense = matrix(), matrix(), torch.nn.Parameter(torch.ones(3))
    whole, small = {"params": [a], "density": 0.5}, {"params": [b], "density": 0.5, "outer": "none"}
    with pytest.raises(ValueError, match="outer='sign'"):
        in_backward(FRUGAL([small, whole]))
    optimizer = FRUGAL([small, {"params": [dense]}])  # a group with nothing to project may have any outer rule
    in_backward(optimizer)
    with pytest.raises(ValueError, match="outer='sign'"):
        optimizer.add_param_group(whole)
    assert len(optimizer.param_groups) == 2
    saved = optimizer.state_dict()
    saved["param_groups"][0]["outer"] = "sgd"
    optimizer.load_state_dict(saved)
    with pytest.raises(ValueError, match="outer='sgd'"):
        b.sum().backward()


def test_refuses_other_optimizers_values_and_a_second_time():
    p = matrix()
    with pytest.raises(TypeError, match=r"one of slimstate\.optim, got torch\.optim\.adamw\.AdamW"):
        in_backward(torch.optim.AdamW([p]))
    with pytest.raises(TypeError, match=r"got torch\.nn\.modules\.linear\.Linear"):
        in_backward(torch.nn.Linear(2, 2))
    optimizer = GaLoreAdamW([p])
    for value in (0, -1.0, math.nan, True, "1"):
        with pytest.raises(ValueError, match="max_norm must be None or a number > 0, got"):
            in_backward(optimizer, max_norm=value)
    with pytest.raises(ValueError, match="early_bases must be True or False, got 1"):
        in_backward(optimizer, early_bases=1)
    mode = in_backward(optimizer)
    with pytest.raises(RuntimeError, match="in per-layer mode already"):
        in_backward(optimizer)
    mode.remove()
    in_backward(optimizer)


def test_a_gradient_that_another_hook_took_is_missed():
    p = matrix()
    optimizers = [GaLoreAdamW([p]) for _ in range(2)]
    in_backward(optimizers[0], early_bases=True)
    in_backward(optimizers[1])
    with pytest.raises(RuntimeError, match="number 0 has been taken by another hook"):
        p.sum().backward()


def started(**settings):
    """A model and its optimizer, with bases."""
    model = net()
    optimizer = build("GaLoreAdamW, svd, rotate", model, update_proj_gap=50)
    mode = in_backward(optimizer, **settings)
    train(model, optimizer, 0, 1)
    return model, optimizer, mode


def clip(model, optimizer):
    torch.nn.utils.clip_grad_norm_(model.parameters(), 1e9)


def clip_values(model, optimizer):
    torch.nn.utils.clip_grad_value_(model.parameters(), 1e-3)


def zero_by_the_model(model, optimizer):
    model.zero_grad()


def zero_in_place(model, optimizer):
    model.zero_grad(set_to_none=False)


@pytest.mark.parametrize("edit", [clip, clip_values, zero_by_the_model, zero_in_place])
@pytest.mark.parametrize("when", ["in the first step", "at last", "between micro-batches"])
def test_a_hand_on_the_kept_gradients_alone_is_noticed(edit, when):
    model, optimizer, _ = started()
    if when == "in the first step":
        model = net()
        optimizer = build("GaLoreAdamW, svd, rotate", model)
        in_backward(optimizer)
    backward(model, 1)
    edit(model, optimizer)
    if when == "between micro-batches":
        backward(model, 2)
    before = weights(model)
    with pytest.raises(RuntimeError, match=r"changed after the backward pass.*max_norm=.*integrations\.md"):
        optimizer.step()
    assert all(torch.equal(p, q) for p, q in zip(before, model.parameters(), strict=True))
    optimizer.zero_grad()
    train(model, optimizer, 3, 5)  # and it goes on


@pytest.mark.parametrize("dense", [True, False])
@pytest.mark.parametrize("unscaled", [True, False])
def test_a_grad_scaler_is_refused_also_where_it_finds_no_gradients(dense, unscaled):
    p, vector = matrix(), torch.nn.Parameter(torch.ones(5))
    optimizer = GaLoreAdamW([p, vector] if dense else [p], rank=4)
    mode = in_backward(optimizer)
    p.square().sum().backward()
    optimizer.step()
    optimizer.zero_grad()
    scaler = torch.amp.GradScaler("cpu")
    before = p.detach().clone()
    for _ in range(2):
        scaler.scale(p.square().sum() + vector.sum()).backward()
        if unscaled:
            scaler.unscale_(optimizer)
        with pytest.raises(RuntimeError, match=r"GradScaler does not see .* bfloat16"):
            scaler.step(optimizer)
        assert torch.equal(p, before)
        optimizer.zero_grad()
        scaler = torch.amp.GradScaler("cpu")
    disabled = torch.amp.GradScaler("cpu", enabled=False)
    disabled.scale(p.square().sum()).backward()
    disabled.step(optimizer)
    assert not torch.equal(p, before)
    mode.remove()
    scaler.scale(p.square().sum()).backward()
    before = p.detach().clone()
    scaler.step(optimizer)
    assert not torch.equal(p, before)


def refused_by_ranks(rank, file):
    """What one of two ranks is told about three models; its source runs by itself."""
    import datetime
    import os

    import torch

    from slimstate.optim import GaLoreAdamW, in_backward

    distributed, told = torch.distributed, []
    store, patience = distributed.FileStore(file, 2), datetime.timedelta(seconds=100)
    distributed.init_process_group("gloo", store=store, rank=rank, world_size=2, timeout=patience)
    for early, views in ((False, False), (True, False), (True, True)):
        torch.manual_seed(0)
        model = torch.nn.Sequential(torch.nn.Linear(24, 16, bias=False), torch.nn.Linear(16, 20))
        optimizer = GaLoreAdamW(model.parameters(), rank=4)
        in_backward(optimizer, early_bases=early)
        wrapped = torch.nn.parallel.DistributedDataParallel(model, gradient_as_bucket_view=views)
        with wrapped.no_sync():
            wrapped(torch.randn(4, 24)).square().mean().backward()
        wrapped(torch.randn(4, 24)).square().mean().backward()
        try:
            optimizer.step()
        except RuntimeError as error:
            told.append(str(error))
    distributed.destroy_process_group()
    assert len(told) == 3, told
    assert all("DistributedDataParallel" in text for text in told), told
    # The last reducer would take the group with it, and wait under the GIL for gloo's threads, which wait for the GIL.
    os._exit(0)


def test_distributed_data_parallel_is_refused_on_every_rank_at_the_first_step(tmp_path):
    file, ranks = str(tmp_path / "store"), []
    for rank in range(2):
        source = f"{inspect.getsource(refused_by_ranks)}\nrefused_by_ranks({rank}, {file!r})"
        ranks.append(subprocess.Popen([sys.executable, "-c", source], stderr=subprocess.PIPE))
    try:
        for one in ranks:
            _, errors = one.communicate(timeout=100)
            assert one.returncode == 0, errors.decode()
    finally:
        for one in ranks:
            one.kill()


# Life with it.


def test_zero_grad_forget_and_a_load_drop_what_is_in_the_buffers():
    (model, other), (optimizer, ordinary) = pair("GaLoreAdamW, svd, rotate")
    mode = in_backward(optimizer)
    train(model, optimizer, 0, 2)
    train(other, ordinary, 0, 2)
    for drop in (optimizer.zero_grad, lambda: optimizer.load_state_dict(copy.deepcopy(optimizer.state_dict()))):
        backward(model, 7)
        assert mode.buffer_bytes > 0
        drop()
        model.zero_grad()
        assert mode.buffer_bytes == 0
        train(model, optimizer, 2, 3)
        train(other, ordinary, 2, 3)
        assert_same(model, optimizer, other, ordinary)
    backward(model, 3)
    backward(other, 3)
    forgotten = [key for key, p in model.named_parameters() if p in mode.reduced][:1]
    for m, o in ((model, optimizer), (other, ordinary)):
        o.forget([m.get_parameter(key) for key in forgotten])
        for key in forgotten:
            m.get_parameter(key).grad = None
        o.step()
        o.zero_grad()
    assert_same(model, optimizer, other, ordinary)


@few
@pytest.mark.parametrize("early", [False, True])
def test_a_resumed_run_repeats_the_uninterrupted_one(name, early):
    (model, other), (optimizer, resumed) = pair(name, torch.bfloat16)
    in_backward(optimizer, max_norm=0.5, early_bases=early)
    train(model, optimizer, 0, 4, pieces=2)
    file = io.BytesIO()
    torch.save((model.state_dict(), optimizer.state_dict()), file)
    file.seek(0)
    in_backward(resumed, max_norm=0.5, early_bases=early)
    saved, state = torch.load(file, weights_only=True)
    other.load_state_dict(saved)
    resumed.load_state_dict(state)
    for m, o in ((model, optimizer), (other, resumed)):
        train(m, o, 4, 9, pieces=2)
    assert_same(model, optimizer, other, resumed)


@pytest.mark.parametrize("copied", [copy.deepcopy, lambda pair: pickle.loads(pickle.dumps(pair))])
def test_a_copy_is_in_the_ordinary_mode(copied):
    model, optimizer, _ = started()
    other, ordinary = copied((model, optimizer))
    train(model, optimizer, 1, 4)
    for i in range(1, 4):
        backward(other, i)
        assert all(p.grad is not None for p in other.parameters())
        ordinary.step()
        ordinary.zero_grad()
    assert_same(model, optimizer, other, ordinary)


def test_without_it_all_is_as_before():
    (model, other), (optimizer, ordinary) = pair("GaLoreAdamW, svd, rotate")
    mode = in_backward(optimizer)
    train(model, optimizer, 0, 3)
    train(other, ordinary, 0, 3)
    backward(model, 8)
    optimizer.zero_grad()
    mode.remove()
    mode.remove()
    backward(model, 3)
    assert all(p.grad is not None for p in model.parameters())
    optimizer.zero_grad()
    train(model, optimizer, 3, 6)
    train(other, ordinary, 3, 6)
    assert_same(model, optimizer, other, ordinary)
    assert vars(optimizer).keys() == vars(ordinary).keys() | {"_in_backward"}


def test_bases_that_were_fitted_early_outlive_the_mode():
    (model, other), (optimizer, ordinary) = pair("GaLoreAdamW, svd, rotate")
    mode = in_backward(optimizer, early_bases=True)
    backward(model, 0)
    mode.remove()
    optimizer.zero_grad()
    for m, o in ((model, optimizer), (other, ordinary)):
        train(m, o, 0, 5)
    assert_same(model, optimizer, other, ordinary)


def test_an_optimizer_that_is_given_up_takes_no_gradients():
    model, optimizer, mode = started()
    gone = weakref.ref(optimizer)
    del optimizer
    gc.collect()
    assert gone() is None
    backward(model, 1)
    assert all(p.grad is not None for p in model.parameters())
    assert mode.buffer_bytes == 0
    mode.remove()


def test_groups_that_are_added_and_layers_that_are_thawed_take_part():
    (model, other), (optimizer, ordinary) = (net(), net()), (None, None)
    runs = []
    for per_layer, m in ((True, model), (False, other)):
        m.wide.weight.requires_grad_(False)
        o = GaLoreAdamW([{"params": [*m.conv.parameters(), *m.wide.parameters()], **SHARED}], lr=0.01)
        mode = in_backward(o) if per_layer else None
        assert not m.wide.weight.requires_grad
        train(m, o, 0, 2)
        o.add_param_group({"params": [m.experts], "batch_dims": 1, **SHARED})
        train(m, o, 2, 4)
        m.wide.weight.requires_grad_(True)
        train(m, o, 4, 6)
        backward(m, 6)
        if per_layer:
            assert m.experts in mode.reduced or m.wide.weight in mode.reduced
        m.wide.weight.requires_grad_(False)  # frozen again before its gradient is used: without it
        m.wide.weight.grad = None
        o.step()
        o.zero_grad()
        m.wide.weight.requires_grad_(True)
        train(m, o, 7, 9)
        runs.append(o)
    optimizer, ordinary = runs
    assert_same(model, optimizer, other, ordinary)


@pytest.mark.parametrize("policy", ["drop", "keep"])
@pytest.mark.parametrize("sampler", [LISA, OwLore])
def test_layer_sampling_goes_with_it(sampler, policy):
    results = []
    for per_layer in (False, True):
        torch.manual_seed(0)
        model = torch.nn.Sequential(*[torch.nn.Linear(16, 16) for _ in range(4)], torch.nn.Linear(16, 8))
        optimizer = GaLoreAdamW(model.parameters(), lr=0.01, rank=4, update_proj_gap=3)
        more = {"scores": [1.0, 2.0, 1.0, 1.0]} if sampler is OwLore else {}
        layers = [f"{i}" for i in range(4)]
        sampled = sampler(model, optimizer, layers=layers, active=2, interval=4, state_policy=policy, **more)
        mode = in_backward(optimizer) if per_layer else None
        for i in range(14):
            model(torch.randn(4, 16, generator=torch.Generator().manual_seed(i))).square().mean().backward()
            if mode is not None:
                assert all(p.requires_grad for p in mode.reduced)
            optimizer.step()
            sampled.step()
            optimizer.zero_grad()
        results.append((model, optimizer))
    assert_same(*results[0], *results[1])


@pytest.mark.parametrize("policy", ["propagate", "skip", "raise"])
def test_gradients_that_are_not_finite_meet_the_same_policy(policy):
    (model, other), (optimizer, ordinary) = pair("GaLoreAdamW, svd, rotate", nonfinite=policy)
    mode = in_backward(optimizer, max_norm=math.inf)
    for m, o in ((model, optimizer), (other, ordinary)):
        train(m, o, 0, 1)
        before = weights(m)
        backward(m, 1)
        (m.out.weight * math.nan).sum().backward()  # is in a buffer
        assert m is other or m.out.weight in mode.reduced
        if policy == "raise":
            with pytest.raises(FloatingPointError, match="1 parameters are not finite"):
                o.step()
        else:
            o.step()
        o.zero_grad()
        same = all(torch.equal(p, q) for p, q in zip(before, m.parameters(), strict=True))
        assert same == (policy != "propagate")
        assert sum(group["nonfinite_steps"] for group in o.param_groups) == (policy != "propagate")
        if policy != "propagate":
            assert mode.total_norm.isfinite()
            train(m, o, 2, 4)
            assert_same(model, optimizer, model, optimizer)
    for p, q in zip(model.parameters(), other.parameters(), strict=True):
        assert torch.equal(p.nan_to_num(), q.nan_to_num())


def test_a_sparse_gradient_is_refused_as_ever():
    table = torch.nn.Embedding(30, 16, sparse=True)
    optimizer = GaLoreAdamW(table.parameters(), rank=4)
    in_backward(optimizer, early_bases=True)
    table(torch.tensor([1, 2])).sum().backward()
    with pytest.raises(RuntimeError, match="takes dense real gradients, got a sparse one"):
        optimizer.step()


def test_the_norm_of_several_dtypes_is_one():
    params = [torch.nn.Parameter(torch.zeros(6, 8, dtype=d)) for d in (torch.bfloat16, torch.float32, torch.float64)]
    optimizer = GaLoreAdamW(params, rank=6)
    mode = in_backward(optimizer, max_norm=1.0)
    for p in params:
        p.grad = torch.full_like(p, 2)
    optimizer.step()
    assert mode.total_norm.item() == pytest.approx(2 * 144**0.5, rel=1e-6)


def test_a_checkpoint_from_before_the_first_step_loads():
    """Bases are there, and moments are not."""
    (model, other), (optimizer, resumed) = pair("GaLoreAdamW, svd, rotate")
    in_backward(optimizer, early_bases=True)
    backward(model, 0)
    saved = copy.deepcopy(optimizer.state_dict())
    optimizer.zero_grad()
    resumed.load_state_dict(saved)
    for m, o in ((model, optimizer), (other, resumed)):
        train(m, o, 1, 5)
    assert_same(model, optimizer, other, resumed)


def test_distributed_checkpoints_make_and_load_states_of_a_fresh_optimizer():
    model, optimizer, _ = started()
    train(model, optimizer, 1, 3)
    other = copy.deepcopy(model)
    fresh = build("GaLoreAdamW, svd, rotate", other, update_proj_gap=50)
    in_backward(fresh)
    set_optimizer_state_dict(other, fresh, copy.deepcopy(get_optimizer_state_dict(model, optimizer)))
    for m, o in ((model, optimizer), (other, fresh)):
        train(m, o, 3, 6)
    assert_same(model, optimizer, other, fresh)


def test_closures_and_gradients_from_elsewhere_work():
    (model, other), (optimizer, ordinary) = pair("GaLoreAdamW, svd, rotate")
    in_backward(optimizer)
    for i in range(4):
        for m, o in ((model, optimizer), (other, ordinary)):

            def closure(m=m, o=o, i=i):
                o.zero_grad()
                backward(m, i)
                return torch.ones(())

            assert o.step(closure) == 1
    for i in range(3):  # no hook runs
        for m, o in ((model, optimizer), (other, ordinary)):
            for p in m.parameters():
                p.grad = torch.full_like(p, i + 0.5)
            o.step()
    assert_same(model, optimizer, other, ordinary)


def test_gradients_are_edited_where_they_arise():
    (model, other), (optimizer, ordinary) = pair("GaLoreAdamW, svd, rotate")
    in_backward(optimizer)
    for m, o in ((model, optimizer), (other, ordinary)):
        for p in m.parameters():
            p.register_hook(lambda g: g.clamp(-1e-3, 1e-3))
        train(m, o, 0, 5)
    assert_same(model, optimizer, other, ordinary)


def test_a_compiled_step_takes_few_graphs():
    (model, other), (optimizer, ordinary) = pair("GaLoreAdamW, svd, rotate")
    in_backward(optimizer, max_norm=0.05)
    in_backward(ordinary, max_norm=0.05)
    torch._dynamo.reset()
    torch._dynamo.utils.counters.clear()
    step = torch.compile(optimizer.step, backend="eager")
    for i in range(20):
        for m, o, s in ((model, optimizer, step), (other, ordinary, ordinary.step)):
            backward(m, i, pieces=2)
            for group in o.param_groups:
                group["lr"] = 0.01 / (1 + i)
            s()
            o.zero_grad()
    assert torch._dynamo.utils.counters["stats"]["unique_graphs"] <= 4
    for p, q in zip(model.parameters(), other.parameters(), strict=True):
        torch.testing.assert_close(p, q, rtol=1e-6, atol=1e-6)


@pytest.mark.slow
def test_a_compiled_model_trains_alike():
    (model, other), (optimizer, ordinary) = pair("GaLoreAdamW, svd, rotate")
    in_backward(optimizer)
    train(torch.compile(model, backend="aot_eager"), optimizer, 0, 5)
    train(torch.compile(other, backend="aot_eager"), ordinary, 0, 5)
    assert_same(model, optimizer, other, ordinary)


@pytest.mark.gpu
@few
def test_neither_hooks_nor_steps_wait_for_the_device(name):
    model = net().cuda()
    optimizer = build(name, model, update_proj_gap=50)
    in_backward(optimizer, max_norm=1.0)
    x = torch.randn(8, 2, 6, 6, device="cuda")
    for i in range(4):
        if i == 2:
            torch.cuda.set_sync_debug_mode("error")
        try:
            model(x).square().mean().backward()
            optimizer.step()
            optimizer.zero_grad()
        finally:
            torch.cuda.set_sync_debug_mode("default")
