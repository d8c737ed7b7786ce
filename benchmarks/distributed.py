# SPDX-License-Identifier: Apache-2.0
"""A model, not a measurement: what GaLoreAdamW's steps send, and how long they would take on 8 to 4096 GPUs.

    python benchmarks/distributed.py --markdown docs/benchmarks/distributed.md

Everything follows from the matrices' shapes, from where `shard_placement` puts them, and from the constants below.
"""

import argparse
import math
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path

import torch
from _common import Shape, layer, table

from slimstate.optim import shard_placement
from slimstate.projections import MatrixView, matrix_view

# NVIDIA's data sheet of the H100 SXM: dense, without sparsity.
BF16_FLOPS, FP32_FLOPS, MEMORY_BYTES = 989e12, 67e12, 3.35e12  # a second
NVLINK_BYTES = 450e9  # a second, one way; half of the 900 GB/s that are quoted
NETWORK_BYTES = 50e9  # a second, one way: one 400 Gb/s port a GPU, as in the DGX H100 and in Llama 3's clusters
NODE = 8  # GPUs

# Assumptions: round numbers that nobody measured here.
EFFICIENCY = 0.8  # of bandwidths
PRODUCTS = 0.5  # of FP32_FLOPS, in matrix products
LATENCY = 10e-6  # seconds for each doubling of the processes
EIGH = 9, 1e12  # a symmetric eigendecomposition takes 9 d^3 operations, of which a GPU does so many a second
QR = 4, 5e12  # a QR of d x r takes 4 d r^2
MFU = 0.4  # of BF16_FLOPS, in training; Llama 3's authors report 0.38 to 0.43
BATCH = 4e6  # tokens in a step; LLaMA's
GAP, RANK = 200, 0.25  # the optimizer's defaults

MODELS: dict[str, tuple[float, list[Shape]]] = {
    "LLaMA-7B": (6.7e9, layer(4096, 11008) * 32),
    "Llama-3-70B": (70.6e9, ([(8192, 8192)] * 2 + [(1024, 8192)] * 2 + [(28672, 8192)] * 2 + [(8192, 28672)]) * 80),
}
GPUS = (8, 64, 512, 4096)


@dataclass(frozen=True)
class Shard:
    """A matrix on n GPUs."""

    view: MatrixView
    along_k: bool

    @property
    def rank(self) -> int:
        """r."""
        return int(RANK * self.view.d)

    @property
    def step_bytes(self) -> int:
        """What a step sums over the processes: R, where d is divided."""
        return 0 if self.along_k else 4 * self.rank * self.view.k

    @property
    def step_operations(self) -> int:
        """Down and up."""
        return 4 * self.view.d * self.rank * self.view.k


def shards(shapes: Iterable[Shape], n: int, placement: str) -> list[Shard]:
    """Matrices on n GPUs, under `shard_placement` or as FSDP2 does by itself."""
    views = [matrix_view(shape) for shape in shapes]
    dims = [
        shard_placement(torch.empty(view.shape, device="meta"), n) if placement == "shard_placement" else None
        for view in views
    ]
    return [Shard(v, (dim.dim if dim else 0) == int(not v.transposed)) for v, dim in zip(views, dims, strict=True)]


def bandwidth(n: int) -> float:
    """Bytes a second between n GPUs."""
    return EFFICIENCY * (NVLINK_BYTES if n <= NODE else NETWORK_BYTES)


def all_reduce(size: float, n: int) -> float:
    """Seconds of one message; none is sent where there is nothing to say."""
    return (2 * (n - 1) / n * size / bandwidth(n) + LATENCY * math.log2(n)) if size else 0.0


def to_or_from_one(size: float, n: int) -> float:
    """Seconds of a reduction to one process, or of a broadcast."""
    return size / bandwidth(n) + LATENCY * math.log2(n)


def training(weights: float, n: int) -> float:
    """Seconds of forward and backward passes in one step."""
    return 6 * weights * BATCH / (n * MFU * BF16_FLOPS)


def arithmetic(matrices: list[Shard], n: int) -> float:
    """Seconds of a step's products."""
    return sum(x.step_operations for x in matrices) / (n * PRODUCTS * FP32_FLOPS)


def whole_gradients(matrices: list[Shard], n: int) -> float:
    """Seconds that it takes to gather float32 gradients and to do the whole step in every process."""
    size = sum(4 * x.view.rows * x.view.columns for x in matrices)
    return (n - 1) / n * size / bandwidth(n) + LATENCY * math.log2(n) * len(matrices) + arithmetic(matrices, 1)


def refresh(matrix: Shard, n: int, projection: str, *, first: bool) -> tuple[float, float]:
    """Seconds of products and messages of one refresh, and of the decomposition, which one process does."""
    d, k, r = matrix.view.d, matrix.view.k, matrix.rank
    speed = n * PRODUCTS * FP32_FLOPS
    if projection == "random":
        return all_reduce(4, n), QR[0] * d * r * r / QR[1]
    told = to_or_from_one(4 * d * r, n)
    if projection == "power":
        qr = QR[0] * d * r * r / QR[1]
        sweep = 4 * d * r * k / speed
        more = 2 * (sweep + all_reduce(4 * d * r, n) + qr) if first else 0.0
        return all_reduce(4, n) + more + sweep + 2 * told, qr
    return all_reduce(4, n) + 2 * d * d * k / speed + to_or_from_one(4 * d * d, n) + told, EIGH[0] * d**3 / EIGH[1]


def refreshes(matrices: list[Shard], n: int, projection: str) -> tuple[float, float]:
    """Seconds that refreshes add to the first step and, on average, to every later one.

    Matrices that are due in the same step are decomposed by different processes at once; all of them in the first step,
    one or a few in the others. A random basis is drawn by every process.
    """
    costs = {first: [refresh(x, n, projection, first=first) for x in matrices] for first in (True, False)}
    messages = {first: sum(a for a, _ in costs[first]) for first in costs}
    alone = [b for _, b in costs[False]]
    if projection == "random":
        return messages[True] + sum(alone), (messages[False] + sum(alone)) / GAP
    due = len(matrices) / GAP
    first = messages[True] + (max(alone) if n >= len(matrices) else sum(alone) / n)
    return first, messages[False] / GAP + sum(alone) / len(matrices) * (min(due, 1.0) if n >= due else due / n)


def milliseconds(seconds: float) -> str:
    """Three digits."""
    return f"{1e3 * seconds:,.0f}" if seconds >= 0.1 else f"{1e3 * seconds:.3g}"


def megabytes(size: float) -> str:
    """Whole ones."""
    return "0" if not size else f"{size / 1e6:,.0f} MB"


def main() -> None:
    """Prints the tables, and writes them."""
    parser = argparse.ArgumentParser(description="A model of the optimizer's step on 8 to 4096 GPUs.")
    parser.add_argument("--markdown", type=Path, metavar="FILE", help="write a page there")
    args = parser.parse_args()
    parts = [
        "# A step on 8 to 4096 GPUs, by a model",
        "Written by `python benchmarks/distributed.py --markdown docs/benchmarks/distributed.md`. **Nothing here has "
        "been measured.** The model takes the shapes of all projected matrices, where "
        "[`shard_placement`](../distributed.md) puts them, and these constants.",
        assumptions(),
    ]
    for name, (weights, shapes) in MODELS.items():
        parts += [f"## {name}", steps(weights, shapes), f"GaLoreAdamW's refreshes of {name}:", bases(weights, shapes)]
    parts.append(READING)
    page = "\n\n".join(parts)
    print(page)
    if args.markdown:
        args.markdown.write_text(page + "\n")


def assumptions() -> str:
    """The constants, and where they are from."""
    rows = [
        (
            "GPU",
            "H100 SXM: 989 TFLOPS BF16, 67 FP32, 3.35 TB/s",
            "[data sheet](https://www.nvidia.com/data-center/h100/)",
        ),
        ("up to 8 GPUs", "NVLink, 450 GB/s one way", "the same: 900 GB/s both ways"),
        (
            "more",
            "50 GB/s one way for each GPU",
            "400 Gb/s a GPU: [DGX H100](https://docs.nvidia.com/dgx/dgxh100-user-guide/), "
            "[Llama 3](https://arxiv.org/abs/2407.21783)",
        ),
        (
            "all-reduce",
            "2 (n - 1) / n bytes / bandwidth + latency log2 n",
            "[nccl-tests](https://github.com/NVIDIA/nccl-tests/blob/master/doc/PERFORMANCE.md)",
        ),
        ("training", "6 weights x 4 M tokens a step, at 40 % of BF16", "Llama 3: 38 to 43 %; tokens as LLaMA"),
        ("latency", f"{1e6 * LATENCY:.0f} us for each doubling", "assumed"),
        ("efficiency", f"{EFFICIENCY:.0%} of bandwidth, {PRODUCTS:.0%} of FP32 in products", "assumed"),
        ("decompositions", "eigh 9 d^3 at 1 TFLOPS, QR 4 d r^2 at 5 TFLOPS", "assumed"),
        ("optimizer", f"rank {RANK}, update_proj_gap {GAP}, float32 gradients and states", "defaults"),
    ]
    return table(("", "", "from"), rows)


def steps(weights: float, shapes: list[Shape]) -> str:
    """Steps between refreshes."""
    rows = []
    for n in GPUS:
        ours, plain = shards(shapes, n, "shard_placement"), shards(shapes, n, "FSDP2")
        elements = sum(math.prod(shape) for shape in shapes)
        adamw = 28 * elements / (n * EFFICIENCY * MEMORY_BYTES)
        cells = []
        for matrices in (ours, plain):
            sent = sum(x.step_bytes for x in matrices)
            cells += [megabytes(sent), milliseconds(arithmetic(matrices, n) + all_reduce(sent, n))]
        gathered = whole_gradients(ours, n)
        rows.append((n, milliseconds(training(weights, n)), milliseconds(adamw), *cells, milliseconds(gathered)))
    header = (
        *("GPUs", "forward and backward, ms", "AdamW, ms"),
        *("sent with shard_placement", "step, ms", "sent with dim 0", "step, ms", "whole gradients gathered, ms"),
    )
    return table(header, rows)


def bases(weights: float, shapes: list[Shape]) -> str:
    """Refreshes."""
    rows = []
    for n in GPUS:
        matrices = shards(shapes, n, "shard_placement")
        cells = []
        for projection in ("svd", "power", "random"):
            first, later = refreshes(matrices, n, projection)
            cells += [f"{first:.2g} s", f"{milliseconds(later)} ms ({later / training(weights, n):.1%})"]
        rows.append((n, *cells))
    header = ["GPUs"]
    for projection in ("svd", "power", "random"):
        header += [f"{projection}: first step", "later steps, mean"]
    return table(header, rows)


READING = """\
## What it says

- Arithmetic is divided by the number of GPUs like everything else. What does not shrink is what is sent, and a
  decomposition, which one GPU does: their share of a step grows with that number. `svd`, 1 % of a step on 8 GPUs, takes
  longer than forward and backward passes on 4,096; there use `projection="power"`.
- `shard_placement` sends nothing where the number of GPUs divides the columns of wide matrices; 512 does not divide
  11,008. Then shard within groups (HSDP), and say how many hold one copy: `functools.partial(shard_placement,
  processes=8)`. A step sends nothing at any size then.
- Whole gradients gathered in every process, as sharded runs of low-rank optimizers do otherwise, cost as much on any
  number of GPUs."""


if __name__ == "__main__":
    main()
