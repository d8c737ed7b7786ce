"""Divided over processes, every optimizer does what it does in one."""

import pytest
import torch

import sharded
from cases import CASES
from world import world


@pytest.mark.parametrize("name", ["AdamW", "GaLoreAdamW, svd, rotate", "GaLoreAdamW, power, keep", "FRUGAL, columns"])
def test_shards_train_as_the_whole(name):
    assert name in CASES
    for of_distance, _ in world(2).run(sharded.equal_to_one_process, name, 0, torch.float64):
        assert of_distance < 1e-9
    for _, of_length in world(2).run(sharded.equal_to_one_process, name, 0, torch.float32):
        assert of_length < 1e-6
