"""A small network that processes train together, and what they do to it: fully_shard, tensor parallel."""

import copy
from functools import cache

import torch
import torch.distributed as dist
from torch import nn
from torch.distributed.fsdp import MixedPrecisionPolicy, fully_shard
from torch.distributed.tensor import DTensor, Replicate, Shard, init_device_mesh
from torch.distributed.tensor.parallel import (
    ColwiseParallel,
    PrepareModuleInput,
    PrepareModuleOutput,
    RowwiseParallel,
    SequenceParallel,
    parallelize_module,
)

from cases import CASES, build
from slimstate.optim import Monitor

TOKENS, LENGTH, BATCH = 11, 12, 12  # a batch that 2, 3 and 4 processes divide alike


class Block(nn.Module):
    def __init__(self, width, hidden):
        super().__init__()
        self.norm = nn.LayerNorm(width)
        self.up = nn.Linear(width, hidden)
        self.down = nn.Linear(hidden, width)

    def forward(self, x):
        return x + self.down(torch.tanh(self.up(self.norm(x))))


class Experts(nn.Module):
    """A stack of matrices, whose outputs are added up."""

    def __init__(self, count, width):
        super().__init__()
        self.weight = nn.Parameter(torch.randn(count, 6, width) / 4)

    def forward(self, x):
        return x + (torch.tanh(x.unsqueeze(1) @ self.weight.mT) @ self.weight).sum(1)


class Network(nn.Module):
    """Rows that 2 processes divide (12), that they do not (11), and fewer than 4 (3)."""

    def __init__(self, width=12, hidden=16, experts=0):
        super().__init__()
        self.embedding = nn.Embedding(TOKENS, width)
        self.layers = nn.ModuleList(Block(width, hidden) for _ in range(3))
        if experts:
            self.experts = Experts(experts, width)
        self.conv = nn.Conv1d(width, 10, 3)
        self.head = nn.Linear(10, 3)

    def forward(self, tokens):
        x = self.embedding(tokens)
        for layer in self.layers:
            x = layer(x)
        if hasattr(self, "experts"):
            x = self.experts(x)
        return self.head(self.conv(x.mT).mT)


def network(dtype=torch.float64, seed=0, **sizes):
    torch.manual_seed(seed)
    return Network(**sizes).to(dtype)


def batch(i):
    """Tokens and targets of batch number i."""
    generator = torch.Generator().manual_seed(i)
    tokens = torch.randint(TOKENS, (BATCH, LENGTH), generator=generator)
    return tokens, torch.randn(BATCH, LENGTH - 2, 3, generator=generator, dtype=torch.float64)


def share(x, rank, size):
    """The part of a batch that falls to a process."""
    return x.chunk(size)[rank]


def backward(net, i, rank=0, size=1):
    """The gradients of a process' part of batch number i."""
    net.zero_grad()
    tokens, targets = (share(x, rank, size) for x in batch(i))
    out = net(tokens)
    loss = nn.functional.mse_loss(out, targets.to(out.dtype))
    loss.backward()
    return loss.detach()


def whole(p):
    return p.detach().full_tensor() if isinstance(p, DTensor) else p.detach()


def distance(net, other, start):
    """The largest difference of two networks' weights over the distance that they moved."""
    worst = 0.0
    for (name, p), q, x in zip(net.named_parameters(), other.parameters(), start, strict=True):
        assert p.shape == q.shape
        a, b = whole(p), whole(q)
        assert a.isfinite().all(), name
        worst = max(worst, ((a - b).norm() / (b - x).norm()).item())
    return worst


@cache
def mesh_of(*shape):
    names = ("data",) if len(shape) == 1 else ("outer", "inner")
    return init_device_mesh("cpu", shape, mesh_dim_names=names)


# How a network is divided. Each returns what its data-parallel rank and size are.


def place():
    return dist.get_rank(), dist.get_world_size()


def by_rows(net, mesh=None, **settings):
    mesh = mesh or mesh_of(dist.get_world_size())
    for layer in net.layers:
        fully_shard(layer, mesh=mesh, **settings)
    fully_shard(net, mesh=mesh, **settings)
    return place()


def by_columns(net):
    """What fully_shard can divide evenly by its columns."""
    size = dist.get_world_size()
    return by_rows(net, shard_placement_fn=lambda p: Shard(int(p.ndim > 1 and p.shape[1] % size == 0)))


def in_bfloat16(net):
    return by_rows(net, mp_policy=MixedPrecisionPolicy(param_dtype=torch.bfloat16, reduce_dtype=torch.float32))


def replicated_shards(net):
    """Shards in pairs of processes, and every pair the same."""
    return by_rows(net, mesh_of(dist.get_world_size() // 2, 2))


def blocks_alone(net):
    """What is in no block stays plain, and its gradients are averaged as DDP would."""
    for layer in net.layers:
        fully_shard(layer, mesh=mesh_of(dist.get_world_size()))
    for p in net.parameters():
        if not isinstance(p, DTensor):
            p.register_post_accumulate_grad_hook(lambda p: dist.all_reduce(p.grad, dist.ReduceOp.AVG))
    return place()


def experts_alone(net):
    fully_shard(net.experts, mesh=mesh_of(dist.get_world_size()))
    return by_rows(net)


def tensor_parallel(net, mesh=None):
    """Linear layers by their columns and then by their rows; norms see a part of the sequence each."""
    mesh = mesh or mesh_of(dist.get_world_size())
    for layer in net.layers:
        parallelize_module(
            layer,
            mesh,
            {
                "norm": SequenceParallel(),
                "up": ColwiseParallel(input_layouts=Shard(1)),
                "down": RowwiseParallel(output_layouts=Shard(1)),
            },
        )
        inputs = PrepareModuleInput(
            input_layouts=(Replicate(),), desired_input_layouts=(Shard(1),), use_local_output=True
        )
        outputs = PrepareModuleOutput(output_layouts=(Shard(1),), desired_output_layouts=(Replicate(),))
        parallelize_module(layer, mesh, inputs)
        parallelize_module(layer, mesh, outputs)
    return 0, 1


def tensor_parallel_and_sharded(net):
    mesh = mesh_of(dist.get_world_size() // 2, 2)
    tensor_parallel(net, mesh["inner"])
    by_rows(net, mesh["outer"])
    return mesh["outer"].get_local_rank(), mesh["outer"].size()


def groups_of(net, name):
    """The network's parameters by name, and its stack of experts as a group of its own."""
    named = list(net.named_parameters())
    experts = [pair for pair in named if pair[0].startswith("experts")]
    stacked = {"batch_dims": 1} if CASES[name][1] else {}
    groups = [{"params": [pair for pair in named if pair not in experts]}]
    return [*groups, {"params": experts, **stacked}] if experts else groups


def swapped(optimizer, net, old):
    """What accelerate does when a network is prepared after its optimizer: new lists, by what they were before."""
    names = {id(p): name for name, p in old.items()}
    new = dict(net.named_parameters())
    for group in optimizer.param_groups:
        group["params"] = [new[names[id(p)]] for p in group["params"]]


def trains_as_one(name, divide, steps=6, dtype=torch.float64, sizes=None, swap=False, max_norm=None, **settings):
    """The distance between what these processes train together and what one trains with all of each batch."""
    net, alone = network(dtype, **(sizes or {})), network(dtype, **(sizes or {}))
    start = [p.detach().clone() for p in alone.parameters()]
    reference = build(name, groups_of(alone, name), **settings)
    if swap:
        optimizer, old = build(name, groups_of(net, name), **settings), dict(net.named_parameters())
        rank, size = divide(net)
        swapped(optimizer, net, old)
    else:
        rank, size = divide(net)
        optimizer = build(name, groups_of(net, name), **settings)
    low = divide is in_bfloat16
    for i in range(steps):
        backward(net, i, rank, size)
        if low:
            backward_in_bfloat16(alone, i, size)
        else:
            backward(alone, i)
        if max_norm is not None:
            norms = [torch.nn.utils.clip_grad_norm_(x.parameters(), max_norm) for x in (net, alone)]
            assert norms[1] > max_norm
        optimizer.step()
        reference.step()
    return distance(net, alone, start)


def monitored(name, divide, sizes=None):
    """What Monitors report of these processes' training, and of one that trains with all of each batch."""
    net, alone = (network(torch.float64, **(sizes or {})) for _ in range(2))
    rank, size = divide(net)
    optimizers = [build(name, groups_of(x, name)) for x in (net, alone)]
    reports = [], []
    for optimizer, kept in zip(optimizers, reports, strict=True):
        Monitor(optimizer, lambda step, values, kept=kept: kept.append((step, values)), every=2, per_matrix=True)
    for i in range(5):
        backward(net, i, rank, size)
        backward(alone, i)
        for optimizer in optimizers:
            optimizer.step()
    return reports


def backward_in_bfloat16(net, i, size):
    """What the processes together compute in low precision, of weights that are kept in another."""
    net.zero_grad()
    for rank in range(size):
        low = copy.deepcopy(net).to(torch.bfloat16)
        backward(low, i, rank, size)
        for p, q in zip(net.parameters(), low.parameters(), strict=True):
            part = q.grad.to(p.dtype) / size
            p.grad = part if p.grad is None else p.grad + part


# What else happens to networks in training.


def steps_that_are_skipped(name, policy):
    """One process has a bad gradient: what each of them did about it, and the state of its counters and weights."""
    net = network()
    rank, size = by_rows(net)
    optimizer = build(name, net.parameters(), nonfinite=policy)
    backward(net, 0, rank, size)
    optimizer.step()
    before = [p.detach().to_local().clone() for p in net.parameters()]
    backward(net, 1, rank, size)
    weight = net.layers[1].up.weight.grad.to_local()
    if rank == size - 1:
        weight[0, 0] = float("nan")
    try:
        optimizer.step()
        said = None
    except FloatingPointError as error:
        said = str(error)
    same = all(torch.equal(p.to_local(), x) for p, x in zip(net.parameters(), before, strict=True))
    steps = {optimizer.state[p]["step"].item() for p in net.parameters()}
    return said, same, steps, optimizer.param_groups[0]["nonfinite_steps"]


def sampled(kind, name, divide, steps=9, **settings):
    """The distance from the same training of whole layers, and per step: who is awake, and who has gradients and
    state."""
    net, alone = network(), network()
    start = [p.detach().clone() for p in alone.parameters()]
    rank, size = divide(net)
    optimizers = [build(name, x.named_parameters()) for x in (net, alone)]
    samplers = [
        kind(x, o, "layers", active=1, interval=2, **settings) for x, o in zip((net, alone), optimizers, strict=True)
    ]
    seen = []
    for i in range(steps):
        backward(net, i, rank, size)
        backward(alone, i)
        grads = [name for name, layer in net.named_modules() if isinstance(layer, Block) and any_grad(layer)]
        for optimizer, sampler in zip(optimizers, samplers, strict=True):
            optimizer.step()
            sampler.step()
        kept = [any("step" in optimizers[0].state.get(p, {}) for p in layer.parameters()) for layer in net.layers]
        seen.append((grads, samplers[0].awake, kept))
    assert samplers[0].probabilities == samplers[1].probabilities
    return distance(net, alone, start), seen


def any_grad(layer):
    return any(p.grad is not None for p in layer.parameters())


def scores(divide, own):
    """The outlier scores of a divided network and of a whole one, of weights with outliers, alone and with inputs."""
    from slimstate.optim import outlier_scores

    net, alone = network(), network()
    for x in (net, alone):
        for i, layer in enumerate(x.layers):
            layer.up.weight.data.view(-1)[: 3 * i + 1] *= 100
            layer.down.weight.data.view(-1)[-2 * i - 1 :] *= 100
    rank, size = divide(net)
    if divide is by_rows:
        with torch.no_grad():
            net(batch(9)[0])  # and the root's weights stay gathered
    batches = [(batch(i)[0],) for i in range(2)]
    mine = [(share(x, rank, size),) for (x,) in batches] if own else batches
    names = [f"layers.{i}" for i in range(3)]
    return (
        (outlier_scores(net, names), outlier_scores(net, names, mine, tau=5.0), outlier_scores(net, ["head"], mine)),
        (
            outlier_scores(alone, names),
            outlier_scores(alone, names, batches, tau=5.0),
            outlier_scores(alone, ["head"], batches),
        ),
    )


def told(function, *args, **kwargs):
    """The type and text of what is raised."""
    try:
        function(*args, **kwargs)
    except Exception as error:
        return type(error).__name__, str(error)
    return None


def flattened_by_fsdp1(original, late):
    """What is said about FSDP1: at construction, or by the first step of an optimizer that was there before."""
    from torch.distributed.fsdp import FullyShardedDataParallel

    from slimstate.optim import AdamP, AdamW, GaLoreAdamW

    said = []
    for kind in (AdamW, AdamP, GaLoreAdamW):
        net = nn.Sequential(nn.Linear(8, 8), nn.Linear(8, 3))
        optimizer = kind(net.parameters()) if late else None
        wrapped = FullyShardedDataParallel(net, use_orig_params=original, device_id=torch.device("cpu"))
        if not late:
            said.append(told(kind, wrapped.parameters()))
            continue
        wrapped(torch.randn(2, 8)).sum().backward()
        before = [p.detach().clone() for p in wrapped.parameters()]
        said.append(told(optimizer.step))
        assert all(torch.equal(p, x) for p, x in zip(wrapped.parameters(), before, strict=True))
    return said


def in_backward_is_refused():
    from slimstate.optim import in_backward

    net, later = network(), network()
    early = build("GaLoreAdamW, svd, rotate", later.named_parameters())
    in_backward(early)
    by_rows(net)
    old = dict(later.named_parameters())
    rank, size = by_rows(later)
    swapped(early, later, old)
    optimizer = build("GaLoreAdamW, svd, rotate", net.parameters())
    answers = [told(in_backward, optimizer), optimizer._in_backward]
    backward(later, 0, rank, size)
    return [*answers, told(early.step), sum(map(len, early.state.values()))]
