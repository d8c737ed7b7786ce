import math

import hypothesis.strategies as st
import pytest
import torch
from hypothesis import given
from torch import Tensor

from slimstate import ops
from slimstate.ops.codes import code_values, decode, decode_reference, encode_, encode_reference_, scale_shape

compiled = pytest.mark.skipif(not ops.COMPILED, reason="no op is registered where nothing was compiled")


def coded(x: Tensor, signed: bool, layout: str = "rows") -> tuple[Tensor, Tensor]:
    codes, scale = torch.empty(x.shape, dtype=torch.uint8), torch.empty(scale_shape(x.shape, layout))
    encode_(codes, scale, x, signed=signed, layout=layout)
    return codes, scale


def nearest(x: Tensor, signed: bool) -> Tensor:
    """The distance in float64 of each number to the nearest of all values."""
    return (x.double().flatten()[:, None] - code_values(signed).double()).abs().amin(1).view(x.shape)


@pytest.mark.parametrize("signed", [True, False])
def test_values_are_those_of_bitsandbytes(signed):
    functional = pytest.importorskip("bitsandbytes.functional")
    x = decode(torch.arange(256).to(torch.uint8), torch.ones(1), signed=signed, layout="rows")
    assert torch.equal(x, functional.create_dynamic_map(signed))
    assert torch.equal(x, code_values(signed))


@pytest.mark.parametrize("signed", [True, False])
@pytest.mark.parametrize("exponent", [1, 3, 9])
def test_codes_are_the_nearest(signed, exponent):
    x = torch.randn(20, 255) ** exponent
    x = torch.cat([torch.ones(20, 1), x / x.abs().max()], 1) * (1 if signed else x.sign().new_ones(()))
    x = x if signed else x.abs()
    codes, scale = coded(x, signed)
    assert torch.equal(scale, torch.ones(20, 1))
    found = decode(codes, scale, signed=signed, layout="rows").double()
    assert ((found - x.double()).abs() <= nearest(x, signed) + 1e-7 * x.abs()).all()


@pytest.mark.parametrize("signed", [True, False])
@given(values=st.lists(st.floats(-1, 1, width=32), min_size=1, max_size=300), factor=st.floats(1e-30, 1e30))
def test_codes_of_any_numbers_are_the_nearest_to_their_share_of_the_largest(signed, values, factor):
    x = torch.tensor(values)[:256] * factor
    x = x if signed else x.abs()
    codes, scale = coded(x, signed)
    assert scale.item() == x.abs().max().item()
    if scale:
        share = x / scale
        found = code_values(signed)[codes.int()].double()
        assert ((found - share.double()).abs() <= nearest(share, signed) + 1e-7 * share.abs()).all()


@given(values=st.lists(st.floats(-0.96875, 0.96875, width=32), min_size=1, max_size=255))
def test_the_negative_of_a_number_has_the_negative_code(values):
    x = torch.tensor([1.0, *values])  # only 1 has none
    (codes, _), (others, _) = coded(x, True), coded(torch.cat([x[:1], -x[1:]]), True)
    assert torch.equal(codes[1:].int() - 127, 127 - others[1:].int())


def test_half_way_between_two_values_it_is_the_smaller_magnitude():
    values = code_values(True)
    x = torch.cat([torch.ones(1), (values[1:] + values[:-1]) / 2])
    codes, _ = coded(x, True)
    exact = ((values[1:].double() + values[:-1].double()) / 2) == x[1:].double()
    below = torch.arange(255) + (x[1:] < 0)
    assert exact.sum() > 50
    assert torch.equal(codes[1:].int()[exact], below.int()[exact])


def test_zeros_have_the_scale_zero():
    for signed in (True, False):
        codes, scale = coded(torch.zeros(2, 300), signed)
        assert not scale.any() and not code_values(signed)[codes.int()].any()
        assert not decode(codes, scale, signed=signed, layout="rows").any()


@pytest.mark.parametrize("layout", ["rows", "columns"])
@pytest.mark.parametrize("bad", [math.inf, -math.inf, math.nan])
@pytest.mark.parametrize("signed", [True, False])
def test_one_number_that_is_not_finite_leaves_none_of_its_block(layout, bad, signed):
    x = torch.rand(300, 300)
    x[7, 9] = bad if signed else abs(bad)
    codes, scale = coded(x, signed, layout)
    lost = ~decode(codes, scale, signed=signed, layout=layout).isfinite()
    block = (slice(7, 8), slice(0, 256)) if layout == "rows" else (slice(0, 256), slice(9, 10))
    assert lost[block].all() and lost.sum() == 256


@pytest.mark.parametrize("layout", ["rows", "columns"])
@pytest.mark.parametrize("signed", [True, False])
def test_strides_do_not_matter(layout, signed):
    x = torch.randn(4, 300, 20).abs()
    expected, expected_scale = coded(x, signed, layout)
    codes = torch.empty(20, 300, 4, dtype=torch.uint8).permute(2, 1, 0)
    scale = torch.empty(*expected_scale.shape[::-1]).permute(*reversed(range(expected_scale.ndim)))
    encode_(codes, scale, x.mT.contiguous().mT, signed=signed, layout=layout)
    assert torch.equal(codes, expected) and torch.equal(scale, expected_scale)
    wide = decode(codes, scale, signed=signed, layout=layout)
    assert torch.equal(wide, decode_reference(expected, expected_scale, signed=signed, layout=layout))


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float64])
def test_other_dtypes_are_brought_to_float32(dtype):
    x = torch.randn(3, 300).to(dtype)
    codes, scale = coded(x, True)
    expected, expected_scale = torch.empty_like(codes), torch.empty_like(scale)
    encode_reference_(expected, expected_scale, x.float(), signed=True, layout="rows")
    assert torch.equal(codes, expected) and torch.equal(scale, expected_scale)
    wide = decode(codes, scale, signed=True, layout="rows", dtype=dtype)
    assert torch.equal(wide, decode_reference(codes, scale, signed=True, layout="rows").to(dtype))


@pytest.mark.parametrize("start", [1, 2, 3])
def test_unaligned_memory(start):
    x, codes, scale = torch.randn(1000), torch.zeros(1000, dtype=torch.uint8), torch.zeros(4)
    encode_(codes[start:-1], scale, x[start:-1], signed=True, layout="rows")
    assert torch.equal(codes[start:-1], coded(x[start:-1], True)[0])
    assert not codes[:start].any() and not codes[-1]


@compiled
def test_the_ops_refuse_what_they_cannot_do():
    encode, codes, scale, x = (
        torch.ops.slimstate.encode_,
        torch.zeros(4, 300).byte(),
        torch.zeros(4, 2),
        torch.zeros(4, 300),
    )
    for arguments, match in (
        ((codes, scale, x.double(), True, False), "float32"),
        ((codes.int(), scale, x, True, False), "uint8"),
        ((codes, scale[:, :1].contiguous(), x, True, False), "scale has 4 elements, not 8"),
        ((codes.mT, scale, x, True, False), "contiguous"),
        ((codes, scale, x[:3], True, False), "x has 900 elements"),
        ((codes.flatten(), scale, x, True, True), "1 dimensions"),
    ):
        with pytest.raises(RuntimeError, match=match):
            encode(*arguments)
