import pytest
import torch
from torch import nn

from cases import assert_equal, weights
from slimstate import optim
from slimstate.optim import FRUGAL, AdamW, GaLoreAdamW, create, param_groups
from slimstate.optim._base import Optimizer
from slimstate.optim._projected import ProjectedOptimizer


def model():
    torch.default_generator.manual_seed(0)
    return nn.Sequential(nn.Embedding(40, 32), nn.Linear(32, 48), nn.LayerNorm(48), nn.Linear(48, 32))


def train(net, optimizer, steps=3):
    for _ in range(steps):
        net(torch.arange(8)).square().sum().backward()
        optimizer.step()
        optimizer.zero_grad()
    return weights(net)


KINDS = [
    kind
    for name in optim.__all__
    if isinstance(kind := getattr(optim, name), type) and issubclass(kind, torch.optim.Optimizer)
]


@pytest.mark.parametrize("kind", KINDS)
def test_every_optimizer_has_its_name_however_it_is_written(kind):
    assert issubclass(kind, Optimizer)
    for name in (kind.__name__, kind.__name__.lower(), kind.__name__.upper().replace("W", "-W_")):
        assert type(create(name, model())) is kind


@pytest.mark.parametrize(
    ("name", "kind"),
    [
        ("galore_adamw", "GaLoreAdamW"),
        ("galore_adamw_8bit", "GaLoreAdamW8bit"),
        ("galore_adafactor", "GaLoreAdafactor"),
        ("adamw_8bit", "AdamW8bit"),
        ("dct_adamw", "DCTAdamW"),
        ("frugal", "FRUGAL"),
    ],
)
def test_the_names_of_the_field_are_known(name, kind):
    assert type(create(name, model())).__name__ == kind


@pytest.mark.parametrize("kind", KINDS)
def test_settings_are_the_optimizers_and_those_of_the_groups(kind):
    settings = {"lr": 0.01, "weight_decay": 0.1, "nonfinite": "raise"}
    net, other = model(), model()
    if issubclass(kind, ProjectedOptimizer):
        created = create(kind.__name__, net, rank=4, update_proj_gap=2, exclude=["3.*"], **settings)
        groups = param_groups(other, rank=4, exclude=["3.*"])
        optimizer = kind(groups, update_proj_gap=2, **settings)
        assert [g["rank"] for g in created.param_groups if g["name"] == "projected"] == [4]
    else:
        created = create(kind.__name__, net, **settings)
        optimizer = kind(other.named_parameters(), **settings)
    assert_equal(train(net, created), train(other, optimizer))


def test_a_density_is_that_of_the_projected_group():
    net, other = model(), model()
    created = create("frugal", net, density=0.5, projection="entries", lr=0.01)
    optimizer = FRUGAL(param_groups(other, rank=None, density=0.5), projection="entries", lr=0.01)
    assert_equal(train(net, created), train(other, optimizer))
    assert {g["name"]: g["density"] for g in created.param_groups} == {
        "projected": 0.5,
        "dense matrices": None,
        "vectors": None,
    }


def test_embeddings_are_projected_on_request():
    optimizer = create("galore_adamw", model(), embeddings="projected", rank=4)
    assert [group["param_names"] for group in optimizer.param_groups if group["rank"]] == [
        ["0.weight", "1.weight", "3.weight"]
    ]


@pytest.mark.parametrize("name", ["adamw", "galore_adamw"])
def test_vectors_are_not_decayed_on_request(name):
    net = model()
    optimizer = create(name, net, lr=0.5, weight_decay=1.0, decay="matrices")
    for p in net.parameters():
        p.grad = torch.zeros_like(p)
    before = weights(net)
    optimizer.step()
    for p, old in zip(net.parameters(), before, strict=True):
        assert_equal(p.detach(), old if p.ndim < 2 else old / 2)
    everything = create(name, net, weight_decay=1.0)
    assert {group["weight_decay"] for group in everything.param_groups} == {1.0}


@pytest.mark.parametrize("name", ["adamw", "galore_adamw"])
def test_what_is_frozen_is_left_out(name):
    net = model()
    net[3].requires_grad_(False)
    optimizer = create(name, net)
    names = sorted(name for group in optimizer.param_groups for name in group["param_names"])
    assert names == ["0.weight", "1.bias", "1.weight", "2.bias", "2.weight"]


@pytest.mark.parametrize("name", ["galore", "adam", "", 3, None])
def test_an_unknown_name_is_refused_with_those_that_are_known(name):
    with pytest.raises(ValueError, match=rf"name must be one of .*GaLoreAdamW8bit, .*, SGDP, got {name!r}"):
        create(name, model())


@pytest.mark.parametrize("name", ["lisa", "OwLore"])
def test_a_sampler_is_refused_with_what_to_do(name):
    with pytest.raises(ValueError, match=rf"'{name}' samples layers beside an optimizer.*attach\(\)"):
        create(name, model())


@pytest.mark.parametrize(
    ("name", "setting", "known"),
    [
        ("adamw", "rank", AdamW),
        ("adamw", "embeddings", AdamW),
        ("galore_adamw", "density", GaLoreAdamW),
        ("galore_adamw", "batch_dims", GaLoreAdamW),
        ("galore_adamw_8bit", "params", GaLoreAdamW),
        ("sgdp", "betas", None),
    ],
)
def test_an_unknown_setting_is_refused_with_those_that_are_known(name, setting, known):
    with pytest.raises(TypeError, match=f"has no setting '{setting}'; those of create are .*decay, .*lr, ") as error:
        create(name, model(), **{setting: 1})
    listed = str(error.value).partition("create are ")[2].split(", ")
    assert len(listed) == len(set(listed))
    assert setting not in listed
    assert known is None or {"moment_dtype", "seed"} <= set(listed)


def test_keywords_of_torchs_are_taken_or_refused_as_by_the_class():
    create("galore_adamw", model(), fused=True, foreach=None)
    with pytest.raises(ValueError, match="amsgrad=True is not supported by GaLoreAdamW"):
        create("galore_adamw", model(), amsgrad=True)


@pytest.mark.parametrize("make", [param_groups, lambda net, **settings: create("adamw", net, **settings)])
def test_decay_is_one_of_two_words(make):
    with pytest.raises(ValueError, match="decay must be one of all, matrices, got False"):
        make(model(), decay=False)
