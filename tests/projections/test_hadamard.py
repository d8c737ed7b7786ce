import pytest
import scipy.linalg
import torch

from slimstate.ops.hadamard import powers_of_two
from slimstate.projections import Hadamard


@pytest.mark.parametrize("d", [1, 2, 4, 8, 64, 256, 1024])
def test_equals_scipy(d):
    expected = torch.from_numpy(scipy.linalg.hadamard(d)).double() / d**0.5
    q = Hadamard().transform(torch.eye(d).double())
    torch.testing.assert_close(q, expected, atol=1e-15, rtol=1e-14)
    every = torch.arange(d, dtype=torch.int32)
    torch.testing.assert_close(Hadamard()._rows(every, d, torch.float64), expected, atol=1e-15, rtol=1e-14)


@pytest.mark.parametrize(
    ("d", "sizes"),
    [(1, [1]), (3, [2, 1]), (12, [8, 4]), (97, [64, 32, 1]), (1376, [1024, 256, 64, 32]), (2048, [2048])],
)
def test_other_sizes_are_block_diagonal_with_their_binary_digits(d, sizes):
    assert [size for _, size in powers_of_two(d)] == sizes
    if d < 1000:
        expected = torch.block_diag(*(torch.from_numpy(scipy.linalg.hadamard(n)).double() / n**0.5 for n in sizes))
        q = Hadamard().transform(torch.eye(d).double())
        torch.testing.assert_close(q, expected, atol=1e-14, rtol=0)
        assert torch.equal(Hadamard().inverse(torch.eye(d).double()), q)


def test_small_integers_transform_exactly():
    m = torch.randint(-100, 100, (256, 5))
    expected = torch.from_numpy(scipy.linalg.hadamard(256)) @ m
    assert torch.equal(Hadamard().transform(m.float()) * 16, expected.float())


def test_the_input_is_left_alone():
    m = torch.randn(16, 20)
    kept = m.clone()
    projection = Hadamard(rank=8)
    projection.down(m, projection.fit(m, None, ()))
    projection.inverse(projection.transform(m))
    assert torch.equal(m, kept)
