import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from slimstate.projections import Coordinates

AXES = ["rows", "columns", "entries"]
SHAPES = [(6, 10), (10, 6), (7, 7), (5, 3, 2, 2)]


@given(d=st.integers(1, 80), k=st.integers(1, 40), rank=st.one_of(st.integers(1, 90), st.floats(0.01, 1)))
def test_indices_are_sorted_unique_int32_and_as_many_as_the_rank(d, k, rank):
    index = Coordinates(rank=rank).fit(torch.zeros(d, k), None, (0, 0, 0))
    assert index.dtype == torch.int32
    assert len(index) == min(rank if isinstance(rank, int) else max(1, int(rank * d)), d)
    assert (index.diff() > 0).all()
    assert 0 <= index[0] and index[-1] < d


@pytest.mark.parametrize("axis", AXES)
@pytest.mark.parametrize("shape", SHAPES)
def test_down_and_up_keep_the_chosen_and_zero_the_rest(shape, axis):
    projection = Coordinates(rank=0.4, axis=axis)
    x = torch.randn(shape)
    view = projection.view(shape)
    m = view.open(x)
    index = projection.fit(m, None, (0, 0, 0))
    assert index.shape == projection.shape_of(view)
    r = projection.down(m, index)
    assert torch.equal(r, m[index.long()])
    matrix = x.reshape(shape[0], -1)
    mask = torch.zeros_like(matrix)
    target = {"rows": mask, "columns": mask.mT, "entries": mask.view(-1)}[axis]
    target[index.long()] = 1
    assert torch.equal(view.close(projection.up(r, index, view.d)).reshape(matrix.shape), matrix * mask)


@pytest.mark.parametrize("axis", AXES)
@pytest.mark.parametrize("shape", SHAPES)
def test_views_close_to_the_parameters_shape(shape, axis):
    view = Coordinates(axis=axis).view(shape)
    x = torch.randn(shape)
    assert torch.equal(view.close(view.open(x)), x)


def test_rank_one_keeps_everything_in_order():
    m = torch.randn(9, 4)
    projection = Coordinates(rank=1.0)
    index = projection.fit(m, None, (0, 0, 0))
    assert torch.equal(index, torch.arange(9, dtype=torch.int32))
    assert torch.equal(projection.up(projection.down(m, index), index, 9), m)


def test_is_a_pure_function_of_seed_and_counter():
    m = torch.zeros(60, 4)
    fit = Coordinates(rank=20, seed=5).fit
    first = fit(m, None, (2, 3, 0))
    torch.manual_seed(77)
    before = torch.get_rng_state()
    assert torch.equal(fit(m + 1, first, (2, 3, 0)), first)
    assert torch.equal(torch.get_rng_state(), before)
    others = [fit(m, None, (2, 4, 0)), fit(m, None, (3, 3, 0)), Coordinates(rank=20, seed=6).fit(m, None, (2, 3, 0))]
    assert not any(torch.equal(first, other) for other in others)


def test_every_coordinate_is_chosen_equally_often():
    d, r, draws = 20, 5, 2000
    m = torch.zeros(d, 3)
    counts = torch.zeros(d)
    for i in range(draws):
        counts[Coordinates(rank=r).fit(m, None, (0, i, 0)).long()] += 1
    share = r / d
    # chi-squared, d - 1 = 19 degrees of freedom, of sampling without replacement: 43.8 has probability 1e-3
    chi2 = ((counts - draws * share) ** 2).sum() / (draws * share * (1 - share)) * (d - 1) / d
    assert chi2 < 43.8


def test_overlap_says_which_coordinates_stay():
    new, old = torch.tensor([1, 4, 6], dtype=torch.int32), torch.tensor([0, 4, 6], dtype=torch.int32)
    expected = torch.tensor([[0.0, 0, 0], [0, 1, 0], [0, 0, 1]])
    assert torch.equal(Coordinates(rank=3).overlap(new, old), expected)


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"axis": "diagonal"}, "axis must be one of rows, columns, entries, got 'diagonal'"),
        ({"side": "left"}, "side must be 'auto' for Coordinates"),
        ({"rank": 0}, "rank must be"),
    ],
)
def test_refuses_settings_out_of_range(settings, message):
    with pytest.raises(ValueError, match=message):
        Coordinates(**settings)


@given(d=st.integers(1, 60), rank=st.integers(1, 70), count=st.integers(0, 50))
def test_a_contiguous_choice_is_one_run_around_the_end(d, rank, count):
    index = Coordinates(rank=rank, contiguous=True).fit(torch.zeros(d, 2), None, (0, count, 0))
    r = min(rank, d)
    assert index.dtype == torch.int32
    assert len(index) == r
    gaps = (index.diff() != 1).sum().item()
    assert gaps == 0 or (gaps == 1 and index[0] == 0 and index[-1] == d - 1)


def test_every_index_is_equally_likely_in_a_run():
    d, r, draws = 12, 3, 2400
    projection = Coordinates(rank=r, contiguous=True)
    counts = torch.zeros(d)
    for count in range(draws):
        counts[projection.fit(torch.zeros(d, 1), None, (0, count, 0)).long()] += 1
    assert (counts / draws - r / d).abs().max() < 5 * (r / d * (1 - r / d) / draws) ** 0.5
