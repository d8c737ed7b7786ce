"""What the examples share: their command lines, batches, tables, and files that are whole whenever they are there."""

import argparse
import contextlib
import importlib.util
import math
import os
from collections.abc import Iterator
from pathlib import Path
from typing import Any, BinaryIO

import numpy as np
import torch


class TaskError(Exception):
    """The network or the data cannot be used; the message says why and what to do."""


def count(text: str) -> int:
    """An int of at least 1."""
    if (value := int(text)) < 1:
        raise argparse.ArgumentTypeError(f"must be at least 1, got {text}")
    return value


def positive(text: str) -> float:
    """A finite float above 0."""
    if not 0 < (value := float(text)) < math.inf:
        raise argparse.ArgumentTypeError(f"must be above 0, got {text}")
    return value


def share(text: str) -> float:
    """A float from 0 to 1."""
    if not 0 <= (value := float(text)) <= 1:
        raise argparse.ArgumentTypeError(f"must lie between 0 and 1, got {text}")
    return value


def rank(text: str) -> int | float:
    """A count, or a share in (0, 1]: `1` is one direction, `1.0` all of them."""
    return count(text) if text.isdigit() else share(text)


def package(module: str, name: str, target: str) -> Path:
    """The folder of an installed package, which is not imported: its code needs packages that its data does not.

    Raises:
        TaskError: if it is not installed.
    """
    spec = importlib.util.find_spec(module)
    if spec is None or not spec.submodule_search_locations:
        raise TaskError(f"the package {name} is not installed: pip install --no-deps {name} (make {target} does it)")
    return Path(spec.submodule_search_locations[0])


def learning_rate(step: int, steps: int, warmup: float) -> float:
    """Share of the peak: a linear rise, then half a cosine down to a tenth."""
    rise = warmup * steps
    if step < rise:
        return (step + 1) / (rise + 1)
    return 0.55 + 0.45 * math.cos(math.pi * (step - rise) / max(1, steps - rise))


def batches(examples: int, batch: int, seed: int, steps: int) -> Iterator[np.ndarray]:
    """Which examples are in each batch: a function of the seed and the step, every epoch in an order of its own."""
    places = np.arange(steps * batch).reshape(steps, batch)
    orders = {
        epoch: np.random.default_rng((seed, epoch)).permutation(examples) for epoch in set(places.ravel() // examples)
    }
    for row in places:
        yield np.array([orders[place // examples][place % examples] for place in row])


def synchronize(device: torch.device) -> None:
    """Waits for the device, so that what is timed has happened."""
    if device.type == "cuda":
        torch.cuda.synchronize(device)


def text_table(rows: list[dict[str, Any]], columns: dict[str, str]) -> str:
    """Columns aligned to the right, all but the first."""
    cells = [list(columns)]
    cells += [[form.format(row[key]) if key in row else "-" for key, form in columns.items()] for row in rows]
    widths = [max(map(len, column)) for column in zip(*cells, strict=True)]
    cells.insert(1, ["-" * width for width in widths])
    lines = []
    for first, *others in cells:
        lines.append("  ".join([first.ljust(widths[0]), *map(str.rjust, others, widths[1:])]))
    return "\n".join(lines)


@contextlib.contextmanager
def replacing(file: Path) -> Iterator[BinaryIO]:
    """Opens a file for writing that is either whole or as it was, whatever interrupts it, a loss of power included."""
    file.parent.mkdir(parents=True, exist_ok=True)
    temporary = file.with_name(f".{file.name}.{os.getpid()}")
    try:
        with temporary.open("wb") as stream:
            yield stream
            stream.flush()
            os.fsync(stream.fileno())
        os.replace(temporary, file)
        if os.name == "posix":  # the new name is on the disk when its folder is
            folder = os.open(file.parent, os.O_RDONLY)
            os.fsync(folder)
            os.close(folder)
    finally:
        temporary.unlink(missing_ok=True)
