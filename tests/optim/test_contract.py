"""What every optimizer here promises to code written for torch.optim: the checks of docs/contract.md.

A new optimizer is a row of CASES in cases.py. A test names its row of the table by `@contract`; see contract_table.py.
"""

import copy
import inspect
import io
import json
import math
import pickle
import warnings

import pytest
import torch
from torch.optim import lr_scheduler as schedulers
from torch.optim import swa_utils
from torch.optim.optimizer import register_optimizer_step_post_hook, register_optimizer_step_pre_hook

from cases import (
    CASES,
    DRAWN,
    FEW,
    TORCHS,
    assert_equal,
    assert_same_continuation,
    backward,
    build,
    contract,
    every,
    few,
    loss_of,
    model,
    moments_of,
    share,
    train,
    weights,
    weights_of,
)
from slimstate.optim import SGDP, AdamW, GaLoreAdafactor, state_bytes
from training import gradients, parameter, run

# What gives each matrix of a stack what it would get alone: nothing is drawn for each, or decided for all.
TOGETHER = ("AdamP", "SGDP", "blocks", "errors", "8bit", "8-bit", "companded", *DRAWN)
# What turns the step around instead of the gradient, whose codes are others: there is no -1.
TURNED = (
    "DCTAdamW, every step, 8-bit moments",
    "FRUGAL, columns, 8-bit moments",
    "GaLoreAdafactor, beta1, 8-bit moments",
    "GaLoreAdamW8bit",
)
ALONE = [name for name in CASES if not any(word in name for word in TOGETHER)]

# Construction.


@contract("tensors, named tensors, groups and generators of them")
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


@contract("tensors, named tensors, groups and generators of them")
@every
def test_names_stay_in_groups_and_checkpoints(name):
    net = model()
    optimizer = build(name, [{"params": net.named_parameters(), "name": "all"}])
    names = [key for key, _ in net.named_parameters()]
    for group in (optimizer.param_groups[0], optimizer.state_dict()["param_groups"][0]):
        assert group["param_names"] == names
        assert group["name"] == "all"


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


@contract("what torch refuses to construct from is refused with torch's errors")
@few
@pytest.mark.parametrize(("what", "arguments", "error", "message"), MISTAKES, ids=[m[0] for m in MISTAKES])
def test_refuses_what_torch_refuses(name, what, arguments, error, message):
    kind, _, common = CASES[name]
    p = torch.nn.Parameter(torch.randn(9, 12))
    with pytest.raises(error, match=message):
        kind(*arguments(p), **common)


@contract("what torch refuses to construct from is refused with torch's errors")
@few
def test_warns_of_a_parameter_that_is_twice_in_a_group(name):
    p = torch.nn.Parameter(torch.randn(9, 12))
    with pytest.warns(UserWarning, match="duplicate parameters"):
        build(name, [p, p])


# Keywords of torch.optim.AdamW's that a class does not have, as torch.optim.SGD, or has another meaning for.
ELSEWHERE = {SGDP: {"betas"}, GaLoreAdafactor: {"betas", "eps"}}
VALUES = [
    ({"lr": -1.0}, "lr must be a number >= 0"),
    ({"lr": math.nan}, "lr must be a number >= 0"),
    ({"lr": "0.1"}, "lr must be a number >= 0"),
    ({"lr": torch.tensor([0.1, 0.2])}, "Tensor lr must be 1-element"),
    ({"betas": (1.0, 0.9)}, r"betas must be two numbers in \[0, 1\)"),
    ({"betas": (0.9, -0.1)}, r"betas must be two numbers in \[0, 1\)"),
    ({"betas": (torch.tensor(0.9), 0.999)}, r"betas must be two numbers in \[0, 1\)"),
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


@contract("values out of range and unknown keys are refused by name")
@pytest.mark.parametrize(
    ("name", "settings", "message"),
    [(name, *value) for name in FEW for value in VALUES if ELSEWHERE.get(CASES[name][0], set()).isdisjoint(value[0])],
)
def test_refuses_values_out_of_range(name, settings, message):
    with pytest.raises(ValueError, match=message):
        build(name, [torch.nn.Parameter(torch.randn(9, 12))], **settings)


@contract("values out of range and unknown keys are refused by name")
@few
def test_refuses_unknown_keywords_and_keys(name):
    kind = CASES[name][0]
    p = torch.nn.Parameter(torch.randn(9, 12))
    with pytest.raises(TypeError, match=f"{kind.__name__} got an unexpected keyword argument 'dampening_rate'"):
        build(name, [p], dampening_rate=0.9)
    with pytest.raises(ValueError, match="unknown key 'learning_rate'"):
        build(name, [{"params": [p], "learning_rate": 1.0}])


# every keyword of torch.optim.AdamW -> a value that is not its default
KEYWORDS = {
    "lr": 0.3,
    "betas": (0.5, 0.6),
    "eps": 0.1,
    "weight_decay": 0.5,
    "amsgrad": True,
    "maximize": True,
    "foreach": True,
    "capturable": True,
    "differentiable": True,
    "fused": True,
}
REFUSED = {"amsgrad", "foreach", "capturable", "differentiable"}
UNCHANGED = [
    {"amsgrad": False, "foreach": None, "fused": None, "capturable": False, "differentiable": False},
    {"foreach": False, "fused": True},
]


@contract("every keyword of `torch.optim.AdamW` is honoured, or refused by name")
@few
@pytest.mark.parametrize("key", KEYWORDS)
def test_every_keyword_of_torchs_is_honoured_or_refused(name, key):
    assert KEYWORDS.keys() == inspect.signature(torch.optim.AdamW).parameters.keys() - {"params"}
    net, other = model(), model()
    if key in REFUSED | ELSEWHERE.get(CASES[name][0], set()):
        with pytest.raises((TypeError, ValueError), match=rf"\b{key}\b"):
            build(name, net.parameters(), **{key: KEYWORDS[key]})
        return
    train(net, build(name, net.parameters(), **{key: KEYWORDS[key]}), 0, 3)
    train(other, build(name, other.parameters()), 0, 3)
    if key == "fused":
        assert_equal(weights(net), weights(other))
    else:
        assert not any(torch.equal(p, q) for p, q in zip(weights(net), weights(other), strict=True) if p.ndim > 1)


@contract("every keyword of `torch.optim.AdamW` is honoured, or refused by name")
@few
@pytest.mark.parametrize("settings", UNCHANGED)
def test_keywords_of_torchs_that_ask_for_nothing_change_nothing(name, settings):
    net, other = model(), model()
    train(net, build(name, net.parameters(), **settings), 0, 2)
    train(other, build(name, other.parameters()), 0, 2)
    assert_equal(weights(net), weights(other))


@contract("a Tensor as learning rate")
@every
@pytest.mark.parametrize("shape", [(), (1,)])
def test_a_tensor_as_learning_rate_is_kept_and_read_at_every_step(name, shape):
    net, other = model(), model()
    lr = torch.full(shape, 2.0**-5)
    optimizer = build(name, net.parameters(), lr=lr)
    reference = build(name, other.parameters(), lr=2.0**-5)
    assert optimizer.param_groups[0]["lr"] is lr
    for i in range(2):
        train(net, optimizer, i, i + 1)
        train(other, reference, i, i + 1)
        lr.fill_(2.0**-7)
        reference.param_groups[0]["lr"] = 2.0**-7
    assert_equal(weights(net), weights(other))


@contract("sparse and complex parameters and gradients are refused by name")
@few
def test_sparse_and_complex_parameters_are_refused(name):
    matrix = torch.nn.Parameter(torch.randn(9, 12))
    for p, found in (
        (torch.ones(4, 6, dtype=torch.complex64), "complex64"),
        (torch.ones(4, 6).to_sparse(), "sparse_coo"),
    ):
        with pytest.raises(ValueError, match=rf"takes dense real floating-point parameters, got torch\.{found}"):
            build(name, [matrix, p])


@contract("torch's defaults, or transformers' for Adafactor")
@pytest.mark.parametrize("name", [n for n in CASES if "Adafactor" not in n])  # it has transformers': test_adafactor.py
def test_has_torchs_defaults(name):
    kind, matrices, common = CASES[name]
    group = kind(model().parameters(), **matrices, **common).param_groups[0]
    torchs = TORCHS.get(kind, torch.optim.AdamW)(model().parameters()).param_groups[0]
    shared = (group.keys() & torchs.keys()) - common.keys() - {"params"}
    assert {"lr", "weight_decay", "maximize"} <= shared
    assert {key: group[key] for key in shared} == {key: torchs[key] for key in shared}


@contract("no attributes that other code takes for a promise: `_step_supports_amp_scaling`, a `step` of its own")
@few
def test_an_optimizer_makes_no_promises_beyond_torchs(name):
    optimizer = build(name, model().parameters())
    assert not hasattr(optimizer, "_step_supports_amp_scaling")  # else GradScaler would leave the unscaling to it
    assert "step" not in vars(optimizer)
    kind = type(optimizer)
    for method in ("state_dict", "register_step_post_hook"):
        assert getattr(kind, method) is getattr(torch.optim.Optimizer, method)


@contract("groups hold what JSON can write, beside a Tensor lr")
@every
def test_groups_hold_primitives(name):
    optimizer = build(name, model().named_parameters())
    groups = optimizer.state_dict()["param_groups"]
    written = json.loads(json.dumps(groups))
    assert [group.keys() for group in written] == [group.keys() for group in groups]


@contract("NumPy's numbers")
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


@contract("float64, float32, bfloat16 and float16 models train")
@every
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16, torch.float16])
def test_loss_falls(name, dtype):
    net = model(dtype)
    optimizer = build(name, net.parameters())
    before = backward(net, 0).item()
    for _ in range(10):
        backward(net, 0)
        optimizer.step()
    assert backward(net, 0).item() < 0.9 * before


# One of each kind: no axis, nothing in it, one row, one column, a convolution, a stack of matrices.
SHAPES = [(), (7,), (0,), (0, 6), (6, 0), (1, 9), (9, 1), (1, 1), (6, 2, 3, 3), (2, 5, 4), (3, 5, 4)]


def stacked(name):
    """The first axis counts matrices, where an optimizer can be told."""
    return {"batch_dims": 1} if "batch_dims" in inspect.signature(CASES[name][0]).parameters else {}


@contract("0-d, empty, 1xN, Nx1, 4-d and stacked 3-d parameters train")
@every
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.float16, torch.bfloat16])
def test_parameters_of_every_shape_train(name, dtype):
    params = [torch.nn.Parameter(torch.randn(shape).to(dtype)) for shape in SHAPES]
    targets = [p.detach() + torch.randn(p.shape).to(dtype) for p in params]
    groups = [{"params": params[:-1]}, {"params": params[-1:], **stacked(name)}]
    optimizer = build(name, groups, **({"lr": 0.1} | CASES[name][2] | share(name)))

    def distances():
        return [torch.dist(p.detach().double(), t.double()).item() for p, t in zip(params, targets, strict=True)]

    before = distances()
    for _ in range(6):
        run(optimizer, params, [[p.detach() - t for p, t in zip(params, targets, strict=True)]])
    for p, shape, b, a in zip(params, SHAPES, before, distances(), strict=True):
        assert (p.shape, p.dtype) == (shape, dtype)
        assert a < 0.99 * b if p.numel() else a == b == 0


def transposed(x):
    return x.transpose(0, -1).contiguous().transpose(0, -1)


def every_other(x):
    """Every other element in each direction of a larger tensor."""
    base = torch.full([2 * n + 1 for n in x.shape], math.nan, dtype=x.dtype)
    view = base[tuple(slice(1, None, 2) for _ in x.shape)]
    return view.copy_(x)


def channels_last(x):
    return x.to(memory_format=torch.channels_last) if x.ndim == 4 else x


@contract("strided and channels_last parameters and gradients train as contiguous ones, in place")
@every
@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16])
def test_the_layout_of_memory_changes_nothing(name, dtype):
    shapes, steps = [(12, 9), (7,), (6, 3, 2, 2)], 4
    grads = list(zip(*(gradients(shape, steps, dtype) for shape in shapes), strict=True))
    contiguous = [parameter(shape, dtype) for shape in shapes]
    run(build(name, contiguous), contiguous, grads)
    for layout, of_gradients in (
        (transposed, torch.clone),
        (channels_last, channels_last),
        (every_other, transposed),
        (torch.clone, every_other),
    ):
        memory = [layout(parameter(shape, dtype).detach()) for shape in shapes]
        params = [torch.nn.Parameter(x) for x in memory]
        optimizer = build(name, params)
        places = [(p.data_ptr(), p.stride()) for p in params]
        for step in grads:
            given = [of_gradients(g) for g in step]
            for p, g in zip(params, given, strict=True):
                p.grad = g
            optimizer.step()
            for p, g, clean in zip(params, given, step, strict=True):
                assert p.grad is g
                assert torch.equal(g, clean)
        assert places == [(p.data_ptr(), p.stride()) for p in params]
        tolerance = dict(rtol=1e-9, atol=1e-9) if dtype == torch.float64 else dict(rtol=2e-2, atol=2e-3)
        torch.testing.assert_close(weights_of(params), weights_of(contiguous), **tolerance)
        for x in memory if layout is every_other else ():
            assert x._base.isnan().sum() == x._base.numel() - x.numel()  # what lies between is as it was


@contract("strided and channels_last parameters and gradients train as contiguous ones, in place")
@every
def test_an_expanded_gradient_is_as_good_as_a_written_out_one(name):
    """With strides of zero, as where a module broadcasts its weight."""
    shape = (6, 4, 2, 2)
    p, q = parameter(shape, torch.float64), parameter(shape, torch.float64)
    optimizer, reference = build(name, [p]), build(name, [q])
    for g in gradients((6, 4, 1, 1), 4, torch.float64):
        p.grad = g.expand(shape)
        optimizer.step()
        run(reference, [q], [[g.expand(shape).contiguous()]])
    assert 0 in p.grad.stride()
    torch.testing.assert_close(p, q, rtol=1e-9, atol=1e-9)


@contract("0-d, empty, 1xN, Nx1, 4-d and stacked 3-d parameters train")
@pytest.mark.parametrize("name", ALONE)
def test_a_stack_trains_as_its_matrices(name):
    shape, steps, size = (3, 9, 12), 5, 3
    grads = list(zip(*(gradients(shape[1:], steps, torch.float64, seed) for seed in range(size)), strict=True))
    stack = parameter(shape, torch.float64)
    alone = [torch.nn.Parameter(w.clone()) for w in stack.detach()]
    run(build(name, [stack], **stacked(name)), [stack], [[torch.stack(step)] for step in grads])
    for j, p in enumerate(alone):
        run(build(name, [p]), [p], [[step[j]] for step in grads])
    torch.testing.assert_close(stack.detach(), torch.stack(weights_of(alone)), rtol=1e-9, atol=1e-9)


@contract("`maximize` is minimising the negative")
@every
def test_maximising_is_minimising_the_negative(name):
    net, other = model(), model()
    down, up = build(name, net.parameters()), build(name, other.parameters(), maximize=True)
    for i in range(4):
        backward(net, i)
        run(up, list(other.parameters()), [[-p.grad for p in net.parameters()]])
        down.step()
    if name in TURNED:
        torch.testing.assert_close(weights(net), weights(other), rtol=0, atol=4e-3)
    else:
        assert_equal(weights(net), weights(other))


@contract("closures run with gradients, and their loss is returned")
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


@contract("sparse and complex parameters and gradients are refused by name")
@few
@pytest.mark.parametrize("kind", ["sparse", "complex"])
def test_sparse_and_complex_gradients_are_refused_before_anything_changes(name, kind):
    net = model()
    optimizer = build(name, net.named_parameters())
    train(net, optimizer, 0, 1)
    before = weights(net), copy.deepcopy(optimizer.state_dict())
    backward(net, 1)
    p = net[5].weight
    if kind == "complex":
        p.grad_dtype = None  # else torch refuses it by itself
    p.grad = p.grad.to_sparse() if kind == "sparse" else p.grad.to(torch.complex64)
    with pytest.raises(RuntimeError, match=rf"takes dense real gradients, got a {kind} one for 5\.weight"):
        optimizer.step()
    assert_equal((weights(net), optimizer.state_dict()), before)


@contract("parameters on the meta device are refused by name, and train once they are materialised")
@few
def test_parameters_without_data_are_refused_until_they_have_some(name):
    net = model().to("meta")
    optimizer = build(name, net.named_parameters())
    for p in net.parameters():
        p.grad = torch.empty_like(p)
    with pytest.raises(RuntimeError, match=r"parameter 0\.weight is on the meta device"):
        optimizer.step()
    assert not optimizer.state
    net.to_empty(device="cpu")  # makes new parameters
    net.load_state_dict(model().state_dict())
    optimizer.param_groups[0]["params"] = list(net.parameters())
    same = model()
    train(net, optimizer, 0, 2)
    train(same, build(name, same.named_parameters()), 0, 2)
    assert_equal(weights(net), weights(same))


@contract("a step under another default dtype")
@every
def test_another_default_dtype_changes_nothing(name):
    nets, grads = (model(), model()), []
    reference = build(name, nets[0].parameters())
    for i in range(3):
        train(nets[0], reference, i, i + 1)
        grads.append([p.grad for p in nets[0].parameters()])
        nets[0].zero_grad()
    torch.set_default_dtype(torch.float64)
    try:
        optimizer = build(name, nets[1].parameters())
        run(optimizer, list(nets[1].parameters()), grads)
    finally:
        torch.set_default_dtype(torch.float32)
    assert_equal(weights(nets[0]), weights(nets[1]))
    assert_equal(optimizer.state_dict(), reference.state_dict())


@contract("parameters without gradients, zero gradients")
@every
def test_without_gradients_a_step_does_nothing(name):
    net = model()
    before = weights(net)
    optimizer = build(name, net.parameters())
    assert optimizer.step(lambda: 3.0) == 3.0
    assert_equal(weights(net), before)
    assert not optimizer.state_dict()["state"]
    assert state_bytes(optimizer) == 0


@contract("parameters without gradients, zero gradients")
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


@contract("frozen and thawed layers")
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


@contract("the first step creates all state; `step` is a float32 tensor on the CPU")
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


@contract("a parameter's state can be dropped")
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


@contract("parameters are swapped or moved to another dtype before the first step")
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
    assert_equal(weights_of(optimizer.param_groups[0]["params"]), weights(other))


@pytest.mark.parametrize("copied", [False, True])
@few
def test_parameters_that_a_wrapper_flattens_are_refused_before_anything_is_changed(name, copied):
    """As ZeRO stages 1 and 2 do to an optimizer that is given to them."""
    net = model()
    optimizer = build(name, net.parameters())
    optimizer = copy.deepcopy(optimizer) if copied else optimizer
    flat = torch.nn.Parameter(torch.cat([p.detach().flatten() for p in net.parameters()]))
    optimizer.param_groups[0]["params"] = [flat]
    optimizer.step()  # without a gradient
    flat.grad = torch.ones_like(flat)
    before = flat.detach().clone()
    if CASES[name][0] is AdamW and "companded" not in name:  # it goes by entries
        optimizer.step()
        assert not torch.equal(flat, before)
        return
    with pytest.raises(RuntimeError, match=r"have lost their shapes\. Use torch\.distributed\.fsdp\.fully_shard"):
        optimizer.step()
    assert torch.equal(flat, before)
    assert not optimizer.state.get(flat)


@few
def test_parameters_of_zero_stage_3_are_refused(name):
    net = model()
    for p in net.parameters():
        p.ds_id = 0
    with pytest.raises(NotImplementedError, match=r"use torch\.distributed\.fsdp\.fully_shard"):
        build(name, net.parameters())


@contract("parameters are swapped or moved to another dtype before the first step")
@every
def test_a_model_can_change_its_dtype_before_the_first_step(name):
    net, other = model(), model(torch.float64)
    optimizer = build(name, net.parameters())
    net.to(torch.float64)
    train(net, optimizer, 0, 3)
    train(other, build(name, other.parameters()), 0, 3)
    assert_equal(weights(net), weights(other))


@contract("groups are like separate optimizers")
@few
def test_groups_are_like_separate_optimizers(name):
    net, a, b = model(), model(), model()
    settings = [{"lr": 0.05, "weight_decay": 0.3}, {"lr": 0.001, "betas": (0.5, 0.9)}]
    if "betas" in ELSEWHERE.get(CASES[name][0], ()):
        del settings[1]["betas"]
    # By name, so that what is drawn does not go by the position.
    parts = [lambda n: list(n.named_parameters())[:4], lambda n: list(n.named_parameters())[4:]]
    joint = build(name, [{"params": part(net), **s} for part, s in zip(parts, settings, strict=True)])
    separate = [build(name, part(n), **s) for n, part, s in zip((a, b), parts, settings, strict=True)]
    for i in range(4):
        backward(net, i)
        for p, q, r in zip(net.parameters(), a.parameters(), b.parameters(), strict=True):
            q.grad, r.grad = p.grad.clone(), p.grad.clone()
        for optimizer in (joint, *separate):
            optimizer.step()
    assert_equal(weights(net), weights(a)[:4] + weights(b)[4:])


@contract("parameters of several dtypes in one group")
@few
def test_parameters_of_several_dtypes_share_a_group(name):
    dtypes = [torch.float32, torch.bfloat16, torch.float64, torch.float16, torch.float32]
    shapes = [(12, 20), (20, 12), (9, 15), (12, 20), (7,)]
    params = [torch.nn.Parameter(torch.randn(s).to(d)) for s, d in zip(shapes, dtypes, strict=True)]
    alone = [torch.nn.Parameter(p.detach().clone()) for p in params]
    settings = {"update_proj_gap": 100} if "update_proj_gap" in CASES[name][1] else {}  # they are staggered
    joint, separate = build(name, [(str(i), p) for i, p in enumerate(params)], **settings), []
    for i, q in enumerate(alone):
        matrix = torch.nn.Parameter(torch.ones(9, 12))  # a rank needs a matrix; without a gradient it stands still
        separate.append(build(name, [(str(i), q), ("matrix", matrix)], **settings))
    for _ in range(4):
        for p, q in zip(params, alone, strict=True):
            p.grad = torch.randn(p.shape).to(p.dtype)
            q.grad = p.grad.clone()
        for optimizer in (joint, *separate):
            optimizer.step()
    assert_equal(weights_of(params), weights_of(alone))


@contract("`add_param_group`")
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


# Copies and checkpoints.


@contract("`deepcopy` and `pickle`")
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
    assert_same_continuation(net, optimizer, other, copied, 6, steps=1)


@contract("`repr` shows the settings")
@every
def test_repr_shows_the_class_and_the_settings(name):
    kind, matrices, common = CASES[name]
    text = repr(build(name, model().parameters(), lr=0.0125))
    assert text.startswith(kind.__name__)
    for key, value in (matrices | common | {"lr": 0.0125}).items():
        assert f"{key}: {value}" in text


@contract("hooks of steps and state dicts, global ones too, fire in order")
@every
def test_other_hooks_fire_and_foreign_state_entries_survive(name):
    net = model()
    optimizer = build(name, net.parameters())
    calls = []
    optimizer.register_step_pre_hook(lambda *_: calls.append("step pre"))
    optimizer.register_step_post_hook(lambda *_: calls.append("step post"))
    everywhere = [
        register_optimizer_step_pre_hook(lambda *_: calls.append("global step pre")),
        register_optimizer_step_post_hook(lambda *_: calls.append("global step post")),
    ]
    optimizer.register_state_dict_pre_hook(lambda *_: calls.append("state_dict pre"))
    optimizer.register_state_dict_post_hook(lambda *_: calls.append("state_dict post"))
    optimizer.state["test"] = 1  # as torch's own tests do
    try:
        train(net, optimizer, 0, 1)
    finally:
        for hook in everywhere:
            hook.remove()
    saved = optimizer.state_dict()
    steps = ["global step pre", "step pre", "step post", "global step post"]
    assert calls == [*steps, "state_dict pre", "state_dict post"]
    optimizer.load_state_dict(saved)
    assert optimizer.state["test"] == 1
    assert state_bytes(optimizer) > 0


# What acts on an optimizer from outside.


def cycles_momentum(optimizer):
    return not optimizer.defaults.keys().isdisjoint({"betas", "momentum"})


SCHEDULERS = {
    "OneCycle": lambda o: schedulers.OneCycleLR(o, max_lr=0.05, total_steps=12, cycle_momentum=cycles_momentum(o)),
    "Cyclic": lambda o: schedulers.CyclicLR(o, 0.01, 0.1, step_size_up=3, cycle_momentum=cycles_momentum(o)),
    "Lambda": lambda o: schedulers.LambdaLR(o, lambda i: 0.9**i),
    "Plateau": lambda o: schedulers.ReduceLROnPlateau(o, patience=0),
}


@contract("schedulers: OneCycle and Cyclic with momentum, Lambda, Plateau; with float and Tensor lr")
@few
@pytest.mark.parametrize("scheduler", SCHEDULERS)
@pytest.mark.parametrize("tensor", [False, True])
def test_training_under_a_scheduler_is_training_with_the_rates_it_gives_torchs_optimizers(name, scheduler, tensor):
    def lr():
        return torch.tensor(0.02) if tensor else 0.02

    def rates(optimizer):
        group = optimizer.param_groups[0]
        return {"lr": float(group["lr"])} | {key: group[key] for key in ("betas", "momentum") if key in own}

    def advance(scheduler):
        scheduler.step(*([1.0] if isinstance(scheduler, schedulers.ReduceLROnPlateau) else []))

    net, same = model(), model()
    ours, by_hand = build(name, net.parameters(), lr=lr()), build(name, same.parameters())
    own = ours.param_groups[0].keys()
    weight = [torch.nn.Parameter(torch.ones(1))]
    theirs = torch.optim.SGD(weight, lr(), momentum=0.9) if "momentum" in own else torch.optim.AdamW(weight, lr())
    if not cycles_momentum(ours):
        del theirs.defaults["betas"]
    both, seen = [SCHEDULERS[scheduler](o) for o in (ours, theirs)], []
    for i in range(6):
        assert rates(ours) == rates(theirs)
        seen.append(rates(theirs))
        by_hand.param_groups[0].update(seen[-1])
        train(net, ours, i, i + 1)
        train(same, by_hand, i, i + 1)
        theirs.step()
        for each in both:
            advance(each)
    assert_equal(weights(net), weights(same))
    assert isinstance(ours.param_groups[0]["lr"], torch.Tensor) == tensor
    for key in seen[0].keys() if "Cycl" in scheduler else ["lr"]:
        assert len({rates[key] for rates in seen}) > 3


@contract("averages of weights: `AveragedModel` and `SWALR`")
@few
@pytest.mark.parametrize("ema", [False, True])
def test_averaged_models_follow_training(name, ema):
    net = model()
    optimizer = build(name, net.parameters())
    expected: list[torch.Tensor] = []
    averaged = swa_utils.AveragedModel(net, multi_avg_fn=swa_utils.get_ema_multi_avg_fn(0.75) if ema else None)
    scheduler = swa_utils.SWALR(optimizer, swa_lr=0.001, anneal_epochs=3)
    for i in range(4):
        train(net, optimizer, i, i + 1)
        scheduler.step()
        averaged.update_parameters(net)
        now, part = weights(net), 0.25 if ema else 1 / (i + 1)
        expected = [torch.lerp(e, w, part) for e, w in zip(expected, now, strict=True)] if i else now
    torch.testing.assert_close(weights(averaged.module), expected)
    assert optimizer.param_groups[0]["lr"] == pytest.approx(0.001)
    same = model()
    reference = build(name, same.parameters())
    scheduler = swa_utils.SWALR(reference, swa_lr=0.001, anneal_epochs=3)
    for i in range(4):
        train(same, reference, i, i + 1)
        scheduler.step()
    assert_equal(weights(net), weights(same))  # averaging leaves the run alone


@contract("the learning rate of the moment is used")
@every
def test_the_lr_of_the_moment_is_used(name):
    net = model()
    optimizer = build(name, net.parameters())
    train(net, optimizer, 0, 2)
    optimizer.param_groups[0]["lr"] = 0.0
    for state in optimizer.state.values() if CASES[name][0] is GaLoreAdafactor else ():
        for key in state.keys() & {"exp_avg", "exp_avg_scale"}:
            state[key].zero_()  # an average of steps, with the rates that they had
    before = weights(net)
    train(net, optimizer, 2, 5)
    assert_equal(weights(net), before)


@contract("`GradScaler` scales back, and skips an overflow")
@every
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


@contract("a step with zero gradients and lr 0 only creates the state")
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
        state = optimizer.state[p]
        moments = [state.get(f"{key}_scale", state[key]) for key in moments_of(state)]
        assert all(x.abs().max() < 1e-29 for x in moments)  # Adafactor adds an epsilon
        assert not optimizer.state[p].get("basis", torch.zeros(1)).any()


@pytest.fixture
def process_group():
    """Of this process alone."""
    torch.distributed.init_process_group("gloo", store=torch.distributed.HashStore(), rank=0, world_size=1)
    yield torch.distributed
    torch.distributed.destroy_process_group()


@contract("`DistributedDataParallel` and `ZeroRedundancyOptimizer`, in a group of one process")
@few
def test_data_parallel_wrappers_train_and_resume(name, process_group):
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # torch's own deprecations
        from torch.distributed.optim import ZeroRedundancyOptimizer

    def wrapped(net):
        kind, matrices, common = CASES[name]
        settings = {"lr": 0.02, **matrices, **common}
        return ZeroRedundancyOptimizer(net.parameters(), optimizer_class=kind, **settings)

    net, same = model(), model()
    optimizer = wrapped(net)
    train(torch.nn.parallel.DistributedDataParallel(net), optimizer, 0, 3)
    place = {p: i for i, p in enumerate(net.parameters())}
    order = [place[p] for p in optimizer.optim.param_groups[0]["params"]]  # by size: what is drawn goes by the position
    params = list(same.parameters())
    train(same, build(name, [params[i] for i in order]), 0, 3)
    assert_equal(weights(net), weights(same))
    other = copy.deepcopy(net)
    resumed = wrapped(other)
    optimizer.consolidate_state_dict()
    resumed.load_state_dict(copy.deepcopy(optimizer.state_dict()))  # it does not copy by itself
    assert_same_continuation(net, optimizer, other, resumed, 3)
