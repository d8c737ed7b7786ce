"""What the processes do in the tests of placements and shared refreshes."""

import copy

import torch
import torch.distributed as dist
from torch import nn
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor import init_device_mesh
from torch.utils._python_dispatch import TorchDispatchMode

from sharded import divided, histories, named, tensors
from slimstate.optim import GaLoreAdamW, param_groups, shard_placement, share_refreshes


class Calls(TorchDispatchMode):
    """The names of the operators that were called."""

    def __init__(self):
        super().__init__()
        self.names = []

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        self.names.append(function.name())
        return function(*args, **(kwargs or {}))

    @property
    def sent(self):
        return [name for name in self.names if name.startswith(("c10d::", "_c10d_functional::"))]

    @property
    def decompositions(self):
        return sum("eigh" in name or "svd" in name for name in self.names)


class Block(nn.Module):
    def __init__(self):
        super().__init__()
        self.up, self.down, self.square = nn.Linear(32, 48), nn.Linear(48, 32), nn.Linear(32, 32)

    def forward(self, x):
        return x + self.square(self.down(torch.relu(self.up(x))))


def sent_by_steps():
    """The collectives of a step between refreshes, of one that refreshes, and of one under FSDP2's own placement."""
    between, refreshing, default = _sent(shard_placement, 2), _sent(shard_placement, 1), _sent(None, 2)
    return between, refreshing, default


def _sent(placement, which):
    torch.manual_seed(0)
    model = nn.Sequential(Block(), Block())
    for block in model:
        fully_shard(block, shard_placement_fn=placement)
    fully_shard(model, shard_placement_fn=placement)
    optimizer = GaLoreAdamW(param_groups(model, update_proj_gap=100), lr=0.01)
    for _ in range(which):
        model(torch.randn(8, 32)).square().mean().backward()
        with Calls() as calls:
            optimizer.step()
        optimizer.zero_grad()
    return calls.sent


def sent_by_stacks():
    """The collectives of the second step of experts that are divided by matrices, some processes having none."""
    mesh = init_device_mesh("cpu", (dist.get_world_size(),))
    p = nn.Parameter(divided(torch.randn(3, 8, 12), mesh, 0))
    optimizer = GaLoreAdamW([{"params": [p], "batch_dims": 1, "rank": 2}], lr=0.01)
    for _ in range(2):
        p.grad = divided(torch.randn(3, 8, 12), mesh, 0)
        with Calls() as calls:
            optimizer.step()
    return calls.sent


def shared_refreshes():
    """How far replicas that share refreshes are from those that do not, and how many each of them decomposed."""
    shapes, decomposed, weights = [(12, 20), (20, 12), (16, 16), (9, 13), (7,)], {}, {}
    for kind in ("alone", "shared"):
        params = [nn.Parameter(x) for x in tensors(shapes, 0, torch.float32)]
        optimizer = GaLoreAdamW(named(params), lr=0.01, update_proj_gap=4)
        if kind == "shared":
            share_refreshes(optimizer)
        for step, grads in enumerate(histories(shapes, 20, torch.float32)):
            for p, g in zip(params, grads, strict=True):
                p.grad = g.clone()
            with Calls() as calls:
                optimizer.step()
            if step == 0:
                decomposed[kind] = calls.decompositions
        weights[kind] = params
    worst = max((a - b).abs().max().item() for a, b in zip(*weights.values(), strict=True))
    return worst, decomposed


def copy_refreshes_alone():
    params = [nn.Parameter(x) for x in tensors([(8, 12)], 0, torch.float32)]
    optimizer = GaLoreAdamW(named(params))
    share_refreshes(optimizer)
    alone = copy.deepcopy(optimizer)
    (p,) = alone.param_groups[0]["params"]
    p.grad = torch.randn(8, 12)
    with Calls() as calls:
        alone.step()
    return calls.sent == []
