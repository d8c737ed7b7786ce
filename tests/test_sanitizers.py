"""The kernels compiled with the sanitizers of addresses and undefined behaviour, in processes of their own."""

import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

import building

ROOT = Path(__file__).parents[1]
pytestmark = pytest.mark.slow


@pytest.fixture(scope="module")
def folder(request: pytest.FixtureRequest) -> Path:
    return request.config.cache.mkdir("built")


@pytest.fixture(scope="module")
def package(folder: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A copy of the package with its extension so compiled."""
    path = tmp_path_factory.mktemp("sanitized")
    ignored = shutil.ignore_patterns("__pycache__", "_C.*")
    for source, target in {"csrc/python": "", "optim": "optim", "projections": "projections"}.items():
        shutil.copytree(ROOT / source, path / "slimstate" / target, ignore=ignored)
    shutil.copy(building.sanitized_extension(folder), path / "slimstate" / "_C.abi3.so")
    return path


def sanitized(package: Path, *arguments: str) -> subprocess.CompletedProcess:
    environment = {"PYTHONPATH": str(package), "SLIMSTATE_TEST_SANITIZED": "1", "OMP_NUM_THREADS": "2"}
    environment |= building.sanitizer_environment()
    command = [sys.executable, *arguments]
    return subprocess.run(command, cwd=ROOT, env=os.environ | environment, capture_output=True, text=True, check=False)


# What starts compilers or other processes, is about chance alone, or is meant to fail here.
LEFT_OUT = ("compiles", "self_check", "random_bits", "independent", "avalanche", "unbiased", "a_fault_is_an_error")


def test_the_ops_tests_pass(package):
    files = [*ROOT.glob("tests/test_*op*.py"), *ROOT.glob("tests/ops/test_*.py"), *ROOT.glob("tests/cuda/test_*.py")]
    options = ["-q", "-x", "-p", "no:xdist", "-k", f"not ({' or '.join(LEFT_OUT)})"]
    options.append("--capture=sys")  # the sanitizers report past sys.stderr
    result = sanitized(package, "-m", "pytest", *options, *map(str, sorted(files)))
    assert result.returncode == 0, result.stdout + result.stderr
    assert " passed" in result.stdout


def test_what_is_tested_is_that_copy(package):
    code = "import slimstate._C; print(slimstate._C.__file__)"
    assert sanitized(package, "-c", code).stdout.strip() == str(package / "slimstate" / "_C.abi3.so")


@pytest.mark.parametrize(
    ("which", "report"),
    [
        ("past the end", "AddressSanitizer: heap-buffer-overflow"),
        ("past shared memory", "machinery.cu:.* runtime error: index 256 out of bounds"),
        ("misaligned", "launch.cuh:.* runtime error: .*misaligned address"),
    ],
)
def test_a_fault_is_seen(package, folder, which, report):
    library = building.emulator(folder, sanitized=True)
    code = f"""
import torch
torch.ops.load_library({str(library)!r})
ops, x = torch.ops.slimstate_emulated, torch.ones(256)
ops.rows_(x.view(2, 128), sums := torch.empty(2), torch.empty(2))
print(sums.tolist(), flush=True)
ops.fault(x, {which!r})"""
    result = sanitized(package, "-c", code)
    assert result.stdout.strip() == "[128.0, 128.0]", result.stderr
    assert result.returncode != 0 and re.search(report, result.stderr), result.stderr
