import copy
import io
import itertools
import math

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from scipy import stats
from torch import nn
from torch.distributed.checkpoint.state_dict import get_optimizer_state_dict, set_optimizer_state_dict

from slimstate.optim import LISA, AdamW, GaLoreAdamW, OwLore, outlier_scores, param_groups, state_bytes
from slimstate.optim.layer_sampling import FLOOR, find_layers

POLICIES = ["drop", "keep", "offload"]
WIDTH, VOCABULARY, DEPTH = 16, 30, 5


class Block(nn.Module):
    def __init__(self, width=WIDTH, hidden=20):
        super().__init__()
        self.norm = nn.LayerNorm(width)
        self.up = nn.Linear(width, hidden)
        self.down = nn.Linear(hidden, width)

    def forward(self, x):
        return x + self.down(torch.tanh(self.up(self.norm(x))))


class Network(nn.Module):
    """Tokens in, logits out; `hidden` of each block may differ, so that layers have sizes of their own."""

    def __init__(self, depth=DEPTH, hidden=None, seed=0):
        torch.manual_seed(seed)
        super().__init__()
        self.embed = nn.Embedding(VOCABULARY, WIDTH)
        self.layers = nn.ModuleList(Block(hidden=(hidden or [20] * depth)[i]) for i in range(depth))
        self.norm = nn.LayerNorm(WIDTH)
        self.head = nn.Linear(WIDTH, VOCABULARY, bias=False)

    def forward(self, ids):
        x = self.embed(ids)
        for layer in self.layers:
            x = layer(x)
        return self.head(self.norm(x))


def dense(model):
    return AdamW(model.named_parameters(), lr=0.01, weight_decay=0.1)


def torchs(model):
    return torch.optim.AdamW(model.parameters(), lr=0.01, weight_decay=0.1)


def galore(model, projection="svd", **settings):
    return GaLoreAdamW(param_groups(model, rank=3, projection=projection, update_proj_gap=3, **settings), lr=0.01)


def random_galore(model):
    return galore(model, projection="random")


OPTIMIZERS = [dense, torchs, galore, random_galore]
every = pytest.mark.parametrize("make", OPTIMIZERS)


def backward(model, i, parts=1):
    """The gradients of batch number i, accumulated over its parts."""
    ids = torch.randint(VOCABULARY, (8, 9), generator=torch.Generator().manual_seed(i))
    model.zero_grad()
    for part in ids.chunk(parts):
        loss = nn.functional.cross_entropy(model(part[:, :-1]).flatten(0, 1), part[:, 1:].flatten())
        (loss / parts).backward()


def train(model, optimizer, sampler, start, stop, parts=1):
    for i in range(start, stop):
        backward(model, i, parts)
        optimizer.step()
        sampler.step()


def weights(model):
    return {name: p.detach().clone() for name, p in model.named_parameters()}


def same(a, b):
    return a.keys() == b.keys() and all(torch.equal(a[name], b[name]) for name in a)


def owner(name):
    """The layer that a parameter is in, or None."""
    return ".".join(name.split(".")[:2]) if name.startswith("layers.") else None


def formula(model, awake, per_tensor=4, per_weight=8):
    """Bytes: two float32 moments a weight and a step for every tensor that is in no layer or in one that is awake."""
    held = [p for name, p in model.named_parameters() if owner(name) in (None, *awake)]
    return sum(per_weight * p.numel() + per_tensor for p in held)


# Limits.


@every
@pytest.mark.parametrize("policy", POLICIES)
def test_all_layers_active_is_the_inner_optimizer(make, policy):
    a, b = Network(), Network()
    optimizer, reference = make(a), make(b)
    sampler = LISA(a, optimizer, active=DEPTH, interval=2, state_policy=policy)
    for i in range(7):
        train(a, optimizer, sampler, i, i + 1)
        backward(b, i)
        reference.step()
    assert same(weights(a), weights(b))
    if make is torchs:
        c = Network()
        optimizer = torchs(c)
        train(c, optimizer, OwLore(c, optimizer, scores=[1, 2, 3, 4, 5], active=DEPTH, interval=1), 0, 7)
        assert same(weights(a), weights(c))


def test_all_layers_at_full_rank_are_adamw_in_the_rotated_basis():
    model = Network().double()
    w = model.layers[1].up.weight
    groups = [{"params": [w], "rank": WIDTH}, {"params": [p for p in model.parameters() if p is not w]}]
    optimizer = GaLoreAdamW(groups, lr=0.01, scale=1.0, update_proj_gap=10**9, weight_decay=0.0, eps=1e-6)
    sampler = OwLore(model, optimizer, active=DEPTH, interval=2, state_policy="keep")
    start, grads = w.detach().clone(), []
    for i in range(6):
        backward(model, i)
        grads.append(w.grad.clone())
        optimizer.step()
        sampler.step()
    q = optimizer.state[w]["basis"]
    rotated = nn.Parameter(start @ q)  # the columns are the shorter side
    reference = torch.optim.AdamW([rotated], lr=0.01, weight_decay=0.0, eps=1e-6)
    for g in grads:
        rotated.grad = g @ q
        reference.step()
    torch.testing.assert_close(w @ q, rotated, rtol=1e-9, atol=1e-9)


# Sleeping layers.


@every
@pytest.mark.parametrize("policy", POLICIES)
def test_sleeping_layers_stand_still_and_awake_ones_move(make, policy):
    model = Network()
    optimizer = make(model)
    sampler = LISA(model, optimizer, interval=3, state_policy=policy, seed=4)
    for interval in range(6):
        before, awake = weights(model), sampler.awake
        for name, p in model.named_parameters():
            assert p.requires_grad == (owner(name) in (None, *awake))
        train(model, optimizer, sampler, 3 * interval, 3 * interval + 2)
        for name, p in model.named_parameters():
            assert torch.equal(p, before[name]) == (owner(name) not in (None, *awake)), name
            assert (p.grad is None) == (owner(name) not in (None, *awake))
        train(model, optimizer, sampler, 3 * interval + 2, 3 * interval + 3)
    for name, p in model.named_parameters():
        if owner(name) not in (None, *sampler.awake):
            assert p.grad is None


@every
def test_a_layer_that_wakes_begins_anew_under_drop(make):
    model = Network()
    optimizer = make(model)
    sampler = LISA(model, optimizer, interval=3, seed=1)
    awake, bases = sampler.awake, {}
    woken = 0
    for interval in range(1, 12):
        train(model, optimizer, sampler, 3 * interval, 3 * interval + 3)
        stayed, awake = set(awake) & set(sampler.awake), sampler.awake
        for name, p in model.named_parameters():
            if owner(name) is not None and owner(name) not in stayed:
                assert optimizer.state.get(p, {}).keys() <= {"stream"}
        backward(model, 0)
        steps = {p: copy.deepcopy(optimizer.state[p]["step"]) for p in optimizer.state if "step" in optimizer.state[p]}
        optimizer.step()  # not counted by the sampler
        for name, p in model.named_parameters():
            if owner(name) in awake:
                assert optimizer.state[p]["step"].item() == steps.get(p, 0) + 1
                woken += p not in steps
                if p not in steps and "basis" in optimizer.state[p]:
                    assert optimizer.state[p]["refreshes"].item() == 1
                    bases.setdefault(name, []).append(optimizer.state[p]["basis"].clone())
    assert woken > 20
    if make is random_galore:
        pairs = [pair for fits in bases.values() for pair in itertools.combinations(fits, 2)]
        assert len(pairs) > 5
        assert not any(torch.equal(a, b) for a, b in pairs)


@pytest.mark.parametrize("policy", ["keep", "offload"])
def test_a_layer_that_wakes_goes_on_under_keep(policy):
    model = Network()
    optimizer = dense(model)
    sampler = LISA(model, optimizer, interval=2, state_policy=policy, seed=1)
    counts = dict.fromkeys((f"layers.{i}" for i in range(DEPTH)), 0)
    for i in range(40):
        for name in sampler.awake:
            counts[name] += 1
        train(model, optimizer, sampler, i, i + 1)
    assert all(counts.values())
    for name, p in model.named_parameters():
        assert optimizer.state[p]["step"].item() == counts.get(owner(name), 40)


# Memory.


@pytest.mark.parametrize("make", [dense, torchs])
@given(hidden=st.lists(st.integers(3, 40), min_size=2, max_size=7), data=st.data(), interval=st.integers(1, 3))
def test_state_is_the_formula_at_every_moment(make, hidden, data, interval):
    active = data.draw(st.integers(1, len(hidden)))
    model = Network(len(hidden), hidden)
    optimizer = make(model)
    sampler = LISA(model, optimizer, active=active, interval=interval, seed=data.draw(st.integers(0, 99)))
    largest = sorted(sum(8 * p.numel() + 4 for p in layer.parameters()) for layer in model.layers)[-active:]
    for i in range(6):
        awake = sampler.awake
        backward(model, i)
        optimizer.step()
        assert state_bytes(optimizer) == formula(model, awake) <= formula(model, []) + sum(largest)
        sampler.step()
        # After a switch, before the next step: what has stayed awake, and nothing of the others.
        assert state_bytes(optimizer) == formula(model, set(awake) & set(sampler.awake))


def test_galore_states_of_sleeping_layers_are_gone():
    model = Network()
    optimizer = galore(model)
    sampler = LISA(model, optimizer, interval=2, seed=3)
    for i in range(12):
        awake = sampler.awake
        train(model, optimizer, sampler, i, i + 1)
        projected = [p for layer in model.layers for p in (layer.up.weight, layer.down.weight)]
        # 16 x 20: two moments of 3 x 20, a basis of 16 x 3, and 4 bytes each of step and refreshes.
        one = 4 * (2 * 3 * 20 + 16 * 3) + 8
        stayed = set(awake) & set(sampler.awake)
        assert state_bytes(optimizer, projected) == 2 * one * len(stayed)


def test_keep_grows_to_all_layers():
    model = Network()
    optimizer = dense(model)
    train(model, optimizer, LISA(model, optimizer, interval=1, state_policy="keep"), 0, 30)
    assert state_bytes(optimizer) == formula(model, [f"layers.{i}" for i in range(DEPTH)])


@pytest.mark.gpu
@every
def test_offloaded_state_waits_on_the_cpu_and_comes_back(make):
    models = [Network().cuda(), Network().cuda()]
    optimizers = [make(model) for model in models]
    samplers = [
        LISA(model, optimizer, interval=2, state_policy=policy)
        for model, optimizer, policy in zip(models, optimizers, ("keep", "offload"), strict=True)
    ]

    def cuda_step(start, stop):
        for i in range(start, stop):
            for model, optimizer, sampler in zip(models, optimizers, samplers, strict=True):
                ids = torch.randint(VOCABULARY, (8, 9), generator=torch.Generator().manual_seed(i)).cuda()
                model.zero_grad()
                nn.functional.cross_entropy(model(ids[:, :-1]).flatten(0, 1), ids[:, 1:].flatten()).backward()
                optimizer.step()
                sampler.step()

    def check():
        for name, p in models[1].named_parameters():
            asleep = owner(name) not in (None, *samplers[1].awake)
            for key, x in optimizers[1].state.get(p, {}).items():
                if isinstance(x, torch.Tensor) and x.ndim:
                    assert x.device.type == ("cpu" if asleep else "cuda"), (name, key)
                    assert x.is_pinned() == asleep

    for i in range(11):
        cuda_step(i, i + 1)
        check()
    optimizers[1].load_state_dict(copy.deepcopy(optimizers[1].state_dict()))
    check()
    cuda_step(11, 16)
    torch.testing.assert_close(weights(models[0]), weights(models[1]))


# Draws.


def sampler_of(count, active, scores=None, seed=0):
    model = nn.Sequential(*(nn.Linear(2, 2) for _ in range(count)))
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    layers = list(model)
    if scores is None:
        return LISA(model, optimizer, layers, active=active, seed=seed)
    return OwLore(model, optimizer, layers, scores=scores, active=active, seed=seed)


def inclusions(sampler, intervals):
    names = list(sampler.probabilities)
    table = torch.zeros(intervals, len(names))
    for j in range(intervals):
        for name in sampler.draw(j):
            table[j, names.index(name)] += 1
    return table


SCORES = st.lists(st.one_of(st.just(0.0), st.floats(1e-6, 1e3)), min_size=1, max_size=12)


@given(scores=SCORES, data=st.data(), seed=st.integers(-(2**40), 2**70))
def test_exactly_so_many_different_layers_are_drawn(scores, data, seed):
    active = data.draw(st.integers(1, len(scores)))
    sampler = sampler_of(len(scores), active, scores, seed)
    table = inclusions(sampler, 30)
    assert (table.sum(1) == active).all()
    assert (table <= 1).all()
    certain = torch.tensor([p == 1 for p in sampler.probabilities.values()])
    assert (table[:, certain] == 1).all()


@pytest.mark.parametrize(
    ("count", "active", "scores"),
    [
        (12, 2, None),
        (7, 5, None),
        (5, 1, None),
        (6, 2, [0.3, 0.02, 0.08, 0.05, 0.02, 0.08]),
        (8, 5, [0.3, 0.25, 0.02, 0.02, 0.03, 0.02, 0.02, 0.08]),
        (4, 1, [1.0, 0.0, 0.0, 0.5]),
    ],
)
@pytest.mark.parametrize("seed", [0, 1])
def test_inclusion_frequencies_are_the_declared_ones(count, active, scores, seed):
    sampler = sampler_of(count, active, scores, seed)
    n = 4000
    counts = inclusions(sampler, n).sum(0)
    p = torch.tensor(list(sampler.probabilities.values()))
    assert p.sum().item() == pytest.approx(active)
    for count_of, share in zip(counts.tolist(), p.tolist(), strict=True):
        if share < 1:
            observed, expected = [count_of, n - count_of], [n * share, n * (1 - share)]
            assert stats.chisquare(observed, expected).pvalue > 1e-4
        else:
            assert count_of == n


def test_every_set_of_layers_is_equally_likely_under_lisa():
    sampler = sampler_of(6, 2)
    counts = {}
    for j in range(6000):
        drawn = tuple(sampler.draw(j))
        counts[drawn] = counts.get(drawn, 0) + 1
    assert len(counts) == math.comb(6, 2)
    assert stats.chisquare(list(counts.values())).pvalue > 1e-3


def test_intervals_are_independent_of_each_other():
    awake = inclusions(sampler_of(10, 2), 5000)
    again = (awake[1:] * awake[:-1]).sum().item() / (2 * 4999)
    assert again == pytest.approx(0.2, abs=0.02)


@given(scores=SCORES, data=st.data())
def test_probabilities_are_monotone_sum_to_active_and_ignore_scale_and_order(scores, data):
    active = data.draw(st.integers(1, len(scores)))
    p = list(sampler_of(len(scores), active, scores).probabilities.values())
    assert math.fsum(p) == pytest.approx(active)
    assert all(0 < x <= 1 for x in p)
    for (a, x), (b, y) in itertools.pairwise(sorted(zip(scores, p, strict=True))):
        assert x <= y
        if a == b:
            assert x == y
        elif FLOOR * max(scores) <= a and y < 1:  # proportional where nothing is raised or capped
            assert x / y == pytest.approx(a / b)
    assert list(sampler_of(len(scores), active, [4 * s for s in scores]).probabilities.values()) == p
    order = data.draw(st.permutations(range(len(scores))))
    moved = list(sampler_of(len(scores), active, [scores[i] for i in order]).probabilities.values())
    assert moved == [p[i] for i in order]


@pytest.mark.parametrize("scores", [[1.0] * 6, [0.037] * 6, [0.0] * 6])
def test_equal_scores_are_lisa(scores):
    for seed in range(5):
        a, b = sampler_of(6, 2, None, seed), sampler_of(6, 2, scores, seed)
        assert a.probabilities == b.probabilities == dict.fromkeys(map(str, range(6)), 1 / 3)
        assert [a.draw(j) for j in range(50)] == [b.draw(j) for j in range(50)]


def test_a_single_score_keeps_the_others_rare_but_possible():
    sampler = sampler_of(5, 1, [0.0, 0.0, 1.0, 0.0, 0.0])
    p = sampler.probabilities
    assert p["2"] == pytest.approx(1 / (1 + 4 * FLOOR))
    model = Network()
    optimizer = dense(model)
    sampler = OwLore(model, optimizer, scores=[0, 0, 1.0, 0, 0], active=1, interval=2)
    before = weights(model)
    train(model, optimizer, sampler, 0, 6)
    assert [sampler.draw(j) for j in range(3)] == [["layers.2"]] * 3
    moved = {owner(name) for name, p in model.named_parameters() if not torch.equal(p, before[name])}
    assert moved == {None, "layers.2"}
    # Two of them: the second is any of those that score nothing.
    p = sampler_of(5, 2, [0.0, 0.0, 1.0, 0.0, 0.0]).probabilities
    assert p["2"] == 1 and p["0"] == pytest.approx(0.25)


@given(seed=st.integers(0, 2**63), global_seed=st.integers(0, 1000))
def test_draws_depend_on_seed_and_interval_alone(seed, global_seed):
    a = sampler_of(9, 3, None, seed)
    expected = [a.draw(j) for j in range(5)]
    torch.manual_seed(global_seed)
    torch.rand(3)
    b = sampler_of(9, 3, None, seed)  # as on another rank, with other random state
    assert [b.draw(j) for j in reversed(range(5))] == expected[::-1]
    state = torch.get_rng_state()
    b.draw(7)
    assert torch.equal(state, torch.get_rng_state())


def test_seeds_differ():
    assert len({tuple(map(tuple, (sampler_of(9, 3, None, s).draw(j) for j in range(4)))) for s in range(20)}) == 20


def test_micro_batches_do_not_change_the_draws():
    drawn = []
    for parts in (1, 2, 4):
        model = Network()
        optimizer = dense(model)
        sampler, seen = LISA(model, optimizer, interval=2), []
        for i in range(10):
            train(model, optimizer, sampler, i, i + 1, parts)
            seen.append(sampler.awake)
        drawn.append(seen)
    assert drawn[0] == drawn[1] == drawn[2]


# Counting.


def test_attached_it_counts_the_steps_of_the_optimizer():
    a, b = Network(), Network()
    optimizers = dense(a), dense(b)
    attached, called = (LISA(n, o, interval=2) for n, o in zip((a, b), optimizers, strict=True))
    attached.attach()
    for i in range(7):
        train(b, optimizers[1], called, i, i + 1)
        backward(a, i)
        optimizers[0].step()
    assert attached.state_dict() == called.state_dict()
    assert same(weights(a), weights(b))
    with pytest.raises(RuntimeError, match=r"do not call step\(\)"):
        attached.step()
    with pytest.raises(RuntimeError, match="already attached"):
        attached.attach()
    attached.detach()
    attached.detach()
    attached.step()
    optimizers[0].step()
    assert attached.state_dict()["steps"] == 8


def test_a_step_that_the_scaler_skips_does_not_count():
    model = Network()
    optimizer = dense(model)
    sampler = LISA(model, optimizer, interval=3)
    sampler.attach()
    scaler = torch.amp.GradScaler("cpu", init_scale=4.0)
    for i in range(4):
        backward(model, i)
        if i == 1:
            model.norm.weight.grad[0] = math.nan
        scaler.scale(torch.zeros(()))
        scaler.unscale_(optimizer)
        scaler.step(optimizer)
        scaler.update()
    assert sampler.state_dict()["steps"] == 3


def test_schedulers_work_beside_it():
    model = Network()
    optimizer = dense(model)
    sampler = LISA(model, optimizer, interval=2)
    scheduler = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda i: 1 / (1 + i))
    for i in range(5):
        train(model, optimizer, sampler, i, i + 1)
        scheduler.step()
    assert optimizer.param_groups[0]["lr"] == pytest.approx(0.01 / 6)


# Checkpoints.


def saved(x):
    """Through a file, as a user would."""
    file = io.BytesIO()
    torch.save(x, file)
    file.seek(0)
    return torch.load(file, weights_only=True)


@every
@pytest.mark.parametrize("policy", POLICIES)
@pytest.mark.parametrize("attached", [False, True])
def test_resumed_in_mid_interval_it_goes_on_bit_for_bit(make, policy, attached):
    model = Network()
    optimizer = make(model)
    sampler = OwLore(model, optimizer, scores=[3, 1, 2, 1, 1], active=2, interval=4, state_policy=policy, seed=5)
    train(model, optimizer, sampler, 0, 10)
    checkpoint = saved(
        {"model": model.state_dict(), "optimizer": optimizer.state_dict(), "sampler": sampler.state_dict()}
    )

    other = Network(seed=1)
    resumed = make(other)
    second = OwLore(other, resumed, active=1, interval=3, state_policy=policy)
    other.load_state_dict(checkpoint["model"])
    loads = [(second, "sampler"), (resumed, "optimizer")]
    for part, key in loads if attached else loads[::-1]:
        part.load_state_dict(checkpoint[key])
    if attached:
        second.attach()
    assert (second.awake, second.probabilities) == (sampler.awake, sampler.probabilities)
    assert [p.requires_grad for p in other.parameters()] == [p.requires_grad for p in model.parameters()]
    assert state_bytes(resumed) == state_bytes(optimizer)
    for i in range(10, 21):
        train(model, optimizer, sampler, i, i + 1)
        backward(other, i)
        resumed.step()
        if not attached:
            second.step()
    assert same(weights(model), weights(other))
    assert second.state_dict() == sampler.state_dict()


def test_the_optimizer_may_be_loaded_before_the_sampler_is_made():
    model = Network()
    optimizer = dense(model)
    sampler = LISA(model, optimizer, interval=4)
    train(model, optimizer, sampler, 0, 10)
    other = copy.deepcopy(model)
    for p in other.parameters():
        p.requires_grad_(True)
    resumed = dense(other)
    resumed.load_state_dict(optimizer.state_dict())
    second = LISA(other, resumed)
    second.load_state_dict(sampler.state_dict())
    train(model, optimizer, sampler, 10, 15)
    train(other, resumed, second, 10, 15)
    assert same(weights(model), weights(other))


def test_state_of_layers_that_should_sleep_is_dropped_at_a_load():
    model = Network()
    optimizer = dense(model)
    sampler = LISA(model, optimizer, interval=4)
    state = sampler.state_dict()
    full = Network()
    everything = dense(full)
    backward(full, 0)
    everything.step()
    optimizer.load_state_dict(everything.state_dict())
    sampler.load_state_dict(state)
    assert state_bytes(optimizer) == formula(model, sampler.awake)


def test_distributed_checkpoints_of_a_sampled_optimizer():
    model = Network()
    optimizer = dense(model)
    sampler = LISA(model, optimizer, interval=4, seed=2)
    train(model, optimizer, sampler, 0, 10)
    other = Network()
    resumed = dense(other)
    second = LISA(other, resumed, interval=4, seed=2)
    other.load_state_dict(model.state_dict())
    second.load_state_dict(sampler.state_dict())
    set_optimizer_state_dict(other, resumed, get_optimizer_state_dict(model, optimizer))
    second.attach()
    train(model, optimizer, sampler, 10, 15)
    for i in range(10, 15):
        backward(other, i)
        resumed.step()
    assert second.state_dict() == sampler.state_dict()
    assert same(weights(model), weights(other))


def test_state_dict_holds_plain_values():
    sampler = sampler_of(4, 2, torch.tensor([1.0, 0.5, 0.5, 0.5]))
    plain = (int, float, str)
    for value in sampler.state_dict().values():
        assert type(value) in plain or (type(value) is list and all(type(x) in plain for x in value))


def test_a_wrapped_models_state_fits_the_bare_one():
    bare, wrapped = Network(), nn.ModuleDict({"module": Network()})
    a, b = LISA(bare, dense(bare), interval=3), LISA(wrapped, dense(wrapped))
    a.step()
    b.load_state_dict(a.state_dict())
    assert b.awake == [f"module.{name}" for name in a.awake]


def test_states_of_other_samplers_are_refused_whole():
    model = Network()
    sampler = LISA(model, dense(model), interval=2)
    before = sampler.state_dict()
    deeper = Network(depth=6)
    with pytest.raises(ValueError, match=r"6 layers, this one has 5; they differ in layers\.5"):
        sampler.load_state_dict(LISA(deeper, dense(deeper)).state_dict())
    with pytest.raises(ValueError, match="a sampler's state has steps, active"):
        sampler.load_state_dict({"steps": 3})
    with pytest.raises(ValueError, match="differ in their order"):
        sampler.load_state_dict(before | {"layers": before["layers"][::-1]})
    assert sampler.state_dict() == before


# Which parameters.


def test_what_is_frozen_at_construction_stays_frozen():
    model = Network()
    model.layers[1].requires_grad_(False)
    model.layers[2].up.weight.requires_grad_(False)
    model.embed.requires_grad_(False)
    optimizer = AdamW(model.named_parameters())
    sampler = LISA(model, optimizer, interval=1)
    assert list(sampler.probabilities) == ["layers.0", "layers.2", "layers.3", "layers.4"]
    before = weights(model)
    train(model, optimizer, sampler, 0, 20)
    still = [n for n, p in model.named_parameters() if torch.equal(p, before[n])]
    frozen = [n for n in before if owner(n) == "layers.1"]
    assert sorted(still) == sorted([*frozen, "layers.2.up.weight", "embed.weight"])
    with pytest.raises(ValueError, match="active=5 layers were asked for, but 4 of 5 can train"):
        LISA(thawed(model), optimizer, active=5)


def thawed(model):
    """As it was before the last sampler, but for its second layer."""
    for name, p in model.named_parameters():
        p.requires_grad_(owner(name) != "layers.1")
    return model


def test_scores_are_for_all_layers_frozen_ones_too():
    model = Network()
    model.layers[1].requires_grad_(False)
    sampler = OwLore(model, dense(model), scores=[1, 100, 2, 4, 1], active=1)
    assert sampler.probabilities == {"layers.0": 1 / 8, "layers.2": 1 / 4, "layers.3": 1 / 2, "layers.4": 1 / 8}


class Shared(nn.Module):
    """Layers of their own that share a matrix, as in ALBERT."""

    def __init__(self):
        super().__init__()
        self.blocks = nn.ModuleList(Block() for _ in range(4))
        for block in self.blocks[1:2]:
            block.up = self.blocks[0].up

    def forward(self, x):
        for block in self.blocks:
            x = block(x)
        return x


@pytest.mark.parametrize("make", [torchs, dense])
def test_a_shared_matrix_is_awake_while_any_of_its_layers_is(make):
    model = Shared()
    optimizer = make(model)
    sampler = LISA(model, optimizer, active=1, interval=1)
    seen = set()
    for _ in range(30):
        awake = sampler.awake
        seen.update(awake)
        assert model.blocks[0].up.weight.requires_grad == bool({"blocks.0", "blocks.1"} & set(awake))
        assert model.blocks[0].down.weight.requires_grad == ("blocks.0" in awake)
        model(torch.randn(3, WIDTH)).square().sum().backward()
        optimizer.step()
        held = {p for p, state in optimizer.state.items() if "step" in state}
        assert held == {p for p in model.parameters() if p.requires_grad}
        sampler.step()
    assert len(seen) == 4


def test_one_block_that_is_used_again_and_again():
    block = Block()
    model = nn.ModuleDict({"layers": nn.ModuleList([block, block, Block()])})
    sampler = LISA(model, torch.optim.SGD(model.parameters()), active=1, interval=1)
    assert list(sampler.probabilities) == ["layers.0", "layers.1", "layers.2"]
    for _ in range(20):
        assert block.up.weight.requires_grad == (sampler.awake != ["layers.2"])
        sampler.step()


def test_a_head_that_the_model_names_is_one_whatever_its_size():
    model = Network()
    model.positions = nn.Embedding(99, WIDTH)
    LISA(model, dense(model), embeddings="freeze")
    assert model.head.weight.requires_grad  # 30 outputs, and the largest embedding has 99 rows
    model = Network()
    model.positions = nn.Embedding(99, WIDTH)
    model.get_output_embeddings = lambda: model.head
    LISA(model, dense(model), embeddings="freeze")
    assert not model.head.weight.requires_grad


@pytest.mark.parametrize("tied", [False, True])
def test_embeddings_and_head_can_be_frozen(tied):
    model = Network()
    if tied:
        model.head.weight = model.embed.weight
    optimizer = dense(model)
    sampler = LISA(model, optimizer, embeddings="freeze", interval=1)
    before = weights(model)
    train(model, optimizer, sampler, 0, 12)
    still = [n for n, p in model.named_parameters() if torch.equal(p, before[n])]
    assert still == (["embed.weight"] if tied else ["embed.weight", "head.weight"])
    assert not {model.embed.weight, model.head.weight} & optimizer.state.keys()


def test_a_classifier_is_not_frozen_with_the_embeddings():
    model = nn.ModuleDict(
        {
            "words": nn.Embedding(50, 8),
            "kinds": nn.Embedding(2, 8),
            "layers": nn.ModuleList(Block(8) for _ in range(3)),
            "classifier": nn.Linear(8, 2),
        }
    )
    model["layers"][0].bias = nn.Embedding(4, 1)  # as T5's relative positions: a part of the layer
    sampler = LISA(model, dense(model), embeddings="freeze", active=3)
    assert len(sampler.awake) == 3 and model["layers"][0].bias.weight.requires_grad
    assert model["classifier"].weight.requires_grad and model["classifier"].bias.requires_grad
    assert not model["words"].weight.requires_grad and not model["kinds"].weight.requires_grad


def test_embeddings_and_head_can_be_projected():
    model = Network()
    model.embed, model.head = nn.Embedding(50, 24), nn.Linear(24, 50, bias=False)
    groups = param_groups(model, embeddings="projected", rank=2, include=["*.up.weight"])
    chosen = {d.name for d in groups.decisions if d.projected}
    assert {"embed.weight", "head.weight"} < chosen
    assert not any(d.projected for d in param_groups(model, include=["*.up.weight"]).decisions if "e.w" in d.name)
    optimizer = GaLoreAdamW(groups, lr=0.01)
    model.embed.weight.grad = torch.randn(50, 24)
    optimizer.step()
    assert state_bytes(optimizer) == 4 * (2 * 50 * 2 + 24 * 2) + 8
    with pytest.raises(ValueError, match="embeddings must be one of dense, projected, got 'frozen'"):
        param_groups(model, embeddings="frozen")


# Finding layers.


def test_layers_are_found_by_path_module_list_or_themselves():
    model = Network()
    expected = {f"layers.{i}": layer for i, layer in enumerate(model.layers)}
    for layers in (
        None,
        "layers",
        model.layers,
        list(model.layers),
        list(expected),
        (*model.layers[:2], *list(expected)[2:]),
    ):
        assert find_layers(model, layers) == expected
    assert list(find_layers(nn.ModuleDict({"module": model}))) == [f"module.{name}" for name in expected]
    assert list(find_layers(model.layers)) == ["0", "1", "2", "3", "4"]


def test_experts_inside_of_layers_are_no_list_of_layers():
    model = Network()
    for layer in model.layers:
        layer.experts = nn.ModuleList(nn.Linear(WIDTH, WIDTH) for _ in range(9))
    assert len(find_layers(model)) == DEPTH


def test_named_blocks_of_a_sequential():
    from collections import OrderedDict

    model = nn.Sequential(OrderedDict(first=Block(), second=Block(), third=Block()))
    assert list(find_layers(model)) == ["first", "second", "third"]


@pytest.mark.parametrize(
    ("layers", "message"),
    [
        ("decoder.layers", "the model has no module 'decoder.layers': its root has no decoder"),
        ("layers.7", "the model has no module 'layers.7': layers has no 7"),
        ("head", "layers='head' is a Linear, not a ModuleList"),
        (["layers.0", "layers.9"], "the model has no module 'layers.9'"),
        (["layers.0", "layers.1", "layers.0"], "layers holds layers.0 twice"),
        (["layers.0", "layers.0.up"], r"layers overlap: layers\.0\.up is a part of layers\.0"),
        ([], "layers is empty"),
        (["layers.0", Block()], "which is not a module of the model"),
        (nn.ModuleList([Block(), Block()]), "layers is not a module of the model"),
        (3, "layers must be a path"),
        ([3], "layers holds 3, which is not a module"),
    ],
)
def test_layers_that_cannot_be_meant_are_named(layers, message):
    model = Network()
    with pytest.raises(ValueError, match=message):
        LISA(model, dense(model), layers, active=1)
    assert all(p.requires_grad for p in model.parameters())


def test_without_layers_the_model_must_have_one_list_of_them():
    model = nn.ModuleDict({"encoder": Network(), "decoder": Network()})
    with pytest.raises(ValueError, match=r"2 lists of like blocks \(encoder\.layers, decoder\.layers\): choose"):
        LISA(model, dense(model))
    model = nn.Sequential(nn.Linear(3, 3), nn.ReLU(), nn.Linear(3, 3))
    with pytest.raises(ValueError, match="no ModuleList or Sequential of like blocks"):
        LISA(model, torch.optim.SGD(model.parameters()))


# Refusals.


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"active": 0}, "active must be an int >= 1, got 0"),
        ({"active": 2.0}, "active must be an int >= 1"),
        ({"active": True}, "active must be an int >= 1"),
        ({"active": 6}, "active=6 layers were asked for, but 5 of 5 can train"),
        ({"interval": 0}, "interval must be an int >= 1"),
        ({"interval": None}, "interval must be an int >= 1"),
        ({"seed": "a"}, "seed must be an int, got 'a'"),
        ({"state_policy": "forget"}, "state_policy must be one of drop, keep, offload, got 'forget'"),
        ({"embeddings": "low-rank"}, "embeddings must be one of train, freeze, got 'low-rank'"),
        ({"scores": [1, 1, 1, 1]}, "scores must hold one number for each of the 5 layers, got 4"),
        ({"scores": [1, 1, math.nan, 1, 1]}, "scores must be finite numbers >= 0, got nan for layer number 2"),
        ({"scores": [1, 1, 1, math.inf, 1]}, "scores must be finite numbers >= 0, got inf"),
        ({"scores": [1, 1, 1, -0.1, 1]}, "scores must be finite numbers >= 0, got -0.1 for layer number 3"),
        ({"scores": [1, 1, 1, "1", 1]}, "scores must be finite numbers >= 0"),
    ],
)
def test_bad_settings_are_refused_before_anything_is_changed(settings, message):
    model = Network()
    kind = OwLore if "scores" in settings else LISA
    with pytest.raises(ValueError, match=message):
        kind(model, dense(model), **{"active": 2, **settings})
    assert all(p.requires_grad for p in model.parameters())


def test_an_optimizer_that_lacks_a_layer_is_refused():
    model = Network()
    model.layers[2:].requires_grad_(False)
    optimizer = torch.optim.AdamW(p for p in model.parameters() if p.requires_grad)
    model.requires_grad_(True)
    with pytest.raises(ValueError, match=r"the optimizer lacks 18 trainable parameters.* layers\.2\.norm\.weight"):
        LISA(model, optimizer)
    assert all(p.requires_grad for p in model.parameters())
    model.layers.requires_grad_(False)
    with pytest.raises(ValueError, match="no parameter of the 5 layers is trainable"):
        LISA(model, optimizer)


def test_freezing_embeddings_that_are_not_there_is_refused():
    model = nn.Sequential(Block(), Block())
    with pytest.raises(ValueError, match="the model has no embedding"):
        LISA(model, dense(model), embeddings="freeze")


# Scores.


def written_out(module, x, tau):
    norms = x.double().reshape(-1, x.shape[-1]).square().sum(0).sqrt()
    a = module.weight.detach().double().abs() * norms
    return (a > tau * a.mean()).double().mean().item()


def test_scores_are_the_equation():
    model = Network()
    seen = {}
    for module in model.modules():
        if isinstance(module, nn.Linear):
            module.weight.data *= torch.randn_like(module.weight).exp()
            module.register_forward_pre_hook(lambda m, args: seen.setdefault(m, []).append(args[0].detach()))
    batches = [torch.randint(VOCABULARY, (4, 6)) for _ in range(3)]
    scores = outlier_scores(model, batches=batches, tau=3.0)
    for layer, score in zip(model.layers, scores, strict=True):
        parts = [written_out(m, torch.cat(seen[m]), 3.0) for m in (layer.up, layer.down)]
        assert 0 < score == pytest.approx(sum(parts) / 2, abs=1e-9)
    ones = [torch.ones(1, m.in_features) for m in (model.layers[0].up, model.layers[0].down)]
    parts = [written_out(m, x, 3.0) for m, x in zip((model.layers[0].up, model.layers[0].down), ones, strict=True)]
    assert outlier_scores(model, tau=3.0)[0] == pytest.approx(sum(parts) / 2, abs=1e-9)


def test_scoring_leaves_the_model_as_it_was():
    model = Network()
    model.layers[1].eval()
    modes, before = [m.training for m in model.modules()], weights(model)
    inputs = torch.randn(2, 4, WIDTH)
    kept = inputs.clone()
    blocks = model.layers
    outlier_scores(nn.Sequential(*blocks), batches=[inputs])
    outlier_scores(model, batches=iter([torch.zeros(1, 3, dtype=torch.long)]))
    outlier_scores(model)
    assert [m.training for m in model.modules()] == modes
    assert same(weights(model), before) and torch.equal(inputs, kept)
    assert all(p.grad is None for p in model.parameters())
    assert not any(m._forward_pre_hooks for m in model.modules())


@given(power=st.integers(-20, 20), seed=st.integers(0, 50))
def test_scores_ignore_the_scale_of_weights_and_inputs(power, seed):
    torch.manual_seed(seed)
    model = nn.Sequential(*(nn.Linear(9, 9, bias=False) for _ in range(3)))
    for layer in model:
        layer.weight.data = torch.randn(9, 9).pow(3)
    x = torch.randn(20, 9)
    expected = outlier_scores(model, batches=[x], tau=2.0)
    assert outlier_scores(model, batches=[x * 2.0**power], tau=2.0) == expected
    weight_only = outlier_scores(model, tau=2.0)
    for layer in model:
        layer.weight.data *= 2.0**power
    assert outlier_scores(model, tau=2.0) == weight_only
    model[0].weight.data *= 4.0
    assert outlier_scores(model, batches=[x], tau=2.0) == expected
    halves = outlier_scores(model, batches=[x[:10], x[10:]], tau=2.0)
    assert halves == pytest.approx(expected, abs=2 / 81)


def test_batches_are_passed_as_the_model_wants_them():
    class Two(nn.Module):
        def __init__(self):
            super().__init__()
            self.blocks = nn.ModuleList(nn.Linear(8, 8) for _ in range(2))

        def forward(self, x, y=None):
            for block in self.blocks:
                x = block(x)
            return x if y is None else x + y

    model, x = Two(), torch.randn(5, 8)
    expected = outlier_scores(model, batches=[x], tau=2.0)
    for batch in ((x, x), [x], {"x": x, "y": x}):
        assert outlier_scores(model, batches=[batch], tau=2.0) == expected


def test_transformers_conv1d_is_linear_with_rows_and_columns_exchanged():
    Conv1D = pytest.importorskip("transformers.pytorch_utils").Conv1D
    a, b = (nn.Sequential(kind(6, 4) if kind is nn.Linear else kind(4, 6)) for kind in (nn.Linear, Conv1D))
    b[0].weight.data = a[0].weight.detach().mT.clone().pow(3)
    a[0].weight.data = a[0].weight.detach().pow(3)
    x = torch.randn(7, 6)
    for batches in (None, [x]):
        expected = outlier_scores(a, [a[0]], batches, tau=2.0)
        assert outlier_scores(b, [b[0]], batches, tau=2.0) == expected
        assert expected[0] > 0


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_scores_of_low_precision_weights(dtype):
    model = nn.Sequential(nn.Linear(300, 300, bias=False), nn.Linear(300, 300, bias=False))
    for layer in model:
        layer.weight.data.fill_(1e-3)
    model[1].weight.data[:, :3] = 1.0
    assert outlier_scores(model.to(dtype)) == [0.0, 0.01]
    huge = torch.full((4, 300), 6e4 if dtype == torch.float16 else 1e15, dtype=dtype)
    assert outlier_scores(model[:1], [model[0]], [huge]) == [0.0]


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"tau": 0}, "tau must be a finite number > 0, got 0"),
        ({"tau": math.nan}, "tau must be a finite number > 0, got nan"),
        ({"batches": []}, "batches is empty"),
        ({"layers": "nowhere"}, "the model has no module 'nowhere'"),
        ({"batches": [torch.full((2, 5), math.nan)]}, "makes the inputs of 0 not finite"),
        ({"batches": [torch.full((2, 5), math.inf)]}, "makes the inputs of 0 not finite"),
        ({"layers": ["0", "2"]}, "layer 2 has no linear weight: give its score"),
        ({"layers": ["0", "3"], "batches": [torch.ones(2, 5)]}, "layer 3 has no linear weight that the batches reach"),
    ],
)
def test_scores_that_cannot_be_computed(arguments, message):
    class Partly(nn.Sequential):
        def forward(self, x):
            return self[1](self[0](x))

    model = Partly(nn.Linear(5, 5), nn.Linear(5, 5), nn.LayerNorm(5), nn.Linear(5, 5)).train()
    with pytest.raises(ValueError, match=message):
        outlier_scores(model, **{"layers": ["0", "1"], **arguments})
    assert model[0].training and not model[0]._forward_pre_hooks


def test_weights_that_are_not_finite_are_named():
    model = nn.Sequential(nn.Linear(5, 5), nn.Linear(5, 5))
    model[1].weight.data[0, 0] = math.nan
    with pytest.raises(ValueError, match="the weight of 1 times its inputs is not finite"):
        outlier_scores(model)


def test_owlore_scores_the_weights_by_itself():
    model = Network()
    model.layers[3].up.weight.data[0, :2] = 50.0
    sampler = OwLore(model, galore(model), active=2)
    assert sampler.probabilities["layers.3"] == 1.0
    assert sampler.state_dict()["scores"] == outlier_scores(model)


# Training.


@pytest.mark.parametrize("kind", [LISA, OwLore])
@pytest.mark.parametrize("policy", POLICIES)
def test_a_separable_quadratic_converges_when_every_layer_is_visited(kind, policy):
    model = nn.ModuleList(nn.Linear(6, 6, bias=False).double() for _ in range(5))
    target = [torch.randn(6, 6, dtype=torch.float64) for _ in model]
    optimizer = torch.optim.AdamW(model.parameters(), lr=0.1, weight_decay=0.0)
    settings = {"scores": [5, 1, 2, 1, 1]} if kind is OwLore else {}
    sampler = kind(model, optimizer, active=2, interval=10, state_policy=policy, **settings)
    schedule = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda i: 0.5 * (1 + math.cos(math.pi * i / 600)))
    visited = set()

    def distance():
        return sum((layer.weight - t).square().sum() for layer, t in zip(model, target, strict=True))

    before = distance().item()
    for _ in range(600):
        visited.update(sampler.awake)
        optimizer.zero_grad()
        distance().backward()
        optimizer.step()
        sampler.step()
        schedule.step()
    assert len(visited) == 5
    assert distance().item() < 1e-3 * before


def test_it_says_which_layers_are_awake():
    model = Network()
    optimizer = dense(model)
    sampler = LISA(model, optimizer, interval=3)
    train(model, optimizer, sampler, 0, 4)
    one = sum(p.numel() for p in model.layers[0].parameters())
    text = repr(sampler)
    assert "LISA(active=2, interval=3, state_policy='drop', seed=0)" in text
    assert f"2 of 5 layers train until step 6, {2 * one:,} of their {5 * one:,} weights: " in text
    assert text.endswith(", ".join(sampler.awake))


# The optimizer's own half.


def test_forgetting_is_beginning_anew_with_other_random_draws():
    p = nn.Parameter(torch.randn(9, 12))
    optimizer = GaLoreAdamW([p], rank=2, projection="random")
    optimizer.forget([p])
    assert not optimizer.state[p]
    p.grad = torch.randn(9, 12)
    streams = []
    for _ in range(3):
        optimizer.step()
        streams.append(optimizer.state[p]["stream"])
        assert optimizer.state[p]["step"].item() == 1
        optimizer.forget([p])
        optimizer.forget([p])  # what is forgotten cannot be forgotten again
        assert optimizer.state[p].keys() == {"stream"}
        assert state_bytes(optimizer) == 0
    assert len(set(streams)) == 3
    assert all(isinstance(s, int) for s in streams)
    again = GaLoreAdamW([p], rank=2, projection="random")
    again.load_state_dict(saved(optimizer.state_dict()))
    assert again.state_dict()["state"] == {0: {"stream": optimizer.state[p]["stream"]}}
    twin = copy.deepcopy(optimizer)
    for one in (optimizer, again):
        one.step()
    assert torch.equal(optimizer.state[p]["basis"], again.state[p]["basis"])
    assert twin.state_dict()["state"][0].keys() == {"stream"}
