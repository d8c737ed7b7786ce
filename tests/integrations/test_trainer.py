"""transformers' Trainer."""

import pytest
import torch

from cases import assert_equal, weights
from slimstate.optim import AdamW, GaLoreAdamW, create, for_trainer, in_backward, param_groups
from small import llama, recipe, sentences

transformers = pytest.importorskip("transformers")

NAMES = ["adamw", "galore_adamw_8bit"]
OTHERS = ["adamw_8bit", "galore_adamw", "galore_adafactor", "gradnormlorp", "frugal", "dct_adamw", "adamp", "sgdp"]


def arguments(folder, **settings):
    settings = {"max_steps": 4, "learning_rate": 1e-2, "warmup_steps": 1, "weight_decay": 0.1} | settings
    return transformers.TrainingArguments(
        str(folder),
        per_device_train_batch_size=4,
        lr_scheduler_type="cosine",
        logging_steps=1,
        report_to=[],
        disable_tqdm=True,
        use_cpu=True,
        **settings,
    )


def trainer_of(model, args, made=None, kind=transformers.Trainer, **settings):
    if made is not None:
        settings["optimizer_cls_and_kwargs"] = made
    return kind(model, args, train_dataset=sentences(), **settings)


def trained(model, args, made=None, kind=transformers.Trainer, resume=None, **settings):
    """The trainer, its model trained."""
    trainer = trainer_of(model, args, made, kind, **settings)
    trainer.train(resume_from_checkpoint=resume)
    return trainer


def logged(trainer, key):
    return [entry[key] for entry in trainer.state.log_history if key in entry]


def states(trainer):
    return trainer.optimizer.state_dict()["state"]


def assert_resumes(folder, run):
    """That 4 steps are 2, a checkpoint, and 2 more by what `run(folder, resume)` builds anew."""
    whole = run(folder, None)
    torch.default_generator.manual_seed(7)
    resumed = run(folder, str(folder / "checkpoint-2"))
    assert resumed.state.global_step == 4
    assert_equal(weights(whole.model), weights(resumed.model))
    assert_equal(states(whole), states(resumed))
    for key in ("loss", "learning_rate", "grad_norm"):
        assert logged(whole, key) == logged(resumed, key)
    return whole


@pytest.mark.parametrize("name", [*NAMES, *(pytest.param(name, marks=pytest.mark.slow) for name in OTHERS)])
def test_a_resumed_training_is_the_uninterrupted_one(name, tmp_path):
    args = arguments(tmp_path, save_steps=2)
    whole = assert_resumes(tmp_path, lambda _, resume: trained(llama(), args, for_trainer(name, args), resume=resume))
    file = torch.load(tmp_path / "checkpoint-4/optimizer.pt", weights_only=True)
    assert_equal(states(whole), file["state"])


def test_bfloat16_weights_move_and_resume_with_wide_moments(tmp_path):
    args = arguments(tmp_path, save_steps=2, learning_rate=1e-3)
    made = for_trainer("galore_adamw", args, rank=8)
    whole = assert_resumes(tmp_path, lambda _, resume: trained(llama(torch.bfloat16), args, made, resume=resume))
    ones = torch.cat([p for name, p in whole.model.named_parameters() if "norm" in name])
    assert ones.dtype == torch.bfloat16
    assert ones.ne(1).float().mean() > 0.1  # by steps of 1e-3, which rounding to nearest swallows
    assert {state["exp_avg"].dtype for state in states(whole).values()} == {torch.float32}


@pytest.mark.parametrize("name", ["adamw", "galore_adamw"])
def test_a_training_and_its_logs_are_those_of_a_plain_loop(name, tmp_path):
    """With decay, betas, clipping, accumulation and a schedule."""
    args = arguments(
        tmp_path,
        gradient_accumulation_steps=2,
        adam_beta1=0.8,
        adam_beta2=0.95,
        adam_epsilon=1e-6,
        max_grad_norm=0.5,
    )
    model, seen = recorded(llama())
    rank = {} if name == "adamw" else {"rank": 4}
    trainer = trained(model, args, for_trainer(name, args, **rank))

    other = llama()
    shared = {"lr": 1e-2, "betas": (0.8, 0.95), "eps": 1e-6, "weight_decay": 0.1}
    if name == "adamw":
        decayed = trainer.get_decay_parameter_names(other)
        groups = [
            {"params": [p]} | ({} if key in decayed else {"weight_decay": 0}) for key, p in other.named_parameters()
        ]
        optimizer = torch.optim.AdamW(groups, **shared, fused=True)
    else:
        groups = param_groups(other, rank=4)
        groups[-1]["weight_decay"] = 0.0
        optimizer = GaLoreAdamW(groups, **shared)
    schedule = transformers.get_cosine_schedule_with_warmup(optimizer, 1, 4)
    rates, norms = [], []
    for i in range(4):
        for micro_batch in seen[2 * i : 2 * i + 2]:
            other(**micro_batch).loss.backward()
        norms.append(torch.nn.utils.clip_grad_norm_(other.parameters(), 0.5).item())
        rates.append(optimizer.param_groups[0]["lr"])
        optimizer.step()
        schedule.step()
        optimizer.zero_grad()
    assert len(seen) == 8 and min(norms) > 0.5
    assert_equal(weights(model), weights(other))
    assert logged(trainer, "learning_rate") == rates
    assert logged(trainer, "grad_norm") == norms


def recorded(model):
    """A model, and the list of what it is going to be called with while it trains."""
    seen = []
    model.register_forward_pre_hook(lambda _, args, kwargs: seen.append(kwargs), with_kwargs=True)
    return model, seen


@pytest.mark.parametrize("family", ["Llama", "GPT2", "Bert"])
@pytest.mark.parametrize("name", ["adamw", "galore_adamw"])
def test_what_the_trainer_would_decay_is_decayed(family, name, tmp_path):
    model = tiny(family)
    args = arguments(tmp_path)
    trainer = trainer_of(model, args, for_trainer(name, args))
    groups = trainer.create_optimizer().param_groups
    decayed = {key for group in groups if group["weight_decay"] == 0.1 for key in group["param_names"]}
    others = {key for group in groups if group["weight_decay"] == 0 for key in group["param_names"]}
    everything = {key for key, _ in model.named_parameters()}
    assert decayed == everything & set(trainer.get_decay_parameter_names(model))
    assert decayed | others == everything


def tiny(family):
    if family == "Llama":
        return llama()
    if family == "GPT2":
        config = transformers.GPT2Config(vocab_size=64, n_embd=32, n_layer=1, n_head=2, n_positions=16)
        return transformers.GPT2LMHeadModel(config)
    sizes = dict(vocab_size=64, hidden_size=32, num_hidden_layers=1, num_attention_heads=2, intermediate_size=48)
    return transformers.BertForSequenceClassification(transformers.BertConfig(**sizes))


def test_settings_by_name_come_before_those_of_the_arguments(tmp_path):
    args = arguments(tmp_path, adam_beta2=0.95)
    factory, settings = for_trainer("galore_adafactor", args, lr=0.3, beta1=0.9, decay="all")
    args.weight_decay = 0.2  # as a search over hyperparameters does, after the Trainer was made
    groups = factory()(llama(), **settings).param_groups
    assert {(group["lr"], group["beta1"], group["weight_decay"]) for group in groups} == {(0.3, 0.9, 0.2)}


def test_what_for_trainer_does_not_know_is_refused_before_there_is_a_trainer(tmp_path):
    args = arguments(tmp_path)
    with pytest.raises(ValueError, match=r"name must be one of AdamW, AdamW8bit, .* got 'galore'"):
        for_trainer("galore", args)
    with pytest.raises(TypeError, match="AdamW has no setting 'rank'; those of create are betas, "):
        for_trainer("adamw", args, rank=4)


def test_every_door_of_the_trainer_leads_to_the_same_training(tmp_path):
    args = arguments(tmp_path, weight_decay=0.0)
    ours = {"lr": 1e-2, "weight_decay": 0.0}
    results = []
    for door in range(4):
        model = llama()
        if door == 0:
            settings = {"made": for_trainer("galore_adamw", args, rank=4)}
        elif door == 1:
            settings = {"made": (GaLoreAdamW, {"params": param_groups(model, rank=4), **ours})}
        elif door == 2:
            settings = {"optimizers": (GaLoreAdamW(param_groups(model, rank=4), **ours), None)}
        else:
            settings = {"made": (lambda: create_galore, ours)}
        results.append(weights(trained(model, args, **settings).model))
    for result in results[1:]:
        assert_equal(results[0], result)


def create_galore(model, **settings):
    return create("GaLoreAdamW", model, rank=4, **settings)


def test_a_class_takes_the_groups_that_the_trainer_makes(tmp_path):
    args = arguments(tmp_path)
    trainer = trained(llama(), args, (AdamW, {"lr": 1e-2}))
    assert [group["weight_decay"] for group in trainer.optimizer.param_groups] == [0.1, 0.0]
    other = trained(llama(), args, for_trainer("adamw", args))
    assert_equal(weights(trainer.model), weights(other.model))


# The per-layer mode.


def test_a_per_layer_training_clips_logs_accumulates_and_resumes(tmp_path):
    """What transformers' layerwise GaLore does not: there the rate is a dummy's, the norm 0 and the state lost."""
    kind = recipe("PerLayerTrainer")
    args = arguments(tmp_path, save_steps=2, gradient_accumulation_steps=2, max_grad_norm=0.5)
    models, made = [], for_trainer("galore_adamw", args, rank=4)

    def run(_, resume):
        models.append(recorded(llama()))
        return trained(models[-1][0], args, made, kind, resume)

    trainer = assert_resumes(tmp_path, run)
    seen, other = models[0][1], llama()
    optimizer = create("galore_adamw", other, rank=4, lr=1e-2, weight_decay=0.1, decay="matrices")
    mode = in_backward(optimizer, 0.5, early_bases=True)
    schedule = transformers.get_cosine_schedule_with_warmup(optimizer, 1, 4)
    rates, norms = [], []
    for i in range(4):
        for micro_batch in seen[2 * i : 2 * i + 2]:
            other(**micro_batch).loss.backward()
        assert sum(p.grad is None for p in other.parameters()) == 21  # the projected ones, of 3 layers
        rates.append(optimizer.param_groups[0]["lr"])
        optimizer.step()
        norms.append(mode.total_norm.item())
        schedule.step()
        optimizer.zero_grad()
    assert min(norms) > 0.5
    assert_equal(weights(trainer.model), weights(other))
    assert logged(trainer, "learning_rate") == rates
    assert logged(trainer, "grad_norm") == norms


@pytest.mark.parametrize("max_grad_norm", [0.0, 1.0])
def test_the_per_layer_mode_is_refused_where_the_trainer_clips(max_grad_norm, tmp_path):
    """By a factor of 1 if not by another."""
    model, args = llama(), arguments(tmp_path, max_grad_norm=max_grad_norm)
    optimizer = create("galore_adamw", model, rank=4)
    in_backward(optimizer, early_bases=True)
    before = weights(model)
    with pytest.raises(RuntimeError, match=r"was changed after the backward pass.*docs/integrations\.md"):
        trained(model, args, optimizers=(optimizer, None))
    assert_equal(before, weights(model))


# Layer sampling.


def test_a_sampled_training_resumes_within_its_interval(tmp_path):
    kind = recipe("LayerSampling")
    args = arguments(tmp_path, save_steps=2)
    samplers = []

    def run(_, resume):
        callback = kind(active=1, interval=3)
        trainer = trained(llama(), args, for_trainer("adamw", args), resume=resume, callbacks=[callback])
        samplers.append(callback.sampler)
        return trainer

    trainer = assert_resumes(tmp_path, run)
    assert samplers[0].state_dict() == samplers[1].state_dict()
    assert samplers[0].state_dict()["steps"] == 4
    layers = {name for name, p in trainer.model.named_parameters() if "exp_avg" in trainer.optimizer.state[p]}
    assert {name.split(".")[2] for name in layers if ".layers." in name} == {samplers[0].awake[0].split(".")[2]}
