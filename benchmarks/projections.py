# SPDX-License-Identifier: Apache-2.0
"""What each projection costs, and how much of a gradient it captures.

    python benchmarks/projections.py --markdown docs/benchmarks/projections.md

The clock is the CPU time of this process with one thread; contestants take turns in shuffled order. The second part
compares the ways to compute all d coefficients of a fixed dictionary, from which it selects.
"""

import argparse
import statistics
from functools import partial
from pathlib import Path

import torch
from _common import interleaved, rank, report, shape, table
from refresh import trained_layer
from torch import Tensor

from slimstate.projections import DCT, SVD, Coordinates, Hadamard, PowerIteration, RandomOrthogonal

SHAPES = [(128, 1024), (256, 1024), (512, 1376), (1024, 2816), (2048, 5461)]


def main() -> None:
    """Measures what the command line asks for."""
    parser = argparse.ArgumentParser(description="Times projections, and measures the energy they capture.")
    add = parser.add_argument
    add("--shapes", nargs="+", type=shape, default=[SHAPES], help="of the second part, ROWSxCOLUMNS")
    add("--rank", type=rank, default=0.25, help="a count or a share (default: 0.25)")
    add("--rounds", type=int, default=5, help="turns of each (default: 5)")
    add("--markdown", type=Path, metavar="FILE", help="write the report there")
    args = parser.parse_args()
    torch.set_num_threads(1)
    torch.manual_seed(0)
    sections = on_gradients(trained_layer(), args.rank, args.rounds)
    sections += selections(list(dict.fromkeys(s for group in args.shapes for s in group)), args.rounds)
    report("Projections", sections, args.markdown, threads=", one thread used")


def on_gradients(gradients: list[Tensor], rank: int | float, rounds: int) -> list[str]:
    """Energy and cost on the gradients of a trained layer."""
    projections = {
        "SVD": SVD(rank=rank),
        "PowerIteration, warm": PowerIteration(rank=rank),
        "RandomOrthogonal": RandomOrthogonal(rank=rank),
        "DCT, l1": DCT(rank=rank),
        "DCT, l2": DCT(rank=rank, norm=2),
        "Hadamard, l1": Hadamard(rank=rank),
        "Hadamard, l2": Hadamard(rank=rank, norm=2),
        "Coordinates, columns": Coordinates(rank=rank),
    }
    ms = {name: [p.view(tuple(g.shape)).open(g) for g in gradients] for name, p in projections.items()}
    kept = {name: [p.fit(m, None, (0, 0, 0)) for m in ms[name]] for name, p in projections.items()}

    def energy(name: str) -> list[float]:
        pairs = zip(ms[name], kept[name], strict=True)
        return [(projections[name].down(m, b).square().sum() / m.square().sum()).item() for m, b in pairs]

    def fit(name: str) -> None:
        for i, m in enumerate(ms[name]):
            projections[name].fit(m, kept[name][i], (0, 1, i))

    def down(name: str) -> None:
        for m, b in zip(ms[name], kept[name], strict=True):
            projections[name].down(m, b)

    energies = {name: energy(name) for name in projections}
    fits = interleaved({name: partial(fit, name) for name in projections}, rounds)
    downs = interleaved({name: partial(down, name) for name in projections}, rounds)
    rows = [
        [name, f"{statistics.mean(energies[name]):.3f}", f"{min(energies[name]):.3f}",
         *(f"{1e3 * statistics.median(times[name]):.1f}" for times in (fits, downs)),
         f"{sum(b.numel() * b.itemsize for b in kept[name]):,}"]
        for name in projections
    ]  # fmt: skip
    return [
        f"## On a trained layer\n\nRank {rank}, float32: the seven gradients of a layer of LLaMA-60M's shapes after 40 "
        "steps on real text. Captured energy; median CPU ms for all seven together.",
        table(["projection", "mean energy", "least", "fit", "down", "bytes kept"], rows),
    ]


def selections(shapes: list[tuple[int, int]], rounds: int) -> list[str]:
    """The cost of a selection by each way to compute the coefficients."""
    ways = {"matmul": DCT(method="matmul"), "fft": DCT(method="fft"), "Hadamard": Hadamard()}
    rows = []
    for d, k in shapes:
        for layout, m in (("rows", torch.randn(d, k)), ("columns", torch.randn(k, d).mT)):
            times = interleaved({name: partial(p.fit, m, None, ()) for name, p in ways.items()}, rounds)
            median = {name: statistics.median(t) for name, t in times.items()}
            cells = [f"{1e9 * median[name] / (d * k):.1f} ({median[name] / median['matmul']:.0%})" for name in ways]
            rows.append([f"{d} x {k}", layout, *cells])
    return [
        "## Selection from a fixed dictionary\n\nMedian CPU ns a weight, and the share of the product's; M (d x k) "
        "with its rows or its columns contiguous (the left and the right side).",
        table(["d x k", "contiguous", "DCT, product", "DCT, FFT", "Hadamard"], rows),
    ]


if __name__ == "__main__":
    main()
