"""Optimizers by name, for frameworks that configure by string, and for transformers' Trainer."""

import inspect
from collections.abc import Callable
from typing import Any

from torch import nn

from ._base import TORCH_KEYWORDS, Optimizer
from ._projected import ProjectedOptimizer
from .adafactor import GaLoreAdafactor
from .adamp import SGDP, AdamP
from .adamw import AdamW, AdamW8bit
from .dct import DCTAdamW
from .frugal import FRUGAL
from .galore import GaLoreAdamW, GaLoreAdamW8bit
from .gradnorm import GradNormLoRP
from .groups import dense_groups, param_groups

__all__ = ["create", "for_trainer"]

KINDS: tuple[type[Optimizer], ...] = (
    AdamW,
    AdamW8bit,
    GaLoreAdamW,
    GaLoreAdamW8bit,
    GaLoreAdafactor,
    FRUGAL,
    GradNormLoRP,
    DCTAdamW,
    AdamP,
    SGDP,
)
SAMPLERS = ("lisa", "owlore")

OF_GROUPS = ("include", "exclude", "embeddings", "decay")  # those of `param_groups` that are no keys of groups


def create(name: str, model: nn.Module, **settings: Any) -> Optimizer:
    """Makes an optimizer of this package for a model, from a name and settings.

    It is what one writes by hand: ``GaLoreAdamW(param_groups(model, rank=128), lr=4e-3)`` is
    ``create("galore_adamw", model, rank=128, lr=4e-3)``. Of an optimizer that projects nothing all trainable parameters
    are taken, by name.

    Args:
        name: of a class of this package. Case, ``_`` and ``-`` do not count: ``GaLoreAdamW8bit``,
            ``galore_adamw_8bit`` and ``galore-adamw-8bit`` are one.
        model: whose trainable parameters are to be optimized.
        settings: the optimizer's; `decay` of `param_groups`; and, where the optimizer projects, its `include`,
            `exclude` and `embeddings`. `rank` (and FRUGAL's `density`) is that of the projected groups. `batch_dims`
            is decided from the modules.

    Returns:
        The optimizer, with named groups.

    Raises:
        ValueError: for an unknown name, with those there are; for `lisa` and `owlore`, which go beside an optimizer;
            and as `param_groups` and the optimizer.
        TypeError: for a setting that the optimizer does not have, with those that it has.

    Example:
        >>> model = nn.Sequential(nn.Linear(32, 64), nn.LayerNorm(64))
        >>> optimizer = create("galore_adamw", model, rank=8, lr=4e-3, weight_decay=0.1, decay="matrices")
        >>> [(group["name"], group["rank"], group["weight_decay"]) for group in optimizer.param_groups]
        [('projected', 8, 0.1), ('vectors', None, 0.0)]
    """
    kind = kind_of(name)
    groups, settings = grouped(kind, model, settings)
    return kind(groups, **settings)


def for_trainer(name: str, args: Any, **settings: Any) -> tuple[Callable[[], Callable[..., Optimizer]], dict[str, Any]]:
    """What transformers' Trainer takes as `optimizer_cls_and_kwargs`, to train with an optimizer of this package.

    The optimizer is `create`'s. When the Trainer makes it, it takes `learning_rate` and `weight_decay` from the
    arguments, and if it has betas `adam_beta1`, `adam_beta2` and `adam_epsilon`. As the Trainer's own it does not decay
    norms and biases (``decay="matrices"``).

    Args:
        name: see `create`.
        args: the Trainer's TrainingArguments.
        settings: see `create`; they come before those of `args`.

    Returns:
        A factory and the settings.

    Raises:
        ValueError: see `create`; for names already here.
        TypeError: see `create`; already here.

    Example:
        >>> from types import SimpleNamespace
        >>> args = SimpleNamespace(  # transformers.TrainingArguments(...)
        ...     learning_rate=4e-3, weight_decay=0.1, adam_beta1=0.9, adam_beta2=0.95, adam_epsilon=1e-8
        ... )
        >>> factory, settings = for_trainer("galore_adamw", args, rank=8)
        >>> optimizer = factory()(nn.Linear(32, 64), **settings)  # as Trainer(optimizer_cls_and_kwargs=...) does
        >>> [(group["name"], group["betas"], group["weight_decay"]) for group in optimizer.param_groups]
        [('projected', (0.9, 0.95), 0.1), ('vectors', (0.9, 0.95), 0.0)]
    """
    kind = kind_of(name)
    _check_settings(kind, settings)

    def factory() -> Callable[..., Optimizer]:
        theirs = {"lr": args.learning_rate, "weight_decay": args.weight_decay, "decay": "matrices"}
        if "betas" in _settings(kind):
            theirs |= {"betas": (args.adam_beta1, args.adam_beta2), "eps": args.adam_epsilon}
        return lambda model, **settings: create(name, model, **theirs | settings)

    return factory, settings


def grouped(
    kind: type[Optimizer], model: nn.Module, settings: dict[str, Any]
) -> tuple[list[dict[str, Any]], dict[str, Any]]:
    """Groups of a model's parameters as an optimizer takes them, and the settings that are left for itself."""
    _check_settings(kind, settings)
    of_groups = {key: settings[key] for key in OF_GROUPS if key in settings}
    left = {key: x for key, x in settings.items() if key not in of_groups}
    if not issubclass(kind, ProjectedOptimizer):
        return dense_groups(model, **of_groups), left
    shares = {key: left.pop(key) for key in kind.shares if key in left}
    if "density" in shares:
        shares.setdefault("rank", None)
    return param_groups(model, **of_groups, **shares), left


def _plain(name: str) -> str:
    return name.lower().replace("_", "").replace("-", "")


def kind_of(name: str, argument: str = "name") -> type[Optimizer]:
    """The class that a name means."""
    known = {_plain(kind.__name__): kind for kind in KINDS}
    plain = _plain(name) if isinstance(name, str) else None
    if plain in SAMPLERS:
        raise ValueError(
            f"{name!r} samples layers beside an optimizer, and has a state of its own to save: create the optimizer, "
            "then LISA(model, optimizer) or OwLore(model, optimizer), and attach() it"
        )
    if plain not in known:
        raise ValueError(f"{argument} must be one of {', '.join(kind.__name__ for kind in KINDS)}, got {name!r}")
    return known[plain]


def _settings(kind: type[Optimizer]) -> set[str]:
    """What `create` takes for an optimizer."""
    keywords = {
        key
        for base in kind.__mro__
        if issubclass(base, Optimizer)
        for key, parameter in inspect.signature(base).parameters.items()
        if parameter.kind != parameter.VAR_KEYWORD
    }
    of_groups = OF_GROUPS if issubclass(kind, ProjectedOptimizer) else ("decay",)
    return keywords - {"params", "defaults", "batch_dims"} | {*of_groups}


def _check_settings(kind: type[Optimizer], settings: dict[str, Any]) -> None:
    known = _settings(kind)
    for key in settings:
        if key not in known | TORCH_KEYWORDS.keys():
            raise TypeError(f"{kind.__name__} has no setting {key!r}; those of create are {', '.join(sorted(known))}")
