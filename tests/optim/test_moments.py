"""Moments in 8 bits: the codes, the rule which parameters have them, and what optimizers make of them."""

import copy
import itertools
import math

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from cases import CASES, assert_equal, build, model, train
from slimstate.ops import codes as codes_of
from slimstate.ops import decode, encode_
from slimstate.ops.codes import BLOCK, code_values, scale_shape
from slimstate.optim import (
    FRUGAL,
    SGDP,
    AdamP,
    AdamW,
    AdamW8bit,
    DCTAdamW,
    GaLoreAdafactor,
    GaLoreAdamW,
    GaLoreAdamW8bit,
    GradNormLoRP,
    _moments,
    state_bytes,
)
from slimstate.optim._moments import Moment, holds_codes
from slimstate.optim.dct import carry_

LAYOUTS = ["rows", "columns"]
layouts = pytest.mark.parametrize("layout", LAYOUTS)
signs = pytest.mark.parametrize("signed", [True, False])
CODED = [name for name in CASES if "8bit" in name or "8-bit moments" in name]
coded = pytest.mark.parametrize("name", CODED)


def encoded(x, signed, layout):
    codes = torch.empty(x.shape, dtype=torch.uint8)
    scale = torch.empty(scale_shape(x.shape, layout))
    encode_(codes, scale, x, signed=signed, layout=layout)
    return codes, scale


def through(x, signed, layout, dtype=torch.float32):
    return decode(*encoded(x, signed, layout), signed=signed, layout=layout, dtype=dtype)


def drawn(shape, seed, signed, spread=4.0):
    """Numbers of many sizes."""
    generator = torch.Generator().manual_seed(seed)
    x = torch.randn(shape, generator=generator) * 10 ** (spread * (torch.rand(shape, generator=generator) - 1))
    return x if signed else x.square()


# Codes.


@signs
def test_the_values_are_bitsandbytes_to_the_bit(signed):
    functional = pytest.importorskip("bitsandbytes.functional")
    assert torch.equal(code_values(signed), functional.create_dynamic_map(signed=signed))


def test_the_values_have_the_bits_that_checkpoints_were_written_with():
    """Whatever computes them: the sum of their bits."""
    assert [int(code_values(signed).view(torch.int32).long().sum()) for signed in (True, False)] == [
        -10154226044,
        262570225560,
    ]


@signs
def test_codes_are_those_of_a_search_for_the_nearest_value(signed):
    values = code_values(signed)
    between = (values[1:] + values[:-1]) / 2
    between = torch.where(between < 0, torch.nextafter(between, torch.tensor(-9.0)), between)  # to zero, either way
    halves = (torch.arange(-(2**15), 2**15, dtype=torch.int32) << 16).view(torch.float32)
    x = torch.cat([values, between, halves, torch.tensor([1e-45, -1e-45])])
    x = torch.cat([torch.nextafter(x, torch.tensor(-9.0)), x, torch.nextafter(x, torch.tensor(9.0))])
    x = x[x.abs() <= 1]
    found = codes_of._nearest(x, signed)
    assert torch.equal(found, torch.bucketize(x, between, out_int32=True).to(torch.uint8))
    distances = (values.double() - x.double()[:, None]).abs()
    # What is half way is rounded to float32.
    assert (distances.gather(1, found.long()[:, None])[:, 0] <= distances.amin(1) + 2e-7 * x.abs()).all()


@given(
    shape=st.sampled_from([(3, 300), (2, 256), (1, 7), (5, 2, 300), (700,), (2, 600, 3)]),
    layout=st.sampled_from(LAYOUTS),
    signed=st.booleans(),
    seed=st.integers(0, 1000),
    spread=st.floats(0, 9),
)
def test_a_number_is_off_by_at_most_half_the_distance_of_the_values_around_it(shape, layout, signed, seed, spread):
    if len(shape) == 1:
        layout = "rows"
    x = drawn(shape, seed, signed, spread)
    codes, scale = encoded(x, signed, layout)
    found = decode(codes, scale, signed=signed, layout=layout)
    scales = decode(torch.full_like(codes, 255), scale, signed=signed, layout=layout)  # of value 1
    assert (scales >= x.abs()).all()
    values = code_values(signed)
    gaps = torch.cat([values[:1] + 1 if signed else values[:1], values.diff(), torch.zeros(1)]) / 2
    gaps[0] *= 2  # there is no -1
    allowed = torch.maximum(gaps[codes.long()], gaps[codes.long() + 1]) * scales
    assert ((x - found).abs() <= allowed * (1 + 1e-5) + 1e-44).all()
    assert ((x - found).abs() <= (0.00704 if signed else 0.00352) * scales).all()


@layouts
@given(signed=st.booleans(), seed=st.integers(0, 100), cut=st.integers(0, 5))
def test_parts_have_the_codes_of_the_whole(layout, signed, seed, cut):
    x = drawn((2, 300, 5) if layout == "columns" else (5, 2, 300), seed, signed)
    codes, scale = encoded(x, signed, layout)
    for s in (slice(0, cut), slice(cut, 5)):
        where = (..., s) if layout == "columns" else s
        assert_equal(encoded(x[where], signed, layout), (codes[where], scale[where]))


@layouts
@signs
def test_zeros_stay_zeros_and_what_is_not_finite_spoils_its_block_alone(layout, signed):
    x = torch.zeros(2 * BLOCK, 3) if layout == "columns" else torch.zeros(3, 2 * BLOCK)
    assert not through(x, signed, layout).any()
    assert not decode(
        torch.zeros(x.shape, dtype=torch.uint8), torch.zeros(scale_shape(x.shape, layout)), signed=signed, layout=layout
    ).any()  # what a state begins with
    x += 1
    for bad in (math.nan, math.inf):
        x[1, 1] = bad
        found = through(x, signed, layout)
        spoilt = ~found.isfinite()
        of = spoilt if layout == "columns" else spoilt.mT
        assert of[:BLOCK, 1].any()
        assert torch.equal(spoilt.sum(), of[:BLOCK, 1].sum())
        assert torch.equal(found[~spoilt], x[~spoilt])


@pytest.mark.parametrize("shape", [(0,), (0, 5), (5, 0), (0, 5, 3), (2, 0, 3), (2, 5, 0)])
@layouts
def test_empty_tensors_have_empty_codes(shape, layout):
    if len(shape) == 1 and layout == "columns":
        return
    assert through(torch.empty(shape), True, layout).shape == shape


@layouts
def test_other_dtypes_and_strides_have_the_same_codes(layout):
    x = drawn((300, 6), 0, True)
    expected = encoded(x, True, layout)
    for y in (x.double(), x.mT.contiguous().mT):
        assert_equal(encoded(y, True, layout), expected)
    codes, scale = (torch.empty_like(y.mT).mT for y in expected)
    encode_(codes, scale, x, signed=True, layout=layout)
    assert_equal((codes, scale), expected)
    wide = decode(codes, scale, signed=True, layout=layout, dtype=torch.float64)
    assert_equal(wide, decode(*expected, signed=True, layout=layout).double())
    assert wide.is_contiguous()


@signs
def test_bitsandbytes_reads_the_same_numbers_and_writes_none_that_are_nearer(signed):
    """On the CPU it searches among values that it has rounded, and does not always find the nearest."""
    functional = pytest.importorskip("bitsandbytes.functional")
    x = drawn((64, 512), 0, signed)
    codes, scale = encoded(x, signed, "rows")
    qmap = code_values(signed)
    read = functional.dequantize_blockwise(codes, absmax=scale.view(-1), code=qmap, blocksize=BLOCK)
    here = decode(codes, scale, signed=signed, layout="rows")
    assert torch.equal(read, here)
    theirs, state = functional.quantize_blockwise(x, qmap, blocksize=BLOCK)
    assert torch.equal(state.absmax, scale.view(-1))
    there = decode(theirs, scale, signed=signed, layout="rows")
    assert ((x - here).abs() <= (x - there).abs() + 1e-6 * here.abs()).all()


@pytest.mark.parametrize(
    ("change", "error", "message"),
    [
        ({"layout": "diagonal"}, ValueError, "layout must be 'rows' or 'columns', got 'diagonal'"),
        ({"codes": torch.empty(4, 300)}, TypeError, "codes must be uint8 or int8, got torch.float32"),
        ({"scale": torch.empty(4, 2).double()}, TypeError, "scale must be float32, got torch.float64"),
        ({"scale": torch.empty(4, 1)}, ValueError, r"scale must have shape \(4, 2\) for codes of \(4, 300\)"),
        ({"x": torch.empty(300, 4)}, ValueError, r"codes and x must have one shape"),
        ({"x": torch.empty(4, 300).int()}, TypeError, "x must be floating point, got torch.int32"),
        ({"x": torch.empty(4, 300, device="meta")}, ValueError, "codes and x must be on one device, got cpu and meta"),
    ],
)
def test_what_does_not_belong_together_is_refused(change, error, message):
    given = {
        "codes": torch.empty(4, 300, dtype=torch.uint8),
        "scale": torch.empty(4, 2),
        "x": torch.empty(4, 300),
        "layout": "rows",
    } | change
    with pytest.raises(error, match=message):
        encode_(**given, signed=True)


@layouts
def test_the_ops_of_compiled_graphs_pass_opcheck(layout):
    x = drawn((300, 6), 0, True)
    codes, scale = encoded(x, True, layout)
    ops = torch.ops.slimstate
    torch.library.opcheck(ops.encode_whole_.default, (codes.clone(), scale.clone(), x, True, layout))
    torch.library.opcheck(ops.decode_whole.default, (codes, scale, True, layout, torch.float32))


def test_defaults_of_dtype_and_device_change_nothing():
    x = drawn((3, 300), 0, True)
    expected = through(x, True, "rows")
    for cached in (code_values, codes_of._tables):
        cached.cache_clear()
    torch.set_default_dtype(torch.float64)
    try:
        with torch.device("meta"):
            codes, scale = torch.empty_like(x, dtype=torch.uint8), x.new_empty(3, 2)
            encode_(codes, scale, x, signed=True, layout="rows")
            assert_equal(decode(codes, scale, signed=True, layout="rows"), expected)
            made = _moments.encoded(x, "exp_avg", "rows", torch.uint8)
            assert_equal(made, {"exp_avg": codes, "exp_avg_scale": scale})
    finally:
        torch.set_default_dtype(torch.float32)


# The rule.


@pytest.mark.parametrize(
    ("shape", "layout", "expected"),
    [
        ((64, 64), "rows", True),
        ((63, 65), "rows", False),  # one element less
        ((4096, 11008), "rows", True),
        ((11008, 4096), "rows", True),
        ((32000, 4096), "rows", False),  # embeddings and heads
        ((50257, 768), "rows", False),
        ((32000, 4096), "columns", True),
        ((128256, 25652), "rows", True),  # not five times as high as wide
        ((16383, 512), "rows", True),
        ((16384, 512, 1), "rows", True),
        ((8192,), "rows", False),  # a scale for every element
        ((8192, 3), "rows", False),
        ((64, 32, 3, 3), "rows", True),
        ((3, 8192), "columns", False),
        ((4, 1024), "columns", True),
        ((8, 4, 128), "columns", True),
        ((0, 512), "rows", False),
        ((), "rows", False),
    ],
)
def test_codes_are_for_moments_that_are_large_and_no_embeddings(shape, layout, expected, monkeypatch):
    monkeypatch.setattr(_moments, "SMALLEST_CODED", 4096)
    assert holds_codes(shape, layout) is expected


def state_of(optimizer, p):
    p.grad = torch.randn_like(p)
    optimizer.step()
    return optimizer.state[p]


def test_the_state_has_the_bytes_of_the_formula():
    p, q = (torch.nn.Parameter(torch.randn(100, 300)) for _ in range(2))
    optimizer = AdamW8bit([p])
    state_of(optimizer, p)
    assert state_bytes(optimizer) == 2 * 100 * 300 + 8 * 100 * 2 + 4
    optimizer = GaLoreAdamW8bit([q], rank=50)
    state_of(optimizer, q)
    basis = 4 * 100 * 50
    assert state_bytes(optimizer) == 2 * 50 * 300 + 8 * 300 * 1 + basis + 4 + 4
    assert f"{state_bytes(optimizer):,} B" in optimizer.report()


@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16])
def test_what_the_rule_leaves_out_is_as_wide_as_arithmetic(dtype):
    small, vector, large = (torch.nn.Parameter(torch.randn(s).to(dtype)) for s in ((3, 3), (100,), (40, 30)))
    optimizer = AdamW8bit([small, vector, large])
    wide = torch.promote_types(dtype, torch.float32)
    assert state_of(optimizer, small)["exp_avg"].dtype == state_of(optimizer, vector)["exp_avg_sq"].dtype == wide
    state = state_of(optimizer, large)
    assert (state["exp_avg"].dtype, state["exp_avg_scale"].dtype) == (torch.uint8, torch.float32)


def test_a_stack_that_adafactor_does_not_project_has_a_wide_first_moment():
    """Its blocks of rows are not those of the codes."""
    stack, matrix, dense = (torch.nn.Parameter(torch.randn(s)) for s in ((3, 20, 30), (60, 30), (60, 30)))
    groups = [{"params": [matrix], "rank": 4}, {"params": [stack], "batch_dims": 1}, {"params": [dense]}]
    optimizer = GaLoreAdafactor(groups, lr=0.1, beta1=0.9, moment_dtype="8bit", scale_parameter=False)
    dtypes = [state_of(optimizer, p)["exp_avg"].dtype for p in (matrix, stack, dense)]
    assert dtypes == [torch.uint8, torch.float32, torch.uint8]


# Steps.


def test_a_step_in_blocks_of_rows_is_the_step_on_all_of_them(monkeypatch):
    grads, ends = [torch.randn(30, 300) for _ in range(3)], []
    for size in (1 << 22, 4000):
        monkeypatch.setattr("slimstate.projections._blocks.BLOCK_BYTES", size)
        params = [torch.nn.Parameter(torch.ones(30, 300)) for _ in range(6)]
        common = {"moment_dtype": "8bit", "lr": 0.1}
        kinds = [AdamW, AdamP, SGDP, FRUGAL, DCTAdamW, GaLoreAdafactor]
        more = [{}, {}, {"momentum": 0.9}, {"density": 1.0, "inner": "lion"}, {"rank": 8}, {"rank": None, "beta1": 0.9}]
        more[-1] = {"beta1": 0.9, "scale_parameter": False}
        optimizers = [kind([p], **common, **own) for kind, p, own in zip(kinds, params, more, strict=True)]
        for g in grads:
            for p, optimizer in zip(params, optimizers, strict=True):
                p.grad = g.clone()
                optimizer.step()
        ends.append([*weights_and_states(params, optimizers)])
    for a, b in zip(*ends, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-4, atol=1e-5)


def weights_and_states(params, optimizers):
    for p, optimizer in zip(params, optimizers, strict=True):
        yield p.detach()
        yield from (x for key, x in optimizer.state[p].items() if key.endswith("_scale"))


def test_moments_follow_their_columns_and_blocks_in_which_none_moves_keep_their_codes():
    r, k, d = 2 * BLOCK, 5, 3 * BLOCK

    class Here:
        layout = "columns"

    old = torch.arange(r, dtype=torch.int32)
    new = old.clone()
    new[-3:] = torch.tensor([d - 9, d - 5, d - 1])
    moments, before = [], []
    for key, signed in (("exp_avg", True), ("exp_avg_sq", False)):
        x = -drawn((r, k), 0, signed).abs() if signed else drawn((r, k), 0, signed)  # no block has a largest code
        kept = encoded(x, signed, "columns")
        before.append([y.clone() for y in kept])
        moments.append(Moment(Here, key, 0, *kept))
    ages = torch.full((r,), 7, dtype=torch.int32)
    carry_(moments, ages, old, new)
    assert ages.tolist() == [7] * (r - 3) + [0] * 3
    for moment, (codes, scale), signed in zip(moments, before, (True, False), strict=True):
        assert torch.equal(moment.kept[:BLOCK], codes[:BLOCK])
        assert torch.equal(moment.scale[0], scale[0])
        now, then = moment.read(torch.float32), decode(codes, scale, signed=signed, layout="columns")
        assert not now[-3:].any()
        assert ((now - then)[:-3].abs() <= 0.0071 * scale[1]).all()


# State dicts.


@coded
@pytest.mark.parametrize(("start", "end"), list(itertools.permutations(("8bit", "8bit-companded", "float32"), 2)))
def test_moments_become_what_the_optimizer_that_loads_them_keeps_them_in(name, start, end):
    net = model()
    optimizer = build(name, net.parameters(), moment_dtype=start)
    train(net, optimizer, 0, 3)
    other = build(name, net.parameters(), moment_dtype=end)
    other.load_state_dict(optimizer.state_dict())
    changed = 0
    for p in net.parameters():
        here, there = other.state[p], optimizer.state[p]
        for key in _moments.MOMENTS.keys() & here.keys():
            (kept, scale), (known, known_scale) = ((s[key], s.get(f"{key}_scale")) for s in (here, there))
            if scale is None and known_scale is None:
                assert_equal(kept, known)
                continue
            changed += 1
            layout = "columns" if {"basis", "index"} & here.keys() else "rows"
            if known_scale is not None:
                known = _moments.decoded(known, known_scale, key, layout, torch.float32)
            expected = {key: known} if scale is None else _moments.encoded(known, key, layout, _moments.CODED[end])
            assert_equal({key: kept} | ({} if scale is None else {f"{key}_scale": scale}), expected)
    assert changed
    train(net, other, 3, 6)
    assert all(p.isfinite().all() for p in net.parameters())


@coded
def test_a_running_group_changes_to_codes_and_back(name):
    net = model()
    optimizer = build(name, net.parameters(), moment_dtype=None)
    train(net, optimizer, 0, 2)
    sizes = [state_bytes(optimizer)]
    for i, dtype in enumerate(("8bit", "8bit-companded", None)):
        optimizer.param_groups[0]["moment_dtype"] = dtype
        train(net, optimizer, 2 + i, 3 + i)
        sizes.append(state_bytes(optimizer))
    assert sizes[1] == sizes[2] < 0.8 * sizes[0] == 0.8 * sizes[3]


def test_a_checkpoint_of_torchs_adamw_becomes_codes():
    net = model()
    theirs = torch.optim.AdamW(net.parameters(), lr=0.02)
    train(net, theirs, 0, 3)
    ours = AdamW8bit(net.parameters())
    ours.load_state_dict(theirs.state_dict())
    p = net[3].weight
    found = _moments.decoded(ours.state[p]["exp_avg"], ours.state[p]["exp_avg_scale"], "exp_avg", "rows", torch.float32)
    assert (found - theirs.state[p]["exp_avg"]).norm() < 0.02 * found.norm()
    assert ours.param_groups[0]["lr"] == 0.02


@pytest.mark.parametrize(
    ("key", "edit", "message", "wide"),
    [
        ("exp_avg", lambda x: x[1:], r"must have shape \(20, 32\), found \(19, 32\)", None),
        ("exp_avg", lambda x: x.short(), "must be torch.uint8, found torch.int16", None),
        ("exp_avg", lambda x: x.float(), "must be torch.uint8, found torch.float32", None),
        ("exp_avg_sq_scale", lambda x: x[:, 0], r"must have shape \(20, 1\), found \(20,\)", None),
        ("exp_avg_sq_scale", lambda x: x.int(), "must be torch.float32, found torch.int32", None),
        (
            "exp_avg_sq_scale",
            lambda x: None,
            r"must have shape \(20, 1\), found none",
            "torch.float32, found torch.uint8",
        ),
    ],
)
@pytest.mark.parametrize("kind", [AdamW8bit, AdamW])
def test_codes_that_do_not_fit_are_refused_whole(kind, key, edit, message, wide):
    net = model()
    optimizer = AdamW8bit(net.parameters())
    train(net, optimizer, 0, 2)
    saved = copy.deepcopy(optimizer.state_dict())
    state = saved["state"][4]
    state[key] = edit(state[key])
    if state[key] is None:
        del state[key]
    other = kind(net.parameters())
    train(net, other, 2, 3)
    before = copy.deepcopy(other.state_dict())
    with pytest.raises(
        ValueError, match=wide or message if kind is AdamW else f"'{key}' of parameter number 4 {message}"
    ):
        other.load_state_dict(saved)
    assert_equal(other.state_dict(), before)


# Training.


def pictures(seed=0):
    """Noisy pictures of ten shapes, 8 x 8, a quarter of them under a wrong name."""
    generator = torch.Generator().manual_seed(seed)
    shapes = torch.nn.functional.avg_pool2d(torch.randn(10, 1, 10, 10, generator=generator), 3, 1).flatten(1)
    y = torch.randint(10, (512,), generator=generator)
    x = 3 * shapes[y] + torch.randn(512, 64, generator=generator)
    return x, torch.where(
        torch.rand(512, generator=generator) < 0.25, torch.randint(10, (512,), generator=generator), y
    )


PROBLEMS = {
    "AdamW": (AdamW, {}, 1e-3),
    "AdamP": (AdamP, {}, 1e-3),
    "SGDP": (SGDP, {"momentum": 0.9}, 0.02),
    "GaLoreAdamW": (GaLoreAdamW, {"update_proj_gap": 20, "scale": 1.0}, 2e-3),
    "GaLoreAdafactor": (
        GaLoreAdafactor,
        {"update_proj_gap": 20, "scale": 1.0, "beta1": 0.9, "scale_parameter": False},
        5e-3,
    ),
    "GradNormLoRP": (GradNormLoRP, {"update_proj_gap": 20, "scale": 1.0}, 2e-3),
    "DCTAdamW": (DCTAdamW, {}, 2e-3),
    "FRUGAL, lion": (FRUGAL, {"update_proj_gap": 20, "inner": "lion"}, 3e-4),
    "FRUGAL": (FRUGAL, {"update_proj_gap": 20}, 3e-4),
}


def trained(name, dtype, steps=60):
    """The loss before and after training."""
    kind, settings, lr = PROBLEMS[name]
    x, y = pictures()
    torch.default_generator.manual_seed(1)
    net = torch.nn.Sequential(torch.nn.Linear(64, 300), torch.nn.Tanh(), torch.nn.Linear(300, 10))
    optimizer = kind(net.parameters(), lr=lr, moment_dtype=dtype, **settings)
    losses = [torch.nn.functional.cross_entropy(net(x), y).item()]
    for i in range(steps):
        optimizer.zero_grad()
        s = slice(i % 4 * 128, i % 4 * 128 + 128)
        torch.nn.functional.cross_entropy(net(x[s]), y[s]).backward()
        optimizer.step()
    return [*losses, torch.nn.functional.cross_entropy(net(x), y).item()]


@pytest.mark.parametrize("name", PROBLEMS)
def test_training_with_codes_goes_as_far_as_with_numbers(name):
    before, after = trained(name, "float32")
    assert 0.1 * before < after < 0.7 * before
    for codes in _moments.CODED:
        assert abs(trained(name, codes)[1] - after) < 0.005 * (before - after)
