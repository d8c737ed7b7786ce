# SPDX-License-Identifier: Apache-2.0
"""Whom the benchmarks compare, on which parameters, and what each must at least keep, move and multiply."""

import contextlib
import importlib
import itertools
import logging
import math
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import partial
from typing import Any, NamedTuple

import torch
from _common import BODIES, Shape
from torch import Tensor, nn

from slimstate.optim import (
    FRUGAL,
    LISA,
    SGDP,
    AdamP,
    AdamW,
    DCTAdamW,
    GaLoreAdafactor,
    GaLoreAdamW,
    GradNormLoRP,
    OwLore,
)

LR, DECAY, GAP, DENSITY = 1e-4, 0.01, 200, 0.25
FLOAT = 4  # bytes; moments and bases are float32 unless a name says otherwise
CODE = 1 + 4 / 256  # bytes of an element of an 8-bit state: blocks of 256 share a float32 scale


@dataclass(frozen=True)
class Size:
    """The shapes of a problem: matrices to project, embeddings and head, vectors; and the rank that is usual there."""

    projected: tuple[Shape, ...]
    rank: int
    tables: tuple[Shape, ...] = ()
    vectors: tuple[int, ...] = ()

    @property
    def weights(self) -> int:
        """In projected matrices."""
        return sum(rows * columns for rows, columns in self.projected)

    @property
    def others(self) -> int:
        """In what is dense."""
        return sum(rows * columns for rows, columns in self.tables) + sum(self.vectors)


SIZES = {
    "60m-body": Size(tuple(BODIES["60m"]), 128),
    "60m": Size(tuple(BODIES["60m"]), 128, ((32000, 512),) * 2, (512,) * 17),
    "1b-layer": Size(tuple(BODIES["1b-layer"]), 128),
    "1b": Size(tuple(BODIES["1b"]), 512),
    "small": Size(tuple(BODIES["tiny"]), 16, ((1000, 64),) * 2, (64,) * 5),
}
TITLES = {
    "60m-body": "The body of LLaMA-60M",
    "60m": "LLaMA-60M with embeddings and head",
    "1b-layer": "One layer of LLaMA-1B",
    "1b": "The body of LLaMA-1B",
    "small": "Small matrices",
}


class Problem:
    """Parameters with gradients, which all contestants step on in turn.

    Some peers replace a parameter's data or gradient: `prepare` puts back what was there.
    """

    def __init__(self, size: Size, dtype: torch.dtype = torch.float32, device: str = "cpu") -> None:
        self.size, self.device, self.dtype = size, device, dtype
        shapes = [*size.projected, *size.tables, *((n,) for n in size.vectors)]
        self.params = [nn.Parameter(torch.randn(s, device=device).mul_(0.02).to(dtype)) for s in shapes]
        self.data = [p.data for p in self.params]
        self.gradients = [torch.randn(s, device=device).mul_(1e-3).to(dtype) for s in shapes]
        ends = list(itertools.accumulate((len(size.projected), len(size.tables)), initial=0))
        self.projected, self.tables = (self.params[a:b] for a, b in itertools.pairwise(ends))
        self.vectors = self.params[ends[-1] :]

    def prepare(self) -> None:
        """New gradients, of the other sign: this reads all of them, and leaves the caches alike for everybody."""
        for p, data, gradient in zip(self.params, self.data, self.gradients, strict=True):
            p.data, p.grad = data, gradient.neg_()

    def groups(self, **settings: Any) -> list[dict[str, Any]]:
        """Projected matrices with these settings, and what is dense in groups without, as `param_groups` makes them."""
        groups = [{"params": self.projected, **settings}, {"params": self.tables}, {"params": self.vectors}]
        return [group for group in groups if group["params"]]


ADAMW, FOREACH, LOOP, SGD = (
    "torch.optim.AdamW, fused",
    "torch.optim.AdamW, foreach",
    "torch.optim.AdamW, for-loop",
    "torch.optim.SGD, fused",
)
PRODUCTS = "two products"


class Matrix(NamedTuple):
    """A matrix, and the rank that it gets."""

    rows: int
    columns: int
    rank: int

    @property
    def d(self) -> int:
        """The compressed side."""
        return min(self.rows, self.columns)

    @property
    def k(self) -> int:
        """The other side."""
        return max(self.rows, self.columns)

    @property
    def weights(self) -> int:
        """All."""
        return self.rows * self.columns


@dataclass(frozen=True)
class Floor:
    """What an algorithm cannot do without.

    Attributes:
        state: bytes kept of a matrix.
        traffic: bytes read and written of a matrix beside G, which is read, and W, which is read and written.
        flops: operations of products and transforms.
        dense: bytes of state for each weight of what is not projected.
        share: the rank as a share of d; None: the problem's.
        factored: instead, of what is not projected, matrices keep their rows' and columns' sums, and vectors a number
            for each weight.
    """

    state: Callable[[Matrix], float]
    traffic: Callable[[Matrix], float]
    flops: Callable[[Matrix], float] = lambda x: 0
    dense: float = 2 * FLOAT
    share: float | None = None
    factored: bool = False

    def kept(self, size: Size) -> float:
        """Bytes of state, without the counters of each tensor."""
        return self._sum(self.state, size) + self._others(size)

    def moved(self, size: Size, itemsize: int) -> float:
        """Bytes read and written in a step."""
        weights = 3 * itemsize * (size.weights + size.others)
        return weights + self._sum(self.traffic, size) + 2 * self._others(size)

    def operations(self, size: Size) -> float:
        """Of a step."""
        return self._sum(self.flops, size)

    def _others(self, size: Size) -> float:
        if self.factored:
            return FLOAT * (sum(map(sum, size.tables)) + sum(size.vectors))
        return self.dense * size.others

    def _sum(self, formula: Callable[[Matrix], float], size: Size) -> float:
        share = self.share
        ranks = (size.rank if share is None else int(share * min(shape)) for shape in size.projected)
        return sum(formula(Matrix(*shape, r)) for shape, r in zip(size.projected, ranks, strict=True))


def dense(state: float, again: float = 0, tables: float | None = None) -> Floor:
    """So many bytes of state a weight, and so many bytes that a second pass reads again."""
    return Floor(
        state=lambda x: state * x.weights,
        traffic=lambda x: (2 * state + again) * x.weights,
        dense=state if tables is None else tables,
    )


def low_rank(moments: float, products: int = 2, rows: int = 0, again: float = 0, dense: float = 2 * FLOAT) -> Floor:
    """Moments of r x k with so many bytes an element, and a basis of d x r, which each product reads.

    R lies in the caches between the products. A product takes 2 r operations a weight.

    Args:
        moments: bytes.
        products: how many a step cannot do without.
        rows: float32 numbers for each row of W.
        again: bytes a weight that a second pass reads.
        dense: bytes of state a weight of what is not projected.
    """
    return Floor(
        state=lambda x: moments * x.rank * x.k + FLOAT * (x.d * x.rank + rows * x.rows),
        traffic=lambda x: 2 * moments * x.rank * x.k + products * FLOAT * x.d * x.rank + again * x.weights,
        flops=lambda x: 2 * products * x.rank * x.weights,
        dense=dense,
    )


def index_basis(kept: Callable[[Matrix], int], index: Callable[[Matrix], int]) -> Floor:
    """Two moments of the weights that are kept, and an index for each row, column or entry."""
    return Floor(
        state=lambda x: 2 * FLOAT * kept(x) + 4 * index(x), traffic=lambda x: 4 * FLOAT * kept(x) + 4 * index(x)
    )


def fixed(operations: Callable[[int], float], errors: float = 0, share: float | None = None) -> Floor:
    """Two moments of r x k on r of d fixed directions, of which the ages are kept too.

    Args:
        operations: a weight, of a transform of length d; one is for all coefficients, one for the way back.
        errors: bytes a weight.
        share: as `Floor`'s.
    """
    return Floor(
        state=lambda x: 2 * FLOAT * x.rank * x.k + 8 * x.rank + errors * x.weights + (4 * x.k if errors else 0),
        traffic=lambda x: 4 * FLOAT * x.rank * x.k + 2 * errors * x.weights,
        flops=lambda x: 2 * operations(x.d) * x.weights,
        share=share,
    )


def share(n: int) -> int:
    """FRUGAL's."""
    return max(1, int(DENSITY * n))


ADAFACTOR = Floor(
    state=lambda x: FLOAT * (x.d * x.rank + x.rank + x.k),
    traffic=lambda x: 2 * FLOAT * x.d * x.rank,
    flops=lambda x: 4 * x.rank * x.weights,
    factored=True,
)


@dataclass
class Runner:
    """An optimizer on a problem."""

    step: Callable[[], object]
    optimizer: torch.optim.Optimizer | None
    prepare: Callable[[], object]


@dataclass(frozen=True)
class Contestant:
    """An optimizer that takes part.

    Attributes:
        build: makes it, on a problem; whatever it raises becomes the reason why it does not run.
        origin: `torch`, `slimstate` or the peer's package.
        beside: what it is compared with beside the fused AdamW: `PRODUCTS` or `SGD`.
        floor: what it cannot do without, where a formula is known.
        sizes: where it takes part; None is everywhere.
        shim: what a peer needs before it runs here.
        in_low_precision: whether it is timed with low-precision weights on a CPU too.
    """

    build: Callable[[Problem], Runner]
    origin: str = "slimstate"
    beside: str = ""
    floor: Floor | None = None
    sizes: tuple[str, ...] | None = None
    shim: str = ""
    in_low_precision: bool = True


def on(problem: Problem, optimizer: torch.optim.Optimizer) -> Runner:
    """An optimizer on the parameters that all share."""
    return Runner(optimizer.step, optimizer, problem.prepare)


# References.


def torchs(problem: Problem, kind: type[torch.optim.Optimizer] = torch.optim.AdamW, **settings: Any) -> Runner:
    """One of torch's."""
    return on(problem, kind(problem.params, lr=LR, weight_decay=DECAY, **settings))


def products(problem: Problem) -> Runner:
    """R = Q^T M and W.addmm_(Q, U) for every matrix, in float32 memory that is there, and a fused AdamW for the rest.

    M is the gradient with its compressed side first. Of parameters in low precision float32 copies are taken, off the
    clock, since float32 is what a projection computes in.
    """
    work = []
    for p, gradient in zip(problem.projected, problem.gradients, strict=False):
        m, w = gradient.float(), p.detach().float()
        transposed = p.shape[0] >= p.shape[1]
        d, k = sorted(p.shape)
        r = min(problem.size.rank, d)
        basis = torch.linalg.qr(torch.randn(d, r, device=p.device)).Q.contiguous()
        down, u = (torch.randn(r, k, device=p.device) for _ in range(2))
        work.append((basis.mT, m.mT if transposed else m, down, w, *((u.mT, basis.mT) if transposed else (basis, u))))
    rest = problem.tables + problem.vectors
    adamw = torch.optim.AdamW(rest, lr=LR, fused=True) if rest else None

    @torch.no_grad()
    def step() -> None:
        for q, m, r, w, a, b in work:
            torch.mm(q, m, out=r)
            w.addmm_(a, b, beta=1 - LR * DECAY, alpha=-0.25 * LR)
        if adamw is not None:
            adamw.step()

    return Runner(step, adamw, problem.prepare)


REFERENCES: dict[str, Contestant] = {
    ADAMW: Contestant(partial(torchs, fused=True), "torch", floor=dense(2 * FLOAT)),
    PRODUCTS: Contestant(products, "torch"),
    SGD: Contestant(partial(torchs, kind=torch.optim.SGD, momentum=0.9, fused=True), "torch", floor=dense(FLOAT)),
}


# Ours.


def ours(problem: Problem, kind: type[torch.optim.Optimizer], **settings: Any) -> Runner:
    """One of this package that has moments of every weight."""
    return on(problem, kind(problem.groups(), lr=LR, weight_decay=DECAY, **settings))


def projected(problem: Problem, kind: type[torch.optim.Optimizer], share: str = "rank", **settings: Any) -> Runner:
    """One of this package that projects."""
    kept = {"rank": settings.pop("rank", problem.size.rank)} if share == "rank" else {"density": DENSITY}
    return on(problem, kind(problem.groups(**kept), lr=LR, weight_decay=DECAY, **settings))


def sampled(problem: Problem, sampler: type[LISA | OwLore], make: Callable[[Problem], Runner]) -> Runner:
    """Two layers at a time, on parameters of their own: a sampler decides what has gradients."""
    own = Problem(Size(problem.size.projected, problem.size.rank), problem.dtype, problem.device)
    linear = [nn.Linear(p.shape[1], p.shape[0], bias=False, device="meta") for p in own.projected]
    for module, p in zip(linear, own.projected, strict=True):
        module.weight = p
    layers = nn.ModuleList(nn.ModuleList(linear[i : i + 7]) for i in range(0, len(linear), 7))
    runner = make(own)
    own.prepare()
    chooser = sampler(layers, runner.optimizer, layers=layers, active=2)

    def step() -> None:
        runner.optimizer.step()
        chooser.step()

    def prepare() -> None:
        own.prepare()
        for p in own.params:
            if not p.requires_grad:
                p.grad = None

    return Runner(step, runner.optimizer, prepare)


FEW_SIZES = ("60m-body", "small")
OURS: dict[str, Contestant] = {
    "AdamW": Contestant(partial(ours, kind=AdamW), floor=dense(2 * FLOAT)),
    "AdamW, bfloat16 moments": Contestant(partial(ours, kind=AdamW, moment_dtype="bfloat16"), floor=dense(4)),
    "AdamW, 8-bit moments": Contestant(
        partial(ours, kind=AdamW, moment_dtype="8bit"), floor=dense(2 * CODE, tables=2 * FLOAT)
    ),
    "AdamW, companded moments": Contestant(
        partial(ours, kind=AdamW, moment_dtype="8bit-companded"), floor=dense(2 * CODE, tables=2 * FLOAT)
    ),
    "GaLoreAdamW": Contestant(partial(projected, kind=GaLoreAdamW), beside=PRODUCTS, floor=low_rank(2 * FLOAT)),
    "GaLoreAdamW, bfloat16 moments": Contestant(
        partial(projected, kind=GaLoreAdamW, moment_dtype="bfloat16"), beside=PRODUCTS, floor=low_rank(4, dense=4)
    ),
    "GaLoreAdamW, 8-bit moments": Contestant(
        partial(projected, kind=GaLoreAdamW, moment_dtype="8bit"), beside=PRODUCTS, floor=low_rank(2 * CODE)
    ),
    "GaLoreAdamW, companded moments": Contestant(
        partial(projected, kind=GaLoreAdamW, moment_dtype="8bit-companded"), beside=PRODUCTS, floor=low_rank(2 * CODE)
    ),
    "GaLoreAdafactor": Contestant(
        partial(projected, kind=GaLoreAdafactor, scale_parameter=False), beside=PRODUCTS, floor=ADAFACTOR
    ),
    "GradNormLoRP": Contestant(
        partial(projected, kind=GradNormLoRP), beside=PRODUCTS, floor=low_rank(2 * FLOAT, rows=3, again=FLOAT)
    ),
    "FRUGAL, contiguous rows": Contestant(
        partial(projected, kind=FRUGAL, share="density", projection="rows", contiguous=True),
        floor=index_basis(lambda x: share(x.rows) * x.columns, lambda x: share(x.rows)),
    ),
    "FRUGAL, columns": Contestant(
        partial(projected, kind=FRUGAL, share="density", projection="columns"),
        floor=index_basis(lambda x: share(x.columns) * x.rows, lambda x: share(x.columns)),
    ),
    "FRUGAL, entries": Contestant(
        partial(projected, kind=FRUGAL, share="density", projection="entries"),
        floor=index_basis(lambda x: share(x.weights), lambda x: share(x.weights)),
    ),
    "FRUGAL, svd": Contestant(
        partial(projected, kind=FRUGAL, projection="svd"), beside=PRODUCTS, floor=low_rank(2 * FLOAT, products=3)
    ),
    "DCTAdamW": Contestant(
        partial(projected, kind=DCTAdamW), beside=PRODUCTS, floor=fixed(lambda d: 2.5 * math.log2(d))
    ),
    "DCTAdamW, 8-bit errors": Contestant(
        partial(projected, kind=DCTAdamW, error_feedback="8bit"),
        beside=PRODUCTS,
        floor=fixed(lambda d: 2.5 * math.log2(d), errors=1),
    ),
    "DCTAdamW, hadamard": Contestant(
        partial(projected, kind=DCTAdamW, projection="hadamard"), beside=PRODUCTS, floor=fixed(math.log2)
    ),
    "DCTAdamW, hadamard, rank 3/4": Contestant(
        partial(projected, kind=DCTAdamW, projection="hadamard", rank=0.75),
        floor=fixed(math.log2, share=0.75),
        sizes=FEW_SIZES,
    ),
    "AdamP": Contestant(partial(ours, kind=AdamP), floor=dense(2 * FLOAT, again=3 * FLOAT)),
    "SGDP": Contestant(partial(ours, kind=SGDP, momentum=0.9), beside=SGD, floor=dense(FLOAT, again=2 * FLOAT)),
    "LISA, 2 layers awake, AdamW": Contestant(
        partial(sampled, sampler=LISA, make=partial(ours, kind=AdamW)), sizes=FEW_SIZES
    ),
    "OwLore, 2 layers awake, GaLoreAdamW": Contestant(
        partial(sampled, sampler=OwLore, make=partial(projected, kind=GaLoreAdamW)), sizes=FEW_SIZES
    ),
}


# Peers. Each imports its package when it is built.


def peer(
    problem: Problem, package: str, name: str, settings: dict[str, Any], matrices: dict[str, Any] | None = None
) -> Runner:
    """A peer on the same groups; `matrices` are its settings of those that it projects."""
    kind = getattr(importlib.import_module(package), name)
    if matrices is None:
        return on(problem, kind(problem.params, lr=LR, weight_decay=DECAY, **settings))
    return on(problem, kind(problem.groups(**matrices), lr=LR, weight_decay=DECAY, **settings))


def by_rank(package: str, name: str, matrices: dict[str, Any], **settings: Any) -> Callable[[Problem], Runner]:
    """A peer that projects."""

    def build(problem: Problem) -> Runner:
        ranked = {"rank": problem.size.rank, "update_proj_gap": GAP} | matrices
        return peer(problem, package, name, settings, ranked)

    return build


def without_synchronize(build: Callable[[Problem], Runner]) -> Callable[[Problem], Runner]:
    """A peer that waits for a CUDA device after each parameter, also where there is none."""

    def shimmed(problem: Problem) -> Runner:
        runner = build(problem)
        if torch.cuda.is_available():
            return runner
        step = runner.step

        def silent() -> None:
            waiting, torch.cuda.synchronize = torch.cuda.synchronize, lambda *_: None
            try:
                step()
            finally:
                torch.cuda.synchronize = waiting

        return Runner(silent, runner.optimizer, runner.prepare)

    return shimmed


def from_torchao(name: str) -> Callable[[Problem], Runner]:
    """One of torchao's, which compile themselves; it says in warnings which kernels of other devices it misses."""

    def build(problem: Problem) -> Runner:
        logging.getLogger("torchao").setLevel(logging.ERROR)
        return peer(problem, "torchao.optim", name, {})

    return build


GALORE = {"scale": 0.25, "proj_type": "std"}
APOLLO = {"scale": 1.0, "proj_type": "std", "proj": "random", "scale_type": "channel"}
ADAFACTOR_SETTINGS = {"scale_parameter": False, "relative_step": False, "warmup_init": False}
PEERS: dict[str, Contestant] = {
    "galore-torch GaLoreAdamW": Contestant(
        by_rank("galore_torch", "GaLoreAdamW", GALORE, no_deprecation_warning=True), "galore-torch", beside=PRODUCTS
    ),
    "galore-torch GaLoreAdafactor": Contestant(
        by_rank("galore_torch", "GaLoreAdafactor", GALORE, **ADAFACTOR_SETTINGS),
        "galore-torch",
        beside=PRODUCTS,
        sizes=FEW_SIZES,
        in_low_precision=False,
    ),
    "galore-torch GaLoreAdamW8bit": Contestant(
        without_synchronize(by_rank("galore_torch", "GaLoreAdamW8bit", GALORE)),
        "galore-torch",
        beside=PRODUCTS,
        sizes=("60m-body", "60m", "small", "1b"),
        shim="it calls torch.cuda.synchronize after each parameter; without a GPU that is left out",
        in_low_precision=False,
    ),
    "apollo-torch APOLLOAdamW": Contestant(
        by_rank("apollo_torch", "APOLLOAdamW", APOLLO),
        "apollo-torch",
        beside=PRODUCTS,
        in_low_precision=False,
    ),
    "apollo-torch APOLLO-Mini": Contestant(
        by_rank("apollo_torch", "APOLLOAdamW", APOLLO | {"rank": 1, "scale": 128.0, "scale_type": "tensor"}),
        "apollo-torch",
        sizes=FEW_SIZES,
    ),
    "fira FiraAdamW": Contestant(
        by_rank("fira", "FiraAdamW", {"alpha": 0.25, "proj_type": "std"}, no_deprecation_warning=True),
        "fira",
        beside=PRODUCTS,
        sizes=("60m-body", "60m", "small", "1b"),
        in_low_precision=False,
    ),
    "adamp AdamP": Contestant(partial(peer, package="adamp", name="AdamP", settings={}), "adamp"),
    "adamp SGDP": Contestant(
        partial(peer, package="adamp", name="SGDP", settings={"momentum": 0.9}), "adamp", beside=SGD, sizes=FEW_SIZES
    ),
    "pytorch-optimizer GaLore": Contestant(
        by_rank("pytorch_optimizer", "GaLore", {"scale": 0.25, "projection_type": "std"}),
        "pytorch-optimizer",
        beside=PRODUCTS,
        sizes=FEW_SIZES,
        in_low_precision=False,
    ),
    "pytorch-optimizer AdaFactor": Contestant(
        partial(
            peer,
            package="pytorch_optimizer",
            name="AdaFactor",
            settings={"scale_parameter": False, "relative_step": False},
        ),
        "pytorch-optimizer",
        sizes=FEW_SIZES,
    ),
    "pytorch-optimizer AdamP": Contestant(
        partial(peer, package="pytorch_optimizer", name="AdamP", settings={}), "pytorch-optimizer", sizes=FEW_SIZES
    ),
    "bitsandbytes AdamW": Contestant(
        partial(peer, package="bitsandbytes.optim", name="AdamW", settings={}), "bitsandbytes", sizes=FEW_SIZES
    ),
    "bitsandbytes AdamW8bit": Contestant(
        partial(peer, package="bitsandbytes.optim", name="AdamW8bit", settings={}), "bitsandbytes"
    ),
    "torchao AdamW8bit, compiled": Contestant(
        from_torchao("AdamW8bit"), "torchao", sizes=("60m-body",), in_low_precision=False
    ),
    FOREACH: Contestant(partial(torchs, foreach=True), "torch", floor=dense(2 * FLOAT)),
    LOOP: Contestant(partial(torchs, foreach=False), "torch", floor=dense(2 * FLOAT)),
}


@contextlib.contextmanager
def stand_in_decompositions(problem: Problem) -> Iterator[None]:
    """Peers decompose each matrix wholly in the first step: minutes at sizes that only their steps are timed at.

    There their singular vectors are random orthonormal ones, of the shapes and memory that they would have had.
    """
    if problem.device != "cpu" or max(min(s) for s in problem.size.projected) <= 1024:
        yield
        return

    def svd(a: Tensor, full_matrices: bool = True, **_: Any) -> tuple[Tensor, Tensor, Tensor]:
        m, n = a.shape
        low = min(m, n)
        left = torch.linalg.qr(torch.randn(m, m if full_matrices else low)).Q
        right = torch.linalg.qr(torch.randn(n, low)).Q
        rows = torch.empty(n if full_matrices else low, n)
        rows[:low] = right.mT
        return left.to(a.dtype), torch.ones(low, dtype=a.dtype), rows.to(a.dtype)

    original, torch.linalg.svd = torch.linalg.svd, svd
    try:
        yield
    finally:
        torch.linalg.svd = original


def fitted(optimizer: torch.optim.Optimizer | None) -> int:
    """How many bases an optimizer of this package has fitted so far; 0 for others."""
    if optimizer is None:
        return 0
    states = (state for state in optimizer.state.values() if isinstance(state, dict))
    return sum(int(state.get("refreshes", 0)) for state in states)


def tensors(x: Any) -> Iterator[Tensor]:
    """The tensors in a value: in containers, in objects, and inside tensor subclasses."""
    if isinstance(x, Tensor):
        if hasattr(x, "__tensor_flatten__"):
            for name in x.__tensor_flatten__()[0]:
                yield from tensors(getattr(x, name))
        else:
            yield x
        return
    if isinstance(x, dict):
        x = list(x.values())
    elif hasattr(x, "__dict__") and not callable(x):
        x = list(vars(x).values())
    if isinstance(x, list | tuple):
        for value in x:
            yield from tensors(value)


def held_bytes(x: Any) -> dict[int, int]:
    """The storages that a value keeps alive, by address."""
    storages = (t.untyped_storage() for t in tensors(x))
    return {storage.data_ptr(): storage.nbytes() for storage in storages}
