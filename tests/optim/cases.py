"""The optimizers that the tables of tests run over, and what they train: a new optimizer is a row of CASES."""

import os

import pytest
import torch

from slimstate.optim import (
    FRUGAL,
    SGDP,
    AdamP,
    AdamW,
    AdamW8bit,
    DCTAdamW,
    GaLoreAdafactor,
    GaLoreAdamW,
    GaLoreAdamW8bit,
    GradNormLoRP,
    _moments,
)

_moments.SMALLEST_CODED = 64  # elements: the rule of 8-bit moments, for matrices as small as these

# name -> (class, settings for matrices, settings for every parameter)
CASES = {
    "AdamW": (AdamW, {}, {}),
    "AdamW, bfloat16 moments": (AdamW, {}, {"moment_dtype": "bfloat16"}),
    "AdamP": (AdamP, {}, {}),
    "AdamP, nesterov, bfloat16 moments": (AdamP, {}, {"nesterov": True, "moment_dtype": "bfloat16"}),
    "SGDP": (SGDP, {}, {"momentum": 0.9, "nesterov": True}),
    "FRUGAL, columns": (FRUGAL, {"density": 0.3, "update_proj_gap": 2}, {}),
    "FRUGAL, runs of rows": (
        FRUGAL,
        {"density": 0.3, "update_proj_gap": 2, "projection": "rows", "contiguous": True},
        {},
    ),
    "FRUGAL, entries, lion, none": (
        FRUGAL,
        {"density": 0.3, "update_proj_gap": 2, "projection": "entries"},
        {"inner": "lion", "outer": "none"},
    ),
    "FRUGAL, svd, sgdm, sgd": (
        FRUGAL,
        {"rank": 3, "update_proj_gap": 2, "projection": "svd"},
        {"inner": "sgdm", "outer": "sgd"},
    ),
    "FRUGAL, random, bfloat16 moments": (
        FRUGAL,
        {"rank": 3, "update_proj_gap": 2, "projection": "random"},
        {"moment_dtype": "bfloat16"},
    ),
    "FRUGAL, blocks": (FRUGAL, {"density": 0.5, "update_proj_gap": 2, "projection": "blocks"}, {}),
    "FRUGAL, density 0": (FRUGAL, {"density": 0.0}, {"inner": "lion"}),
} | {
    f"GaLoreAdamW, {projection}, {transport}": (
        GaLoreAdamW,
        {"rank": 3, "update_proj_gap": 2, "projection": projection, "transport": transport},
        {},
    )
    for projection in ("svd", "power", "random")
    for transport in ("rotate", "keep", "reset")
}
ADAFACTOR = {"rank": 3, "update_proj_gap": 2}
CASES |= {
    "GaLoreAdafactor": (GaLoreAdafactor, ADAFACTOR, {"scale_parameter": False}),
    "GaLoreAdafactor, beta1": (GaLoreAdafactor, ADAFACTOR, {"scale_parameter": False, "beta1": 0.9}),
    "GaLoreAdafactor, relative step, reset": (
        GaLoreAdafactor,
        ADAFACTOR | {"scale": 20.0, "transport": "reset"},
        {"lr": None, "beta1": 0.5},
    ),
}
CASES |= {
    name.replace("GaLoreAdamW", "GradNormLoRP"): (GradNormLoRP, *CASES[name][1:])
    for name in ("GaLoreAdamW, svd, rotate", "GaLoreAdamW, power, keep", "GaLoreAdamW, random, reset")
}
CASES |= {
    f"DCTAdamW, {name}": (DCTAdamW, {"rank": 3, **settings}, {})
    for name, settings in {
        "every step": {},
        "every third": {"update_proj_gap": 3},
        "keep": {"update_proj_gap": 2, "transport": "keep", "norm": 2},
        "hadamard, errors": {"projection": "hadamard", "error_feedback": "param"},
        "8-bit errors": {"error_feedback": "8bit", "update_proj_gap": 2},
        "4-bit errors": {"error_feedback": "4bit"},
    }.items()
}
CASES |= {
    f"{name}, compensated": (kind, matrices, common | {"compensation": True})
    for name, (kind, matrices, common) in {
        name: CASES[name] for name in ("AdamW", "GaLoreAdamW, svd, rotate", "FRUGAL, columns")
    }.items()
}
IN_ALL = ("SGDP", "GaLoreAdafactor, beta1") if os.environ.get("SLIMSTATE_TEST_ALL") == "1" else ()
CASES |= {
    "AdamW8bit": (AdamW8bit, {}, {}),
    "GaLoreAdamW8bit": (GaLoreAdamW8bit, {"rank": 4, "update_proj_gap": 2}, {}),
    "GaLoreAdamW, power, rotate, basis in 8 bits": (
        GaLoreAdamW,
        {"rank": 3, "update_proj_gap": 2, "projection": "power", "basis_dtype": "8bit"},
        {},
    ),
    "FRUGAL, svd, basis in 8 bits": (
        FRUGAL,
        {"rank": 3, "update_proj_gap": 2, "projection": "svd", "basis_dtype": "8bit"},
        {},
    ),
    "GradNormLoRP, svd, rotate, basis in 16 bits": (
        GradNormLoRP,
        {"rank": 3, "update_proj_gap": 2, "basis_dtype": "bfloat16"},
        {},
    ),
} | {
    f"{name}, 8-bit moments": (
        kind,
        matrices | ({"rank": 4} if "rank" in matrices else {}),
        common | {"moment_dtype": "8bit"},
    )
    for name, (kind, matrices, common) in {
        name: CASES[name] for name in ("FRUGAL, columns", "DCTAdamW, every step", *IN_ALL)
    }.items()
}
CASES |= {
    f"{name}, companded moments": (kind, matrices, common | {"moment_dtype": "8bit-companded"})
    for name, (kind, matrices, common) in {
        name: CASES[name] for name in ("AdamW", "GaLoreAdamW, power, rotate", *IN_ALL)
    }.items()
}
# One or more of each class, for what its variants have in common.
FEW = [
    "AdamW",
    "AdamW8bit",
    "AdamW, companded moments",
    "AdamP",
    "SGDP",
    "GaLoreAdamW8bit",
    "GaLoreAdamW, svd, rotate",
    "GaLoreAdamW, power, keep",
    "GaLoreAdamW, random, reset",
]
FEW += ["GradNormLoRP, svd, rotate", "DCTAdamW, 8-bit errors", "FRUGAL, columns", "GaLoreAdafactor, beta1"]
every = pytest.mark.parametrize("name", CASES)
few = pytest.mark.parametrize("name", FEW)
contract = pytest.mark.contract

# What shares its defaults with something else than torch.optim.AdamW.
TORCHS = {AdamP: torch.optim.Adam, SGDP: torch.optim.SGD}
# What is drawn for a parameter by its name, where it has one.
DRAWN = ("power", "random", "columns", "rows", "entries")


def moments_of(state):
    return [key for key in state if key.startswith(("exp_avg", "momentum_buffer")) and key not in _moments.SCALES]


def model(dtype=torch.float32, seed=0):
    """A convolution, a norm and two matrices: 4, 1, 2 and 1 axes."""
    torch.default_generator.manual_seed(seed)
    return torch.nn.Sequential(
        torch.nn.Conv2d(3, 8, 3),
        torch.nn.GroupNorm(2, 8),
        torch.nn.Flatten(),
        torch.nn.Linear(32, 20),
        torch.nn.Tanh(),
        torch.nn.Linear(20, 30),
    ).to(dtype)


def build(name, params, **settings):
    kind, matrices, common = CASES[name]
    return kind(params, **{"lr": 0.02, **matrices, **common, **settings})


def loss_of(net, i):
    """The loss of batch number i."""
    dtype = next(net.parameters()).dtype
    generator = torch.Generator().manual_seed(i)
    x = torch.randn(4, 3, 4, 4, generator=generator).to(dtype)
    y = torch.randn(4, 30, generator=generator).to(dtype)
    return torch.nn.functional.mse_loss(net(x), y)


def share(name):
    """Settings under which no rank is above a side, and none is clamped: the rank as a share."""
    return {"rank": 0.5} if "rank" in CASES[name][1] else {}


def backward(net, i):
    """The loss of batch number i; its gradients are in place."""
    net.zero_grad()
    loss = loss_of(net, i)
    loss.backward()
    return loss


def train(net, optimizer, start, stop):
    for i in range(start, stop):
        backward(net, i)
        optimizer.step()


def weights(net):
    return weights_of(net.parameters())


def weights_of(params):
    return [p.detach().clone() for p in params]


def assert_equal(a, b):
    """The same types, dtypes and bits, whatever the nesting."""
    assert type(a) is type(b)
    if isinstance(a, torch.Tensor):
        assert a.dtype == b.dtype
        assert torch.equal(a, b)
    elif isinstance(a, dict):
        assert a.keys() == b.keys()
        for key in a:
            assert_equal(a[key], b[key])
    elif isinstance(a, list | tuple):
        assert len(a) == len(b)
        for x, y in zip(a, b, strict=True):
            assert_equal(x, y)
    else:
        assert a == b


def assert_same_continuation(net, optimizer, other, resumed, start, steps=3):
    """For as many steps as it takes to refresh every basis of CASES."""
    train(net, optimizer, start, start + steps)
    train(other, resumed, start, start + steps)
    assert_equal(weights(net), weights(other))
