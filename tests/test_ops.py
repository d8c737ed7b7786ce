import math
import subprocess
import sys
from itertools import pairwise

import hypothesis.strategies as st
import pytest
import torch
from hypothesis import given
from torch import Tensor
from torch._dynamo.testing import CompileCounterWithBackend

from slimstate import ops
from slimstate.ops import PartKey, Place, counter_key, stochastic_round_, stochastic_round_reference_

DTYPES = [torch.bfloat16, torch.float16]
DEVICES = ["cpu", pytest.param("cuda", marks=pytest.mark.gpu)]
KEY = counter_key(0, 1)

keys = st.integers(-(2**63), 2**63 - 1)
floats = st.floats(width=32, allow_nan=False)


def rounded(x: Tensor, dtype: torch.dtype, key: int = KEY, offset: int = 0) -> Tensor:
    out = torch.empty_like(x, dtype=dtype)
    stochastic_round_(out, x, key, offset)
    return out


def bits(x: Tensor) -> Tensor:
    return x.view(torch.int16 if x.dtype in DTYPES else torch.int32)


def neighbours(x: Tensor, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    """The two values of dtype around each x, in float64."""
    nearest = x.to(dtype)
    down = torch.nextafter(nearest, torch.tensor(-math.inf, dtype=dtype))
    up = torch.nextafter(nearest, torch.tensor(math.inf, dtype=dtype))
    exact, nearest = x.double(), nearest.double()
    return torch.where(nearest <= exact, nearest, down.double()), torch.where(nearest >= exact, nearest, up.double())


def random_words(count: int, key: int, offset: int = 0) -> Tensor:
    """The upper 16 random bits of each element, read off the rounding itself.

    A bfloat16 result is 1 + 2**-7 instead of 1 exactly where the random bits reach 2**16 less the low half of x. That
    is one threshold a call; the sixteen calls of a bisection give the bits.
    """
    word = torch.zeros(count, dtype=torch.int32)
    for place in reversed(range(16)):
        guess = word + (1 << place)
        x = (0x3F800000 + 65536 - guess).to(torch.int32).view(torch.float32)
        up = rounded(x, torch.bfloat16, key, offset) > 1
        word = torch.where(up, guess, word)
    return word


# ------------------------------------------------------------------------------------------------ equality


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("numel", [0, 1, 7, 1000, (1 << 17) + 3])
@pytest.mark.parametrize("offset", [0, 5, 2**32 - 3, 2**40])
def test_equals_the_reference(device, dtype, numel, offset):
    x = torch.randint(-(2**31), 2**31, (numel,), device=device).to(torch.int32).view(torch.float32)
    expected = torch.empty_like(x, dtype=dtype)
    stochastic_round_reference_(expected, x, KEY, offset)
    assert torch.equal(bits(rounded(x, dtype, KEY, offset)), bits(expected))


@pytest.mark.gpu
@pytest.mark.parametrize("dtype", DTYPES)
def test_devices_agree(dtype):
    x = torch.randn(100_000)
    assert torch.equal(bits(rounded(x, dtype)), bits(rounded(x.cuda(), dtype).cpu()))


@pytest.mark.parametrize("dtype", DTYPES)
@given(values=st.lists(floats, min_size=1, max_size=40), key=keys, offset=st.integers(0, 2**62))
def test_equals_the_reference_for_any_input(dtype, values, key, offset):
    x = torch.tensor(values)
    expected = torch.empty_like(x, dtype=dtype)
    stochastic_round_reference_(expected, x, key, offset)
    assert torch.equal(bits(rounded(x, dtype, key, offset)), bits(expected))


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("start", [1, 2, 3])
def test_unaligned_slices(dtype, start):
    x, out = torch.randn(1000), torch.zeros(1000, dtype=dtype)
    stochastic_round_(out[start:-1], x[start:-1], KEY, offset=start)
    assert torch.equal(out[start:-1], rounded(x, dtype)[start:-1])
    assert not out[:start].any() and not out[-1]


@pytest.mark.parametrize("dtype", DTYPES)
def test_strides_do_not_matter(dtype):
    x = torch.randn(6, 7, 4)
    expected = rounded(x, dtype)
    out = torch.empty(4, 7, 6, dtype=dtype).permute(2, 1, 0)
    stochastic_round_(out, x.permute(2, 1, 0).contiguous().permute(2, 1, 0), KEY)
    assert torch.equal(out, expected)
    every_second = torch.zeros(12, 7, 4, dtype=dtype)
    stochastic_round_(every_second[::2], x, KEY)
    assert torch.equal(every_second[::2], expected) and not every_second[1::2].any()


@pytest.mark.parametrize("dtype", DTYPES)
@given(cuts=st.lists(st.integers(0, 300), max_size=4))
def test_pieces_equal_the_whole(dtype, cuts):
    x = torch.linspace(-3, 3, 300)
    edges = [0, *sorted(cuts), 300]
    pieces = [rounded(x[a:b], dtype, offset=a) for a, b in pairwise(edges)]
    assert torch.equal(torch.cat(pieces), rounded(x, dtype))


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("dtype", DTYPES)
@given(data=st.data(), shape=st.tuples(*[st.integers(1, 9)] * 3))
def test_a_part_is_rounded_as_in_the_whole(device, dtype, data, shape):
    x = torch.linspace(-3, 3, math.prod(shape)).view(shape).to(device)
    dim = data.draw(st.integers(0, 2))
    start = data.draw(st.integers(0, shape[dim] - 1))
    length = data.draw(st.integers(1, shape[dim] - start))
    inner = math.prod(shape[dim + 1 :])
    place = Place(start * inner, length * inner, shape[dim] * inner)
    part, half = x.narrow(dim, start, length), data.draw(st.integers(0, length * inner * shape[0]))
    expected = rounded(x, dtype).narrow(dim, start, length)
    values, key = part.reshape(-1), PartKey(KEY, place)
    out = torch.cat([rounded(values[:half], dtype, key), rounded(values[half:], dtype, key, half)])
    assert torch.equal(out.view(part.shape), expected)
    stochastic_round_reference_(out, values, KEY, 0, place)
    assert torch.equal(out.view(part.shape), expected)


@pytest.mark.skipif(not ops.COMPILED, reason="no op is registered where nothing was compiled")
@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("dtype", DTYPES)
def test_opcheck(device, dtype):
    op = torch.ops.slimstate.stochastic_round_.default
    out, x = torch.empty(5, 3, dtype=dtype, device=device), torch.randn(5, 3, device=device)
    torch.library.opcheck(op, (out, x, KEY, 7, 2, 3, 8))


@pytest.mark.parametrize("function", [stochastic_round_, stochastic_round_reference_])
def test_compiles_once_for_all_keys(function):
    torch._dynamo.reset()
    compilations = CompileCounterWithBackend("aot_eager")
    compiled = torch.compile(function, backend=compilations, fullgraph=True)
    x = torch.randn(50)
    for step in range(2, 8):
        out, key = torch.empty(50, dtype=torch.bfloat16), counter_key(0, step)
        compiled(out, x, key, step)
        assert torch.equal(out, rounded(x, torch.bfloat16, key, step))
    assert compilations.frame_count == 2  # for the first integers, then for all


def test_autograd_notices_the_write():
    weight = torch.nn.Parameter(torch.ones(4, dtype=torch.bfloat16))
    loss = weight.square().sum()
    stochastic_round_(weight, torch.rand(4), KEY)
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        loss.backward()


# ------------------------------------------------------------------------------------------------ values


@pytest.mark.parametrize("dtype", DTYPES)
def test_representable_values_stay(dtype):
    codes = torch.arange(-(2**15), 2**15).to(torch.int16)
    values = codes.view(dtype)
    number = ~values.isnan()  # subnormals, both zeros and both infinities among them
    for step in range(4):
        out = rounded(values.float(), dtype, counter_key(0, step))
        assert torch.equal(bits(out)[number], codes[number])
        assert out[~number].isnan().all()


@pytest.mark.parametrize("dtype", DTYPES)
@given(values=st.lists(floats, min_size=1, max_size=40), key=keys)
def test_only_neighbours_and_both_signs_alike(dtype, values, key):
    x = torch.tensor(values)
    out = rounded(x, dtype, key)
    below, above = neighbours(x, dtype)
    inside = x.abs() <= torch.finfo(dtype).max
    assert ((out.double() == below) | (out.double() == above))[inside].all()
    assert torch.equal(out[~inside], x.to(dtype)[~inside])
    assert torch.equal(bits(rounded(-x, dtype, key)), bits(-out))


@pytest.mark.parametrize("dtype", DTYPES)
def test_beyond_the_largest_finite_value_as_a_cast(dtype):
    largest = torch.tensor(torch.finfo(dtype).max)
    half_a_unit = largest * torch.finfo(dtype).eps / 4 / (1 - torch.finfo(dtype).eps / 2)
    middle = largest + half_a_unit
    x = torch.stack([torch.nextafter(largest, middle), torch.nextafter(middle, largest), middle, middle * 1.0001])
    x = torch.cat([x, -x, torch.tensor([math.inf, -math.inf])])
    assert torch.equal(rounded(x, dtype), x.to(dtype))
    assert rounded(x, dtype).isinf().tolist() == [False, False, True, True] * 2 + [True, True]


@pytest.mark.parametrize("dtype", DTYPES)
def test_nan_stays_nan(dtype):
    payloads = torch.tensor([0x7F800001, 0x7FC00000, 0x7FFFFFFF, -0x7FFFFF, -1], dtype=torch.int32)
    out = rounded(payloads.view(torch.float32), dtype)
    assert out.isnan().all()
    assert torch.equal(bits(out) < 0, payloads < 0)


# ------------------------------------------------------------------------------------------------ chance


# Scales: ordinary, where float16 is subnormal, its smallest step, and where bfloat16 is subnormal.
@pytest.mark.parametrize(
    ("dtype", "value"),
    [(dtype, value) for dtype in DTYPES for value in (1.2345, -30001.7, 1e-3)]
    + [(torch.float16, 1.23e-5), (torch.float16, -4.1e-8), (torch.float16, 1.7e-8), (torch.bfloat16, 3.3e-39)],
)
def test_unbiased(dtype, value):
    n = 200_000
    x = torch.full((n,), value)
    below, above = (t[0].item() for t in neighbours(x[:1], dtype))
    share = (x[0].item() - below) / (above - below)
    ups = (rounded(x, dtype).double() == above).sum().item()
    # Binomial: five standard deviations, one chance in two million if the hash were truly random.
    assert abs(ups / n - share) < 5 * math.sqrt(share * (1 - share) / n)


def test_random_bits_are_uniform():
    words = random_words(1 << 18, KEY)
    for part in (words >> 8, words & 255):
        counts = torch.bincount(part, minlength=256).double()
        expected = words.numel() / 256
        chi_squared = ((counts - expected) ** 2 / expected).sum().item()
        assert abs(chi_squared - 255) < 5 * math.sqrt(2 * 255)  # 255 degrees of freedom


def agreement(a: Tensor, b: Tensor) -> float:
    """Largest distance from 1/2, over pairs of the 16 places, of the share of elements where two bits agree."""
    place = torch.arange(16)
    a, b = ((t[:, None] >> place & 1).double() * 2 - 1 for t in (a, b))
    return (a.T @ b / len(a) / 2).abs().max().item()


# 256 pairs of places, each share with standard deviation 1/(2 sqrt(n)): six of them.
N = 1 << 16
BOUND = 6 / (2 * math.sqrt(N))


@pytest.mark.parametrize("lag", [1, 2, 3, 16, 256, 4096])
def test_neighbouring_elements_are_independent(lag):
    words = random_words(N + lag, KEY)
    assert agreement(words[:-lag], words[lag:]) < BOUND


@pytest.mark.parametrize("other", [KEY + 1, KEY ^ (1 << 31), KEY ^ (1 << 32), KEY ^ (1 << 62), -KEY])
def test_keys_are_independent(other):
    words = random_words(N, KEY)
    assert agreement(words, random_words(N, other)) < BOUND
    # Nor is one key's sequence another's, a few elements away.
    assert not any(torch.equal(words[lag : lag + 64], random_words(64, other)) for lag in range(8))


@pytest.mark.parametrize("bit", [0, 1, 7, 12, 13, 20, 31, 32, 33, 45, 61])
def test_avalanche_in_the_index(bit):
    # A flipped bit of the index flips every bit of the result with probability 1/2.
    n, start = 1 << 13, 5 << 40
    words = random_words(n, KEY, start)
    other = words[torch.arange(n) ^ (1 << bit)] if 1 << bit < n else random_words(n, KEY, start ^ (1 << bit))
    share = ((words ^ other)[:, None] >> torch.arange(16) & 1).double().mean(0)
    assert (share - 0.5).abs().max() < 6 / (2 * math.sqrt(n / 2))  # within a block each pair comes twice


def test_small_updates_move_a_bfloat16_weight():
    weight = torch.ones(10_000, dtype=torch.bfloat16)
    for step in range(200):
        stochastic_round_(weight, weight.float() - 1e-3, counter_key(0, step))
    assert abs(weight.float().mean().item() - 0.8) < 1e-3
    assert (torch.ones((), dtype=torch.bfloat16) - 1e-3).item() == 1  # what rounding to nearest does each time


# ------------------------------------------------------------------------------------------------ keys


def test_counter_key_values_are_fixed():
    # A checkpoint holds the seed and the step, so these numbers are part of its format.
    assert [counter_key(0), counter_key(1), counter_key(0, 0), counter_key(7, 3, 100)] == [
        -2152535657050944081,
        -7995527694508729151,
        -6411193824288604561,
        8909813219932840689,
    ]
    assert counter_key(0) % 2**64 == 0xE220A8397B1DCDAF  # SplitMix64's first output from 0


@given(words=st.lists(st.integers(-(2**70), 2**70), min_size=1, max_size=4))
def test_counter_key_fits_int64(words):
    assert -(2**63) <= counter_key(*words) < 2**63
    assert torch.tensor(counter_key(*words), dtype=torch.int64).item() == counter_key(*words)


def test_counter_keys_differ():
    found = {counter_key(seed, stream, step) for seed in range(10) for stream in range(30) for step in range(30)}
    assert len(found) == 10 * 30 * 30
    assert len({counter_key(0), counter_key(0, 0), counter_key(0, 0, 0)}) == 3


# ------------------------------------------------------------------------------------------------ errors


@pytest.mark.parametrize(
    ("out", "x", "offset", "error", "match"),
    [
        (torch.empty(3), torch.empty(3), 0, TypeError, "out must be bfloat16 or float16"),
        (torch.empty(3).half(), torch.empty(3).double(), 0, TypeError, "x must be float32"),
        (torch.empty(3).half(), torch.empty(4), 0, ValueError, "one shape"),
        (torch.empty(3).half(), torch.empty(3, device="meta"), 0, ValueError, "one device"),
        (torch.empty(3).half(), torch.empty(3), -1, ValueError, "offset must be >= 0, got -1"),
    ],
)
def test_errors(out, x, offset, error, match):
    with pytest.raises(error, match=match):
        stochastic_round_(out, x, KEY, offset)


@pytest.mark.skipif(not ops.COMPILED, reason="no op is registered where nothing was compiled")
def test_the_op_itself_refuses_what_it_cannot_do():
    op = torch.ops.slimstate.stochastic_round_
    with pytest.raises(RuntimeError, match="contiguous"):
        op(torch.empty(4, 4).half().T, torch.empty(4, 4), KEY, 0, *Place())
    with pytest.raises(RuntimeError, match="float32"):
        op(torch.empty(4).half(), torch.empty(4).double(), KEY, 0, *Place())
    with pytest.raises(RuntimeError, match="width must be >= 1, got 0"):
        op(torch.empty(4).half(), torch.empty(4), KEY, 0, 0, 0, 0)


@pytest.mark.parametrize("place", [Place(-1, 2, 3), Place(0, 0, 0), Place(0, 2, -3)])
def test_places_out_of_range_are_refused(place):
    with pytest.raises(ValueError, match="place must have start and pitch >= 0 and width >= 1, got Place"):
        stochastic_round_(torch.empty(3).half(), torch.empty(3), PartKey(KEY, place))


def test_self_check():
    result = subprocess.run([sys.executable, "-m", "slimstate.ops"], capture_output=True, text=True, check=False)
    assert result.returncode == 0, result.stdout + result.stderr
    assert "compiled for" in result.stdout and "DIFFERS" not in result.stdout
