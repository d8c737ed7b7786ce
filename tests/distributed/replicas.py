"""What the processes of the data-parallel tests do: each has all of a network, and sees a part of each batch."""

import copy
import warnings

import torch
import torch.distributed as dist
from torch.nn.parallel import DistributedDataParallel

from cases import CASES, assert_equal, build
from fully_sharded import backward, network
from slimstate.optim import LISA
from slimstate.projections import SVD


def agree(net):
    """Whether the weights of all processes are the same, bit for bit."""
    mine = torch.cat([p.detach().reshape(-1) for p in net.parameters()])
    everyone = [torch.empty_like(mine) for _ in range(dist.get_world_size())]
    dist.all_gather(everyone, mine)
    return mine.isfinite().all().item() and all(torch.equal(x, mine) for x in everyone)


def replicas_agree(name, sampled, steps):
    torch.manual_seed(dist.get_rank())  # a global generator that differs must not matter
    net = network(torch.float32)
    before = [p.detach().clone() for p in net.parameters()]
    optimizer = build(name, net.named_parameters())
    wrapped = DistributedDataParallel(net, find_unused_parameters=sampled)
    sampler = LISA(net, optimizer, "layers", active=1, interval=3) if sampled else None
    same = []
    for i in range(steps):
        backward(wrapped, i, dist.get_rank(), dist.get_world_size())
        optimizer.step()
        if sampler is not None:
            sampler.step()
        if i % 50 == 49 or i == steps - 1:
            same.append(agree(net))
    moved = all(not torch.equal(p, x) for p, x in zip(net.parameters(), before, strict=True))
    return same, moved


def refreshes_are_shared(name, steps):
    """Weights and bases with the work of a refresh shared, and alone; and how often each process decomposed."""
    from slimstate.optim._sharding import Ranks

    nets = [network(), network()]
    optimizers = [build(name, net.named_parameters()) for net in nets]
    optimizers[0]._sharing = Ranks((dist.group.WORLD,), (False,))
    counts = []
    for net, optimizer in zip(nets, optimizers, strict=True):
        count = 0
        for i in range(steps):
            backward(net, i)
            with counted() as calls:
                optimizer.step()
            count += len(calls)
        counts.append(count)
    states = [
        [{k: v for k, v in o.state[p].items() if k in ("basis", "index", "refreshes")} for p in net.parameters()]
        for o, net in zip(optimizers, nets, strict=True)
    ]
    assert_equal(states[0], states[1])
    assert_equal(*[[p.detach() for p in net.parameters()] for net in nets])
    return agree(nets[0]), counts


class counted:
    """Lists the fits of an SVD."""

    def __enter__(self):
        self.calls, self.before = [], SVD.fit

        def fit(projection, *args):
            self.calls.append(args[0].shape)
            return self.before(projection, *args)

        SVD.fit = fit
        return self.calls

    def __exit__(self, *_):
        SVD.fit = self.before


def redundancy_is_zero(name, steps):
    """ZeroRedundancyOptimizer around one of ours, its checkpoint, and what each process keeps."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # torch's own deprecations
        from torch.distributed.optim import ZeroRedundancyOptimizer

    kind, matrices, common = CASES[name]

    def wrapped(net):
        settings = {"lr": 0.02, **matrices, **common}
        return ZeroRedundancyOptimizer(net.parameters(), optimizer_class=kind, **settings)

    def train(net, optimizer, start, stop):
        data_parallel = DistributedDataParallel(net)
        for i in range(start, stop):
            backward(data_parallel, i, dist.get_rank(), dist.get_world_size())
            optimizer.step()

    net, other = network(), network(seed=1)
    optimizer = wrapped(net)
    train(net, optimizer, 0, steps)
    mine = sum(len(group["params"]) for group in optimizer.optim.param_groups)
    optimizer.consolidate_state_dict(to=0)
    states = [optimizer.state_dict() if dist.get_rank() == 0 else None]
    dist.broadcast_object_list(states, src=0)
    other.load_state_dict(net.state_dict())
    resumed = wrapped(other)
    resumed.load_state_dict(copy.deepcopy(states[0]))
    train(net, optimizer, steps, 2 * steps)
    train(other, resumed, steps, 2 * steps)
    assert_equal(*[[p.detach() for p in x.parameters()] for x in (net, other)])
    return agree(net), mine, len(list(net.parameters())), len(states[0]["state"])
