"""LISA and OwLore: a few layers train at a time, and only they hold gradients and optimizer state.

Pan et al., 2024. https://arxiv.org/abs/2403.17919
Li et al., 2024. https://arxiv.org/abs/2405.18380
"""

import math
from collections.abc import Callable, Iterable, Mapping, Sequence
from fractions import Fraction
from numbers import Integral
from typing import Any

import torch
from torch import Tensor, nn

from slimstate.ops import counter_key
from slimstate.projections._blocks import blocks

from ._adam import is_number
from ._base import Optimizer
from ._loading import unwrapped
from ._sharding import local, part_of, total_
from .groups import vocabulary_parameters

__all__ = ["LISA", "LayerSampler", "OwLore", "outlier_scores"]

Layers = str | Sequence[str | nn.Module] | nn.ModuleList | nn.Sequential | None

STATE_POLICIES = ("drop", "keep", "offload")
EMBEDDINGS = ("train", "freeze")

# What a draw's random bits are for: the order of the layers, the offset of the systematic sample.
ORDER, OFFSET = range(2)

# The least score, as a share of the largest: a layer whose weights show no outlier would never train.
FLOOR = 0.01


class LayerSampler:
    """Lets some layers of a model train for an interval, then others: what LISA and OwLore share.

    See `LISA` for the arguments. `scores`, one for each layer, set the inclusion probabilities.
    """

    def __init__(
        self,
        model: nn.Module,
        optimizer: torch.optim.Optimizer,
        layers: Layers,
        scores: Sequence[float] | None,
        active: int,
        interval: int,
        state_policy: str,
        embeddings: str,
        seed: int,
    ) -> None:
        for name, value, least in (("active", active, 1), ("interval", interval, 1), ("seed", seed, -math.inf)):
            if not isinstance(value, Integral) or isinstance(value, bool) or value < least:
                raise ValueError(f"{name} must be an int{' >= 1' if least == 1 else ''}, got {value!r}")
        for name, choice, choices in (
            ("state_policy", state_policy, STATE_POLICIES),
            ("embeddings", embeddings, EMBEDDINGS),
        ):
            if choice not in choices:
                raise ValueError(f"{name} must be one of {', '.join(choices)}, got {choice!r}")
        found = find_layers(model, layers)
        scores = _checked_scores(scores, len(found))
        vocabulary = vocabulary_parameters(model) if embeddings == "freeze" else set()
        vocabulary -= {id(p) for module in found.values() for p in module.parameters()}
        if embeddings == "freeze" and not vocabulary:
            raise ValueError("embeddings='freeze': the model has no embedding and no output head over a vocabulary")
        trainable = {name: [p for p in module.parameters() if p.requires_grad] for name, module in found.items()}
        self._layers = {name: params for name, params in trainable.items() if params}
        self._check_layers(optimizer, {id(p): name for name, p in model.named_parameters()}, len(found), active)

        self.optimizer = optimizer
        self.state_policy = state_policy
        self.active, self.interval, self.seed = int(active), int(interval), int(seed)
        self._scores = [score for score, name in zip(scores, found, strict=True) if name in self._layers]
        self._shares = inclusion_probabilities(self._scores, self.active)
        self._steps = 0
        self._hook: Any = None
        self._parked: dict[Tensor, list[str]] = {}
        if state_policy == "offload":
            optimizer.register_load_state_dict_post_hook(self._park_again)
        for p in model.parameters():
            if id(p) in vocabulary:
                p.requires_grad_(False)
                p.grad = None
        # No state is dropped yet: it may have been loaded, for layers that `load_state_dict` will wake.
        self._toggle()

    def _check_layers(self, optimizer: torch.optim.Optimizer, names: dict[int, str], found: int, active: int) -> None:
        if not self._layers:
            raise ValueError(
                f"no parameter of the {found} layers is trainable: leave requires_grad to the sampler, which freezes "
                "and thaws the layers by itself"
            )
        if active > len(self._layers):
            raise ValueError(f"active={active!r} layers were asked for, but {len(self._layers)} of {found} can train")
        held = {id(p) for group in optimizer.param_groups for p in group["params"]}
        missing = [names[id(p)] for params in self._layers.values() for p in params if id(p) not in held]
        if missing:
            raise ValueError(
                f"the optimizer lacks {len(missing)} trainable parameters of the layers, such as {missing[0]}: they "
                "would get gradients and never move. Give it all of the model's parameters, before any is frozen"
            )

    # Drawing.

    @property
    def probabilities(self) -> dict[str, float]:
        """How likely each layer is to be awake in an interval; the values sum to `active`."""
        return {name: float(share) for name, share in zip(self._layers, self._shares, strict=True)}

    def draw(self, interval: int) -> list[str]:
        """The layers that are awake in an interval, counted from 0: a function of the seed and of nothing else.

        A systematic sample: in a random order the probabilities are laid end to end, and every unit from a random
        offset on takes the layer it falls into. That makes `active` different layers, each with its own probability.
        """
        order = sorted(range(len(self._shares)), key=lambda i: counter_key(self.seed, interval, ORDER, i))
        point = Fraction(counter_key(self.seed, interval, OFFSET) % 2**64, 2**64)
        end, drawn = Fraction(0), []
        for i in order:
            end += self._shares[i]
            if point < end:
                drawn.append(i)
                point += 1
        names = list(self._layers)
        return [names[i] for i in sorted(drawn)]

    @property
    def awake(self) -> list[str]:
        """The layers that train now."""
        return self.draw(self._steps // self.interval)

    def _parameters(self, names: Iterable[str]) -> set[Tensor]:
        return {p for name in names for p in self._layers[name]}

    def _sampled_parameters(self) -> list[Tensor]:
        return list(dict.fromkeys(p for params in self._layers.values() for p in params))

    # Steps.

    def step(self) -> None:
        """Counts an optimizer step, to be called after it; the last one of an interval switches the layers.

        Raises:
            RuntimeError: if the sampler is attached, and counts by itself.
        """
        if self._hook is not None:
            raise RuntimeError("the sampler is attached to its optimizer and counts its steps: do not call step()")
        self._count()

    def attach(self) -> None:
        """Counts the optimizer's steps from now on by a hook, so that one that a GradScaler skips does not count."""
        if self._hook is not None:
            raise RuntimeError("the sampler is already attached")
        self._hook = self.optimizer.register_step_post_hook(lambda *_: self._count())

    def detach(self) -> None:
        """Ends what `attach` began."""
        if self._hook is not None:
            self._hook.remove()
            self._hook = None

    def _count(self) -> None:
        before = self._steps // self.interval
        self._steps += 1
        if self._steps % self.interval == 0:
            self._switch(kept=self._parameters(self.draw(before)) & self._parameters(self.awake))

    def _switch(self, kept: set[Tensor]) -> None:
        """Makes those layers trainable that should be, and treats the state of all but the kept parameters."""
        self._toggle()
        others = [p for p in self._sampled_parameters() if p not in kept]
        if self.state_policy == "drop" and isinstance(self.optimizer, Optimizer):
            self.optimizer.forget(others)
        elif self.state_policy == "drop":
            for p in others:
                self.optimizer.state.pop(p, None)
        elif self.state_policy == "offload":
            self._park()

    def _toggle(self) -> None:
        awake = self._parameters(self.awake)
        for p in self._sampled_parameters():
            p.requires_grad_(p in awake)
            if p not in awake:
                p.grad = None

    # State on the CPU.

    def _park(self) -> None:
        """Moves state to the CPU for sleeping parameters, and back for the others."""
        awake = self._parameters(self.awake)
        for p in self._sampled_parameters():
            if p in awake or p.device.type == "cpu":
                continue
            state = self.optimizer.state.get(p, {})
            keys = [key for key, x in state.items() if isinstance(x, Tensor) and x.device == p.device]
            for key in keys:
                there = torch.empty_like(state[key], device="cpu", pin_memory=p.device.type == "cuda")
                state[key] = there.copy_(state[key])
            if keys:
                self._parked[p] = keys
        for p in awake & self._parked.keys():
            state = self.optimizer.state[p]
            for key in self._parked.pop(p):
                state[key] = state[key].to(p.device, non_blocking=True)

    def _park_again(self, _: torch.optim.Optimizer) -> None:
        """A load brings every state to its parameter's device."""
        self._parked.clear()
        self._park()

    # Checkpoints.

    def state_dict(self) -> dict[str, Any]:
        """Numbers, strings and lists: how far it is, and all that draws depend on."""
        return {
            "steps": self._steps,
            "active": self.active,
            "interval": self.interval,
            "seed": self.seed,
            "layers": [unwrapped(name) for name in self._layers],
            "scores": list(self._scores),
        }

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Goes on within the saved interval, with the saved draws.

        As a scheduler's, it brings the saved `active`, `interval`, `seed` and scores with it; `state_policy` and
        `embeddings` stay as constructed. `torch.distributed.checkpoint` loads an optimizer's state for those parameters
        that are trainable then, and takes a step of its own: load the sampler before, and attach it after.

        Raises:
            ValueError: if it belongs to other layers, before anything is changed.
        """
        own = self.state_dict()
        if state_dict.keys() != own.keys():
            raise ValueError(f"a sampler's state has {', '.join(own)}, got {', '.join(map(str, state_dict))}")
        theirs = [unwrapped(name) for name in state_dict["layers"]]
        if theirs != own["layers"]:
            differing = sorted(set(theirs) ^ set(own["layers"]))
            raise ValueError(
                f"the state belongs to a sampler of {len(theirs)} layers, this one has {len(self._layers)}; "
                f"they differ in {differing[0] if differing else 'their order'}"
            )
        self._steps, self.active, self.interval, self.seed = (
            int(state_dict[key]) for key in ("steps", "active", "interval", "seed")
        )
        self._scores = [float(score) for score in state_dict["scores"]]
        self._shares = inclusion_probabilities(self._scores, self.active)
        self._switch(kept=self._parameters(self.awake))

    def __repr__(self) -> str:
        until = (self._steps // self.interval + 1) * self.interval
        sampled, awake = (sum(p.numel() for p in self._parameters(names)) for names in (self._layers, self.awake))
        return (
            f"{type(self).__name__}(active={self.active}, interval={self.interval}, "
            f"state_policy={self.state_policy!r}, seed={self.seed})\n"
            f"{len(self.awake)} of {len(self._layers)} layers train until step {until}, {awake:,} of their {sampled:,} "
            f"weights: {', '.join(self.awake)}"
        )


class LISA(LayerSampler):
    r"""Layerwise Importance Sampled AdamW: each interval trains a few layers, drawn uniformly, and everything that is
    in no layer.

    Of the layers 1 ... N, `active` different ones are awake in interval j, of `interval` optimizer steps,

    .. math::
        S_j \subset \{1, \dots, N\}, \qquad |S_j| = \gamma, \qquad \Pr(l \in S_j) = \gamma / N,

    a pure function of (seed, j), so that all ranks agree and a resumed run goes on as it would have. Parameters of
    sleeping layers have `requires_grad=False`: no gradient, no decay, no step. It has a scheduler's interface, for any
    optimizer: `step()` after `optimizer.step()`, or `attach()` once.

    State of an optimizer that keeps s bytes a weight, with A the weights in no layer (embeddings, output head, norms):
    s (\|A\| + the weights of the awake layers), never more, under `drop`.

    - Make the optimizer first, with all parameters; the sampler freezes. Parameters that are frozen already never
      wake, and a layer without any other is left out of the draw.
    - Parameters shared by several layers are awake while any of these is.
    - DistributedDataParallel needs `find_unused_parameters=True`. Reentrant gradient checkpointing of a frozen first
      layer needs inputs with gradients (transformers: `model.enable_input_require_grads()`).
    - Under fully_shard each process holds its part of an awake layer's gradients and state, and all agree on the draw;
      FullyShardedDataParallel (FSDP1) holds flat states of all layers, and cannot be sampled.
    - Checkpoints: build model, optimizer and sampler; load the model, the sampler, the optimizer; `attach` last.

    Where this differs from LMFlow: state is dropped, as in the paper's runs (each interval a run of its own), not kept
    for every layer that was ever awake; draws depend on no global generator; a layer that the optimizer lacks is an
    error.

    Args:
        model: whose `requires_grad` flags are set.
        optimizer: any torch optimizer over the model's parameters.
        layers: the path of a ModuleList or Sequential (`"model.layers"`), that module, or a list of modules or paths;
            None takes the one list of like blocks that the model has.
        active: layers awake at a time, :math:`\gamma`. Default 2, the paper's up to 7B (4 for 70B).
        interval: optimizer steps between two draws. Default 20, LMFlow's.
        state_policy: what becomes of the state of a layer that goes to sleep. `drop` (the paper's runs): forgotten;
            it wakes at age 1 with fresh bases. `keep` (LMFlow): it stays, and with time that of all layers. `offload`:
            it waits in (pinned) CPU memory.
        embeddings: `train` (the paper) or `freeze` the embeddings and an output head over the vocabulary, most of what
            LISA trains: 39 % of it in LLaMA-7B, 71 % in Llama-3-8B. `param_groups(model, embeddings="projected")` is
            the third way, for an optimizer that projects.
        seed: of the draws.

    Raises:
        ValueError: for a value out of range, layers that are not found, repeated or nested, more `active` layers than
            can train, or an optimizer that lacks a layer's parameters; before anything is changed.

    Example:
        >>> model = nn.Sequential(*(nn.Linear(8, 8) for _ in range(6)), nn.Linear(8, 2))
        >>> optimizer = torch.optim.AdamW(model.parameters())
        >>> sampler = LISA(model, optimizer, list(model)[:6], interval=5)
        >>> for step in range(10):
        ...     loss = model(torch.ones(1, 8)).sum()
        ...     optimizer.zero_grad()
        ...     loss.backward()
        ...     optimizer.step()
        ...     sampler.step()
        >>> print(sampler)
        LISA(active=2, interval=5, state_policy='drop', seed=0)
        2 of 6 layers train until step 15, 144 of their 432 weights: 0, 1
    """

    def __init__(
        self,
        model: nn.Module,
        optimizer: torch.optim.Optimizer,
        layers: Layers = None,
        *,
        active: int = 2,
        interval: int = 20,
        state_policy: str = "drop",
        embeddings: str = "train",
        seed: int = 0,
    ) -> None:
        super().__init__(model, optimizer, layers, None, active, interval, state_policy, embeddings, seed)


class OwLore(LayerSampler):
    r"""Outlier-weighed layerwise sampling: as `LISA`, but layers with more outliers are awake more often.

    With the score :math:`D_l` of `outlier_scores`, `active` :math:`= \gamma` different layers are drawn with

    .. math::
        \Pr(l \in S_j) = \min(1, c\,D_l), \qquad c \text{ such that } \sum_l \Pr(l \in S_j) = \gamma .

    Equal scores, also all zero, make LISA. Scores below a hundredth of the largest are raised to it, so that every
    layer trains.

    The method trains its layers by GaLore:
    ``OwLore(model, GaLoreAdamW(param_groups(model), lr=...))``; with AdamW it is the authors' full-rank variant (OWS).
    State: as `LISA`'s, with what the optimizer keeps of a projected matrix.

    Where this differs from the authors' code: the probabilities are the true ones, which successive draws without
    replacement do not have (0.553 for a layer that should have 0.675); scores come from the model at hand instead of a
    file for LLaMA-2-7B; under `drop` a layer that wakes has a fresh basis and moments of age 1, not those of its last
    interval.

    Args:
        model: as in `LISA`.
        optimizer: as in `LISA`.
        layers: as in `LISA`.
        scores: :math:`D_l`, one for each layer, frozen ones too; None computes `outlier_scores` of the weights alone.
        active: layers awake at a time. Default 5, the authors'.
        interval: optimizer steps between two draws. Default 50, the authors'.
        state_policy: as in `LISA`.
        embeddings: as in `LISA`.
        seed: of the draws.

    Raises:
        ValueError: as `LISA`, and for scores that are negative, not finite, or not one for each layer.

    Example:
        >>> model = nn.Sequential(*(nn.Linear(8, 8) for _ in range(4)))
        >>> optimizer = torch.optim.AdamW(model.parameters())
        >>> OwLore(model, optimizer, scores=[0.5, 0.25, 0.125, 0.125], active=2).probabilities
        {'0': 1.0, '1': 0.5, '2': 0.25, '3': 0.25}
    """

    def __init__(
        self,
        model: nn.Module,
        optimizer: torch.optim.Optimizer,
        layers: Layers = None,
        *,
        scores: Sequence[float] | None = None,
        active: int = 5,
        interval: int = 50,
        state_policy: str = "drop",
        embeddings: str = "train",
        seed: int = 0,
    ) -> None:
        if scores is None:
            scores = outlier_scores(model, layers)
        super().__init__(model, optimizer, layers, scores, active, interval, state_policy, embeddings, seed)


# ---------------------------------------------------------------------------------------------------- layers


def find_layers(model: nn.Module, layers: Layers = None) -> dict[str, nn.Module]:
    """Name -> module of the layers that are meant.

    Raises:
        ValueError: if a path or module is not in the model, if layers repeat or contain each other, or if None is given
            and the model has no list of like blocks, or several.
    """
    if layers is None:
        layers = _only_list(model)
    modules = dict(model.named_modules(remove_duplicate=False))
    names = {id(module): name for name, module in reversed(modules.items())}
    if isinstance(layers, str):
        container = _at(modules, layers)
        if not isinstance(container, nn.ModuleList | nn.Sequential):
            raise ValueError(f"layers={layers!r} is a {type(container).__name__}, not a ModuleList or Sequential")
        layers = container
    if isinstance(layers, nn.ModuleList | nn.Sequential):
        if id(layers) not in names:
            raise ValueError("layers is not a module of the model")
        prefix = names[id(layers)]
        found = {name: module for name, module in modules.items() if name and name.rpartition(".")[0] == prefix}
    else:
        if not isinstance(layers, Sequence):
            raise ValueError(f"layers must be a path, a ModuleList, or a list of modules or paths, got {layers!r}")
        found = {}
        for layer in layers:
            module = _at(modules, layer) if isinstance(layer, str) else layer
            if not isinstance(module, nn.Module) or id(module) not in names:
                raise ValueError(f"layers holds {layer!r}, which is not a module of the model")
            if any(module is other for other in found.values()):
                raise ValueError(f"layers holds {names[id(module)]} twice")
            found[names[id(module)]] = module
    if not found:
        raise ValueError("layers is empty")
    for name, module in found.items():
        inside = {id(part) for part in module.modules()} - {id(module)}
        for other, part in found.items():
            if id(part) in inside:
                raise ValueError(f"layers overlap: {other} is a part of {name}")
    return found


def _at(modules: Mapping[str, nn.Module], path: str) -> nn.Module:
    parent = ""
    for part in path.split("."):
        name = f"{parent}.{part}".removeprefix(".")
        if name not in modules:
            raise ValueError(f"the model has no module {path!r}: {parent or 'its root'} has no {part}")
        parent = name
    return modules[path]


def _only_list(model: nn.Module) -> nn.ModuleList | nn.Sequential:
    """The outermost ModuleList or Sequential of two or more blocks of one type, if there is just one."""
    found: dict[str, nn.ModuleList | nn.Sequential] = {}
    for name, module in model.named_modules():
        if not isinstance(module, nn.ModuleList | nn.Sequential) or len(module) < 2:
            continue
        like = len({type(block) for block in module}) == 1 and any(True for _ in module.parameters())
        if like and not any(f"{name}.".startswith(f"{outer}." if outer else "") for outer in found):
            found[name] = module
    if not found:
        raise ValueError("the model has no ModuleList or Sequential of like blocks: name its layers with layers=")
    if len(found) > 1:
        raise ValueError(f"the model has {len(found)} lists of like blocks ({', '.join(found)}): choose with layers=")
    return next(iter(found.values()))


# ---------------------------------------------------------------------------------------------------- scores


def outlier_scores(
    model: nn.Module, layers: Layers = None, batches: Iterable[Any] | None = None, tau: float = 13.0
) -> list[float]:
    r"""The share of outliers in each layer's linear weights, with which `OwLore` draws.

    With W (m x n) the weight of a linear module and X the inputs it sees in `batches`, one row a token,

    .. math::
        A_{ij} = \|X_{\cdot j}\|_2 \, |W_{ij}|, \qquad
        D_l = \operatorname*{mean}_{W \in l} \frac{|\{A_{ij} > \tau \cdot \operatorname{mean}(A)\}|}{m n} .

    Neither the scale of X nor that of W matters. The model runs in evaluation mode and without gradients, and is left
    as it was. Weights are those of `nn.Linear` and of transformers' `Conv1D`; with `batches`, of those that are called.

    Of weights that are divided over processes (fully_shard, tensor parallel) each counts its part; all call it together
    with the same batches, or each with its own, and get the same scores, those of the whole. With plain weights on
    several processes give all the same batches, or broadcast the scores.

    Args:
        model: any module.
        layers: as in `LISA`.
        batches: calibration data, each passed to the model as `model(batch)`, `model(*batch)` for tuples and lists, or
            `model(**batch)` for mappings; None takes every norm of X as 1.
        tau: :math:`\tau`, how many times the mean an outlier exceeds. Default 13, the authors'.

    Returns:
        One number in [0, 1] for each layer.

    Raises:
        ValueError: for a `tau` that is not above 0, layers that are not found, a layer without a linear weight (or
            without one that `batches` reach), no batches, or activations or weights that are not finite.

    Example:
        >>> model = nn.Sequential(nn.Linear(10, 10, bias=False), nn.Linear(10, 10, bias=False))
        >>> for layer in model:
        ...     _ = nn.init.ones_(layer.weight)
        >>> model[1].weight.data[0, :3] = 100.0
        >>> outlier_scores(model)
        [0.0, 0.03]
    """
    if not is_number(tau) or not 0 < tau < math.inf:
        raise ValueError(f"tau must be a finite number > 0, got {tau!r}")
    found = find_layers(model, layers)
    linear = {name: [m for m in layer.modules() if _is_linear(m)] for name, layer in found.items()}
    _reshard(model)
    norms = None
    if batches is not None:
        norms = _input_norms(model, {m for modules in linear.values() for m in modules}, batches)
    names = {module: name for name, module in model.named_modules()}
    scores: dict[nn.Module, float] = {}
    for name, modules in linear.items():
        linear[name] = modules = [m for m in modules if norms is None or m in norms]
        if not modules:
            reached = " that the batches reach" if batches is not None else ""
            raise ValueError(f"layer {name} has no linear weight{reached}: give its score to OwLore by scores=")
        for module in modules:
            if module not in scores:
                scores[module] = _outlier_share(module, norms[module] if norms else None, float(tau), names[module])
    return [math.fsum(scores[m] for m in modules) / len(modules) for modules in linear.values()]


def _reshard(model: nn.Module) -> None:
    """Undoes what fully_shard leaves after a forward pass: the root's weights, gathered."""
    for module in model.modules():
        if hasattr(module, "reshard"):
            module.reshard()  # type: ignore[operator]


def _is_linear(module: nn.Module) -> bool:
    return isinstance(module, nn.Linear) or (type(module).__name__ == "Conv1D" and _by_rows(module) is not None)


def _by_rows(module: nn.Module) -> Tensor | None:
    """The weight with one row an output; transformers' Conv1D has one a input."""
    weight = module.weight
    if not isinstance(weight, Tensor) or weight.ndim != 2:
        return None
    return weight.detach() if isinstance(module, nn.Linear) else weight.detach().mT


@torch.no_grad()
def _outlier_share(module: nn.Module, norm: Tensor | None, tau: float, name: str) -> float:
    weight = _by_rows(module)
    assert weight is not None
    if not weight.numel():
        return 0.0

    here, part = local(weight), part_of(weight)
    groups = () if part is None else part.groups("01")
    if part is not None and norm is not None:
        norm = part.cut(norm, "1")

    def magnitudes(s: slice) -> Tensor:
        a = here[s].float().abs()
        return a if norm is None else a.mul_(norm)

    parts = list(blocks(here, 0)) if here.numel() else []
    total = torch.zeros((), dtype=torch.float64, device=here.device)
    for s in parts:
        total += magnitudes(s).sum(dtype=torch.float64)
    total_([(total, groups)])
    if not total.isfinite():
        raise ValueError(f"the weight of {name} times its inputs is not finite")
    bound = tau * (total / weight.numel()).float()
    count = torch.zeros((), dtype=torch.int64, device=here.device)
    for s in parts:
        count += (magnitudes(s) > bound).sum()
    total_([(count, groups)])
    return int(count) / weight.numel()


@torch.no_grad()
def _input_norms(model: nn.Module, modules: set[nn.Module], batches: Iterable[Any]) -> dict[nn.Module, Tensor]:
    """||X_j|| of every module that is called, over all batches."""
    norms: dict[nn.Module, Tensor] = {}

    def add(module: nn.Module, inputs: tuple[Tensor, ...]) -> None:
        x = inputs[0]
        x = x.full_tensor() if hasattr(x, "full_tensor") else x
        dtype = torch.promote_types(x.dtype, torch.float32)
        norm = torch.linalg.vector_norm(x.reshape(-1, x.shape[-1]), dim=0, dtype=dtype).float()
        norms[module] = torch.hypot(norms[module], norm) if module in norms else norm

    weights = {m: w for m in model.modules() if m in modules and (w := _by_rows(m)) is not None}
    # Whose inputs the processes see parts of, in an order that they agree on.
    meshes = {m: w.device_mesh for m, w in weights.items() if hasattr(w, "device_mesh")}
    training = {module: module.training for module in model.modules()}
    handles = [module.register_forward_pre_hook(add) for module in modules]
    count = 0
    model.eval()
    try:
        for batch in batches:
            _call(model, batch)
            count += 1
    finally:
        for handle in handles:
            handle.remove()
        for module, mode in training.items():
            module.training = mode
    _reshard(model)
    if not count:
        raise ValueError("batches is empty: pass calibration data, or None to score the weights alone")
    for module, mesh in meshes.items():
        columns = weights[module].shape[1]
        seen = torch.zeros(columns + 1, dtype=torch.float64, device=local(weights[module]).device)
        if module in norms:
            seen[:-1], seen[-1] = norms[module].double().square(), 1
        total_([(seen, tuple(mesh.get_all_groups()))])
        if seen[-1]:
            norms[module] = seen[:-1].sqrt().float()
    for name, module in model.named_modules():
        if module in norms and not norms[module].isfinite().all():
            raise ValueError(f"the calibration data makes the inputs of {name} not finite (NaN or infinite)")
    return norms


def _call(model: Callable[..., Any], batch: Any) -> None:
    if isinstance(batch, Mapping):
        model(**batch)
    elif isinstance(batch, tuple | list):
        model(*batch)
    else:
        model(batch)


def _checked_scores(scores: Sequence[float] | None, count: int) -> list[float]:
    """Numbers, one for each layer.

    Raises:
        ValueError: names the argument and what is wrong.
    """
    if scores is None:
        return [1.0] * count
    values = scores.tolist() if isinstance(scores, Tensor) else list(scores)
    if len(values) != count:
        raise ValueError(f"scores must hold one number for each of the {count} layers, got {len(values)}")
    for i, score in enumerate(values):
        if not is_number(score) or not 0 <= score < math.inf:
            raise ValueError(f"scores must be finite numbers >= 0, got {score!r} for layer number {i}")
    return [float(score) for score in values]


def inclusion_probabilities(scores: Sequence[float], active: int) -> list[Fraction]:
    r"""min(1, c D) that sum to `active`, exactly; D are the scores, none below a hundredth of the largest.

    What a layer cannot take, since nothing is more than certain, goes to the others: c grows until no c D exceeds 1
    among those not yet capped.
    """
    largest = max(scores)
    weights = [Fraction(max(score, FLOOR * largest)) if largest > 0 else Fraction(1) for score in scores]
    shares: list[Fraction] = [Fraction(1)] * len(weights)
    left, rest = active, set(range(len(weights)))
    while rest:
        total = sum(weights[i] for i in rest)
        capped = {i for i in rest if left * weights[i] >= total}
        if not capped:
            return [left * weights[i] / total if i in rest else shares[i] for i in range(len(weights))]
        left, rest = left - len(capped), rest - capped
    return shares
