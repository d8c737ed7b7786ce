# SPDX-License-Identifier: Apache-2.0
"""Runs the benchmarks, writes docs/benchmarks, and says which targets are met.

    python benchmarks/all.py
    python benchmarks/all.py step targets --device cuda

Each part is a process of its own, and hands its figures on as JSON in build/bench: `targets` reads what is there. On a
quiet machine the parts that run by default take about a quarter of an hour; the figures of a busy one are worth little.
"""

import argparse
import json
import subprocess
import sys
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from _common import report, table, verdict
from _contestants import ADAMW, OURS, PRODUCTS, TITLES

FOLDER = Path(__file__).resolve().parent
PARTS = ("step", "memory", "floor", "refresh", "targets")
MORE = ("backward", "projections", "codes", "distributed")
CPU_ONLY = ("refresh",)  # on a GPU the page of steps has a column for it

CORE, WHOLE, LAYER, ALL = "60m-body", "60m", "1b-layer", "1b"


@dataclass(frozen=True)
class Target:
    """A ratio of medians that a step must not exceed.

    Attributes:
        what: for a reader.
        name: the optimizer.
        where: size.
        most: the target.
        peer: the best known peer's figure, and whose it was.
        stretch: a second, harder target.
        reference: what the step is compared with.
        rivals: peers that do the same.
    """

    what: str
    name: str
    where: str
    most: float
    peer: str
    stretch: float | None = None
    reference: str = ADAMW
    rivals: tuple[str, ...] = ()


ADAMP = ("adamp AdamP", "pytorch-optimizer AdamP")
EIGHT_BIT = ("bitsandbytes AdamW8bit", "torchao AdamW8bit, compiled")
GALORE = ("galore-torch GaLoreAdamW", "pytorch-optimizer GaLore")
TARGETS = [
    Target("FRUGAL 0.25, contiguous rows", "FRUGAL, contiguous rows", CORE, 0.7, "9.2"),
    Target("FRUGAL 0.25, scattered columns", "FRUGAL, columns", CORE, 1.5, "9.2"),
    Target("AdamW, 8-bit moments", "AdamW, 8-bit moments", CORE, 1.6, "29 and 49 (compiled)", rivals=EIGHT_BIT),
    Target("AdamW, companded moments", "AdamW, companded moments", CORE, 1.2, "29 and 49 (compiled)", rivals=EIGHT_BIT),
    Target("DCTAdamW, Hadamard, refresh in every step, rank 1/4", "DCTAdamW, hadamard", CORE, 3.0, "17 to 119"),
    Target("the same, rank 3/4", "DCTAdamW, hadamard, rank 3/4", CORE, 3.0, "17 to 119"),
    Target("AdamP", "AdamP", CORE, 1.6, "9.0", rivals=ADAMP),
    Target("GaLoreAdamW, rank 128, against its products", "GaLoreAdamW", CORE, 1.3, "1.6", 1.15, PRODUCTS, GALORE),
    Target(
        "GaLoreAdamW, 8-bit moments, with embeddings and head",
        "GaLoreAdamW, 8-bit moments",
        WHOLE,
        4.3,
        "26",
        rivals=("galore-torch GaLoreAdamW8bit",),
    ),
    Target(
        "the same, companded moments",
        "GaLoreAdamW, companded moments",
        WHOLE,
        4.3,
        "26",
        rivals=("galore-torch GaLoreAdamW8bit",),
    ),
]
LARGEST_STEP = 2.0
GPU_INDEX, GPU_PRODUCTS, GPU_REFRESH = 1.0, 1.25, 2.0
INDEX_BASES = ("FRUGAL, contiguous rows", "FRUGAL, columns", "FRUGAL, entries")
DENSE_BASES = ("GaLoreAdamW", "GaLoreAdafactor", "GradNormLoRP", "FRUGAL, svd")


def main() -> int:
    """Runs what the command line asks for; returns the first exit code that is not 0."""
    parser = argparse.ArgumentParser(description="Runs the benchmarks and writes their pages.")
    add = parser.add_argument
    add("parts", nargs="*", metavar="PART", help=f"of {', '.join(PARTS + MORE)} (default: {' '.join(PARTS)})")
    add("--device", choices=("cpu", "cuda"), default="cpu", help="of step, memory and floor (default: cpu)")
    add("--quick", action="store_true", help="small matrices and few turns: to see that everything runs")
    add("--pages", type=Path, default=Path("docs", "benchmarks"), metavar="FOLDER", help="(default: docs/benchmarks)")
    add("--figures", type=Path, default=Path("build", "bench"), metavar="FOLDER", help="(default: build/bench)")
    args = parser.parse_args()
    if unknown := set(args.parts) - set(PARTS + MORE):
        parser.error(f"unknown parts: {', '.join(sorted(unknown))}")
    parts, code = args.parts or [part for part in PARTS if part not in CPU_ONLY or args.device == "cpu"], 0
    suffix = "" if args.device == "cpu" else f"-{args.device}"
    sizes = dict.fromkeys((CORE, WHOLE, LAYER, ALL), "small") if args.quick else {}
    for part in (part for part in PARTS + MORE if part in parts):
        page = args.pages / f"{part}{suffix}.md"
        start = time.monotonic()
        if part == "targets":
            targets(args.figures, suffix, page, sizes)
        else:
            command = [sys.executable, FOLDER / f"{part}.py", *options(part, args.device, args.quick, args.figures)]
            if part not in MORE:
                command += ["--json", args.figures / f"{part}{suffix}.json"]
            code = subprocess.run([*map(str, command), "--markdown", str(page)], check=False).returncode or code
        print(f"{part}: {time.monotonic() - start:.0f} s\n", flush=True)
    return code


def options(part: str, device: str, quick: bool, figures: Path) -> list[str]:
    """What a part is told."""
    chosen = ["--device", device] if part in ("step", "memory", "floor") else []
    measured = figures / ("step.json" if device == "cpu" else f"step-{device}.json")
    if part == "floor" and measured.exists():
        chosen += ["--measured", str(measured)]
    if quick:
        chosen += {
            "step": ["--rounds", "2", "--sizes", "small"],
            "floor": ["--rounds", "2", "--sizes", "small", "--elements", "10000"],
            "refresh": [
                "--rounds",
                "2",
                "--steps",
                "24",
                "--size",
                "small",
                "--gap",
                "28",
                "--shapes",
                "64x172",
                "--shapes-only",
            ],
            "memory": ["--sizes", "small"],
            "backward": ["--layers", "1", "--rounds", "2", "--pieces", "2", "--tokens", "8"],
            "projections": ["--rounds", "2", "--shapes", "64x172"],
            "codes": ["--steps", "1", "3", "--width", "64", "--no-pretrained"],
        }.get(part, [])
    return chosen


# The page of targets.


def targets(folder: Path, suffix: str, page: Path, sizes: dict[str, str]) -> None:
    """Puts what was measured beside what was to be reached; in a quick run `sizes` says what stands for which size."""
    step, refresh, floor = (read(folder / f"{part}{suffix}.json") for part in ("step", "refresh", "floor"))
    floors = floor.get("floors", {})
    steps = {size: step.get(f"{sizes.get(size, size)}, float32", {}) for size in (CORE, WHOLE, LAYER, ALL)}
    floors = {size: floors.get(f"{sizes.get(size, size)}, float32", {}) for size in (CORE, WHOLE, LAYER, ALL)}
    header = ("", "at most", "measured", "", "floor", "peers, when this was planned", "peers here")
    if suffix:
        rows = list(gpu_rows(steps[ALL], floors[ALL]))
        where = "At LLaMA-1B's shapes; medians of times between CUDA events."
    else:
        rows = [*step_rows(steps, floors), *other_rows(steps[LAYER], refresh)]
        where = (
            f"CPU time, one thread, float32. Unless it says otherwise a figure is the ratio of a step to one of "
            f"`torch.optim.AdamW(fused=True)` on the same tensors right beside it, the median over turns, on "
            f"{TITLES['60m-body'][0].lower() + TITLES['60m-body'][1:]}."
        )
    sections = [
        f"{where} The floor is what the bytes that an algorithm must move and the operations that it must do take at "
        "this machine's best rates ([floors](floor.md)), over the fastest fused step.",
        table(header, rows),
    ]
    if not suffix:
        sections += [*between(floor, floors), ON_A_GPU]
    report("Targets", sections, page, threads=", one thread used")


ON_A_GPU = (
    "## On a GPU\n\n`python benchmarks/all.py --device cuda` measures what is asked there, at LLaMA-1B's shapes: index "
    f"bases at most {GPU_INDEX:g} times a fused AdamW, dense bases within {GPU_PRODUCTS:g} times their floor, a step "
    f"with a refresh at most {GPU_REFRESH:g} times one without. It writes `targets-cuda.md` beside this page."
)


def read(file: Path) -> dict[str, Any]:
    """A part's figures; nothing where it has not run."""
    return json.loads(file.read_text()) if file.exists() else {}


def step_rows(steps: dict[str, Any], floors: dict[str, Any]) -> Iterator[tuple[str, ...]]:
    """Ratios of steps."""
    for target in TARGETS:
        figures = steps[target.where]
        found = figures.get(target.name, {"why": "not measured"})
        most = f"{target.most:g}" + (f" ({target.stretch:g} as the stretch)" if target.stretch else "")
        if "why" in found:
            yield target.what, most, "", found["why"], "", target.peer, ""
            continue
        ratio = found[target.reference]
        said = verdict(ratio, target.most)
        if target.stretch and said == "met":
            said += f" (stretch {verdict(ratio, target.stretch)})"
        below = floors[target.where].get(target.name)
        least = ""
        if below is not None:
            least = f"{below['floor'] / figures[target.reference]['least']:.2f}"
        yield target.what, most, f"{ratio:.2f}", said, least, target.peer, best_peer(target, figures)


def best_peer(target: Target, figures: dict[str, Any]) -> str:
    """The fastest of the peers that do the same, where they ran."""
    found = {name: x[target.reference] for name in target.rivals if target.reference in (x := figures.get(name, {}))}
    if not found:
        return ""
    best = min(found, key=found.__getitem__)
    return f"{found[best]:.1f} ({best})"


def other_rows(layer: dict[str, Any], refresh: dict[str, Any]) -> Iterator[tuple[str, ...]]:
    """The evenness of steps, and what they allocate."""
    largest = {name: x["largest"] / x["median"] for name, x in refresh.items() if "why" not in x}
    ratios, peers = ({n: x for n, x in largest.items() if (n in OURS) is own} for own in (True, False))
    what, most = "largest step after the first over the median step", f"{LARGEST_STEP:g}"
    if ratios:
        worst = max(ratios, key=ratios.__getitem__)
        others = ", ".join(f"{ratio:.0f} ({name})" for name, ratio in peers.items())
        said = verdict(ratios[worst], LARGEST_STEP)
        yield what, most, f"{ratios[worst]:.2f} ({worst})", said, "1", "", others
    else:
        yield what, most, "", "not measured", "1", "", ""
    what = "full-size temporaries in a step, on a layer of LLaMA-1B"
    full = {name: x["full-size"] for name, x in layer.items() if "full-size" in x}
    ours = {name: n for name, n in full.items() if name in OURS}
    if ours:
        worst = max(ours, key=ours.__getitem__)
        theirs = [f"{n / 2**20:.0f} MiB ({name})" for name, n in full.items() if name == "galore-torch GaLoreAdamW"]
        measured = f"{ours[worst] / 2**20:.0f} MiB ({worst})" if ours[worst] else "0"
        yield what, "0 bytes", measured, verdict(ours[worst], 0), "0", "", "".join(theirs)
    else:
        yield what, "0 bytes", "", "not measured", "0", "", ""


def gpu_rows(figures: dict[str, Any], floors: dict[str, Any]) -> Iterator[tuple[str, ...]]:
    """What is asked of a GPU."""

    def row(what: str, ratio: float, target: float, least: str = "") -> tuple[str, ...]:
        return what, f"{target:g}", f"{ratio:.2f}", verdict(ratio, target), least, "", ""

    for name in INDEX_BASES + DENSE_BASES:
        x = figures.get(name, {})
        if ADAMW not in x:
            continue
        if name in INDEX_BASES:
            yield row(name, x[ADAMW], GPU_INDEX)
        elif name in floors:
            yield row(f"{name}, over its floor", floors[name]["step"] / floors[name]["floor"], GPU_PRODUCTS, "1")
            yield f"{name}, over a fused AdamW", "reported", f"{x[ADAMW]:.2f}", "", "", "", ""
        if f"{ADAMW}, with a refresh" in x:
            yield row(
                f"{name}, a step with a refresh over one without", x[f"{ADAMW}, with a refresh"] / x[ADAMW], GPU_REFRESH
            )


def between(floor: dict[str, Any], floors: dict[str, Any]) -> list[str]:
    """What stands between the figures and their floors."""
    rows = []
    for target in TARGETS:
        x = floors[target.where].get(target.name)
        if x is None:
            continue
        streaming, multiplying = x["bytes"] / floor["bandwidth"], x["operations"] / floor["rate"]
        rest = x["step"] - x["floor"] - x["overhead"]
        parts = (streaming, multiplying, x["overhead"], rest)
        rows.append((target.what, f"{1e3 * x['step']:.1f}", *(f"{1e3 * t:.1f} ({t / x['step']:.0%})" for t in parts)))
    if not rows:
        return []
    header = ("", "step, ms", "bytes", "products", "Python and launches", "rest")
    return [
        "## Between a step and its floor\n\nCPU ms of the fastest turn, and the share of the step. `bytes` and "
        "`products` are the floor; Python and launches are the same step on as many tiny tensors; the rest are passes "
        "that read again, rates below the machine's best, and transforms.",
        table(header, rows),
    ]


if __name__ == "__main__":
    torch.set_num_threads(1)
    sys.exit(main())
