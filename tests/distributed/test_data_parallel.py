"""Replicas stay replicas: DistributedDataParallel and ZeroRedundancyOptimizer in real processes."""

import pytest

import replicas
from cases import FEW
from world import world

RANDOM = ["GaLoreAdamW, random, reset", "GaLoreAdamW, power, keep", "FRUGAL, columns", "FRUGAL, blocks"]
RANDOM += ["FRUGAL, random, bfloat16 moments", "GradNormLoRP, random, reset", "AdamW, bfloat16 moments"]
GALORE = "GaLoreAdamW, svd, rotate"


@pytest.mark.parametrize("name", ["GaLoreAdamW, random, reset", "FRUGAL, columns"])
@pytest.mark.parametrize("sampled", [False, True], ids=["", "LISA"])
def test_replicas_stay_the_same_bit_for_bit(name, sampled):
    assert world(2).run(replicas.replicas_agree, name, sampled, 30) == [([True], True)] * 2


@pytest.mark.slow
@pytest.mark.parametrize("name", list(dict.fromkeys(RANDOM + FEW)))
@pytest.mark.parametrize("sampled", [False, True], ids=["", "LISA"])
def test_replicas_stay_the_same_for_two_hundred_steps(name, sampled):
    assert world(2).run(replicas.replicas_agree, name, sampled, 200) == [([True] * 4, True)] * 2


def test_processes_that_share_a_refresh_arrive_at_the_basis_of_one():
    answers = world(2).run(replicas.refreshes_are_shared, GALORE, 6)
    assert all(same for same, _ in answers)
    (_, (first, alone)), (_, (second, again)) = answers
    assert alone == again == first + second
    assert abs(first - second) <= alone / 4


@pytest.mark.parametrize("name", [GALORE, "AdamP", "FRUGAL, columns"])
def test_a_zero_redundancy_optimizer_keeps_a_share_and_resumes(name):
    answers = world(2).run(replicas.redundancy_is_zero, name, 3)
    assert all(same for same, *_ in answers)
    (_, first, count, states), (_, second, *_) = answers
    assert first + second == count == states
    assert 0 < first < count
