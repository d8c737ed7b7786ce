"""The scripts of examples/ as modules, so that most tests need not start Python anew."""

import contextlib
import importlib
import io
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from types import ModuleType

import pytest
import torch


@pytest.fixture(scope="module")
def script(request: pytest.FixtureRequest) -> Iterator[ModuleType]:
    """The module that the test file names by `SCRIPT`."""
    with pytest.MonkeyPatch.context() as patch:
        patch.syspath_prepend(str(request.module.SCRIPT.parent))
        patch.setenv("HF_HUB_OFFLINE", "1")
        threads = torch.get_num_threads()
        yield importlib.import_module(request.module.SCRIPT.stem)
        torch.set_num_threads(threads)


@pytest.fixture(scope="module")
def command(script: ModuleType) -> Callable[..., tuple[int, str]]:
    """Runs the script in a folder; returns its exit code and all that it said."""

    def call(folder: Path, *options: object) -> tuple[int, str]:
        said = io.StringIO()
        with (
            pytest.MonkeyPatch.context() as patch,
            contextlib.redirect_stderr(said),
            contextlib.redirect_stdout(said),
        ):
            patch.chdir(folder)
            patch.setattr(sys, "argv", [script.__file__, *map(str, options)])
            try:
                code = script.main()
            except SystemExit as stop:
                code = stop.code
        return code, said.getvalue()

    return call
