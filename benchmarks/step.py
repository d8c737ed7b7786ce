# SPDX-License-Identifier: Apache-2.0
"""What one step of each optimizer costs beside a fused AdamW on the same tensors, and what it allocates.

    python benchmarks/step.py --markdown docs/benchmarks/step.md
    python benchmarks/step.py --sizes 60m-body --only "GaLore*" --rounds 30
    python benchmarks/step.py --device cuda

On a CPU the clock is the CPU time of this process with one thread; on a GPU it is that between two events. Each turn of
a contestant has a turn of the fused AdamW next to it, and for low-rank optimizers one of their two products; the ratios
are medians over turns. Every gradient changes sign before each call. Steps in which a basis is fitted are told apart.
"""

import argparse
import contextlib
import gc
import json
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from fnmatch import fnmatchcase
from pathlib import Path
from statistics import median
from typing import Any

import torch
from _common import (
    CLOCKS,
    Turns,
    allocations,
    keep_freed_memory,
    mib,
    most_allocated,
    paired,
    report,
    spread,
    table,
)
from _contestants import (
    ADAMW,
    OURS,
    PEERS,
    PRODUCTS,
    REFERENCES,
    SGD,
    SIZES,
    TITLES,
    Contestant,
    Problem,
    Runner,
    fitted,
    stand_in_decompositions,
)

HEAT = {"cpu": 8, "cuda": 3}
"""So many contestants are alive at a time: their states would not all fit into memory."""

ROUNDS = {"cpu": 9, "cuda": 100}

SLOW = 0.4
"""A contestant whose step takes more seconds than this gets a third of the turns."""

DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16}
SHORT = {PRODUCTS: "products", SGD: "SGD"}


@dataclass
class Result:
    """What is known of a contestant; `why` where it did not run."""

    why: str = ""
    turns: Turns = field(default_factory=Turns)
    sizes: list[int] = field(default_factory=list)

    @property
    def plain(self) -> bool | None:
        """Which turns count: those without a refresh, or all where each has one."""
        return False if not all(self.turns.marked) else None


def main() -> None:
    """Measures what the command line asks for."""
    parser = argparse.ArgumentParser(description="Times one step of each optimizer beside a fused AdamW.")
    add = parser.add_argument
    add("--device", choices=CLOCKS, default="cpu", help="(default: cpu)")
    add("--sizes", nargs="+", choices=SIZES, metavar="SIZE", help=f"of {', '.join(SIZES)} (default: all of the device)")
    add("--dtypes", nargs="+", choices=DTYPES, default=[], help="(default: float32, and bfloat16 on the first size)")
    add("--only", nargs="+", default=["*"], metavar="PATTERN", help="optimizers whose name matches one of these")
    add("--rounds", type=int, help="turns of each; a third for slow ones (default: 9, on a GPU 100)")
    add("--no-peers", action="store_true", help="this package and torch alone")
    add("--markdown", type=Path, metavar="FILE", help="write the report there")
    add("--json", type=Path, metavar="FILE", help="write the figures there")
    args = parser.parse_args()
    torch.set_num_threads(1)
    keep_freed_memory()

    everybody = OURS if args.no_peers else OURS | PEERS
    everybody = {n: c for n, c in everybody.items() if any(fnmatchcase(n, p) for p in args.only)}
    sizes = args.sizes or (["1b", "60m"] if args.device == "cuda" else ["60m-body", "60m", "1b-layer", "small"])
    chosen = [(name, dtype) for name in sizes for dtype in args.dtypes or DTYPES if args.dtypes or (
        dtype == "float32" or name == sizes[0])]  # fmt: skip
    sections, figures = [explanation(args.device)], {}
    for name, dtype in chosen:
        torch.manual_seed(0)
        problem = Problem(SIZES[name], DTYPES[dtype], args.device)
        contestants = {n: c for n, c in everybody.items() if takes_part(c, name, dtype, args.device)}
        results = measure(problem, contestants, args.rounds or ROUNDS[args.device])
        sections += section(name, dtype, problem, contestants, results)
        figures[f"{name}, {dtype}"] = {n: figure(problem, r) for n, r in results.items()}
    report("One step of each optimizer", sections, args.markdown, threads=", one thread used")
    if args.json:
        args.json.parent.mkdir(parents=True, exist_ok=True)
        args.json.write_text(json.dumps(figures, indent=1))


def takes_part(contestant: Contestant, size: str, dtype: str, device: str) -> bool:
    """Whether it does; peers that multiply in low precision take minutes on CPUs, and one shows it."""
    slow = device == "cpu" and dtype != "float32" and not contestant.in_low_precision
    return not slow and (contestant.sizes is None or size in contestant.sizes)


def measure(
    problem: Problem, contestants: dict[str, Contestant], rounds: int, say: Callable[[str], object] = print
) -> dict[str, Result]:
    """Times all contestants, so many at a time, and the references; whoever does not run says why."""
    clock, results = CLOCKS[problem.device], {name: Result() for name in [*REFERENCES, *contestants]}
    references: dict[str, Runner] = {}
    for name, contestant in REFERENCES.items():
        references[name] = contestant.build(problem)
        warm_up(references[name], clock)
    names, size = list(contestants), HEAT[problem.device]
    for heat in [names[i : i + size] for i in range(0, len(names), size)]:
        started, runners, usual = time.monotonic(), {}, {}
        for name in heat:
            try:
                runners[name] = contestants[name].build(problem)
                with stand_in_decompositions(problem) if name in PEERS else contextlib.nullcontext():
                    warm_up(runners[name], clock)
                usual[name] = warm_up(runners[name], clock)
            except Exception as error:
                if contestants[name].origin == "slimstate" and not isinstance(error, ValueError):
                    raise
                results[name].why = because(error)
                runners.pop(name, None)
        run = runners | references
        bases = {name: fitted(runner.optimizer) for name, runner in runners.items()}

        def mark(name: str, run: dict[str, Runner] = run, bases: dict[str, int] = bases) -> bool:
            before, bases[name] = bases[name], fitted(run[name].optimizer)
            return bases[name] > before

        turns = paired(
            {name: runner.step for name, runner in runners.items()},
            {name: runner.step for name, runner in references.items()},
            lambda name: [ADAMW, *([contestants[name].beside] if contestants[name].beside else [])],
            lambda name, usual=usual: rounds if usual[name] <= SLOW else max(1, rounds // 3),
            lambda name, run=run: run[name].prepare(),
            clock,
            mark,
        )
        for name in runners:
            results[name].turns = turns[name]
            results[name].sizes = usual_allocations(runners[name], problem.device)
            for reference, seconds in turns[name].beside.items():
                results[reference].turns.own += seconds
        del run, runners
        gc.collect()
        say(f"{time.monotonic() - started:.0f} s: {', '.join(heat)}")
    for name, runner in references.items():
        if not results[name].turns.own:  # nobody stood beside it
            results[name].turns.own = [warm_up(runner, clock) for _ in range(rounds)]
        results[name].turns.marked = [False] * len(results[name].turns.own)
        results[name].sizes = usual_allocations(runner, problem.device)
    return results


def warm_up(runner: Runner, clock: Callable[[Callable[[], object]], float]) -> float:
    """A turn by itself."""
    runner.prepare()
    return clock(runner.step)


def because(error: Exception) -> str:
    """The reason in one line."""
    return f"{type(error).__name__}: {str(error).strip().splitlines()[0] if str(error).strip() else ''}"[:160]


def usual_allocations(runner: Runner, device: str) -> list[int]:
    """What a step allocates that fits no basis, if there is one in the first few."""
    for _ in range(8):
        runner.prepare()
        before = fitted(runner.optimizer)
        sizes = allocations(runner.step, device)
        if fitted(runner.optimizer) == before:
            break
    return sizes


def figure(problem: Problem, result: Result) -> dict[str, Any]:
    """Numbers for other pages."""
    if result.why:
        return {"why": result.why}
    turns, plain = result.turns, result.plain
    smallest = min(p.numel() * p.itemsize for p in problem.projected)
    found: dict[str, Any] = {
        "turns": len(turns.own),
        "seconds": median(turns.seconds(plain)),
        "least": min(turns.seconds(plain)),
        "largest allocation": max(result.sizes, default=0),
        "peak": most_allocated(result.sizes),
        "smallest matrix": smallest,
        "full-size": sum(n for n in result.sizes if n >= smallest),
    }
    for reference in turns.beside:
        ratios = turns.ratios(reference, plain)
        found |= {
            reference: median(ratios),
            f"{reference}, least": min(turns.seconds(plain)) / min(turns.beside[reference]),
        }
        if plain is False and any(turns.marked):
            found[f"{reference}, with a refresh"] = median(turns.ratios(reference, True))
    return found


def section(
    name: str, dtype: str, problem: Problem, contestants: dict[str, Contestant], results: dict[str, Result]
) -> list[str]:
    """The table of a size."""
    rows, notes, silent = [], [], []
    fastest = sorted(
        (n for n in results if not results[n].why),
        key=lambda n: median(results[n].turns.ratios(ADAMW, results[n].plain)) if results[n].turns.beside else 0,
    )
    for n in fastest:
        result = results[n]
        turns, plain, contestant = result.turns, result.plain, contestants.get(n)
        cells = ["1" if n == ADAMW else "", "", ""]
        if turns.beside:
            cells[0] = spread(turns.ratios(ADAMW, plain))
            if contestant and contestant.beside:
                beside = turns.ratios(contestant.beside, plain)
                cells[1] = f"{median(beside):.2f} x {SHORT[contestant.beside]}"
            if plain is False and any(turns.marked):
                cells[2] = f"{median(turns.ratios(ADAMW, True)):.2f}"
        elif n != ADAMW:
            cells[0] = f"{median(turns.own) / median(results[ADAMW].turns.own):.2f}"
        label = n
        if contestant and contestant.shim:
            label += "*"
            notes.append(f"\\* {n}: {contestant.shim}.")
        seconds = turns.seconds(plain)
        rows.append(
            (label, len(turns.own), f"{1e3 * min(seconds):.2f}", f"{1e3 * median(seconds):.2f}", *cells,
             mib(max(result.sizes, default=0)), mib(most_allocated(result.sizes)))
        )  # fmt: skip
    silent = [f"- {n}: {result.why}" for n, result in results.items() if result.why]
    size = problem.size
    tables = f", {sum(p.numel() for p in problem.tables) / 1e6:.1f} M in embeddings and head" if size.tables else ""
    largest = max(p.numel() * p.itemsize for p in problem.params)
    header = ("", "turns", "least ms", "median ms", "x fused AdamW", "beside", "with a refresh, x fused",
              "largest allocation", "peak of temporaries")  # fmt: skip
    parts = [
        f"## {TITLES[name]}, {dtype}\n\n{len(size.projected)} matrices with {size.weights / 1e6:.1f} M weights"
        f"{tables}; rank {size.rank}, density 0.25. The largest parameter has {mib(largest)}.",
        table(header, rows),
    ]
    if notes:
        parts.append("\n".join(dict.fromkeys(notes)))
    if silent:
        parts.append("Did not run:\n\n" + "\n".join(silent))
    return parts


def explanation(device: str) -> str:
    """How the tables are to be read."""
    clock = {
        "cpu": "CPU ms of this process with one thread. Freed memory stays in the process, which spares those that "
        "allocate much the cost of new pages.",
        "cuda": f"ms between two CUDA events. TF32 in float32 products is {tf32()}.",
    }[device]
    return (
        f"{clock} `x fused AdamW` is the median (and the quartiles) over turns of the ratio to a step of "
        "`torch.optim.AdamW(fused=True)` right before or after, so that what slows the machine slows both; `beside` "
        "the same against the two products, "
        "R = QᵀM and W ← βW - αQU at the same rank, into memory allocated beforehand (with a fused AdamW of what is "
        "not projected), or against `torch.optim.SGD(fused=True)`. Steps in which a basis is fitted are in a column of "
        "their own, but for optimizers that choose theirs in every step. The last two columns are of one step in "
        "torch's allocator; what the BLAS packs for itself is not in them."
    )


def tf32() -> str:
    """Whether float32 products are rounded."""
    return "on" if torch.backends.cuda.matmul.allow_tf32 else "off"


if __name__ == "__main__":
    main()
