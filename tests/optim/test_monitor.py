"""A Monitor measures what it says, and changes no bit of training."""

import copy
import csv
import math
import pickle

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator
from torch.utils.tensorboard import SummaryWriter

from cases import CASES, FEW, assert_equal, backward, build, every, few, loss_of, model, train, weights
from slimstate.optim import FRUGAL, LISA, AdamW, DCTAdamW, GaLoreAdamW, Monitor, in_backward, monitor, param_groups
from slimstate.projections import captured_energy, subspace_overlap

PROJECTED = [name for name in FEW if "rank" in CASES[name][1] or "density" in CASES[name][1]]
BASES = ("captured_own", "captured_next", "residual", "overlap", "effective_rank", "basis_age")
UPDATES = ("update_rms", "update_per_lr")


def groups(net):
    """The matrices, and the rest."""
    named = list(net.named_parameters())
    return [
        {"name": "matrices", "params": [x for x in named if x[1].ndim > 1], "rank": 3},
        {"name": "vectors", "params": [x for x in named if x[1].ndim == 1]},
    ]


def measured(net, optimizer, steps=6, **settings):
    """The reports of some steps."""
    reports = {}
    Monitor(optimizer, reports.__setitem__, **settings)
    train(net, optimizer, 0, steps)
    return reports


def of(values, measure):
    """The value of a measure, where there is one."""
    found = [value for name, value in values.items() if name.split("/")[0] == measure]
    assert len(found) < 2
    return found[0] if found else None


# ---------------------------------------------------------------------------------------- nothing is changed


@every
def test_training_is_the_same_bit_for_bit(name):
    net, same = model(), model()
    optimizer, reference = build(name, net.parameters()), build(name, same.parameters())
    random, reports = torch.get_rng_state(), {}
    Monitor(optimizer, reports.__setitem__, every=2, per_matrix=True)
    for i in range(5):
        backward(net, i)
        before = [p.grad.clone() for p in net.parameters()]
        optimizer.step()
        assert_equal([p.grad for p in net.parameters()], before)
    train(same, reference, 0, 5)
    assert_equal(weights(net), weights(same))
    assert_equal(optimizer.state_dict(), reference.state_dict())
    assert torch.equal(torch.get_rng_state(), random)
    assert list(reports) == [1, 2, 4]
    assert all(math.isfinite(value) for values in reports.values() for value in values.values())


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float64])
@few
def test_so_it_is_in_other_dtypes(name, dtype):
    net, same = model(dtype), model(dtype)
    optimizer = build(name, net.parameters())
    measured(net, optimizer, 4, every=1)
    train(same, reference := build(name, same.parameters()), 0, 4)
    assert_equal(weights(net), weights(same))
    assert_equal(optimizer.state_dict(), reference.state_dict())


@pytest.mark.slow
@pytest.mark.parametrize("name", ["GaLoreAdamW, svd, rotate", "DCTAdamW, every third", "FRUGAL, columns"])
def test_so_it_is_in_a_compiled_step(name):
    net, same = model(), model()
    optimizer, reference = build(name, net.parameters()), build(name, same.parameters())
    reports = {}
    Monitor(optimizer, reports.__setitem__, every=2)
    for x, y in ((net, optimizer), (same, reference)):
        step = torch.compile(y.step, backend="eager")
        for i in range(4):
            backward(x, i)
            step()
    torch.compiler.reset()
    assert_equal(weights(net), weights(same))
    assert list(reports) == [1, 2, 4]


@pytest.mark.parametrize("name", PROJECTED)
def test_nothing_is_kept_between_reports_but_a_few_numbers_a_refresh(name):
    net = model()
    optimizer = build(name, net.parameters())
    kept = Monitor(optimizer, every=4)
    for i in range(12):
        train(net, optimizer, i, i + 1)
        tensors = [*kept._own.values(), *kept._overlaps.values()]
        assert not kept._due
        assert not kept._sampled
        assert sum(x.numel() for x in tensors) <= 7 * 3
        assert len(kept._refreshed) <= 3
    assert not tensors


def on_meta(name, monkeypatch):
    """An optimizer after its first step, on a device of which no value can be read."""
    net = model().to("meta")
    gap = {"update_proj_gap": 100} if "update_proj_gap" in CASES[name][1] else {}
    optimizer = build(name, net.parameters(), **gap)
    for p in net.parameters():
        p.grad = torch.empty_like(p)
    monkeypatch.setattr(optimizer, "_check_gradients", lambda: None)  # which refuses this device
    optimizer._create_states()
    for p in net.parameters():
        optimizer.state[p]["step"].fill_(1)
        optimizer.state[p].get("refreshes", torch.ones(())).fill_(1)
    return optimizer


@every
def test_a_step_between_reports_waits_for_no_value(name, monkeypatch):
    optimizer = on_meta(name, monkeypatch)
    kept = Monitor(optimizer, every=50)
    optimizer.step()
    assert (kept.step, kept.values) == (2, {})


@pytest.mark.parametrize("name", PROJECTED)
def test_measuring_a_refresh_waits_for_no_value(name, monkeypatch):
    optimizer = on_meta(name, monkeypatch)
    (group,) = optimizer.param_groups
    for p in optimizer._places(group):
        old = monitor._basis(p, optimizer.state[p])
        assert monitor._energies(optimizer, p, group).shape == (5,)
        assert monitor._overlap(optimizer, p, group, old).shape == (2,)


def test_a_removed_monitor_and_a_copy_of_the_optimizer_measure_nothing():
    net = model()
    optimizer = build("GaLoreAdamW, svd, rotate", net.parameters())
    reports = {}
    handle = Monitor(optimizer, reports.__setitem__, every=1)
    train(net, optimizer, 0, 1)
    other, copied = copy.deepcopy((net, optimizer))
    train(other, copied, 1, 2)
    pickle.loads(pickle.dumps(optimizer))
    assert list(reports) == [1]
    handle.remove()
    train(net, optimizer, 1, 2)
    assert list(reports) == [1]


# ---------------------------------------------------------------------------------------- what the values are

sizes = st.tuples(st.integers(2, 12), st.integers(2, 12))
seeds = st.integers(0, 2**16)


def one_matrix(shape, seed, scale=1.0, **settings):
    """A matrix with a random gradient, after a step of GaLoreAdamW, and the values of its report."""
    generator = torch.Generator().manual_seed(seed)
    p = torch.nn.Parameter(torch.randn(shape, generator=generator))
    optimizer = GaLoreAdamW([p], **{"rank": 0.5, "lr": 1e-3} | settings)
    kept = Monitor(optimizer, every=1)
    p.grad = torch.randn(shape, generator=generator) * scale
    optimizer.step()
    return p, optimizer, kept


@given(sizes, seeds, st.sampled_from([1e-18, 1.0, 1e18]))
def test_the_captured_energy_is_that_of_the_leading_singular_values_and_leaves_the_residual(shape, seed, scale):
    p, optimizer, kept = one_matrix(shape, seed, scale)
    squares = torch.linalg.svdvals(p.grad.double()).square()
    rank = optimizer.state[p]["basis"].shape[1]
    own = of(kept.values, "captured_own")
    assert own == pytest.approx((squares[:rank].sum() / squares.sum()).item(), abs=1e-5)
    assert own + of(kept.values, "residual") == pytest.approx(1, abs=1e-6)
    p.grad = torch.randn_like(p) * scale
    optimizer.step()
    m = p.grad.mT if p.shape[0] >= p.shape[1] else p.grad
    captured = of(kept.values, "captured_next")
    assert captured == pytest.approx(captured_energy(m, optimizer.state[p]["basis"]).item(), abs=1e-5)
    assert 0 <= captured <= 1 + 1e-6
    assert captured + of(kept.values, "residual") == pytest.approx(1, abs=1e-6)
    assert of(kept.values, "basis_age") == 1


@given(st.integers(1, 6), st.integers(6, 10), seeds)
def test_k_equal_singular_values_have_an_effective_rank_of_k(k, n, seed):
    generator = torch.Generator().manual_seed(seed)
    p = torch.nn.Parameter(torch.randn(n, n + 3, generator=generator))
    optimizer = GaLoreAdamW([p], rank=n)
    kept = Monitor(optimizer)
    left, right = (torch.linalg.qr(torch.randn(m, k, generator=generator)).Q for m in (n, n + 3))
    p.grad = 5 * left @ right.mT
    optimizer.step()
    assert of(kept.values, "effective_rank") == pytest.approx(k, rel=1e-4)


@given(st.integers(1, 4), st.booleans(), seeds)
def test_the_overlap_of_equal_subspaces_is_one_and_of_orthogonal_ones_zero(rank, equal, seed):
    generator = torch.Generator().manual_seed(seed)
    p = torch.nn.Parameter(torch.randn(8, 12, generator=generator))
    optimizer = GaLoreAdamW([p], rank=rank, update_proj_gap=1)
    kept = Monitor(optimizer, every=1)
    left, right = (torch.linalg.qr(torch.randn(n, 2 * rank, generator=generator)).Q for n in (8, 12))
    first, second = slice(0, rank), slice(rank, 2 * rank)
    p.grad = left[:, first] @ right[:, first].mT
    optimizer.step()
    assert of(kept.values, "overlap") is None
    chosen = first if equal else second
    p.grad = 3 * left[:, chosen] @ right[:, chosen].mT
    optimizer.step()
    assert of(kept.values, "overlap") == pytest.approx(float(equal), abs=1e-4)


@pytest.mark.parametrize("name", PROJECTED)
def test_the_overlap_is_that_of_the_bases_before_and_after(name):
    net = model()
    optimizer = build(name, net.named_parameters(), update_proj_gap=1)
    reports = {}
    Monitor(optimizer, reports.__setitem__, every=1, per_matrix=True)
    train(net, optimizer, 0, 1)
    for i in range(1, 4):
        before = copy.deepcopy(optimizer.state_dict()["state"])
        train(net, optimizer, i, i + 1)
        for j, (key, p) in enumerate(net.named_parameters()):
            if p.ndim < 2:
                continue
            old, new = before[j], optimizer.state[p]
            if "index" in new:
                expected = len(set(new["index"].tolist()) & set(old["index"].tolist())) / len(new["index"])
            else:
                expected = subspace_overlap(new["basis"], old["basis"]).item()
            assert reports[i + 1][f"overlap/group 0/{key}"] == pytest.approx(expected, abs=1e-5)


def test_the_share_that_stays_selected_and_the_residual_of_columns_are_exact():
    p = torch.nn.Parameter(torch.ones(2, 8))
    optimizer = FRUGAL([p], density=0.25)
    kept = Monitor(optimizer)
    p.grad = torch.arange(16.0).view(2, 8)
    optimizer.step()
    outside = torch.ones(8, dtype=torch.bool)
    outside[optimizer.state[p]["index"].long()] = False
    expected = p.grad[:, outside].square().sum() / p.grad.square().sum()
    assert of(kept.values, "residual") == pytest.approx(expected.item())


@every
def test_the_update_is_what_the_weights_have_moved(name):
    net = model()
    optimizer = build(name, net.parameters())
    kept = Monitor(optimizer, every=1)
    for i in range(3):
        before = weights(net)
        train(net, optimizer, i, i + 1)
        moved = torch.cat([(a - b).flatten() for a, b in zip(weights(net), before, strict=True)])
        assert of(kept.values, "update_rms") == pytest.approx(moved.double().square().mean().sqrt().item(), rel=1e-4)
    if lr := optimizer.param_groups[0]["lr"]:
        assert of(kept.values, "update_per_lr") == pytest.approx(of(kept.values, "update_rms") / lr)


def test_the_update_of_a_large_parameter_is_estimated_from_some_of_its_entries():
    p = torch.nn.Parameter(torch.zeros(600, 500).mT)
    optimizer = torch.optim.SGD([p], lr=1.0)
    kept = Monitor(optimizer, every=1)
    p.grad = torch.randn(500, 600, generator=torch.Generator().manual_seed(1))
    optimizer.step()
    assert p.numel() > 10 * monitor.SAMPLE
    assert of(kept.values, "update_rms") == pytest.approx(p.grad.square().mean().sqrt().item(), rel=0.05)
    assert of(kept.values, "update_per_lr") == of(kept.values, "update_rms")


def test_the_update_counts_what_compensation_keeps():
    p = torch.nn.Parameter(torch.ones(64, 64, dtype=torch.bfloat16))
    optimizer = AdamW([p], lr=1e-6, weight_decay=0, compensation=True)
    kept = Monitor(optimizer)
    p.grad = torch.ones_like(p)
    optimizer.step()
    assert torch.equal(p, torch.ones_like(p))
    assert of(kept.values, "update_per_lr") == pytest.approx(1, rel=0.05)


def test_galores_update_is_its_scale_times_adams():
    p = torch.nn.Parameter(torch.zeros(30, 40))
    optimizer = GaLoreAdamW([p], lr=1e-2, rank=30, scale=0.25)
    kept = Monitor(optimizer)
    p.grad = torch.randn(30, 40)
    optimizer.step()
    assert of(kept.values, "update_per_lr") == pytest.approx(0.25, rel=1e-3)


def test_ages_count_the_steps_since_a_refresh_that_could_be_made():
    p = torch.nn.Parameter(torch.randn(6, 8))
    optimizer = GaLoreAdamW([p], rank=2, update_proj_gap=3)
    reports = {}
    Monitor(optimizer, reports.__setitem__, every=1)
    for i in range(8):
        p.grad = torch.zeros_like(p) if i == 3 else torch.randn_like(p)  # a basis is due there
        optimizer.step()
    assert [of(values, "basis_age") for values in reports.values()] == [0, 1, 2, 3, 4, 5, 0, 1]
    assert [of(values, "captured_own") is not None for values in reports.values()] == [True, *[False] * 5, True, False]


def test_a_refresh_between_reports_is_in_the_next_one():
    net = model()
    reports = measured(net, build("GaLoreAdamW, svd, rotate", net.parameters(), update_proj_gap=10), 24, every=12)
    assert list(reports) == [1, 12, 24]
    assert [of(values, "captured_own") is not None for values in reports.values()] == [True] * 3
    assert [of(values, "overlap") is not None for values in reports.values()] == [False, True, True]


@pytest.mark.parametrize("policy", ["skip", "raise", "propagate"])
def test_steps_that_are_skipped_are_counted(policy):
    net = model()
    optimizer = build("GaLoreAdamW, svd, rotate", net.parameters(), nonfinite=policy)
    kept = Monitor(optimizer, every=1)
    train(net, optimizer, 0, 2)
    backward(net, 2)
    list(net.parameters())[4].grad[0, 0] = math.nan
    if policy == "raise":
        with pytest.raises(FloatingPointError):
            optimizer.step()
        backward(net, 2)
    optimizer.step()
    assert of(kept.values, "skipped_steps") == {"skip": 1, "raise": 1, "propagate": None}[policy]
    measures = {name.split("/")[0] for name in kept.values}
    if policy == "skip":  # nothing has moved
        assert measures == {"skipped_steps"}
    if policy == "propagate":
        assert math.isnan(of(kept.values, "residual"))


def test_groups_have_their_names_and_matrices_theirs():
    net = model()
    reports = measured(net, GaLoreAdamW(groups(net), lr=0.02), 2, every=1)
    assert set(reports[1]) == {
        *(f"{m}/matrices" for m in ("captured_own", "residual", "effective_rank", "basis_age")),
        *(f"{m}/{group}" for m in UPDATES for group in ("matrices", "vectors")),
    }
    net = model()
    reports = measured(net, GaLoreAdamW(groups(net), lr=0.02), 2, every=1, per_matrix=True)
    each = [reports[2][f"residual/matrices/{name}"] for name in ("0.weight", "3.weight", "5.weight")]
    assert min(each) < reports[2]["residual/matrices"] < max(each)


def test_groups_of_one_name_are_told_apart():
    p, q = (torch.nn.Parameter(torch.ones(3)) for _ in range(2))
    optimizer = AdamW([{"params": [p], "name": "a/b"}, {"params": [q], "name": "a/b"}])
    kept = Monitor(optimizer)
    p.grad, q.grad = torch.ones(3), torch.ones(3)
    optimizer.step()
    assert {name.partition("/")[2] for name in kept.values} == {"a.b", "a.b 1"}


def test_other_optimizers_and_dense_groups_have_the_measures_of_updates():
    for kind in (torch.optim.AdamW, torch.optim.SGD, AdamW):
        net = model()
        reports = measured(net, kind(net.parameters(), lr=0.1), 2, every=2)
        assert {name.split("/")[0] for name in reports[2]} == set(UPDATES)
    assert reports.keys() == {1, 2}


class Counting(torch.optim.Optimizer):
    """Counts its steps in Python, as many do."""

    def step(self):
        for p in self.param_groups[0]["params"]:
            self.state[p]["step"] = self.state[p].get("step", 0) + 1
            p.data.add_(1)


def test_optimizers_may_count_in_python_and_have_no_learning_rate():
    net = model()
    reports = measured(net, Counting(net.parameters(), {}), 2, every=1)
    assert reports[2] == {"update_rms/group 0": 1}


def test_layers_that_sleep_are_left_out():
    net = torch.nn.Sequential(*(torch.nn.Linear(20, 20) for _ in range(4)))
    optimizer = AdamW(net.named_parameters())
    sampler = LISA(net, optimizer, layers=list(net), active=1, interval=1)
    reports = {}
    Monitor(optimizer, reports.__setitem__, every=1, per_matrix=True)
    for _ in range(3):
        net(torch.ones(2, 20)).sum().backward()
        awake = [name for name, p in net.named_parameters() if p.requires_grad]
        optimizer.step()
        sampler.step()
        optimizer.zero_grad()
        names = [name for name in reports[len(reports)] if name.startswith("update_rms/group 0/")]
        assert names == [f"update_rms/group 0/{name}" for name in awake]


def test_in_the_per_layer_mode_bases_are_measured_where_gradients_are_left():
    net, same = model(), model()
    name = "GaLoreAdamW, svd, rotate"
    optimizer, reference = build(name, net.parameters()), build(name, same.parameters())
    in_backward(optimizer)
    reports = {}
    Monitor(optimizer, reports.__setitem__, every=1)
    expected = {}
    Monitor(reference, expected.__setitem__, every=1)
    for i in range(4):
        for x, y in ((net, optimizer), (same, reference)):
            y.zero_grad()
            loss_of(x, i).backward()
            y.step()
    assert_equal(weights(net), weights(same))
    for step, values in reports.items():
        assert of(values, "captured_next") is None
        for measure in ("captured_own", "overlap", "basis_age", *UPDATES):
            assert of(values, measure) == pytest.approx(of(expected[step], measure))


def test_a_stack_is_measured_as_its_matrices():
    stack = torch.nn.Parameter(torch.randn(3, 6, 8))
    alone = [torch.nn.Parameter(x.clone()) for x in stack.detach()]
    optimizers = GaLoreAdamW([stack], rank=2, batch_dims=1), GaLoreAdamW(alone, rank=2)
    reports = [{}, {}]
    for optimizer, kept in zip(optimizers, reports, strict=True):
        Monitor(optimizer, kept.__setitem__, every=1)
    for i in range(2):
        stack.grad = torch.randn(3, 6, 8)
        if i == 1:
            stack.grad[2] = 0  # an expert without tokens
        for p, g in zip(alone, stack.grad, strict=True):
            p.grad = g.clone()
        for optimizer in optimizers:
            optimizer.step()
    for step in (1, 2):
        assert reports[0][step] == pytest.approx(reports[1][step], rel=1e-4)


# ---------------------------------------------------------------------------------------- resuming, and where it goes


def test_after_a_resume_steps_and_ages_go_on():
    net, other = model(), model()
    settings = {"lr": 0.02, "rank": 3, "update_proj_gap": 7}
    optimizer, resumed = GaLoreAdamW(net.parameters(), **settings), GaLoreAdamW(other.parameters(), **settings)
    expected, reports = {}, {}
    Monitor(optimizer, expected.__setitem__, every=3)
    train(net, optimizer, 0, 5)
    other.load_state_dict(net.state_dict())
    kept = Monitor(resumed, reports.__setitem__, every=3)
    resumed.load_state_dict(copy.deepcopy(optimizer.state_dict()))
    assert kept.step == 5
    assert Monitor(resumed).step == 5
    train(net, optimizer, 5, 12)
    train(other, resumed, 5, 12)
    assert list(reports) == [6, 9, 12]
    for step, values in reports.items():
        assert of(values, "basis_age") == of(expected[step], "basis_age")
    assert reports[9] == pytest.approx(expected[9])


def test_a_summary_writer_gets_every_value(tmp_path):
    net = model()
    with SummaryWriter(tmp_path) as writer:
        reports = {}
        optimizer = GaLoreAdamW(groups(net), lr=0.02)
        Monitor(optimizer, writer, reports.__setitem__, every=2)
        train(net, optimizer, 0, 4)
    events = EventAccumulator(str(tmp_path)).Reload()
    assert set(events.Tags()["scalars"]) == {name for values in reports.values() for name in values}
    for name in reports[4]:
        last = events.Scalars(name)[-1]
        assert (last.step, last.value) == (4, pytest.approx(reports[4][name], rel=1e-6))


def rows_of(path):
    with open(path, newline="") as file:
        return list(csv.reader(file))


def test_a_csv_has_every_value_once_however_often_steps_are_taken_again(tmp_path):
    path, reports = tmp_path / "run.csv", {}

    def begin(net):
        optimizer = GaLoreAdamW(groups(net), lr=0.02)
        Monitor(optimizer, path, reports.__setitem__, every=2)
        return optimizer

    net = model()
    optimizer = begin(net)
    train(net, optimizer, 0, 5)
    saved = copy.deepcopy(optimizer.state_dict())
    train(net, optimizer, 5, 8)
    resumed = begin(net)
    resumed.load_state_dict(saved)
    train(net, resumed, 5, 8)
    header, *rows = rows_of(path)
    assert header == ["step", "measure", "of", "value"]
    expected = {(step, name): value for step, values in reports.items() for name, value in values.items()}
    assert {(int(step), f"{measure}/{of}"): float(value) for step, measure, of, value in rows} == expected
    assert len(rows) == len(expected)
    net = model()
    train(net, begin(net), 0, 1)
    assert {row[0] for row in rows_of(path)[1:]} == {"1"}


@pytest.mark.parametrize("per_matrix", [False, True])
def test_the_plot_has_a_panel_for_each_measure_and_a_line_for_each_group(tmp_path, per_matrix):
    net = model()
    optimizer = GaLoreAdamW(groups(net), lr=0.02, update_proj_gap=3)
    Monitor(optimizer, tmp_path / "run.csv", every=1, per_matrix=per_matrix)
    train(net, optimizer, 0, 8)
    figure = Monitor.plot(tmp_path / "run.csv")
    figure.savefig(tmp_path / "run.png")
    shown = {axes.get_title(): len(axes.lines) for axes in figure.axes if axes.get_visible()}
    expected = dict.fromkeys(BASES, 4 if per_matrix else 1) | dict.fromkeys(UPDATES, 10 if per_matrix else 2)
    assert shown == {monitor.MEASURES[name]: lines for name, lines in expected.items()}
    assert (tmp_path / "run.png").read_bytes().startswith(b"\x89PNG")


# ---------------------------------------------------------------------------------------- what is refused


def test_what_it_cannot_use_is_refused(tmp_path):
    net = model()
    optimizer = AdamW(net.parameters())
    with pytest.raises(TypeError, match="optimizer must be a torch optimizer, got Sequential"):
        Monitor(net)
    with pytest.raises(ValueError, match=r"every must be an int >= 1 \(steps\), got 0"):
        Monitor(optimizer, every=0)
    with pytest.raises(ValueError, match="per_matrix must be True or False, got 1"):
        Monitor(optimizer, per_matrix=1)
    with pytest.raises(TypeError, match="a path, a SummaryWriter or a function of step and values, got int"):
        Monitor(optimizer, 3)
    other = tmp_path / "losses.csv"
    other.write_text("epoch,loss\n1,2\n")
    with pytest.raises(ValueError, match="is no CSV of a Monitor: it begins with 'epoch,loss'"):
        Monitor(optimizer, other)
    assert other.read_text() == "epoch,loss\n1,2\n"
    with pytest.raises(ValueError, match="is no CSV of a Monitor"):
        Monitor.plot(other)
    empty = tmp_path / "empty.csv"
    empty.write_text("")
    with pytest.raises(ValueError, match="holds no values"):
        Monitor.plot(empty)
    assert not optimizer._optimizer_step_pre_hooks


def test_the_optimizer_inside_a_sampler_is_asked_for():
    net = torch.nn.Sequential(*(torch.nn.Linear(20, 20) for _ in range(4)))
    sampler = LISA(net, AdamW(net.parameters()), layers=list(net), active=1)
    with pytest.raises(TypeError, match="got LISA; give the optimizer inside it"):
        Monitor(sampler)


def test_the_groups_of_a_model_are_reported_by_what_they_are():
    net = torch.nn.Sequential(torch.nn.Embedding(30, 32), torch.nn.Linear(32, 40))
    optimizer = DCTAdamW(param_groups(net, rank=4))
    kept = Monitor(optimizer)
    net(torch.arange(4)).sum().backward()
    optimizer.step()
    assert {name.partition("/")[2] for name in kept.values} == {"projected", "dense matrices", "vectors"}
