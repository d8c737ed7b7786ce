"""The benchmarks run, and count what formulas say; on small matrices."""

import contextlib
import importlib
import io
import json
import os
import re
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

FOLDER = Path(__file__).parents[2] / "benchmarks"
BYTES_OF_COUNTERS = 16  # step, refreshes, age: for each parameter


def run(script: str, *options: object) -> str:
    """What a benchmark prints, as a process of its own: it changes how memory is allocated."""
    command = [sys.executable, str(FOLDER / f"{script}.py"), *map(str, options)]
    done = subprocess.run(
        command,
        capture_output=True,
        text=True,
        encoding="utf-8",
        check=False,
        env=os.environ | {"OMP_NUM_THREADS": "1"},
    )
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout


@pytest.fixture(scope="module")
def counted(tmp_path_factory: pytest.TempPathFactory) -> dict[str, dict[str, Any]]:
    """What `memory.py` counts of every optimizer of the package; in this process, which has torch already."""
    file = tmp_path_factory.mktemp("counted") / "memory.json"
    with pytest.MonkeyPatch.context() as patch, contextlib.redirect_stdout(io.StringIO()):
        patch.syspath_prepend(str(FOLDER))
        patch.setattr(sys, "argv", ["memory.py", "--sizes", "small", "--no-peers", "--json", str(file)])
        importlib.import_module("memory").main()
    return json.loads(file.read_text())["small"]


def test_every_optimizer_keeps_what_its_formula_says(counted):
    parameters = 21  # of the size `small`
    assert len(counted) > 15
    for name, found in counted.items():
        assert "why" not in found, (name, found)
        assert found["alive"] == found["state_bytes"], name
        if "formula" in found and not name.endswith(("8-bit moments", "companded moments")):  # small ones stay float32
            assert 0 <= found["state"] - found["formula"] <= BYTES_OF_COUNTERS * parameters, name


def test_low_rank_steps_allocate_less_than_a_matrix(counted):
    assert counted["GaLoreAdamW"]["full-size"] == 0
    assert counted["torch.optim.AdamW, fused"]["peak"] < 1000


@pytest.mark.slow
def test_step_times_all_that_it_is_asked_for(tmp_path):
    file = tmp_path / "step.json"
    pattern = ["AdamW", "GaLoreAdamW", "SGDP", "LISA*"]
    said = run("step", "--sizes", "small", "--dtypes", "bfloat16", "--rounds", 2, "--only", *pattern, "--json", file)
    figures = json.loads(file.read_text())["small, bfloat16"]
    for name in ("AdamW", "GaLoreAdamW", "SGDP", "LISA, 2 layers awake, AdamW"):
        assert figures[name]["seconds"] >= figures[name]["least"] > 0
        assert f"| {name} " in said


@pytest.mark.slow
def test_one_command_writes_all_pages(tmp_path):
    parts = ["step", "memory", "floor", "refresh", "targets", "backward", "projections", "codes", "distributed"]
    run("all", *parts, "--quick", "--pages", tmp_path, "--figures", tmp_path / "figures")
    for part in parts:
        page = (tmp_path / f"{part}.md").read_text(encoding="utf-8")
        assert page.startswith("# ") and "python benchmarks/" in page, part
        assert part == "distributed" or re.search(r"measured on .+ with Python [\d.]+, torch 2\.", page), part
    targets = (tmp_path / "targets.md").read_text(encoding="utf-8")
    assert "not measured" not in targets
    for what in ("FRUGAL 0.25, contiguous rows", "AdamP", "largest step after", "full-size temporaries"):
        assert re.search(rf"^\| {what}.*\| (met|missed) ", targets, re.MULTILINE), targets


@pytest.mark.slow
def test_a_sweep_finds_the_best_rate(tmp_path):
    text = tmp_path / "text.txt"
    text.write_text("".join(f"{i} times {i + 1} is {i * (i + 1)}; " for i in range(5000)))
    micro = [
        "--seq",
        16,
        "--batch",
        2,
        "--steps",
        12,
        "--vocab",
        300,
        "--threads",
        1,
        "--device",
        "cpu",
        "--data",
        text,
    ]
    said = run("sweep", "--optimizers", "adamw", "--lrs", "1e-9", "1e-2", "--out", tmp_path / "runs", "--", *micro)
    assert "- adamw: lr 0.01, loss" in said
