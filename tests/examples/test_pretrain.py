"""The main job, through its command line, at a size that takes seconds."""

import contextlib
import csv
import importlib
import io
import json
import math
import signal
import subprocess
import sys
import time
from argparse import Namespace
from collections.abc import Callable
from pathlib import Path
from types import ModuleType

import pytest
import torch

SCRIPT = Path(__file__).parents[2] / "examples" / "pretrain.py"
MICRO = ("--seq", "16", "--batch", "2", "--steps", "12", "--vocab", "300", "--threads", "1", "--device", "cpu")


Pretrain = Callable[..., tuple[int, str]]


@pytest.fixture(scope="module")
def pretrain(script: ModuleType) -> Pretrain:
    """Runs the script in a folder; returns its exit code and what it said."""

    def call(folder: Path, *options: object) -> tuple[int, str]:
        said = io.StringIO()
        with pytest.MonkeyPatch.context() as patch, contextlib.redirect_stderr(said):
            patch.chdir(folder)
            patch.setattr(sys, "argv", [str(SCRIPT), *map(str, options)])
            try:
                code = script.main()
            except SystemExit as stop:
                code = stop.code
        return code, said.getvalue()

    return call


def start(folder: Path, *options: object, launcher: tuple[str, ...] = ()) -> subprocess.Popen[str]:
    """Starts the script as a process of its own."""
    command = [sys.executable, *launcher, str(SCRIPT), *map(str, options)]
    return subprocess.Popen(command, cwd=folder, stderr=subprocess.PIPE, text=True)


@pytest.fixture(scope="module")
def text(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A small text, for speed."""
    file = tmp_path_factory.mktemp("text") / "text.txt"
    file.write_text("".join(f"{i} times {i + 1} is {i * (i + 1)}; " for i in range(5000)))
    return file


@pytest.fixture(scope="module")
def finished(pretrain: Pretrain, tmp_path_factory: pytest.TempPathFactory, text: Path) -> Path:
    """A folder where a comparison ran through."""
    folder = tmp_path_factory.mktemp("finished")
    code, said = pretrain(
        folder, *MICRO, "--data", text, "--compare", "adamw", "galore", "signsgd", "--out", "out", "--monitor", 2
    )
    assert code == 0, said
    return folder


def test_a_monitor_writes_and_draws_what_it_measures(finished: Path) -> None:
    for name in ("adamw", "galore", "signsgd"):
        assert "update_rms" in (finished / "out" / name / "monitor.csv").read_text()
        assert (finished / "out" / name / "monitor.png").exists()


def read_table(folder: Path) -> list[dict[str, str]]:
    with (folder / "table.csv").open(newline="") as file:
        return list(csv.DictReader(file))


def weights(run: Path) -> dict[str, torch.Tensor]:
    return torch.load(run / "checkpoint.pt", weights_only=True)["model"]


def assert_same_weights(one: Path, other: Path) -> None:
    a, b = weights(one), weights(other)
    assert a.keys() == b.keys()
    for name in a:
        assert torch.equal(a[name], b[name]), name


def test_comparison_leaves_table_and_plot(finished: Path) -> None:
    rows = read_table(finished / "out")
    assert [row["run"] for row in rows] == ["byte trigram", "adamw", "galore", "signsgd"]
    adamw, galore, sign = rows[1:]
    assert int(galore["on matrices"]) < 0.5 * int(adamw["on matrices"])
    assert int(sign["state bytes"]) == 0
    assert all(name in (finished / "out" / "table.txt").read_text() for name in ("byte trigram", "adamw", "galore"))
    assert (finished / "out" / "plot.png").read_bytes().startswith(b"\x89PNG")


def test_finished_runs_are_kept(pretrain: Pretrain, finished: Path, text: Path) -> None:
    before = (finished / "out" / "adamw" / "checkpoint.pt").stat().st_mtime_ns
    code, said = pretrain(finished, *MICRO, "--data", text, "--compare", "adamw", "galore", "--out", "out")
    assert code == 0, said
    assert "adamw is finished" in said
    assert (finished / "out" / "adamw" / "checkpoint.pt").stat().st_mtime_ns == before


def test_checkpoint_of_other_settings_is_refused(pretrain: Pretrain, finished: Path, text: Path) -> None:
    code, said = pretrain(finished, *MICRO, "--data", text, "--optimizer", "adamw", "--out", "out", "--lr", "0.5")
    assert code == 2
    assert "lr 0.003 there, 0.5 here" in said and "--fresh" in said
    # What is none of AdamW's business does not part it from its checkpoint.
    code, said = pretrain(
        finished, *MICRO, "--data", text, "--compare", "galore", "adamw", "--out", "out", "--rank", "0.5"
    )
    assert code == 2 and "rank 0.25 there, 0.5 here" in said
    assert "adamw" not in said


def test_damaged_checkpoint_is_named(pretrain: Pretrain, tmp_path: Path, text: Path) -> None:
    (tmp_path / "out" / "adamw").mkdir(parents=True)
    (tmp_path / "out" / "adamw" / "checkpoint.pt").write_bytes(b"no checkpoint")
    code, said = pretrain(tmp_path, *MICRO, "--data", text, "--optimizer", "adamw", "--out", "out")
    assert code == 2 and "is not a checkpoint" in said


@pytest.mark.parametrize(
    ("stop", "name"), [(signal.SIGINT, "galore"), pytest.param(signal.SIGTERM, "owlore", marks=pytest.mark.slow)]
)
def test_interrupted_run_goes_on_bit_for_bit(
    pretrain: Pretrain, tmp_path: Path, text: Path, stop: signal.Signals, name: str
) -> None:
    options = [*MICRO, "--data", str(text), "--steps", "60", "--optimizer", name, "--update-proj-gap", "7"]
    process = start(tmp_path, *options, "--out", "broken", "--save-every", "5")
    deadline = time.monotonic() + 120
    while not (tmp_path / "broken" / name / "checkpoint.pt").exists():
        assert process.poll() is None and time.monotonic() < deadline
        time.sleep(0.01)
    process.send_signal(stop)
    _, said = process.communicate(timeout=60)
    assert process.returncode == 130, said
    assert "goes on from there" in said
    step = json.loads((tmp_path / "broken" / name / "run.json").read_text())["progress"]["step"]
    assert 5 <= step < 60

    code, said = pretrain(tmp_path, *options, "--out", "broken", "--save-every", "5")
    assert code == 0, said
    assert f"goes on at step {step}" in said
    code, said = pretrain(tmp_path, *options, "--out", "whole")
    assert code == 0, said
    assert_same_weights(tmp_path / "broken" / name, tmp_path / "whole" / name)


@pytest.mark.slow
def test_a_killed_run_goes_on_from_its_last_checkpoint_bit_for_bit(
    pretrain: Pretrain, tmp_path: Path, text: Path
) -> None:
    options = [*MICRO, "--data", str(text), "--steps", "60", "--optimizer", "galore", "--update-proj-gap", "7"]
    process = start(tmp_path, *options, "--out", "broken", "--save-every", "1")
    deadline = time.monotonic() + 120
    while not (tmp_path / "broken" / "galore" / "checkpoint.pt").exists():
        assert process.poll() is None and time.monotonic() < deadline
        time.sleep(0.01)
    process.kill()
    process.communicate(timeout=60)
    assert process.returncode == -signal.SIGKILL
    code, said = pretrain(tmp_path, *options, "--out", "broken")
    assert code == 0, said
    assert "goes on at step" in said
    code, said = pretrain(tmp_path, *options, "--out", "whole")
    assert code == 0, said
    assert_same_weights(tmp_path / "broken" / "galore", tmp_path / "whole" / "galore")


def test_every_optimizer_goes_by_its_name(pretrain: Pretrain, tmp_path: Path, text: Path) -> None:
    names = [name for name in importlib.import_module("optimizers").RECIPES if name != "galore-torch"]
    code, said = pretrain(tmp_path, *MICRO, "--data", text, "--steps", "3", "--compare", *names, "--out", "out")
    assert code == 0, said
    rows = {row["run"]: row for row in read_table(tmp_path / "out")[1:]}
    assert list(rows) == names
    full = int(rows["adamw"]["on matrices"])
    kept = {name: int(row["on matrices"]) / full for name, row in rows.items()}
    assert kept.pop("adamp") == 1 and kept.pop("signsgd") == 0
    assert 0.5 <= kept.pop("sgdp") < 0.51 and 0.49 < kept.pop("sgd") <= 0.5
    assert max(share for name, share in kept.items() if name != "adamw") < 0.5


def test_fresh_starts_over(pretrain: Pretrain, finished: Path, text: Path) -> None:
    before = (finished / "out" / "signsgd" / "checkpoint.pt").stat().st_mtime_ns
    code, said = pretrain(finished, *MICRO, "--data", text, "--optimizer", "signsgd", "--out", "out", "--fresh")
    assert code == 0 and "signsgd begins" in said
    assert (finished / "out" / "signsgd" / "checkpoint.pt").stat().st_mtime_ns > before


def test_tokens_are_cached(finished: Path) -> None:
    (file,) = (finished / ".cache").iterdir()
    assert file.name.startswith("corpus-")


def test_accumulation_changes_nothing_but_rounding(pretrain: Pretrain, finished: Path, text: Path) -> None:
    code, said = pretrain(
        finished, *MICRO, "--data", text, "--optimizer", "adamw", "--out", "parts", "--accumulate", "2"
    )
    assert code == 0, said
    whole, parts = weights(finished / "out" / "adamw"), weights(finished / "parts" / "adamw")
    for name in whole:
        torch.testing.assert_close(parts[name], whole[name], rtol=1e-3, atol=1e-4)


def test_bytes_and_bfloat16(pretrain: Pretrain, tmp_path: Path, text: Path) -> None:
    options = ("--vocab", "bytes", "--dtype", "bfloat16", "--optimizer", "galore", "--steps", "3", "--rank", "8")
    code, said = pretrain(tmp_path, *MICRO, *options, "--data", text, "--out", "out")
    assert code == 0, said
    saved = weights(tmp_path / "out" / "galore")
    assert saved["model.embed_tokens.weight"].shape[0] == 256
    assert all(w.dtype == torch.bfloat16 for w in saved.values())


def test_folder_of_texts(pretrain: Pretrain, tmp_path: Path, text: Path) -> None:
    (tmp_path / "texts" / "deep").mkdir(parents=True)
    (tmp_path / "texts" / "a.txt").write_bytes(text.read_bytes())
    (tmp_path / "texts" / "deep" / "b.md").write_text("more")
    (tmp_path / "texts" / "picture.png").write_bytes(b"\x89PNG\xff\xfe\x00")
    code, said = pretrain(tmp_path, *MICRO, "--data", "texts", "--optimizer", "adamw", "--steps", "1", "--out", "out")
    assert code == 0, said
    assert "1 file is not UTF-8 text" in said and "picture.png" in said


def test_a_short_text_gets_fewer_steps(
    script: ModuleType, tmp_path: Path, text: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "short.txt").write_bytes(text.read_bytes()[:12_000])
    # The mark in front and the ends of lines are those of another system.
    (tmp_path / "other.txt").write_bytes(b"\xef\xbb\xbf" + text.read_bytes()[:12_000].replace(b"; ", b"\r\n"))
    for names, passes in ((["short.txt"], 90), (["other.txt", "short.txt"], 180)):
        corpus, _ = script.load_corpus([tmp_path / name for name in names], 0, tmp_path)
        args = Namespace(preset="tiny", steps=None, batch=8, seq=128, eval_every=None, save_every=None)
        script.set_schedule(args, corpus)
        assert 0.95 * passes < args.steps <= passes and args.save_every == math.ceil(args.steps / 10)
        said = capsys.readouterr().err
        assert f"{args.steps} steps, 8 passes, for the preset's 2,400" in said
        assert "differences of a few percent between losses mean nothing" in said
    args.steps = 5000
    script.set_schedule(args, corpus)
    assert args.steps == 5000


def test_texts_in_any_script_are_read(pretrain: Pretrain, tmp_path: Path) -> None:
    (tmp_path / "text.txt").write_text("".join(f"第{i}章 κεφάλαιο {i * i} глава 🙂\u2028" for i in range(900)), "utf-8")
    code, said = pretrain(tmp_path, *MICRO, "--data", "text.txt", "--optimizer", "galore", "--steps", "2")
    assert code == 0, said
    assert (tmp_path / "runs" / "tiny-text" / "plot.png").exists()


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (("--data", "nowhere"), "no such file or folder"),
        (("--data", "empty"), "holds no UTF-8 text"),
        (("--data", "short.txt"), "too little text"),
        (("--data", "picture.png"), "not UTF-8 text"),
        (("--data", "utf16.txt"), "utf16.txt: not UTF-8 text"),
        (("--data", "latin1.txt", "short.txt"), "other encodings are converted by, say, iconv -t UTF-8"),
        (("--seq", "200000"), "too little text"),
        (("--vocab", "100"), "more than 256"),
        (("--batch", "3", "--accumulate", "2"), "cannot be split"),
        (("--optimizer", "adamw", "--rank", "4"), "--rank means nothing to adamw"),
        (("--steps", "0"), "must be at least 1"),
        (("--lr", "-1"), "must be above 0"),
        (("--fsdp",), "start them by torchrun"),
    ],
)
def test_what_cannot_be_done_is_said(
    pretrain: Pretrain, tmp_path: Path, text: Path, options: tuple[str, ...], message: str
) -> None:
    (tmp_path / "empty").mkdir()
    (tmp_path / "short.txt").write_text("too short")
    (tmp_path / "picture.png").write_bytes(b"\x89PNG\xff\xfe\x00")
    (tmp_path / "utf16.txt").write_text("wide " * 5000, "utf-16")
    (tmp_path / "latin1.txt").write_text("élan " * 5000, "latin-1")
    code, said = pretrain(tmp_path, *MICRO, "--data", text, *options)
    assert code == 2
    assert message in said
    assert "Traceback" not in said


def test_what_cannot_be_divided_is_said(
    pretrain: Pretrain, tmp_path: Path, text: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("WORLD_SIZE", "1")
    code, said = pretrain(tmp_path, *MICRO, "--data", text, "--compare", "adamw", "galore-torch", "--fsdp")
    assert code == 2 and "galore-torch cannot step on a part of a matrix" in said


TWO = ("-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2")


@pytest.mark.slow
def test_a_model_in_two_parts_trains_as_one_and_goes_on_as_one(pretrain: Pretrain, tmp_path: Path, text: Path) -> None:
    # The 32 tokens of a step span no more than 32 directions, of which the last are rounding.
    options = [*MICRO, "--data", str(text), "--steps", "40", "--optimizer", "galore", "--update-proj-gap", "7"]
    options += ["--rank", "4", "--eval-every", "40"]
    process = start(tmp_path, *options, "--fsdp", "--out", "broken", "--save-every", "5", launcher=TWO)
    deadline = time.monotonic() + 120
    while not (tmp_path / "broken" / "galore" / "checkpoint.pt").exists():
        assert process.poll() is None and time.monotonic() < deadline
        time.sleep(0.01)
    process.send_signal(signal.SIGINT)
    _, said = process.communicate(timeout=60)
    assert "each with a part of the model" in said and "goes on from there" in said
    half = torch.load(tmp_path / "broken" / "galore" / "checkpoint.pt", weights_only=True)
    assert 5 <= half["progress"]["step"] < 40

    for out in ("broken", "whole"):
        code, said = pretrain(tmp_path, *options, "--out", out)
        assert code == 0, said
    losses = [
        json.loads((tmp_path / out / "galore" / "run.json").read_text())["progress"]["losses"]
        for out in ("broken", "whole")
    ]
    assert losses[0] == pytest.approx(losses[1], abs=1e-3)


@pytest.mark.slow
def test_every_optimizer_trains_a_model_in_two_parts(pretrain: Pretrain, tmp_path: Path, text: Path) -> None:
    recipes = importlib.import_module("optimizers").RECIPES
    names = [name for name, recipe in recipes.items() if recipe.sharded]
    # No factor is below the rounding of 32 tokens' gradients at this rank.
    options = [*MICRO, "--data", text, "--steps", "4", "--rank", "4", "--compare", *names]
    code, said = pretrain(tmp_path, *options, "--out", "one")
    assert code == 0, said
    process = start(tmp_path, *options, "--fsdp", "--out", "two", launcher=TWO)
    _, said = process.communicate(timeout=600)
    assert process.returncode == 0, said
    for name in names:
        one, two = (json.loads((tmp_path / out / name / "run.json").read_text())["progress"] for out in ("one", "two"))
        assert two["losses"] == pytest.approx(one["losses"], abs=1e-3), name
        assert two["evaluations"][-1]["loss"] == pytest.approx(one["evaluations"][-1]["loss"], abs=1e-3), name
        assert name == "signsgd" or two["state_bytes"] < 0.8 * one["state_bytes"], name


@pytest.mark.slow
def test_two_processes_equal_one(finished: Path, text: Path) -> None:
    options = (*MICRO, "--data", text, "--compare", "adamw", "galore", "--out", "two")
    process = start(finished, *options, launcher=TWO)
    _, said = process.communicate(timeout=300)
    assert process.returncode == 0, said
    # 32 tokens span no more than 32 directions, so that the last of GaLore's 32 are rounding.
    for name, tolerance in (("adamw", 1e-4), ("galore", 0.03)):
        one, two = (json.loads((finished / out / name / "run.json").read_text()) for out in ("out", "two"))
        assert two["progress"]["losses"] == pytest.approx(one["progress"]["losses"], abs=tolerance)


@pytest.mark.slow
def test_a_short_run_beats_the_trigram(pretrain: Pretrain, tmp_path: Path) -> None:
    code, said = pretrain(tmp_path, "--compare", "adamw", "galore", "--steps", "600", "--out", "out")
    assert code == 0, said
    trigram, adamw, galore = read_table(tmp_path / "out")
    for run in (adamw, galore):
        assert float(run["bits/byte"]) < 0.9 * float(trigram["bits/byte"])
    assert float(galore["loss"]) < 1.07 * float(adamw["loss"])
