"""Every optimizer goes on from its checkpoints bit for bit, and refuses whole what is not one of them."""

import contextlib
import copy
import io
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
import torch.distributed.checkpoint as dcp
from hypothesis import given
from hypothesis import strategies as st
from torch.distributed.checkpoint.api import CheckpointException
from torch.distributed.checkpoint.format_utils import dcp_to_torch_save
from torch.distributed.checkpoint.state_dict import (
    StateDictOptions,
    get_optimizer_state_dict,
    set_optimizer_state_dict,
)

from cases import (
    CASES,
    assert_equal,
    assert_same_continuation,
    backward,
    build,
    contract,
    every,
    few,
    model,
    moments_of,
    train,
    weights,
)
from slimstate.optim import FRUGAL, LISA, AdamW, GaLoreAdamW, state_bytes
from slimstate.projections._bases import BASIS_DTYPES


@contract("a checkpoint with names fits a model without, and the other way round")
@every
@pytest.mark.parametrize("named", [(False, True), (True, False)])
def test_checkpoints_with_and_without_names_fit_each_other(name, named):
    nets = model(), model(seed=0)
    a, b = (build(name, n.named_parameters() if w else n.parameters()) for n, w in zip(nets, named, strict=True))
    train(nets[0], a, 0, 3)
    b.load_state_dict(a.state_dict())
    nets[1].load_state_dict(nets[0].state_dict())
    assert b.param_groups[0]["param_names"] == [key for key, _ in nets[1].named_parameters()]
    assert_same_continuation(nets[0], a, nets[1], b, 3)  # what is random goes by the stream in the state


def saved(x):
    """As it comes back from a file."""
    file = io.BytesIO()
    torch.save(x, file)
    file.seek(0)
    return torch.load(file, weights_only=True)


@contract("saved at any step and loaded with `weights_only=True` it goes on bit for bit, in four precisions")
@every
@pytest.mark.parametrize(
    "dtype", [torch.float32, torch.bfloat16, torch.float16, pytest.param(torch.float64, marks=pytest.mark.slow)]
)
def test_saved_and_resumed_at_every_step_it_trains_bit_for_bit_as_if_never_stopped(name, dtype):
    net, other = model(dtype), model(dtype)
    optimizer, resumed = build(name, net.parameters()), build(name, other.parameters())
    for i in range(5):
        train(net, optimizer, i, i + 1)
        train(other, resumed, i, i + 1)
        assert_equal(weights(net), weights(other))
        checkpoint = saved({"weights": weights(other), "optimizer": resumed.state_dict()})
        assert_equal(checkpoint["optimizer"], optimizer.state_dict())
        torch.manual_seed(100 + i)  # no choice hangs on the global generator
        other = model(dtype, seed=100 + i)
        with torch.no_grad():
            for p, weight in zip(other.parameters(), checkpoint["weights"], strict=True):
                p.copy_(weight)
        resumed = build(name, other.parameters(), lr=0.5)
        resumed.load_state_dict(checkpoint["optimizer"])
        assert_equal(resumed.state_dict(), optimizer.state_dict())


# What torch.save adds for each tensor, and for the rest of a state dict: headers, alignment to 64 bytes, names.
BYTES_A_TENSOR, BYTES_A_FILE = 700, 8192


@contract("files are no larger than the state")
@every
def test_a_file_holds_the_state_and_little_else(name):
    net = model()
    optimizer = build(name, net.parameters())
    train(net, optimizer, 0, 3)
    tensors = [x for state in optimizer.state.values() for x in state.values() if isinstance(x, torch.Tensor)]
    assert all(x.untyped_storage().nbytes() == x.nbytes for x in tensors)
    file = io.BytesIO()
    torch.save(optimizer.state_dict(), file)
    assert file.tell() <= state_bytes(optimizer) + BYTES_A_TENSOR * len(tensors) + BYTES_A_FILE


RESUME = """
import sys
from pathlib import Path

import torch

from cases import CASES, build, model, train

folder = Path(sys.argv[1])
torch.set_num_threads(1)
torch.manual_seed(77)
ends = {}
for i, name in enumerate(CASES):
    checkpoint = torch.load(folder / f"{i}.pt", weights_only=True)
    for dtype, (weights, state) in checkpoint.items():
        net = model(getattr(torch, dtype), seed=5)
        optimizer = build(name, net.named_parameters())
        net.load_state_dict(weights)
        optimizer.load_state_dict(state)
        train(net, optimizer, 3, 7)
        ends[name, dtype] = [p.detach() for p in net.parameters()]
torch.save(ends, folder / "ends.pt")
"""


@contract("a run resumes bit for bit in another process", *{kind.__name__ for kind, *_ in CASES.values()})
def test_every_optimizer_resumes_bit_for_bit_in_another_process(tmp_path):
    ends = {}
    for i, name in enumerate(CASES):
        checkpoint = {}
        for dtype in ("float32", "bfloat16"):
            net = model(getattr(torch, dtype))
            optimizer = build(name, net.named_parameters())
            train(net, optimizer, 0, 3)
            checkpoint[dtype] = copy.deepcopy((net.state_dict(), optimizer.state_dict()))
            train(net, optimizer, 3, 7)
            ends[name, dtype] = weights(net)
        torch.save(checkpoint, tmp_path / f"{i}.pt")
    environment = os.environ | {"PYTHONPATH": str(Path(__file__).parent)}
    subprocess.run([sys.executable, "-c", RESUME, str(tmp_path)], check=True, env=environment)
    assert_equal(torch.load(tmp_path / "ends.pt", weights_only=True), ends)


@contract("a load keeps dtypes and copies tensors")
@every
def test_a_load_keeps_dtypes_and_copies_tensors(name):
    net = model(torch.bfloat16)
    optimizer = build(name, net.parameters())
    train(net, optimizer, 0, 3)
    saved = copy.deepcopy(optimizer.state_dict())
    resumed = build(name, copy.deepcopy(net).parameters())
    given = optimizer.state_dict()
    resumed.load_state_dict(given)
    for state in resumed.state_dict()["state"].values():
        dtypes = {key: x.dtype for key, x in state.items() if isinstance(x, torch.Tensor)}
        moments = torch.bfloat16 if "bfloat16" in name else torch.float32
        codes = torch.int8 if "companded" in name else torch.uint8
        for key in moments_of(state):
            assert dtypes[key] == (codes if f"{key}_scale" in state else moments)
        assert dtypes["step"] == torch.float32
        basis = BASIS_DTYPES.get(CASES[name][1].get("basis_dtype"), torch.float32)
        assert dtypes.get("basis", basis) == basis
        assert {dtypes.get(key, torch.int32) for key in ("index", "refreshes", "age")} == {torch.int32}
    for state in resumed.state.values():
        for x in state.values():
            if isinstance(x, torch.Tensor):
                x.zero_()
    assert_equal(given, saved)


@contract("hooks of loading fire in order, and may edit")
@every
def test_load_hooks_fire_in_order_and_may_edit(name):
    net, other = model(torch.bfloat16), model(torch.bfloat16)
    optimizer, resumed = build(name, net.parameters()), build(name, other.parameters())
    train(net, optimizer, 0, 3)
    calls, last = [], 7  # a bias, which has moments under any optimizer

    def edit(_, state_dict):
        if not state_dict["state"]:
            return None
        calls.append("pre")
        state_dict = copy.deepcopy(state_dict)
        state = state_dict["state"][last]
        state[moments_of(state)[0]].fill_(0.5)
        state["step"].fill_(40)
        state_dict["param_groups"][0]["lr"] = 0.123
        return state_dict

    def look(o):
        calls.append("post")
        state, origin = o.state[list(other.parameters())[last]], optimizer.state[list(net.parameters())[last]]
        key = moments_of(state)[0]
        assert state[key].eq(0.5).all()  # the state is complete by now
        assert state[key].dtype == origin[key].dtype

    resumed.register_load_state_dict_pre_hook(edit)
    resumed.register_load_state_dict_post_hook(look)
    for _ in range(2):
        resumed.load_state_dict(optimizer.state_dict())
    with pytest.raises(ValueError):
        resumed.load_state_dict(build(name, model()[:4].parameters()).state_dict())
    assert calls == ["pre", "post"] * 2
    hooks = resumed._optimizer_load_state_dict_pre_hooks, resumed._optimizer_load_state_dict_post_hooks
    assert [len(each) for each in hooks] == [1, 1]  # only those above: ours go with the call
    state = resumed.state[list(other.parameters())[last]]
    assert state["step"].item() == 40
    assert resumed.param_groups[0]["lr"] == 0.123


def other_shapes():
    return torch.nn.Sequential(torch.nn.Linear(20, 12), torch.nn.Linear(12, 24))


def one_more():
    return torch.nn.Sequential(torch.nn.Linear(20, 12), torch.nn.Linear(12, 20), torch.nn.Linear(20, 9))


def same_size_other_way():
    return torch.nn.Sequential(torch.nn.Linear(12, 20), torch.nn.Linear(20, 12))


@contract("a foreign or damaged checkpoint is refused whole")
@every
@pytest.mark.parametrize("foreign", [other_shapes, one_more, same_size_other_way])
def test_a_foreign_checkpoint_is_refused_whole(name, foreign):
    def fill(net, optimizer):
        for p in net.parameters():
            p.grad = torch.randn_like(p)
        optimizer.step()

    net = torch.nn.Sequential(torch.nn.Linear(20, 12), torch.nn.Linear(12, 20))
    optimizer = build(name, net.parameters())
    fill(net, optimizer)
    theirs = foreign()
    other = build(name, theirs.parameters(), lr=0.777)
    fill(theirs, other)
    before = copy.deepcopy(optimizer.state_dict())
    with pytest.raises(ValueError):
        optimizer.load_state_dict(other.state_dict())
    assert_equal(optimizer.state_dict(), before)
    fill(net, optimizer)


@pytest.mark.parametrize("groups", ["default rank", "group rank"])
def test_a_dense_checkpoint_does_not_turn_projection_off(groups):
    net, other = model(), model()
    matrices = [p for p in net.parameters() if p.ndim > 1]
    given = [{"params": matrices, "rank": 3}] if groups == "group rank" else matrices
    optimizer = GaLoreAdamW(given)
    dense = torch.optim.AdamW([p for p in other.parameters() if p.ndim > 1])
    train(other, dense, 0, 1)
    with pytest.raises(ValueError, match="does not fit"):
        optimizer.load_state_dict(dense.state_dict())
    assert optimizer.param_groups[0]["rank"] == (3 if groups == "group rank" else 0.25)


@pytest.mark.parametrize("how", [{"fused": True}, {"fused": False}, {"foreach": True}])
def test_a_checkpoint_of_torchs_adamw_continues_here(how):
    net = model()
    theirs = torch.optim.AdamW(net.parameters(), lr=0.02, **how)
    train(net, theirs, 0, 3)
    other = copy.deepcopy(net)
    ours = AdamW(other.parameters())
    ours.load_state_dict(theirs.state_dict())
    assert ours.param_groups[0].keys() == AdamW(other.parameters()).param_groups[0].keys()  # no flags that say nothing
    if how.get("fused"):
        assert_same_continuation(net, theirs, other, ours, 3)
    else:  # the same up to rounding
        train(net, theirs, 3, 5)
        train(other, ours, 3, 5)
        for p, q in zip(net.parameters(), other.parameters(), strict=True):
            torch.testing.assert_close(p, q)


def test_moments_that_torch_keeps_in_low_precision_go_on_in_float32():
    net = model(torch.bfloat16)
    theirs = torch.optim.AdamW(net.parameters(), lr=0.02)
    train(net, theirs, 0, 3)
    ours = AdamW(net.parameters())
    ours.load_state_dict(theirs.state_dict())
    for p in net.parameters():
        assert ours.state[p]["exp_avg"].dtype == torch.float32
        assert torch.equal(ours.state[p]["exp_avg"], theirs.state[p]["exp_avg"].float())


@contract("what schedulers and users keep in groups survives a checkpoint")
@few
def test_what_schedulers_and_users_keep_in_groups_survives(name):
    net, other = model(), model()
    optimizer = build(name, net.parameters())
    torch.optim.lr_scheduler.OneCycleLR(optimizer, max_lr=0.05, total_steps=12, cycle_momentum="Adafactor" not in name)
    optimizer.param_groups[0]["mine"] = "a value"
    resumed = build(name, other.parameters())
    resumed.load_state_dict(saved(optimizer.state_dict()))
    assert {"initial_lr", "max_lr", "mine"} <= resumed.param_groups[0].keys()
    assert_equal(resumed.state_dict(), optimizer.state_dict())


@contract("an older checkpoint loads: missing flags, `step` as a number")
@every
def test_a_checkpoint_without_newer_keys_loads(name):
    net = model()
    optimizer = build(name, net.parameters())
    train(net, optimizer, 0, 3)
    saved = copy.deepcopy(optimizer.state_dict())
    for group in saved["param_groups"]:
        for key in ("maximize", "seed", "stochastic_rounding"):
            del group[key]
    for state in saved["state"].values():
        del state["stream"]
        state["step"] = state["step"].item()
    other = copy.deepcopy(net)
    resumed = build(name, other.parameters())
    resumed.load_state_dict(saved)
    assert resumed.param_groups[0]["seed"] == 0
    step = resumed.state[next(other.parameters())]["step"]
    assert (step.dtype, step.shape, step.item()) == (torch.float32, (), 3)
    assert_same_continuation(net, optimizer, other, resumed, 3)


# By name.


def settings_without_turns(name):
    """With a refresh in every step and all of the blocks, steps do not depend on a parameter's place."""
    return {"update_proj_gap": 1} | ({"density": 1.0} if "blocks" in name else {}) if CASES[name][1] else {}


@contract("checkpoints go by name, in any order and division into groups")
@every
def test_states_find_their_parameters_by_name_in_any_order_and_division(name):
    net, other = model(), model()
    settings = settings_without_turns(name)
    optimizer = build(name, net.named_parameters(), **settings)
    train(net, optimizer, 0, 3)
    named = list(other.named_parameters())
    groups = [{"params": named[::-2]}, {"params": named[::2], "weight_decay": 0.5, "name": "even"}]
    resumed = build(name, groups, **settings)
    resumed.load_state_dict(saved(optimizer.state_dict()))
    other.load_state_dict(net.state_dict())
    assert [group["param_names"] for group in resumed.param_groups] == [[k for k, _ in g["params"]] for g in groups]
    assert {group["weight_decay"] for group in resumed.param_groups} == {optimizer.param_groups[0]["weight_decay"]}
    assert resumed.param_groups[1]["name"] == "even"
    for p, q in zip(net.parameters(), other.parameters(), strict=True):
        assert_equal(optimizer.state[p], resumed.state[q])
    assert_same_continuation(net, optimizer, other, resumed, 3)
    back = build(name, net.named_parameters(), **settings)
    back.load_state_dict(resumed.state_dict())
    assert_same_continuation(net, back, other, resumed, 8)


def two_groups(net, swapped=False, prefix="", **settings):
    named = [(prefix + key, p) for key, p in net.named_parameters()]
    groups = [{"params": named[:5], "weight_decay": 0.1, "tag": 1}, {"params": named[5:], "lr": 0.01, "tag": 2}]
    tags = [group.pop("tag") for group in groups]
    optimizer = GaLoreAdamW(groups[::-1] if swapped else groups, rank=3, **settings)
    for group, tag in zip(optimizer.param_groups, tags[::-1] if swapped else tags, strict=True):
        group["tag"] = tag  # a user's own
    return optimizer


@pytest.mark.parametrize("prefix", ["", "module.", "_orig_mod.", "module._orig_mod."])
def test_groups_in_another_order_bring_their_hyperparameters(prefix):
    net, other = model(), model()
    optimizer, swapped = two_groups(net), two_groups(other, swapped=True, prefix=prefix)
    train(net, optimizer, 0, 3)
    optimizer.param_groups[1]["lr"] = 0.007
    swapped.load_state_dict(optimizer.state_dict())
    for key in ("lr", "weight_decay", "tag"):
        assert [group[key] for group in swapped.param_groups] == [group[key] for group in optimizer.param_groups][::-1]
    assert swapped.param_groups[1]["param_names"][0] == prefix + "0.weight"
    other.load_state_dict(net.state_dict())
    assert_same_continuation(net, optimizer, other, swapped, 3)


def renamed(groups):
    groups[0]["param_names"][2] = "elsewhere.weight"


def named_twice(groups):
    groups[0]["param_names"][2] = groups[0]["param_names"][1]


def one_too_many(groups):
    groups[1]["param_names"].append("6.weight")
    groups[1]["params"].append(8)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (renamed, "parameters that it lacks: 1.weight; parameters that are not here: elsewhere.weight"),
        (named_twice, "two of its have the name '0.bias'"),
        (one_too_many, "parameters that it lacks: none; parameters that are not here: 6.weight"),
    ],
)
def test_names_that_do_not_match_are_refused(change, message):
    net = model()
    optimizer = two_groups(net)
    train(net, optimizer, 0, 2)
    before, foreign = copy.deepcopy(optimizer.state_dict()), copy.deepcopy(optimizer.state_dict())
    change(foreign["param_groups"])
    with pytest.raises(ValueError, match=message):
        optimizer.load_state_dict(foreign)
    assert_equal(optimizer.state_dict(), before)


def test_groups_that_differ_are_not_made_one():
    net, other = model(), model()
    optimizer = two_groups(net)
    one = GaLoreAdamW(other.named_parameters(), rank=3)
    with pytest.raises(ValueError, match=r"0.weight and 3.bias are in one group .* lr=0.001 and lr=0.01: group"):
        one.load_state_dict(optimizer.state_dict())
    for group in optimizer.param_groups:
        group.update(lr=0.5, weight_decay=0.1, tag=3)
    one.load_state_dict(optimizer.state_dict())
    assert (one.param_groups[0]["lr"], one.param_groups[0]["tag"]) == (0.5, 3)


# Moves.


@contract("a state moves to weights of another dtype")
@every
@pytest.mark.parametrize(("before", "after"), [(torch.float32, torch.bfloat16), (torch.float32, torch.float64)])
def test_a_state_moves_to_weights_of_another_dtype(name, before, after):
    net, other = model(before), model(before).to(after)
    optimizer, moved = build(name, net.parameters()), build(name, other.parameters())
    train(net, optimizer, 0, 3)
    moved.load_state_dict(optimizer.state_dict())
    train(other, moved, 3, 4)
    for p in other.parameters():
        spec = moved._spec(p, moved.param_groups[0])
        found = {key: (tuple(x.shape), x.dtype) for key, x in moved.state[p].items() if key in spec}
        assert found == {key: spec[key] for key in found}
        assert moved.state[p]["step"] == 4


@contract("a state moves to weights of another dtype")
@every
@pytest.mark.parametrize("dtypes", [(torch.float32, torch.bfloat16), (torch.bfloat16, torch.float64)])
def test_the_state_follows_a_model_that_changes_its_dtype(name, dtypes):
    net = model(dtypes[0])
    optimizer = build(name, net.parameters())
    train(net, optimizer, 0, 3)
    copied = copy.deepcopy(net)
    resumed = build(name, copied.parameters())
    resumed.load_state_dict(optimizer.state_dict())
    for each, its in ((net, optimizer), (copied, resumed)):
        train(each.to(dtypes[1]), its, 3, 5)
    assert_equal(weights(net), weights(copied))
    for p in net.parameters():
        spec = optimizer._spec(p, optimizer.param_groups[0])
        found = {key: (tuple(x.shape), x.dtype) for key, x in optimizer.state[p].items() if key in spec}
        assert found == {key: spec[key] for key in found}
        assert optimizer.state[p]["step"] == 5
    before = backward(net, 0).item()
    for _ in range(6):
        backward(net, 0)
        optimizer.step()
    assert backward(net, 0).item() < before


# Settings that change what a state holds.


@pytest.mark.parametrize("setting", ["beta1", "moment_dtype", "error_feedback", "compensation", "transport"])
def test_a_setting_of_a_running_group_that_needs_another_state_gets_it(setting):
    name, value = {
        "beta1": ("GaLoreAdafactor", 0.9),
        "moment_dtype": ("GaLoreAdamW, svd, rotate", "bfloat16"),
        "error_feedback": ("DCTAdamW, every step", "8bit"),
        "compensation": ("AdamW", True),
        "transport": ("GaLoreAdamW, svd, rotate", "reset"),
    }[setting]
    net = model(torch.bfloat16)
    optimizer = build(name, net.parameters())
    train(net, optimizer, 0, 3)
    optimizer.param_groups[0][setting] = value
    train(net, optimizer, 3, 5)
    file = io.BytesIO()
    torch.save(optimizer.state_dict(), file)
    file.seek(0)
    copied = copy.deepcopy(net)
    resumed = build(name, copied.parameters(), **{setting: value})
    resumed.load_state_dict(torch.load(file, weights_only=True))
    assert_same_continuation(net, optimizer, copied, resumed, 5)


def test_a_setting_of_a_running_group_that_no_state_can_follow_is_refused_before_the_step():
    net = model()
    optimizer = build("GaLoreAdamW, svd, rotate", net.parameters())
    train(net, optimizer, 0, 3)
    optimizer.param_groups[0]["rank"] = 5
    before = weights(net), copy.deepcopy(optimizer.state_dict()["state"])
    backward(net, 3)
    with pytest.raises(ValueError, match=r"has shape .* would need .* with the settings that its group has now"):
        optimizer.step()
    assert_equal((weights(net), optimizer.state_dict()["state"]), before)
    optimizer.forget(net.parameters())
    optimizer.step()
    assert optimizer.state[net[3].weight]["exp_avg"].shape == (5, 32)


# What is refused.


def cut(key, new):
    """A change of one parameter's state: an entry is replaced, or left out."""

    def change(checkpoint):
        state = checkpoint["state"][4]  # a matrix
        if new is None:
            del state[key]
        else:
            state[key] = new(state[key]) if callable(new) else new

    return change


def of_group(**values):
    return lambda checkpoint: checkpoint["param_groups"][0].update(values)


def without(*path):
    def change(checkpoint):
        for key in path[:-1]:
            checkpoint = checkpoint[key]
        del checkpoint[path[-1]]

    return change


def set_at(x, *place_and_value):
    x = x.clone()
    x[place_and_value[:-1]] = place_and_value[-1]
    return x


SVD, ROWS, CODES = "GaLoreAdamW, svd, reset", "FRUGAL, runs of rows", "DCTAdamW, 8-bit errors"
DAMAGE = [
    (SVD, without("state"), "'state' must be a dict, found none"),
    (SVD, without("param_groups"), "'param_groups' must be a list, found none"),
    (SVD, lambda c: c.update(state=[]), "'state' must be a dict, found a list"),
    (SVD, lambda c: c.update(param_groups={}), "'param_groups' must be a list, found a dict"),
    (SVD, lambda c: c["param_groups"].append(3), "group 1 must be a dict"),
    (SVD, without("param_groups", 0, "params"), "'params' of group 0 must be a list"),
    (SVD, of_group(params=[[0]]), "'params' of group 0 must be a list"),
    (SVD, of_group(params=[0, 1, 2, 3, 4, 5, 6]), r"its groups hold \[7\] parameters, this optimizer's \[8\]"),
    (SVD, of_group(params=[0, 0, 2, 3, 4, 5, 6, 7]), "list parameter 0 twice"),
    (SVD, of_group(params=[0, 1, 2, 3, 4, 5, 6, 9]), "a state of parameter 7, which is in no group"),
    (SVD, of_group(lr=-1.0), "lr must be a number >= 0"),
    (SVD, of_group(lr=torch.tensor([0.1, 0.2])), "lr must be a number, a string or None"),
    (SVD, of_group(betas=(0.9, 1.5)), "betas must be two numbers"),
    (SVD, of_group(betas=0.9), "betas must be two numbers"),
    (SVD, of_group(eps=float("nan")), "eps must be a number >= 0"),
    (SVD, of_group(weight_decay=torch.tensor(0.1)), "weight_decay must be a number, a string or None"),
    (SVD, of_group(maximize="yes"), "maximize must be True or False"),
    (SVD, of_group(seed=0.5), "seed must be an int"),
    (SVD, of_group(rank=0), "rank must be an int >= 1"),
    (SVD, of_group(rank=[3]), "rank must be an int >= 1"),
    (SVD, of_group(rank=2), r"'exp_avg' of parameter number 0 must have shape \(2, 27\), found \(3, 27\)"),
    (SVD, of_group(projection="dct"), "projection must be one of svd, power, random, got 'dct'"),
    (SVD, of_group(projection={"svd": 1}), "projection must be a number, a string or None, found a dict"),
    (SVD, of_group(amsgrad=True), "amsgrad=True is not supported by GaLoreAdamW"),
    (SVD, of_group(decoupled_weight_decay=False), "weight decay is not decoupled"),
    (SVD, of_group(density=0.5), "density is a hyperparameter of FRUGAL, not of GaLoreAdamW"),
    ("AdamW", of_group(rank=8), "rank is a hyperparameter of .*, not of AdamW"),
    (SVD, lambda c: c["state"].update({4: [1]}), "the state of parameter number 4 must be a dict"),
    (SVD, lambda c: c["state"].update({99: c["state"][4]}), "a state of parameter 99, which is in no group"),
    (SVD, lambda c: c["state"][4].update(exp_avg={"exp_avg": 1}), "'exp_avg' of parameter number 4 .* found a dict"),
    (SVD, cut("step", None), "number 4 has no 'step'"),
    (SVD, cut("step", 2.5), "'step' of parameter number 4 must be a whole number >= 0, found 2.5"),
    (SVD, cut("step", -1), "'step' of parameter number 4 must be a whole number"),
    (SVD, cut("step", 0), "'exp_avg' of parameter number 4 is not zero, which cannot be at its 'step' 0"),
    (SVD, cut("step", float("nan")), "'step' of parameter number 4 must be a whole number"),
    (SVD, cut("step", float("inf")), "'step' of parameter number 4 must be a whole number"),
    (SVD, cut("step", torch.tensor(1j)), "'step' of parameter number 4 must be a whole number"),
    (SVD, cut("step", torch.tensor([3.0, 3.0])), "'step' of parameter number 4 must be a whole number"),
    (SVD, cut("step", "3"), "'step' of parameter number 4 must be a whole number"),
    (SVD, cut("stream", 0.5), "'stream' of parameter number 4 must be an int"),
    (SVD, cut("exp_avg", None), "'exp_avg' of parameter number 4 must have shape .* found none"),
    (SVD, cut("exp_avg", 0.0), "'exp_avg' of parameter number 4 must have shape .* found 0.0"),
    (SVD, cut("exp_avg", lambda x: x[:1]), "'exp_avg' of parameter number 4 must have shape"),
    (SVD, cut("exp_avg", lambda x: x.to_sparse()), "'exp_avg' of parameter number 4 .* found a Tensor"),
    (SVD, cut("exp_avg", lambda x: x.to("meta")), "'exp_avg' of parameter number 4 must have shape"),
    (
        SVD,
        cut("exp_avg_sq", lambda x: x.int()),
        "'exp_avg_sq' of parameter number 4 must be torch.float32",
    ),
    (SVD, cut("basis", lambda x: x.mT), "'basis' of parameter number 4 must have shape"),
    (SVD, cut("basis", lambda x: x + 0j), "'basis' of parameter number 4 must be torch.float32, found torch.complex64"),
    (SVD, cut("refreshes", lambda x: -x), "'refreshes' of parameter number 4 counts, and cannot be -"),
    (SVD, cut("refreshes", lambda x: x.long()), "'refreshes' of parameter number 4 must be torch.int32"),
    (SVD, cut("age", torch.tensor(-5, dtype=torch.int32)), "'age' of parameter number 4 counts"),
    (SVD, cut("max_exp_avg_sq", torch.zeros(3, 4)), "has an entry 'max_exp_avg_sq', which is unknown here"),
    (ROWS, cut("index", lambda x: x.float()), "'index' of parameter number 4 must be torch.int32, found torch.float32"),
    (ROWS, cut("index", lambda x: x.flip(0)), "'index' of parameter number 4 must be sorted"),
    (ROWS, cut("index", lambda x: x * 0 + 1), "'index' of parameter number 4 must be sorted"),
    (ROWS, cut("index", lambda x: set_at(x, -1, 20)), "'index' of parameter number 4 must be .* below 20"),
    (ROWS, cut("index", lambda x: set_at(x, 0, -1)), "'index' of parameter number 4 counts"),
    (CODES, cut("error", lambda x: x.int()), "'error' of parameter number 4 must be torch.int8"),
    (CODES, cut("ages", lambda x: x - 100), "'ages' of parameter number 4 counts"),
    ("FRUGAL, blocks", lambda c: [state.pop("exp_avg", 0) for state in c["state"].values()], "'exp_avg' of parameter"),
    ("FRUGAL, blocks", lambda c: c["state"][0]["age"].zero_(), "has age . and no moments, or the reverse"),
]


@contract("a foreign or damaged checkpoint is refused whole")
@pytest.mark.parametrize(("name", "damage", "message"), DAMAGE, ids=[f"{i}" for i in range(len(DAMAGE))])
def test_a_damaged_checkpoint_is_refused_with_the_reason_before_anything_is_changed(name, damage, message):
    net = model()
    optimizer = build(name, net.parameters())
    train(net, optimizer, 0, 2)
    checkpoint = copy.deepcopy(optimizer.state_dict())
    before, groups = copy.deepcopy(optimizer.state_dict()), [dict(group) for group in optimizer.param_groups]
    damage(checkpoint)
    with pytest.raises(ValueError, match=message):
        optimizer.load_state_dict(checkpoint)
    assert_equal(optimizer.state_dict(), before)
    assert [group.keys() for group in optimizer.param_groups] == [group.keys() for group in groups]
    train(net, optimizer, 2, 3)


NUMBERS = st.one_of(
    st.integers(-(2**40), 2**40),
    st.floats(-1e6, 1e6),
    st.sampled_from([float("inf"), -float("inf"), float("nan"), 1j, None, True]),
)
SHAPES = st.lists(st.integers(0, 4), max_size=3)
DTYPES = st.sampled_from(
    [torch.float32, torch.float64, torch.bfloat16, torch.int8, torch.int32, torch.int64, torch.bool, torch.complex64]
)
TENSORS = st.builds(lambda shape, dtype, x: torch.full(shape, x).to(dtype), SHAPES, DTYPES, st.integers(-2, 40))
THINGS = st.one_of(NUMBERS, TENSORS, st.text(max_size=3), st.builds(dict, step=NUMBERS), st.lists(NUMBERS))
WARPS = st.sampled_from(
    [
        lambda x: -x,
        lambda x: x[:-1],
        lambda x: x.flatten(),
        lambda x: x.double(),
        lambda x: x.to(torch.bfloat16),
        lambda x: x.long(),
        lambda x: x.int() + 1,
        lambda x: x.mT if x.ndim > 1 else x[None],
        lambda x: torch.cat([x, x]),
        lambda x: x.flip(0),
        lambda x: x.new_zeros(()).expand(x.shape),
        lambda x: x * 0,
        lambda x: x + 0j,
        lambda x: x.to_sparse(),
        lambda x: x.to("meta"),
    ]
)


def mutate(data, tree):
    """Changes something somewhere in a nest of dicts and lists."""
    keys = list(tree) if isinstance(tree, dict) else list(range(len(tree)))
    key = data.draw(st.sampled_from(keys), "place")
    value = tree[key]
    deeper = isinstance(value, dict | list) and value
    match data.draw(st.sampled_from(["descend"] * 9 + ["put"] if deeper else ["put", "drop", "add", "warp"]), "how"):
        case "descend":
            mutate(data, value)
        case "drop":
            del tree[key]
        case "add":
            if isinstance(tree, dict):
                tree[data.draw(st.sampled_from(["age", "basis", "rank", "seed", "params", "mine", 0, 50]), "key")] = (
                    data.draw(THINGS, "value")
                )
            else:
                tree.append(copy.deepcopy(value))
        case "warp" if isinstance(value, torch.Tensor):
            with contextlib.suppress(RuntimeError, IndexError):
                tree[key] = data.draw(WARPS, "warp")(value)
        case _:
            tree[key] = data.draw(THINGS, "value")


MUTATED = ["AdamW", SVD, ROWS, CODES, "FRUGAL, blocks", "GradNormLoRP, svd, rotate", "GaLoreAdafactor, beta1"]


@pytest.fixture(scope="module", params=MUTATED)
def trained(request):
    """Networks without and with names in their optimizers, after two steps."""
    pairs = []
    for parameters in (torch.nn.Module.parameters, torch.nn.Module.named_parameters):
        net = model()
        pairs.append((net, build(request.param, parameters(net))))
        train(*pairs[-1], 0, 2)
    return pairs


@given(data=st.data())
def test_whatever_a_checkpoint_has_become_it_is_refused_whole_or_trains_and_saves(trained, data):
    net, optimizer = copy.deepcopy(data.draw(st.sampled_from(trained), "which"))
    checkpoint, before = copy.deepcopy(optimizer.state_dict()), copy.deepcopy(optimizer.state_dict())
    for _ in range(data.draw(st.integers(1, 2), "mutations")):
        mutate(data, checkpoint)
    try:
        optimizer.load_state_dict(checkpoint)
    except ValueError as error:
        assert "does not fit this optimizer: " in str(error)
        assert_equal(optimizer.state_dict(), before)
        return
    train(net, optimizer, 2, 4)
    for _, p, group in optimizer._named():
        state, spec, passing = optimizer.state[p], optimizer._spec(p, group), optimizer._passing(p, group)
        found = {key: (tuple(x.shape), x.dtype) for key, x in state.items() if key not in ("step", "stream")}
        assert spec.keys() - passing <= found.keys()
        assert found == {key: spec[key] for key in found}
        assert state["step"].shape == () and isinstance(state["stream"], int)
    optimizer.load_state_dict(saved(optimizer.state_dict()))


@pytest.mark.parametrize("what", [None, 3, [], "state"])
def test_what_is_no_state_dict_is_a_type_error(what):
    optimizer = AdamW(model().parameters())
    with pytest.raises(TypeError, match="state_dict must be a dict, got"):
        optimizer.load_state_dict(what)


# torch.distributed.checkpoint. Its own deprecations, and that it runs in one process, are warned of.
distributed = pytest.mark.filterwarnings("ignore::UserWarning", "ignore::FutureWarning", "ignore::DeprecationWarning")


def distributed_state(net, optimizer, options):
    return {"model": net.state_dict(), "optimizer": get_optimizer_state_dict(net, optimizer, options=options)}


@contract("`torch.distributed.checkpoint` and `set_optimizer_state_dict`, flattened too, on a fresh optimizer")
@every
@distributed
@pytest.mark.parametrize(("dtype", "flatten"), [(torch.float32, False), (torch.bfloat16, True)])
def test_distributed_checkpoints_continue_on_a_fresh_optimizer(tmp_path, name, dtype, flatten):
    options = StateDictOptions(flatten_optimizer_state_dict=flatten)
    net, other = model(dtype), model(dtype, seed=1)
    optimizer, fresh = build(name, net.parameters()), build(name, other.parameters(), lr=0.5)
    train(net, optimizer, 0, 3)
    dcp.save(distributed_state(net, optimizer, options), checkpoint_id=tmp_path)
    before = weights(other)
    for _ in range(2):  # the second time it has a state, and groups that were loaded
        loaded = distributed_state(other, fresh, options)
        assert_equal(weights(other), before)
        dcp.load(loaded, checkpoint_id=tmp_path)
        before = weights(other)  # in place
        set_optimizer_state_dict(other, fresh, loaded["optimizer"], options=options)
        assert_equal(weights(other), before)
    assert_equal(before, weights(net))
    assert_same_continuation(net, optimizer, other, fresh, 3)
    for p, q in zip(net.parameters(), other.parameters(), strict=True):
        assert_equal(dict(sorted(optimizer.state[p].items())), dict(sorted(fresh.state[q].items())))


@contract("checkpoints go by name, in any order and division into groups")
@few
@distributed
@pytest.mark.parametrize("flatten", [False, True])
def test_distributed_checkpoints_go_by_name_whatever_the_order(name, flatten):
    options = StateDictOptions(flatten_optimizer_state_dict=flatten)
    net, other = model(), model(seed=1)
    optimizer, fresh = build(name, net.named_parameters()), build(name, reversed(list(other.named_parameters())))
    train(net, optimizer, 0, 3)
    set_optimizer_state_dict(other, fresh, get_optimizer_state_dict(net, optimizer, options=options), options=options)
    assert fresh.param_groups[0]["param_names"] == [key for key, _ in other.named_parameters()][::-1]
    for p, q in zip(net.parameters(), other.parameters(), strict=True):
        assert_equal(dict(sorted(optimizer.state[p].items())), dict(sorted(fresh.state[q].items())))


@distributed
@pytest.mark.parametrize("what", ["blocks", "sampler"])
def test_a_distributed_checkpoint_of_states_that_come_and_go_loads_by_way_of_a_file(tmp_path, what):
    """In place torch looks for the states that a fresh optimizer has, and finds that others were saved."""

    gap = {"update_proj_gap": 2}

    def start(seed):
        net = torch.nn.Sequential(*(torch.nn.Linear(8, 8) for _ in range(5)))
        net.load_state_dict({key: x + 0.1 * seed for key, x in net.state_dict().items()})
        if what == "sampler":
            optimizer = GaLoreAdamW(net.parameters(), lr=0.02, rank=3)
            return net, optimizer, LISA(net, optimizer, list(net), active=1, interval=2, seed=3)
        return net, FRUGAL(net.parameters(), lr=0.02, density=0.2, projection="blocks", order="mirror", **gap), None

    def run(net, optimizer, sampler, steps):
        for i in steps:
            net.zero_grad()
            net(torch.randn(4, 8, generator=torch.Generator().manual_seed(i))).square().sum().backward()
            optimizer.step()
            if sampler:
                sampler.step()

    net, optimizer, sampler = start(0)
    run(net, optimizer, sampler, range(5))
    dcp.save(distributed_state(net, optimizer, None), checkpoint_id=tmp_path / "distributed")
    other, fresh, second = start(1)
    with pytest.raises(CheckpointException, match=r"Missing key in checkpoint state_dict: optimizer\.state\."):
        dcp.load(distributed_state(other, fresh, None), checkpoint_id=tmp_path / "distributed")

    other, fresh, second = start(1)
    dcp_to_torch_save(tmp_path / "distributed", tmp_path / "file.pt")
    whole = torch.load(tmp_path / "file.pt", weights_only=True)
    other.load_state_dict(whole["model"])
    if second:
        second.load_state_dict(sampler.state_dict())
    set_optimizer_state_dict(other, fresh, whole["optimizer"])
    assert state_bytes(fresh) == state_bytes(optimizer)
    run(net, optimizer, sampler, range(5, 9))
    run(other, fresh, second, range(5, 9))
    assert_equal(weights(net), weights(other))


@contract("a foreign or damaged checkpoint is refused whole")
@few
def test_a_state_without_a_step_is_refused(name):
    net = model()
    optimizer = build(name, net.parameters())
    train(net, optimizer, 0, 2)
    damaged, before = copy.deepcopy(optimizer.state_dict()), copy.deepcopy(optimizer.state_dict())
    del damaged["state"][2]["step"]
    with pytest.raises(ValueError, match="number 2 has no 'step'"):
        optimizer.load_state_dict(damaged)
    assert_equal(optimizer.state_dict(), before)
