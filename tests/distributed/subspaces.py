"""What the processes of the tests of subspaces do, beside the training of `sharded`."""

import torch
from torch.distributed.tensor import init_device_mesh
from torch.distributed.tensor.debug import CommDebugMode

from cases import build
from sharded import divided, histories, named, tensors


def training(name, dim, shapes, steps, **settings):
    """An optimizer of divided parameters; each item is one step, with its gradients set."""
    mesh = init_device_mesh("cpu", (torch.distributed.get_world_size(),))
    params = [torch.nn.Parameter(divided(x, mesh, dim)) for x in tensors(shapes, 0, torch.float64)]
    optimizer = build(name, named(params), **settings)

    def step(grads):
        for p, g in zip(params, grads, strict=True):
            p.grad = divided(g, mesh, dim)
        optimizer.step()

    return optimizer, params, ((step, grads) for grads in histories(shapes, steps, torch.float64))


def messages(name, dim, shapes, steps, settings):
    """How many collectives each step takes."""
    counts = []
    for step, grads in training(name, dim, shapes, steps, **settings)[2]:
        with CommDebugMode() as mode:
            step(grads)
        counts.append(mode.get_total_counts())
    return counts


def kept(name, dim, shapes, steps, settings, keys):
    """What this process keeps of these parts of the state of each matrix."""
    optimizer, params, each = training(name, dim, shapes, steps, **settings)
    for step, grads in each:
        step(grads)
    return [{key: optimizer.state[p][key].to_local() for key in keys} for p in params]


def refusal(name, dim, settings):
    """What a group says to a parameter that is divided along `dim`, and how many groups there are then."""
    mesh = init_device_mesh("cpu", (torch.distributed.get_world_size(),))
    optimizer = build(name, [torch.nn.Parameter(torch.zeros(6, 8))], **settings)
    p = torch.nn.Parameter(divided(torch.zeros(6, 8), mesh, dim))
    try:
        optimizer.add_param_group({"params": [p], **({"rank": 3} if "DCT" in name else {"density": 0.3})})
    except ValueError as error:
        return str(error), len(optimizer.param_groups)
    return None
