"""What the tests of several optimizers train: matrices, gradients that a subspace can follow, and steps."""

import math

import torch


def gradients(shape, steps, dtype=torch.float32, seed=0):
    """Gradients whose singular values are well apart, and whose subspaces turn slowly."""
    generator = torch.Generator().manual_seed(seed)
    d, k = shape[0], math.prod(shape[1:])
    side = min(d, k)
    u, v = (torch.linalg.qr(torch.randn(n, side, generator=generator, dtype=torch.float64)).Q for n in (d, k))
    grads = []
    for _ in range(steps):
        sizes = 0.7 ** torch.arange(side) * (1 + 0.1 * torch.rand(side, generator=generator))
        noise = 0.02 * torch.randn(d, k, generator=generator, dtype=torch.float64) / math.sqrt(d + k)
        grads.append((u * sizes @ v.mT + noise).reshape(shape).to(dtype))
    return grads


def parameter(shape, dtype=torch.float32, seed=7):
    generator = torch.Generator().manual_seed(seed)
    return torch.nn.Parameter(torch.randn(shape, generator=generator, dtype=torch.float64).to(dtype))


def run(optimizer, params, steps):
    """Takes each list of gradients (one a parameter; None for no gradient) to a step."""
    for grads in steps:
        for p, g in zip(params, grads, strict=True):
            p.grad = None if g is None else g.clone()
        optimizer.step()


def trajectory(kind, p, grads, **settings):
    """The weight after each step of an optimizer of this kind."""
    optimizer, weights = kind([p], **settings), []
    for g in grads:
        run(optimizer, [p], [[g]])
        weights.append(p.detach().clone())
    return torch.stack(weights)
