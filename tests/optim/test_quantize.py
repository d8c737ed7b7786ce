import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from slimstate.ops import counter_key
from slimstate.optim._quantize import LEVELS, codes_shape, decode, encode

every = pytest.mark.parametrize("bits", LEVELS)


def there_and_back(x, bits, key=1, offset=0):
    return decode(*encode(x, bits, key, offset), x.shape[1], bits)


@every
@given(
    rows=st.integers(1, 5),
    n=st.integers(1, 40),
    exponent=st.integers(-30, 30),
    dtype=st.sampled_from([torch.float32, torch.float64]),
    key=st.integers(-(2**63), 2**63 - 2),
)
def test_every_number_comes_back_in_its_place_within_a_step(bits, rows, n, exponent, dtype, key):
    x = torch.randn(rows, n, dtype=dtype) * 10.0**exponent
    codes, largest = encode(x, bits, key)
    length, codes_dtype = codes_shape(n, bits)
    assert (codes.shape, codes.dtype) == ((rows, length), codes_dtype)
    assert torch.equal(largest, x.abs().amax(1))
    y = decode(codes, largest, n, bits)
    assert y.dtype == dtype
    assert ((y - x).abs() <= (1 + 1e-3) * largest[:, None] / LEVELS[bits]).all()
    top = x.abs() == largest[:, None]
    assert torch.equal(y[top], x[top])
    assert torch.equal(there_and_back(y, bits, key + 1), y)  # what is a code stays it


@every
@pytest.mark.parametrize("n", [1, 2, 3, 8, 17])
@pytest.mark.parametrize("value", [0.0, 3.3, -1e-30, 1e30])
def test_zeros_and_rows_of_one_magnitude_are_exact(bits, n, value):
    signs = torch.ones(2, n)
    signs[1, ::2] = -1
    assert torch.equal(there_and_back(value * signs, bits), value * signs)
    assert there_and_back(torch.tensor([[5.0, 0.0]]), bits).tolist() == [[5.0, 0.0]]


@every
def test_all_levels_are_used(bits):
    levels = LEVELS[bits]
    x = torch.arange(-levels, levels + 1)[None] / levels
    assert torch.equal(there_and_back(x, bits), x)
    assert len(set(there_and_back(torch.linspace(-1, 1, 5000)[None], bits)[0].tolist())) == 2 * levels + 1


@every
def test_rounding_has_no_bias(bits):
    x = torch.tensor([[1.0, 0.3, 0.01, -0.003, -0.7]])
    draws = 4000
    mean = sum(there_and_back(x, bits, counter_key(0, i)) for i in range(draws)) / draws
    assert ((mean - x).abs() <= 4 * 0.5 / LEVELS[bits] / draws**0.5).all()


@every
def test_rows_in_pieces_equal_the_whole(bits):
    x = torch.randn(6, 9)
    codes, largest = encode(x, bits, 7)
    for s in (slice(0, 2), slice(2, 3), slice(3, 6)):
        part = encode(x[s], bits, 7, offset=9 * s.start)
        assert torch.equal(part[0], codes[s])
        assert torch.equal(part[1], largest[s])
    assert not torch.equal(encode(x, bits, 8)[0], codes)
