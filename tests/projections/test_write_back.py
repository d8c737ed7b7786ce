import pytest
import torch

from slimstate.ops import counter_key
from slimstate.optim import AdamW, GaLoreAdamW
from slimstate.projections import SVD, Coordinates, matrix_view
from slimstate.projections._rounding import NEAREST, Rounding

SIDES = ["auto", "left", "right", "reverse"]


def transposed(x):
    return x.mT.contiguous().mT


def channels_last(x):
    return x.to(memory_format=torch.channels_last)


def strided(x):
    return torch.stack([x, x], dim=-1)[..., 0]


# name, shape, batch_dims, memory layout
LAYOUTS = [
    ("wide", (9, 20), 0, torch.clone),
    ("tall", (20, 9), 0, torch.clone),
    ("square", (12, 12), 0, torch.clone),
    ("transposed", (20, 9), 0, transposed),
    ("every second element", (9, 20), 0, strided),
    ("convolution", (8, 3, 3, 3), 0, torch.clone),
    ("channels_last", (8, 3, 3, 3), 0, channels_last),
    ("tall channels_last", (40, 2, 3, 3), 0, channels_last),
    ("stack", (3, 9, 20), 1, torch.clone),
    ("transposed stack", (3, 20, 9), 1, transposed),
    ("strided stack", (3, 20, 9), 1, strided),
    ("stack of stacks", (2, 3, 9, 20), 2, torch.clone),
    ("transposed stack of stacks", (2, 3, 20, 9), 2, transposed),
    ("stacked convolutions", (2, 8, 3, 3, 3), 1, torch.clone),
]
layouts = pytest.mark.parametrize(("name", "shape", "batch_dims", "layout"), LAYOUTS, ids=[case[0] for case in LAYOUTS])


def case(shape, batch_dims, layout, side, dtype):
    """(projection, view, parameter, Q, U, Q U in the parameter's shape), the product in float64."""
    projection = SVD(rank=4, side=side)
    view = matrix_view(shape, side, batch_dims)
    wide = torch.float64 if dtype == torch.float64 else torch.float32
    q = torch.randn(*view.lead, view.d, 4, dtype=wide)
    u = torch.randn(*view.lead, 4, view.k, dtype=wide)
    p = layout(torch.randn(shape).to(dtype))
    return projection, view, p, q, u, view.close(q.double() @ u.double())


@layouts
@pytest.mark.parametrize("side", SIDES)
@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.float32, 1e-5), (torch.float64, 1e-13)])
def test_equals_the_dense_formula_in_place(name, shape, batch_dims, layout, side, dtype, tolerance):
    projection, view, p, q, u, product = case(shape, batch_dims, layout, side, dtype)
    expected = 0.9 * p.double() - 0.3 * product
    pointer, strides = p.data_ptr(), p.stride()
    projection.write_back_(p, view, q, u, alpha=-0.3, beta=0.9)
    torch.testing.assert_close(p.double(), expected, atol=tolerance, rtol=tolerance)
    assert (p.data_ptr(), p.stride()) == (pointer, strides)


@layouts
@pytest.mark.parametrize("side", SIDES)
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_without_a_key_low_precision_is_rounded_to_nearest_once(name, shape, batch_dims, layout, side, dtype):
    projection, view, p, q, u, product = case(shape, batch_dims, layout, side, dtype)
    expected = 0.9 * p.double() - 0.3 * product
    pointer, strides = p.data_ptr(), p.stride()
    projection.write_back_(p, view, q, u, alpha=-0.3, beta=0.9)
    half_a_unit = torch.finfo(dtype).eps / 2
    torch.testing.assert_close(p.double(), expected, rtol=1.01 * half_a_unit, atol=1e-5)
    assert (p.data_ptr(), p.stride()) == (pointer, strides)


@layouts
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_with_a_key_the_mean_over_keys_is_the_unrounded_value(name, shape, batch_dims, layout, dtype):
    projection, view, p, q, u, product = case(shape, batch_dims, layout, "auto", dtype)
    start, draws = p.clone(), 64
    expected = 0.9 * p.double() - 0.3 * product
    pointer, strides = p.data_ptr(), p.stride()
    total, seen = torch.zeros_like(expected), set()
    for draw in range(draws):
        p.copy_(start)
        projection.write_back_(p, view, q, u, alpha=-0.3, beta=0.9, rounding=Rounding(counter_key(0, draw)))
        total += p.double()
        seen.add(p.double().sum().item())
    unit = torch.finfo(dtype).eps * expected.abs().clamp_min(0.01)  # at least the spacing of neighbours
    bias = (total / draws - expected) / unit
    assert len(seen) > draws // 2
    assert bias.mean().abs() < 4 * 0.5 / (draws * p.numel()) ** 0.5
    assert bias.abs().max() < 5 * 0.5 / draws**0.5
    assert (p.data_ptr(), p.stride()) == (pointer, strides)


@pytest.mark.parametrize("side", ["left", "right"])
def test_the_random_bits_belong_to_the_element_whatever_the_layout_and_the_stack(side):
    shape, key = (2, 3, 20, 9), counter_key(1, 2)
    projection, view, p, q, u, _ = case(shape, 2, torch.clone, side, torch.bfloat16)
    flat = p.reshape(6, 20, 9).clone()
    turned = transposed(p)
    projection.write_back_(p, view, q, u, alpha=-0.3, beta=0.9, rounding=Rounding(key))
    projection.write_back_(flat, matrix_view(flat.shape, side, 1), q, u, alpha=-0.3, beta=0.9, rounding=Rounding(key))
    projection.write_back_(turned, view, q, u, alpha=-0.3, beta=0.9, rounding=Rounding(key))
    assert torch.equal(flat.view(shape), p)
    assert torch.equal(turned, p)


@pytest.mark.parametrize(("shape", "batch_dims"), [((2, 20, 9), 1), ((2 << 10, 1 << 10), 0)])
def test_no_two_elements_share_their_random_bits(shape, batch_dims):
    """Neither matrices of a stack nor blocks of a matrix: halves with the same values are rounded differently."""
    view = matrix_view(shape, "left", batch_dims)
    p = torch.ones(shape, dtype=torch.bfloat16)
    q, u = torch.ones(*view.lead, view.d, 1), torch.ones(*view.lead, 1, view.k)
    SVD(rank=1).write_back_(p, view, q, u, alpha=-1e-3, beta=1.0, rounding=Rounding(counter_key(1, 2)))
    first, second = p.view(2, -1)
    assert first.unique().numel() == 2
    assert not torch.equal(first, second)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_matrices_of_several_blocks_equal_the_dense_formula(dtype):
    shape = (1100, 2048)  # three blocks of at most 4 MiB in float32, the last one shorter
    for layout in (torch.clone, transposed):
        projection, view, p, q, u, product = case(shape, 0, layout, "auto", dtype)
        expected = 0.9 * p.double() - 0.3 * product
        projection.write_back_(p, view, q, u, alpha=-0.3, beta=0.9, rounding=Rounding(5))
        unit = torch.finfo(dtype).eps
        torch.testing.assert_close(p.double(), expected, rtol=1.01 * unit, atol=1e-5)


def test_alpha_zero_and_beta_one_change_no_bit():
    for dtype in (torch.float32, torch.bfloat16, torch.float16):
        projection, view, p, q, u, _ = case((9, 20), 0, torch.clone, "auto", dtype)
        before = p.clone()
        projection.write_back_(p, view, q, u, alpha=0.0, beta=1.0, rounding=Rounding(3))
        assert torch.equal(p, before)


def largest_allocation(run):
    """Bytes of the largest block of memory that is allocated while `run` runs, inside kernels too."""
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU], profile_memory=True) as profiler:
        run()
    events, sizes = list(profiler.profiler.kineto_results.experimental_event_tree()), [0]
    while events:
        event = events.pop()
        events += event.children
        if event.typed[0].name == "Allocation":
            sizes.append(event.typed[1].alloc_size)
    return max(sizes)


def test_the_measure_sees_a_full_copy():
    x = torch.zeros(256, 8192, dtype=torch.bfloat16)
    assert largest_allocation(x.float) == 8 << 20
    assert largest_allocation(x.mT.contiguous) == 4 << 20


# 12 MiB in float32: three blocks
@pytest.mark.parametrize(("shape", "batch_dims"), [((192, 1 << 14), 0), ((1 << 14, 192), 0), ((4, 192, 1 << 12), 1)])
@pytest.mark.parametrize("side", ["left", "right"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_no_step_allocates_more_than_a_block(shape, batch_dims, side, dtype):
    p = torch.nn.Parameter(torch.randn(shape).to(dtype))
    p.grad = torch.randn(shape).to(dtype)
    # Power iteration, since the Gram matrix of `reverse` would not be small for every side.
    optimizer = GaLoreAdamW([p], rank=4, side=side, projection="power", batch_dims=batch_dims, update_proj_gap=2)
    optimizer.step()  # allocates the state
    for what in ("step", "refresh"):
        assert largest_allocation(optimizer.step) <= 4 << 20, what


@pytest.mark.parametrize("shape", [(192, 1 << 14), (1 << 14, 192)])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_an_svd_refresh_allocates_no_more_than_a_block(shape, dtype):
    p = torch.nn.Parameter(torch.randn(shape).to(dtype))
    p.grad = torch.randn(shape).to(dtype)
    optimizer = GaLoreAdamW([p], rank=4, update_proj_gap=1)
    optimizer.step()
    assert largest_allocation(optimizer.step) <= 4 << 20


@pytest.mark.parametrize(
    ("dtype", "moment_dtype"), [(torch.float32, None), (torch.bfloat16, None), (torch.bfloat16, "param")]
)
def test_no_step_of_a_dense_parameter_allocates_more_than_a_block(dtype, moment_dtype):
    p = torch.nn.Parameter(torch.randn(192, 1 << 14).to(dtype))
    p.grad = torch.randn(192, 1 << 14).to(dtype)
    optimizer = AdamW([p], moment_dtype=moment_dtype)
    optimizer.step()
    assert largest_allocation(optimizer.step) <= 4 << 20


@layouts
@pytest.mark.parametrize("axis", ["rows", "columns", "entries"])
@pytest.mark.parametrize("contiguous", [False, True])
@pytest.mark.parametrize(
    ("dtype", "tolerance"), [(torch.float64, 1e-13), (torch.float32, 1e-5), (torch.bfloat16, 0.02)]
)
def test_coordinates_are_written_where_they_are(name, shape, batch_dims, layout, axis, contiguous, dtype, tolerance):
    projection = Coordinates(axis=axis, rank=4, contiguous=contiguous)
    view = projection.view(shape, batch_dims)
    p = layout(torch.randn(shape).to(dtype))
    wide = torch.float64 if dtype == torch.float64 else torch.float32
    m = torch.zeros(view.d, view.k)
    picks = [projection.fit(m, None, (0, 0, j)) for j in range(view.lead[0] if view.lead else 1)]
    index = torch.stack(picks) if view.lead else picks[0]
    assert torch.equal(projection.take(p, view, index), projection.down(view.open(p), index))
    u = torch.randn(*view.lead, 4, view.k, dtype=wide)
    expected = 0.9 * p.double() - 0.3 * view.close(projection.up(u.double(), index, view.d))
    pointer, strides = p.data_ptr(), p.stride()
    projection.write_back_(p, view, index, u, alpha=-0.3, beta=0.9, rounding=NEAREST if dtype == wide else Rounding(7))
    torch.testing.assert_close(p.double(), expected, atol=tolerance, rtol=tolerance)
    assert (p.data_ptr(), p.stride()) == (pointer, strides)
