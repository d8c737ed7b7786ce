"""Any optimizer with any settings, used in any order, does what is documented or refuses before anything is changed."""

import copy
import inspect
import io
import math
import pickle
import random
import re
import warnings
from collections import Counter

import pytest
import torch
from hypothesis import Phase, settings
from hypothesis import strategies as st
from hypothesis.stateful import (
    RuleBasedStateMachine,
    initialize,
    invariant,
    precondition,
    rule,
    run_state_machine_as_test,
)

from slimstate.optim import (
    FRUGAL,
    SGDP,
    AdamP,
    AdamW,
    DCTAdamW,
    GaLoreAdafactor,
    GaLoreAdamW,
    GradNormLoRP,
    state_bytes,
)
from slimstate.projections import DCT, SVD, Coordinates, Hadamard, PowerIteration, RandomOrthogonal

# Machines of each optimizer, 10,000 in all in `make test-all`, and operations of each after the construction.
CASES = {"default": 30, "all": 1250}[settings.get_current_profile_name()]
OPERATIONS = 12

some = st.sampled_from
RANK = st.one_of(st.integers(1, 9), st.floats(0.01, 1))
GAP = st.integers(1, 4)
SCALE = st.floats(0.01, 2)
LR = st.one_of(st.floats(0, 0.1), st.floats(0, 0.1).map(torch.tensor), st.just(0.01))
EPS = some([0.0, 1e-12, 1e-8, 1e-3])
SHARED = {
    "lr": LR,
    "weight_decay": st.floats(0, 1),
    "maximize": st.booleans(),
    "moment_dtype": some([None, "float32", "bfloat16", "param", "8bit", torch.bfloat16]),
    "stochastic_rounding": some([None, True, False]),
    "compensation": st.booleans(),
    "nonfinite": some(["propagate", "skip", "raise"]),
    "seed": st.integers(-5, 5),
}
PROJECTED = {"rank": RANK, "update_proj_gap": GAP, "scale": SCALE, "batch_dims": st.integers(0, 2)}
SIDED = {"side": some(["auto", "left", "right", "reverse"])}
DENSE = {
    "projection": some(
        ["svd", "power", "random", SVD(rank=2), PowerIteration(rank=0.5, side="left"), RandomOrthogonal(rank=3, seed=4)]
    ),
    "transport": some(["rotate", "keep", "reset"]),
    "basis_dtype": some([None, None, "bfloat16", "8bit", torch.bfloat16]),
}
BETAS = {"betas": st.tuples(st.floats(0, 0.99), st.floats(0, 0.999)), "eps": EPS}
TANGENT = {"delta": st.floats(0, 2), "wd_ratio": st.floats(0, 1), "layer_view": st.booleans()}

# class -> what each of its arguments may be
OPTIMIZERS = {
    AdamW: SHARED | BETAS,
    AdamP: SHARED | BETAS | TANGENT | {"nesterov": st.booleans()},
    SGDP: SHARED
    | TANGENT
    | {"eps": EPS, "momentum": st.floats(0, 0.99), "dampening": st.floats(0, 1), "nesterov": st.booleans()},
    GaLoreAdamW: SHARED | BETAS | PROJECTED | SIDED | DENSE,
    GradNormLoRP: SHARED | BETAS | PROJECTED | SIDED | DENSE,
    GaLoreAdafactor: SHARED
    | PROJECTED
    | SIDED
    | DENSE
    | {
        "eps": st.tuples(some([1e-30, 1e-8]), some([0.0, 1e-3])),
        "clip_threshold": st.one_of(st.just(math.inf), st.floats(0.1, 2)),
        "decay_rate": st.floats(-1, 0),
        "beta1": st.one_of(st.none(), st.floats(0, 0.99)),
        "scale_parameter": st.booleans(),
        "relative_step": some([None, True, False]),
        "warmup_init": st.booleans(),
    },
    DCTAdamW: SHARED
    | BETAS
    | PROJECTED
    | SIDED
    | {
        "projection": some(["dct", "dct3", "hadamard", DCT(rank=2, norm=2), Hadamard(rank=0.5, side="reverse")]),
        "norm": some([1, 2]),
        "transport": some(["rotate", "keep"]),
        "error_feedback": some([None, "param", "8bit", "4bit"]),
    },
    FRUGAL: SHARED
    | BETAS
    | PROJECTED
    | SIDED
    | {
        "density": st.floats(0, 1),
        "projection": some(
            [
                *("columns", "rows", "entries", "svd", "power", "random", "blocks", "blocks"),
                *(SVD(rank=2), RandomOrthogonal(rank=0.5), Coordinates(axis="entries", rank=0.3, contiguous=True)),
            ]
        ),
        "contiguous": st.booleans(),
        "order": some(["random", "ascending", "descending", "mirror"]),
        "inner": some(["adamw", "lion", "sgdm"]),
        "outer": some(["sign", "sgd", "none"]),
        "outer_scale": st.floats(0.01, 2),
        "basis_dtype": DENSE["basis_dtype"],
    },
}

SIDE = st.integers(1, 9)
SHAPES = st.one_of(
    st.just(()),
    st.tuples(st.integers(0, 5)),
    st.tuples(st.integers(0, 9), st.integers(0, 9)),
    SIDE.map(lambda n: (n, n)),
    SIDE.map(lambda n: (1, n)),
    st.lists(st.integers(1, 4), min_size=3, max_size=3).map(tuple),
    st.lists(st.integers(1, 3), min_size=4, max_size=4).map(tuple),
    st.lists(st.integers(0, 2), min_size=5, max_size=5).map(tuple),
)
MATRICES = st.one_of(st.tuples(SIDE, SIDE), st.lists(st.integers(1, 4), min_size=2, max_size=5).map(tuple))
DTYPES = some([torch.float32, torch.float32, torch.float64, torch.bfloat16, torch.float16])
SPECS = st.tuples(SHAPES, DTYPES, st.booleans())  # shape, dtype, whether its memory is transposed
MATRIX_SPECS = st.tuples(MATRICES, DTYPES, st.booleans())

USUAL = ["normal"] * 12 + ["zero", "none", "constant", "strided", "transposed", "rank one"]
EXTREME = ["huge", "tiny", "nan", "inf"]
KINDS = st.tuples(*[some(USUAL)] * 3) | st.tuples(*[some(USUAL + EXTREME)] * 3)
SEEDS = st.integers(0, 1 << 20)
TRAINING = st.tuples(KINDS, SEEDS, some([1, 2, 0]))  # kinds of gradients, and how many steps


def memory(x, transposed):
    """The same numbers, in memory that is not contiguous: channels_last for images, the transpose's for others."""
    if not transposed or x.ndim < 2:
        return x
    return x.contiguous(memory_format=torch.channels_last) if x.ndim == 4 else x.mT.contiguous().mT


def gradient(p, kind, seed):
    if kind == "none":
        return None
    g = torch.randn(*p.shape, 2, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)
    limits = torch.finfo(p.dtype)
    match kind:
        case "zero" | "constant":
            g = torch.full_like(g, float(kind == "constant"))
        case "huge":
            g = (g * limits.max / 8).clamp(-limits.max, limits.max)
        case "tiny":
            g = g * limits.tiny
        case "rank one" if p.ndim > 1:
            g = (g[:1] * g[..., :1, :]).clamp(-9, 9)
    g = g.to(p.dtype)
    g = g[..., 0] if kind == "strided" else memory(g[..., 0].contiguous(), kind == "transposed")
    if kind in ("nan", "inf"):
        g = g.contiguous()
        g.view(-1)[:1] = float(kind)
    return g


def bits(x):
    """What two things have in common that are bit for bit the same."""
    if isinstance(x, torch.Tensor):
        whole = {1: torch.int8, 2: torch.int16, 4: torch.int32, 8: torch.int64}[x.itemsize]
        return x.dtype, tuple(x.shape), x.detach().view(whole).numpy().tobytes()
    if isinstance(x, dict):
        return {key: bits(value) for key, value in x.items()}
    if isinstance(x, list | tuple):
        return type(x), [bits(value) for value in x]
    return type(x), x


class Trained:
    """An optimizer and its parameters; a machine has one, and after a copy or a load two that must remain alike."""

    def __init__(self, optimizer, params, grads=()):
        for p, grad in zip(params, grads, strict=False):
            p.grad = copy.deepcopy(grad)  # which a copied or saved parameter leaves behind
        self.optimizer, self.params = optimizer, params
        self.places = [p.data_ptr() for p in params]

    def groups(self):
        """The group of each parameter."""
        return [group for group in self.optimizer.param_groups for _ in group["params"]]

    def state(self, i):
        return self.optimizer.state.get(self.params[i], {})

    def bits(self):
        """Of everything that a user sees."""
        return bits([[(p.requires_grad, p.detach()) for p in self.params], self.optimizer.state_dict()])


def quietly(call, *args, **kwargs):
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", "rank .* is above")
        return call(*args, **kwargs)


# What is wrong with a group or an argument, wherever the optimizer has it.
WRONG = [("nonsense", 1), ("lr", -1.0), ("lr", math.nan), ("lr", "0.1"), ("lr", torch.ones(2)), ("betas", (1.0, 0.9))]
WRONG += [("betas", 0.9), ("eps", -1.0), ("eps", "small"), ("weight_decay", -1), ("weight_decay", None), ("seed", 0.5)]
WRONG += [("moment_dtype", "int8"), ("moment_dtype", torch.int8), ("stochastic_rounding", "yes"), ("momentum", 1.0)]
WRONG += [("dampening", None), ("nesterov", "yes"), ("delta", -1), ("wd_ratio", math.nan), ("layer_view", None)]
WRONG += [("rank", 0), ("rank", 1.5), ("rank", True), ("update_proj_gap", 0), ("update_proj_gap", 2.0), ("scale", -1)]
WRONG += [("projection", "dtc"), ("projection", SVD), ("side", "up"), ("transport", "no"), ("batch_dims", -1)]
WRONG += [("basis_dtype", "float16"), ("basis_dtype", 8)]
WRONG += [
    ("nonfinite", "ignore"),
    ("compensation", "yes"),
    ("norm", 3),
    ("error_feedback", "2bit"),
    ("density", 1.5),
    ("density", -0.5),
]
WRONG += [("inner", "adam"), ("outer", None), ("outer_scale", 0), ("order", "up"), ("contiguous", 1)]
WRONG += [("clip_threshold", 0), ("decay_rate", 0.5), ("beta1", 1.0), ("warmup_init", "yes"), ("eps", (0.0, 1.0))]
WRONG += [("foreach", True), ("differentiable", True), ("amsgrad", True), ("proj_type", "full"), ("dim", 2)]


def wrong_groups():
    p = torch.nn.Parameter(torch.ones(4, 3))
    yield "no dict", [p], TypeError
    yield "a set", {"params": {p}}, TypeError
    yield "no tensor", {"params": [1.0]}, TypeError
    yield "not a leaf", {"params": [p * 2]}, ValueError
    yield "complex", {"params": [torch.nn.Parameter(torch.ones(4, 3) * 1j)]}, ValueError
    yield "whole numbers", {"params": [torch.ones(4, 3, dtype=torch.int32)]}, ValueError
    yield "no params", {"lr": 0.1}, (KeyError, ValueError)


def without(group, key):
    return {k: v for k, v in group.items() if k != key}


def damages(saved):
    """What makes a state dict unfit for the optimizer that it is from: name -> the damaged one."""
    groups, state = saved["param_groups"], saved["state"]
    yield "no groups", without(saved, "param_groups")
    yield "no state", without(saved, "state")
    yield "a group less", saved | {"param_groups": groups[1:]}
    yield "a group more", saved | {"param_groups": [*groups, groups[0]]}
    for key, value in (
        ("params", groups[0]["params"][1:]),
        ("params", [*groups[0]["params"], 99]),
        ("lr", -1.0),
        ("lr", "0.1"),
        ("weight_decay", math.nan),
        ("seed", None),
        ("moment_dtype", "int8"),
        ("amsgrad", True),
    ):
        yield f"{key}: {value}", saved | {"param_groups": [groups[0] | {key: value}, *groups[1:]]}
    for i, entry in state.items():
        if "step" not in entry:
            continue
        wrong = [("step", math.nan), ("step", -1.0), ("step", torch.ones(2)), ("stream", "first"), ("memory", 1.0)]
        for key, x in entry.items():
            if isinstance(x, torch.Tensor) and key != "step":
                wrong += [(key, torch.zeros(2, 7, 1)), (key, 1.0), (key, x.to(torch.complex64))]
        for key, value in wrong:
            yield f"{key} = {value}", saved | {"state": state | {i: entry | {key: value}}}
        yield "a state that is no dict", saved | {"state": state | {i: list(entry)}}
        if entry.keys() > {"step", "stream"}:  # without any tensor it would be a forgotten one
            yield "no step", saved | {"state": state | {i: without(entry, "step")}}


constructed = precondition(lambda self: self.trained)


class Fuzz(RuleBasedStateMachine):
    """What a user does with one optimizer, and what must be true after each of these operations."""

    kind: type
    counts: Counter

    def __init__(self):
        super().__init__()
        self.trained, self.taken, self.skipped = [], 0, 0

    # Construction.

    @initialize(data=st.data(), specs=st.lists(SPECS, max_size=3), matrix=MATRIX_SPECS, seed=SEEDS, training=TRAINING)
    def construct(self, data, specs, matrix, seed, training):
        options = data.draw(st.fixed_dictionaries({}, optional=OPTIMIZERS[self.kind]), "options")
        options = self.without_contradictions(options, matrix[0])
        in_groups = data.draw(some([None, None, "settings", "ranks"]), "groups")
        if in_groups == "ranks" and "rank" in OPTIMIZERS[self.kind]:  # then groups without one are dense
            options = without(without(options, "rank"), "density")
            if not isinstance(options.get("projection"), str):
                options.pop("projection", None)
        self.named = data.draw(st.booleans(), "named")
        specs = [matrix, *specs]
        generator = torch.Generator().manual_seed(seed)
        params = [
            torch.nn.Parameter(memory(torch.randn(shape, generator=generator).to(dtype), transposed))
            for shape, dtype, transposed in specs
        ]
        before = bits(params)
        self.additions = []

        def groups(params):
            if in_groups is None:
                return self.with_names(params)
            matrices = {"params": self.with_names(params[:1]), "weight_decay": 0.25}
            if in_groups == "ranks" and "rank" in OPTIMIZERS[self.kind]:
                matrices |= {"rank": 2, "update_proj_gap": 3, "scale": 0.5}
                if self.kind is not FRUGAL:
                    matrices |= {"proj_type": "reverse_std", "side": "reverse"}
            rest = {"params": self.with_names(params[1:], 1)} | (
                {"lr": 0.02} if "lr" in options else {"weight_decay": 0.5}
            )
            return [matrices, rest] if params[1:] else [matrices]

        def build(params):
            optimizer = quietly(self.kind, groups(params[: len(specs)]), **copy.deepcopy(options))
            start = len(specs)
            for size, own in self.additions:
                added = {"params": self.with_names(params[start : start + size], start)}
                quietly(optimizer.add_param_group, added | own)
                start += size
            return optimizer

        try:
            optimizer = build(params)
        except ValueError as error:
            assert str(error)
            assert bits(params) == before
            self.counts["refused"] += 1
            return
        self.build = build
        self.trained = [Trained(optimizer, params)]
        n = len(params)
        self.steps, self.spoilt, self.specs, self.streams = [0] * n, [False] * n, [None] * n, {}
        self.moved = set()  # to another dtype since their last step
        self.train_on(training)

    def without_contradictions(self, options, matrix):
        """The combinations that are refused have tests of their own."""
        projection = options.get("projection")
        if projection is not None and not isinstance(projection, str):
            for key in ("rank", "density", "side", "seed", "norm", "contiguous"):
                options.pop(key, None)
        if "batch_dims" in options:
            options["batch_dims"] = min(options["batch_dims"], len(matrix) - 2)
        if options.get("compensation"):
            options.pop("stochastic_rounding", None)
        if self.kind is FRUGAL:
            if "density" in options:
                options.pop("rank", None)
            dense = isinstance(projection, str) and projection in ("svd", "power", "random")
            if projection != "blocks":
                options.pop("order", None)
            if projection not in (None, "columns", "rows", "entries"):
                options.pop("contiguous", None)
            if not dense:
                options.pop("side", None)
                options.pop("basis_dtype", None)
        if self.kind is SGDP and not (options.get("momentum") and not options.get("dampening")):
            options.pop("nesterov", None)
        if self.kind is GaLoreAdafactor:
            if "lr" in options:
                options.pop("warmup_init", None)
            options["relative_step"] = None if options.get("relative_step") is None else "lr" not in options
        return options

    def with_names(self, params, start=0):
        return [(f"layer.{i}", p) for i, p in enumerate(params, start)] if self.named else list(params)

    @property
    def first(self):
        return self.trained[0]

    # Steps.

    def set_gradients(self, kinds, seed):
        """Those of the parameters that are not frozen; the i-th is of the i-th kind."""
        self.kinds = [kinds[i % len(kinds)] if p.requires_grad else "none" for i, p in enumerate(self.first.params)]
        for one in self.trained:
            for i, (p, kind) in enumerate(zip(one.params, self.kinds, strict=True)):
                p.grad = gradient(p, kind, seed + i)

    def take_step(self, step=lambda one: one.optimizer.step()):
        """Of every optimizer, with the gradients that are there."""
        held = [[p for p in group["params"] if p.grad is not None] for group in self.first.optimizer.param_groups]
        bad = [any(not p.grad.isfinite().all() for p in params) for params in held]
        policies = [group["nonfinite"] for group, b in zip(self.first.optimizer.param_groups, bad, strict=True) if b]
        stopped = any(policy != "propagate" for policy in policies)
        before = [(bits(p), bits(self.first.state(i))) for i, p in enumerate(self.first.params)]
        for one in self.trained:
            seen = [(p.grad, None if p.grad is None else bits(p.grad)) for p in one.params]
            if "raise" in policies:
                with pytest.raises(FloatingPointError, match="nothing was changed"):
                    step(one)
            else:
                step(one)
            for p, (grad, content) in zip(one.params, seen, strict=True):
                assert p.grad is grad
                assert grad is None or bits(grad) == content
        self.taken += 1
        self.skipped += stopped
        for i, (p, group) in enumerate(zip(self.first.params, self.first.groups(), strict=True)):
            if p.grad is None or stopped:
                assert (bits(p), bits(self.first.state(i))) == before[i]
                continue
            self.steps[i] += 1
            self.specs[i] = self.first.optimizer._spec(p, group)
            self.moved.discard(i)
            self.streams.setdefault(i, self.first.state(i)["stream"])
            self.spoilt[i] |= not (p.grad.abs() < 1e3).all()
            if not self.spoilt[i] and self.must_move(p, group, self.kinds[i]):
                assert bits(p) != before[i][0]

    def must_move(self, p, group, kind):
        if kind != "normal" or p.numel() == 0 or p.dtype not in (torch.float32, torch.float64) or p.abs().max() > 10:
            return False
        size = 1e-2 if group["lr"] is None else float(group["lr"])
        if group["eps"] == 0 or group.get("warmup_init"):
            return False
        if "scale" in group and self.first.optimizer._is_chosen(p, group):
            size *= group["scale"]
            if self.kind is FRUGAL:
                size *= group["outer_scale"]
                if group["outer"] == "none" and (group["density"] == 0 or group["projection"] == "blocks"):
                    return False
        if "delta" in group and p.ndim > 1 and p.numel() == len(p):
            return False  # a row of one weight is radial as a whole
        return size * (1 - group.get("dampening", 0)) > 1e-3

    @constructed
    @rule(training=TRAINING)
    def train(self, training):
        self.train_on(training)

    def train_on(self, training):
        kinds, seed, steps = training
        for i in range(steps):
            self.set_gradients(kinds, seed + 1000 * i)
            self.take_step()

    @constructed
    @rule()
    def step_with_the_same_gradients(self):
        self.kinds = ["old"] * len(self.first.params)
        self.take_step()

    @constructed
    @rule(training=TRAINING, set_to_none=st.booleans())
    def zero_grad(self, set_to_none, training):
        for one in self.trained:
            one.optimizer.zero_grad(set_to_none=set_to_none)
            assert all(p.grad is None or not (set_to_none or p.grad.any()) for p in one.params)
        self.train_on(training)

    @constructed
    @rule(seed=SEEDS)
    def step_with_a_closure(self, seed):
        self.kinds = ["closure"] * len(self.first.params)
        for one in self.trained:
            one.optimizer.zero_grad()
            loss = torch.zeros(())
            for i, p in enumerate(one.params):
                if p.requires_grad:
                    loss = loss + (p.double() * gradient(p, "normal", seed + i).double()).sum()

            def closure(loss=loss):
                assert torch.is_grad_enabled()
                loss.backward()
                return loss

            if loss.requires_grad:
                assert one.optimizer.step(closure) is loss
                self.taken += one is self.first
        for i, (p, group) in enumerate(zip(self.first.params, self.first.groups(), strict=True)):
            self.steps[i] += p.grad is not None
            if p.grad is not None:
                self.specs[i] = self.first.optimizer._spec(p, group)
                self.moved.discard(i)
                self.streams.setdefault(i, self.first.state(i)["stream"])

    @constructed
    @rule(seed=SEEDS)
    def step_with_a_sparse_gradient(self, seed):
        chosen = random.Random(seed).choice(range(len(self.first.params)))
        self.set_gradients(["normal"], seed)
        for one in self.trained:
            p, before = one.params[chosen], one.bits()
            if not p.requires_grad:
                continue
            p.grad = torch.zeros_like(p).to_sparse()
            with pytest.raises(RuntimeError, match="takes dense real gradients, got a sparse one"):
                one.optimizer.step()
            assert one.bits() == before
            p.grad = None

    # What may change during training.

    @constructed
    @rule(training=TRAINING, data=st.data())
    def change_a_setting(self, data, training):
        groups = self.first.optimizer.param_groups
        g = data.draw(st.integers(0, len(groups) - 1), "group")
        values = {
            "lr": LR,
            "weight_decay": st.floats(0, 1),
            "betas": BETAS["betas"],
            "momentum": st.floats(0, 0.99),
            "scale": SCALE,
            "update_proj_gap": GAP,
            "maximize": st.booleans(),
        }
        key = data.draw(some([key for key in values if key in groups[g] and groups[g][key] is not None]), "key")
        if key == "momentum" and groups[g]["nesterov"]:
            return
        value = data.draw(values[key], "value")
        for one in self.trained:
            one.optimizer.param_groups[g][key] = copy.deepcopy(value)
        self.train_on(training)

    @constructed
    @rule(training=TRAINING, frozen=st.lists(st.booleans(), min_size=6, max_size=6), forget=st.booleans())
    def freeze_some(self, frozen, forget, training):
        """As LISA and OwLore do, which drop or keep the state of the layers that sleep."""
        for one in self.trained:
            for i, p in enumerate(one.params):
                p.requires_grad_(not frozen[i % 6])
                if frozen[i % 6]:
                    p.grad = None
        if forget:
            self.forget_all(i for i in range(len(self.steps)) if frozen[i % 6])
        self.train_on(training)

    @constructed
    @rule(training=TRAINING, which=st.lists(st.integers(0, 5), max_size=3))
    def forget(self, which, training):
        self.forget_all(i % len(self.steps) for i in which)
        self.train_on(training)

    def forget_all(self, places):
        places = list(places)
        for one in self.trained:
            one.optimizer.forget([one.params[i] for i in places])
        for i in places:
            if self.steps[i]:
                assert self.first.state(i).keys() == {"stream"}
                assert self.first.state(i)["stream"] != self.streams[i]
                self.streams[i] = self.first.state(i)["stream"]
            self.steps[i], self.specs[i] = 0, None

    @precondition(lambda self: len(self.additions) < 2)
    @constructed
    @rule(training=TRAINING, data=st.data(), specs=st.lists(SPECS, min_size=1, max_size=2), seed=SEEDS)
    def add_a_group(self, data, specs, seed, training):
        defaults = self.first.optimizer.defaults
        own = {"lr": 0.03, "name": "late"}
        shape = specs[0][0]
        if "rank" in defaults and len(shape) > 1 and math.prod(shape) and data.draw(st.booleans(), "with a rank"):
            own |= {"rank": data.draw(RANK, "rank"), "batch_dims": 0}
        if self.kind is GaLoreAdafactor:
            own |= {"relative_step": None, "warmup_init": False}
        generator = torch.Generator().manual_seed(seed)
        tensors = [memory(torch.randn(s, generator=generator).to(d), t) for s, d, t in specs]
        start = len(self.first.params)
        for one in self.trained:
            added = [torch.nn.Parameter(x.clone()) for x in tensors]
            quietly(one.optimizer.add_param_group, {"params": self.with_names(added, start)} | own)
            one.params += added
            one.places += [p.data_ptr() for p in added]
        self.additions.append((len(tensors), own))
        self.steps += [0] * len(tensors)
        self.spoilt += [False] * len(tensors)
        self.specs += [None] * len(tensors)
        self.train_on(training)

    @constructed
    @rule(training=TRAINING, which=st.integers(0, 5), dtype=DTYPES)
    def move_to_another_dtype(self, which, dtype, training):
        """As `module.to(dtype)` does; the state follows at the next step, or when it is loaded."""
        which %= len(self.steps)
        if not self.first.params[which].isfinite().all():
            return
        for one in self.trained:
            p = one.params[which]
            p.grad = None
            p.data = p.data.to(dtype)
            one.places[which] = p.data_ptr()
        self.moved.add(which)
        self.spoilt[which] |= dtype == torch.float16
        self.train_on(training)

    @constructed
    @rule(
        name=some(["lambda", "cosine", "one cycle", "plateau", "cyclic"]),
        kinds=KINDS,
        seed=SEEDS,
        steps=st.integers(1, 3),
    )
    def follow_a_scheduler(self, name, kinds, seed, steps):
        if any(group["lr"] is None for group in self.first.optimizer.param_groups):
            return
        cycled = {"cycle_momentum": not self.first.optimizer.defaults.keys().isdisjoint({"betas", "momentum"})}
        make = {
            "lambda": lambda o: torch.optim.lr_scheduler.LambdaLR(o, lambda i: 0.9**i),
            "cosine": lambda o: torch.optim.lr_scheduler.CosineAnnealingLR(o, 3),
            "one cycle": lambda o: torch.optim.lr_scheduler.OneCycleLR(o, 0.05, total_steps=5, **cycled),
            "plateau": lambda o: torch.optim.lr_scheduler.ReduceLROnPlateau(o, patience=0),
            "cyclic": lambda o: torch.optim.lr_scheduler.CyclicLR(o, 0.01, 0.1, **cycled),
        }[name]
        schedulers = [make(one.optimizer) for one in self.trained]
        for i in range(steps):
            self.set_gradients(kinds, seed + 1000 * i)
            self.take_step()
            for scheduler in schedulers:
                scheduler.step(*([1.0] if name == "plateau" else []))

    @constructed
    @rule(kinds=st.tuples(some(USUAL)), seed=SEEDS)
    def step_under_hooks(self, kinds, seed):
        self.set_gradients(kinds, seed)

        def step(one):
            calls = []
            handles = [
                one.optimizer.register_step_pre_hook(lambda *_: calls.append("before")),
                one.optimizer.register_step_post_hook(lambda *_: calls.append("after")),
            ]
            assert one.optimizer.step() is None
            for handle in handles:
                handle.remove()
            assert calls == ["before", "after"]

        self.take_step(step)

    # Copies. The copy is trained beside the original from then on.

    @constructed
    @rule(training=TRAINING)
    def save_and_load(self, training):
        if self.moved:
            self.load_own_state()
        file = io.BytesIO()
        torch.save(self.first.optimizer.state_dict(), file)
        file.seek(0)
        params = copy.deepcopy(self.first.params)
        optimizer = self.build(params)
        optimizer.load_state_dict(torch.load(file, weights_only=True))
        self.trained = [self.first, Trained(optimizer, params, [p.grad for p in self.first.params])]
        self.train_on(training)

    @constructed
    @rule(training=TRAINING, how=some(["deepcopy", "pickle"]))
    def copy(self, how, training):
        both = self.first.params, self.first.optimizer
        params, optimizer = copy.deepcopy(both) if how == "deepcopy" else pickle.loads(pickle.dumps(both))
        self.trained = [self.first, Trained(optimizer, params, [p.grad for p in self.first.params])]
        self.train_on(training)

    @constructed
    @rule(training=TRAINING)
    def load_its_own_state(self, training):
        self.load_own_state()
        self.train_on(training)

    def load_own_state(self):
        for one in self.trained:
            before = one.bits()
            one.optimizer.load_state_dict(one.optimizer.state_dict())
            assert self.moved or one.bits() == before
        for i in self.moved:
            if self.steps[i]:
                self.specs[i] = self.first.optimizer._spec(self.first.params[i], self.first.groups()[i])
        self.moved.clear()

    # What is refused.

    @constructed
    @rule(training=TRAINING, data=st.data())
    def load_a_damaged_state(self, data, training):
        optimizer = self.first.optimizer
        name, damaged = data.draw(some(list(damages(optimizer.state_dict()))), "damage")
        before = self.first.bits()
        with pytest.raises(ValueError):
            optimizer.load_state_dict(damaged)
            raise AssertionError(f"{name}: loaded")
        assert self.first.bits() == before
        assert not optimizer._optimizer_load_state_dict_pre_hooks
        assert not optimizer._optimizer_load_state_dict_post_hooks
        self.train_on(training)

    @constructed
    @rule(training=TRAINING, wrong=some(WRONG), how=some(["constructor", "group"]))
    def give_a_wrong_value(self, wrong, how, training):
        key, value = wrong
        optimizer = self.first.optimizer
        torchs = ("nonsense", "foreach", "differentiable", "amsgrad", "proj_type", "dim")
        if key not in optimizer.defaults and key not in torchs:
            return
        before = self.first.bits(), len(optimizer.param_groups)
        fresh = torch.nn.Parameter(torch.ones(4, 3))
        params = [("fresh", fresh)] if self.named else [fresh]
        with pytest.raises((ValueError, TypeError, NotImplementedError)) as caught:
            if how == "constructor":
                self.kind(params, **{key: value})
            else:
                optimizer.add_param_group({"params": params, key: value})
            raise AssertionError(f"{key}={value!r} was accepted")
        assert key in str(caught.value)
        assert (self.first.bits(), len(optimizer.param_groups)) == before
        self.train_on(training)

    @constructed
    @rule(training=TRAINING, wrong=st.integers(0, 6))
    def add_a_wrong_group(self, wrong, training):
        _, group, error = list(wrong_groups())[wrong]
        optimizer, before = self.first.optimizer, self.first.bits()
        with pytest.raises(error):
            optimizer.add_param_group(group)
        with pytest.raises(ValueError):
            optimizer.add_param_group({"params": self.with_names(self.first.params[:1])})
        assert self.first.bits() == before
        self.train_on(training)

    # What is always true.

    @rule()
    def print_it(self):
        for one in self.trained:
            assert repr(one.optimizer).startswith(self.kind.__name__)

    @invariant()
    def parameters_are_where_they_were(self):
        for one in self.trained:
            assert [p.data_ptr() for p in one.params] == one.places
            held = [p for group in one.optimizer.param_groups for p in group["params"]]
            assert all(p is q for p, q in zip(held, one.params, strict=True))

    @invariant()
    def the_state_is_what_was_declared(self):
        for one in self.trained:
            total = 0
            for i, (p, group) in enumerate(zip(one.params, one.groups(), strict=True)):
                state = one.state(i)
                if not self.steps[i]:
                    assert state.keys() <= {"stream"}
                    continue
                spec, step = self.specs[i], state["step"]
                assert (step.dtype, step.shape, step.item()) == (torch.float32, (), self.steps[i])
                assert type(state["stream"]) is int
                assert state["stream"] == self.streams[i]
                tensors = {key: x for key, x in state.items() if key not in ("step", "stream")}
                assert spec.keys() - one.optimizer._passing(p, group) <= tensors.keys() <= spec.keys()
                assert {key: (tuple(x.shape), x.dtype) for key, x in tensors.items()} == {k: spec[k] for k in tensors}
                total += 4 + sum(math.prod(spec[key][0]) * spec[key][1].itemsize for key in tensors)
            assert state_bytes(one.optimizer) == total

    @invariant()
    def numbers_are_finite(self):
        for i, p in enumerate(self.first.params if self.trained else []):
            if not self.spoilt[i] and p.dtype != torch.float16 and self.first.groups()[i]["eps"] != 0:
                assert p.isfinite().all()
                assert all(x.isfinite().all() for x in self.first.state(i).values() if isinstance(x, torch.Tensor))

    @invariant()
    def copies_are_alike(self):
        if len(self.trained) == 2:
            a, b = self.trained
            assert bits(a.params) == bits(b.params)
            for i in range(len(a.params)):
                assert bits(a.state(i)) == bits(b.state(i))
            keys = [[without(group, "params") for group in one.optimizer.param_groups] for one in self.trained]
            assert bits(keys[0]) == bits(keys[1])

    @precondition(lambda self: hasattr(self.first.optimizer, "report"))
    @constructed
    @rule(seed=SEEDS)
    def report(self, seed):
        self.set_gradients(["normal"], seed)
        self.take_step()
        total = int(re.search(r"state in total: ([\d,]+) B", self.first.optimizer.report())[1].replace(",", ""))
        if all(p.grad is not None for p in self.first.params):
            assert total == state_bytes(self.first.optimizer)

    def teardown(self):
        self.counts["cases"] += 1
        self.counts["trained to the end"] += self.taken > 0
        self.counts["steps"] += self.taken
        self.counts["steps not taken for a gradient"] += self.skipped


@pytest.mark.parametrize("kind", OPTIMIZERS)
def test_any_order_of_operations_does_what_is_documented(kind, record_property):
    counts = Counter()
    machine = type(f"Fuzz{kind.__name__}", (Fuzz,), {"kind": kind, "counts": counts})
    run_state_machine_as_test(
        machine,
        settings=settings(
            max_examples=CASES,
            stateful_step_count=OPERATIONS,
            phases=[Phase.generate, Phase.shrink],
            report_multiple_bugs=False,
        ),
    )
    told = ", ".join(f"{count} {what}" for what, count in counts.items())
    record_property("summary", f"fuzz, {kind.__name__}: {told}")
    assert counts["trained to the end"] >= 0.9 * CASES


@pytest.mark.parametrize("kind", OPTIMIZERS)
def test_every_argument_is_drawn(kind):
    arguments = inspect.signature(kind).parameters.keys() - {"params", "torch_keywords"}
    assert arguments == OPTIMIZERS[kind].keys()
