import pytest

from slimstate.ops.__main__ import MODULES

SAMPLES = [sample for module in MODULES for sample in module.samples("cpu")]


@pytest.mark.parametrize("sample", SAMPLES, ids=lambda sample: f"{sample.op} {sample.what}")
def test_cuda_kernels_agree_with_their_references(emulated, sample):
    assert sample.agrees(emulated)
