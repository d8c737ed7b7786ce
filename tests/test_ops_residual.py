import hypothesis.strategies as st
import pytest
import torch
from hypothesis import given
from torch._dynamo.testing import CompileCounterWithBackend

from slimstate import ops
from slimstate.ops import (
    scaled_residual_,
    scaled_residual_reference_,
    sign_residual_,
    sign_residual_reference_,
)

DEVICES = ["cpu", pytest.param("cuda", marks=pytest.mark.gpu)]
GRADIENTS = [torch.float32, torch.bfloat16, torch.float16]
SHAPES = [(0, 5), (5, 0), (1, 1), (1, 7), (7, 1), (3, 17), (65, 129), (300, 200)]
NUMBERS = {"beta": 0.99, "step": 0.125}


def made(shape, along, dtype=torch.float32, device="cpu", seed=0):
    """W, G, Q R and a limit (rows, 1), (1, columns) or (1, 1), with values on the limits, zeros and NaN among them."""
    generator = torch.Generator().manual_seed(seed)
    w, g, product = (torch.randn(shape, generator=generator) for _ in range(3))
    g = g.to(dtype)
    sizes = {"rows": (shape[0], 1), "columns": (1, shape[1]), "one": (1, 1)}[along]
    limit = torch.rand(sizes, generator=generator)
    exact = torch.rand(shape, generator=generator)
    product = torch.where(exact < 0.2, g.float(), product)
    product = torch.where((exact >= 0.2) & (exact < 0.4), g.float() - limit, product)
    product = torch.where(exact > 0.95, torch.nan, product)
    return [x.to(device) for x in (w, g, product, limit)]


def with_gaps(x):
    """The same numbers, in rows that do not follow one another."""
    return torch.cat([x, x], 1)[:, : x.shape[1]]


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("along", ["rows", "columns", "one"])
@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("dtype", GRADIENTS)
def test_equals_the_reference_to_the_bit(device, along, shape, dtype):
    w, g, product, limit = made(shape, along, dtype, device)
    for form in (lambda x: x, with_gaps):
        got, expected = form(w.clone()), w.clone()
        sign_residual_(got, form(g), form(product), limit, **NUMBERS)
        sign_residual_reference_(expected, g, product, limit, *NUMBERS.values())
        assert torch.equal(got, expected)
        got, expected = form(w.clone()), w.clone()
        scaled_residual_(got, form(g), limit, beta=0.99)
        scaled_residual_reference_(expected, g, limit, 0.99)
        assert torch.equal(got, expected)


@pytest.mark.parametrize("transpose", ["w", "g", "product"])
def test_takes_columns_that_lie_together(transpose):
    w, g, product, limit = made((9, 6), "columns")
    expected = w.clone()
    sign_residual_reference_(expected, g, product, limit, **NUMBERS)
    tensors = {"w": w.clone(), "g": g, "product": product}
    tensors[transpose] = tensors[transpose].mT.contiguous().mT
    sign_residual_(*tensors.values(), limit, **NUMBERS)
    assert torch.equal(tensors["w"], expected)


@given(
    *(st.floats(-(2.0**90), 2.0**90, width=32) for _ in range(3)),
    st.floats(0, 2.0**90, width=32),
    st.floats(0, 1, width=32),
    st.floats(0, 1024, width=32),
)
def test_is_the_formula(w, g, product, limit, beta, step):
    outside = torch.tensor(g) - torch.tensor(product)
    sign = 0.0 if outside.abs() <= limit else outside.sign()
    x = torch.full((1, 1), w)
    sign_residual_(x, *(torch.full((1, 1), y) for y in (g, product, limit)), beta=beta, step=step)
    assert torch.equal(x[0, 0], torch.tensor(w) * beta - sign * torch.tensor(step))


def test_float64_is_computed_in_float64():
    w, g, _, limit = (x.double() for x in made((5, 7), "columns"))
    expected = w * 0.99 - g * limit
    scaled_residual_(w, g, limit, beta=0.99)
    assert torch.equal(w, expected)


@pytest.mark.skipif(not ops.COMPILED, reason="no op is registered where nothing was compiled")
@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("dtype", GRADIENTS)
def test_opcheck(device, dtype):
    w, g, product, limit = made((5, 3), "columns", dtype, device)
    torch.library.opcheck(torch.ops.slimstate.sign_residual_.default, (w, g, product.nan_to_num(), limit, 0.9, 0.1))
    torch.library.opcheck(torch.ops.slimstate.scaled_residual_.default, (w, g, limit, 0.9))


def test_compiles_once_for_all_numbers():
    torch._dynamo.reset()
    first = 0
    compilations = CompileCounterWithBackend("aot_eager")

    @torch.compile(backend=compilations, fullgraph=True)
    def step_(w, g, product, limit, beta, step):
        sign_residual_(w, g, product, limit, beta=beta, step=step)
        scaled_residual_(w, g, limit, beta=beta)

    for i in range(1, 4):
        w, g, product, limit = made((6, 4), "rows", seed=i)
        expected, beta, step = w.clone(), 1 - i / 10, i / 100
        sign_residual_reference_(expected, g, product, limit, beta, step)
        scaled_residual_reference_(expected, g, limit, beta)
        step_(w, g, product, limit, *(torch.tensor(x, dtype=torch.float64) for x in (beta, step)))
        assert torch.equal(w, expected)
        if i == 1:
            first = compilations.frame_count
    assert compilations.frame_count == first


@pytest.mark.parametrize("kind", ["sign", "scaled"])
def test_autograd_notices_the_write(kind):
    w, g, product, limit = made((2, 3), "columns")
    weight = torch.nn.Parameter(w)
    loss = weight.square().sum()
    with torch.no_grad():
        if kind == "sign":
            sign_residual_(weight, g, product, limit)
        else:
            scaled_residual_(weight, g, limit)
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        loss.backward()


@pytest.mark.parametrize(
    ("change", "error", "message"),
    [
        ({0: torch.zeros(4, 3, dtype=torch.bfloat16)}, TypeError, "w must be float32 or float64, got torch.bfloat16"),
        ({1: torch.zeros(4, 3, dtype=torch.int32)}, TypeError, "g must be floating point, got torch.int32"),
        ({1: torch.zeros(3, 4)}, ValueError, r"one shape, got \(4, 3\) and \(3, 4\)"),
        ({2: torch.zeros(4, 1)}, ValueError, r"product must have w's shape, got \(4, 1\) for \(4, 3\)"),
        ({2: torch.zeros(4, 3).double()}, TypeError, "product must be torch.float32, as w is, got torch.float64"),
        ({3: torch.zeros(2, 1)}, ValueError, r"limit must have 1 or w's size in each dimension, got \(2, 1\)"),
        ({3: torch.zeros(1, 3, device="meta")}, ValueError, "limit must be on cpu, as w is, got meta"),
    ],
)
def test_refuses_what_does_not_fit(change, error, message):
    arguments = dict(enumerate(made((4, 3), "columns"))) | change
    with pytest.raises(error, match=message):
        sign_residual_(*arguments.values())
