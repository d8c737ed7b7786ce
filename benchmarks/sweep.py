# SPDX-License-Identifier: Apache-2.0
"""Finds each optimizer's learning rate: one run of examples/pretrain.py for every optimizer, rate and seed.

    python benchmarks/sweep.py --optimizers adamw galore --lrs 1e-3 3e-3 1e-2 --seeds 0 1 -- --preset tiny --steps 500

What follows `--` goes to the script. Finished runs in --out are kept and interrupted ones go on.
"""

import argparse
import itertools
import json
import statistics
import subprocess
import sys
from pathlib import Path

from _common import report, table

PRETRAIN = Path(__file__).resolve().parents[1] / "examples" / "pretrain.py"
INTERRUPTED = 130


def main() -> int:
    """Runs what is missing, and tables it; returns the exit code."""
    parser = argparse.ArgumentParser(description="Sweeps learning rates of examples/pretrain.py.")
    add = parser.add_argument
    add("--optimizers", nargs="+", required=True, metavar="NAME", help="as examples/pretrain.py knows them")
    add("--lrs", nargs="+", type=float, required=True, metavar="LR", help="peak learning rates, for each of them")
    add("--seeds", nargs="+", type=int, default=[0], metavar="SEED", help="(default: 0)")
    add("--out", type=Path, default=Path("runs", "sweep"), metavar="FOLDER", help="(default: runs/sweep)")
    add("--markdown", type=Path, metavar="FILE", help="write the table there (default: table.md in --out)")
    add("rest", nargs="*", metavar="-- OPTIONS", help="of examples/pretrain.py")
    args = parser.parse_args()

    losses: dict[tuple[str, float], list[float]] = {}
    runs = list(itertools.product(args.optimizers, sorted(args.lrs), args.seeds))
    for number, (name, lr, seed) in enumerate(runs, start=1):
        folder = args.out / f"{name}-lr{lr:g}-seed{seed}"
        options = ["--optimizer", name, "--lr", f"{lr:g}", "--seed", str(seed), *args.rest]
        if (loss := final_loss(folder / name, options)) is None:
            print(f"run {number} of {len(runs)}: {name}, lr {lr:g}, seed {seed}", flush=True)
            code = subprocess.run([sys.executable, PRETRAIN, *options, "--out", folder]).returncode
            if code == INTERRUPTED:
                return code
            if code == 0:
                (folder / name / "options.json").write_text(json.dumps(options))
                loss = final_loss(folder / name, options)
        losses.setdefault((name, lr), []).append(float("inf") if loss is None else loss)  # it diverged, or was refused

    rows, best = [], []
    for name in args.optimizers:
        means = {lr: statistics.fmean(losses[name, lr]) for lr in sorted(args.lrs)}
        chosen = min(means, key=means.__getitem__)
        edge = " (the edge of the grid: widen it)" if chosen in (min(means), max(means)) else ""
        best.append(f"- {name}: lr {chosen:g}, loss {means[chosen]:.4f}{edge}")
        for lr, mean in means.items():
            row = losses[name, lr]
            rows.append((name, f"{lr:g}", f"{mean:.4f}", f"{max(row) - min(row):.4f}", "best" if lr == chosen else ""))
    header = ("optimizer", "lr", "held-out loss", "spread", "")
    notes = f"Means over seeds {args.seeds}, and how far apart the seeds are; inf: a run failed."
    report("Learning rates", [notes, table(header, rows), "\n".join(best)], args.markdown or args.out / "table.md")
    return 0


def final_loss(folder: Path, options: list[str]) -> float | None:
    """The last held-out loss of a run that finished under these options."""
    files = folder / "options.json", folder / "run.json"
    if not all(file.exists() for file in files) or json.loads(files[0].read_text()) != options:
        return None
    return json.loads(files[1].read_text())["progress"]["evaluations"][-1]["loss"]


if __name__ == "__main__":
    sys.exit(main())
