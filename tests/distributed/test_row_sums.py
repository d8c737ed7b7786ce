"""AdamP, SGDP and GaLoreAdafactor on parameters that are divided: sums over rows and columns of whole matrices."""

import pytest
import torch

import row_sums
import sharded
from cases import CASES
from world import world

TANGENT = [name for name in CASES if name.startswith(("AdamP", "SGDP"))]
ADAFACTOR = [name for name in CASES if name.startswith("GaLoreAdafactor")]
NAMES = TANGENT + ADAFACTOR
EVEN = [shape if len(shape) < 4 else (6, 3, 3, 3) for shape in sharded.SHAPES]  # 3 processes divide its columns
STACKS = [(4, 6, 10), (3, 9, 4), (2, 5)]
slow = pytest.mark.slow


def differences(n, *args, **settings):
    """The largest over all processes: of weights over the distance moved, over their norm, and of the state."""
    return torch.tensor(world(n).run(row_sums.run_differences, args, settings)).amax(0).tolist()


@pytest.mark.parametrize("n", [2, pytest.param(3, marks=slow)])
@pytest.mark.parametrize("dim", [0, 1])
@pytest.mark.parametrize("name", NAMES)
def test_shards_train_as_the_whole(name, dim, n):
    shapes = EVEN if n == 3 else sharded.SHAPES
    moved, _, kept = differences(n, name, [dim], torch.float64, 50, shapes)
    assert moved < 1e-9
    assert kept < 1e-9


@pytest.mark.parametrize("n", [2, pytest.param(3, marks=slow)])
@pytest.mark.parametrize("dim", [0, 1])
@pytest.mark.parametrize("name", [name for name in NAMES if "bfloat16" not in name])  # what is drawn differs by part
def test_in_single_precision_shards_train_as_the_whole_up_to_rounding(name, dim, n):
    shapes = EVEN if n == 3 else sharded.SHAPES
    assert differences(n, name, [dim], torch.float32, 20 if n == 2 else 50, shapes)[1] < 1e-6


@pytest.mark.parametrize("dim", [0, 1])
@pytest.mark.parametrize("side", ["rows", "layer", "most rows"])
@pytest.mark.parametrize("name", ["AdamP", "SGDP"])
def test_views_fire_on_shards_where_they_fire_on_the_whole(name, side, dim):
    settings = {"weight_decay": 0.1, "delta": 0.01}
    args = (name, [dim], torch.float64, 10, [(12, 20), (13, 9), (6, 4, 3, 3)], side)
    assert differences(2, *args, **settings)[0] < 1e-9
    fired = row_sums.fires(name, side, settings)
    assert fired == {"rows": "channel", "layer": "layer", "most rows": "none"}[side]


@pytest.mark.parametrize("side", ["auto", "reverse"])
@pytest.mark.parametrize("dim", [0, 1])
@pytest.mark.parametrize("name", ["AdamP", *ADAFACTOR])
def test_a_process_without_rows_or_columns_takes_part(name, dim, side):
    settings = {"side": side, "rank": 0.5} if name in ADAFACTOR else {}
    moved, _, kept = differences(2, name, [dim], torch.float64, 6, [(1, 8), (8, 1), (3, 8), (1,)], **settings)
    assert moved < 1e-9
    assert kept < 1e-9


@pytest.mark.parametrize("dim", [0, 1, 2])
@pytest.mark.parametrize("settings", [{"rank": 2}, {"rank": 2, "side": "reverse"}], ids=["auto", "reverse"])
@pytest.mark.parametrize("scale_parameter", [True, False])
def test_each_matrix_of_a_divided_stack_has_its_own_statistics(dim, settings, scale_parameter):
    settings = {"batch_dims": 1, "scale_parameter": scale_parameter, "weight_decay": 0.1} | settings
    moved, _, kept = differences(2, "GaLoreAdafactor, beta1", [dim], torch.float64, 6, STACKS, **settings)
    assert moved < 1e-9
    assert kept < 1e-9


@pytest.mark.parametrize("dim", [0, 1])
@pytest.mark.parametrize("side", ["auto", "reverse"])
def test_a_step_is_clipped_by_the_length_of_all_its_parts(side, dim):
    args = ("GaLoreAdafactor", [dim], torch.float64, 6, [(12, 20), (13, 9), (7,)])
    assert differences(2, *args, side=side, clip_threshold=0.3)[0] < 1e-9


@slow
@pytest.mark.parametrize("dims", [(0, 1), (1, 0), (0, 0)])
@pytest.mark.parametrize("name", NAMES)
def test_rows_and_columns_may_both_be_divided(name, dims):
    for shapes, settings in ((sharded.SHAPES, {}), ([*STACKS, (9, 13)], {"batch_dims": 1, "rank": 2})):
        if "batch_dims" not in settings or name in ADAFACTOR:
            moved, _, kept = differences(4, name, dims, torch.float64, 10, shapes, **settings)
            assert moved < 1e-9
            assert kept < 1e-9


@pytest.mark.parametrize("name", ["AdamP", "GaLoreAdafactor, relative step, reset"])
def test_compiled_steps_of_shards_are_those_of_the_whole(name):
    moved, _, kept = differences(2, name, [0], torch.float64, 4, [(6, 10), (9, 4), (5,)], "any", "eager")
    assert moved < 1e-9
    assert kept < 1e-9


def sent(name, dim, shapes, **settings):
    """Numbers (4 bytes) in each message of a step."""
    each = world(2).run(row_sums.run_messages, (name, [dim], shapes), settings)
    assert each[0] == each[1]
    assert all(operator == "c10d::allreduce_" for operator, _ in each[0])
    return [size / 4 for _, size in each[0]]


@pytest.mark.parametrize("name", ["AdamP", "SGDP"])
def test_the_views_of_all_matrices_take_one_message_of_five_numbers_each(name):
    shapes = [(12, 20), (13, 9), (6, 4, 3, 3), (7,)]
    assert sent(name, 0, shapes) == [5 * 3]
    assert sent(name, 0, shapes, layer_view=False) == [3]
    assert sent(name, 1, shapes[:3]) == [4 * (12 + 13 + 6)]
    assert sent(name, 0, shapes, delta=0.0) == []


def test_statistics_and_clipping_of_all_matrices_take_one_message():
    name, r, projected, dense = "GaLoreAdafactor", 3, [(12, 20), (20, 12)], [(13, 9), (7,)]
    settings = {"rank": r, "update_proj_gap": 200}
    for scaled in (0, 1):  # numbers for RMS(W)
        common = settings | {"scale_parameter": bool(scaled)}
        rows = [20 * r + scaled, 2 * r + scaled]  # of (12, 20) the compressed axis is divided: R
        columns = [2 * r + scaled, 20 * r + scaled]
        assert sent(name, 0, projected, **common) == [sum(rows)]
        assert sent(name, 1, projected, **common) == [sum(columns)]
        assert sent(name, 0, projected, dense=dense, **common) == [sum(rows) + 2 * 9 + 2 * 1 + 2 * (1 + scaled)]
        assert sent(name, 1, projected, dense=dense[:1], **common) == [sum(columns) + 2 * 13 + scaled]
