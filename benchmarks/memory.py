# SPDX-License-Identifier: Apache-2.0
"""What each optimizer keeps, what that keeps alive, and what a step needs for a moment.

    python benchmarks/memory.py --markdown docs/benchmarks/memory.md

Bytes are counted, not timed, so that they are the same on every machine.
"""

import argparse
import contextlib
import gc
import json
from fnmatch import fnmatchcase
from pathlib import Path
from typing import Any

import torch
from _common import mib, most_allocated, report, table
from _contestants import (
    ADAMW,
    OURS,
    PEERS,
    REFERENCES,
    SIZES,
    TITLES,
    Contestant,
    Problem,
    Runner,
    held_bytes,
    stand_in_decompositions,
    tensors,
)
from step import because, usual_allocations

from slimstate.optim import state_bytes


def main() -> None:
    """Counts what the command line asks for."""
    parser = argparse.ArgumentParser(description="Counts the bytes of state and of temporaries of each optimizer.")
    add = parser.add_argument
    add("--device", choices=("cpu", "cuda"), default="cpu", help="(default: cpu)")
    add("--sizes", nargs="+", choices=SIZES, default=["60m", "1b-layer"], metavar="SIZE",
        help=f"of {', '.join(SIZES)} (default: 60m 1b-layer)")  # fmt: skip
    add("--only", nargs="+", default=["*"], metavar="PATTERN", help="optimizers whose name matches one of these")
    add("--no-peers", action="store_true", help="this package and torch alone")
    add("--markdown", type=Path, metavar="FILE", help="write the report there")
    add("--json", type=Path, metavar="FILE", help="write the figures there")
    args = parser.parse_args()
    torch.set_num_threads(1)
    everybody = {ADAMW: REFERENCES[ADAMW]} | OURS | ({} if args.no_peers else PEERS)
    everybody = {n: c for n, c in everybody.items() if n == ADAMW or any(fnmatchcase(n, p) for p in args.only)}
    sections, figures = [EXPLANATION], {}
    for size in args.sizes:
        torch.manual_seed(0)
        problem = Problem(SIZES[size], device=args.device)
        found = {n: count(problem, c) for n, c in everybody.items() if c.sizes is None or size in c.sizes}
        sections += section(size, problem, everybody, found)
        figures[size] = found
    report("Memory", sections, args.markdown)
    if args.json:
        args.json.parent.mkdir(parents=True, exist_ok=True)
        args.json.write_text(json.dumps(figures, indent=1))


def count(problem: Problem, contestant: Contestant) -> dict[str, Any]:
    """The bytes of an optimizer after two steps, or why it does not run."""
    try:
        runner = contestant.build(problem)
        foreign = contestant.origin not in ("torch", "slimstate")
        with stand_in_decompositions(problem) if foreign else contextlib.nullcontext():
            step(runner)
        step(runner)
        sizes = usual_allocations(runner, problem.device)
    except Exception as error:
        if contestant.origin == "slimstate" and not isinstance(error, ValueError):
            raise
        return {"why": because(error)}
    state = dict(runner.optimizer.state)
    smallest = min(p.numel() * p.itemsize for p in problem.projected)
    found = {
        "state": sum(x.numel() * x.itemsize for x in tensors(state)),
        "alive": sum(held_bytes(state).values()),
        "state_bytes": state_bytes(runner.optimizer),
        "peak": most_allocated(sizes),
        "largest": max(sizes, default=0),
        "full-size": sum(n for n in sizes if n >= smallest),
    }
    if contestant.floor is not None:
        found["formula"] = contestant.floor.kept(problem.size)
    del runner, state
    gc.collect()
    return found


def step(runner: Runner) -> None:
    """One step."""
    runner.prepare()
    runner.step()


def section(
    size: str, problem: Problem, contestants: dict[str, Contestant], found: dict[str, dict[str, Any]]
) -> list[str]:
    """The table of a size."""
    whole = found[ADAMW]["state"]
    rows = []
    for name in sorted((n for n in found if "why" not in found[n]), key=lambda n: found[n]["alive"]):
        x = found[name]
        formula = "" if "formula" not in x else mib(x["formula"])
        rows.append(
            (name + ("*" if contestants[name].shim else ""), mib(x["state"]), f"{x['state'] / whole:.0%}", formula,
             mib(x["alive"]), mib(x["peak"]), mib(x["largest"]), mib(x["full-size"]))
        )  # fmt: skip
    smallest, largest = (f(p.numel() * p.itemsize for p in problem.projected) for f in (min, max))
    header = ("", "state", "of AdamW's", "by formula", "kept alive", "temporaries, most at once", "largest",
              "full-size ones")  # fmt: skip
    parts = [
        f"## {TITLES[size]}, float32\n\n{len(problem.params)} parameters with "
        f"{sum(p.numel() for p in problem.params) / 1e6:.1f} M weights; rank {problem.size.rank}, density 0.25. "
        f"Matrices have {mib(smallest)} to {mib(largest)}.",
        table(header, rows),
    ]
    if any(contestants[n].shim for n in found):
        parts.append("\n".join(f"\\* {n}: {contestants[n].shim}." for n in found if contestants[n].shim))
    if silent := [f"- {n}: {x['why']}" for n, x in found.items() if "why" in x]:
        parts.append("Did not run:\n\n" + "\n".join(silent))
    return parts


EXPLANATION = (
    "`state` counts the elements of all tensors that an optimizer keeps, `kept alive` whole storages: a slice of a "
    "large tensor keeps the large one. The formulas are those of the optimizers' pages, without the counters of each "
    "parameter. Temporaries are those of one step that fits no basis, in torch's allocator; full-size ones are all "
    "those, one after another, that are no smaller than the smallest matrix. Where blocks of up to 4 MiB or R (rank x "
    "the longer side) are that large themselves, that says little: the layer of LLaMA-1B is where it counts."
)


if __name__ == "__main__":
    main()
