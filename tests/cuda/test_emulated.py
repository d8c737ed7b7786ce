import pytest
import torch

from slimstate.ops._samples import all_samples
from slimstate.ops.hadamard import MOST_ROWS_CUDA, hadamard_scores_reference

CPU_ONLY = {"hadamard_adam_"}  # on CUDA the separate ops of its family make the step


def has_kernel(name: str) -> bool:
    return torch._C._dispatch_has_kernel_for_dispatch_key(name, "CPU")


@pytest.mark.parametrize("sample", [*all_samples("cpu")], ids=str)
def test_cuda_kernels_agree_with_their_references(emulated, sample):
    if not torch._C._dispatch_has_kernel(f"slimstate_emulated::{sample.op}"):
        pytest.skip("an op in Python, which calls others")
    if sample.op in CPU_ONLY:
        pytest.skip("for the CPU only")
    assert sample.agrees(emulated)


def test_every_op_has_a_cuda_kernel(emulated):
    schemas = [name for name in torch._C._dispatch_get_all_op_names() if name.startswith("slimstate_emulated::")]
    without = {name.removeprefix("slimstate_emulated::") for name in schemas if not has_kernel(name)}
    assert schemas and without == CPU_ONLY


def test_more_rows_than_python_gives_them_are_refused(emulated):
    most = MOST_ROWS_CUDA
    emulated.hadamard_scores_(torch.empty(most), torch.ones(most, 1), None, 1)
    with pytest.raises(RuntimeError, match=f"at most {most} rows, got {most + 1}"):
        emulated.hadamard_scores_(torch.empty(most + 1), torch.ones(most + 1, 1), None, 1)


@pytest.mark.parametrize("norm", [1, 2])
@pytest.mark.parametrize("exponent", [-120, -60, 60, 100])
def test_scores_of_scaled_matrices_are_in_one_order(emulated, norm, exponent):
    m, scores, scaled = torch.randn(96, 40), torch.empty(96), torch.empty(96)
    emulated.hadamard_scores_(scores, m, None, norm)
    emulated.hadamard_scores_(scaled, m * 2.0**exponent, None, norm)
    assert torch.equal(scores.argsort(stable=True), scaled.argsort(stable=True))


@pytest.mark.slow
@pytest.mark.parametrize("norm", [1, 2])
def test_blocks_that_measure_several_tiles_sum_all_columns(emulated, norm):
    m, scores = torch.randn(8192, 300), torch.empty(8192)
    emulated.hadamard_scores_(scores, m, None, norm)
    torch.testing.assert_close(scores, hadamard_scores_reference(m, norm, torch.ones(())))
