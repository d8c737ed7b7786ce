# SPDX-License-Identifier: Apache-2.0
"""What the per-layer mode saves of gradients, and what it costs in time.

    python benchmarks/backward.py --markdown docs/benchmarks/backward.md

GaLoreAdamW trains LLaMA-60M's layers on bytes of text, in micro-batches, with and without `in_backward`. Gradients and
buffers are counted whenever one is ready, by hooks before and after the mode's own; all allocations from the first
micro-batch to the end of `step` are what torch's profiler records. Clock: the CPU time of this process, one thread,
turns in shuffled order.
"""

import argparse
import lzma
import statistics
from collections.abc import Iterable
from pathlib import Path

import torch
from _common import BODIES, Shape, allocations, interleaved, most_allocated, rank, report, table
from torch import Tensor, nn
from transformers import LlamaConfig, LlamaForCausalLM

from slimstate.optim import GaLoreAdamW, InBackward, in_backward, param_groups

TEXT = Path(__file__).resolve().parents[1] / "examples" / "data" / "embedded.txt.xz"
ORDINARY, LAYER, EARLY = "ordinary", "per layer", "per layer, early_bases"
MODES = (ORDINARY, LAYER, EARLY)
STEPS = ("first step", "plain step", "step with a refresh")


def main() -> None:
    """Measures what the command line asks for."""
    parser = argparse.ArgumentParser(description="Measures in_backward: bytes of gradients, of everything, and time.")
    add = parser.add_argument
    add("--layers", type=int, default=8, help="of LLaMA-60M (default: 8, all)")
    add("--rank", type=rank, default=128, help="a count or a share (default: 128)")
    add("--pieces", type=int, default=4, help="micro-batches a step, for memory (default: 4)")
    add("--tokens", type=int, default=64, help="of a micro-batch (default: 64)")
    add("--rounds", type=int, default=15, help="turns on the clock (default: 15)")
    add("--markdown", type=Path, metavar="FILE", help="write the report there")
    args = parser.parse_args()
    torch.set_num_threads(1)
    sections = memory(args.layers, args.rank, args.pieces, args.tokens)
    sections += time(args.layers, args.rank, args.tokens, args.rounds)
    report("The per-layer mode", [*sections, *seven_billion()], args.markdown, threads=", one thread used")


class Run:
    """A training run in one of the modes."""

    def __init__(self, mode: str, layers: int, rank: int | float, tokens: int, gap: int) -> None:
        torch.manual_seed(0)
        config = LlamaConfig(
            vocab_size=256,
            hidden_size=512,
            intermediate_size=1376,
            num_hidden_layers=layers,
            num_attention_heads=8,
        )
        self.model = LlamaForCausalLM(config)
        self.meter = Meter(self.model)
        self.optimizer = GaLoreAdamW(param_groups(self.model, rank=rank, update_proj_gap=gap), lr=1e-3)
        self.matrices = [p for group in self.optimizer.param_groups if group["rank"] for p in group["params"]]
        self.text = torch.frombuffer(bytearray(lzma.decompress(TEXT.read_bytes())), dtype=torch.uint8).long()
        self.tokens = tokens
        if mode != ORDINARY:
            self.meter.mode = in_backward(self.optimizer, early_bases=mode == EARLY)

    def step(self, pieces: int) -> None:
        """One step, with so many micro-batches."""
        for _ in range(pieces):
            start = int(torch.randint(len(self.text) - self.tokens, ()))
            batch = self.text[None, start : start + self.tokens]
            (self.model(batch, labels=batch).loss / pieces).backward()
        self.optimizer.step()
        self.optimizer.zero_grad()

    def bases(self) -> int:
        """How many bases have been fitted so far."""
        return sum(int(self.optimizer.state[p]["refreshes"]) for p in self.matrices if p in self.optimizer.state)


class Meter:
    """The most bytes of gradients and buffers, by hooks around those of the mode."""

    mode: InBackward | None = None

    def __init__(self, model: nn.Module) -> None:
        self.params, self.most = list(model.parameters()), 0
        for p in self.params:
            p.register_post_accumulate_grad_hook(self)  # before the mode's: the gradient is there

    def __call__(self, _: Tensor) -> None:
        """Takes a sample."""
        grads = [p.grad for p in self.params if p.grad is not None]
        held = self.mode.buffer_bytes if self.mode else 0
        self.most = max(self.most, held + sum(g.numel() * g.itemsize for g in grads))


def memory(layers: int, rank: int | float, pieces: int, tokens: int) -> list[str]:
    """The most bytes in three kinds of steps."""
    gap = 8 * layers  # so that about one matrix is due in most steps, and none in some
    found: dict[tuple[str, str], tuple[int, int, int]] = {}
    for mode in MODES:
        run = Run(mode, layers, rank, tokens, gap)
        while any((mode, kind) not in found for kind in STEPS):
            before, run.meter.most = run.bases(), 0
            allocated = most_allocated(allocations(lambda run=run: run.step(pieces)))
            fresh = run.bases() - before
            kind = STEPS[0] if before == 0 else STEPS[2] if fresh else STEPS[1]
            found.setdefault((mode, kind), (run.meter.most, allocated, fresh))
    weights = sum(p.numel() for p in run.meter.params) * 4
    matrices = sum(p.numel() for p in run.matrices) * 4
    buffers = sum(run.optimizer.state[p]["exp_avg"].numel() for p in run.matrices) * 4
    largest = max(p.numel() for p in run.matrices) * 4
    dense = weights - matrices
    formula = {
        (ORDINARY, kind): ("all gradients", weights) for kind in STEPS
    } | {
        (mode, kind): ("buffers + dense + largest", buffers + dense + largest) for mode in MODES[1:] for kind in STEPS
    }  # fmt: skip
    formula[LAYER, STEPS[0]] = "all gradients", weights
    rows = []
    for (mode, kind), (gradients, allocated, fresh) in found.items():
        text, size = formula[mode, kind]
        if mode != ORDINARY and kind == STEPS[2]:
            text, size = f"{text} + {fresh} kept", size + fresh * largest
        rows.append([mode, kind, mib(gradients), f"<= {mib(size)}: {text}", mib(allocated)])
    plain = {mode: found[mode, STEPS[1]] for mode in MODES}
    return [
        f"## Memory\n\n{len(run.matrices)} matrices ({matrices / 4e6:.1f} M weights) are projected, "
        f"{dense / 4e6:.2f} M weights are not; float32, rank {rank}, {pieces} micro-batches of {tokens} tokens. All "
        f"gradients have {mib(weights)}, the dense ones {mib(dense)}, the largest one {mib(largest)}, all buffers "
        f"{mib(buffers)}. The last column counts activations too, states that the first step creates, and what `step` "
        "needs.",
        table(["mode", "", "gradients and buffers, most", "formula", "allocated in the step, most"], rows),
        f"In plain steps the gradients take {plain[LAYER][0] / plain[ORDINARY][0]:.0%} of what they take ordinarily, "
        f"and everything that is allocated in such a step {plain[LAYER][1] / plain[ORDINARY][1]:.0%}.",
    ]


def time(layers: int, rank: int | float, tokens: int, rounds: int) -> list[str]:
    """What a step takes beside the ordinary one."""
    runs = {mode: Run(mode, layers, rank, tokens, gap=10**6) for mode in MODES[:2]}
    rows = []
    for length, pieces in ((tokens, 1), (tokens, 4), (tokens, 16), (4 * tokens, 4)):
        for run in runs.values():
            run.tokens = length
            run.step(pieces)
        turns = {mode: (lambda run=run, pieces=pieces: run.step(pieces)) for mode, run in runs.items()}
        median = {mode: statistics.median(t) for mode, t in interleaved(turns, max(3, rounds // pieces)).items()}
        ratio = median[LAYER] / median[ORDINARY]
        rows.append([f"{pieces} of {length} tokens", *(f"{1e3 * t:.0f}" for t in median.values()), f"{ratio:.2f}"])
    return [
        "## Time\n\nMedian CPU ms of a whole step (forward, backward, update) with no basis due. Per layer, every "
        "micro-batch is projected, where ordinarily only their sum is: 2 r operations a weight, beside 6 for each "
        "token in forward and backward. So with many micro-batches the ratio tends to 1 + r / (3 tokens), and to 1 "
        "for long ones.",
        table(["micro-batches", *runs, "ratio"], rows),
    ]


def seven_billion(limit: float = 24e9) -> list[str]:
    """LLaMA-7B by the formulas: bfloat16 weights, gradients and moments."""
    body, vocabulary, width = BODIES["7b-layer"] * 32, 32000, 4096
    dense = 2 * vocabulary * width + 65 * width
    weights = sum(rows * columns for rows, columns in body) + dense
    rows = []
    for r in (1024, 512, 256, 128):
        state = moments_and_bases(body, r) + 2 * 2 * dense
        buffers = 4 * sum(r * max(shape) for shape in body)
        kept = 2 * dense + 2 * max(rows * columns for rows, columns in body)
        fixed = 2 * weights + state
        ordinary, small = fixed + 2 * weights, fixed + buffers + kept
        rows.append([r, *(gb(x) for x in (2 * weights, state, 2 * weights, buffers + kept, ordinary, small))])
        rows[-1].append(gb(limit - small) if small < limit else "none")
    return [
        "## LLaMA-7B on 24 GB, by the formulas\n\nNot measured. Weights, gradients and moments in bfloat16, bases and "
        "buffers in float32; embeddings and head dense. Without `early_bases` the first step needs all gradients, as "
        "the ordinary mode does in every step.",
        table(
            ["rank", "weights", "states", "all gradients", "gradients, per layer", "ordinary", "per layer",
             "left for activations"],
            rows,
        ),
    ]  # fmt: skip


def moments_and_bases(shapes: Iterable[Shape], r: int) -> int:
    """Bytes of GaLoreAdamW's state with bfloat16 moments."""
    return sum(2 * 2 * r * max(shape) + 4 * r * min(shape) for shape in shapes)


def mib(size: int) -> str:
    """Bytes for a reader."""
    return f"{size / 2**20:.1f} MiB"


def gb(size: float) -> str:
    """Bytes for a reader."""
    return f"{size / 1e9:.1f} GB"


if __name__ == "__main__":
    main()
