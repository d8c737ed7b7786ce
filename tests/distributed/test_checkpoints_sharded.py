"""Checkpoints of divided parameters: saved by some processes, and loaded by as many, by fewer or by more."""

import pytest
import torch

import resharding
from world import world

ALWAYS = ["GaLoreAdamW, svd, rotate", "FRUGAL, columns"]
NAMES = ["AdamW", "AdamP", "SGDP", "GaLoreAdamW, power, keep", "GaLoreAdamW, random, reset", "FRUGAL, svd, sgdm, sgd"]
NAMES += ["GaLoreAdafactor, beta1", "GradNormLoRP, svd, rotate", "DCTAdamW, every third", "DCTAdamW, hadamard, errors"]
every = pytest.mark.parametrize("name", [*ALWAYS, *(pytest.param(name, marks=pytest.mark.slow) for name in NAMES)])


def assert_equal(ends, others):
    for a, b in zip(ends, others, strict=True):
        assert torch.equal(a, b)


def assert_close(ends, others):
    """To 1e-9 of the weights' norm, in float64."""
    for a, b in zip(ends, others, strict=True):
        assert (a - b).norm() < 1e-9 * a.norm()


def passed_on(tmp_path, name, before, after, later=False):
    """The weights of those who went on, and of those who loaded."""
    ends = world(before).run(resharding.saved, name, tmp_path, later)[0]
    others = world(after).run(resharding.resumed, name, tmp_path)
    for other in others:
        assert_equal(other, others[0])
    return ends, others[0]


@every
def test_as_many_processes_resume_bit_for_bit(tmp_path, name):
    assert_equal(*passed_on(tmp_path, name, 2, 2))


@every
def test_a_checkpoint_is_saved_while_training_goes_on(tmp_path, name):
    assert_equal(*passed_on(tmp_path, name, 2, 2, later=True))


@every
@pytest.mark.parametrize(("before", "after"), [(2, 1), (1, 2)])
def test_fewer_or_more_processes_resume(tmp_path, name, before, after):
    assert_close(*passed_on(tmp_path, name, before, after))


@pytest.mark.slow
@every
@pytest.mark.parametrize(("before", "after"), [(2, 3), (2, 4), (3, 2), (4, 1)])
def test_any_number_of_processes_resumes(tmp_path, name, before, after):
    assert_close(*passed_on(tmp_path, name, before, after))


@every
def test_a_whole_state_dict_goes_to_one_file_and_back(name):
    (ends, others, alone), (_, second) = world(2).run(resharding.through_one_file, name)
    assert_equal(ends, others)
    assert_equal(ends, second)
    assert_close(ends, alone)


@every
def test_each_process_can_save_what_it_holds(name):
    for ends, others in world(2).run(resharding.through_own_files, name):
        assert_equal(ends, others)


@every
def test_state_bytes_are_what_a_process_holds(name):
    """Together the processes hold the whole state once, and again what each of them has all of."""
    answers = world(2).run(resharding.held, name)
    (_, shared, whole, report), _ = answers
    assert sum(size for size, *_ in answers) == whole + shared
    assert report is None or f"state in total: {whole:,} B" in report
