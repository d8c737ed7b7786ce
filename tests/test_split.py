import hypothesis.strategies as st
import pytest
import torch
from hypothesis import given

from slimstate import ops
from slimstate.ops import PartKey, Place, Split, SplitRule, counter_key, split_, takes_split
from slimstate.ops.weights import Rounding
from slimstate.optim import FRUGAL

AXES = ["columns", "rows", "entries"]
RULE = SplitRule(columns=True, outer="sign", decay=0.9, step=0.1, outside=0.2, betas=(0.9, 0.99), eps=1e-3)


def split(shape, index, columns=True, dtype=torch.float32, seed=0, rounding=None):
    generator = torch.Generator().manual_seed(seed)
    members, rows, width = shape
    p, g = (torch.randn(shape, generator=generator).to(dtype) for _ in range(2))
    index = torch.tensor(index, dtype=torch.int32).expand(members, -1).contiguous()
    first = torch.randn(members, index.shape[1], rows if columns else width, generator=generator)
    return Split(p, g, shape, index, first, first.abs(), 3.0, rounding or Rounding())


def trained(projection, dtype, layout, batch_dims=0, shape=(12, 10), **settings):
    torch.manual_seed(0)
    p = torch.nn.Parameter(layout(torch.randn(shape).to(dtype)))
    optimizer = FRUGAL(
        [p], lr=0.1, weight_decay=0.1, density=0.4, projection=projection, batch_dims=batch_dims, update_proj_gap=2,
        **settings,
    )  # fmt: skip
    for _ in range(4):
        p.grad = layout(torch.randn(shape).to(dtype))
        optimizer.step()
    return p.detach(), optimizer.state[p]


def strided(x):
    return torch.stack([x, x], dim=-1)[..., 0]


@pytest.mark.parametrize("projection", AXES)
@pytest.mark.parametrize(
    ("dtype", "settings"),
    [
        (torch.float32, {}),
        (torch.float32, {"inner": "lion", "outer": "sgd"}),
        (torch.float32, {"outer": "none", "moment_dtype": "bfloat16"}),
        (torch.bfloat16, {}),
        (torch.bfloat16, {"compensation": True, "moment_dtype": "param"}),
        (torch.bfloat16, {"inner": "sgdm", "outer": "none"}),
        (torch.float16, {"stochastic_rounding": False, "maximize": True}),
        (torch.float16, {"compensation": True}),
    ],
)
@pytest.mark.parametrize(("shape", "batch_dims"), [((12, 10), 0), ((2, 9, 8), 1)])
def test_strided_memory_goes_its_own_way_to_the_same_bits(projection, dtype, settings, shape, batch_dims):
    """Only contiguous memory takes the compiled pass."""
    results = [trained(projection, dtype, layout, batch_dims, shape, **settings) for layout in (torch.clone, strided)]
    (p, state), (q, other) = results
    assert torch.equal(p, q)
    for key in ("exp_avg", "exp_avg_sq", "momentum_buffer", "compensation"):
        assert (key in state) == (key in other)
        assert key not in state or torch.equal(state[key], other[key])


@given(
    rows=st.integers(1, 80),
    columns=st.integers(1, 70),
    members=st.integers(1, 2),
    kept=st.floats(0, 1),
    outer=st.sampled_from(["sign", "sgd", "none"]),
    by_column=st.booleans(),
    data=st.data(),
)
def test_is_the_equation(rows, columns, members, kept, outer, by_column, data):
    length = columns if by_column else rows
    index = sorted(data.draw(st.permutations(range(length)))[: int(kept * length)])
    x = split((members, rows, columns), index, by_column)
    w, g, m, v = (y.double() for y in (x.p, x.grad, x.first, x.second))
    m, v = (y.mT if by_column else y for y in (m, v))
    s = (..., index) if by_column else (slice(None), index)
    outside = {"sign": g.sign(), "sgd": g, "none": torch.zeros_like(g)}[outer]
    expected = 0.9 * w - 0.2 * outside
    m, v = 0.9 * m + 0.1 * g[s], 0.99 * v + 0.01 * g[s] ** 2
    expected[s] = 0.9 * w[s] - 0.1 * (m / (1 - 0.9**3)) / ((v / (1 - 0.99**3)).sqrt() + 1e-3)
    rule = SplitRule(columns=by_column, outer=outer, decay=0.9, step=0.1, outside=0.2, betas=(0.9, 0.99), eps=1e-3)
    split_([x], rule)
    torch.testing.assert_close(x.p.double(), expected, rtol=1e-5, atol=1e-6)
    torch.testing.assert_close((x.first.mT if by_column else x.first).double(), m, rtol=1e-5, atol=1e-6)
    torch.testing.assert_close((x.second.mT if by_column else x.second).double(), v, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize(("columns", "cut"), [(True, 0), (False, 1)])
def test_parts_are_rounded_as_in_the_whole(dtype, columns, cut):
    """Rows are divided where columns are kept, columns where rows are."""
    key, shape, index = counter_key(0, 3), (1, 40, 30), [0, 3, 4, 20]
    whole = split(shape, index, columns, dtype, rounding=Rounding(key))
    parts = []
    for first, last in ((0, 16), (16, 21), (21, shape[1 + cut])):
        own = [x.narrow(1 + cut, first, last - first).clone() for x in (whole.p, whole.grad)]
        moments = [x[..., first:last].clone() for x in (whole.first, whole.second)]
        place = Place(first * 30, (last - first) * 30, 1200) if columns else Place(first, last - first, 30)
        part = Split(*own, own[0].shape, whole.chosen, *moments, 3.0, Rounding(PartKey(key, place)))
        assert takes_split(part) == ("cpu" in ops.DEVICES)
        split_([part], RULE if columns else SplitRule(**vars(RULE) | {"columns": False}))
        parts.append(part.p)
    split_([whole], RULE if columns else SplitRule(**vars(RULE) | {"columns": False}))
    assert torch.equal(whole.p, torch.cat(parts, 1 + cut))


def test_a_list_may_mix_dtypes():
    def matrices():
        dtypes = [torch.float32, torch.bfloat16, torch.float32]
        return [split((1, 9, 11), [1, 5], dtype=dtype, seed=i) for i, dtype in enumerate(dtypes)]

    together, alone = matrices(), matrices()
    split_(together, RULE)
    for x, y in zip(together, alone, strict=True):
        split_([y], RULE)
        assert torch.equal(x.p, y.p)
        assert torch.equal(x.first, y.first)


def test_autograd_notices_the_write():
    x = split((1, 3, 4), [1])
    factor = torch.ones(1, 3, 4, requires_grad=True)
    product = (factor * x.p).sum()
    split_([x], RULE)
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        product.backward()


def test_bad_input_is_named():
    with pytest.raises(ValueError, match="outer must be one of sign, sgd, none, got 'signs'"):
        split_([split((1, 3, 4), [1])], SplitRule(columns=True, outer="signs", decay=1, step=1, outside=1))


@pytest.mark.skipif(not ops.COMPILED, reason="the op is what refuses")
@pytest.mark.parametrize(
    ("change", "match"),
    [
        (dict(grad=torch.ones(1, 3, 4, dtype=torch.bfloat16)), "of one dtype"),
        (dict(shape=(1, 4, 4)), "of the shape given"),
        (dict(chosen=torch.tensor([1])), "indices must be int32"),
        (dict(chosen=torch.arange(5, dtype=torch.int32)), "no more than it has rows or columns"),
        (dict(second=torch.ones(1, 1, 4)), "moments of 3 elements needed, got 3 and 4"),
    ],
)
def test_the_op_refuses_what_it_cannot_do(change, match):
    with pytest.raises(RuntimeError, match=match):
        split_([split((1, 3, 4), [1])._replace(**change)], RULE)
