"""What the tests of integrations train, and the code of docs/integrations.md that they use."""

import re
from pathlib import Path

import torch
import transformers

PAGE = Path(__file__).parents[2] / "docs/integrations.md"


def recipe(name):
    """The class of this name, from the page."""
    blocks = re.findall(
        r"^```(?:python|{code-block} python)\n(.*?)^```", PAGE.read_text(encoding="utf-8"), re.DOTALL | re.MULTILINE
    )
    (code,) = (block for block in blocks if f"class {name}(" in block)
    namespace = {}
    exec(code, namespace)
    return namespace[name]


def llama(dtype=torch.float32, seed=0):
    torch.default_generator.manual_seed(seed)
    config = transformers.LlamaConfig(
        vocab_size=64,
        hidden_size=32,
        intermediate_size=48,
        num_hidden_layers=3,
        num_attention_heads=4,
        max_position_embeddings=32,
        initializer_range=0.2,
    )
    return transformers.LlamaForCausalLM(config).to(dtype)


def sentences(number=32, length=12):
    """Counting, from different starts."""
    rows = (torch.arange(length) + torch.arange(number)[:, None] * 7) % 64
    return [{"input_ids": row, "labels": row} for row in rows]


def batch(i, size=4):
    """Batch number i of sentences."""
    rows = torch.stack([row["input_ids"] for row in sentences()])
    return {"input_ids": rows[i * size % 32 :][:size], "labels": rows[i * size % 32 :][:size]}
