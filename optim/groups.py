"""Which parameters of a model are projected: decided from its modules, and said in a table."""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from fnmatch import fnmatchcase
from typing import Any

import torch
from torch import Tensor, nn

__all__ = ["Decision", "ParamGroups", "dense_groups", "param_groups", "vocabulary_parameters"]

EMBEDDINGS = (nn.Embedding, nn.EmbeddingBag)
CONVOLUTIONS = (nn.Conv1d, nn.Conv2d, nn.Conv3d, nn.ConvTranspose1d, nn.ConvTranspose2d, nn.ConvTranspose3d)
HEAD_NAMES = ("head", "classifier", "logits", "score", "unembed", "output_projection")

# Below this a quarter of the side is a handful of directions: routers, classifier heads, low-rank factors.
SMALLEST_SIDE = 16


@dataclass(frozen=True)
class Decision:
    """What one parameter gets, and why."""

    name: str
    shape: tuple[int, ...]
    projected: bool
    batch_dims: int
    why: str


class ParamGroups(list[dict[str, Any]]):
    """Plain, named parameter groups; printed, they are the table of what each parameter gets and why."""

    def __init__(self, groups: Sequence[dict[str, Any]], decisions: Sequence[Decision]) -> None:
        super().__init__(groups)
        self.decisions = list(decisions)

    def __str__(self) -> str:
        rows = [(d.name, shape_text(d.shape), "projected" if d.projected else "dense", d.why) for d in self.decisions]
        total = sum(torch.Size(d.shape).numel() for d in self.decisions)
        projected = sum(torch.Size(d.shape).numel() for d in self.decisions if d.projected)
        summary = f"{projected:,} of {total:,} weights ({projected / total:.0%}) are in projected matrices"
        return f"{table(rows)}\n{summary}"


def table(rows: Sequence[Sequence[str]]) -> str:
    """Text in aligned columns."""
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    return "\n".join("  ".join(c.ljust(w) for c, w in zip(row, widths, strict=True)).rstrip() for row in rows)


def shape_text(shape: tuple[int, ...]) -> str:
    """64 x 32."""
    return " x ".join(map(str, shape)) or "scalar"


def param_groups(
    model: nn.Module,
    *,
    include: Sequence[str] = (),
    exclude: Sequence[str] = (),
    embeddings: str = "dense",
    decay: str = "all",
    rank: int | float | None = 0.25,
    **settings: Any,
) -> ParamGroups:
    """Splits a model's trainable parameters into projected matrices, other matrices and vectors.

    Projected are the weights of `nn.Linear`, of transformers' `Conv1D`, of attention and recurrent layers, of
    convolutions (output channels against the rest), and experts stacked in one parameter, as a batch of matrices. Dense
    stay embeddings, output heads (tied ones are embeddings too), norms, biases, routers, depthwise and grouped
    convolutions, and matrices whose smaller side is below 16. A parameter that is used twice is listed once.

    Args:
        model: any module.
        include: glob patterns of names (`"*.embed_tokens.weight"`) that are projected whatever their module is.
        exclude: glob patterns of names that stay dense.
        embeddings: `dense`, or `projected` for embedding tables and an output head over the same vocabulary, which are
            most of the state of a small model or of one with few layers awake.
        decay: `all`, or `matrices`: then the vectors, that is norms and biases, get `weight_decay` 0.
        rank: the projected groups' rank, as in `GaLoreAdamW`.
        settings: further keys of the projected groups, such as `update_proj_gap`, `scale` or `side`.

    Returns:
        Groups for the optimizers here that project: `projected`, `projected stacks`, `dense matrices` and `vectors`,
        those that are not empty, each with its `name` and with named parameters. `print` shows the table.

    Raises:
        ValueError: if a pattern matches no trainable parameter or stands alone as a string, if `include` names one that
            has no matrix, if `embeddings` or `decay` is neither of its two, or if nothing is left to project.

    Example:
        >>> model = nn.Sequential(nn.Embedding(100, 32), nn.Linear(32, 64), nn.ReLU(), nn.Linear(64, 32))
        >>> print(param_groups(model, rank=8))
        0.weight  100 x 32  dense      embedding
        1.weight  64 x 32   projected  Linear
        1.bias    64        dense      vector
        3.weight  32 x 64   projected  Linear
        3.bias    32        dense      vector
        4,096 of 7,392 weights (55%) are in projected matrices
    """
    for option, patterns in (("include", include), ("exclude", exclude)):
        if isinstance(patterns, str):
            raise ValueError(f"{option} must be a list of patterns, got the string {patterns!r}")
    if embeddings not in ("dense", "projected"):
        raise ValueError(f"embeddings must be one of dense, projected, got {embeddings!r}")
    undecayed = _undecayed(decay)
    found = list(_parameters(model))
    for pattern in (*include, *exclude):
        if not any(fnmatchcase(name, pattern) for name, *_ in found):
            raise ValueError(f"the pattern {pattern!r} matches no trainable parameter of the model")
    embedded = {id(p) for module in model.modules() if isinstance(module, EMBEDDINGS) for p in module.parameters()}
    heads = _output_heads(model)
    vocabulary = vocabulary_parameters(model) if embeddings == "projected" else set()

    groups: dict[str, list[tuple[str, Tensor]]] = {}
    decisions = []
    for name, p, module in found:
        projected, batch_dims, why = _decide(name, p, module, embedded, heads)
        if id(p) in vocabulary and p.ndim == 2:
            projected, batch_dims, why = _if_large(p, 0, why)
        if any(fnmatchcase(name, pattern) for pattern in exclude):
            projected, why = False, "excluded by name"
        elif any(fnmatchcase(name, pattern) for pattern in include):
            if p.ndim < 2 or not p.numel():
                raise ValueError(f"include names {name}, whose shape {tuple(p.shape)} holds no matrix to project")
            projected, why = True, "included by name"
        decisions.append(Decision(name, tuple(p.shape), projected, batch_dims if projected else 0, why))
        kind = "projected" if projected else "dense matrices" if p.ndim >= 2 else "vectors"
        groups.setdefault(kind + " stacks" * (projected and batch_dims > 0), []).append((name, p))

    if not any(d.projected for d in decisions):
        raise ValueError("param_groups found no matrix to project in this model; name some with include=")
    return ParamGroups(
        [
            {"name": kind, "params": groups[kind]}
            | ({"rank": rank, **settings} if kind.startswith("projected") else {})
            | ({"batch_dims": 1} if kind.endswith("stacks") else {})
            | (undecayed if kind == "vectors" else {})
            for kind in ("projected", "projected stacks", "dense matrices", "vectors")
            if kind in groups
        ],
        decisions,
    )


def dense_groups(model: nn.Module, *, decay: str = "all") -> list[dict[str, Any]]:
    """A model's trainable parameters, named, as `matrices` and `vectors`, for an optimizer that projects nothing.

    Args:
        model: any module.
        decay: as in `param_groups`.

    Raises:
        ValueError: if `decay` is neither of the two.
    """
    undecayed = _undecayed(decay)
    groups: dict[str, list[tuple[str, Tensor]]] = {"matrices": [], "vectors": []}
    for name, p, _ in _parameters(model):
        groups["matrices" if p.ndim >= 2 else "vectors"].append((name, p))
    return [
        {"name": kind, "params": params} | (undecayed if kind == "vectors" else {})
        for kind, params in groups.items()
        if params
    ]


def _undecayed(decay: str) -> dict[str, float]:
    """What the group of vectors gets."""
    if decay not in ("all", "matrices"):
        raise ValueError(f"decay must be one of all, matrices, got {decay!r}")
    return {} if decay == "all" else {"weight_decay": 0.0}


def _parameters(model: nn.Module) -> Iterator[tuple[str, Tensor, nn.Module]]:
    """(name, parameter, the module that owns it), trainable ones, each once."""
    modules = dict(model.named_modules())
    for name, p in model.named_parameters():
        if p.requires_grad:
            yield name, p, modules[name.rpartition(".")[0]]


def _own_head(model: nn.Module) -> nn.Module | None:
    """The output layer over the vocabulary that a model of transformers names."""
    own = getattr(model, "get_output_embeddings", None)
    return own() if callable(own) else None


def _output_heads(model: nn.Module) -> set[int]:
    """The ids of the output layer's parameters: what the model says, else what its last linear layer looks like."""
    head = _own_head(model)
    if head is None:
        linear = [(name, module) for name, module in model.named_modules() if isinstance(module, nn.Linear)]
        vocabularies = {m.num_embeddings for m in model.modules() if isinstance(m, EMBEDDINGS)}
        if linear:
            name, last = linear[-1]
            named = any(word in name.rpartition(".")[2] for word in HEAD_NAMES)
            if named or last.out_features in vocabularies - {last.in_features}:
                head = last
    return {id(p) for p in head.parameters()} if isinstance(head, nn.Module) else set()


def vocabulary_parameters(model: nn.Module) -> set[int]:
    """The ids of the parameters of embeddings, and of an output head over the vocabulary: one that the model names, or
    that has as many outputs as the largest embedding has rows; a classifier is none."""
    tables = [module for module in model.modules() if isinstance(module, EMBEDDINGS)]
    heads = _output_heads(model)
    if _own_head(model) is None:
        rows = max((table.num_embeddings for table in tables), default=0)
        heads = {id(p) for p in model.parameters() if id(p) in heads and p.shape[0] == rows}
    return heads | {id(p) for table in tables for p in table.parameters()}


def _decide(name: str, p: Tensor, module: nn.Module, embedded: set[int], heads: set[int]) -> tuple[bool, int, str]:
    """(projected, batch_dims, why)."""
    kind = type(module).__name__
    leaf = name.rpartition(".")[2]
    if p.ndim < 2:
        return False, 0, "vector"
    if id(p) in embedded:
        return False, 0, "embedding, tied to the head" if id(p) in heads else "embedding"
    if id(p) in heads:
        return False, 0, "output head"
    if "norm" in kind.lower():
        return False, 0, kind
    if "router" in f"{kind} {name}".lower():
        return False, 0, f"router ({kind})"
    if isinstance(module, CONVOLUTIONS):
        if module.groups > 1:
            return False, 0, f"{kind} with {module.groups} groups"
        return _if_large(p, 0, kind)
    if not isinstance(module, nn.Linear) and ("embed" in leaf or "token" in leaf or p.shape[0] == 1):
        return False, 0, f"embedding held by {kind}"
    if p.ndim == 2:
        return _if_large(p, 0, kind)
    if p.ndim == 3:
        return _if_large(p, 1, f"{kind}, {p.shape[0]} matrices")
    return False, 0, f"{p.ndim} axes held by {kind}: not known which are matrices"


def _if_large(p: Tensor, batch_dims: int, why: str) -> tuple[bool, int, str]:
    rows, columns = p.shape[batch_dims], p.shape[batch_dims + 1 :].numel()
    if min(rows, columns) < SMALLEST_SIDE:
        return False, batch_dims, f"{why}, smaller side {min(rows, columns)}"
    return True, batch_dims, why
