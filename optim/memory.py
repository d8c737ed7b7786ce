"""How much an optimizer keeps, and what training will hold, before anything is allocated."""

import itertools
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import asdict, astuple, dataclass, replace
from fnmatch import fnmatchcase
from typing import Any

import torch
from torch import Tensor, nn

from ._base import Group, Optimizer
from ._projected import ProjectedOptimizer
from ._sharding import local
from ._tracking import alike, buffer_bytes, bytes_of, on_meta, steps_of
from .backward import NeedsWhole, in_backward
from .by_name import KINDS, grouped, kind_of
from .groups import vocabulary_parameters
from .layer_sampling import STATE_POLICIES, Layers, find_layers

__all__ = ["CHOICES", "Choice", "Held", "Plan", "compare", "comparison", "fitting", "plan", "size_text", "state_bytes"]

BASES = ("basis", "basis_scale", "index")
EMBEDDINGS = ("dense", "projected", "freeze")
SELECTING = ("rank", "density")


def state_bytes(optimizer: torch.optim.Optimizer, params: Iterable[Tensor] | None = None) -> int:
    """The bytes that an optimizer's state holds alive: whole storages, each counted once.

    A slice of a large tensor therefore counts as the large tensor. Of a tensor that is divided over processes (DTensor)
    the part counts that this one holds.

    Args:
        optimizer: any torch optimizer.
        params: count the state of these parameters only; None means all.

    Returns:
        Bytes; 0 before the first step.
    """
    chosen = optimizer.state.values() if params is None else [optimizer.state.get(p, {}) for p in params]
    return bytes_of(value for state in chosen if isinstance(state, dict) for value in state.values())


@dataclass(frozen=True)
class Held:
    """The bytes that some parameters hold during training.

    Attributes:
        weights: the parameters.
        gradients: whole ones, at the time when most are held.
        states: the optimizer's state without the bases: moments, counters, errors, lengths.
        bases: what projections keep: bases and their scales, or indices.
        buffers: projected gradients, in the per-layer mode.
    """

    weights: int = 0
    gradients: int = 0
    states: int = 0
    bases: int = 0
    buffers: int = 0

    def __add__(self, other: "Held") -> "Held":
        """Both."""
        return Held(*(a + b for a, b in zip(astuple(self), astuple(other), strict=True)))

    @property
    def total(self) -> int:
        """All of it."""
        return sum(astuple(self))


@dataclass(frozen=True)
class Plan:
    """What training holds, in bytes; `print` shows it as a table.

    Weights, gradients, states and bases are exact: what tensors of these shapes and dtypes take. The allocator's
    rounding, its fragments, the context of the device and **activations are not in it**.

    Attributes:
        optimizer: what was planned, in words.
        groups: of each group of parameters, by its name.
        module_buffers: the model's buffers, such as running means.
        temporaries: the most that a step holds beside all this, and gives back.
        refresh: what a step that fits bases, or chooses a subspace, holds more.
        shared: matrices that parameters share and that are in no state: DCTAdamW's cosines.
        buckets: DistributedDataParallel's copies of gradients.
    """

    optimizer: str
    groups: dict[str, Held]
    module_buffers: int = 0
    temporaries: int = 0
    refresh: int = 0
    shared: int = 0
    buckets: int = 0

    @property
    def held(self) -> Held:
        """All groups together."""
        return sum(self.groups.values(), Held())

    @property
    def state_bytes(self) -> int:
        """What `slimstate.optim.state_bytes` will say after a step."""
        return self.held.states + self.held.bases

    @property
    def total(self) -> int:
        """All of it, at the step that needs most."""
        extra = self.module_buffers + self.temporaries + self.refresh + self.shared + self.buckets
        return self.held.total + extra

    def to_dict(self) -> dict[str, Any]:
        """Numbers and strings."""
        return asdict(self) | asdict(self.held) | {"state_bytes": self.state_bytes, "total": self.total}

    def __str__(self) -> str:
        columns = [name for name in Held.__dataclass_fields__ if getattr(self.held, name)]
        rows = [
            (name, *(size_text(getattr(held, column)) for column in columns), size_text(held.total))
            for name, held in [*self.groups.items(), ("in total", self.held)]
        ]
        rest = {
            "the model's buffers": self.module_buffers,
            "matrices that parameters share": self.shared,
            "temporaries of a step": self.temporaries,
            "more while bases are chosen": self.refresh,
            "DistributedDataParallel's buckets": self.buckets,
        }
        lines = [markdown_table((self.optimizer, *columns, "sum"), rows), ""]
        lines += [f"{what}: {size_text(size)}" for what, size in rest.items() if size]
        lines += [f"all of it: {size_text(self.total)} ({self.total:,} bytes), without activations"]
        return "\n".join(lines)


def plan(
    model: nn.Module,
    optimizer: str | type[Optimizer] | Optimizer = "GaLoreAdamW",
    *,
    dtype: torch.dtype | None = None,
    embeddings: str = "dense",
    frozen: Sequence[str] = (),
    per_layer: bool = False,
    active: int | None = None,
    layers: Layers = None,
    state_policy: str = "drop",
    ddp: bool = False,
    temporaries: bool = True,
    **settings: Any,
) -> Plan:
    """Plans the memory of training: what the model's parameters, their gradients and an optimizer's state will take.

    The optimizer is built over copies of the parameters on the meta device, which have shapes and no memory, and
    creates its state there by the code that creates it in training. Nothing of the model is read but shapes, dtypes and
    modules, so that it may be on the meta device itself.

    Args:
        model: any module; its parameters with `requires_grad` train.
        optimizer: the name of an optimizer of `slimstate.optim`, the class, or one that is built over the model's
            parameters and says by its groups what each gets. By name or class, those that project get
            `param_groups(model)`, the others all parameters.
        dtype: of weights, gradients and the model's buffers, as by `model.to(dtype)`; None leaves the model's own.
        embeddings: `dense`, `projected` (as in `param_groups`) or `freeze` (as in `LISA`).
        frozen: glob patterns of names of parameters that get no gradient: they have weights alone.
        per_layer: the gradients as under `in_backward(optimizer, early_bases=True)`.
        active: how many layers `LISA` or `OwLore` keeps awake at a time: counted are those that need most. None trains
            all.
        layers: which layers these are, as in `LISA`.
        state_policy: what becomes of the state of sleeping layers, as in `LISA`; `offload` counts the device alone.
        ddp: DistributedDataParallel's buckets: as many bytes as all gradients, unless it is made with
            `gradient_as_bucket_view=True`, which leaves only the buckets.
        temporaries: take the steps that tell what is held for a moment. False leaves that out, and is quicker.
        settings: of the optimizer: `rank`, `moment_dtype`, `basis_dtype`, ...

    Returns:
        The plan. Exact are weights, gradients of the ordinary mode, states and bases. Bounds are the layers that are
        awake at a time, the tensors of FRUGAL's `blocks`, and in the per-layer mode the gradients that are whole at
        once: those that are not projected, those whose bases are due in one step, and the largest of the others.
        Temporaries are what tensors hold in steps on the meta device, which a kernel's own workspace (LAPACK's,
        cuSOLVER's) comes on top of.

    Raises:
        ValueError: for an argument out of range, a pattern that matches nothing, or parameters that are divided over
            processes; and whatever the optimizer, `param_groups` and `in_backward` refuse.
        TypeError: for a setting that the optimizer does not have.

    Example:
        >>> with torch.device("meta"):
        ...     model = nn.Sequential(nn.Linear(1024, 4096, bias=False), nn.Linear(4096, 1024, bias=False))
        >>> planned = plan(model, "GaLoreAdamW", rank=128, dtype=torch.bfloat16)
        >>> planned.held.weights, planned.held.gradients, planned.state_bytes  # per matrix 2 r n + r m floats, 2 counts
        (16777216, 16777216, 9437200)
    """
    _check(model, embeddings, active, layers, state_policy)
    names: dict[Tensor, str] = {p: name for name, p in model.named_parameters()}
    copies = {p: on_meta(p, dtype) for p in names}
    make, groups, common = _chosen(model, optimizer, embeddings, settings)
    made = make([group | {"params": _named_copies(group["params"], names, copies)} for group in groups], **common)
    silent = _silent(model, names, embeddings, frozen)
    for p in names:
        if p.requires_grad and p not in silent:
            copies[p].grad = torch.empty_like(copies[p])
    made._create_states()
    for group in made.param_groups:
        made._advanced(group)

    held = {copy: _held_by(made, copy) for copy in copies.values()}
    for group in made.param_groups:
        _give_the_largest(held, made, group)
    for p in set() if active is None else _asleep(held, _layers(model, copies, active, layers), active):
        keeps = state_policy == "keep"
        held[p] = replace(held[p], gradients=0, states=keeps * held[p].states, bases=keeps * held[p].bases)
        p.grad = None
    per_layer = per_layer or getattr(optimizer, "_in_backward", None) is not None
    if per_layer:
        in_backward(made, early_bases=True).remove()  # refuses what does not go with it

    parts: dict[str, Held] = {}
    for i, group in enumerate(made.param_groups):
        whole = _reduce(held, made, group) if per_layer else 0
        name = str(group.get("name", f"group {i}"))
        parts[name] = sum((held[p] for p in group["params"]), parts.get(name, Held()) + Held(gradients=whole))
    grouped = {p for group in made.param_groups for p in group["params"]}
    for name, rest in (
        ("in no group", [p for p in held if p.requires_grad and p not in grouped]),
        ("frozen", [p for p in held if not p.requires_grad and p not in grouped]),
    ):
        if rest:
            parts[name] = sum((held[p] for p in rest), Held())
    reduced = [p for p, name in names.items() if p.requires_grad and not _matches(name, frozen)]
    return Plan(
        optimizer=_described(type(made), settings, per_layer, active),
        groups=parts,
        module_buffers=bytes_of(on_meta(x, dtype) for x in model.buffers()),
        buckets=ddp * sum(held[copies[p]].weights for p in reduced),
        **(steps_of(made) if temporaries else {}),
    )


@dataclass(frozen=True)
class Choice:
    """An optimizer that a comparison shows.

    Attributes:
        optimizer: its name.
        settings: those that make it this variant.
        behind: how far its held-out loss ends behind AdamW's in the pretraining job at rank 1/4, in percent, the mean
            of the seeds of docs/benchmarks/pretrain.md; None where that has not been measured.
    """

    optimizer: str
    settings: dict[str, Any]
    behind: float | None = None


# Best first, of those that are measured, and AdamW before all: two seeds of one of these differ by up to 0.9 %.
CHOICES = (
    Choice("AdamW", {}, 0.0),
    Choice("DCTAdamW", {"error_feedback": "8bit"}, -0.1),
    Choice("FRUGAL", {"contiguous": True}, 0.1),
    Choice("FRUGAL", {}, 0.4),
    Choice("GradNormLoRP", {}, 1.1),
    Choice("GaLoreAdamW", {}, 1.8),
    Choice("GaLoreAdafactor", {"beta1": 0.9}, 2.0),
    Choice("DCTAdamW", {}, 3.5),
    Choice("AdamW8bit", {}),
    Choice("GaLoreAdamW8bit", {}),
    Choice("AdamP", {}),
    Choice("SGDP", {"momentum": 0.9}),
)
RANKS = (0.25, 0.125, 0.0625)


def compare(model: nn.Module, *, rank: int | float = 0.25, **options: Any) -> list[Plan]:
    """Plans of all optimizers, those of `CHOICES`, without temporaries.

    Args:
        model: any module.
        rank: of those that project.
        options: of `plan`: `dtype`, `embeddings`, `per_layer` (which leaves out those that need whole gradients), ...
    """
    plans = [
        _planned(model, choice, choice.settings | {"rank": rank}, temporaries=False, **options) for choice in CHOICES
    ]
    return [planned for planned in plans if planned is not None]


def fitting(
    model: nn.Module, budget: int, optimizer: str | None = None, *, most: int = 5, **settings: Any
) -> list[tuple[Choice, Plan]]:
    """The settings whose plan is within a budget, best quality first.

    That order is by the loss of the pretraining job, one small model, at rank 1/4 (see `CHOICES`). Of one optimizer
    float32 moments come before 8-bit ones, with which the loss of a small classifier fell less far by at most 0.1 %
    (`docs/precision.md`), and the ordinary mode before the per-layer mode, which changes no weight and takes more time.
    Ranks 1/8 and 1/16, which were not measured, come after everything at 1/4.

    Args:
        model: any module.
        budget: bytes; activations must fit beside it.
        optimizer: the name of the only one to try; None tries all that were measured.
        most: stop after so many.
        settings: of `plan`, and of the optimizer; what is given is not varied.

    Returns:
        At most `most` choices, each with its plan; empty if nothing fits.

    Raises:
        ValueError: for a budget that is not an int >= 1, or an unknown optimizer; and as `plan`.
    """
    if not isinstance(budget, int) or isinstance(budget, bool) or budget < 1:
        raise ValueError(f"budget must be an int >= 1 (bytes), got {budget!r}")
    only = None if optimizer is None else kind_of(optimizer, "optimizer").__name__
    choices = [x for x in CHOICES if (x.behind is not None if only is None else x.optimizer == only)]
    found: list[tuple[Choice, Plan]] = []
    for choice, own in _variants(choices, settings):
        planned = _planned(model, choice, own, temporaries=False)
        if planned is not None and planned.total <= budget:
            planned = _planned(model, choice, own)  # temporaries take longest
        if planned is not None and planned.total <= budget:
            found.append((choice, planned))
        if len(found) == most:
            break
    return found


def _planned(model: nn.Module, choice: Choice, settings: dict[str, Any], **options: Any) -> Plan | None:
    """A plan with those settings that the optimizer can have; None where it does not go with the per-layer mode."""
    settings = settings | options
    if not issubclass(kind_of(choice.optimizer), ProjectedOptimizer):
        settings = {key: x for key, x in settings.items() if key not in SELECTING}
        if settings.get("embeddings") == "projected":
            del settings["embeddings"]
    try:
        return plan(model, choice.optimizer, **settings)
    except NeedsWhole:
        return None


def _variants(choices: Sequence[Choice], settings: dict[str, Any]) -> Iterator[tuple[Choice, dict[str, Any]]]:
    """Choices with what the settings leave open, best first."""
    open_rank = settings.keys().isdisjoint(SELECTING)
    for rank in RANKS if open_rank else [None]:
        for choice in choices:
            if not issubclass(kind_of(choice.optimizer), ProjectedOptimizer) and rank not in (None, RANKS[0]):
                continue
            for moments, per_layer in itertools.product((None, "8bit"), (False, True)):
                varied: dict[str, Any] = {"rank": rank} if open_rank else {}
                varied |= {"moment_dtype": moments} if moments else {}
                varied |= {"per_layer": True} if per_layer else {}
                again = choice.optimizer.endswith("8bit") and moments
                own = choice.settings | varied | settings
                if varied.keys().isdisjoint(settings) and not again:
                    measured = "density" not in own and own.get("rank", RANKS[0]) == RANKS[0]
                    yield choice if measured else replace(choice, behind=None), own


def _check(model: nn.Module, embeddings: str, active: int | None, layers: Layers, state_policy: str) -> None:
    if not isinstance(model, nn.Module):
        raise TypeError(f"model must be a torch.nn.Module, got {type(model).__name__}")
    for name, value, allowed in (
        ("embeddings", embeddings, EMBEDDINGS),
        ("state_policy", state_policy, STATE_POLICIES),
    ):
        if value not in allowed:
            raise ValueError(f"{name} must be one of {', '.join(allowed)}, got {value!r}")
    if active is not None and (not isinstance(active, int) or isinstance(active, bool) or active < 1):
        raise ValueError(f"active must be None or an int >= 1 (layers), got {active!r}")
    if layers is not None and active is None:
        raise ValueError("layers says which ones sleep while active= others train: give active too")
    divided = next((name for name, p in model.named_parameters() if local(p) is not p), None)
    if divided is not None:
        raise ValueError(
            f"parameter {divided} is divided over processes (DTensor): plan the model before fully_shard; each of n "
            "processes then holds about an n-th of what is planned"
        )


def _chosen(
    model: nn.Module, optimizer: str | type[Optimizer] | Optimizer, embeddings: str, settings: dict[str, Any]
) -> tuple[Callable[..., Optimizer], list[Group], dict[str, Any]]:
    """The class, groups of the model's own parameters, and what else the constructor is given."""
    if isinstance(optimizer, Optimizer):
        if settings or embeddings == "projected":
            given = ", ".join(settings) or "embeddings='projected'"
            raise ValueError(f"{given}: a built {type(optimizer).__name__} says by its groups what each gets")
        return type(optimizer), optimizer.param_groups, {}
    if isinstance(optimizer, str):
        optimizer = kind_of(optimizer, "optimizer")
    elif optimizer not in KINDS:
        raise TypeError(f"optimizer must be one of slimstate.optim, its name or its class, got {optimizer!r}")
    if embeddings == "projected":
        if not issubclass(optimizer, ProjectedOptimizer):
            raise ValueError(f"embeddings='projected': {optimizer.__name__} projects nothing")
        settings = settings | {"embeddings": embeddings}
    found, settings = grouped(optimizer, model, settings)
    return optimizer, [group | {"params": [p for _, p in group["params"]]} for group in found], settings


def _named_copies(
    params: Iterable[Tensor], names: dict[Tensor, str], copies: dict[Tensor, Tensor]
) -> list[tuple[str, Tensor]]:
    """A group's parameters on the meta device."""
    params = list(params)
    missing = next((p for p in params if p not in copies), None)
    if missing is not None:
        raise ValueError(f"the optimizer has a parameter of shape {tuple(missing.shape)} that is not the model's")
    return [(names[p], copies[p]) for p in params]


def _matches(name: str, patterns: Iterable[str]) -> bool:
    return any(fnmatchcase(name, pattern) for pattern in patterns)


def _silent(model: nn.Module, names: dict[Tensor, str], embeddings: str, frozen: Sequence[str]) -> set[Tensor]:
    """The parameters that `frozen` and `embeddings` leave without a gradient."""
    if isinstance(frozen, str):
        raise ValueError(f"frozen must be a list of patterns, got the string {frozen!r}")
    for pattern in frozen:
        if not any(fnmatchcase(name, pattern) for name in names.values()):
            raise ValueError(f"frozen: the pattern {pattern!r} matches no parameter of the model")
    vocabulary = vocabulary_parameters(model) if embeddings == "freeze" else set()
    if embeddings == "freeze" and not vocabulary:
        raise ValueError("embeddings='freeze': the model has no embedding and no output head over a vocabulary")
    return {p for p, name in names.items() if id(p) in vocabulary or _matches(name, frozen)}


def _held_by(optimizer: Optimizer, p: Tensor) -> Held:
    state = optimizer.state.get(p, {})
    bases = bytes_of(state[key] for key in BASES if key in state)
    size = p.numel() * p.itemsize
    return Held(size, 0 if p.grad is None else size, bytes_of(state.values()) - bases, bases)


def _give_the_largest(held: dict[Tensor, Held], optimizer: Optimizer, group: Group) -> None:
    """Where states come and go, as in FRUGAL's `blocks`, as many tensors as have one have it: the largest ones."""
    moments: dict[Tensor, int] = {}
    present = set()
    for p in group["params"]:
        if p.grad is not None and (keys := optimizer._passing(p, group)):
            moments[p] = bytes_of(optimizer._zeros(p, group, keys).values())
            present |= {p} if keys <= optimizer.state[p].keys() else set()
    largest = set(sorted(moments, key=lambda p: -moments[p])[: len(present)])
    for p, size in moments.items():
        change = size * ((p in largest) - (p in present))
        held[p] = replace(held[p], states=held[p].states + change)


def _layers(model: nn.Module, copies: dict[Tensor, Tensor], active: int, layers: Layers) -> list[set[Tensor]]:
    """The parameters of each layer that can train."""
    modules = find_layers(model, layers).values()
    found = [{copies[p] for p in module.parameters()} for module in modules]
    found = [params for params in found if any(p.requires_grad for p in params)]
    if active > len(found):
        raise ValueError(f"active={active!r} layers were asked for, but {len(found)} of {len(modules)} can train")
    return found


def _asleep(held: dict[Tensor, Held], layers: list[set[Tensor]], active: int) -> set[Tensor]:
    """The parameters that do not train while the `active` layers do that hold most."""
    by_size = sorted(layers, key=lambda params: -sum(held[p].total - held[p].weights for p in params))
    awake = {p for params in by_size[:active] for p in params}
    return {p for params in layers for p in params} - awake


def _reduce(held: dict[Tensor, Held], optimizer: Optimizer, group: Group) -> int:
    """Turns gradients into the buffers of the per-layer mode; returns the bytes of those that are whole at once."""
    assert isinstance(optimizer, ProjectedOptimizer)
    places = optimizer._places(group)
    sizes: dict[Any, int] = {}
    due: dict[int, int] = {}
    largest = 0
    for p, place in places.items():
        if p.grad is None:
            continue
        size = held[p].gradients
        offset = place * group["update_proj_gap"] // len(places)
        due[offset] = due.get(offset, 0) + size
        largest = max(largest, size)
        if alike(p) not in sizes:
            sizes[alike(p)] = buffer_bytes(optimizer, group, p)
        held[p] = replace(held[p], gradients=0, buffers=sizes[alike(p)])
    return max(due.values(), default=0) + largest


def _described(kind: type[Optimizer], settings: dict[str, Any], per_layer: bool, active: int | None) -> str:
    words = [f"{key}={x}" for key, x in settings.items()]
    words += ["per layer"] * per_layer + [f"{active} layers awake"] * (active is not None)
    return ", ".join([kind.__name__, *words])


def comparison(plans: Sequence[Plan]) -> str:
    """A table of plans side by side."""
    header = ("", *Held.__dataclass_fields__, "all of it")
    rows = [(x.optimizer, *map(size_text, astuple(x.held)), size_text(x.total)) for x in plans]
    return f"{markdown_table(header, rows)}\n\nWithout activations, and without what a step holds for a moment."


def size_text(size: int) -> str:
    """Bytes for a reader, in GB of 1e9 and MB of 1e6 bytes."""
    if size < 1e3:
        return f"{size} B"
    return f"{size / 1e9:.3f} GB" if size >= 1e8 else f"{size / 1e6:.3f} MB"


def markdown_table(header: Sequence[str], rows: Iterable[Sequence[str]]) -> str:
    """A Markdown table, padded so that it reads as plain text too."""
    cells = [list(header), *map(list, rows)]
    widths = [max(map(len, column)) for column in zip(*cells, strict=True)]
    cells.insert(1, ["-" * width for width in widths])
    return "\n".join("| " + " | ".join(c.ljust(w) for c, w in zip(r, widths, strict=True)) + " |" for r in cells)
