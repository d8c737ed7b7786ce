"""PyTorch's own suite for optimizers, over its own descriptions of optimizers, for every optimizer here.

The wheel has `torch.testing._internal.common_optimizers`, which describes optimizers and their inputs, but not the
tests that go over them (`TestOptimRenewed` of test/test_optim.py). They are written anew here from what they check,
under their names; the variants of cases.py are the inputs. pytest goes over the descriptions by itself: classes that
torch makes for each device would hide from docs/contract.md which optimizer a test is about.

Left out, since there is nothing to check:

- test_rosenbrock_sparse, test_complex, test_complex_2d: sparse gradients and complex parameters are refused;
  `test_sparse_and_complex` checks how.
- TestDifferentiableOptimizer: refused, see `test_errors`.
- test_defaults_changed_to_foreach: looks for a function of torch's naming, and there is no `foreach` to change to.
- ..._multigpu, test_fused_cpu_matches_cuda, test_mixed_device_dtype over devices: need several devices;
  test_mixed_device_dtype goes over dtypes here.
- test_foreach_large_tensor, test_fused_large_tensor: 2^32 elements. test_peak_memory_foreach: of CUDA's allocator; no
  temporaries of the weights' size are made, which the tests of each optimizer check.
- test_cpu_load_state_dict: of `capturable` and of `fused` with its counter on the device; ours stays on the CPU.
- TestLRScheduler, TestSWAUtils: what concerns optimizers is in test_contract.py.
"""

import copy
import io
import warnings

import pytest
import torch
from torch.optim import lr_scheduler as schedulers
from torch.optim.optimizer import register_optimizer_step_post_hook, register_optimizer_step_pre_hook

from cases import CASES, assert_equal, contract, share

with warnings.catch_warnings():
    warnings.simplefilter("ignore")
    common = pytest.importorskip("torch.testing._internal.common_optimizers", exc_type=ImportError)

SHARED = [{}, {"lr": 0.01}, {"weight_decay": 0.1}, {"weight_decay": 0.1, "maximize": True}]
SHARED += [{"lr": torch.tensor(0.001), "weight_decay": 0.1, "maximize": True}]


def description(kind):
    """An optimizer as torch's suite describes its own."""
    variants = [{"lr": 0.02, **CASES[name][1], **CASES[name][2], **share(name)} for name in CASES_OF[kind]]

    def inputs(device, dtype=None):
        settings = [variants[0] | shared for shared in SHARED] + variants[1:]
        return [common.OptimizerInput(None, each, str(each)) for each in settings]

    def errors(device, dtype):
        found = common.get_error_inputs_for_all_optims(device, dtype)
        mistakes = [{"lr": -1e-2}, {"weight_decay": -1.0}, {"eps": -1.0}]
        mistakes += [{"differentiable": True}, {"capturable": True}, {"foreach": True}, {"fused": False}]
        for settings, error in [({"nonsense": 1}, TypeError), *((settings, ValueError) for settings in mistakes)]:
            given = common.OptimizerInput(None, settings, f"refused: {settings}")
            found.append(
                common.ErrorOptimizerInput(given, error_type=error, error_regex=rf"\b{next(iter(settings))}\b")
            )
        return found

    return common.OptimizerInfo(
        kind,
        optim_inputs_func=inputs,
        optim_error_inputs_func=errors,
        scheduler_inputs=(
            [lambda o: schedulers.StepLR(o, gamma=0.9, step_size=10)],
            [lambda o: schedulers.StepLR(o, gamma=0.9, step_size=10), schedulers.ReduceLROnPlateau],
            [lambda o: schedulers.ExponentialLR(o, gamma=0.99)],
            [lambda o: schedulers.LinearLR(o, start_factor=0.4, total_iters=4)],
            [lambda o: schedulers.ConstantLR(o, factor=0.4, total_iters=4)],
            [lambda o: schedulers.PolynomialLR(o, power=0.9, total_iters=40)],
        ),
        supported_impls=("fused",),
        supports_fused_on=("cpu",),
        supports_complex=False,
    )


CASES_OF = {}
for case, (kind, *_) in CASES.items():
    CASES_OF.setdefault(kind, []).append(case)
INFOS = {kind.__name__: description(kind) for kind in CASES_OF}
suite = pytest.mark.parametrize("name", INFOS)


def inputs(name, *, rate=False):
    """The settings that an optimizer is described by; with `rate` all of them have a learning rate."""
    for given in INFOS[name].optim_inputs_func("cpu"):
        settings = copy.deepcopy(given.kwargs)
        if settings["lr"] is None and rate:
            settings["lr"] = 0.02
        yield settings


def make(name, params, settings):
    return INFOS[name].optim_cls(params, **settings)


class Line:
    """A weight (10 x 5), a bias and an input, as torch's suite has them, and half the square of what comes out."""

    def __init__(self, dtype=torch.float32, *, contiguous=True):
        weight, bias, self.x = (torch.randn(shape).to(dtype) for shape in ((10, 5, 2), 10, 5))
        self.weight = torch.nn.Parameter(weight[..., 0].contiguous() if contiguous else weight[..., 0])
        self.bias = torch.nn.Parameter(bias)
        assert self.weight.is_contiguous() == contiguous

    @property
    def params(self):
        return [self.weight, self.bias]

    @property
    def named(self):
        return [("weight", self.weight), ("bias", self.bias)]

    def loss(self):
        self.weight.grad = self.bias.grad = None
        loss = (self.weight.mv(self.x) + self.bias).square().sum() / 2
        loss.backward()
        return loss

    def weights(self):
        return [p.detach().clone() for p in self.params]

    def train(self, optimizer, steps):
        for _ in range(steps):
            optimizer.step(self.loss)

    def copy(self):
        return copy.deepcopy(self)


def assert_goes_right(before, after, settings):
    assert after > before if settings.get("maximize") else after < before


@contract("PyTorch's suite: construction, errors, printing")
@suite
def test_optim_infos_do_not_specify_global_cliquey_kwargs(name):
    for settings in inputs(name):
        assert settings.keys().isdisjoint({"foreach", "fused", "differentiable"})


@contract("PyTorch's suite: construction, errors, printing")
@suite
def test_errors(name):
    for wrong in INFOS[name].optim_error_inputs_func("cpu", torch.float32):
        assert wrong.error_on == common.OptimizerErrorEnum.CONSTRUCTION_ERROR
        given = wrong.optimizer_error_input
        params = [torch.nn.Parameter(torch.randn(2, 3))] if given.params is None else given.params
        warns = issubclass(wrong.error_type, Warning)
        expected = (pytest.warns if warns else pytest.raises)(wrong.error_type, match=wrong.error_regex)
        with expected:
            make(name, params, given.kwargs)


@contract("PyTorch's suite: training goes the right way, with and without schedulers, by groups")
@suite
@pytest.mark.parametrize("contiguous", [True, False])
def test_forloop_goes_right_direction(name, contiguous):
    for settings in inputs(name):
        line = Line(contiguous=contiguous)
        optimizer = make(name, line.params, settings)
        before = line.loss().item()
        line.train(optimizer, 20)
        assert_goes_right(before, line.loss().item(), settings)


@contract("PyTorch's suite: training goes the right way, with and without schedulers, by groups")
@suite
@pytest.mark.parametrize("grouped", [False, True])
def test_forloop_goes_right_direction_with_lrsched(name, grouped):
    """With `grouped` it is torch's test_param_group_with_lrscheduler_goes_right_direction."""
    settings = next(inputs(name))
    for makers in INFOS[name].scheduler_inputs:
        line = Line()
        groups = [{"params": [line.weight]}, {"params": [line.bias], "lr": 0.01}]
        optimizer = make(name, groups if grouped else line.params, settings)
        before = line.loss().item()
        chain = [maker(optimizer) for maker in makers]
        rates = set()
        for _ in range(20):
            loss = optimizer.step(line.loss)
            rates.add(tuple(group["lr"] for group in optimizer.param_groups))
            for scheduler in chain:
                scheduler.step(*([loss.detach()] if isinstance(scheduler, schedulers.ReduceLROnPlateau) else []))
        assert_goes_right(before, line.loss().item(), settings)
        assert len(rates) > 1


@contract("PyTorch's suite: training goes the right way, with and without schedulers, by groups")
@suite
def test_tensor_lr(name):
    for settings in inputs(name, rate=True):
        line = Line()
        other = line.copy()
        rate = float(settings["lr"])
        line.train(make(name, line.params, settings | {"lr": torch.tensor(rate, dtype=torch.float64)}), 3)
        other.train(make(name, other.params, settings | {"lr": rate}), 3)
        assert_equal(line.weights(), other.weights())


def assert_implementations_agree(name, settings, dtype, one, another, tolerance):
    """Seven steps of a network with a 0-d parameter, one of them without gradients, and a layer that is frozen from the
    third to the fifth; by both of two ways to build the optimizer's parameters and itself."""
    ends = []
    for build in (one, another):
        torch.default_generator.manual_seed(3)
        layers = [torch.nn.Linear(5, 10), torch.nn.Sigmoid(), torch.nn.Linear(10, 4), torch.nn.Sigmoid()]
        net = torch.nn.Sequential(*layers).to(dtype)
        scalar = torch.nn.Parameter(torch.tensor(0.5, dtype=dtype))
        x = torch.rand(8, 5).to(dtype)  # as many as it takes for gradients whose subspaces are well determined
        optimizer = build(net, scalar, settings)
        for i in range(7):
            net[2].requires_grad_(not 3 <= i < 5)
            optimizer.zero_grad()
            (net(x).sum() * scalar).backward()
            if i == 2:
                optimizer.zero_grad()
            optimizer.step()
        params = [*net.parameters(), scalar]
        states = [[x for x in optimizer.state[p].values() if isinstance(x, torch.Tensor)] for p in params]
        ends.append(([p.detach() for p in params], states))
        assert optimizer.state[net[2].weight]["step"].item() == 4
        assert optimizer.state[scalar]["step"].item() == 6
    torch.testing.assert_close(*ends, **tolerance)


def plain(name, **more):
    return lambda net, scalar, settings: make(name, [*net.parameters(), scalar], settings | more)


@contract("PyTorch's suite: implementations agree")
@suite
def test_foreach_matches_forloop(name):
    """Here it is torch's kernel over lists of contiguous tensors against our passes over blocks of strided ones."""

    def strided(net, scalar, settings):
        for module in net[::2]:
            module.weight = torch.nn.Parameter(module.weight.detach().mT.contiguous().mT)
        return make(name, [*net.parameters(), scalar], settings)

    for settings in inputs(name):
        tolerance = dict(rtol=1e-7, atol=1e-9)
        if settings.get("basis_dtype"):  # whose codes are others where a rounding decides
            tolerance = dict(rtol=1e-3, atol=1e-6)
        assert_implementations_agree(name, settings, torch.float64, plain(name), strided, tolerance)


@contract("PyTorch's suite: implementations agree")
@suite
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.float16, torch.bfloat16])
def test_fused_matches_forloop(name, dtype):
    """`fused=True` is what is done anyway; AdamW's is held against torch's loop."""
    settings = next(inputs(name))
    exact, close = dict(rtol=0, atol=0), dict(rtol=1e-5, atol=1e-6)
    assert_implementations_agree(name, settings, dtype, plain(name), plain(name, fused=True), exact)
    if name == "AdamW" and dtype in (torch.float64, torch.float32):

        def loop(net, scalar, settings):
            return torch.optim.AdamW([*net.parameters(), scalar], **settings, foreach=False)

        assert_implementations_agree(name, settings, dtype, plain(name), loop, close)


@contract("PyTorch's suite: implementations agree")
@suite
def test_set_default_dtype_works_with_foreach(name):
    for settings in inputs(name):
        line = Line()
        other = line.copy()
        line.train(make(name, line.params, settings), 2)
        torch.set_default_dtype(torch.float64)
        try:
            optimizer = make(name, other.params, settings)
            other.train(optimizer, 2)
        finally:
            torch.set_default_dtype(torch.float32)
        assert_equal(line.weights(), other.weights())
        assert {optimizer.state[p]["step"].dtype for p in other.params} == {torch.float32}


@contract("PyTorch's suite: implementations agree")
@suite
def test_mixed_device_dtype(name):
    """Of the dtypes: each parameter goes as in an optimizer of its own."""
    dtypes = [torch.float64, torch.float32, torch.float16, torch.bfloat16]
    for settings in inputs(name):
        if settings.get("projection") == "blocks":
            continue  # it chooses among the tensors of a group
        lines = [Line(dtype) for dtype in dtypes]
        alone = [line.copy() for line in lines]
        gap = {"update_proj_gap": 100} if "update_proj_gap" in settings else {}  # refreshes are staggered
        pairs = lambda some: [(f"{i}.{key}", p) for i, each in some for key, p in each.named]  # noqa: E731
        joint = make(name, pairs(enumerate(lines)), settings | gap)
        each = [make(name, pairs([(i, line)]), settings | gap) for i, line in enumerate(alone)]
        for _ in range(3):
            for line in [*lines, *alone]:
                line.loss()
            for optimizer in [joint, *each]:
                optimizer.step()
        assert_equal([line.weights() for line in lines], [line.weights() for line in alone])


@contract("PyTorch's suite: parameters without data, overflows")
@suite
def test_fused_error_on_params_on_meta(name):
    for settings in inputs(name):
        with torch.device("meta"):
            net = torch.nn.Sequential(torch.nn.Linear(5, 4), torch.nn.BatchNorm1d(4))
        optimizer = make(name, net.parameters(), settings | {"fused": True})
        for p in net.parameters():
            p.grad = torch.empty_like(p)
        with pytest.raises(RuntimeError, match="on the meta device"):
            optimizer.step()
        net.to_empty(device="cpu")
        for p in net.parameters():
            torch.nn.init.ones_(p)
            p.grad = torch.ones_like(p)
        make(name, net.parameters(), settings | {"fused": True}).step()
        assert all(p.isfinite().all() for p in net.parameters())


@contract("PyTorch's suite: parameters without data, overflows")
@suite
def test_fused_does_not_step_if_foundinf(name):
    """The scaler looks, and does not step; ours never see the overflow."""
    for settings in inputs(name):
        line = Line()
        optimizer = make(name, line.params, settings)
        line.train(optimizer, 1)
        before = line.weights(), copy.deepcopy(optimizer.state_dict())
        scaler = torch.amp.GradScaler("cpu", init_scale=4.0)
        scaler.scale(line.loss())
        line.bias.grad[0] = torch.inf
        scaler.step(optimizer)
        scaler.update()
        assert scaler.get_scale() == 2.0
        assert_equal((line.weights(), optimizer.state_dict()), before)


@contract("PyTorch's suite: training goes the right way, with and without schedulers, by groups")
@suite
def test_param_groups_weight_decay(name):
    for settings in inputs(name):
        line = Line()
        decayed = line.copy()
        optimizer = make(
            name, [{"params": line.params[:1], "weight_decay": 0.0}, {"params": line.params[1:]}], settings
        )
        other = make(
            name, [{"params": decayed.params[:1], "weight_decay": 0.5}, {"params": decayed.params[1:]}], settings
        )
        for net, o in ((line, optimizer), (decayed, other)):
            for p in net.params:
                p.grad = torch.ones_like(p)
            o.step()
        assert decayed.weight.norm() < line.weight.norm()
        assert_equal(line.weights()[1], decayed.weights()[1])


@contract("PyTorch's suite: training goes the right way, with and without schedulers, by groups")
@suite
def test_param_groups_lr(name):
    for settings in inputs(name):
        line, still = Line(), torch.nn.Parameter(torch.randn(10, 5))
        start = still.detach().clone()
        optimizer = make(name, [{"params": line.params}, {"params": [still], "lr": 1e-28}], settings)
        before = line.loss().item()
        for _ in range(10):
            line.loss()
            still.grad = torch.randn_like(still)
            optimizer.step()
        assert torch.equal(still, start)
        assert_goes_right(before, line.loss().item(), settings)


@contract("PyTorch's suite: steps without gradients and with zeros, states, step hooks")
@suite
def test_step_is_noop_when_params_have_no_grad(name):
    for settings in inputs(name):
        line = Line()
        before = line.weights()
        assert make(name, line.params, settings).step(lambda: 1.0) == 1.0
        assert_equal(line.weights(), before)


@contract("PyTorch's suite: steps without gradients and with zeros, states, step hooks")
@suite
def test_step_is_noop_for_zero_grads(name):
    for settings in inputs(name):
        p = torch.nn.Parameter(torch.randn(5, 1))
        before = p.detach().clone()
        optimizer = make(name, [p], settings | {"weight_decay": 0.0})
        for _ in range(2):
            p.grad = torch.zeros_like(p)
            optimizer.step()
        assert torch.equal(p, before)


@contract("PyTorch's suite: construction, errors, printing")
@suite
def test_optimizer_can_be_printed(name):
    for settings in inputs(name):
        text = repr(make(name, Line().params, settings))
        assert text.startswith(name)
        assert all(f"{key}: {value}" in text for key, value in settings.items())


@contract("PyTorch's suite: state dicts, with names, older, loaded with weights_only, hooks")
@suite
@pytest.mark.parametrize("named", [False, True])  # from one to the other: test_can_load_from_to_named_state_dict
def test_state_dict_deterministic(name, named):
    for settings in inputs(name):
        line = Line()
        optimizer = make(name, line.named if named else line.params, settings)
        line.train(optimizer, 3)
        saved = copy.deepcopy(optimizer.state_dict())
        other = line.copy()
        resumed = make(name, other.named if named else other.params, settings)
        resumed.load_state_dict(saved)
        line.train(optimizer, 3)
        other.train(resumed, 3)
        assert_equal(line.weights(), other.weights())
        assert saved["state"].keys() == {0, 1}


@contract("PyTorch's suite: state dicts, with names, older, loaded with weights_only, hooks")
@suite
def test_can_load_older_state_dict(name):
    """Without the flags that came later, of a network with convolutions and norms."""

    def net_and_batch():
        torch.default_generator.manual_seed(1)
        norm = torch.nn.BatchNorm2d(3)
        net = torch.nn.Sequential(torch.nn.Conv2d(4, 2, 1, bias=False), torch.nn.ReLU(), torch.nn.Conv2d(2, 3, 3), norm)
        return net, torch.rand(2, 4, 5, 5)

    for settings in inputs(name):
        net, x = net_and_batch()
        optimizer = make(name, net.parameters(), settings)
        for _ in range(3):
            optimizer.zero_grad()
            net(x).square().sum().backward()
            optimizer.step()
        older = copy.deepcopy(optimizer.state_dict())
        for flag in ("maximize", "seed", "stochastic_rounding", "moment_dtype"):
            for group in older["param_groups"]:
                del group[flag]
        other = net_and_batch()[0]
        resumed = make(name, other.parameters(), settings)
        resumed.load_state_dict(older)
        for p, q in zip(net.parameters(), other.parameters(), strict=True):
            assert_equal(resumed.state[q], optimizer.state[p])
        assert resumed.param_groups[0]["maximize"] == settings.get("maximize", False)
        for p in other.parameters():
            p.grad = torch.ones_like(p)
        resumed.step()


@contract("PyTorch's suite: state dicts, with names, older, loaded with weights_only, hooks")
@suite
@pytest.mark.parametrize("to_named", [False, True])
def test_can_load_from_to_named_state_dict(name, to_named):
    for settings in inputs(name):
        line = Line()
        optimizer = make(name, line.params if to_named else line.named, settings)
        line.train(optimizer, 2)
        other = line.copy()
        resumed = make(name, other.named if to_named else other.params, settings)
        resumed.load_state_dict(optimizer.state_dict())
        assert resumed.param_groups[0]["param_names"] == ["weight", "bias"]
        line.train(optimizer, 2)
        other.train(resumed, 2)
        assert_equal(line.weights(), other.weights())


@contract("PyTorch's suite: state dicts, with names, older, loaded with weights_only, hooks")
@suite
def test_save_load_equality_with_weights_only(name):
    for settings in inputs(name):
        line = Line()
        optimizer = make(name, line.params, settings)
        line.train(optimizer, 3)
        file = io.BytesIO()
        torch.save(optimizer.state_dict(), file)
        file.seek(0)
        loaded = torch.load(file, weights_only=True)
        assert_equal(loaded, optimizer.state_dict())
        resumed = make(name, line.copy().params, settings)
        resumed.load_state_dict(loaded)
        assert_equal(resumed.state_dict(), optimizer.state_dict())


@contract("PyTorch's suite: state dicts, with names, older, loaded with weights_only, hooks")
@suite
def test_load_nontensor_step(name):
    for settings in inputs(name):
        line = Line()
        optimizer = make(name, line.params, settings)
        line.train(optimizer, 3)
        saved = copy.deepcopy(optimizer.state_dict())
        for state in saved["state"].values():
            state["step"] = state["step"].item()
        other = line.copy()
        resumed = make(name, other.params, settings)
        resumed.load_state_dict(saved)
        assert_equal(resumed.state_dict(), optimizer.state_dict())


def trained(name):
    line = Line()
    optimizer = make(name, line.params, next(inputs(name)))
    line.train(optimizer, 1)
    return line, optimizer


@contract("PyTorch's suite: state dicts, with names, older, loaded with weights_only, hooks")
@suite
@pytest.mark.parametrize("which", ["pre", "post", "both"])
def test_state_dict_hooks(name, which):
    """test_state_dict_pre_hook, _post_hook and _pre_post_hook: with an entry whose key is a string."""
    line, optimizer = trained(name)

    def before(o):
        o.state["test"] = 1

    def after(_, state_dict):
        return {"state": state_dict["state"] | {"ran": state_dict["state"].pop("test", 2)}, "param_groups": []}

    if which != "post":
        optimizer.register_state_dict_pre_hook(before)
    if which != "pre":
        optimizer.register_state_dict_post_hook(after)
    saved = optimizer.state_dict()
    assert {0, 1} <= saved["state"].keys()
    assert saved["state"].get("ran") == {"pre": None, "post": 2, "both": 1}[which]
    assert (saved["param_groups"] == []) == (which != "pre")
    line.train(optimizer, 1)  # whatever strangers are in the state


@contract("PyTorch's suite: state dicts, with names, older, loaded with weights_only, hooks")
@suite
@pytest.mark.parametrize("which", ["pre", "prepended pre", "post", "both"])
def test_load_state_dict_hooks(name, which):
    """test_load_state_dict_pre_hook_and_prepend, _post_hook and _pre_post_hook."""
    line, optimizer = trained(name)
    resumed = make(name, line.copy().params, next(inputs(name)))

    def rate_of(value):
        def hook(_, state_dict):
            groups = [group | {"lr": value, "seen": group["lr"]} for group in state_dict["param_groups"]]
            return state_dict | {"param_groups": groups}

        return hook

    def note(o):
        o.state["rate when loaded"] = o.param_groups[0]["lr"]

    if which != "post":
        resumed.register_load_state_dict_pre_hook(rate_of(0.25))
    if which == "prepended pre":
        resumed.register_load_state_dict_pre_hook(rate_of(0.5), prepend=True)
    if which in ("post", "both"):
        resumed.register_load_state_dict_post_hook(note)
    resumed.load_state_dict(optimizer.state_dict())
    own = optimizer.param_groups[0]["lr"]
    group = resumed.param_groups[0]
    assert group["lr"] == (own if which == "post" else 0.25)
    assert group.get("seen") == {"pre": own, "prepended pre": 0.5, "post": None, "both": own}[which]
    assert resumed.state.get("rate when loaded") == {"post": own, "both": 0.25}.get(which)
    assert optimizer.param_groups[0]["lr"] == own


@contract("PyTorch's suite: steps without gradients and with zeros, states, step hooks")
@suite
@pytest.mark.parametrize("gradients", [False, True])
def test_step_hooks(name, gradients):
    """test_step_pre_hook, _post_hook and _all_hooks: those of all optimizers go around those of one."""
    line = Line()
    optimizer, calls = make(name, line.params, next(inputs(name))), []
    if gradients:
        line.loss()
    hooks = [
        register_optimizer_step_pre_hook(lambda *_: calls.append(0)),
        optimizer.register_step_pre_hook(lambda *_: calls.append(1)),
        optimizer.register_step_post_hook(lambda *_: calls.append(2)),
        register_optimizer_step_post_hook(lambda *_: calls.append(5)),
    ]
    try:
        optimizer.step()
        optimizer.step()
        assert calls == [0, 1, 2, 5] * 2
    finally:
        for hook in hooks:
            hook.remove()
    optimizer.step()
    assert calls == [0, 1, 2, 5] * 2


@contract("PyTorch's suite: construction, errors, printing")
@suite
def test_deepcopy_copies_all_public_attrs(name):
    def public(optimizer):
        return {key for key in vars(optimizer) if not key.startswith("_")}

    for settings in inputs(name):
        line = Line()
        optimizer = make(name, line.params, settings)
        line.train(optimizer, 1)
        assert public(copy.deepcopy(optimizer)) == public(optimizer)


@contract("PyTorch's suite: steps without gradients and with zeros, states, step hooks")
@suite
def test_non_empty_state(name):
    for settings in inputs(name):
        line = Line()
        optimizer = make(name, line.params, settings)
        line.train(optimizer, 1)
        assert all(optimizer.state[p] for p in line.params)


@contract("PyTorch's suite: construction, errors, printing")
@suite
def test_sparse_and_complex(name):
    """Instead of test_rosenbrock_sparse, test_complex and test_complex_2d."""
    assert not INFOS[name].supports_sparse
    assert not INFOS[name].supports_complex
    for settings in inputs(name):
        with pytest.raises(ValueError, match="real floating-point parameters"):
            make(name, [torch.nn.Parameter(torch.randn(2, 3, dtype=torch.complex64))], settings)
        line = Line()
        optimizer = make(name, line.params, settings)
        line.loss()
        line.weight.grad = line.weight.grad.to_sparse()
        with pytest.raises(RuntimeError, match="dense real gradients"):
            optimizer.step()


@pytest.mark.gpu
@suite
def test_state_dict_with_cuda_params(name):
    for settings in inputs(name):
        line = Line()
        optimizer = make(name, line.params, settings)
        line.train(optimizer, 3)
        moved = line.copy()
        moved.weight, moved.bias = (torch.nn.Parameter(p.detach().cuda()) for p in moved.params)
        moved.x = moved.x.cuda()
        resumed = make(name, moved.params, settings)
        resumed.load_state_dict(optimizer.state_dict())
        for p, q in zip(moved.params, line.params, strict=True):
            for key, value in resumed.state[p].items():
                if isinstance(value, torch.Tensor):
                    assert value.device.type == ("cpu" if key in ("step", "age", "refreshes") else "cuda")
                    assert torch.equal(value.cpu(), optimizer.state[q][key])
        line.train(optimizer, 2)
        moved.train(resumed, 2)
        torch.testing.assert_close([p.detach().cpu() for p in moved.params], line.weights(), rtol=1e-3, atol=1e-4)
