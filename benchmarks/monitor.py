# SPDX-License-Identifier: Apache-2.0
"""What a Monitor costs: the CPU time of an optimizer's steps with one, over that of the same steps without.

    python benchmarks/monitor.py

One thread; runs of `--every` steps with and without take turns, so that each holds one report, and the refreshes that
fall due. The gradients stay the same; the steps alone are timed, without forward and backward passes.
"""

import argparse
import statistics
import time

import torch
from transformers import LlamaConfig, LlamaForCausalLM

from slimstate.optim import FRUGAL, AdamW, GaLoreAdamW, Monitor, param_groups

SHAPES = {  # width, of the hidden layers, layers, vocabulary
    "tiny": (128, 352, 3, 1024),
    "20m": (256, 688, 4, 32000),
}
OPTIMIZERS = {
    "AdamW": lambda model: AdamW(model.named_parameters()),
    "GaLoreAdamW": lambda model: GaLoreAdamW(param_groups(model), lr=0.01),
    "FRUGAL": lambda model: FRUGAL(param_groups(model)),
}


def runner(name: str, size: str) -> torch.optim.Optimizer:
    """An optimizer whose model has gradients."""
    torch.manual_seed(0)
    width, hidden, layers, vocab = SHAPES[size]
    config = LlamaConfig(
        vocab_size=vocab,
        hidden_size=width,
        intermediate_size=hidden,
        num_hidden_layers=layers,
        num_attention_heads=4,
        bos_token_id=None,
        eos_token_id=None,
    )
    model = LlamaForCausalLM(config)
    for p in model.parameters():
        p.grad = torch.randn_like(p) / 100
    return OPTIMIZERS[name](model)


def seconds(optimizer: torch.optim.Optimizer, steps: int) -> float:
    """The CPU time of steps."""
    started = time.process_time()
    for _ in range(steps):
        optimizer.step()
    return time.process_time() - started


def main() -> None:
    """Prints a line for each optimizer."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--size", choices=SHAPES, default="tiny")
    parser.add_argument("--every", type=int, default=50)
    parser.add_argument("--rounds", type=int, default=9)
    args = parser.parse_args()
    torch.set_num_threads(1)
    for name in OPTIMIZERS:
        plain, watched = runner(name, args.size), runner(name, args.size)
        Monitor(watched, every=args.every)
        seconds(plain, args.every)
        seconds(watched, args.every)
        pairs = [(seconds(plain, args.every), seconds(watched, args.every)) for _ in range(args.rounds)]
        ratio = statistics.median(b / a for a, b in pairs)
        step = statistics.median(a for a, _ in pairs) / args.every
        print(f"{name}, {args.size}: {1e3 * step:.2f} ms a step, with a Monitor {ratio:.3f} times that", flush=True)


if __name__ == "__main__":
    main()
