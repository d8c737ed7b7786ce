"""Every optimizer goes on from its checkpoints bit for bit, and refuses whole what is not one of them."""

import copy
import io
import os
import subprocess
import sys
import warnings
from pathlib import Path

import pytest
import torch
from torch.distributed.checkpoint.state_dict import (
    StateDictOptions,
    get_optimizer_state_dict,
    set_optimizer_state_dict,
)

from cases import (
    CASES,
    assert_equal,
    assert_same_continuation,
    build,
    every,
    few,
    model,
    moments_of,
    train,
    weights,
)
from slimstate.optim import AdamW, GaLoreAdamW, state_bytes


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


@every
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16, torch.float16])
def test_saved_and_resumed_at_every_step_it_trains_bit_for_bit_as_if_never_stopped(name, dtype):
    net, other = model(dtype), model(dtype)
    optimizer, resumed = build(name, net.parameters()), build(name, other.parameters())
    for i in range(6):
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
        assert {dtypes[key] for key in moments_of(state)} <= {moments}
        assert dtypes["step"] == torch.float32
        assert dtypes.get("basis", torch.float32) == torch.float32
        assert {dtypes.get(key, torch.int32) for key in ("index", "refreshes", "age")} == {torch.int32}
    for state in resumed.state.values():
        for x in state.values():
            if isinstance(x, torch.Tensor):
                x.zero_()
    assert_equal(given, saved)


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


def test_a_checkpoint_of_torchs_adamw_continues_here():
    net = model()
    theirs = torch.optim.AdamW(net.parameters(), lr=0.02, fused=True)
    train(net, theirs, 0, 3)
    other = copy.deepcopy(net)
    ours = AdamW(other.parameters())
    ours.load_state_dict(theirs.state_dict())
    assert_same_continuation(net, theirs, other, ours, 3)


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


@every
@pytest.mark.parametrize("flatten", [False, True])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_distributed_checkpoints_continue_on_a_fresh_optimizer(name, dtype, flatten):
    options = StateDictOptions(flatten_optimizer_state_dict=flatten)
    net, other = model(dtype), model(dtype, seed=1)
    optimizer, fresh = build(name, net.parameters()), build(name, other.parameters())
    train(net, optimizer, 0, 3)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # torch's own deprecations
        saved = copy.deepcopy(get_optimizer_state_dict(net, optimizer, options=options))
        before = weights(other)
        for _ in range(2):  # the second time it has a state, and groups that were loaded
            set_optimizer_state_dict(other, fresh, saved, options=options)
    assert_equal(weights(other), before)
    other.load_state_dict(net.state_dict())
    assert_same_continuation(net, optimizer, other, fresh, 3)
    for p, q in zip(net.parameters(), other.parameters(), strict=True):
        assert_equal(dict(sorted(optimizer.state[p].items())), dict(sorted(fresh.state[q].items())))


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
