"""FRUGAL, DCTAdamW and GradNormLoRP, divided over processes: the training of one, few messages, clear refusals."""

from functools import partial

import pytest
import torch

import sharded
import subspaces
from cases import CASES
from world import world

FEW_SHAPES = [(12, 20), (20, 12), (2, 9), (9, 2), (7,)]  # of which some process of three has nothing
EVEN_SHAPES = [shape if len(shape) < 3 else (4, 6, 3, 3) for shape in sharded.SHAPES]
STACKS = [(5, 6, 8), (2, 8, 6)]

# What selects coordinates takes those that are not divided: columns where rows are, rows where columns are.
UNDIVIDED = {0: "columns", 1: "rows"}
SIDES = {0: "right", 1: "left"}  # so that the compressed side is whole

QUICK = [
    ("FRUGAL, columns", 0, {}),
    ("FRUGAL, entries, lion, none", 1, {"projection": "rows"}),
    ("FRUGAL, svd, sgdm, sgd", 0, {"outer": "sign"}),
    ("FRUGAL, svd, sgdm, sgd", 1, {}),
    *(("GaLoreAdamW, power, rotate, basis in 8 bits", dim, {}) for dim in (0, 1)),
    ("GradNormLoRP, svd, rotate, basis in 16 bits", 1, {}),
    *((f"DCTAdamW, {how}", dim, {}) for how in ("every third", "hadamard, errors") for dim in (0, 1)),
    *((f"GradNormLoRP, {how}", dim, {}) for how in ("svd, rotate", "random, reset") for dim in (0, 1)),
]


def coordinates(name):
    return name.startswith("FRUGAL") and any(way in name for way in ("columns", "rows", "entries"))


def differences(processes, name, dim, dtype, steps, shapes, **settings):
    """Over the distance moved, and over the weights' length."""
    answers = world(processes).run(partial(sharded.equal_to_one_process, **settings), name, dim, dtype, steps, shapes)
    return [max(each) for each in zip(*answers, strict=True)]


@pytest.mark.parametrize(("name", "dim", "settings"), QUICK)
def test_three_processes_train_as_one_where_some_hold_nothing(name, dim, settings):
    assert differences(3, name, dim, torch.float64, 7, FEW_SHAPES, **settings)[0] < 1e-9


@pytest.mark.slow
@pytest.mark.parametrize("processes", [2, 3])
@pytest.mark.parametrize("dim", [0, 1])
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32])
@pytest.mark.parametrize(
    "name", [name for name in CASES if name.startswith(("FRUGAL", "DCT", "GradNorm")) and "bit" not in name]
)
def test_processes_train_as_one_for_fifty_steps(name, dim, processes, dtype):
    settings = {"projection": UNDIVIDED[dim]} if coordinates(name) else {}
    shapes = EVEN_SHAPES if dim and processes == 3 else sharded.SHAPES
    of_distance, of_length = differences(processes, name, dim, dtype, 50, shapes, **settings)
    if dtype == torch.float64:
        assert of_distance < 1e-9
    elif name.startswith("GradNormLoRP"):
        assert of_length < 1e-4  # dV has near ties: gradients off by their last bit take one process 4e-5 away
    else:
        assert of_length < 4e-6


@pytest.mark.parametrize(
    "name",
    [
        "FRUGAL, entries, lion, none",
        "FRUGAL, svd, sgdm, sgd",
        "FRUGAL, svd, basis in 8 bits",
        "DCTAdamW, every third",
        "DCTAdamW, every step",
    ],
)
def test_stacks_whose_matrices_lie_with_different_processes_train_as_in_one(name):
    assert differences(3, name, 0, torch.float64, 7, STACKS, batch_dims=1)[0] < 1e-9


@pytest.mark.parametrize("dim", [0, 1, 2])
@pytest.mark.parametrize("name", ["GradNormLoRP, svd, rotate", "DCTAdamW, hadamard, errors"])
def test_stacks_train_as_in_one_process_along_whichever_dimension_they_are_divided(name, dim):
    assert differences(3, name, dim, torch.float64, 7, STACKS, batch_dims=1)[0] < 1e-9


@pytest.mark.parametrize(("shapes", "batch_dims"), [([(12, 20), (20, 12), (9, 2)], 0), (STACKS, 1)])
def test_bases_that_are_divided_may_be_kept_in_fewer_bytes_and_again_in_more(shapes, batch_dims):
    forms = [None, "8bit", "8bit", None, "bfloat16", "8bit"]
    assert max(world(2).run(subspaces.with_smaller_bases, forms, shapes, batch_dims)) < 1e-9


@pytest.mark.parametrize("bits", ["8-bit", "4-bit"])
@pytest.mark.parametrize("dim", [0, 1])
def test_errors_are_rounded_as_in_one_process(bits, dim):
    name = f"DCTAdamW, {bits} errors"
    assert differences(3, name, dim, torch.float64, 7, FEW_SHAPES, side=SIDES[dim])[0] < 1e-9


@pytest.mark.parametrize("dim", [0, 1])
def test_all_processes_choose_the_same_columns_and_count_their_ages_alike(dim):
    shapes, keys = [(12, 20), (20, 12), (2, 9), (9, 2)], ("index", "ages")
    first, *others = world(3).run(subspaces.kept, "DCTAdamW, every step", dim, shapes, 5, {}, keys)
    for other in others:
        for mine, its in zip(first, other, strict=True):
            assert all(torch.equal(mine[key], its[key]) for key in keys)


def test_all_processes_keep_the_same_lengths_of_rows_whose_columns_are_divided():
    shapes, keys = [(12, 20), (20, 12), (9, 2)], ("lengths", "lengths_avg", "lengths_avg_sq")
    first, *others = world(3).run(subspaces.kept, "GradNormLoRP, svd, rotate", 1, shapes, 5, {}, keys)
    for other in others:
        for mine, its in zip(first, other, strict=True):
            assert all(torch.equal(mine[key], its[key]) for key in keys)


TALL, WIDE, SELDOM = [(20, 12), (13, 9)], [(12, 20), (9, 13)], {"update_proj_gap": 100}


@pytest.mark.parametrize(
    ("name", "dim", "shapes", "settings", "expected"),
    [
        ("FRUGAL, columns", 0, TALL + WIDE, SELDOM, 0),
        ("FRUGAL, runs of rows", 1, TALL + WIDE, SELDOM, 0),
        ("FRUGAL, svd, sgdm, sgd", 0, TALL, SELDOM, 0),
        ("FRUGAL, svd, sgdm, sgd", 0, WIDE, SELDOM, 1),
        ("DCTAdamW, every third", 0, TALL, SELDOM, 0),
        ("DCTAdamW, every third", 0, WIDE, SELDOM, 1),
        ("DCTAdamW, every step", 0, TALL, {}, 2),
        ("DCTAdamW, hadamard, errors", 0, TALL, {}, 2),
        ("GradNormLoRP, svd, rotate", 0, TALL, SELDOM, 0),
        ("GradNormLoRP, svd, rotate", 0, WIDE, SELDOM, 1),
        ("GradNormLoRP, svd, rotate", 1, WIDE, SELDOM, 2),
        ("GradNormLoRP, svd, rotate", 1, TALL, SELDOM, 3),
    ],
)
def test_a_step_without_refreshes_sends_no_more_messages_than_said(name, dim, shapes, settings, expected):
    for counts in world(2).run(subspaces.messages, name, dim, shapes, 3, settings):
        assert counts[0] > 0
        assert counts[1:] == [expected] * 2


@pytest.mark.parametrize(
    ("name", "dim", "settings", "advice"),
    [
        ("FRUGAL, columns", 1, {}, "projection='rows'"),
        ("FRUGAL, runs of rows", 0, {}, "projection='columns'"),
        ("FRUGAL, entries, lion, none", 0, {}, "projection='columns'"),
        ("FRUGAL, entries, lion, none", 1, {}, "projection='rows'"),
        ("DCTAdamW, 8-bit errors", 0, {}, "error_feedback='param'"),
        ("DCTAdamW, 4-bit errors", 1, {"side": "right"}, "error_feedback='param'"),
    ],
)
def test_what_selects_or_rounds_along_a_divided_dimension_is_refused(name, dim, settings, advice):
    for message, groups in world(2).run(subspaces.refusal, name, dim, settings):
        assert advice in message
        assert "shard_placement_fn" in message
        assert groups == 1
