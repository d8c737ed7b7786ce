"""What every optimizer here promises to code written for torch.optim; a new optimizer is a row of CASES in cases.py."""

import copy
import io
import math
import pickle

import pytest
import torch

from cases import (
    CASES,
    DRAWN,
    TORCHS,
    assert_equal,
    assert_same_continuation,
    backward,
    build,
    every,
    few,
    loss_of,
    model,
    moments_of,
    train,
    weights,
)
from slimstate.optim import GaLoreAdafactor, state_bytes

# Construction.


@every
def test_accepts_tensors_names_groups_and_generators(name):
    results = []
    for form in (
        lambda net: net.parameters(),
        lambda net: list(net.parameters()),
        lambda net: net.named_parameters(),
        lambda net: [{"params": net.parameters()}],
        lambda net: [{"params": list(net.named_parameters())}],
        lambda net: iter([{"params": list(net.parameters()), "maximize": False}]),
        lambda net: [{"params": net[0].parameters()}, {"params": list(net[1:].parameters())}],
    ):
        net = model()
        optimizer = build(name, form(net))
        train(net, optimizer, 0, 1)
        assert sum(len(group["params"]) for group in optimizer.param_groups) == 8
        results.append(weights(net))
    if not any(word in name for word in DRAWN):
        for result in results[1:-1]:
            assert_equal(results[0], result)


@every
def test_names_stay_in_groups_and_checkpoints(name):
    net = model()
    optimizer = build(name, net.named_parameters())
    names = [key for key, _ in net.named_parameters()]
    assert optimizer.param_groups[0]["param_names"] == names
    assert optimizer.state_dict()["param_groups"][0]["param_names"] == names


# what is wrong, the error's type, what it says
MISTAKES = [
    ("tensor", lambda p: (p,), TypeError, "iterable of Tensors or dicts"),
    ("empty", lambda p: ([],), ValueError, "empty parameter list"),
    ("number", lambda p: ([1.0],), TypeError, "can only optimize Tensors"),
    ("not a leaf", lambda p: ([p, p * 2],), ValueError, "can't optimize a non-leaf Tensor"),
    ("set", lambda p: ([{"params": {p}}],), TypeError, "ordered collections"),
    ("twice in groups", lambda p: ([{"params": [p]}, {"params": [p]}],), ValueError, "more than one parameter group"),
    ("names in one group", lambda p: ([{"params": [("w", p)]}, {"params": [torch.ones(3, 4)]}],), ValueError, "names"),
]


@few
@pytest.mark.parametrize(("what", "arguments", "error", "message"), MISTAKES, ids=[m[0] for m in MISTAKES])
def test_refuses_what_torch_refuses(name, what, arguments, error, message):
    kind, _, common = CASES[name]
    p = torch.nn.Parameter(torch.randn(9, 12))
    with pytest.raises(error, match=message):
        kind(*arguments(p), **common)


@few
def test_warns_of_a_parameter_that_is_twice_in_a_group(name):
    p = torch.nn.Parameter(torch.randn(9, 12))
    with pytest.warns(UserWarning, match="duplicate parameters"):
        build(name, [p, p])


VALUES = [
    ({"lr": -1.0}, "lr must be a number >= 0"),
    ({"lr": math.nan}, "lr must be a number >= 0"),
    ({"lr": "0.1"}, "lr must be a number >= 0"),
    ({"lr": torch.tensor([0.1, 0.2])}, "Tensor lr must be 1-element"),
    ({"betas": (1.0, 0.9)}, r"betas must be two numbers in \[0, 1\)"),
    ({"betas": (0.9, -0.1)}, r"betas must be two numbers in \[0, 1\)"),
    ({"betas": 0.9}, r"betas must be two numbers in \[0, 1\)"),
    ({"betas": (0.9,)}, r"betas must be two numbers in \[0, 1\)"),
    ({"eps": -1e-8}, "eps must be a number >= 0"),
    ({"weight_decay": -0.1}, "weight_decay must be a number >= 0"),
    ({"amsgrad": True}, "amsgrad=True is not supported by"),
    ({"foreach": True}, "foreach=True is not supported by"),
    ({"fused": False}, "fused=False is not supported by"),
    ({"capturable": True}, "capturable=True is not supported by"),
    ({"differentiable": True}, "differentiable=True is not supported by"),
]


@few
@pytest.mark.parametrize(("settings", "message"), VALUES, ids=[str(v[0]) for v in VALUES])
def test_refuses_values_out_of_range(name, settings, message):
    with pytest.raises(ValueError, match=message):
        build(name, [torch.nn.Parameter(torch.randn(9, 12))], **settings)


@few
def test_refuses_unknown_keywords_and_keys(name):
    kind = CASES[name][0]
    p = torch.nn.Parameter(torch.randn(9, 12))
    with pytest.raises(TypeError, match=f"{kind.__name__} got an unexpected keyword argument 'momentum'"):
        build(name, [p], momentum=0.9)
    with pytest.raises(ValueError, match="unknown key 'learning_rate'"):
        build(name, [{"params": [p], "learning_rate": 1.0}])


@pytest.mark.parametrize("name", [n for n in CASES if "Adafactor" not in n])  # it has transformers', see its own tests
def test_has_torchs_defaults(name):
    kind, matrices, common = CASES[name]
    group = kind(model().parameters(), **matrices, **common).param_groups[0]
    torchs = TORCHS.get(kind, torch.optim.AdamW)(model().parameters()).param_groups[0]
    shared = (group.keys() & torchs.keys()) - common.keys() - {"params"}
    assert {"lr", "weight_decay", "maximize"} <= shared
    assert {key: group[key] for key in shared} == {key: torchs[key] for key in shared}


@every
def test_numbers_of_numpy_become_pythons(name):
    np = pytest.importorskip("numpy")
    net = model()
    optimizer = build(name, net.parameters(), lr=np.float64(0.1), weight_decay=np.float32(0.5), seed=np.int64(3))
    train(net, optimizer, 0, 1)
    file = io.BytesIO()
    torch.save(optimizer.state_dict(), file)
    file.seek(0)
    torch.load(file, weights_only=True)


# Steps.


@every
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16])
def test_loss_falls(name, dtype):
    net = model(dtype)
    optimizer = build(name, net.parameters())
    before = backward(net, 0).item()
    for _ in range(25):
        backward(net, 0)
        optimizer.step()
    assert backward(net, 0).item() < 0.8 * before


@every
def test_closure_runs_with_gradients_and_its_loss_is_returned(name):
    net, same = model(), model()
    optimizer, reference = build(name, net.parameters()), build(name, same.parameters())

    def closure():
        assert torch.is_grad_enabled()
        return backward(net, 0)

    loss = optimizer.step(closure)
    train(same, reference, 0, 1)
    assert loss.item() == pytest.approx(backward(model(), 0).item())
    assert_equal(weights(net), weights(same))
    assert reference.step() is None


@every
def test_without_gradients_a_step_does_nothing(name):
    net = model()
    before = weights(net)
    optimizer = build(name, net.parameters())
    assert optimizer.step(lambda: 3.0) == 3.0
    assert_equal(weights(net), before)
    assert not optimizer.state_dict()["state"]
    assert state_bytes(optimizer) == 0


@every
def test_zero_gradients_without_decay_change_nothing(name):
    net = model()
    before = weights(net)
    optimizer = build(name, net.parameters(), weight_decay=0.0)
    for _ in range(3):
        for p in net.parameters():
            p.grad = torch.zeros_like(p)
        optimizer.step()
    assert_equal(weights(net), before)


@every
def test_a_frozen_layer_stands_still_and_can_be_thawed(name):
    net = model()
    optimizer = build(name, net.parameters(), weight_decay=0.1)
    frozen = net[3].weight
    frozen.requires_grad_(False)
    before = frozen.detach().clone()
    train(net, optimizer, 0, 3)
    assert torch.equal(frozen, before)
    assert frozen not in optimizer.state
    frozen.requires_grad_(True)
    train(net, optimizer, 3, 5)
    assert not torch.equal(frozen, before)
    assert optimizer.state[frozen]["step"].item() == 2
    assert optimizer.state[net[5].weight]["step"].item() == 5
    copied = copy.deepcopy(net)
    resumed = build(name, copied.parameters(), weight_decay=0.1)
    resumed.load_state_dict(optimizer.state_dict())
    assert_same_continuation(net, optimizer, copied, resumed, 5)


@every
def test_every_parameter_has_all_its_state_after_its_first_step(name):
    net = model()
    optimizer = build(name, net.parameters())
    train(net, optimizer, 0, 1)
    keys = {p: set(optimizer.state[p]) for p in net.parameters()}
    train(net, optimizer, 1, 5)
    for p in net.parameters():
        passing = optimizer._passing(p, optimizer.param_groups[0])
        assert keys[p] - passing == set(optimizer.state[p]) - passing
        assert "step" in keys[p]
        assert moments_of(keys[p]) or p.ndim > 1
        step = optimizer.state[p]["step"]
        assert (step.shape, step.dtype, step.device.type, step.item()) == ((), torch.float32, "cpu", 5)
        assert all(isinstance(x, torch.Tensor | int) for x in optimizer.state[p].values())


@every
def test_a_forgotten_parameter_begins_anew(name):
    net = model()
    optimizer = build(name, net.parameters())
    train(net, optimizer, 0, 3)
    forgotten, other = net[3].weight, net[5].weight
    keys, stream = set(optimizer.state[forgotten]), optimizer.state[forgotten]["stream"]
    optimizer.forget([forgotten])
    assert state_bytes(optimizer, [forgotten]) == 0
    copied = copy.deepcopy(net)
    resumed = build(name, copied.parameters())
    resumed.load_state_dict(optimizer.state_dict())
    assert_same_continuation(net, optimizer, copied, resumed, 3, steps=2)
    assert set(optimizer.state[forgotten]) == keys
    assert optimizer.state[forgotten]["stream"] != stream
    assert (optimizer.state[forgotten]["step"].item(), optimizer.state[other]["step"].item()) == (2, 5)


@every
def test_parameters_can_be_swapped_before_the_first_step(name):
    """As accelerate does under FSDP2, and `module.to(dtype)` by its data."""
    net, other = model(), model()
    optimizer, reference = build(name, net.parameters()), build(name, other.parameters())
    optimizer.param_groups[0]["params"] = [torch.nn.Parameter(p.detach().clone()) for p in net.parameters()]
    for p, q in zip(optimizer.param_groups[0]["params"], other.parameters(), strict=True):
        p.grad = torch.ones_like(p)
        q.grad = torch.ones_like(q)
    optimizer.step()
    reference.step()
    assert_equal([p.detach() for p in optimizer.param_groups[0]["params"]], weights(other))


@pytest.mark.parametrize(
    "name", ["AdamW", "GaLoreAdamW, svd, rotate", "GaLoreAdamW, svd, reset", "GradNormLoRP, svd, rotate"]
)
def test_groups_are_like_separate_optimizers(name):
    net, a, b = model(), model(), model()
    settings = [{"lr": 0.05, "weight_decay": 0.3}, {"lr": 0.001, "betas": (0.5, 0.9)}]
    parts = [lambda n: list(n[:3].parameters()), lambda n: list(n[3:].parameters())]
    joint = build(name, [{"params": part(net), **s} for part, s in zip(parts, settings, strict=True)])
    separate = [build(name, part(n), **s) for n, part, s in zip((a, b), parts, settings, strict=True)]
    for i in range(4):
        backward(net, i)
        for p, q, r in zip(net.parameters(), a.parameters(), b.parameters(), strict=True):
            q.grad, r.grad = p.grad.clone(), p.grad.clone()
        for optimizer in (joint, *separate):
            optimizer.step()
    assert_equal(weights(net), weights(a)[:4] + weights(b)[4:])


@pytest.mark.parametrize(
    "name",
    [
        "AdamW",
        "GaLoreAdamW, svd, rotate",
        "GaLoreAdamW, svd, reset",
        "GaLoreAdafactor, beta1",
        "GradNormLoRP, svd, rotate",
        "FRUGAL, svd, sgdm, sgd",
    ],
)
def test_parameters_of_several_dtypes_share_a_group(name):
    dtypes = [torch.float32, torch.bfloat16, torch.float64, torch.float16, torch.float32]
    shapes = [(12, 20), (20, 12), (9, 15), (12, 20), (7,)]
    params = [torch.nn.Parameter(torch.randn(s).to(d)) for s, d in zip(shapes, dtypes, strict=True)]
    alone = [torch.nn.Parameter(p.detach().clone()) for p in params]
    settings = {"stochastic_rounding": False} | ({"update_proj_gap": 100} if name != "AdamW" else {})
    joint, separate = build(name, params, **settings), []
    for q in alone:
        matrix = torch.nn.Parameter(torch.ones(9, 12))  # a rank needs a matrix; without a gradient it stands still
        separate.append(build(name, [q, matrix], **settings))
    for _ in range(4):
        for p, q in zip(params, alone, strict=True):
            p.grad = torch.randn(p.shape).to(p.dtype)
            q.grad = p.grad.clone()
        for optimizer in (joint, *separate):
            optimizer.step()
    assert_equal([p.detach() for p in params], [q.detach() for q in alone])


@every
def test_groups_can_be_added_later(name):
    net = model()
    optimizer = build(name, net[3:].parameters())
    train(net, optimizer, 0, 2)
    optimizer.add_param_group({"params": net[:3].parameters(), "lr": 0.5})
    before = weights(net)
    train(net, optimizer, 2, 4)
    assert optimizer.param_groups[1]["lr"] == 0.5
    assert optimizer.param_groups[1]["weight_decay"] == optimizer.defaults["weight_decay"]
    assert not any(torch.equal(p, q) for p, q in zip(net.parameters(), before, strict=True))
    with pytest.raises(TypeError, match="param_group must be a dict"):
        optimizer.add_param_group([torch.nn.Parameter(torch.randn(9, 12))])


# Copies.


@every
@pytest.mark.parametrize("how", ["deepcopy", "pickle"])
def test_copies_continue_alike_and_apart(name, how):
    net = model()
    optimizer = build(name, net.parameters())
    train(net, optimizer, 0, 3)
    other, copied = (
        copy.deepcopy((net, optimizer)) if how == "deepcopy" else pickle.loads(pickle.dumps((net, optimizer)))
    )
    assert_equal(copied.state_dict(), optimizer.state_dict())
    assert {k for k in vars(optimizer) if k[0] != "_"} == {k for k in vars(copied) if k[0] != "_"}
    assert_same_continuation(net, optimizer, other, copied, 3)
    copied.load_state_dict(optimizer.state_dict())
    assert_same_continuation(net, optimizer, other, copied, 8)


@every
def test_repr_shows_the_class_and_the_settings(name):
    kind, matrices, common = CASES[name]
    text = repr(build(name, model().parameters(), lr=0.0125))
    assert text.startswith(kind.__name__)
    for key, value in (matrices | common | {"lr": 0.0125}).items():
        assert f"{key}: {value}" in text


@every
def test_other_hooks_fire_and_foreign_state_entries_survive(name):
    net = model()
    optimizer = build(name, net.parameters())
    calls = []
    optimizer.register_step_pre_hook(lambda *_: calls.append("step pre"))
    optimizer.register_step_post_hook(lambda *_: calls.append("step post"))
    optimizer.register_state_dict_pre_hook(lambda *_: calls.append("state_dict pre"))
    optimizer.register_state_dict_post_hook(lambda *_: calls.append("state_dict post"))
    optimizer.state["test"] = 1  # as torch's own tests do
    train(net, optimizer, 0, 1)
    saved = optimizer.state_dict()
    assert calls == ["step pre", "step post", "state_dict pre", "state_dict post"]
    optimizer.load_state_dict(saved)
    assert optimizer.state["test"] == 1
    assert state_bytes(optimizer) > 0


# What acts on an optimizer from outside.


def one_cycle(optimizer):
    return torch.optim.lr_scheduler.OneCycleLR(optimizer, max_lr=0.05, total_steps=12)


SCHEDULERS = [
    one_cycle,
    lambda o: torch.optim.lr_scheduler.LambdaLR(o, lambda i: 0.9**i),
    lambda o: torch.optim.lr_scheduler.CosineAnnealingLR(o, 10),
    lambda o: torch.optim.lr_scheduler.ReduceLROnPlateau(o, patience=0),
    lambda o: torch.optim.lr_scheduler.CyclicLR(o, 0.01, 0.1, cycle_momentum=True),
]


@few
@pytest.mark.parametrize("make", SCHEDULERS, ids=["OneCycle", "Lambda", "Cosine", "Plateau", "Cyclic"])
@pytest.mark.parametrize("tensor", [False, True])
def test_schedulers_drive_lr_and_momentum_as_they_do_torchs(name, make, tensor):
    def history(optimizer, net):
        scheduler, values = make(optimizer), []
        for i in range(8):
            backward(net, i)
            optimizer.step()
            scheduler.step(*([1.0] if isinstance(scheduler, torch.optim.lr_scheduler.ReduceLROnPlateau) else []))
            group = optimizer.param_groups[0]
            values.append((float(group["lr"]), *group["betas"]))
        return values

    net, other = model(), model()
    ours = history(build(name, net.parameters(), lr=torch.tensor(0.02) if tensor else 0.02), net)
    theirs = history(torch.optim.AdamW(other.parameters(), lr=torch.tensor(0.02) if tensor else 0.02), other)
    assert ours == theirs
    assert len(set(ours)) > 1


@every
def test_the_lr_of_the_moment_is_used(name):
    net = model()
    optimizer = build(name, net.parameters())
    train(net, optimizer, 0, 2)
    optimizer.param_groups[0]["lr"] = 0.0
    for state in optimizer.state.values() if CASES[name][0] is GaLoreAdafactor else ():
        state.get("exp_avg", torch.zeros(1)).zero_()  # an average of steps, with the rates that they had
    before = weights(net)
    train(net, optimizer, 2, 5)
    assert_equal(weights(net), before)


@few
def test_grad_scaler_scales_back_and_skips_overflows(name):
    net, same = model(), model()
    optimizer, reference = build(name, net.parameters()), build(name, same.parameters())
    scaler = torch.amp.GradScaler("cpu", init_scale=2.0**10)
    for i in range(4):
        net.zero_grad()
        scaler.scale(loss_of(net, i)).backward()
        overflow = i == 2
        if overflow:
            net[3].weight.grad[0, 0] = math.inf
        before = weights(net), copy.deepcopy(optimizer.state_dict())
        scaler.step(optimizer)
        scaler.update()
        if overflow:
            assert_equal((weights(net), optimizer.state_dict()), before)
        else:
            train(same, reference, i, i + 1)
    assert scaler.get_scale() == 2.0**9
    assert_equal(weights(net), weights(same))  # powers of two scale exactly


@every
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("lr", [0.0, "tensor"])
def test_a_step_with_zero_gradients_and_lr_zero_only_creates_the_state(name, dtype, lr):
    """How torch.distributed.checkpoint initialises an optimizer before it loads."""
    net, reference = model(dtype), model(dtype)
    optimizer, trained = build(name, net.parameters()), build(name, reference.parameters())
    train(reference, trained, 0, 1)
    before = weights(net)
    optimizer.param_groups[0]["lr"] = torch.tensor(0.0) if lr == "tensor" else lr
    for p in net.parameters():
        p.grad = torch.zeros_like(p)
    optimizer.step()
    assert_equal(weights(net), before)
    for p, q in zip(net.parameters(), reference.parameters(), strict=True):
        shapes = [
            {k: (x.shape, x.dtype) if isinstance(x, torch.Tensor) else x for k, x in o.state[w].items()}
            for o, w in ((optimizer, p), (trained, q))
        ]
        assert shapes[0] == shapes[1]
        moments = [optimizer.state[p][key] for key in moments_of(optimizer.state[p])]
        assert all(x.abs().max() < 1e-29 for x in moments)  # Adafactor adds an epsilon
        assert not optimizer.state[p].get("basis", torch.zeros(1)).any()


@few
def test_sharded_parameters_are_refused(name):
    dist = torch.distributed
    dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)
    try:
        mesh = dist.init_device_mesh("cpu", (1,))
        sharded = torch.nn.Parameter(dist.tensor.distribute_tensor(torch.ones(8, 6), mesh))
        with pytest.raises(NotImplementedError, match="sharded"):
            build(name, [sharded])
    finally:
        dist.destroy_process_group()
