"""Blocks of 8-bit moments never go from row to row: divided parameters have the codes of whole ones."""

import coded
import pytest
import torch

import sharded
from cases import CASES
from world import world

EXACT = ["AdamW8bit", "AdamW, companded moments", "FRUGAL, columns, 8-bit moments"]  # which sum nothing over processes


@pytest.mark.parametrize(
    ("name", "allowed"),
    [*((name, 1e-12) for name in EXACT), ("GaLoreAdamW8bit", 0.02)],  # a last bit of a sum may decide a code
)
def test_shards_train_as_the_whole(name, allowed):
    assert name in CASES
    for of_distance, _ in world(2).run(sharded.equal_to_one_process, name, 0, torch.float64, 10, coded.SHAPES):
        assert of_distance < allowed


@pytest.mark.parametrize("name", EXACT)
@pytest.mark.parametrize("after", [1, 3])
def test_fewer_or_more_processes_have_the_codes_that_were_saved_and_go_on_with_them(tmp_path, name, after):
    world(2).run(coded.saved, name, tmp_path)
    for found in world(after).run(coded.resumed, name, tmp_path):
        assert found == ([], [])


def test_blocks_that_processes_cut_are_refused_with_what_to_use():
    message = (
        "moment_dtype='8bit' keeps moments in blocks along rows, which processes divide of a parameter of shape "
        "(64, 300), S(1): use moment_dtype='bfloat16' for it, or shard dim 0 (shard_placement_fn of "
        "fully_shard)"
    )
    for built, added, stepped, held in world(2).run(coded.refused):
        assert built == added == ("ValueError", message)
        assert stepped == ("ValueError", message)
        assert not held
