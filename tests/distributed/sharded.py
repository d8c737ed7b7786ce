"""What the processes of the tests do: the same training, divided and whole."""

import torch
from torch.distributed.tensor import Shard, distribute_tensor, init_device_mesh

from cases import build
from training import gradients

SHAPES = [(12, 20), (20, 12), (13, 9), (9, 13), (16, 16), (3, 8), (7,), (6, 4, 3, 3)]


def tensors(shapes, seed, dtype):
    generator = torch.Generator().manual_seed(seed)
    return [torch.randn(shape, generator=generator, dtype=torch.float64).to(dtype) for shape in shapes]


def named(params):
    return [(f"layer.{i}", p) for i, p in enumerate(params)]


def histories(shapes, steps, dtype):
    """The gradients of each step: of matrices such that a subspace can follow them, and that no tie is in them."""
    each = [
        gradients(shape, steps, dtype, seed=i) if len(shape) > 1 else tensors([shape] * steps, i, dtype)
        for i, shape in enumerate(shapes)
    ]
    return zip(*each, strict=True)


def divided(x, mesh, dim):
    return distribute_tensor(x, mesh, [Shard(dim)], src_data_rank=None)


def equal_to_one_process(name, dim, dtype, steps=50, shapes=SHAPES, **settings):
    """After training on gradients that are set by hand, the largest difference of weights, over the distance moved and
    over their own length."""
    mesh = init_device_mesh("cpu", (torch.distributed.get_world_size(),))
    start = tensors(shapes, 0, dtype)
    whole = [torch.nn.Parameter(x.clone()) for x in start]
    dims = [min(dim, x.ndim - 1) for x in start]
    parts = [torch.nn.Parameter(divided(x, mesh, d)) for x, d in zip(start, dims, strict=True)]
    optimizers = [build(name, named(ps), **settings) for ps in (whole, parts)]
    for grads in histories(shapes, steps, dtype):
        for p, q, d, g in zip(whole, parts, dims, grads, strict=True):
            p.grad, q.grad = g.clone(), divided(g, mesh, d)
        for optimizer in optimizers:
            optimizer.step()
    of_distance = of_length = 0.0
    for x, p, q in zip(start, whole, parts, strict=True):
        full = q.full_tensor()
        difference = (full - p).norm()
        of_distance = max(of_distance, (difference / (p - x).norm()).item())
        of_length = max(of_length, (difference / p.norm()).item())
    return of_distance, of_length
