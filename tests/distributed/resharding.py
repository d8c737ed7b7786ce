"""What the processes of the checkpoint tests do: they save what they train, and go on with it."""

import copy
import io
from functools import cache

import torch
import torch.distributed as dist
import torch.distributed.checkpoint as dcp
from torch.distributed.checkpoint.state_dict import (
    StateDictOptions,
    get_model_state_dict,
    get_optimizer_state_dict,
    set_model_state_dict,
    set_optimizer_state_dict,
)

from cases import assert_equal, build
from fully_sharded import backward, by_rows, network, whole
from slimstate.optim import state_bytes

STEPS = 5  # before a checkpoint, and after it


def divided(name, seed=0, dtype=torch.float64, divide=by_rows):
    """A network of these processes, its optimizer, and the part of a batch that falls to this one; plain where there is
    one process."""
    net = network(dtype, seed)
    where = divide(net) if dist.get_world_size() > 1 else (0, 1)
    return net, build(name, net.named_parameters()), where


def train(net, optimizer, where, start, stop=None):
    for i in range(start, start + STEPS if stop is None else stop):
        backward(net, i, *where)
        optimizer.step()


def weights(net):
    return [whole(p).clone() for p in net.parameters()]


def state_of(net, optimizer, options=None):
    return {
        "model": get_model_state_dict(net, options=options),
        "optimizer": get_optimizer_state_dict(net, optimizer, options=options),
    }


@cache
def beside():
    """A group for what is saved while the training's own is in use."""
    return dist.new_group(backend="gloo")


def saved(name, path, later):
    """Trains, saves, and goes on: the weights in the end."""
    net, optimizer, where = divided(name)
    train(net, optimizer, where, 0)
    if later:
        told = dcp.async_save(state_of(net, optimizer), checkpoint_id=path, process_group=beside())
        train(net, optimizer, where, STEPS)
        told.result()
    else:
        dcp.save(state_of(net, optimizer), checkpoint_id=path)
        train(net, optimizer, where, STEPS)
    return weights(net)


def resumed(name, path):
    """The weights in the end, of those who load what others saved."""
    net, optimizer, where = divided(name, seed=1)
    loaded = state_of(net, optimizer)
    dcp.load(loaded, checkpoint_id=path)
    set_model_state_dict(net, loaded["model"])
    set_optimizer_state_dict(net, optimizer, loaded["optimizer"])
    train(net, optimizer, where, STEPS)
    return weights(net)


def through_one_file(name):
    """A whole state dict on process 0, and back to all: the weights of those who went on and of those who loaded."""
    net, optimizer, where = divided(name)
    train(net, optimizer, where, 0)
    full = state_of(net, optimizer, StateDictOptions(full_state_dict=True, cpu_offload=True))
    full = copy.deepcopy(full)  # what is on the CPU already, such as counters, is the optimizer's own
    rank = dist.get_rank()
    assert bool(full["optimizer"]) == (rank == 0)
    train(net, optimizer, where, STEPS)

    again, second, where = divided(name, seed=1)
    options = StateDictOptions(full_state_dict=True, broadcast_from_rank0=True)
    given = copy.deepcopy(full)  # torch writes into it
    set_model_state_dict(again, given["model"], options=options)
    set_optimizer_state_dict(again, second, given["optimizer"], options=options)
    train(again, second, where, STEPS)
    ends = [weights(net), weights(again)]

    if rank == 0:  # and into a network of one process
        alone = network(seed=1)
        third = build(name, alone.named_parameters())
        alone.load_state_dict(full["model"])
        set_optimizer_state_dict(alone, third, full["optimizer"])
        train(alone, third, (0, 1), STEPS)
        ends.append(weights(alone))
    return ends


def through_own_files(name):
    """Each process saves what it holds by torch.save: the weights of those who went on and of those who loaded."""
    net, optimizer, where = divided(name)
    train(net, optimizer, where, 0)
    file = io.BytesIO()
    torch.save({"model": net.state_dict(), "optimizer": optimizer.state_dict()}, file)
    train(net, optimizer, where, STEPS)
    again, second, where = divided(name, seed=1)
    file.seek(0)
    loaded = torch.load(file, weights_only=True)
    again.load_state_dict(loaded["model"])
    second.load_state_dict(loaded["optimizer"])
    for p, q in zip(net.parameters(), again.parameters(), strict=True):
        for key, value in optimizer.state[p].items():
            assert getattr(value, "placements", None) == getattr(second.state[q][key], "placements", None), key
    train(again, second, where, STEPS)
    return weights(net), weights(again)


def held(name):
    """The bytes of state here, and those of the whole: of what is divided and of what everyone has."""
    net, optimizer, where = divided(name)
    train(net, optimizer, where, 0, 1)
    alone = network()
    reference = build(name, alone.named_parameters())
    backward(alone, 0)
    reference.step()
    shared = 0
    for p, q in zip(net.parameters(), alone.parameters(), strict=True):
        here = {key: x for key, x in optimizer.state[p].items() if isinstance(x, torch.Tensor)}
        for key, x in here.items():
            assert x.shape == reference.state[q][key].shape, key
            if all(placement.is_replicate() for placement in getattr(x, "placements", ())):
                shared += x.numel() * x.itemsize
    state = optimizer.state[net.layers[0].up.weight]
    up = state["exp_avg" if "exp_avg" in state else "momentum_buffer"]  # its rows, not compressed, are divided
    assert 2 * up.to_local().numel() == up.numel()
    assert_equal(state_bytes(optimizer), state_bytes(optimizer, net.parameters()))
    return (
        state_bytes(optimizer),
        shared,
        state_bytes(reference),
        optimizer.report() if hasattr(optimizer, "report") else None,
    )
