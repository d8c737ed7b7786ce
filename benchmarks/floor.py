# SPDX-License-Identifier: Apache-2.0
"""What a step could not be faster than on this machine, and what stands between that and the step.

    python benchmarks/floor.py --markdown docs/benchmarks/floor.md

The floor of an optimizer is the bytes that it must move over the best bandwidth measured here, and the operations that
it must do over the best rate of products. Beside it: the step, and the same step on as many small tensors, which is the
time that Python and the launches take.
"""

import argparse
import json
from collections.abc import Callable
from fnmatch import fnmatchcase
from pathlib import Path
from typing import Any

import torch
from _common import CLOCKS, interleaved, keep_freed_memory, report, table
from _contestants import ADAMW, OURS, REFERENCES, SIZES, TITLES, Problem, Size
from step import DTYPES, figure, measure, tf32

SHRUNK = 32
"""Sides and rank of the small tensors: so much shorter."""

TURNS = 9
"""Of each rate."""


def main() -> None:
    """Measures what the command line asks for."""
    parser = argparse.ArgumentParser(description="Measures bandwidth and product rates, and the floors they make.")
    add = parser.add_argument
    add("--device", choices=CLOCKS, default="cpu", help="(default: cpu)")
    add("--sizes", nargs="+", choices=SIZES, metavar="SIZE", help="(default: 60m-body 60m, or 1b on a GPU)")
    add("--dtypes", nargs="+", choices=DTYPES, default=["float32"], help="of weights and gradients (default: float32)")
    add("--only", nargs="+", default=["*"], metavar="PATTERN", help="optimizers whose name matches one of these")
    add("--rounds", type=int, default=7, help="turns of each optimizer (default: 7)")
    add("--elements", type=int, default=2**24, help="of the arrays that bandwidth is measured on (default: 2^24)")
    add("--measured", type=Path, metavar="FILE", help="take the steps from what step.py --json wrote")
    add("--markdown", type=Path, metavar="FILE", help="write the report there")
    add("--json", type=Path, metavar="FILE", help="write the figures there")
    args = parser.parse_args()
    torch.set_num_threads(1)
    torch.manual_seed(0)
    keep_freed_memory()

    contestants = {n: c for n, c in OURS.items() if c.floor is not None and any(fnmatchcase(n, p) for p in args.only)}
    sizes = args.sizes or (["1b"] if args.device == "cuda" else ["60m-body", "60m"])
    steps: dict[str, Any] = json.loads(args.measured.read_text()) if args.measured else {}
    streams = bandwidths(args.elements, args.device)
    rates = product_rates(sizes, args.device)
    sections, figures = rate_sections(streams, rates, args.elements, args.device), {}
    bandwidth, rate = max(streams.values()), max(rates.values())
    for name in sizes:
        for dtype in args.dtypes:
            key, size = f"{name}, {dtype}", SIZES[name]
            taking_part = {n: c for n, c in contestants.items() if c.sizes is None or name in c.sizes}
            if key not in steps:
                problem = Problem(size, DTYPES[dtype], args.device)
                found = measure(problem, taking_part, args.rounds)
                steps[key] = {n: figure(problem, r) for n, r in found.items()}
            small = Problem(shrunk(size), DTYPES[dtype], args.device)
            overhead = {n: figure(small, r) for n, r in measure(small, taking_part, args.rounds, quiet).items()}
            rows: dict[str, dict[str, float]] = {}
            for n, contestant in ({ADAMW: REFERENCES[ADAMW]} | taking_part).items():
                if "seconds" not in steps[key].get(n, {}) or "seconds" not in overhead[n]:
                    continue
                floor = contestant.floor
                rows[n] = {
                    "bytes": floor.moved(size, DTYPES[dtype].itemsize),
                    "operations": floor.operations(size),
                    "floor": floor.moved(size, DTYPES[dtype].itemsize) / bandwidth + floor.operations(size) / rate,
                    "overhead": overhead[n]["least"],
                    "step": steps[key][n]["least"],
                }
            figures[key] = rows
            sections += section(name, dtype, size, rows, bandwidth, rate)
    report("Floors", sections, args.markdown, threads=", one thread used")
    if args.json:
        args.json.parent.mkdir(parents=True, exist_ok=True)
        args.json.write_text(json.dumps({"bandwidth": bandwidth, "rate": rate, "floors": figures}, indent=1))


def quiet(_: str) -> None:
    """Says nothing."""


def shrunk(size: Size) -> Size:
    """As many tensors, too small for their elements to matter."""
    return Size(
        tuple((max(8, rows // SHRUNK), max(8, columns // SHRUNK)) for rows, columns in size.projected),
        max(2, size.rank // SHRUNK),
        tuple((rows // SHRUNK**2, columns // SHRUNK) for rows, columns in size.tables),
        tuple(n // SHRUNK for n in size.vectors),
    )


def bandwidths(n: int, device: str) -> dict[str, float]:
    """Bytes a second of calls that read and write, on arrays of n float32 numbers."""
    a, b, c = (torch.ones(n, device=device) for _ in range(3))
    p = torch.nn.Parameter(torch.ones(n, device=device))
    p.grad = torch.full_like(p, 1e-3)
    adamw = torch.optim.AdamW([p], fused=True)
    calls: dict[str, tuple[int, Callable[[], object]]] = {
        "copy, 1 read, 1 written": (2, lambda: a.copy_(b)),
        "scale in place, 1 read, 1 written": (2, lambda: a.mul_(0.999)),
        "add, 2 read, 1 written": (3, lambda: torch.add(a, b, alpha=0.5, out=c)),
        "addcmul in place, 3 read, 1 written": (4, lambda: a.addcmul_(b, c, value=1e-3)),
        "sum, 1 read": (1, lambda: a.sum()),
        "fused AdamW, 4 read, 3 written": (7, adamw.step),
    }
    adamw.step()
    times = interleaved({name: call for name, (_, call) in calls.items()}, TURNS, clock=CLOCKS[device])
    return {name: arrays * 4 * n / min(times[name]) for name, (arrays, _) in calls.items()}


def product_rates(sizes: list[str], device: str) -> dict[str, float]:
    """Operations a second of float32 products: of a square one, and of those of the sizes' matrices."""
    shapes = {(min(s), max(s), SIZES[name].rank) for name in sizes for s in SIZES[name].projected}
    calls: dict[str, tuple[float, Callable[[], object]]] = {}
    side = 1024
    x, y, z = (torch.randn(side, side, device=device) for _ in range(3))
    calls[f"{side} x {side} x {side}"] = 2.0 * side**3, lambda: torch.mm(x, y, out=z)
    for d, k, r in sorted(shapes):
        q, m, w = (torch.randn(*s, device=device) for s in ((d, r), (d, k), (d, k)))
        down = torch.randn(r, k, device=device)
        calls[f"QᵀM, {d} x {k}, rank {r}"] = 2.0 * d * k * r, lambda q=q, m=m, down=down: torch.mm(q.mT, m, out=down)
        calls[f"W + QU, {d} x {k}, rank {r}"] = (
            2.0 * d * k * r,
            lambda q=q, w=w, down=down: w.addmm_(q, down, alpha=1e-6),
        )
    for _, call in calls.values():
        call()
    times = interleaved({name: call for name, (_, call) in calls.items()}, TURNS, clock=CLOCKS[device])
    return {name: operations / min(times[name]) for name, (operations, _) in calls.items()}


def rate_sections(streams: dict[str, float], rates: dict[str, float], elements: int, device: str) -> list[str]:
    """What was measured of the machine."""
    products = "" if device == "cpu" else f"; TF32 is {tf32()}"
    return [
        f"## This machine\n\nBest of {TURNS} turns, float32. The arrays have {4 * elements / 2**20:.0f} MiB each. A "
        "store into memory that was not read first costs a read too, which is why a copy seems slow.",
        table(["bytes", "GB/s"], [(name, f"{x / 1e9:.1f}") for name, x in streams.items()]),
        table([f"products{products}", "GFLOP/s"], [(name, f"{x / 1e9:.1f}") for name, x in rates.items()]),
    ]


def section(
    name: str, dtype: str, size: Size, rows: dict[str, dict[str, float]], bandwidth: float, rate: float
) -> list[str]:
    """The floors of a size."""
    cells = []
    for n, x in sorted(rows.items(), key=lambda item: item[1]["step"]):
        streaming, multiplying = x["bytes"] / bandwidth, x["operations"] / rate
        rest = x["step"] - x["floor"] - x["overhead"]
        cells.append(
            (n, f"{x['bytes'] / 1e6:.0f}", f"{x['operations'] / 1e9:.1f}",
             *(f"{1e3 * t:.1f}" for t in (streaming, multiplying, x["floor"], x["overhead"], rest, x["step"])),
             f"{x['step'] / x['floor']:.1f}")
        )  # fmt: skip
    header = ("", "MB", "GFLOP", "bytes, ms", "products, ms", "floor, ms", "Python and launches, ms", "rest, ms",
              "step, ms", "x floor")  # fmt: skip
    return [
        f"## {TITLES[name]}, {dtype}\n\n{len(size.projected)} matrices, rank {size.rank}. The floor is the sum of the "
        f"two: bytes over {bandwidth / 1e9:.1f} GB/s, operations over {rate / 1e9:.1f} GFLOP/s, the best rates above. "
        "So steps are the fastest of their turns too. "
        f"Python and launches: the same step on as many tensors with sides {SHRUNK} times as short. The rest is what "
        "kernels take beyond the floor: passes that read again, rates below the best, transforms, which no product "
        "rate is reached in.",
        table(header, cells),
    ]


if __name__ == "__main__":
    main()
