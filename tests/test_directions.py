import hypothesis.strategies as st
import pytest
import torch
from hypothesis import given

from slimstate.ops import PartKey, Place, adam_direction_reference_, adam_directions_, counter_key
from slimstate.ops.directions import corrections

BETAS, EPS = (0.9, 0.99), 1e-3
KEYS = (counter_key(0, 1), counter_key(0, 2))


def tensors(shape, dtype=torch.float32, moments=None, seed=0):
    generator = torch.Generator().manual_seed(seed)
    r, m, v = (torch.randn(shape, generator=generator, dtype=torch.float64).to(dtype) for _ in range(3))
    return r, m.to(moments or dtype), v.abs().to(moments or dtype)


shapes = st.one_of(
    st.tuples(st.integers(0, 40)),
    st.tuples(st.integers(0, 40), st.integers(0, 40)),
    st.tuples(st.integers(0, 3), st.integers(0, 20), st.integers(0, 20)),
)


@given(shape=shapes, age=st.integers(1, 10**6), maximize=st.booleans(), double=st.booleans())
def test_is_the_equation(shape, age, maximize, double):
    r, m, v = tensors(shape, torch.float64 if double else torch.float32)
    g, mean, square = (x.double() for x in (r, m, v))
    mean = BETAS[0] * mean + (1 - BETAS[0]) * g
    square = BETAS[1] * square + (1 - BETAS[1]) * g**2
    u = -(mean / (1 - BETAS[0] ** age)) / ((square / (1 - BETAS[1] ** age)).sqrt() + EPS)
    adam_directions_([r], [m], [v], [age], betas=BETAS, eps=EPS, maximize=maximize)
    for x, expected in zip((r, m, v), (-u if maximize else u, mean, square), strict=True):
        torch.testing.assert_close(x.double(), expected, rtol=1e-12 if double else 1e-5, atol=1e-12 if double else 1e-6)


@given(shape=shapes, moments=st.sampled_from([torch.float32, torch.bfloat16]), by_row=st.booleans())
def test_the_compiled_op_reaches_the_references_bits(shape, moments, by_row):
    ours, theirs = tensors(shape, moments=moments), tensors(shape, moments=moments)
    if by_row and len(shape) > 1:
        age = torch.randint(1, 50, shape[:-1], dtype=torch.int32)
        t = age.double()
        bias = [(-1 / (1 - BETAS[0] ** t)).float(), (1 / (1 - BETAS[1] ** t).sqrt()).float()]
    else:
        age, bias = 7, corrections([7], *BETAS, False)
    adam_directions_(*([x] for x in ours), [age], betas=BETAS, eps=EPS, keys=[KEYS])
    adam_direction_reference_(*theirs, bias, BETAS, EPS, KEYS)
    for x, expected in zip(ours, theirs, strict=True):
        assert torch.equal(x, expected)


def test_rows_of_one_age_equal_a_matrix_of_that_age():
    ours, theirs = tensors((6, 9)), tensors((6, 9))
    adam_directions_(*([x] for x in ours), [torch.full((6,), 5, dtype=torch.int32)], betas=BETAS, eps=EPS)
    adam_directions_(*([x] for x in theirs), [5], betas=BETAS, eps=EPS)
    for x, expected in zip(ours, theirs, strict=True):
        assert torch.equal(x, expected)


def test_a_list_may_mix_dtypes_shapes_and_strides():
    kinds = [((5, 7), torch.float32, None), ((5, 7), torch.float32, torch.bfloat16), ((2, 4, 3), torch.float64, None)]
    kinds += [((5, 7), torch.float32, torch.float16), ((0, 3), torch.float32, None)]
    together, alone = ([list(tensors(*kind)) for kind in kinds] for _ in range(2))
    for some in (together, alone):
        some[0] = [x.mT.contiguous().mT for x in some[0]]
    ages, keys = [1.0, 2.0, 3.0, 4.0, 5.0], [KEYS] * 5
    adam_directions_(*zip(*together, strict=True), ages, betas=BETAS, eps=EPS, keys=keys)
    for some, age in zip(alone, ages, strict=True):
        some[0] = some[0].contiguous()
        adam_directions_(*([x] for x in some), [age], betas=BETAS, eps=EPS, keys=[KEYS])
    for mine, theirs in zip(together, alone, strict=True):
        for x, y in zip(mine, theirs, strict=True):
            assert torch.equal(x, y)


@pytest.mark.parametrize("cut", [3, 8])
def test_columns_of_bfloat16_moments_are_rounded_as_in_the_whole(cut):
    whole, parts = tensors((6, 20), moments=torch.bfloat16), []
    for first, last in ((0, cut), (cut, 20)):
        part = [x[:, first:last].clone() for x in whole]
        keys = [tuple(PartKey(word, Place(first, last - first, 20)) for word in KEYS)]
        adam_directions_(*([x] for x in part), [3], betas=BETAS, eps=EPS, keys=keys)
        parts.append(part)
    adam_directions_(*([x] for x in whole), [3], betas=BETAS, eps=EPS, keys=[KEYS])
    for x, *pieces in zip(whole, *parts, strict=True):
        assert torch.equal(x, torch.cat(pieces, 1))


@pytest.mark.parametrize(
    ("change", "error", "match"),
    [
        (dict(rs=[torch.ones(2, 3, dtype=torch.bfloat16)]), TypeError, "R must be float32 or float64, got torch.bfl"),
        (dict(exp_avgs=[torch.ones(3, 2)]), ValueError, r"one shape .* got \(2, 3\), \(3, 2\) and \(2, 3\)"),
        (dict(exp_avgs=[]), ValueError, "as many R, moments and ages needed, got 1, 0, 1 and 1"),
        (dict(ages=[torch.ones(3, dtype=torch.int32)]), ValueError, r"ages must be int32 of shape \(2,\)"),
        (dict(exp_avgs=[torch.ones(2, 3).half()]), ValueError, "moments in torch.float16 and torch.float32 need keys"),
        (dict(keys=[KEYS, KEYS]), ValueError, "two keys for each of 1 matrices needed, got 2 pairs"),
    ],
)
def test_bad_input_is_named(change, error, match):
    arguments = {key: [torch.ones(2, 3)] for key in ("rs", "exp_avgs", "exp_avg_sqs")}
    with pytest.raises(error, match=match):
        adam_directions_(**arguments | dict(ages=[1.0]) | change, betas=BETAS, eps=EPS)
