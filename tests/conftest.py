import ctypes
import os
from collections.abc import Iterator
from types import ModuleType

import hypothesis
import pytest
import torch

import emulator
from slimstate import ops

pytest_plugins = ["contract_table"]

torch.set_num_threads(1)  # most matrices here are small: waking a second thread costs more than it saves

hypothesis.settings.register_profile("default", max_examples=20, derandomize=True, deadline=None)
hypothesis.settings.register_profile("all", max_examples=100, derandomize=True, deadline=None)
hypothesis.settings.load_profile("all" if os.environ.get("SLIMSTATE_TEST_ALL") == "1" else "default")


def pytest_report_header() -> str:
    compiled = ", ".join(sorted(ops.DEVICES)) or "no device (the PyTorch versions are tested)"
    return f"torch {torch.__version__}; slimstate compiled for {compiled}"


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    if not torch.cuda.is_available():
        for item in items:
            if item.get_closest_marker("gpu"):
                item.add_marker(pytest.mark.skip(reason="no CUDA device"))


@pytest.fixture(autouse=True)
def seed() -> None:
    if torch.cuda.is_available():
        torch.manual_seed(0)
    else:  # torch.manual_seed notes down where it was called from, for every kind of device there might be: slow
        torch.default_generator.manual_seed(0)


@pytest.fixture(scope="session")
def emulated_library(request: pytest.FixtureRequest) -> ctypes.CDLL:
    path = emulator.build(request.config.cache.mkdir("emulated"))
    torch.ops.load_library(path)
    return ctypes.CDLL(str(path))


@pytest.fixture(params=["forwards", "backwards"])
def emulated(request: pytest.FixtureRequest, emulated_library: ctypes.CDLL) -> Iterator[ModuleType]:
    """The CUDA kernels on CPU tensors, as ``torch.ops.slimstate`` is called; in both orders of a block's threads."""
    backwards = ctypes.c_int.in_dll(emulated_library, "emulated_backwards")
    backwards.value = request.param == "backwards"
    yield torch.ops.slimstate_emulated
    backwards.value = False


def pytest_terminal_summary(terminalreporter: pytest.TerminalReporter) -> None:
    """What tests want to be read although they pass."""
    for report in terminalreporter.getreports("passed"):
        for name, text in report.user_properties:
            if name == "summary":
                terminalreporter.write_line(text)
