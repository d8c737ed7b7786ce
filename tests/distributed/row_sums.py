"""What the processes of `test_row_sums` do."""

import torch
from torch.distributed.tensor import Shard, distribute_tensor, init_device_mesh
from traffic import Traffic

from cases import build
from sharded import histories, named, tensors


def mesh_of(dims):
    size = torch.distributed.get_world_size()
    return init_device_mesh("cpu", (size,) if len(dims) == 1 else (2, size // 2))


def placed(x, mesh, dims):
    """Divided along these dimensions, one for each of the mesh; along its last one where it has fewer."""
    return distribute_tensor(x, mesh, [Shard(min(dim, x.ndim - 1)) for dim in dims], src_data_rank=None)


def differences(name, dims, dtype, steps, shapes, like="any", compiler=None, **settings):
    """After training parts and the whole on the same gradients: the largest difference of weights over the distance
    moved, that over the weights' norm, and that of what is kept, over its norm.

    `like` says what gradients are like: "any", or orthogonal to the weights by "rows", as a whole ("layer"), or by rows
    but for the last one ("most rows").
    """
    mesh, start = mesh_of(dims), tensors(shapes, 0, dtype)
    whole = [torch.nn.Parameter(x.clone()) for x in start]
    parts = [torch.nn.Parameter(placed(x, mesh, dims)) for x in start]
    optimizers = [build(name, named(params), **settings) for params in (whole, parts)]
    takes = [o.step if compiler is None else torch.compile(o.step, backend=compiler) for o in optimizers]
    for grads in histories(shapes, steps, dtype):
        for p, q, g in zip(whole, parts, grads, strict=True):
            g = turned(g, p.detach(), like)
            p.grad, q.grad = g.clone(), placed(g, mesh, dims)
        for take in takes:
            take()
    moved, size, kept = 0.0, 0.0, 0.0
    for x, p, q in zip(start, whole, parts, strict=True):
        difference = (q.full_tensor() - p).norm()
        moved = max(moved, (difference / (p - x).norm()).item())
        size = max(size, (difference / p.norm()).item())
        states = [optimizer.state[y] for optimizer, y in zip(optimizers, (p, q), strict=True)]
        assert states[0].keys() == states[1].keys()
        for key in states[0].keys() - {"stream"}:
            a, b = (s[key].full_tensor() if hasattr(s[key], "placements") else s[key] for s in states)
            assert a.shape == b.shape
            kept = max(kept, ((a.double() - b.double()).norm() / a.double().norm().clamp(min=1e-300)).item())
    return moved, size, kept


def turned(g, w, side):
    if side == "any" or g.ndim < 2:
        return g
    rows, weights = g.flatten(1).clone(), w.flatten(1)
    if side == "layer":
        rows -= weights * (rows * weights).sum() / weights.square().sum()
    else:
        some = len(rows) if side == "rows" else len(rows) - 1
        rows -= weights * (rows * weights).sum(1, keepdim=True) / weights.square().sum(1, keepdim=True)
        rows[some:] += weights[some:]
    return rows.view(g.shape)


def messages(name, dims, shapes, dense=(), **settings):
    """(operator, bytes) of each message of the third step, in which nothing is refreshed."""
    mesh = mesh_of(dims)
    params = [torch.nn.Parameter(placed(x, mesh, dims)) for x in tensors([*shapes, *dense], 0, torch.float32)]
    optimizer = build(name, params[: len(shapes)], **settings)
    if dense:
        optimizer.add_param_group({"params": params[len(shapes) :], "rank": None})
    for grads in histories([*shapes, *dense], 3, torch.float32):
        for p, g in zip(params, grads, strict=True):
            p.grad = placed(g, mesh, dims)
        with Traffic() as traffic:
            optimizer.step()
    return traffic.messages


def run_differences(args, settings):
    return differences(*args, **settings)


def run_messages(args, settings):
    return messages(*args, **settings)


def fires(name, side, settings):
    """Which view fires in one step on a whole weight, as its decay shows."""
    decays = []
    for layer_view in (False, True):
        (w,) = tensors([(12, 20)], 0, torch.float64)
        p = torch.nn.Parameter(w.clone())
        optimizer = build(name, [p], layer_view=layer_view, wd_ratio=0.0, **settings)
        ((g,),) = histories([(12, 20)], 1, torch.float64)
        p.grad = turned(g, w, side)
        optimizer.step()
        still = build(name, [q := torch.nn.Parameter(w.clone())], layer_view=layer_view, **settings | {"delta": 0.0})
        q.grad = p.grad
        still.step()
        decays.append(not torch.allclose(p, q))
    return {(True, True): "channel", (False, True): "layer", (False, False): "none"}[tuple(decays)]
