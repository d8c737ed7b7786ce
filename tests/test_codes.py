import math

import hypothesis.strategies as st
import pytest
import torch
from hypothesis import given
from torch import Tensor

from slimstate import ops
from slimstate.ops.codes import CODES, code_values, decode, decode_reference, encode_, encode_reference_, scale_shape

compiled = pytest.mark.skipif(not ops.COMPILED, reason="no op is registered where nothing was compiled")


formats = pytest.mark.parametrize("dtype", CODES)


def coded(x: Tensor, signed: bool, layout: str = "rows", dtype: torch.dtype = torch.uint8) -> tuple[Tensor, Tensor]:
    codes, scale = torch.empty(x.shape, dtype=dtype), torch.empty(scale_shape(x.shape, layout))
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


@formats
def test_zeros_have_the_scale_zero(dtype):
    for signed in (True, False):
        codes, scale = coded(torch.zeros(2, 300), signed, dtype=dtype)
        assert not scale.any()
        assert not decode(codes, scale, signed=signed, layout="rows").any()


@pytest.mark.parametrize("layout", ["rows", "columns"])
@pytest.mark.parametrize("bad", [math.inf, -math.inf, math.nan])
@pytest.mark.parametrize("signed", [True, False])
@formats
def test_one_number_that_is_not_finite_leaves_none_of_its_block(layout, bad, signed, dtype):
    x = torch.rand(300, 300)
    x[7, 9] = bad if signed else abs(bad)
    codes, scale = coded(x, signed, layout, dtype)
    lost = ~decode(codes, scale, signed=signed, layout=layout).isfinite()
    block = (slice(7, 8), slice(0, 256)) if layout == "rows" else (slice(0, 256), slice(9, 10))
    assert lost[block].all() and lost.sum() == 256


@pytest.mark.parametrize("layout", ["rows", "columns"])
@pytest.mark.parametrize("signed", [True, False])
@formats
def test_strides_do_not_matter(layout, signed, dtype):
    x = torch.randn(4, 300, 20).abs()
    expected, expected_scale = coded(x, signed, layout, dtype)
    codes = torch.empty(20, 300, 4, dtype=dtype).permute(2, 1, 0)
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
@formats
def test_unaligned_memory(start, dtype):
    x, codes, scale = torch.randn(1000), torch.zeros(1000, dtype=dtype), torch.zeros(4)
    encode_(codes[start:-1], scale, x[start:-1], signed=True, layout="rows")
    assert torch.equal(codes[start:-1], coded(x[start:-1], True, dtype=dtype)[0])
    assert not codes[:start].any() and not codes[-1]


# Companded codes.


def psi(x: Tensor) -> Tensor:
    """The formula of `code_values`, in float64."""
    mantissa, exponent = torch.frexp(x)
    f = 2 * mantissa - 1
    return torch.where(x == 0, 0, 4.0 ** (exponent - 1) * torch.where(f < 0.5, 1 + 2 * f, 4 * f))


def test_companded_values_are_those_of_the_formula_and_close_to_powers():
    levels = torch.arange(-128, 128, dtype=torch.float64)
    signed, unsigned = (code_values(s, companded=True).double() for s in (True, False))
    assert torch.equal(signed, levels.sign() * psi(levels.abs() / 128))
    assert torch.equal(unsigned, psi(psi((levels + 129) / 256)))
    for values, powers in ((signed.abs(), (levels / 128) ** 2), (unsigned, ((levels + 129) / 256) ** 4)):
        assert (values <= powers).all() and (values >= (8 / 9) ** 3 * powers).all()
    assert (signed.diff() > 0).all() and (unsigned.diff() > 0).all()
    assert (signed[-1], unsigned[-1], unsigned[0]) == (63 / 64, 1, 2**-32)


@pytest.mark.parametrize("signed", [True, False])
@given(values=st.lists(st.floats(-1, 1, width=32), min_size=1, max_size=300), factor=st.floats(1e-30, 1e30))
def test_companded_codes_are_the_nearest_in_the_root(signed, values, factor):
    x = torch.tensor(values)[:256] * factor
    x = x if signed else x.abs()
    codes, scale = coded(x, signed, dtype=torch.int8)
    if not scale:
        assert x.abs().max() < 2**-126
        return
    share = (x.double() / scale.double()).abs()
    # Nearest in the root: between what half a level less and half a level more stand for.
    level = codes.double().abs() if signed else codes.double() + 129
    low, high = ((level + by).clamp(min=0) / (128 if signed else 256) for by in (-0.5, 0.5))
    low, high = (psi(y) if signed else psi(psi(y)) for y in (low, high))
    assert ((share >= low * (1 - 1e-6)) | (level == (0 if signed else 1))).all()
    assert (share <= high * (1 + 1e-6) + 1e-12).all()
    assert not signed or (codes.sign() * x.sign() >= 0).all()


@pytest.mark.parametrize("layout", ["rows", "columns"])
@pytest.mark.parametrize("signed", [True, False])
@given(seed=st.integers(0, 100), exponent=st.sampled_from([1, 3, 9]), factor=st.floats(1e-20, 1e20))
def test_what_companded_codes_stand_for_has_the_same_codes(layout, signed, seed, exponent, factor):
    x = torch.randn(300, 30, generator=torch.Generator().manual_seed(seed)) ** exponent * factor
    codes, scale = coded(x if signed else x.abs(), signed, layout, torch.int8)
    again, again_scale = coded(decode(codes, scale, signed=signed, layout=layout), signed, layout, torch.int8)
    assert torch.equal(again, codes) and torch.equal(again_scale, scale)


def test_a_second_moment_that_is_not_zero_never_becomes_it():
    x = torch.tensor([1.0, 1e-12, 1e-30])
    assert (decode(*coded(x, False, dtype=torch.int8), signed=False, layout="rows") > 0).all()
    assert decode(*coded(x, False), signed=False, layout="rows").tolist() == [1, 0, 0]


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
