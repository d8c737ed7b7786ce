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


def with_smaller_bases(forms, shapes, batch_dims=0):
    """The weights of one process and of divided ones, whose bases are kept in one form after another."""
    mesh = init_device_mesh("cpu", (torch.distributed.get_world_size(),))
    start = tensors(shapes, 0, torch.float64)
    whole = [torch.nn.Parameter(x.clone()) for x in start]
    parts = [torch.nn.Parameter(divided(x, mesh, 0)) for x in start]
    optimizers = [build("GaLoreAdamW, power, rotate", named(ps), batch_dims=batch_dims) for ps in (whole, parts)]
    for grads, form in zip(histories(shapes, len(forms), torch.float64), forms, strict=True):
        for p, q, g in zip(whole, parts, grads, strict=True):
            p.grad, q.grad = g.clone(), divided(g, mesh, 0)
        for optimizer in optimizers:
            optimizer.param_groups[0]["basis_dtype"] = form
            optimizer.step()
    return max(
        ((q.full_tensor() - p).norm() / (p - x).norm()).item() for x, p, q in zip(start, whole, parts, strict=True)
    )
