# SPDX-License-Identifier: Apache-2.0
"""What one step of GaLoreAdamW costs beside the two products that it cannot avoid, and what it allocates.

    python benchmarks/step.py --markdown docs/benchmarks/step.md

The clock is the CPU time of this process with one thread; contestants take turns in shuffled order on the same weights
and gradients. Every gradient changes sign before each turn, so that the caches are alike for all.
"""

import argparse
import itertools
import json
import statistics
import tempfile
from collections.abc import Callable
from pathlib import Path

import torch
from _common import BODIES, galore_torch, interleaved, matrices, rank, refreshes, report, shape, table
from torch import Tensor
from torch.profiler import ProfilerActivity, profile

from slimstate.optim import GaLoreAdamW

TARGET = 1.3
PRODUCTS, PLAIN, REFRESH = "the two products alone", "GaLoreAdamW, plain step", "GaLoreAdamW, step with a refresh"
FUSED, ORIGINAL = "torch.optim.AdamW(fused=True)", "galore-torch's GaLoreAdamW, plain step"


def main() -> None:
    """Measures what the command line asks for."""
    parser = argparse.ArgumentParser(description="Times one step of GaLoreAdamW against the products it consists of.")
    names = ", ".join(BODIES)
    parser.add_argument("--shapes", nargs="+", type=shape, default=[BODIES["60m"]], help=f"{names}, or ROWSxCOLUMNS")
    parser.add_argument("--rank", type=rank, default=128, help="a count or a share (default: 128)")
    parser.add_argument("--rounds", type=int, default=30, help="(default: 30)")
    parser.add_argument("--markdown", type=Path, metavar="FILE", help="write the report there")
    args = parser.parse_args()
    torch.set_num_threads(1)
    torch.manual_seed(0)

    params = matrices(itertools.chain(*args.shapes))
    ours = GaLoreAdamW(params, lr=1e-4, rank=args.rank)
    contestants = {PLAIN: ours.step, FUSED: torch.optim.AdamW(params, lr=1e-4, fused=True).step}
    ours.step()  # fits the bases that the products use
    contestants[PRODUCTS] = products(params, ours)
    if (original := galore_torch(params, args.rank)) is not None:
        contestants[ORIGINAL] = original.step
    for step in contestants.values():
        step()

    def new_gradients() -> None:
        for p in params:
            p.grad.neg_()

    bases = refreshes(ours)

    def kind(name: str) -> str:
        nonlocal bases
        if name != PLAIN or bases == (bases := refreshes(ours)):
            return name
        return REFRESH

    times = interleaved(contestants, args.rounds, new_gradients, kind)
    memory: dict[str, tuple[int, int]] = {}
    for name in contestants:
        while name not in memory or (name == PLAIN and REFRESH in times and REFRESH not in memory):
            sizes = allocations(contestants[name])
            memory.setdefault(kind(name), sizes)

    weights = sum(p.numel() for p in params)
    floor, fused = (statistics.median(times[name]) for name in (PRODUCTS, FUSED))
    rows = []
    for name in (PRODUCTS, PLAIN, REFRESH, FUSED, ORIGINAL):
        if name in times:
            time = statistics.median(times[name])
            largest, peak = memory[name]
            rows.append(
                (name, len(times[name]), f"{1e3 * time:.1f}", f"{1e9 * time / weights:.2f}", f"{time / floor:.2f}",
                 f"{time / fused:.1f}", mib(largest), mib(peak))
            )  # fmt: skip
    header = ("", "turns", "CPU ms", "ns/weight", "x products", "x fused", "largest allocation", "peak of temporaries")
    ratio = statistics.median(times[PLAIN]) / floor
    verdict = "met" if ratio <= TARGET else "missed"
    largest_matrix = max(p.numel() * p.itemsize for p in params)
    r_by_k = max(ours.state[p]["exp_avg"].numel() * p.itemsize for p in params)
    sections = [
        f"{len(params)} matrices, {weights / 1e6:.1f} M weights in float32, rank {args.rank}; medians.",
        table(header, rows),
        f"A plain step takes {ratio:.2f} times the two products, R = QᵀM and W ← βW - αQU, into memory allocated "
        f"beforehand (target: at most {TARGET}; {verdict}).",
        f"The largest matrix has {mib(largest_matrix)}, the largest R (rank x the kept side) {mib(r_by_k)}. The last "
        "two columns are of one step in torch's allocator, as its profiler records it; what the BLAS packs for itself "
        "is not in them. A basis that is due adds its decomposition and the rotation of the moments.",
    ]
    report("One step of GaLoreAdamW", sections, args.markdown, threads=", one thread used")


def products(params: list[Tensor], ours: GaLoreAdamW) -> Callable[[], None]:
    """R = Q^T M and W.addmm_(Q, U) for every matrix, on the optimizer's own bases, R and U allocated beforehand."""
    work = []
    for p in params:
        basis = ours.state[p]["basis"]
        r, u = torch.empty_like(ours.state[p]["exp_avg"]), torch.randn_like(ours.state[p]["exp_avg"])
        transposed = p.shape[0] >= p.shape[1]
        m = p.grad.mT if transposed else p.grad
        work.append((basis.mT, m, r, p.detach(), *((u.mT, basis.mT) if transposed else (basis, u))))

    def run() -> None:
        for down, m, r, w, a, b in work:
            torch.mm(down, m, out=r)
            w.addmm_(a, b, beta=1 - 1e-6, alpha=-2.5e-5)

    return run


def allocations(step: Callable[[], object]) -> tuple[int, int]:
    """The largest allocation of one call, and the most that it held at once, in bytes."""
    with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as profiler:
        step()
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder, "trace.json")
        profiler.export_chrome_trace(str(path))
        events = [e for e in json.loads(path.read_text())["traceEvents"] if e["name"] == "[memory]"]
    sizes = [e["args"]["Bytes"] for e in sorted(events, key=lambda e: e["ts"])]
    return max(sizes, default=0), max(itertools.accumulate(sizes), default=0)


def mib(size: int) -> str:
    """Bytes for a reader."""
    return f"{size / 2**20:.2f} MiB"


if __name__ == "__main__":
    main()
