# SPDX-License-Identifier: Apache-2.0
"""What a new basis costs, and how evenly its cost falls on the steps.

    python benchmarks/refresh.py --markdown docs/benchmarks/refresh.md

A refresh is all that GaLoreAdamW does when a matrix is due: the fit, the copy, and the moments carried over. The clock
is the CPU time of this process with one thread; contestants take turns in shuffled order. `--steps 0` leaves out the
second part, a run of whole steps of every optimizer here that refreshes.
"""

import argparse
import json
import lzma
import random
import statistics
from collections.abc import Callable
from fnmatch import fnmatchcase
from functools import partial
from pathlib import Path
from typing import Any

import torch
from _common import BODIES, cpu_seconds, interleaved, keep_freed_memory, rank, report, shape, table, verdict
from _contestants import OURS, PEERS, SIZES, TITLES, Problem, Runner, fitted
from step import because
from torch import Tensor
from transformers import LlamaConfig, LlamaForCausalLM

from slimstate.optim import GaLoreAdamW
from slimstate.optim._projected import Matrix

REFRESH_TARGET, STEP_TARGET = 0.2, 2.0
SHAPES = [(512, 1376), (1376, 512), (512, 512), (2048, 5461)]
LARGE = 2**22
"""Matrices with more weights than this get two turns: the full SVD of one takes many seconds."""

TEXT = Path(__file__).resolve().parents[1] / "examples" / "data" / "embedded.txt.xz"
TRAINED = "a trained layer"
SVD = "torch.linalg.svd"
ORIGINAL = "galore-torch"
REFRESHING = ["GaLoreAdamW", "GaLoreAdafactor", "GradNormLoRP", "FRUGAL*"]
PEER, PEER_STEPS = "galore-torch GaLoreAdamW", 24
"""Refreshes all matrices in one step, and none before: some steps show what all show."""


def main() -> None:
    """Measures what the command line asks for."""
    parser = argparse.ArgumentParser(description="Times the refresh of a basis, and steps in which refreshes fall.")
    add = parser.add_argument
    add("--shapes", nargs="+", type=shape, default=[SHAPES], help=f"{', '.join(BODIES)}, or ROWSxCOLUMNS")
    add("--shapes-only", action="store_true", help="no training: noise alone")
    add("--rank", type=rank, default=0.25, help="a count or a share (default: 0.25)")
    add("--rounds", type=int, default=7, help="turns of each; 2 for large matrices (default: 7)")
    add("--steps", type=int, default=400, help="of the run of whole steps; 0 for none (default: 400)")
    add("--size", choices=SIZES, default="60m-body", help="what that run steps on (default: 60m-body)")
    add("--gap", type=int, default=200, help="its update_proj_gap (default: 200)")
    add("--only", nargs="+", default=REFRESHING, metavar="PATTERN", help="its optimizers (default: all that refresh)")
    add("--markdown", type=Path, metavar="FILE", help="write the report there")
    add("--json", type=Path, metavar="FILE", help="write the figures of that run there")
    args = parser.parse_args()
    torch.set_num_threads(1)
    torch.manual_seed(0)
    keep_freed_memory()

    shapes = list(dict.fromkeys(s for group in args.shapes for s in group))
    gradients = {} if args.shapes_only else {TRAINED: trained_layer()}
    gradients |= {f"noise, {rows} x {columns}": [torch.randn(rows, columns)] for rows, columns in shapes}
    sections = one_refresh(gradients, args.rank, args.rounds)
    figures: dict[str, Any] = {}
    if args.steps:
        names = [name for name in OURS if any(fnmatchcase(name, pattern) for pattern in args.only)]
        figures = many_steps(args.size, names, args.gap, args.steps)
        sections += steps_section(args.size, figures, args.gap, args.steps)
    report("A refresh of the basis", sections, args.markdown, threads=", one thread used")
    if args.json:
        args.json.parent.mkdir(parents=True, exist_ok=True)
        args.json.write_text(json.dumps(figures, indent=1))


def one_refresh(gradients: dict[str, list[Tensor]], rank: int | float, rounds: int) -> list[str]:
    """The cost of refreshing the bases of some matrices, by method."""
    rows, real, peer = [], 0.0, SVD
    for name, members in gradients.items():
        ours = {kind: [refresh_of(m, rank, kind) for m in members] for kind in ("svd", "power", "random")}
        theirs = [galore_torch_projector(m, rank) for m in members]
        if all(theirs):
            peer = ORIGINAL
        else:
            theirs = [partial(torch.linalg.svd, m, full_matrices=False) for m in members]
        contestants = {kind: partial(one_after_another, calls) for kind, calls in {**ours, peer: theirs}.items()}
        times = interleaved(contestants, 2 if members[0].numel() > LARGE else rounds)
        median = {kind: statistics.median(t) for kind, t in times.items()}
        shares = [f"{1e3 * median[kind]:.1f} ({median[kind] / median[peer]:.0%})" for kind in ours]
        rows.append([name, *shares, f"{1e3 * median[peer]:.1f}"])
        real = median["svd"] / median[peer] if name == TRAINED else real
    sections = [
        f"## One refresh\n\nRank {rank}, float32; median CPU ms, and the share of {peer}'s. Ours carry the moments "
        f"over, which galore-torch does not; `power` starts from the last basis. {TRAINED}: the seven gradients of a "
        "layer of LLaMA-60M's shapes after 40 steps on real text, together. Noise has a flat spectrum, the worst case.",
        table(["gradient", *(f"projection={n!r}" for n in ours), peer], rows),
    ]
    if real:
        sections.append(
            f"`svd` takes {real:.0%} on the trained layer; target: at most {REFRESH_TARGET:.0%}; "
            f"{verdict(real, REFRESH_TARGET)}."
        )
    return sections


def one_after_another(calls: list[Callable[[], object]]) -> None:
    """Calls all."""
    for call in calls:
        call()


def trained_layer(steps: int = 40) -> list[Tensor]:
    """The gradients of one layer of LLaMA-60M's shapes, after some steps on the bytes of the examples' text."""
    text = text_bytes()
    config = LlamaConfig(
        vocab_size=256, hidden_size=512, intermediate_size=1376, num_hidden_layers=2, num_attention_heads=8
    )
    model = LlamaForCausalLM(config)
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-3, fused=True)
    for _ in range(steps):
        optimizer.zero_grad()
        batch = byte_batch(text)
        model(batch, labels=batch).loss.backward()
        optimizer.step()
    return [p.grad.clone() for p in model.model.layers[1].parameters() if p.ndim == 2]


def text_bytes() -> Tensor:
    """The examples' text."""
    return torch.frombuffer(bytearray(lzma.decompress(TEXT.read_bytes())), dtype=torch.uint8).long()


def byte_batch(text: Tensor) -> Tensor:
    """4 pieces of 128."""
    return torch.stack([text[i : i + 128] for i in torch.randint(len(text) - 128, (4,)).tolist()])


def refresh_of(gradient: Tensor, rank: int | float, projection: str) -> Callable[[], None]:
    """GaLoreAdamW's refresh of a matrix that has a basis and moments."""
    p = torch.nn.Parameter(torch.zeros_like(gradient))
    p.grad = gradient
    optimizer = GaLoreAdamW([p], rank=rank, projection=projection)
    optimizer.step()
    group, state = optimizer.param_groups[0], optimizer.state[p]
    rule = optimizer._projection(group)
    matrix = Matrix(p, None, p, gradient, state, 2.0, (group["seed"], state["stream"], 2), optimizer._view(p, group))
    return torch.no_grad()(lambda: optimizer._refresh(matrix, group, rule, scheduled=True))


def galore_torch_projector(gradient: Tensor, rank: int | float) -> Callable[[], object] | None:
    """The decomposition of the authors' package, where that is installed."""
    try:
        from galore_torch.galore_projector import GaLoreProjector
    except ImportError:
        return None
    count = rank if isinstance(rank, int) else int(rank * min(gradient.shape))
    side = "right" if gradient.shape[0] >= gradient.shape[1] else "left"
    return lambda: GaLoreProjector(count).get_orthogonal_matrix(gradient, count, type=side)


def many_steps(size: str, names: list[str], gap: int, steps: int) -> dict[str, dict[str, Any]]:
    """The CPU time of each of many steps: what the worst of them costs beside the usual one."""
    problem = Problem(SIZES[size])
    runners = {name: with_gap(OURS[name].build(problem), gap) for name in names}
    figures = run_of_steps(runners, steps)
    try:
        peer = with_gap(PEERS[PEER].build(problem), PEER_STEPS - 4)
        figures |= run_of_steps({PEER: peer}, PEER_STEPS)
    except Exception as error:  # what peers raise is not ours to know
        figures[PEER] = {"why": because(error)}
    return figures


def with_gap(runner: Runner, gap: int) -> Runner:
    """Sets `update_proj_gap`."""
    for group in runner.optimizer.param_groups:
        if group.get("update_proj_gap"):
            group["update_proj_gap"] = gap
    return runner


def run_of_steps(runners: dict[str, Runner], steps: int) -> dict[str, dict[str, Any]]:
    """Steps of each in turn, in an order shuffled each time; seconds, apart for steps that fitted a basis."""
    names, shuffle = list(runners), random.Random(0).shuffle
    times: dict[str, list[float]] = {name: [] for name in names}
    fits: dict[str, list[int]] = {name: [] for name in names}
    for _ in range(steps):
        shuffle(names)
        for name in names:
            runner = runners[name]
            runner.prepare()
            before = fitted(runner.optimizer)
            times[name].append(cpu_seconds(runner.step))
            fits[name].append(fitted(runner.optimizer) - before)
    figures = {}
    for name, (first, *later) in times.items():
        fresh = [t for t, n in zip(later, fits[name][1:], strict=True) if n]
        plain = [t for t, n in zip(later, fits[name][1:], strict=True) if not n]
        figures[name] = {
            "steps": steps,
            "first": first,
            "median": statistics.median(later),
            "mean": statistics.mean(later),
            "largest": max(later),
            "refreshes": len(fresh),
            "refresh": statistics.median(fresh) if fresh else None,
            "largest plain": max(plain, default=None),
        }
    return figures


def steps_section(size: str, figures: dict[str, dict[str, Any]], gap: int, steps: int) -> list[str]:
    """The table of whole steps."""
    rows, ours = [], {}
    for name, x in figures.items():
        if "why" in x:
            rows.append([name, x["why"]] + [""] * 7)
            continue
        middle = x["median"]
        if name != PEER:
            ours[name] = x["largest"] / middle
        apart = [x["refresh"], x["largest plain"]] if name != PEER else [None, None]
        rows.append(
            [name, f"{1e3 * x['first']:.0f}", f"{1e3 * middle:.1f}", f"{1e3 * x['mean']:.1f}",
             *("" if t is None else f"{1e3 * t:.1f}" for t in apart), f"{1e3 * x['largest']:.1f}",
             f"{x['largest'] / middle:.2f}", x["refreshes"] if name != PEER else ""]
        )  # fmt: skip
    worst = max(ours, key=ours.__getitem__)
    return [
        f"## {steps} steps\n\n{TITLES[size]} ({len(SIZES[size].projected)} matrices), rank {SIZES[size].rank}, "
        f"density 0.25, update_proj_gap {gap}; CPU ms. The gradients are noise: the worst case for `svd`. The largest "
        "step without a refresh shows how much of the largest is the machine's doing. "
        f"{PEER}: {PEER_STEPS} steps, one of which refreshes everything.",
        table(
            ["", "first step", "median", "mean after the first", "median with a refresh", "largest without one",
             "largest after the first", "largest / median", "steps with a refresh"],
            rows,
        ),
        f"The largest step after the first takes {ours[worst]:.2f} times the median ({worst}; target: at most "
        f"{STEP_TARGET:g}; {verdict(ours[worst], STEP_TARGET)}).",
    ]  # fmt: skip


if __name__ == "__main__":
    main()
