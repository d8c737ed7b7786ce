import pytest
import torch

from slimstate import ops
from slimstate.ops import hadamard_adam_, hadamard_down, hadamard_scores, hadamard_write_back_
from slimstate.ops.hadamard import (
    hadamard_down_reference,
    hadamard_scores_reference,
    hadamard_transform_reference,
    hadamard_write_back_reference_,
)
from slimstate.optim import DCTAdamW

compiled = pytest.mark.skipif(not ops.COMPILED, reason="nothing was compiled")


def indices(d, rank):
    return torch.randperm(d)[:rank].sort().values.int()


def test_it_is_its_own_inverse():
    x = torch.randn(1376, 9)
    torch.testing.assert_close(hadamard_transform_reference(hadamard_transform_reference(x)), x)


@pytest.mark.parametrize("norm", [1, 2])
@pytest.mark.parametrize("exponent", [-120, -60, 60, 100])
def test_scores_of_scaled_matrices_are_in_one_order(norm, exponent):
    m = torch.randn(96, 40)
    expected = hadamard_scores(m, norm).sort(stable=True).indices
    assert torch.equal(hadamard_scores(m * 2.0**exponent, norm).sort(stable=True).indices, expected)


@compiled
@pytest.mark.parametrize("shape", [(512, 700), (100, 33)])
def test_threads_do_not_matter(shape):
    m, index = torch.randn(shape), indices(shape[0], 20)
    results = []
    threads = torch.get_num_threads()
    try:
        for count in (1, 2, 3):
            torch.set_num_threads(count)
            w = torch.ones(shape)
            r = hadamard_down(m, index)
            hadamard_write_back_(w, index, r, alpha=0.5, beta=0.9)
            results.append((hadamard_scores(m, 1), hadamard_scores(m, 2), r, w))
    finally:
        torch.set_num_threads(threads)
    for other in results[1:]:
        assert all(torch.equal(a, b) for a, b in zip(results[0], other, strict=True))


def test_columns_in_pieces_equal_the_whole():
    m, index = torch.randn(200, 50), indices(200, 30)
    pieces = [hadamard_down(m[:, s], index) for s in (slice(0, 7), slice(7, 39), slice(39, 50))]
    assert torch.equal(torch.cat(pieces, 1), hadamard_down(m, index))


@pytest.mark.parametrize("bad", [torch.zeros(16, 4), torch.full((16, 4), torch.nan), torch.full((16, 4), torch.inf)])
def test_a_gradient_that_says_nothing_keeps_its_columns(bad):
    w, index, ages = torch.ones(16, 4), torch.tensor([2, 5], dtype=torch.int32), torch.ones(2, dtype=torch.int32)
    moments = torch.ones(2, 4), torch.ones(2, 4)
    settings = {"norm": 1, "carry": True, "alpha": 0.1, "beta": 1.0, "betas": (0.9, 0.99), "eps": 1e-8}
    hadamard_adam_([w], [bad], [moments[0]], [moments[1]], [ages], [index], **settings)
    assert index.tolist() == [2, 5] and ages.tolist() == [2, 2]


def test_of_equal_rows_the_first_are_chosen():
    w, g, index = torch.zeros(8, 3), torch.zeros(8, 3), torch.tensor([6, 7], dtype=torch.int32)
    g[0] = 1  # all rows of its transform are the same
    moments, ages = (torch.zeros(2, 3), torch.zeros(2, 3)), torch.zeros(2, dtype=torch.int32)
    settings = {"norm": 2, "carry": True, "alpha": 0.1, "beta": 1.0, "betas": (0.9, 0.99), "eps": 1e-8}
    hadamard_adam_([w], [g], [moments[0]], [moments[1]], [ages], [index], **settings)
    assert index.tolist() == [0, 1]


@pytest.mark.parametrize("by_columns", [False, True])
def test_columns_longer_than_the_samples_agree_too(by_columns):
    m, index = torch.randn(16384, 3), indices(16384, 100)
    m = m.mT.contiguous().mT if by_columns else m
    w, r = m.clone(), hadamard_down(m, index)
    expected = w.clone()
    hadamard_write_back_(w, index, r, alpha=-0.5, beta=0.9)
    hadamard_write_back_reference_(expected, index, r, alpha=-0.5, beta=0.9)
    assert torch.equal(r, hadamard_down_reference(m, index)) and torch.equal(w, expected)
    torch.testing.assert_close(hadamard_scores(m, 1), hadamard_scores_reference(m, 1, torch.ones(())))


@compiled
def test_unsorted_indices_are_refused():
    with pytest.raises(RuntimeError, match="sorted"):
        hadamard_down(torch.randn(8, 3), torch.tensor([3, 1], dtype=torch.int32))


def test_bad_input_is_refused():
    m = torch.randn(8, 3)
    with pytest.raises(TypeError, match="float32"):
        hadamard_scores(m.double(), 1)
    with pytest.raises(ValueError, match="norm"):
        hadamard_scores(m, 3)
    with pytest.raises(TypeError, match="int32"):
        hadamard_down(m, torch.tensor([1]))
    with pytest.raises(ValueError, match="shape"):
        hadamard_write_back_(m, indices(8, 2), torch.ones(3, 3), alpha=1.0, beta=1.0)


@compiled
def test_a_backward_that_saved_the_weight_raises():
    w = torch.randn(8, 3, requires_grad=True)
    loss = (w * w).sum()
    with torch.no_grad():
        hadamard_write_back_(w, indices(8, 2), torch.ones(2, 3), alpha=1.0, beta=1.0)
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        loss.backward()


@pytest.mark.parametrize("shape", [(48, 80), (80, 48), (3, 40, 24)])
@pytest.mark.parametrize("gap", [1, 3])
@pytest.mark.parametrize("transport", ["rotate", "keep"])
def test_the_step_in_one_pass_follows_the_separate_ones(shape, gap, transport):
    settings = {"lr": 0.01, "rank": 10, "projection": "hadamard", "update_proj_gap": gap, "transport": transport}
    start = torch.randn(shape)
    # A weight whose memory has no gaps but another order takes the separate ops.
    whole = torch.nn.Parameter(start.clone())
    apart = torch.nn.Parameter(start.clone())
    optimizers = [DCTAdamW([p], batch_dims=len(shape) - 2, **settings) for p in (whole, apart)]
    for _ in range(5):
        g = torch.randn(shape)
        whole.grad, apart.grad = g, torch.stack([g, g], -1)[..., 0]  # whose rows are not contiguous
        for optimizer in optimizers:
            optimizer.step()
    torch.testing.assert_close(whole, apart)
    assert torch.equal(*(o.state[p]["index"] for o, p in zip(optimizers, (whole, apart), strict=True)))
