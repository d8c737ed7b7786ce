"""Loops over images as timm writes them. timm itself needs torchvision, which has no build for the CPU here."""

import pytest
import torch
from torch import nn

from cases import assert_equal, weights
from slimstate.optim import AdamP, AdamW, GaLoreAdamW, create

LAYER_DECAY = 0.5


def network():
    torch.default_generator.manual_seed(0)

    def block(m, n):
        return nn.Sequential(nn.Conv2d(m, n, 3, 2, 1, bias=False), nn.BatchNorm2d(n), nn.ReLU())

    return nn.Sequential(block(1, 16), block(16, 32), nn.Sequential(nn.Flatten(), nn.Linear(128, 4)))


def images(number=64):
    """Bars: horizontal or vertical, bright or dark."""
    generator = torch.Generator().manual_seed(0)
    labels = torch.arange(number) % 4
    x = 0.3 * torch.randn(number, 1, 8, 8, generator=generator)
    places = torch.randint(8, (number,), generator=generator)
    for image, label, place in zip(x, labels, places, strict=True):
        (image[0] if label < 2 else image[0].mT)[place] += 2.0 * (-1.0) ** label
    return x, labels


def groups_of(model, weight_decay):
    """As timm's `param_groups_layer_decay`: by layer and by whether there is decay, with names and factors."""
    depth, groups = len(model) - 1, {}
    for name, p in model.named_parameters():
        layer, decay = int(name.partition(".")[0]), 0.0 if p.ndim <= 1 else weight_decay
        group = {"lr_scale": LAYER_DECAY ** (depth - layer), "weight_decay": decay, "param_names": [], "params": []}
        group = groups.setdefault((layer, bool(decay)), group)
        group["param_names"].append(name)
        group["params"].append(p)
    return list(groups.values())


class Scheduler:
    """As timm's: the value of the update, by each group's factor; from the construction on."""

    def __init__(self, optimizer, values):
        self.optimizer, self.values = optimizer, values
        for group in optimizer.param_groups:
            group.setdefault("initial_lr", group["lr"])
        self.step_update(0)

    def step_update(self, number):
        for group in self.optimizer.param_groups:
            group["lr"] = group["initial_lr"] * self.values[number] * group.get("lr_scale", 1.0)


def train(model, optimizer, start, stop):
    scheduler = Scheduler(optimizer, [0.25, 0.5, 0.75, *[1.0] * 40])
    scheduler.step_update(start)
    x, labels = images()
    losses = []
    for i in range(start, stop):
        chosen = slice(16 * (i % 4), 16 * (i % 4) + 16)
        loss = nn.functional.cross_entropy(model(x[chosen]), labels[chosen], label_smoothing=0.1)
        losses.append(loss.item())
        optimizer.zero_grad()
        loss.backward()
        nn.utils.clip_grad_norm_(model.parameters(), 5.0)
        optimizer.step()
        scheduler.step_update(i + 1)
    return losses


@pytest.mark.parametrize(("kind", "settings"), [(AdamW, {}), (AdamP, {}), (GaLoreAdamW, {"scale": 1.0})])
def test_groups_with_layer_decay_train_as_torchs_do(kind, settings):
    model, reference = network(), network()
    optimizer = kind(groups_of(model, 0.05), lr=2e-2, **settings)
    losses = train(model, optimizer, 0, 24)
    assert sum(losses[-4:]) < 0.6 * sum(losses[:4])
    torchs = torch.optim.AdamW(groups_of(reference, 0.05), lr=2e-2, fused=True)
    train(reference, torchs, 0, 24)
    for ours, theirs in zip(optimizer.param_groups, torchs.param_groups, strict=True):
        shared = ("lr", "lr_scale", "weight_decay", "param_names", "initial_lr")
        assert {key: ours[key] for key in shared} == {key: theirs[key] for key in shared}
    if kind is AdamW:
        assert_equal(weights(model), weights(reference))


def test_groups_with_layer_decay_are_in_checkpoints(tmp_path):
    whole, resumed = network(), network()
    optimizer = AdamP(groups_of(whole, 0.05), lr=2e-2, nesterov=True)
    train(whole, optimizer, 0, 6)
    torch.save([whole.state_dict(), optimizer.state_dict()], tmp_path / "last.pt")
    train(whole, optimizer, 6, 12)
    model, state = torch.load(tmp_path / "last.pt", weights_only=True)
    resumed.load_state_dict(model)
    other = AdamP(groups_of(resumed, 0.05), lr=2e-2, nesterov=True)
    other.load_state_dict(state)
    train(resumed, other, 6, 12)
    assert_equal(whole.state_dict(), resumed.state_dict())
    assert_equal(optimizer.state_dict(), other.state_dict())


@pytest.mark.parametrize("name", ["adamp", "sgdp", "galore_adamw", "frugal"])
def test_a_network_of_convolutions_trains_by_name(name):
    model = network()
    losses = train(model, create(name, model, lr=0.2 if name == "sgdp" else 2e-2, decay="matrices"), 0, 24)
    assert sum(losses[-4:]) < 0.6 * sum(losses[:4])
