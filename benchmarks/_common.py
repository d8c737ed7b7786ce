# SPDX-License-Identifier: Apache-2.0
"""What the benchmarks share: the matrices of known models, the clocks, allocations, and the report."""

import argparse
import ctypes
import itertools
import os
import platform
import random
import shlex
import statistics
import sys
import time
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, field
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path

import torch
from torch.autograd import DeviceType
from torch.profiler import ProfilerActivity, profile

from slimstate import ops

Shape = tuple[int, int]

# Of which a report says the version.
PACKAGES = ("torch", "slimstate", "galore-torch", "apollo-torch", "fira", "adamp", "pytorch-optimizer", "bitsandbytes",
            "torchao")  # fmt: skip


def layer(width: int, mlp: int) -> list[Shape]:
    """The matrices of one LLaMA layer: four of attention, then gate, up and down."""
    return [(width, width)] * 4 + [(mlp, width)] * 2 + [(width, mlp)]


# The bodies of GaLore's LLaMA models (embeddings and head left out); of the large ones a single layer.
BODIES = {
    "60m": layer(512, 1376) * 8,
    "130m": layer(768, 2048) * 12,
    "1b": layer(2048, 5461) * 24,
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


def cpu_seconds(function: Callable[[], object]) -> float:
    """The CPU time of this process in one call: what other processes do does not count, nor does waiting."""
    start = time.process_time()
    function()
    return time.process_time() - start


def interleaved(
    contestants: dict[str, Callable[[], object]],
    rounds: int,
    before: Callable[[], object] = lambda: None,
    clock: Callable[[Callable[[], object]], float] = cpu_seconds,
) -> dict[str, list[float]]:
    """Times every contestant once a round, in an order shuffled each round.

    Args:
        contestants: name -> what is timed.
        rounds: how often.
        before: called before each, off the clock, to leave the caches alike.
        clock: seconds of a call.
    """
    shuffle = random.Random(0).shuffle
    names = list(contestants)
    times: dict[str, list[float]] = {name: [] for name in names}
    for _ in range(rounds):
        shuffle(names)
        for name in names:
            before()
            seconds = clock(contestants[name])
            times[name].append(seconds)
    return times


def cuda_seconds(function: Callable[[], object]) -> float:
    """The time between two events around one call, on an idle device: the launches count where they are slower."""
    start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
    torch.cuda.synchronize()
    start.record()
    function()
    end.record()
    end.synchronize()
    return start.elapsed_time(end) / 1e3


CLOCKS = {"cpu": cpu_seconds, "cuda": cuda_seconds}


@dataclass
class Turns:
    """The times of a contestant, and of its references in the same turns."""

    own: list[float] = field(default_factory=list)
    beside: dict[str, list[float]] = field(default_factory=dict)
    marked: list[bool] = field(default_factory=list)

    def chosen(self, marked: bool | None) -> list[int]:
        """The turns that are marked, are not, or all."""
        return [i for i, mark in enumerate(self.marked) if marked in (None, mark)]

    def seconds(self, marked: bool | None = None) -> list[float]:
        """Times of chosen turns."""
        return [self.own[i] for i in self.chosen(marked)]

    def ratios(self, reference: str, marked: bool | None = None) -> list[float]:
        """Each time over the reference's in the same turn: what slows the machine for a while slows both."""
        return [self.own[i] / self.beside[reference][i] for i in self.chosen(marked)]


def paired(
    contestants: dict[str, Callable[[], object]],
    references: dict[str, Callable[[], object]],
    beside: Callable[[str], Sequence[str]],
    rounds: int | Callable[[str], int],
    before: Callable[[str], object],
    clock: Callable[[Callable[[], object]], float],
    mark: Callable[[str], bool] = lambda name: False,
) -> dict[str, Turns]:
    """Times every contestant next to its references, contestants in an order shuffled each round.

    On a machine that others use too, memory and caches are slower for seconds at a time, whatever the clock. So each
    turn of a contestant has its own turn of each reference right before or after it, as a coin decides, and what is
    reported is the median of their ratios.

    Args:
        contestants: name -> what is timed.
        references: likewise.
        beside: the references of a contestant.
        rounds: how many turns each has, or a function of the name.
        before: called with the name before each call, off the clock.
        clock: seconds of a call.
        mark: called after each turn of a contestant; what it says goes with the turn.
    """
    rng = random.Random(0)
    count = {name: rounds(name) if callable(rounds) else rounds for name in contestants}
    turns = {name: Turns() for name in contestants}
    everything = references | contestants
    for i in range(max(count.values(), default=0)):
        names = [name for name in contestants if i < count[name]]
        rng.shuffle(names)
        for name in names:
            order = [name, *beside(name)]
            rng.shuffle(order)
            for each in order:
                before(each)
                seconds = clock(everything[each])
                (turns[name].own if each == name else turns[name].beside.setdefault(each, [])).append(seconds)
            turns[name].marked.append(mark(name))
    return turns


def spread(values: Sequence[float], form: str = ".2f") -> str:
    """Median and quartiles."""
    if len(values) < 2:
        return "".join(f"{v:{form}}" for v in values)
    low, middle, high = statistics.quantiles(values, n=4, method="inclusive")
    return f"{middle:{form}} ({low:{form}} to {high:{form}})"


def allocations(call: Callable[[], object], device: str = "cpu") -> list[int]:
    """The bytes allocated (> 0) and freed (< 0) in torch's allocator during a call, in order."""
    os.environ.setdefault("KINETO_LOG_LEVEL", "99")  # it would say on stderr when it starts and stops
    kind, activities = DeviceType.CPU, [ProfilerActivity.CPU]
    if device == "cuda":
        kind, activities = DeviceType.CUDA, [ProfilerActivity.CPU, ProfilerActivity.CUDA]
    with profile(activities=activities, profile_memory=True) as profiler:
        call()
    events = [e for e in profiler.profiler.kineto_results.events() if e.name() == "[memory]"]
    return [e.nbytes() for e in sorted(events, key=lambda e: e.start_ns()) if e.device_type() == kind]


def most_allocated(sizes: Sequence[int]) -> int:
    """The most bytes that were allocated at once."""
    return max(itertools.accumulate(sizes), default=0)


def keep_freed_memory() -> None:
    """Asks glibc not to return memory to the system: a page that is fetched anew costs more than it takes to fill it.

    That is kind to optimizers that allocate much, and makes the order of turns matter less.
    """
    if sys.platform == "linux" and platform.libc_ver()[0] == "glibc":
        trim_threshold, mmap_max = -1, -4
        mallopt = ctypes.CDLL(None).mallopt
        mallopt(trim_threshold, 2**31 - 1)
        mallopt(mmap_max, 0)


def verdict(value: float, target: float) -> str:
    """Whether a figure is at most what it should be."""
    return "met" if value <= target else "missed"


def mib(size: float) -> str:
    """Bytes for a reader."""
    return f"{size / 2**20:.2f} MiB"


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
    page = [f"# {title}", f"Written by a script; {machine(threads)}:", f"```\npython {command}\n```", *sections]
    markdown.parent.mkdir(parents=True, exist_ok=True)
    markdown.write_text("\n\n".join(page) + "\n", encoding="utf-8")


def machine(threads: str = "") -> str:
    """What was measured on, and with what."""
    gpu = f", {torch.cuda.get_device_name()}" if torch.cuda.is_available() else ""
    versions = ", ".join(f"{name} {v}" for name in PACKAGES if (v := _version(name)))
    ours = "with compiled kernels" if ops.COMPILED else "without compiled kernels"
    return (
        f"measured on {_cpu()} ({os.cpu_count()} cores{threads}){gpu} with Python {platform.python_version()}, "
        f"{versions}; slimstate {ours}"
    )


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
