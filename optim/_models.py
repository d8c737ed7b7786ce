"""Models by name or by a configuration of transformers, on the meta device."""

import json
from pathlib import Path
from typing import Any

import torch
from torch import nn

__all__ = ["PRESETS", "model_of"]


def _llama(width: int, mlp: int, layers: int, heads: int) -> dict[str, Any]:
    """GaLore's configurations, https://github.com/jiaweizzhao/GaLore, which are LLaMA's at 7B; 32000 tokens."""
    shape = {"hidden_size": width, "intermediate_size": mlp, "num_hidden_layers": layers, "num_attention_heads": heads}
    return {"model_type": "llama", "vocab_size": 32000, **shape}


# What is left out is the default of transformers' configuration.
PRESETS: dict[str, dict[str, Any]] = {
    "llama-60m": _llama(512, 1376, 8, 8),
    "llama-130m": _llama(768, 2048, 12, 12),
    "llama-350m": _llama(1024, 2736, 24, 16),
    "llama-1b": _llama(2048, 5461, 24, 32),
    "llama-7b": _llama(4096, 11008, 32, 32),
    "llama3-8b": _llama(4096, 14336, 32, 32) | {"vocab_size": 128256, "num_key_value_heads": 8},
    "mistral-7b": {"model_type": "mistral"},
    "mixtral-8x7b": {"model_type": "mixtral"},
    "gpt2": {"model_type": "gpt2"},
    "gpt2-xl": {"model_type": "gpt2", "n_embd": 1600, "n_layer": 48, "n_head": 25},
    "bert-base": {"model_type": "bert", "architectures": ["BertForMaskedLM"]},
    "vit-base": {"model_type": "vit", "architectures": ["ViTForImageClassification"]},
}


def model_of(name: str) -> nn.Module:
    """A model on the meta device: shapes and modules, no memory.

    Args:
        name: of a preset, or the path of a `config.json` of transformers or of its folder. Nothing is downloaded. It is
            built as the class that the configuration names first, else as a causal language model, where there is one,
            or the model without a head; in its own dtype, or float32.

    Raises:
        ValueError: if it is neither, or names a kind of model that transformers does not have.
        ModuleNotFoundError: without transformers.
    """
    path = Path(name)
    path = path / "config.json" if path.is_dir() else path
    if name in PRESETS:
        settings = dict(PRESETS[name])
    elif path.is_file():
        try:
            settings = json.loads(path.read_text(encoding="utf-8"))
            kind = settings["model_type"]
        except (ValueError, KeyError, TypeError) as error:
            raise ValueError(f"model: {path} is no configuration of transformers, which has a model_type") from error
    else:
        raise ValueError(f"model must be one of {', '.join(PRESETS)} or the path of a config.json, got {name!r}")
    try:
        import transformers
    except ModuleNotFoundError as error:
        raise ModuleNotFoundError(f"model={name!r} is built by transformers: pip install transformers") from error

    kind = settings.pop("model_type")
    if kind not in transformers.CONFIG_MAPPING:
        raise ValueError(f"model: transformers {transformers.__version__} does not know model_type {kind!r}")
    config = transformers.CONFIG_MAPPING[kind].from_dict(settings)
    own = getattr(transformers, (settings.get("architectures") or [""])[0], None)
    with torch.device("meta"):
        if own is not None:
            model = own(config)
        elif type(config) in transformers.MODEL_FOR_CAUSAL_LM_MAPPING:
            model = transformers.AutoModelForCausalLM.from_config(config)
        else:
            model = transformers.AutoModel.from_config(config)
    return model if config.dtype is None else model.to(config.dtype)
