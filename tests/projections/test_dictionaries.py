"""What DCT and Hadamard share: selection, R, the way back, the write-back."""

import importlib
import itertools
import math

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from slimstate.ops import counter_key
from slimstate.projections import DCT, Hadamard, captured_energy, matrix_view
from slimstate.projections._dictionary import Columns
from slimstate.projections._rounding import Rounding

KINDS = {
    "matmul": lambda **settings: DCT(method="matmul", **settings),
    "fft": lambda **settings: DCT(method="fft", **settings),
    "dct3": lambda **settings: DCT(kind=3, method="matmul", **settings),
    "dct3 fft": lambda **settings: DCT(kind=3, method="fft", **settings),
    "hadamard": Hadamard,
}
kinds = pytest.mark.parametrize("kind", KINDS)
sizes = st.one_of(st.integers(1, 70), st.sampled_from([97, 128, 251, 256, 257, 300]))


@pytest.fixture(params=["by product", "by transform"])
def way(request, monkeypatch):
    """R, the way back and the write-back by either, at every rank."""
    smallest = 1 if request.param == "by transform" else 1 << 30
    monkeypatch.setattr(importlib.import_module("slimstate.projections.hadamard"), "SMALLEST_FAST", smallest)
    by_fft = DCT._by_fft
    monkeypatch.setattr(DCT, "_by_transform", lambda self, rank, d: rank >= smallest and by_fft(self, d))


def dense(projection, d, dtype=torch.float64):
    """Q (d x d)."""
    return projection.inverse(torch.eye(d, dtype=dtype))


@kinds
@given(d=sizes, k=st.integers(1, 7))
def test_is_orthonormal_and_the_inverse_inverts(kind, d, k):
    projection = KINDS[kind]()
    q = dense(projection, d)
    torch.testing.assert_close(q.mT @ q, torch.eye(d).double(), atol=1e-13, rtol=0)
    m = torch.randn(d, k)
    s = projection.transform(m)
    torch.testing.assert_close(s, (q.mT @ m.double()).float(), atol=1e-5, rtol=1e-5)
    torch.testing.assert_close(projection.inverse(s), m, atol=1e-5, rtol=1e-5)
    index = torch.arange(d, dtype=torch.int32)
    torch.testing.assert_close(projection._rows(index, d, torch.float64), q.mT, atol=1e-13, rtol=0)


@kinds
@given(d=st.integers(1, 40), k=st.integers(1, 20), rank=st.integers(1, 50), norm=st.sampled_from([1, 2]))
def test_keeps_the_rows_of_largest_norm_as_sorted_int32(kind, d, k, rank, norm):
    projection = KINDS[kind](rank=rank, norm=norm, side="left")
    m = torch.randn(d, k, dtype=torch.float64)
    index = projection.fit(m, None, ())
    r = min(rank, d, k)
    scores = torch.linalg.vector_norm(dense(projection, d).mT @ m, norm, dim=1)
    assert index.dtype == torch.int32
    assert tuple(index.shape) == projection.shape_of(projection.view((d, k))) == (r,)
    assert torch.equal(index.long(), scores.topk(r).indices.sort().values)
    assert index.untyped_storage().nbytes() == 4 * r


@kinds
def test_l2_captures_the_most_energy_of_all_subsets(kind):
    d, r = 8, 3
    projection = KINDS[kind](rank=r, norm=2)
    q = dense(projection, d)
    for _ in range(5):
        m = torch.randn(d, 11, dtype=torch.float64)
        energies = [captured_energy(m, q[:, list(j)]) for j in itertools.combinations(range(d), r)]
        energy = captured_energy(m, q[:, projection.fit(m, None, ()).long()])
        torch.testing.assert_close(energy, max(energies))
        assert energy >= r / d


@pytest.mark.parametrize("norm", [1, 2])
def test_of_equal_scores_the_lower_index_wins(norm):
    m = Hadamard().inverse(torch.tensor([1.0, 2.0, 1.0, 1.0, 2.0, 1.0, 1.0, 1.0])[:, None].expand(8, 16))
    assert Hadamard(rank=4, norm=norm).fit(m * 8**0.5, None, ()).tolist() == [0, 1, 2, 4]
    assert Hadamard(rank=5, norm=norm).fit(torch.eye(16)[:, :8] * 3, None, ()).tolist() == [0, 1, 2, 3, 4]


@kinds
@pytest.mark.parametrize("norm", [1, 2])
@pytest.mark.parametrize("transposed", [False, True])
def test_the_choice_does_not_depend_on_scale_layout_or_what_came_before(kind, norm, transposed):
    projection = KINDS[kind](rank=5, norm=norm)
    m = torch.randn(30, 40)
    index = projection.fit(m, None, (0, 0, 0))
    assert torch.equal(projection.fit(m, index + 1, (5, 6, 7)), index)
    kept = m.clone()
    x = m.mT.contiguous().mT if transposed else m
    for exponent in (-126, -60, 60, 124):
        assert torch.equal(projection.fit(x * 2.0**exponent, None, ()), index), exponent
    for exponent in (-1000, 1000):
        assert torch.equal(projection.fit(x.double() * 2.0**exponent, None, ()), index), exponent
    assert torch.equal(m, kept)


@kinds
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32, torch.float64])
def test_every_dtype_is_computed_in_float32_or_float64(kind, dtype, way):
    projection = KINDS[kind](rank=6)
    wide = torch.float64 if dtype == torch.float64 else torch.float32
    m = torch.randn(20, 30).to(dtype)
    index = projection.fit(m, None, ())
    assert torch.equal(index, projection.fit(m.to(wide), None, ()))
    r = projection.down(m, index)
    assert r.dtype == wide
    q = dense(projection, 20)[:, index.long()]
    torch.testing.assert_close(r.double(), q.mT @ m.double(), atol=1e-5, rtol=1e-5)
    torch.testing.assert_close(projection.up(r, index, 20).double(), q @ r.double(), atol=1e-5, rtol=1e-5)
    assert torch.equal(projection.overlap(index, index), torch.eye(6))


@kinds
def test_a_stack_equals_its_matrices(kind, way):
    projection = KINDS[kind](rank=4)
    m = torch.randn(3, 12, 20)
    index = torch.stack([projection.fit(x, None, ()) for x in m])
    r = projection.down(m, index)
    m2 = projection.up(r, index, 12)
    for j in range(3):
        assert torch.equal(r[j], projection.down(m[j], index[j]))
        assert torch.equal(m2[j], projection.up(r[j], index[j], 12))


@kinds
def test_several_blocks_equal_one(kind, way, monkeypatch):
    projection = KINDS[kind](rank=9)
    m, u = torch.randn(24, 50), torch.randn(9, 50)
    index = projection.fit(m, None, ())
    whole = projection.transform(m), projection.down(m.bfloat16(), index), projection.up(u, index, 24)
    for name in ("_blocks", "_dictionary"):
        monkeypatch.setattr(importlib.import_module(f"slimstate.projections.{name}"), "BLOCK_BYTES", 2000)
    assert torch.equal(projection.fit(m, None, ()), index)
    pieces = projection.transform(m), projection.down(m.bfloat16(), index), projection.up(u, index, 24)
    torch.testing.assert_close(pieces, whole)
    for dtype in (torch.float32, torch.bfloat16):
        p = torch.randn(24, 50).to(dtype)
        expected = 0.9 * p.double() - 0.3 * whole[2].double()
        projection.write_back_(p, matrix_view((24, 50)), index, u, alpha=-0.3, beta=0.9)
        torch.testing.assert_close(p.double(), expected, rtol=torch.finfo(dtype).eps, atol=1e-5)


@kinds
@pytest.mark.parametrize("block", [4 << 20, 2000])
@given(
    d=st.integers(1, 30),
    k=st.integers(1, 60),
    rank=st.integers(1, 40),
    norm=st.sampled_from([1, 2]),
    dtype=st.sampled_from([torch.float32, torch.float64, torch.bfloat16]),
    exponent=st.integers(-60, 60),
    added=st.booleans(),
)
def test_fit_down_is_fit_and_down_of_the_sum(kind, block, d, k, rank, norm, dtype, exponent, added):
    with pytest.MonkeyPatch.context() as monkeypatch:
        for name in ("_blocks", "_dictionary"):
            monkeypatch.setattr(importlib.import_module(f"slimstate.projections.{name}"), "BLOCK_BYTES", block)
        projection = KINDS[kind](rank=rank, norm=norm, side="left")
        m = (torch.randn(d, k, dtype=torch.float64) * 2.0**exponent).to(dtype)
        wide = torch.float64 if dtype == torch.float64 else torch.float32
        e = torch.randn(d, k, dtype=wide) * 2.0**exponent if added else torch.zeros(d, k, dtype=wide)
        a = m.to(wide) + e
        sums = Columns(m, lambda s: e[:, s], lambda: e.abs().amax()) if added else Columns(m)
        kept = m.clone()
        index, r, usable = projection.fit_down(sums, None)
        assert torch.equal(index, projection.fit(a, None, ()))
        scale = a.abs().max()
        torch.testing.assert_close(r / scale, projection.down(a, index) / scale, atol=1e-5, rtol=1e-5)
        assert r.dtype == wide
        assert bool(usable)
        assert torch.equal(m, kept)


@kinds
@pytest.mark.parametrize("bad", [0.0, math.inf, -math.inf, math.nan])
@pytest.mark.parametrize("rank", [3, 12])
def test_fit_down_keeps_the_old_choice_where_nothing_can_be_chosen(kind, bad, rank):
    projection = KINDS[kind](rank=rank)
    m = torch.randn(12, 20) if bad else torch.zeros(12, 20)
    m[2, 5] = bad
    old = torch.tensor([1, 4, 9], dtype=torch.int32) if rank == 3 else torch.arange(12, dtype=torch.int32)
    index, r, usable = projection.fit_down(Columns(m), old)
    assert torch.equal(index, old)
    assert not bool(usable)
    torch.testing.assert_close(r[:, :5], projection.down(m[:, :5], old), atol=1e-5, rtol=1e-5)
    first, _, usable = projection.fit_down(Columns(m), None)
    assert len(first.unique()) == rank
    assert not bool(usable)


@kinds
def test_a_sum_that_vanishes_keeps_the_old_choice(kind):
    m, old = torch.randn(12, 20), torch.tensor([1, 4, 9], dtype=torch.int32)
    index, r, usable = KINDS[kind](rank=3).fit_down(Columns(m, lambda s: -m[:, s], lambda: m.abs().amax()), old)
    assert torch.equal(index, old)
    assert not r.any()
    assert not bool(usable)


def transposed(x):
    return x.mT.contiguous().mT


def channels_last(x):
    return x.to(memory_format=torch.channels_last)


LAYOUTS = [
    ("wide", (9, 20), 0, torch.clone),
    ("tall", (20, 9), 0, torch.clone),
    ("transposed", (20, 9), 0, transposed),
    ("convolution", (8, 3, 3, 3), 0, torch.clone),
    ("channels_last", (8, 3, 3, 3), 0, channels_last),
    ("stack", (3, 9, 20), 1, torch.clone),
    ("transposed stack of stacks", (2, 3, 20, 9), 2, transposed),
]


@kinds
@pytest.mark.parametrize(("name", "shape", "batch_dims", "layout"), LAYOUTS, ids=[case[0] for case in LAYOUTS])
@pytest.mark.parametrize("side", ["left", "right"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16])
def test_write_back_equals_the_dense_formula_in_place(kind, name, shape, batch_dims, layout, side, dtype, way):
    view = matrix_view(shape, side, batch_dims)
    projection = KINDS[kind](rank=4, side=side)
    wide = torch.float64 if dtype == torch.float64 else torch.float32
    count = math.prod(view.lead)
    index = torch.stack([torch.randperm(view.d)[:4].sort().values.int() for _ in range(count)]).view(*view.lead, 4)
    u = torch.randn(*view.lead, 4, view.k, dtype=wide)
    p = layout(torch.randn(shape).to(dtype))
    q = dense(projection, view.d).mT[index.long()].mT
    expected = 0.9 * p.double() - 0.3 * view.close(q @ u.double())
    pointer, strides, start = p.data_ptr(), p.stride(), p.clone()
    projection.write_back_(p, view, index, u, alpha=-0.3, beta=0.9)
    tolerance = {torch.float32: 1e-5, torch.float64: 1e-12, torch.bfloat16: 2**-8}[dtype]
    torch.testing.assert_close(p.double(), expected, rtol=1.01 * tolerance, atol=min(tolerance, 1e-5))
    assert (p.data_ptr(), p.stride()) == (pointer, strides)
    if dtype == torch.bfloat16:
        total = torch.zeros_like(expected)
        for draw in range(32):
            p.copy_(start)
            projection.write_back_(p, view, index, u, alpha=-0.3, beta=0.9, rounding=Rounding(counter_key(0, draw)))
            total += p.double()
        bias = (total / 32 - expected) / (2**-7 * expected.abs().clamp_min(0.01))
        assert bias.mean().abs() < 4 * 0.5 / (32 * p.numel()) ** 0.5


def largest_allocation(run):
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU], profile_memory=True) as profiler:
        run()
    events, sizes = list(profiler.profiler.kineto_results.experimental_event_tree()), [0]
    while events:
        event = events.pop()
        events += event.children
        if event.typed[0].name == "Allocation":
            sizes.append(event.typed[1].alloc_size)
    return max(sizes)


@kinds
@pytest.mark.parametrize("side", ["left", "right"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_nothing_larger_than_a_block_is_allocated(kind, side, dtype, way):
    shape = (192, 1 << 14) if side == "left" else (1 << 14, 192)  # 12 MiB in float32
    projection = KINDS[kind](rank=8, side=side)
    p = torch.randn(shape).to(dtype)
    view = projection.view(shape)
    index = projection.fit(view.open(p), None, ())
    u = torch.randn(8, view.k)
    runs = {
        "fit": lambda: projection.fit(view.open(p), None, ()),
        "fit_down": lambda: projection.fit_down(Columns(view.open(p)), index),
        "down": lambda: projection.down(view.open(p), index),
        "write_back_": lambda: projection.write_back_(p, view, index, u, alpha=-0.1, beta=0.9, rounding=Rounding(3)),
    }
    for name, run in runs.items():
        assert largest_allocation(run) <= 4 << 20, name


@pytest.mark.parametrize("kind", [DCT, Hadamard])
@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"norm": 3}, "norm must be 1 or 2, got 3"),
        ({"rank": 0}, "rank must be"),
        ({"side": "top"}, "side must be one of"),
    ],
)
def test_refuses_settings_out_of_range(kind, settings, message):
    with pytest.raises(ValueError, match=message):
        kind(**settings)
