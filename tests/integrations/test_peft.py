"""Adapters of peft: only they are trained, have gradients and state."""

import pytest
import torch
from test_trainer import arguments, assert_resumes, trained

from cases import assert_equal
from slimstate.optim import LISA, GradNormLoRP, create, for_trainer, param_groups, state_bytes
from small import batch, llama

peft = pytest.importorskip("peft")

pytestmark = pytest.mark.filterwarnings("ignore:`is_gradient_checkpointing` is deprecated:FutureWarning")


def adapted(**settings):
    torch.default_generator.manual_seed(1)
    settings = {"r": 8, "lora_alpha": 16, "target_modules": "all-linear"} | settings
    return peft.get_peft_model(llama(), peft.LoraConfig(**settings))


def train(model, optimizer, steps):
    """The losses."""
    losses = []
    for i in range(steps):
        model.zero_grad()
        loss = model(**batch(i)).loss
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    return losses


def copies(model):
    return {name: p.detach().clone() for name, p in model.named_parameters()}


def moved(model, before):
    return {name for name, p in model.named_parameters() if not torch.equal(p, before[name])}


FACTORS = {"include": ["*lora_[AB].*"]}  # of rank 8: `param_groups` would leave them dense
OPTIMIZERS = {
    "adamw": {},
    "adamw_8bit": {},
    "adamp": {},
    "galore_adamw": {**FACTORS, "rank": 4, "scale": 1.0},
    "frugal": {**FACTORS, "density": 0.5},
}


@pytest.mark.parametrize("dora", [False, pytest.param(True, marks=pytest.mark.slow)])
@pytest.mark.parametrize("name", OPTIMIZERS)
def test_adapters_train_and_nothing_else_moves_or_has_state(name, dora):
    model = adapted(use_dora=dora)
    before = copies(model)
    optimizer = create(name, model, lr=1e-2, **OPTIMIZERS[name])
    losses = train(model, optimizer, 16)
    assert sum(losses[-8:]) < 0.9 * sum(losses[:8])
    trainable = {name for name, p in model.named_parameters() if p.requires_grad}
    assert all("lora_" in name for name in trainable)
    assert moved(model, before) == trainable
    assert {name for group in optimizer.param_groups for name in group["param_names"]} == trainable
    assert optimizer.state.keys() == {p for p in model.parameters() if p.requires_grad}


def test_factors_that_are_too_small_to_project_are_refused_with_what_to_do():
    with pytest.raises(ValueError, match="found no matrix to project in this model; name some with include="):
        create("galore_adamw", adapted())


def test_the_layers_of_an_adapted_model_are_sampled():
    model = adapted()
    optimizer = create("adamw", model, lr=1e-2)
    sampler = LISA(model, optimizer, active=1, interval=2)
    sampler.attach()
    for _ in range(3):
        before, (awake,) = copies(model), sampler.awake
        train(model, optimizer, 2)
        assert moved(model, before) == {name for name in before if name.startswith(awake) and "lora_" in name}
        assert state_bytes(optimizer) == 0 or sampler.awake == [awake]  # dropped, unless it is drawn again


def test_a_training_of_adapters_resumes_in_the_trainer(tmp_path):
    args = arguments(tmp_path, save_steps=2, max_grad_norm=0.5)

    def run(_, resume):
        return trained(adapted(), args, for_trainer("adamp", args, nesterov=True), resume=resume)

    trainer = assert_resumes(tmp_path, run)
    assert (tmp_path / "checkpoint-2/adapter_model.safetensors").exists()
    decayed = [group["weight_decay"] for group in trainer.optimizer.param_groups]
    assert decayed == [0.1]  # there are only factors


def test_the_factors_of_a_dora_model_train_by_gradnormlorp():
    """The recipe of docs/gradnorm.md."""
    model = adapted(use_dora=True)
    groups = param_groups(model, **FACTORS, rank=4, scale=4.0)
    assert all(("lora_A" in d.name or "lora_B" in d.name) == d.projected for d in groups.decisions)
    assert {d.shape for d in groups.decisions if "magnitude" in d.name} == {(32,), (48,)}
    before = copies(model)
    optimizer = GradNormLoRP(groups, lr=1e-2)
    losses = train(model, optimizer, 25)
    assert losses[-1] < 0.5 * losses[0]
    for name, p in model.named_parameters():
        assert p.isfinite().all()
        if "lora_B" in name:  # zeros at first
            assert not before[name].any()
            assert p.norm(dim=1).gt(0).all()
            assert optimizer.state[p]["lengths"].ne(0).all()
    assert_equal(moved(model, before), {name for name in before if "lora" in name})
