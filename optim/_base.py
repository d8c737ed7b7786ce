"""What every optimizer here shares with torch.optim, and what torch.optim lacks: strict groups, states that keep their
dtypes, and checkpoints that are loaded whole or refused whole."""

import inspect
import math
import zlib
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass, field
from itertools import chain
from typing import Any, ClassVar, NoReturn, overload

import torch
from torch import Tensor
from torch.nn.utils import get_total_norm
from torch.optim.optimizer import ParamsT

from slimstate.ops import Key, PartKey, Place, counter_key
from slimstate.ops.codes import Layout
from slimstate.projections._base import compute_dtype
from slimstate.projections._numbers import Number

from ._loading import check_layout, check_plain, misfit, other_entries, read_step, read_stream, read_tensor, regrouped
from ._moments import CODED, SCALES, as_found, decoded, encoded
from ._sharding import Part, local, part_of, total_

__all__ = ["Entry", "Group", "Optimizer", "Spec", "State", "refuse"]

Group = dict[str, Any]
State = dict[str, Any]
Spec = dict[str, tuple[tuple[int, ...], torch.dtype]]

COUNTERS = frozenset({"step", "refreshes", "age"})

# What a group may carry beside its optimizer's hyperparameters: torch's own keys, a name for the reader, and the factor
# that timm's schedulers set the group's lr by.
BOOKKEEPING = frozenset({"params", "param_names", "name", "initial_lr", "lr_scale", "nonfinite_steps"})

NONFINITE = ("propagate", "skip", "raise")

# What schedulers change at every step: numbers that compiled code takes as tensors.
SCHEDULED = ("lr", "betas", "momentum")

# What says nothing about the form of a state.
NOT_FORMING = BOOKKEEPING | {*SCHEDULED, "weight_decay", "eps", "scale"}

PURPOSES = 6  # of random bits; `_adam`, `_projected` and the methods number them

# torch.optim.AdamW's remaining keywords: the values that mean the same here, and what to do about the others.
TORCH_KEYWORDS: dict[str, tuple[tuple[bool | None, ...], str]] = {
    "amsgrad": (
        (False,),
        "no running maximum is kept (in a changing subspace it means nothing); leave it False",
    ),
    "foreach": ((None, False), "torch's fused kernel is used wherever there is one; leave it None"),
    "fused": ((None, True), "torch's fused kernel is used wherever there is one; leave it None"),
    "capturable": ((False,), "the step counter stays on the CPU; leave it False"),
    "differentiable": ((False,), "steps are not recorded by autograd; leave it False"),
}

# What torch.optim's groups say beside: of these `amsgrad` and the last, which tells AdamW from Adam, matter to a state.
DECOUPLED = "decoupled_weight_decay"
TORCHS = TORCH_KEYWORDS.keys() | {DECOUPLED}


def refuse(name: str, keywords: dict[str, Any]) -> None:
    """Takes the keywords of torch.optim.AdamW that change nothing here, and raises for every other one.

    Raises:
        TypeError: for a keyword that torch.optim.AdamW does not have either.
        ValueError: for a value that is not supported; says what to use.
    """
    for key, value in keywords.items():
        if key not in TORCH_KEYWORDS:
            raise TypeError(f"{name} got an unexpected keyword argument {key!r}")
        allowed, advice = TORCH_KEYWORDS[key]
        if value not in allowed:
            raise ValueError(f"{key}={value!r} is not supported by {name}: {advice}")


@dataclass(frozen=True, slots=True, eq=False)
class Entry:
    """A parameter in a step.

    Args:
        param: the parameter as its group holds it.
        part: where it lies in the whole parameter; None where it is whole.
        p: what this process holds of it.
        gradient: the gradient of p; None where it was projected during the backward pass.
        state: what this process holds of its state.
        step: which step of its own this is, from 1 on. A tensor in compiled code, as every number that changes.
        draw: what its random bits in this step depend on: (seed, stream, step), or all keys (PURPOSES,) as a tensor.
        sums: where it is divided and its step needs them, what `_exchange` found out about all of its parts.
    """

    layout: ClassVar[Layout] = "rows"
    """How blocks of 8-bit moments lie; see `slimstate.ops.codes`."""

    param: Tensor
    part: Part | None
    p: Tensor
    gradient: Tensor | None
    state: State
    step: Number
    draw: tuple[int, int, int] | Tensor
    sums: Any = field(default=None, kw_only=True)

    @property
    def grad(self) -> Tensor:
        """Its gradient."""
        assert self.gradient is not None
        return self.gradient

    @property
    def age(self) -> Number:
        """How many gradients the moments have seen, this one included: what bias correction goes by."""
        if "age" not in self.state:
            return self.step
        age: Tensor = self.state["age"]
        return age.double() if isinstance(self.step, Tensor) else age.item()

    def key(self, purpose: int) -> Key:
        """The key of one purpose's random bits: a function of the seed, the parameter and the step."""
        word = self.draw[purpose] if isinstance(self.draw, Tensor) else counter_key(*self.draw, purpose)
        return word if self.part is None else PartKey(word, self.place(purpose))

    def place(self, purpose: int) -> Place:
        """Where the part of what is rounded for this purpose lies in the whole, for a parameter that is divided."""
        assert self.part is not None
        return self.part.place("".join(map(str, range(self.param.ndim))), self.p.shape)


class Optimizer(torch.optim.Optimizer):
    """A torch optimizer whose mathematics is in `_step_group`, and whose state is declared by `_spec`.

    The state of a parameter is flat: `step` (0-d float32, on the CPU), `stream` (an int that numbers its random draws)
    and the tensors of `_spec`. The first step creates all of it; `forget` leaves `stream` alone.
    """

    def __init__(self, params: ParamsT, defaults: Group) -> None:
        self._check(defaults)
        self._forms: dict[Tensor, tuple[Any, ...]] = {}  # the dtype, device and settings that states were made for
        self._shaped: set[int] = set()  # the groups, by position, that had a parameter whose shape matters
        super().__init__(params, defaults)

    def _check(self, group: Group) -> None:
        """Checks a filled group, and may bring its values to the form that groups keep.

        Raises:
            ValueError: names the argument, its value and what is allowed.
        """
        raise NotImplementedError

    def _spec(self, p: Tensor, group: Group) -> Spec:
        """The state's tensors: name -> (shape, dtype)."""
        raise NotImplementedError

    def _layout(self, p: Tensor, group: Group) -> Layout:
        """How blocks of a parameter's 8-bit moments lie; see `slimstate.ops.codes`."""
        return "rows"

    def _passing(self, p: Tensor, group: Group) -> frozenset[str]:
        """The keys of `_spec` that come and go; a state may be without them."""
        return frozenset()

    def _axes(self, key: str, p: Tensor, group: Group) -> str:
        """The axes of a state's tensor, for a parameter that is divided; see `Part`."""
        return "0." if key in SCALES else "".join(map(str, range(p.ndim)))

    def _reformed(self, state: State, spec: Spec, dtype: torch.dtype) -> State:
        """A state in the form that the spec asks for, where it was kept in another one; nothing about it is checked.

        Args:
            state: of this optimizer, or of a checkpoint.
            spec: the tensors that are kept here.
            dtype: of arithmetic.
        """
        return state

    def _has_shape(self, p: Tensor, group: Group) -> bool:
        """Whether a step treats this parameter by its shape, and would treat it otherwise if it were flattened."""
        return self._has_codes(p, group)

    def _has_codes(self, p: Tensor, group: Group) -> bool:
        """Whether its moments are kept in 8 bits."""
        return group.get("moment_dtype") in CODED and not SCALES.keys().isdisjoint(self._spec(p, group))

    def _part(self, p: Tensor, group: Group) -> Part | None:
        """Where what this process holds of a parameter lies in it; None where it is whole.

        Raises:
            ValueError: for a way to divide it that this optimizer cannot step with; says what to use.
        """
        return part_of(p)

    def _check_part(self, p: Tensor, group: Group) -> None:
        """Checks how a parameter is divided.

        Raises:
            ValueError: for a way to divide it that this optimizer cannot step with; says what to use.
        """
        part = self._part(p, group)
        if part is None or self._layout(p, group) != "rows" or not part.divides("".join(map(str, range(1, p.ndim)))):
            return
        if self._has_codes(p, group):
            raise ValueError(
                f"moment_dtype={group['moment_dtype']!r} keeps moments in blocks along rows, which processes divide of "
                f"a parameter of shape {tuple(p.shape)}, {', '.join(map(str, part.placements))}: use "
                "moment_dtype='bfloat16' for it, or shard dim 0 (shard_placement_fn of fully_shard)"
            )

    def _select_states(self, group: Group, params: list[Tensor]) -> None:
        """Creates and drops what comes and goes in the states of parameters that are about to take a step."""

    def _arranged(self, group: Group, entries: list[Entry]) -> Any:
        """What `_step_group` is given; here everything happens that depends on values: refreshes, states that come and
        go, who is due. Never compiled."""
        return entries

    def _step_group(self, group: Group, entries: Any) -> None:
        """Updates parameters, from what `_arranged` returned for those of the group that have a gradient; their `step`
        already counts this step. Compiled by torch.compile: a function of tensors."""
        raise NotImplementedError

    def _exchange(self, prepared: list[tuple[Group, Any]]) -> None:
        """Sums over processes what a step needs of parameters that are divided, for all of them at once."""

    def _check_group(self, group: Group) -> None:
        if group["nonfinite"] not in NONFINITE:
            raise ValueError(f"nonfinite must be one of {', '.join(NONFINITE)}, got {group['nonfinite']!r}")
        self._check(group)

    def add_param_group(self, param_group: Group) -> None:
        """As torch's, but an unknown key, a value out of range or a parameter that is not dense and real floating
        point, or has been flattened, raises before anything is changed, and the caller's dict is left as it is."""
        if not isinstance(param_group, dict):
            raise TypeError(f"param_group must be a dict, got {type(param_group).__name__}")
        unknown = sorted(param_group.keys() - self.defaults.keys() - BOOKKEEPING)
        if unknown:
            known = ", ".join(sorted(self.defaults.keys() | BOOKKEEPING))
            raise ValueError(f"unknown key {unknown[0]!r} in a group of {type(self).__name__}; known are {known}")
        group = self.defaults | param_group
        if not isinstance(group["params"], Tensor | set):
            group["params"] = list(group["params"])
            for p in group["params"]:
                p = p[1] if isinstance(p, tuple) else p
                if isinstance(p, Tensor) and not (p.is_floating_point() and p.layout == torch.strided):
                    found = p.dtype if p.layout == torch.strided else p.layout
                    raise ValueError(f"{type(self).__name__} takes dense real floating-point parameters, got {found}")
                refuse_flat(p)
        self._check_group(group)
        if isinstance(group["params"], list):
            for p in group["params"]:
                p = p[1] if isinstance(p, tuple) else p
                if isinstance(p, Tensor):
                    self._check_part(p, group)
        super().add_param_group(group | {"nonfinite_steps": 0})
        self._note_shapes(len(self.param_groups) - 1)

    @overload
    def step(self, closure: None = None) -> None: ...

    @overload
    def step(self, closure: Callable[[], float]) -> float: ...

    @torch.no_grad()
    def step(self, closure: Callable[[], float] | None = None) -> float | None:
        """Performs one step.

        Args:
            closure: reevaluates the model and returns the loss; called with gradients enabled.

        Returns:
            What the closure returned, else None.

        Raises:
            RuntimeError: for a sparse or complex gradient, a parameter on the meta device, or parameters that were
                replaced by a flat one, before anything is changed.
            NotImplementedError: for a parameter that FSDP1 or DeepSpeed has flattened since.
            FloatingPointError: for a gradient that is not finite, in a group with nonfinite="raise"; nothing but the
                group's count of them is changed.
        """
        loss = None
        if closure is not None:
            with torch.enable_grad():
                loss = closure()
        self._step_groups(self._prepared(compiling=torch.compiler.is_compiling()))
        return loss

    def _step_groups(self, arranged: list[tuple[Group, Any]]) -> None:
        for group, entries in arranged:
            self._step_group(group, entries)

    @torch.compiler.disable
    def _prepared(self, *, compiling: bool) -> list[tuple[Group, Any]]:
        """Each group's hyperparameters in this step, and what `_arranged` made of its entries."""
        self._check_gradients()
        self._check_shapes()
        return [] if self._skips() else self._started(compiling=compiling)

    def _started(self, *, compiling: bool) -> list[tuple[Group, Any]]:
        """As `_prepared`, of gradients that are known to be usable."""
        self._create_states()
        prepared = []
        for group in self.param_groups:
            entries = [self._entry(p, group, compiling) for p in self._advanced(group)]
            settings = group | {key: _number(group[key], compiling) for key in SCHEDULED if key in group}
            prepared.append((settings, self._arranged(group, entries)))
        self._exchange(prepared)
        return prepared

    def _advanced(self, group: Group) -> list[Tensor]:
        """The parameters of a group that take this step, which is counted, and for which their states are complete."""
        params = [p for p in group["params"] if self._gradients(p)]
        if params:
            torch._foreach_add_([self.state[p]["step"] for p in params], 1)
        self._select_states(group, params)
        return params

    def _entry(self, p: Tensor, group: Group, compiling: bool) -> Entry:
        state, part = self.state[p], self._part(p, group)
        if part is not None:
            state = {key: local(x) if isinstance(x, Tensor) else x for key, x in state.items()}
        step = state["step"].item()
        draw = (group["seed"], state["stream"], int(step))
        own = (p, part, local(p), _gradient(p), state)
        if not compiling:
            return Entry(*own, step, draw)
        keys = [counter_key(*draw, purpose) for purpose in range(PURPOSES)]
        return Entry(*own, state["step"].double(), torch.tensor(keys))

    def _gradients(self, p: Tensor) -> tuple[Tensor, ...]:
        """What there is of its gradient: nothing, all of it, or what was made of it during the backward pass."""
        return () if p.grad is None else (p.grad,)

    def _check_gradients(self) -> None:
        for group in self.param_groups:
            for p in group["params"]:
                grad = p.grad
                if grad is not None and (grad.layout != torch.strided or grad.is_complex() or p.is_meta):
                    self._refuse_gradient(p, grad)

    def _refuse_gradient(self, p: Tensor, grad: Tensor) -> NoReturn:
        name = next(name for name, q, _ in self._named() if q is p)
        if grad.is_complex() or grad.layout != torch.strided:
            kind = "complex" if grad.is_complex() else "sparse"
            raise RuntimeError(f"{type(self).__name__} takes dense real gradients, got a {kind} one for {name}")
        raise RuntimeError(
            f"parameter {name} is on the meta device and has no data: materialise the model (`to_empty`, then its "
            "weights), and put its new parameters into the optimizer's groups"
        )

    def _note_shapes(self, i: int) -> None:
        group = self.param_groups[i]
        self._shaped.discard(i)
        if any(self._has_shape(p, group) for p in group["params"]):
            self._shaped.add(i)

    def _check_shapes(self) -> None:
        """Refuses what a wrapper has made of parameters since they were added, before it gets a state."""
        for i, group in enumerate(self.param_groups):
            new = [p for p in group["params"] if p not in self._forms and self._gradients(p)]
            for p in new:
                refuse_flat(p)
            if new and i in self._shaped and not any(self._has_shape(p, group) for p in group["params"]):
                raise RuntimeError(
                    f"group {i} had parameters of two or more dimensions and has shapes "
                    f"{[tuple(p.shape) for p in group['params'][:4]]} now: a wrapper (ZeRO) has replaced them by flat "
                    "partitions, which have lost their shapes. Use torch.distributed.fsdp.fully_shard (FSDP2), or "
                    "torch.distributed.optim.ZeroRedundancyOptimizer, which keep them"
                )

    def _skips(self) -> bool:
        """Whether a gradient that is not finite stops this step, by the policies of the groups; counts those."""
        watched = [group for group in self.param_groups if group["nonfinite"] != "propagate"]
        stopped = [group for group, bad in zip(watched, self._are_bad(watched), strict=True) if bad]
        for group in stopped:
            group["nonfinite_steps"] = group.get("nonfinite_steps", 0) + 1
        for group in stopped:
            if group["nonfinite"] == "raise":
                everything = [(name, {"params": [p]}) for name, p, g in self._named() if g is group]
                bad = self._are_bad([group for _, group in everything])
                names = [name for (name, _), one in zip(everything, bad, strict=True) if one]
                raise FloatingPointError(
                    f"the gradients of {len(names)} parameters are not finite, such as that of {names[0]}; nothing was "
                    "changed (nonfinite='skip' goes on without such steps, 'propagate' takes them as torch does)"
                )
        return bool(stopped)

    def _are_bad(self, groups: list[Group]) -> list[bool]:
        """Which groups have a gradient that is not finite, in any process that holds a part of one."""
        flags, everywhere = [], []
        for group in groups:
            held = [(p, g) for p in group["params"] for g in self._gradients(p)]
            grads = [x for _, g in held if (x := local(g)).numel()]
            flag = (~get_total_norm(grads, math.inf).isfinite()).float().view(1)
            meshes = dict.fromkeys(p.device_mesh for p, _ in held if hasattr(p, "placements"))
            if meshes:
                flag = flag.to(next(iter(meshes)).device_type)
            flags.append(flag)
            everywhere += [(flag, tuple(mesh.get_all_groups())) for mesh in meshes]
        total_(everywhere, largest=True)
        return [bool(flag) for flag in flags]

    def _create_states(self, only: Tensor | None = None) -> None:
        """Gives each parameter that has a gradient, or only one, the state that `_spec` says: creates it at first, and
        brings it along where the parameter's dtype or device, or a setting, has changed since."""
        new = False
        for group in self.param_groups:
            settings = _forming(group)
            for p in group["params"] if only is None else [p for p in group["params"] if p is only]:
                if not self._gradients(p):
                    continue
                state, form = self.state[p], (p.dtype, p.device, settings)
                known = self._forms.get(p, (None,))  # of a copy nothing is known
                new |= "step" not in state
                if known != form:
                    if "step" in state:
                        self._conform(p, group, known[0])
                    self._forms[p] = form
        if not new:
            return
        for position, (name, p, group) in enumerate(self._named()):
            if not (only is None or p is only) or not self._gradients(p) or "step" in self.state[p]:
                continue
            # By name where there is one, so that the draws do not depend on the order of the parameters.
            stream = zlib.crc32(name.encode()) if "param_names" in group else position
            stream = self.state[p].get("stream", stream)
            counters = {"step": torch.zeros((), dtype=torch.float32), "stream": stream}
            self.state[p].update(counters | self._zeros(p, group))

    def _present_forms(self) -> dict[Tensor, tuple[Any, ...]]:
        return {p: (p.dtype, p.device, _forming(group)) for _, p, group in self._named() if p in self.state}

    def _zeros(self, p: Tensor, group: Group, keys: Iterable[str] | None = None) -> State:
        """New tensors of a state: those of these keys, or all that do not come and go."""
        self._check_part(p, group)
        spec, part = self._spec(p, group), self._part(p, group)
        state = {}
        for key in spec.keys() - self._passing(p, group) if keys is None else keys:
            (shape, dtype), home = spec[key], _home(key, p)
            if part is None or key in COUNTERS:
                state[key] = torch.zeros(shape, dtype=dtype, device=home)
            else:
                state[key] = part.zeros(shape, dtype, home, self._axes(key, p, group))
        return {key: state[key] for key in spec if key in state}

    def _conform(self, p: Tensor, group: Group, before: torch.dtype | None) -> None:
        state, spec = self.state[p], self._spec(p, group)
        for key, value in state.items():
            if key in spec and tuple(value.shape) != (shape := spec[key][0]):
                raise ValueError(
                    f"{key!r} in the state of a parameter has shape {tuple(value.shape)}, and would need {shape} with "
                    "the settings that its group has now: forget([parameter]) first"
                )
        state = self._recoded(p, group, self._reformed(state, spec, compute_dtype(p.dtype)))
        kept = {key: x.to(_home(key, p), spec[key][1]) for key, x in state.items() if key in spec}
        if before not in (None, p.dtype):
            kept.pop("compensation", None)  # of other bits
        fresh = self._zeros(p, group)
        if (fresh.keys() - kept.keys()) & {"basis", "index"}:
            kept.pop("refreshes", None)
        if "age" in fresh:
            fresh["age"].fill_(state["step"])
        self.state[p] = {"step": state["step"], "stream": state["stream"]} | fresh | kept

    def _recoded(self, p: Tensor, group: Group, state: State) -> State:
        """A state with its moments in the form, numbers or codes, that they have here: rounded, or read."""
        spec, part, layout = self._spec(p, group), self._part(p, group), self._layout(p, group)
        for scale, key in SCALES.items():
            if key not in state or key not in spec:
                continue
            x, dtype = local(state[key]), spec[key][1]
            if (scale in state) == (scale in spec) and (scale not in spec or x.dtype == dtype):
                continue
            if scale in state:
                x = decoded(x, local(state[scale]), key, layout, torch.float32 if scale in spec else dtype)
            made = encoded(x, key, layout, dtype) if scale in spec else {key: x}
            if part is not None:
                made = {name: part.join(y, self._axes(name, p, group), spec[name][0]) for name, y in made.items()}
            state = {name: y for name, y in state.items() if name != scale} | made
        return state

    def _named(self) -> Iterator[tuple[str, Tensor, Group]]:
        """(name or position, parameter, group) of every parameter."""
        position = 0
        for group in self.param_groups:
            for i, p in enumerate(group["params"]):
                yield group["param_names"][i] if "param_names" in group else f"number {position}", p, group
                position += 1

    def forget(self, params: Iterable[Tensor]) -> None:
        """Drops the state of parameters: their next step is as their first, but what is random in it is drawn anew.

        Of their state only `stream` remains, another one than before.
        """
        for p in params:
            if "step" in (state := self.state.get(p, {})):
                self.state[p] = {"stream": counter_key(state["stream"])}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """As torch's, but parameters are matched by name, tensors keep their dtypes and are copied, and what does not
        fit is refused whole.

        torch goes by position alone, looks at no shape, and casts every tensor except `step` to its parameter's dtype,
        which ruins the float32 moments of bfloat16 weights.

        Where the checkpoint and this optimizer both have the names of their parameters (`param_names`, compared as they
        are without DistributedDataParallel and torch.compile), every parameter gets its own state and hyperparameters,
        whatever the order and the division into groups; else parameters are taken in order. Hyperparameters are the
        checkpoint's, as in torch; those that it lacks, for it is older or torch.optim.AdamW's, stay as they are here.
        Keys of groups that are nobody's hyperparameters are kept, as schedulers need.

        Raises:
            ValueError: if anything does not belong, before anything is changed: a parameter that is missing or left
                over, groups that differ and would become one, a hyperparameter that is out of range or of another
                optimizer, a tensor of another shape, indices or codes of another dtype or out of range, an entry that
                is missing or unknown. Names it and says what is wrong.
            TypeError: if `state_dict` is not a dict.
        """
        if not isinstance(state_dict, dict):
            raise TypeError(f"state_dict must be a dict, got {type(state_dict).__name__}")
        kept: dict[Tensor, State] = {}

        def read(_: torch.optim.Optimizer, given: dict[str, Any]) -> dict[str, Any]:
            states, accepted = self._accepted(given)
            kept.update(states)
            return accepted

        def restore(_: torch.optim.Optimizer) -> None:
            self.state.update(kept)
            self._forms = self._present_forms()

        # After the users' own pre-hooks, to see what they made of the dict, and before their post-hooks.
        before = self.register_load_state_dict_pre_hook(read)
        after = self.register_load_state_dict_post_hook(restore, prepend=True)
        try:
            super().load_state_dict(state_dict)
        finally:
            before.remove()
            after.remove()

    def _accepted(self, state_dict: dict[str, Any]) -> tuple[dict[Tensor, State], dict[str, Any]]:
        """Copies of the parameters' states, and the rest of the state dict in this optimizer's order."""
        check_layout(state_dict)
        groups = regrouped(state_dict["param_groups"], self.param_groups)
        groups = [self._accepted_group(*pair) for pair in zip(self.param_groups, groups, strict=True)]
        states: dict[Tensor, State] = {}
        owners: dict[int | str, Tensor] = {}
        keys = chain.from_iterable(((key, group) for key in group["params"]) for group in groups)
        for position, ((name, p, _), (key, group)) in enumerate(zip(self._named(), keys, strict=True)):
            if owners.setdefault(key, p) is not p:
                raise misfit(f"its groups list parameter {key!r} twice")
            if state := self._accepted_state(name, p, group, state_dict["state"].get(key, {})):
                state.setdefault("stream", key if isinstance(key, int) else position)
                states[p] = state
        return states, {"state": other_entries(state_dict["state"], owners), "param_groups": groups}

    def _accepted_group(self, own: Group, saved: Group) -> Group:
        """The saved hyperparameters, checked, over this optimizer's own."""
        group = {key: value for key, value in own.items() if key in self.defaults.keys() | BOOKKEEPING} | saved
        torchs = {key: group.pop(key) for key in TORCHS - self.defaults.keys() if key in group}
        try:
            for key in group.keys() - self.defaults.keys() - BOOKKEEPING:
                if kind := _optimizer_with(key):
                    raise ValueError(f"{key} is a hyperparameter of {kind}, not of {type(self).__name__}")
            for key, value in (torchs | {key: group[key] for key in self.defaults}).items():
                check_plain(key, value)
            self._check_group(group)
            group["moment_dtype"] = own["moment_dtype"]  # says how numbers are kept, and not which
            if not torchs.pop(DECOUPLED, True) and group["weight_decay"]:
                raise ValueError("its weight decay is not decoupled, like torch.optim.Adam's; here it always is")
            refuse(type(self).__name__, {key: value for key, value in torchs.items() if key == "amsgrad"})
        except (ValueError, TypeError, OverflowError) as error:
            raise misfit(str(error)) from error
        return group

    def _accepted_state(self, name: str, p: Tensor, group: Group, state: State) -> State:
        """A checked copy of a parameter's saved state, in the dtypes and on the devices that it has here."""
        if not isinstance(state, dict):
            raise misfit(f"the state of parameter {name} must be a dict, found a {type(state).__name__}")
        # torch's unflattening makes empty dicts of what was not saved.
        state = {key: value for key, value in state.items() if not (isinstance(value, dict) and not value)}
        stream = {"stream": read_stream(state["stream"], name)} if "stream" in state else {}
        if state.keys() <= {"stream"}:  # forgotten
            return stream
        if "step" not in state:
            raise misfit(f"the state of parameter {name} has no 'step'")
        accepted: State = {"step": read_step(state["step"], name), **stream}
        try:
            self._check_part(p, group)
        except ValueError as error:
            raise misfit(str(error)) from error
        spec, passing = as_found(self._spec(p, group), state, self._layout(p, group)), self._passing(p, group)
        if "compensation" not in spec:  # the weight is kept whole now
            state.pop("compensation", None)
        elif "compensation" not in state:  # it was kept whole, or rounded, before
            state["compensation"] = torch.zeros(p.shape, dtype=torch.int16)
        state = self._reformed(state, spec, compute_dtype(p.dtype))
        if unknown := state.keys() - spec.keys() - {"step", "stream"}:
            raise misfit(
                f"the state of parameter {name} has an entry {min(map(str, unknown))!r}, which is unknown here"
            )
        absent = frozenset() if passing & state.keys() else passing
        part = self._part(p, group)
        for entry, (shape, dtype) in spec.items():
            if entry in absent:
                continue
            axes = None if part is None or entry in COUNTERS else self._axes(entry, p, group)
            accepted[entry] = read_tensor(entry, state.get(entry), shape, dtype, _home(entry, p), name, part, axes)
        accepted = self._recoded(p, group, accepted)
        self._check_state(name, p, group, accepted)
        return accepted

    def _check_state(self, name: str, p: Tensor, group: Group, state: State) -> None:
        """Checks what shapes and dtypes do not say about a state that is to be loaded.

        Raises:
            ValueError: names the parameter, and says what is wrong.
        """

    def __setstate__(self, state: dict[str, Any]) -> None:
        """Fills in what the state of an older checkpoint lacks."""
        super().__setstate__(state)
        self._forms = {}
        self._shaped = set()
        for i in range(len(self.param_groups)):
            self._note_shapes(i)
        self.defaults.pop("differentiable", None)  # torch puts it there, and no group has it
        for position, (_, p, _) in enumerate(self._named()):
            if entry := self.state.get(p):
                entry.setdefault("stream", position)
                if "step" in entry and not isinstance(entry["step"], Tensor):
                    entry["step"] = torch.tensor(float(entry["step"]), dtype=torch.float32)


def _optimizer_with(key: str) -> str | None:
    """The name of an optimizer of this package that has this hyperparameter."""
    kinds = [Optimizer]
    for kind in kinds:
        if key in inspect.signature(kind).parameters.keys() - {"params", "defaults"}:
            return kind.__name__
        kinds.extend(kind.__subclasses__())
    return None


def _home(key: str, p: Tensor) -> torch.device:
    """Counters are read by Python and stay on the CPU; everything else is where its parameter is."""
    return torch.device("cpu") if key in COUNTERS else p.device


def _forming(group: Group) -> tuple[Any, ...]:
    """The settings that the form of a state may depend on."""
    return tuple(value for key, value in group.items() if key not in NOT_FORMING and not isinstance(value, Tensor))


def _gradient(p: Tensor) -> Tensor | None:
    """What this process holds of a parameter's gradient, divided as the parameter is."""
    grad = p.grad
    if grad is not None and hasattr(p, "placements") and grad.placements != p.placements:  # type: ignore[attr-defined]
        grad = grad.redistribute(p.device_mesh, p.placements)  # type: ignore[attr-defined]
    return None if grad is None else local(grad)


def refuse_flat(p: Any) -> None:
    """Raises for a parameter that a wrapper has flattened: what it shows is not its shape.

    Raises:
        NotImplementedError: for a parameter of FSDP1 or DeepSpeed's ZeRO-3; says what to use.
    """
    if getattr(p, "_fsdp_flattened", False) or type(p).__name__ == "FlatParameter":
        raise NotImplementedError(
            "FullyShardedDataParallel (FSDP1) shows flattened pieces of parameters, which have lost their shapes: use "
            "torch.distributed.fsdp.fully_shard (FSDP2)"
        )
    if hasattr(p, "ds_id"):
        raise NotImplementedError(
            "DeepSpeed's ZeRO stage 3 shows empty parameters, which have lost their shapes: use "
            "torch.distributed.fsdp.fully_shard (FSDP2)"
        )


def _number(value: Any, compiling: bool) -> Any:
    """A number, a tensor of one element, a tuple of them, or None, as arithmetic takes it."""
    if isinstance(value, tuple | list):
        return tuple(_number(x, compiling) for x in value)
    if value is None:
        return None
    return torch.tensor(float(value), dtype=torch.float64) if compiling else float(value)
