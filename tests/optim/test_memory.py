"""What is planned is what is then allocated, to the byte."""

import itertools
import json
import subprocess
import sys

import cases
import pytest
import torch
from cases import CASES, FEW, build
from torch import nn
from torch.nn import functional as F
from transformers import (
    GPT2Config,
    GPT2LMHeadModel,
    LlamaConfig,
    LlamaForCausalLM,
    MixtralConfig,
    MixtralForCausalLM,
    ViTConfig,
    ViTForImageClassification,
)

from slimstate.__main__ import main
from slimstate.optim import (
    FRUGAL,
    LISA,
    AdamW,
    DCTAdamW,
    GaLoreAdamW,
    OwLore,
    in_backward,
    param_groups,
    state_bytes,
)
from slimstate.optim._models import PRESETS, model_of
from slimstate.optim._projected import ProjectedOptimizer
from slimstate.optim.memory import CHOICES, compare, fitting, plan


class UNet(nn.Module):
    """Two levels: convolutions with norms, one that halves, one that doubles, and a skip."""

    def __init__(self):
        super().__init__()
        self.into = nn.Conv2d(3, 16, 3, padding=1)
        self.down = nn.Conv2d(16, 32, 2, stride=2)
        self.norm = nn.BatchNorm2d(32)
        self.middle = nn.Conv2d(32, 32, 3, padding=1, groups=4)
        self.up = nn.ConvTranspose2d(32, 16, 2, stride=2)
        self.out = nn.Conv2d(32, 3, 1)

    def forward(self, x):
        first = self.into(x).relu()
        deep = self.middle(self.norm(self.down(first)).relu())
        return self.out(torch.cat([first, self.up(deep)], 1))


def causal(kind, config, **settings):
    common = dict(vocab_size=96, hidden_size=32, intermediate_size=48, num_hidden_layers=2, num_attention_heads=2)
    return kind(config(**common | settings))


IDS = torch.arange(16).view(2, 8)
# name -> a model, and a loss of it
MODELS = {
    "LLaMA": (lambda: causal(LlamaForCausalLM, LlamaConfig), lambda model: model(IDS, labels=IDS).loss),
    "GPT-2 with Conv1D": (
        lambda: GPT2LMHeadModel(GPT2Config(vocab_size=96, n_embd=32, n_layer=2, n_head=2, n_positions=16)),
        lambda model: model(IDS, labels=IDS).loss,
    ),
    "Mixtral with stacked experts": (
        lambda: causal(MixtralForCausalLM, MixtralConfig, num_local_experts=4, num_key_value_heads=2),
        lambda model: model(IDS, labels=IDS).loss,
    ),
    "ViT": (
        lambda: ViTForImageClassification(
            ViTConfig(
                hidden_size=32,
                intermediate_size=48,
                num_hidden_layers=2,
                num_attention_heads=2,
                image_size=8,
                patch_size=4,
                num_labels=20,
            )
        ),
        lambda model: model(torch.ones(2, 3, 8, 8, dtype=model.dtype)).logits.float().logsumexp(1).sum(),
    ),
    "U-Net": (UNet, lambda model: model(torch.ones(2, 3, 8, 8, dtype=model.into.weight.dtype)).square().sum()),
    "LLaMA, tied": (
        lambda: causal(LlamaForCausalLM, LlamaConfig, tie_word_embeddings=True),
        lambda model: model(IDS, labels=IDS).loss,
    ),
}
MADE = {}


def made(name, dtype):
    """A model, and one with the same shapes on the meta device."""
    if name not in MADE:
        torch.manual_seed(0)
        model = MODELS[name][0]()
        with torch.device("meta"):
            MADE[name] = model, MODELS[name][0]()
    model, shapes = MADE[name]
    return model.to(dtype), shapes


def bytes_of(tensors):
    return sum({x.untyped_storage().data_ptr(): x.untyped_storage().nbytes() for x in tensors}.values())


def groups_of(name, model):
    kind, matrices, _ = CASES[name]
    return param_groups(model, **{"rank": None} | matrices) if matrices else list(model.named_parameters())


def settings_of(name):
    _, matrices, common = CASES[name]
    return matrices | common


def assert_planned(planned, model, optimizer):
    """Against what is there after a step."""
    held = planned.held
    assert held.weights == bytes_of(model.parameters())
    assert held.gradients == bytes_of(p.grad for p in model.parameters() if p.grad is not None)
    keys = ("basis", "basis_scale", "index")
    assert held.bases == bytes_of(state[key] for state in optimizer.state.values() for key in keys if key in state)
    assert held.states + held.bases == planned.state_bytes == state_bytes(optimizer)
    assert planned.module_buffers == bytes_of(model.buffers())


def check(case, name, dtype):
    kind, matrices, common = CASES[case]
    model, shapes = made(name, dtype)
    options = dict(dtype=dtype, temporaries=False)
    planned = plan(shapes, kind, **options, **settings_of(case))
    if case != "FRUGAL, blocks":
        optimizer = kind(groups_of(case, model), **{"lr": 1e-3, **common})
        assert plan(model, optimizer, temporaries=False).held == planned.held
        for _ in range(2):  # the second one has refreshes
            model.zero_grad()
            MODELS[name][1](model).backward()
            optimizer.step()
            assert_planned(planned, model, optimizer)
    return planned


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("name", MODELS)
@pytest.mark.filterwarnings("ignore:rank .* is above the smaller side")
def test_a_plan_of_an_architecture_is_what_training_holds(name, dtype):
    for case in FEW:
        check(case, name, dtype)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("case", CASES)
def test_a_plan_of_every_optimizer_is_what_training_holds(case, dtype):
    check(case, "Mixtral with stacked experts", dtype)


@pytest.mark.slow
@pytest.mark.parametrize("name", MODELS)
@pytest.mark.parametrize("case", CASES)
@pytest.mark.filterwarnings("ignore:rank .* is above the smaller side")
def test_a_plan_of_every_optimizer_and_architecture_is_what_training_holds(case, name):
    for dtype in (torch.float32, torch.bfloat16):
        check(case, name, dtype)
