"""Whatever happens while the main job saves, its last checkpoint is whole."""

import importlib
import itertools
import json
import os
import random
import signal
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
import torch

from slimstate.optim import GaLoreAdamW

EXAMPLES = Path(__file__).parents[2] / "examples"
resource = pytest.importorskip("resource")  # POSIX, as os.fork

# Python warns of fork where other threads run; those here hold nothing that saving needs.
pytestmark = pytest.mark.filterwarnings("ignore:.*use of fork.*:DeprecationWarning")


@pytest.fixture(scope="module")
def script() -> Iterator[ModuleType]:
    with pytest.MonkeyPatch.context() as patch:
        patch.syspath_prepend(str(EXAMPLES))
        patch.setenv("HF_HUB_OFFLINE", "1")
        yield importlib.import_module("pretrain")


def make_run(script: ModuleType, folder: Path) -> Any:
    """A run of which every number says at which step it was saved."""
    model = torch.nn.Linear(400, 400, bias=False)
    optimizer = GaLoreAdamW(model.parameters(), rank=100)
    model.weight.grad = torch.ones_like(model.weight)
    optimizer.step()
    scheduler = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda _: 1.0)
    return script.Run(folder, {"lr": 1.0}, model, optimizer, scheduler)


def mark(run: Any, step: int) -> None:
    run.progress.step = step
    with torch.no_grad():
        run.model.weight.fill_(step)
    for x in run.optimizer.state[run.model.weight].values():
        if isinstance(x, torch.Tensor):
            x.fill_(step)


def assert_whole(script: ModuleType, folder: Path) -> int:
    """Loads as a resumed run does; returns the step that was found."""
    run = make_run(script, folder)
    run.load()
    step = run.progress.step
    assert run.model.weight.eq(step).all()
    for x in run.optimizer.state[run.model.weight].values():
        assert not isinstance(x, torch.Tensor) or x.eq(step).all()
    return step


def forked(work: Callable[[], None]) -> int:
    """Starts a process; its exit code is 0 if the work was done."""
    if process := os.fork():
        return process
    try:
        work()
        os._exit(0)
    except BaseException:
        os._exit(1)


def test_killed_at_any_moment_of_saving_it_leaves_the_last_checkpoint(script: ModuleType, tmp_path: Path) -> None:
    run, moments, interrupted = make_run(script, tmp_path), random.Random(0), 0
    mark(run, 1)
    run.save()
    last = 1
    for _ in range(40):
        reader, writer = os.pipe()

        def save_on(first: int = last + 1, writer: int = writer) -> None:
            for step in itertools.count(first):
                mark(run, step)
                run.save()
                os.write(writer, b".")

        process = forked(save_on)
        os.close(writer)
        os.read(reader, 1)
        time.sleep(moments.uniform(0, 0.02))
        os.kill(process, signal.SIGKILL)
        _, status = os.waitpid(process, 0)
        assert os.WTERMSIG(status) == signal.SIGKILL
        told = last + 1
        while left := os.read(reader, 4096):
            told += len(left)
        os.close(reader)

        interrupted += any(tmp_path.glob(".*"))
        last = assert_whole(script, tmp_path)
        assert last in (told, told + 1)
        assert json.loads((tmp_path / "run.json").read_text())["progress"]["step"] in (last, last + 1)
        assert not any(tmp_path.glob(".*"))
    assert interrupted > 5  # saving was what it was killed in


def test_a_disk_that_fills_up_leaves_the_last_checkpoint(script: ModuleType, tmp_path: Path) -> None:
    run = make_run(script, tmp_path)
    mark(run, 1)
    run.save()
    size = (tmp_path / "checkpoint.pt").stat().st_size
    mark(run, 2)
    for limit in [0, 100, 5000, size // 3, size // 2, size - 100, size - 1]:

        def save_in_vain(limit: int = limit) -> None:
            resource.setrlimit(resource.RLIMIT_FSIZE, (limit, resource.RLIM_INFINITY))
            with pytest.raises(script.RunError, match=r"cannot be written .*; the last checkpoint there is whole"):
                run.save()

        _, status = os.waitpid(forked(save_in_vain), 0)
        assert os.waitstatus_to_exitcode(status) == 0
        assert assert_whole(script, tmp_path) == 1
        assert sorted(path.name for path in tmp_path.iterdir()) == ["checkpoint.pt", "run.json"]
    run.save()
    assert assert_whole(script, tmp_path) == 2
