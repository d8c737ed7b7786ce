"""The table and the plot that end a comparison."""

import csv
import io
import json
import math
import statistics
from pathlib import Path
from typing import Any

import matplotlib

matplotlib.use("Agg")

import matplotlib.pyplot as plt
import numpy as np

from corpus import Corpus
from shared import replacing, text_table

# column: how it is written in the text table
COLUMNS = {
    "run": "{}",
    "loss": "{:.4f}",
    "perplexity": "{:.2f}",
    "bits/byte": "{:.3f}",
    "state bytes": "{:,}",
    "of AdamW's": "{:.1%}",
    "on matrices": "{:,}",
    "of its": "{:.1%}",
    "step ms": "{:.2f}",
    "refresh ms": "{:.2f}",
    "tokens/s": "{:,.0f}",
    "minutes": "{:.1f}",
}
LEGEND = """\
loss, perplexity, bits/byte: on all held-out text. state bytes: the most that the optimizer keeps in one process; on
matrices: the part of it for the matrices that low-rank optimizers project. step ms: median time of optimizer.step()
where no basis changes, or of all where some does in each; refresh ms: what it takes longer for each basis that changes.
minutes: training, without evaluations."""


def write_report(folder: Path, names: list[str], corpus: Corpus, title: str) -> str:
    """Writes table.txt, table.csv and plot.png for finished runs; returns the text table."""
    runs = {name: json.loads((folder / name / "run.json").read_text()) for name in names}
    nats_per_byte = math.log(2) * corpus.bytes_per_token
    trigram = {"run": "byte trigram", "bits/byte": corpus.trigram_bpb, "loss": corpus.trigram_bpb * nats_per_byte}
    rows = [trigram | {"perplexity": math.exp(trigram["loss"])}]
    rows += [measures(name, run, runs.get("adamw"), corpus) for name, run in runs.items()]

    table = f"{text_table(rows, COLUMNS)}\n\n{LEGEND}\n"
    with replacing(folder / "table.txt") as stream:
        stream.write(table.encode())
    sheet = io.StringIO(newline="")
    writer = csv.DictWriter(sheet, COLUMNS)
    writer.writeheader()
    writer.writerows(rows)
    with replacing(folder / "table.csv") as stream:
        stream.write(sheet.getvalue().encode())
    with replacing(folder / "plot.png") as stream:
        plot(runs, trigram["loss"], title).savefig(stream, dpi=150)
    plt.close()
    files = ", ".join(str(folder / file) for file in ("table.txt", "table.csv", "plot.png"))
    return f"{table}\nwritten to {files}"


def measures(name: str, run: dict[str, Any], adamw: dict[str, Any] | None, corpus: Corpus) -> dict[str, Any]:
    """One row of the table; what does not apply is left out."""
    settings, progress = run["settings"], run["progress"]
    loss = progress["evaluations"][-1]["loss"]
    row = {
        "run": name,
        "loss": loss,
        "perplexity": math.exp(loss),
        "bits/byte": loss / (math.log(2) * corpus.bytes_per_token),
        "state bytes": run["progress"]["state_bytes"],
        "on matrices": run["progress"]["matrix_state_bytes"],
        "tokens/s": progress["step"] * settings["batch"] * settings["seq"] / progress["seconds"],
        "minutes": progress["seconds"] / 60,
    }
    if adamw:
        row["of AdamW's"] = run["progress"]["state_bytes"] / adamw["progress"]["state_bytes"]
        row["of its"] = run["progress"]["matrix_state_bytes"] / adamw["progress"]["matrix_state_bytes"]
    plain = [t for t, n in zip(progress["step_seconds"], progress["refreshed"], strict=True) if not n]
    row["step ms"] = 1e3 * statistics.median(plain or progress["step_seconds"])
    if plain and any(progress["refreshed"]):
        # The median again: a stall of the machine is not a refresh.
        longer = [
            (1e3 * t - row["step ms"]) / n
            for t, n in zip(progress["step_seconds"], progress["refreshed"], strict=True)
            if n
        ]
        row["refresh ms"] = max(0.0, statistics.median(longer))
    return row


def plot(runs: dict[str, dict[str, Any]], trigram: float, title: str) -> plt.Figure:
    """Loss curves, and beside them what the optimizers keep."""
    figure, (curves, bars) = plt.subplots(1, 2, figsize=(11, 4.5), width_ratios=(2, 1), layout="constrained")
    figure.suptitle(title)
    last = []
    for i, (name, run) in enumerate(runs.items()):
        progress, color = run["progress"], f"C{i}"
        losses = np.array(progress["losses"])
        window = max(1, len(losses) // 50)
        smooth = np.convolve(losses, np.full(window, 1 / window), "valid")
        curves.plot(np.arange(len(smooth)) + window, smooth, color=color, alpha=0.35, linewidth=1)
        steps, held_out = zip(*((e["step"], e["loss"]) for e in progress["evaluations"]), strict=True)
        curves.plot(steps, held_out, color=color, marker="o", markersize=3.5, label=f"{name}: {held_out[-1]:.3f}")
        last += [held_out[-1], *held_out[: len(held_out) // 4]]
    curves.axhline(trigram, color="gray", linestyle=":", label=f"byte trigram: {trigram:.3f}")
    bottom = min(min(run["progress"]["losses"]) for run in runs.values())
    curves.set(
        xlabel="step",
        ylabel="loss, nats a token",
        ylim=(min(bottom, *last) - 0.1, max(trigram, *last) * 1.05),
        title="loss held out (dots) and in training (pale)",
    )
    curves.legend(frameon=False)
    curves.grid(alpha=0.3)

    place = np.arange(len(runs))
    matrices = np.array([run["progress"]["matrix_state_bytes"] for run in runs.values()]) / 1e6
    everything = np.array([run["progress"]["state_bytes"] for run in runs.values()]) / 1e6
    colors = [f"C{i}" for i in place]
    bars.bar(place, matrices, color=colors, label="projected matrices")
    rest = bars.bar(place, everything - matrices, bottom=matrices, color=colors, alpha=0.4)
    bars.bar_label(rest, [f"{total:.2f}\n({part:.2f})" for total, part in zip(everything, matrices, strict=True)])
    bars.set_xticks(place, list(runs))
    bars.margins(y=0.15)
    bars.set(ylabel="MB", title="optimizer state\n(dark: projected matrices)")
    bars.spines[["top", "right"]].set_visible(False)
    curves.spines[["top", "right"]].set_visible(False)
    return figure
