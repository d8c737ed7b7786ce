"""Each optimizer reaches the minimum that its theory promises on random convex problems; a new one is a row."""

import math

import pytest
import torch
from hypothesis import assume, given, settings
from hypothesis import strategies as st

from slimstate.optim import FRUGAL, SGDP, AdamP, AdamW, DCTAdamW, GaLoreAdafactor, GaLoreAdamW, GradNormLoRP

STEPS = 200
SHAPE = (6, 9)
SMALL = {"rank": 2, "update_proj_gap": 3}

# name -> (class, settings, learning rate)
CASES = {
    "AdamW": (AdamW, {}, 0.1),
    "AdamP": (AdamP, {"weight_decay": 0.0}, 0.1),
    "SGDP": (SGDP, {"momentum": 0.5, "nesterov": True, "weight_decay": 0.0}, 0.15),
    "FRUGAL, columns": (FRUGAL, {"density": 0.3, "update_proj_gap": 10}, 0.1),
    "FRUGAL, entries, lion": (
        FRUGAL,
        {"density": 0.3, "update_proj_gap": 10, "projection": "entries", "inner": "lion"},
        0.05,
    ),
    "FRUGAL, svd, sgdm, sgd": (
        FRUGAL,
        {"rank": 2, "update_proj_gap": 10, "projection": "svd", "inner": "sgdm", "outer": "sgd", "betas": (0.5, 0.9)},
        0.3,
    ),
    "FRUGAL, density 0": (FRUGAL, {"density": 0}, 0.1),
    "GaLoreAdamW, svd": (GaLoreAdamW, SMALL, 0.3),
    "GaLoreAdamW, power": (GaLoreAdamW, SMALL | {"projection": "power"}, 0.3),
    "GaLoreAdamW, random": (GaLoreAdamW, SMALL | {"projection": "random", "transport": "reset"}, 0.3),
    "GaLoreAdafactor": (GaLoreAdafactor, SMALL | {"scale_parameter": False}, 0.3),
    "GaLoreAdafactor, beta1": (GaLoreAdafactor, SMALL | {"scale_parameter": False, "beta1": 0.5}, 0.3),
    "GradNormLoRP": (GradNormLoRP, SMALL, 0.2),
    "DCTAdamW": (DCTAdamW, {"rank": 2}, 0.3),
    "DCTAdamW, 8-bit errors, rank 1": (DCTAdamW, {"rank": 1, "error_feedback": "8bit", "betas": (0.5, 0.9)}, 0.2),
    "DCTAdamW, hadamard": (DCTAdamW, {"rank": 2, "projection": "hadamard"}, 0.3),
    "GaLoreAdamW, full rank": (GaLoreAdamW, {"rank": 6, "update_proj_gap": 1000}, 0.3),
}
every = pytest.mark.parametrize("name", CASES)
few = settings(max_examples=settings().max_examples // 10)  # each is a whole training run


def minimise(name, loss, w, **settings):
    kind, own, lr = CASES[name]
    own = {"scale": 1.0} | own if "scale" in kind([w]).param_groups[0] else own
    optimizer = kind([w], lr=lr, **{"weight_decay": 0.0, **own, **settings})
    for t in range(STEPS):
        optimizer.param_groups[0]["lr"] = lr * (1 + math.cos(math.pi * t / STEPS)) / 2
        optimizer.zero_grad()
        value = loss(w)
        value.backward()
        optimizer.step()
    return loss(w).item()


def quadratic(seed):
    """<X, H X K> / 2 for X = W - W*, with condition numbers of at most 4 on either side."""
    generator = torch.Generator().manual_seed(seed)

    def definite(n):
        q = torch.linalg.qr(torch.randn(n, n, generator=generator, dtype=torch.float64)).Q
        return q @ torch.diag(0.5 + 1.5 * torch.rand(n, generator=generator, dtype=torch.float64)) @ q.mT

    h, k = definite(SHAPE[0]), definite(SHAPE[1])
    target = torch.randn(SHAPE, generator=generator, dtype=torch.float64)
    return lambda w: ((w - target) * (h @ (w - target) @ k)).sum() / 2


def zeros():
    return torch.nn.Parameter(torch.zeros(SHAPE, dtype=torch.float64))


@every
@few
@given(seed=st.integers(0, 10**6))
def test_reaches_the_minimum_of_a_quadratic(name, seed):
    loss, w = quadratic(seed), zeros()
    before = loss(w).item()
    assert minimise(name, loss, w) < 2e-3 * before


@every
@few
@given(seed=st.integers(0, 10**6))
def test_reaches_the_minimum_of_a_logistic_regression(name, seed):
    """Softmax regression on noisy labels with a ridge; the minimum is Newton's."""
    generator = torch.Generator().manual_seed(seed)
    x = torch.randn(60, SHAPE[1], generator=generator, dtype=torch.float64)
    truth = torch.randn(SHAPE, generator=generator, dtype=torch.float64)
    y = torch.distributions.Categorical(logits=x @ truth.mT).probs.argmax(1)
    y = torch.where(torch.rand(60, generator=generator) < 0.1, torch.randint(SHAPE[0], (60,), generator=generator), y)

    def loss(w):
        return torch.nn.functional.cross_entropy(x @ w.mT, y) + 0.01 * w.square().sum()

    best = zeros()
    newton = torch.optim.LBFGS([best], max_iter=200, tolerance_grad=1e-9, line_search_fn="strong_wolfe")

    def closure():
        newton.zero_grad()
        value = loss(best)
        value.backward()
        return value

    newton.step(closure)
    w = zeros()
    before, lowest = loss(w).item(), loss(best).item()
    assume(before - lowest > 0.1)
    assert minimise(name, loss, w) - lowest < 0.03 * (before - lowest)


@few
@given(seed=st.integers(0, 10**6))
def test_a_subspace_that_never_changes_cannot_reach_it(seed):
    loss, w = quadratic(seed), zeros()
    before = loss(w).item()
    assert minimise("GaLoreAdamW, svd", loss, w, update_proj_gap=10**6) > 0.01 * before
