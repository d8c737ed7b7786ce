"""torchtitan's container of optimizers, in one process.

torchtitan is no requirement of the tests, for what it pulls in. To run them:
pip install --no-deps torchtitan==0.3.0 tyro spmd_types docstring-parser typeguard shtab
"""

import pytest
import torch

from cases import assert_equal, weights
from slimstate.optim import create
from small import batch, llama, recipe

optimizers = pytest.importorskip("torchtitan.components.optimizer")

pytestmark = pytest.mark.filterwarnings("ignore:To get the last learning rate computed by the scheduler")


class Part(torch.nn.Module):
    """Some layers of a model, under the names that they have in it."""

    def __init__(self, model, layers):
        super().__init__()
        self.model = torch.nn.Module()
        self.model.layers = torch.nn.ModuleDict({str(i): model.model.layers[i] for i in layers})
        if 0 in layers:
            self.model.embed_tokens = model.model.embed_tokens
        else:
            self.model.norm, self.lm_head = model.model.norm, model.lm_head


def built(name, **settings):
    kind = recipe("SlimstateContainer")
    model = llama()
    parts = [Part(model, [0]), Part(model, [1, 2])]
    return model, kind(kind.Config(name=name, settings={"lr": 1e-2, **settings}), model_parts=parts)


def train(model, optimizer, start, stop, schedule=None):
    for i in range(start, stop):
        model(**batch(i)).loss.backward()
        optimizer.step()
        if schedule is not None:
            schedule.step()
        optimizer.zero_grad()


def scheduled(container):
    config = optimizers.LRSchedulersContainer.Config(warmup_steps=2)
    return config.build(optimizers=container, training_steps=6)


@pytest.mark.parametrize("name", ["adamw_8bit", "galore_adamw", "frugal", "dct_adamw"])
def test_a_container_trains_its_parts_and_resumes(name):
    model, container = built(name, weight_decay=0.1, decay="matrices")
    schedule = scheduled(container)
    assert len(container) == 2
    train(model, container, 0, 3, schedule)
    saved = {key: torch.clone(x) if isinstance(x, torch.Tensor) else x for key, x in container.state_dict().items()}
    assert all(key.startswith(("state.", "param_groups.")) for key in saved)
    other, resumed = built(name, weight_decay=0.1, decay="matrices")
    other.load_state_dict(model.state_dict())
    rates = scheduled(resumed)
    resumed.load_state_dict(saved)
    rates.load_state_dict(schedule.state_dict())
    train(model, container, 3, 6, schedule)
    train(other, resumed, 3, 6, rates)
    assert_equal(weights(model), weights(other))
    assert_equal(container.state_dict(), resumed.state_dict())
    assert {group["lr"] for optimizer in container for group in optimizer.param_groups} != {1e-2}


def test_the_state_of_a_container_that_has_not_stepped_can_be_read():
    """As a checkpoint does before it loads: by a step of zero gradients at a rate of zero."""
    model, container = built("galore_adamw")
    before = weights(model)
    flat = container.state_dict()
    assert_equal(before, weights(model))
    assert flat["param_groups.lm_head.weight.lr"] == 1e-2
    assert flat["state.model.layers.2.mlp.up_proj.weight.exp_avg"].shape == (8, 48)


def test_a_container_does_what_its_optimizer_does():
    model, container = built("galore_adamw")
    other = llama()
    train(model, container, 0, 3)
    train(other, create("galore_adamw", other, lr=1e-2), 0, 3)
    torch.testing.assert_close(weights(model), weights(other), rtol=1e-4, atol=1e-5)  # matrices are refreshed in turn
