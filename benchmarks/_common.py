# SPDX-License-Identifier: Apache-2.0
"""What the benchmarks share: the matrices of known models, the clock, and the report."""

import argparse
import os
import platform
import random
import shlex
import sys
import time
from collections.abc import Callable, Iterable, Sequence
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path

import torch
from torch import Tensor

Shape = tuple[int, int]


def layer(width: int, mlp: int) -> list[Shape]:
    """The matrices of one LLaMA layer: four of attention, then gate, up and down."""
    return [(width, width)] * 4 + [(mlp, width)] * 2 + [(width, mlp)]


# The bodies of GaLore's LLaMA models (embeddings and head left out); of the large ones a single layer.
BODIES = {
    "60m": layer(512, 1376) * 8,
    "130m": layer(768, 2048) * 12,
    "1b-layer": layer(2048, 5461),
    "7b-layer": layer(4096, 11008),
    "tiny": layer(64, 172) * 2,
}


def shape(text: str) -> list[Shape]:
    """A name in `BODIES`, or ROWSxCOLUMNS."""
    if text in BODIES:
        return BODIES[text]
    try:
        rows, columns = map(int, text.split("x"))
    except ValueError:
        names = ", ".join(BODIES)
        raise argparse.ArgumentTypeError(f"must be one of {names} or ROWSxCOLUMNS, got {text!r}") from None
    return [(rows, columns)]


def rank(text: str) -> int | float:
    """A count, or a share in (0, 1]."""
    return int(text) if text.isdigit() else float(text)


def matrices(shapes: Iterable[Shape]) -> list[Tensor]:
    """Parameters with gradients."""
    parameters = [torch.nn.Parameter(torch.randn(s) * 0.02) for s in shapes]
    for p in parameters:
        p.grad = torch.randn_like(p) * 1e-3
    return parameters


def galore_torch(params: list[Tensor], rank: int | float, gap: int = 200) -> torch.optim.Optimizer | None:
    """The authors' optimizer where their package is installed."""
    try:
        from galore_torch import GaLoreAdamW as Original
    except ImportError:
        return None
    count = rank if isinstance(rank, int) else int(rank * min(params[0].shape))
    group = {"params": params, "rank": count, "update_proj_gap": gap, "scale": 0.25, "proj_type": "std"}
    return Original([group], lr=1e-4, weight_decay=0.01, no_deprecation_warning=True)


def refreshes(optimizer: torch.optim.Optimizer) -> int:
    """How many bases an optimizer of this package has fitted so far."""
    return sum(int(state["refreshes"]) for state in optimizer.state.values())


def cpu_seconds(function: Callable[[], object]) -> float:
    """The CPU time of this process in one call: what other processes do does not count, nor does waiting."""
    start = time.process_time()
    function()
    return time.process_time() - start


def interleaved(
    contestants: dict[str, Callable[[], object]],
    rounds: int,
    before: Callable[[], object] = lambda: None,
    kind: Callable[[str], str] = lambda name: name,
) -> dict[str, list[float]]:
    """Times every contestant once a round, in an order shuffled each round.

    Args:
        contestants: name -> what is timed.
        rounds: how often.
        before: called before each, off the clock, to leave the caches alike.
        kind: under which name the call just made counts.
    """
    shuffle = random.Random(0).shuffle
    names = list(contestants)
    times: dict[str, list[float]] = {}
    for _ in range(rounds):
        shuffle(names)
        for name in names:
            before()
            seconds = cpu_seconds(contestants[name])
            times.setdefault(kind(name), []).append(seconds)
    return times


def table(header: Sequence[str], rows: Iterable[Sequence[object]]) -> str:
    """A Markdown table, padded so that it reads as plain text too."""
    cells = [list(header), *([str(cell) for cell in row] for row in rows)]
    widths = [max(map(len, column)) for column in zip(*cells, strict=True)]
    cells.insert(1, ["-" * width for width in widths])
    return "\n".join("| " + " | ".join(c.ljust(w) for c, w in zip(r, widths, strict=True)) + " |" for r in cells)


def report(title: str, sections: Sequence[str], markdown: Path | None, threads: str = "") -> None:
    """Prints the sections, and writes them to a Markdown file with the machine, the versions and the command."""
    print("\n\n".join(sections))
    if markdown is None:
        return
    command = shlex.join(os.path.relpath(word) if os.path.isabs(word) else word for word in sys.argv)
    versions = ", ".join(f"{name} {v}" for name in ("torch", "slimstate", "galore-torch") if (v := _version(name)))
    page = [
        f"# {title}",
        f"Written by a script; measured on {_cpu()} ({os.cpu_count()} cores{threads}) with Python "
        f"{platform.python_version()}, {versions}:",
        f"```\npython {command}\n```",
        *sections,
    ]
    markdown.parent.mkdir(parents=True, exist_ok=True)
    markdown.write_text("\n\n".join(page) + "\n")


def _version(name: str) -> str | None:
    try:
        return version(name)
    except PackageNotFoundError:
        return None


def _cpu() -> str:
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
    except OSError:
        lines = []
    names = [line.split(":", 1)[1].strip() for line in lines if line.startswith("model name")]
    return names[0] if names else platform.processor() or platform.machine()
