import re

import pytest
import torch
from torch import nn

from slimstate.optim import GaLoreAdamW, ParamGroups, param_groups

SMALL = dict(hidden_size=32, intermediate_size=48, num_hidden_layers=1, num_attention_heads=2)
HEADS = dict(num_key_value_heads=1)


def llama(t, tied):
    return t.LlamaForCausalLM(t.LlamaConfig(vocab_size=64, tie_word_embeddings=tied, **SMALL, **HEADS))


def gpt2(t):
    special = dict(bos_token_id=0, eos_token_id=0)
    return t.GPT2LMHeadModel(t.GPT2Config(vocab_size=64, n_positions=40, n_embd=32, n_layer=1, n_head=2, **special))


def mixtral(t):
    experts = dict(num_local_experts=4, num_experts_per_tok=2)
    return t.MixtralForCausalLM(t.MixtralConfig(vocab_size=64, **experts, **SMALL, **HEADS))


def vit(t):
    return t.ViTForImageClassification(t.ViTConfig(image_size=16, patch_size=4, num_labels=20, **SMALL))


def bert(t):
    settings = dict(vocab_size=64, max_position_embeddings=40, num_labels=3)
    return t.BertForSequenceClassification(t.BertConfig(**settings, **SMALL))


LLAMA_LAYER = """
model.layers.0.self_attn.q_proj.weight  32 x 32  projected  Linear
model.layers.0.self_attn.k_proj.weight  16 x 32  projected  Linear
model.layers.0.self_attn.v_proj.weight  16 x 32  projected  Linear
model.layers.0.self_attn.o_proj.weight  32 x 32  projected  Linear
"""
LLAMA_MLP = """
model.layers.0.mlp.gate_proj.weight  48 x 32  projected  Linear
model.layers.0.mlp.up_proj.weight    48 x 32  projected  Linear
model.layers.0.mlp.down_proj.weight  32 x 48  projected  Linear
"""

# What every parameter of two or more axes gets; all others are vectors.
TABLES = {
    "Llama": (
        lambda t: llama(t, tied=False),
        "model.embed_tokens.weight  64 x 32  dense  embedding"
        + LLAMA_LAYER
        + LLAMA_MLP
        + "lm_head.weight  64 x 32  dense  output head",
    ),
    "Llama, tied": (
        lambda t: llama(t, tied=True),
        "model.embed_tokens.weight  64 x 32  dense  embedding, tied to the head" + LLAMA_LAYER + LLAMA_MLP,
    ),
    "GPT-2": (
        gpt2,
        """
transformer.wte.weight              64 x 32   dense      embedding, tied to the head
transformer.wpe.weight              40 x 32   dense      embedding
transformer.h.0.attn.c_attn.weight  32 x 96   projected  Conv1D
transformer.h.0.attn.c_proj.weight  32 x 32   projected  Conv1D
transformer.h.0.mlp.c_fc.weight     32 x 128  projected  Conv1D
transformer.h.0.mlp.c_proj.weight   128 x 32  projected  Conv1D
""",
    ),
    "Mixtral": (
        mixtral,
        "model.embed_tokens.weight  64 x 32  dense  embedding"
        + LLAMA_LAYER
        + """
model.layers.0.mlp.gate.weight           4 x 32       dense      router (MixtralTopKRouter)
model.layers.0.mlp.experts.gate_up_proj  4 x 96 x 32  projected  MixtralExperts, 4 matrices
model.layers.0.mlp.experts.down_proj     4 x 32 x 48  projected  MixtralExperts, 4 matrices
lm_head.weight                           64 x 32      dense      output head
""",
    ),
    "ViT": (
        vit,
        """
vit.embeddings.cls_token                           1 x 1 x 32      dense      embedding held by ViTEmbeddings
vit.embeddings.position_embeddings                 1 x 17 x 32     dense      embedding held by ViTEmbeddings
vit.embeddings.patch_embeddings.projection.weight  32 x 3 x 4 x 4  projected  Conv2d
vit.layers.0.attention.q_proj.weight               32 x 32         projected  Linear
vit.layers.0.attention.k_proj.weight               32 x 32         projected  Linear
vit.layers.0.attention.v_proj.weight               32 x 32         projected  Linear
vit.layers.0.attention.o_proj.weight               32 x 32         projected  Linear
vit.layers.0.mlp.fc1.weight                        48 x 32         projected  Linear
vit.layers.0.mlp.fc2.weight                        32 x 48         projected  Linear
classifier.weight                                  20 x 32         dense      output head
""",
    ),
    "BERT": (
        bert,
        """
bert.embeddings.word_embeddings.weight              64 x 32  dense      embedding
bert.embeddings.position_embeddings.weight          40 x 32  dense      embedding
bert.embeddings.token_type_embeddings.weight        2 x 32   dense      embedding
bert.encoder.layer.0.attention.self.query.weight    32 x 32  projected  Linear
bert.encoder.layer.0.attention.self.key.weight      32 x 32  projected  Linear
bert.encoder.layer.0.attention.self.value.weight    32 x 32  projected  Linear
bert.encoder.layer.0.attention.output.dense.weight  32 x 32  projected  Linear
bert.encoder.layer.0.intermediate.dense.weight      48 x 32  projected  Linear
bert.encoder.layer.0.output.dense.weight            32 x 48  projected  Linear
bert.pooler.dense.weight                            32 x 32  projected  Linear
classifier.weight                                   3 x 32   dense      output head
""",
    ),
}


class UNet(nn.Module):
    """The kinds of layers of a convolutional network that segments images."""

    def __init__(self):
        super().__init__()
        self.stem = nn.Conv2d(3, 24, 3)
        self.narrow = nn.Conv2d(24, 8, 1)
        self.depthwise = nn.Conv2d(24, 24, 3, groups=24)
        self.grouped = nn.Conv2d(24, 32, 3, groups=2)
        self.norm = nn.BatchNorm2d(32)
        self.down = nn.Conv2d(32, 48, 2, stride=2, bias=False)
        self.up = nn.ConvTranspose2d(48, 32, 2, stride=2)
        self.attention = nn.MultiheadAttention(32, 2)
        self.time = nn.Linear(20, 32)


UNET = """
stem.weight                24 x 3 x 3 x 3   projected  Conv2d
narrow.weight              8 x 24 x 1 x 1   dense      Conv2d, smaller side 8
depthwise.weight           24 x 1 x 3 x 3   dense      Conv2d with 24 groups
grouped.weight             32 x 12 x 3 x 3  dense      Conv2d with 2 groups
down.weight                48 x 32 x 2 x 2  projected  Conv2d
up.weight                  48 x 32 x 2 x 2  projected  ConvTranspose2d
attention.in_proj_weight   96 x 32          projected  MultiheadAttention
attention.out_proj.weight  32 x 32          projected  NonDynamicallyQuantizableLinear
time.weight                32 x 20          projected  Linear
"""


def rows(text):
    return [tuple(re.split(r"\s{2,}", line.strip())) for line in text.strip().splitlines() if line.strip()]


def assert_table(model, table):
    groups = param_groups(model, rank=4)
    lines = rows(str(groups))[:-1]
    matrices = [line for line in lines if line[3] != "vector"]
    assert matrices == rows(table)
    assert {line[2] for line in lines if line[3] == "vector"} == {"dense"}
    shapes = {name: tuple(p.shape) for name, p in model.named_parameters()}
    assert {d.name: d.shape for d in groups.decisions} == shapes
    assert {d.name for d in groups.decisions if d.why == "vector"} == {name for name, s in shapes.items() if len(s) < 2}
    return groups


@pytest.mark.parametrize("name", TABLES)
@pytest.mark.filterwarnings("ignore")  # of imports below transformers
def test_decides_as_a_practitioner_would(name):
    transformers = pytest.importorskip("transformers")
    make, table = TABLES[name]
    model = make(transformers)
    groups = assert_table(model, table)
    optimizer = GaLoreAdamW(groups, lr=1e-3)
    for p in model.parameters():
        p.grad = torch.randn_like(p)
    optimizer.step()
    projected = {d.name for d in groups.decisions if d.projected}
    parameters = dict(model.named_parameters())
    assert {key for key, p in parameters.items() if "basis" in optimizer.state[p]} == projected
    for decision in groups.decisions:
        if decision.batch_dims:
            assert optimizer.state[parameters[decision.name]]["basis"].shape[0] == decision.shape[0]


def test_convolutions_are_matrices_unless_they_are_grouped():
    assert_table(UNet(), UNET)


def test_recurrent_layers_are_projected():
    model = nn.ModuleDict({"lstm": nn.LSTM(24, 32), "out": nn.Linear(32, 24)})
    table = """
lstm.weight_ih_l0  128 x 24  projected  LSTM
lstm.weight_hh_l0  128 x 32  projected  LSTM
out.weight         24 x 32   projected  Linear
"""
    assert_table(model, table)


def mlp():
    return nn.Sequential(nn.Embedding(50, 24), nn.Linear(24, 40), nn.LayerNorm(40), nn.Linear(40, 24, bias=False))


def names(groups):
    return {group["name"]: [name for name, _ in group["params"]] for group in groups}


def test_groups_are_plain_named_and_hold_only_what_they_need():
    model = mlp()
    groups = param_groups(model, rank=4, update_proj_gap=7, scale=0.5, side="left")
    assert isinstance(groups, ParamGroups)
    assert isinstance(groups, list)
    assert names(groups) == {
        "projected": ["1.weight", "3.weight"],
        "dense matrices": ["0.weight"],
        "vectors": ["1.bias", "2.weight", "2.bias"],
    }
    settings = [{key: value for key, value in group.items() if key not in ("params", "name")} for group in groups]
    assert settings == [{"rank": 4, "update_proj_gap": 7, "scale": 0.5, "side": "left"}, {}, {}]
    parameters = dict(model.named_parameters())
    assert all(p is parameters[name] for group in groups for name, p in group["params"])


def test_every_trainable_parameter_is_listed_once():
    model = mlp()
    model[3].weight = nn.Parameter(torch.randn(24, 40))
    model.append(nn.Linear(24, 40))
    model[4].weight = model[1].weight  # used twice
    model[2].weight.requires_grad_(False)
    listed = [p for group in param_groups(model, rank=4) for _, p in group["params"]]
    assert len(listed) == len({id(p) for p in listed})
    assert {id(p) for p in listed} == {id(p) for p in model.parameters() if p.requires_grad}


def test_an_embedding_tied_to_a_linear_layer_stays_dense():
    model = nn.Sequential(nn.Embedding(50, 24), nn.Linear(24, 24), nn.Linear(24, 50))
    model[2].weight = model[0].weight
    decisions = {d.name: d for d in param_groups(model).decisions}
    assert decisions["0.weight"].why == "embedding, tied to the head"
    assert "2.weight" not in decisions
    assert decisions["1.weight"].projected


@pytest.mark.parametrize(
    ("patterns", "projected"),
    [
        ({}, ["1.weight", "3.weight"]),
        ({"exclude": ["1.*"]}, ["3.weight"]),
        ({"include": ["0.*"]}, ["0.weight", "1.weight", "3.weight"]),
        ({"include": ["*.weight"], "exclude": ["2.*"]}, ["0.weight", "1.weight", "3.weight"]),
        ({"include": ["0.weight"], "exclude": ["*3*"]}, ["0.weight", "1.weight"]),
    ],
)
def test_patterns_overrule_and_exclusion_wins(patterns, projected):
    groups = param_groups(mlp(), **patterns)
    assert names(groups)["projected"] == projected
    why = {d.name: d.why for d in groups.decisions}
    if "include" in patterns:
        assert why["0.weight"] == "included by name"
    if "exclude" in patterns:
        assert "excluded by name" in why.values()
    assert GaLoreAdamW(groups)


def test_included_stacks_of_matrices_stay_stacks():
    class Experts(nn.Module):
        def __init__(self):
            super().__init__()
            self.w = nn.Parameter(torch.randn(3, 20, 24))
            self.small = nn.Parameter(torch.randn(3, 8, 24))

    groups = param_groups(Experts(), rank=4, include=["small"])
    stacks = next(group for group in groups if group["name"] == "projected stacks")
    assert [name for name, _ in stacks["params"]] == ["w", "small"]
    assert stacks["batch_dims"] == 1


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"include": ["4.*"]}, r"the pattern '4\.\*' matches no trainable parameter"),
        ({"exclude": ["weights"]}, "the pattern 'weights' matches no trainable parameter"),
        ({"include": ["*.bias"]}, r"include names 1.bias, whose shape \(40,\) holds no matrix"),
        ({"exclude": ["*"]}, "found no matrix to project"),
        ({"include": "*attn*"}, "include must be a list of patterns"),
    ],
)
def test_patterns_that_cannot_be_meant_are_refused(settings, message):
    with pytest.raises(ValueError, match=message):
        param_groups(mlp(), **settings)


@pytest.mark.parametrize(
    "model", [nn.LayerNorm(20), nn.Linear(8, 200), nn.Embedding(50, 24), nn.Conv2d(24, 24, 3, groups=24), nn.Identity()]
)
def test_a_model_with_nothing_to_project_is_refused(model):
    with pytest.raises(ValueError, match="found no matrix to project"):
        param_groups(model)


def test_the_table_counts_weights():
    text = str(param_groups(mlp(), rank=4))
    assert text.splitlines()[-1] == "1,920 of 3,240 weights (59%) are in projected matrices"


def test_optimizers_name_their_parameters_and_report_what_they_get():
    model = mlp()
    optimizer = GaLoreAdamW(param_groups(model, rank=4), lr=1e-3)
    assert [group["param_names"] for group in optimizer.param_groups] == list(names(param_groups(model)).values())
    lines = {line[0]: line[1:] for line in rows(optimizer.report())}
    assert lines["1.weight"] == ("40 x 24", "svd, right: 4 of 24", f"{4 * (2 * 4 * 40 + 24 * 4 + 2):,} B")
    assert lines["0.weight"] == ("50 x 24", "dense", f"{4 * (2 * 50 * 24 + 1):,} B")
