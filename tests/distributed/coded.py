"""What the processes do in the tests of 8-bit moments: gradients are set by hand, the same for any number of them."""

import torch
import torch.distributed as dist
import torch.distributed.checkpoint as dcp
from torch import nn
from torch.distributed.checkpoint.state_dict import get_optimizer_state_dict, set_optimizer_state_dict
from torch.distributed.tensor import init_device_mesh

from cases import build
from fully_sharded import told, whole
from sharded import divided, histories, tensors
from slimstate.optim import FRUGAL, AdamW, AdamW8bit

SHAPES = [(13, 300), (300, 12), (12, 20), (70,)]  # rows that nobody divides evenly, and a vector without codes
STEPS = 4


class Network(nn.Module):
    """Weights that nobody calls."""

    def __init__(self, alone):
        super().__init__()
        mesh = None if alone else init_device_mesh("cpu", (dist.get_world_size(),))
        self.weights = nn.ParameterList(
            nn.Parameter(x if mesh is None else divided(x, mesh, 0)) for x in tensors(SHAPES, 0, torch.float64)
        )


def train(net, optimizer, start, stop):
    for i, grads in enumerate(histories(SHAPES, 2 * STEPS, torch.float64)):
        if start <= i < stop:
            for p, g in zip(net.weights, grads, strict=True):
                p.grad = divided(g, p.device_mesh, 0) if hasattr(p, "placements") else g.clone()
            optimizer.step()


def differences(net, optimizer, other, reference):
    """What is not the same in weights and states: codes and scales bit for bit, and what is as wide as the arithmetic
    but for the last bits, which torch's fused kernel rounds otherwise at the end of a tensor."""
    found, coded = [], 0
    for p, q in zip(net.weights, other.weights, strict=True):
        here, there = optimizer.state[p] | {"weight": p}, reference.state[q] | {"weight": q}
        assert here.keys() == there.keys()
        for key, y in there.items():
            if not isinstance(y, torch.Tensor):
                continue
            x = whole(here[key])
            coded += y.dtype in (torch.uint8, torch.int8)
            if not (torch.allclose(x, y, rtol=1e-12, atol=1e-12) if y.dtype == torch.float64 else torch.equal(x, y)):
                found.append((tuple(q.shape), key))
    assert coded >= 3
    return found


def saved(name, path):
    net = Network(alone=False)
    optimizer = build(name, net.named_parameters())
    train(net, optimizer, 0, STEPS)
    dcp.save({"optimizer": get_optimizer_state_dict(net, optimizer)}, checkpoint_id=path)


def resumed(name, path):
    """What differs from one process that was never stopped: when all is loaded, and in the end."""
    alone = dist.get_world_size() == 1
    net, other = Network(alone), Network(alone=True)
    optimizer, reference = build(name, net.named_parameters()), build(name, other.named_parameters())
    train(other, reference, 0, STEPS)
    loaded = {"optimizer": get_optimizer_state_dict(net, optimizer)}
    dcp.load(loaded, checkpoint_id=path)
    with torch.no_grad():
        for p, q in zip(net.weights, other.weights, strict=True):
            p.copy_(q if alone else divided(q.detach(), p.device_mesh, 0))
    set_optimizer_state_dict(net, optimizer, loaded["optimizer"])
    at_first = differences(net, optimizer, other, reference)
    train(net, optimizer, STEPS, 2 * STEPS)
    train(other, reference, STEPS, 2 * STEPS)
    return at_first, differences(net, optimizer, other, reference)


def refused():
    """What is said about blocks that processes cut: at construction, by a later group, and by the first step."""
    mesh = init_device_mesh("cpu", (dist.get_world_size(),))
    x = torch.randn(64, 300)
    p, q, small = (nn.Parameter(divided(y, mesh, 1)) for y in (x, x, x[:3, :20]))
    q.grad = torch.ones_like(q)
    later = AdamW([q])
    later.param_groups[0]["moment_dtype"] = "8bit"
    fine = AdamW8bit([small])
    FRUGAL([{"params": [p], "density": 0.25, "projection": "rows"}], moment_dtype="8bit")
    return told(AdamW8bit, [p]), told(fine.add_param_group, {"params": [p]}), told(later.step), len(later.state[q])
