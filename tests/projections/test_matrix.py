import math

import pytest
import torch

from slimstate.projections import matrix_view

# shape, batch_dims, (d, k) of side="left"
SHAPES = [
    ((5, 9), 0, (5, 9)),
    ((9, 5), 0, (9, 5)),
    ((6, 6), 0, (6, 6)),
    ((1, 7), 0, (1, 7)),
    ((8, 3, 2, 2), 0, (8, 12)),
    ((4, 3, 5, 5), 0, (4, 75)),
    ((3, 5, 9), 1, (5, 9)),
    ((3, 9, 5), 1, (9, 5)),
    ((3, 5, 3, 3), 1, (5, 9)),
    ((2, 3, 9, 5), 2, (9, 5)),
]
SIDES = ["auto", "left", "right", "reverse"]
cases = pytest.mark.parametrize(("shape", "batch_dims", "left"), SHAPES)


@cases
@pytest.mark.parametrize("side", SIDES)
def test_open_puts_the_compressed_axis_first(shape, batch_dims, left, side):
    rows, columns = left
    short, long = sorted(left)
    sides = {"left": (rows, columns), "right": (columns, rows), "auto": (short, long), "reverse": (long, short)}
    view = matrix_view(shape, side, batch_dims)
    lead = (math.prod(shape[:batch_dims]),) if batch_dims else ()
    assert (view.d, view.k) == sides[side]
    assert view.lead == lead
    assert (view.rows, view.columns) == left
    m = view.open(torch.randn(shape))
    assert m.shape == (*lead, *sides[side])


@cases
@pytest.mark.parametrize("side", SIDES)
def test_open_and_close_are_inverse_whatever_the_memory_layout(shape, batch_dims, left, side):
    view = matrix_view(shape, side, batch_dims)
    x = torch.randn(shape)
    layouts = [x, x.mT.contiguous().mT, torch.stack([x, x], dim=-1)[..., 0]]
    if len(shape) == 4:
        layouts.append(x.to(memory_format=torch.channels_last))
    opened = view.open(x)
    assert torch.equal(opened.flatten().sort().values, x.flatten().sort().values)
    for y in layouts:
        assert torch.equal(view.open(y), opened)
        assert torch.equal(view.close(view.open(y)), x)


@cases
def test_open_is_a_view_of_contiguous_memory(shape, batch_dims, left):
    x = torch.randn(shape)
    for side in SIDES:
        assert matrix_view(shape, side, batch_dims).open(x).data_ptr() == x.data_ptr()


@cases
@pytest.mark.parametrize("side", SIDES)
def test_members_are_the_matrices_in_the_parameters_memory(shape, batch_dims, left, side):
    view = matrix_view(shape, side, batch_dims)
    x = torch.randn(shape)
    members = view.members(x)
    opened = view.open(x) if view.lead else view.open(x)[None]
    single = matrix_view(shape[batch_dims:], side)
    assert len(members) == math.prod(shape[:batch_dims])
    for member, m in zip(members, opened, strict=True):
        assert member.shape == shape[batch_dims:]
        assert member.untyped_storage().data_ptr() == x.untyped_storage().data_ptr()
        assert torch.equal(single.open(member), m)


def test_left_is_the_matrix_and_right_its_transpose():
    x = torch.arange(15.0).view(3, 5)
    assert torch.equal(matrix_view((3, 5), "left").open(x), x)
    assert torch.equal(matrix_view((3, 5), "right").open(x), x.mT)


@pytest.mark.parametrize(("shape", "auto"), [((5, 9), "left"), ((9, 5), "right"), ((6, 6), "right")])
def test_auto_takes_the_shorter_side_and_the_columns_of_a_square(shape, auto):
    opposite = {"left": "right", "right": "left"}
    assert matrix_view(shape, "auto") == matrix_view(shape, auto)
    assert matrix_view(shape, "reverse") == matrix_view(shape, opposite[auto])


@pytest.mark.parametrize(
    ("shape", "side", "batch_dims", "message"),
    [
        ((5, 9), "up", 0, "side must be one of auto, left, right, reverse, got 'up'"),
        ((5,), "auto", 0, "at least 2 axes"),
        ((), "auto", 0, "at least 2 axes"),
        ((5, 9), "auto", 1, r"at least 3 axes \(batch_dims=1\)"),
    ],
)
def test_refuses_what_is_no_matrix(shape, side, batch_dims, message):
    with pytest.raises(ValueError, match=message):
        matrix_view(shape, side, batch_dims)
