"""What csrc/cuda/launch.cuh does, and what the emulator notices; see machinery.cu."""

import math

import pytest
import torch

THREADS = 256


# 320 descriptions fill two launches and begin a third; 20001 elements are three blocks.
@pytest.mark.parametrize("count", [1, 8, 320])
def test_one_launch_serves_many_tensors(emulated, count):
    sizes = [(0, 1, 3, 4, 1023, 1024, 20001, 8192)[i % 8] for i in range(count)]
    whole = [torch.randn(size + 2) for size in sizes]
    tensors = [x[i % 3 : i % 3 + size] for i, (x, size) in enumerate(zip(whole, sizes, strict=True))]
    expected = [x.clone() for x in whole]
    for i, (x, size) in enumerate(zip(expected, sizes, strict=True)):
        x[i % 3 : i % 3 + size].mul_(i).add_(0.5)
    emulated.decay_(tensors, 0.5)
    assert all(map(torch.equal, whole, expected))


@pytest.mark.parametrize("width", [0, 1, 31, 32, 255, 256, 257, 3000])
def test_reductions_over_a_block(emulated, width):
    x = torch.randint(-100, 100, (5, width)).float()  # whole numbers: sums are exact in any order
    x[2, -1:] = math.nan
    sums, largest = torch.empty(5), torch.empty(5)
    emulated.rows_(x, sums, largest)
    expected = torch.cat([x, torch.full((5, 1), -math.inf)], 1).amax(1)
    torch.testing.assert_close(sums, x.sum(1), rtol=0, atol=0, equal_nan=True)
    torch.testing.assert_close(largest, expected, rtol=0, atol=0, equal_nan=True)


@pytest.mark.parametrize(
    ("which", "message"),
    [
        ("misaligned", r"misaligned access at .*launch\.cuh.*thread 3"),
        ("missed barrier", r"waits at .*machinery\.cu:\d+ for threads that do not come there"),
        ("two barriers", r"threads 0 and 64 of a block wait at .*machinery\.cu:\d+ and"),
        ("part of a warp", "exchange without some of its threads"),
    ],
)
def test_a_fault_is_an_error(emulated, which, message):
    with pytest.raises(RuntimeError, match=message):
        emulated.fault(torch.zeros(THREADS), which)
    sums = torch.empty(1)  # the next launch is not disturbed
    emulated.rows_(torch.ones(1, 10), sums, sums.clone())
    assert sums == 10


def test_a_missing_barrier_shows_in_one_order_of_the_threads(emulated):
    x = torch.arange(float(THREADS))
    expected = x.roll(-1)
    emulated.fault(x.flip(0), "shift without barrier")  # what is left in shared memory, as in a GPU's
    emulated.fault(x, "shift without barrier")
    assert not torch.equal(x, expected)
