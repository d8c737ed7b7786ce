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


def assert_memory_formats_agree(kind, shape, dtype):
    """A convolution trains as the matrix of its channels, and alike in any memory format."""
    grads = gradients(shape, 6, dtype)
    common = dict(lr=0.1, rank=3, update_proj_gap=2)
    conv = trajectory(kind, parameter(shape, dtype), grads, **common)
    matrix = torch.nn.Parameter(parameter(shape, dtype).detach().flatten(1))
    flat = trajectory(kind, matrix, [g.flatten(1) for g in grads], **common)
    last = torch.nn.Parameter(parameter(shape, dtype).detach().to(memory_format=torch.channels_last))
    formatted = trajectory(kind, last, [g.to(memory_format=torch.channels_last) for g in grads], **common)
    assert last.is_contiguous(memory_format=torch.channels_last)
    tolerance = dict(rtol=1e-9, atol=1e-9) if dtype == torch.float64 else dict(rtol=2e-2, atol=2e-3)
    torch.testing.assert_close(conv.flatten(2), flat, **tolerance)
    torch.testing.assert_close(formatted, conv, **tolerance)
