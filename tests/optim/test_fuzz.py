"""Any mixture of shapes, dtypes and settings trains, or is refused before anything happens, and resumes bit for bit."""

import copy
import io
import warnings

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from slimstate.optim import (
    FRUGAL,
    SGDP,
    AdamP,
    AdamW,
    DCTAdamW,
    GaLoreAdafactor,
    GaLoreAdamW,
    GradNormLoRP,
    state_bytes,
)

some = st.sampled_from
RANK = st.one_of(st.integers(1, 9), st.floats(0.01, 1))
SHARED = {
    "lr": st.floats(0, 0.1),
    "weight_decay": st.floats(0, 1),
    "maximize": st.booleans(),
    "moment_dtype": some([None, "float32", "bfloat16", "param"]),
    "stochastic_rounding": some([None, True, False]),
    "seed": st.integers(-5, 5),
}
PROJECTED = {"rank": RANK, "update_proj_gap": st.integers(1, 4), "scale": st.floats(0.01, 2)}
SIDED = {"side": some(["auto", "left", "right", "reverse"])}
DENSE = {"projection": some(["svd", "power", "random"]), "transport": some(["rotate", "keep", "reset"])}
BETAS = {"betas": st.tuples(st.floats(0, 0.99), st.floats(0, 0.999))}

# class -> what each of its arguments may be
OPTIMIZERS = {
    AdamW: BETAS,
    AdamP: BETAS | {"nesterov": st.booleans(), "delta": st.floats(0, 2)},
    SGDP: {"momentum": st.floats(0, 0.99), "nesterov": st.booleans()},
    GaLoreAdamW: BETAS | PROJECTED | SIDED | DENSE,
    GradNormLoRP: BETAS | PROJECTED | SIDED | DENSE,
    GaLoreAdafactor: PROJECTED
    | SIDED
    | DENSE
    | {"beta1": st.one_of(st.none(), st.floats(0, 0.99)), "scale_parameter": st.booleans()},
    DCTAdamW: BETAS
    | PROJECTED
    | SIDED
    | {
        "projection": some(["dct", "dct3", "hadamard"]),
        "norm": some([1, 2]),
        "transport": some(["rotate", "keep"]),
        "error_feedback": some([None, "param", "8bit", "4bit"]),
    },
    FRUGAL: BETAS
    | {"update_proj_gap": st.integers(1, 4), "scale": st.floats(0.01, 2), "density": st.floats(0, 1)}
    | {
        "projection": some(["columns", "rows", "entries", "svd", "power", "random", "blocks"]),
        "contiguous": st.booleans(),
        "order": some(["random", "ascending", "descending", "mirror"]),
        "inner": some(["adamw", "lion", "sgdm"]),
        "outer": some(["sign", "sgd", "none"]),
        "outer_scale": st.floats(0.01, 2),
    },
}
SHAPES = st.one_of(
    st.just(()),
    st.tuples(st.integers(0, 5)),
    st.tuples(st.integers(0, 9), st.integers(0, 9)),
    st.tuples(st.integers(1, 4), st.integers(1, 4), st.integers(1, 4)),
    st.tuples(st.integers(1, 3), st.integers(1, 3), st.integers(1, 3), st.integers(1, 3)),
)
DTYPES = some([torch.float32, torch.float64, torch.bfloat16, torch.float16])
GRADIENTS = some(["normal", "normal", "normal", "zero", "none", "constant", "strided"])


def gradient(p, kind, generator):
    if kind == "none":
        return None
    g = torch.randn(*p.shape, 2, generator=generator, dtype=torch.float64).to(p.dtype)
    g = {"zero": torch.zeros_like(g), "constant": torch.ones_like(g)}.get(kind, g)
    return g[..., 0] if kind == "strided" else g[..., 0].contiguous()


def step(optimizer, params, kinds, seed):
    generator = torch.Generator().manual_seed(seed)
    for p, kind in zip(params, kinds, strict=True):
        p.grad = gradient(p, kind, generator)
    optimizer.step()


@pytest.mark.parametrize("kind", OPTIMIZERS)
@given(data=st.data())
def test_whatever_is_accepted_trains_and_resumes(kind, data):
    options = {
        key: data.draw(values, key) for key, values in (SHARED | OPTIMIZERS[kind]).items() if data.draw(some([0, 1]))
    }
    if options.get("projection") != "blocks":  # FRUGAL refuses these beside another projection, by tests of its own
        options.pop("order", None)
    if options.get("projection", "columns") not in ("columns", "rows", "entries"):
        options.pop("contiguous", None)
    matrix = data.draw(st.tuples(st.tuples(st.integers(1, 9), st.integers(1, 9)), DTYPES), "matrix")
    specs = [matrix, *data.draw(st.lists(st.tuples(SHAPES, DTYPES), max_size=3), "parameters")]
    history = data.draw(st.lists(st.tuples(*[GRADIENTS] * len(specs)), min_size=2, max_size=7), "gradients")
    at = data.draw(st.integers(1, len(history) - 1), "saved after")
    generator = torch.Generator().manual_seed(0)
    params = [torch.nn.Parameter(torch.randn(shape, generator=generator).to(dtype)) for shape, dtype in specs]
    starts = [p.detach().clone() for p in params]

    def build(params):
        with warnings.catch_warnings():
            warnings.filterwarnings("ignore", "rank .* is above")
            return kind(params, **options)

    try:
        optimizer = build(params)
    except ValueError as error:
        assert str(error)
        assert all(torch.equal(p, start) for p, start in zip(params, starts, strict=True))
        return
    for i, kinds in enumerate(history[:at]):
        step(optimizer, params, kinds, i)
    assert all(p.isfinite().all() for p in params if p.dtype != torch.float16)
    file = io.BytesIO()
    torch.save(optimizer.state_dict(), file)
    file.seek(0)
    others = [torch.nn.Parameter(p.detach().clone()) for p in params]
    resumed = build(others)
    resumed.load_state_dict(torch.load(file, weights_only=True))
    assert state_bytes(resumed) == state_bytes(optimizer)
    twin_params, twin = copy.deepcopy((params, optimizer))
    for i, kinds in enumerate(history[at:], at):
        for o, ps in ((optimizer, params), (resumed, others), (twin, twin_params)):
            step(o, ps, kinds, i)
    for p, q, r in zip(params, others, twin_params, strict=True):
        assert torch.equal(p.nan_to_num(), q.nan_to_num())
        assert torch.equal(p.nan_to_num(), r.nan_to_num())
