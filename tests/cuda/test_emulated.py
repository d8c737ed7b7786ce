import pytest
import torch

from slimstate.ops._samples import all_samples


def has_kernel(name: str) -> bool:
    return torch._C._dispatch_has_kernel_for_dispatch_key(name, "CPU")


@pytest.mark.parametrize("sample", [*all_samples("cpu")], ids=str)
def test_cuda_kernels_agree_with_their_references(emulated, sample):
    if not torch._C._dispatch_has_kernel(f"slimstate_emulated::{sample.op}"):
        pytest.skip("an op in Python, which calls others")
    assert sample.agrees(emulated)


def test_every_op_has_a_cuda_kernel(emulated):
    schemas = [name for name in torch._C._dispatch_get_all_op_names() if name.startswith("slimstate_emulated::")]
    assert schemas and all(map(has_kernel, schemas))
