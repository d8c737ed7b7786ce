import math

import pytest
import torch
from torch import Tensor

from slimstate import ops
from slimstate.ops import Dense, PartKey, Place, adamw_step_, counter_key, decode, encode_, takes_adamw
from slimstate.ops.codes import scale_shape
from slimstate.ops.weights import NEAREST, Rounding, widen

pytestmark = pytest.mark.skipif(not ops.COMPILED, reason="no op is registered where nothing was compiled")

SETTINGS = {"lr": 1e-2, "betas": (0.9, 0.99), "eps": 1e-8, "weight_decay": 0.1}
KEYS = [counter_key(0, i) for i in range(3)]
STORAGES = [
    (torch.float32, "nearest", torch.bfloat16),
    (torch.float32, "nearest", torch.uint8),
    (torch.bfloat16, "nearest", torch.float32),
    (torch.bfloat16, "stochastic", torch.bfloat16),
    (torch.bfloat16, "compensated", torch.uint8),
    (torch.float16, "stochastic", torch.float16),
    (torch.float16, "compensated", torch.float32),
]


def moment(x: Tensor, dtype: torch.dtype, signed: bool) -> tuple[Tensor, Tensor | None]:
    if dtype != torch.uint8:
        return x.to(dtype), None
    codes, scale = torch.empty(x.shape, dtype=dtype), torch.empty(scale_shape(x.shape, "rows"))
    encode_(codes, scale, x, signed=signed, layout="rows")
    return codes, scale


def read(x: Dense, j: int) -> Tensor:
    kept = (x.exp_avg, x.exp_avg_sq)[j]
    return kept.double() if x.scales is None else decode(kept, x.scales[j], signed=j == 0, layout="rows").double()


def parameter(shape: tuple[int, ...], dtype: torch.dtype, how: str, kept: torch.dtype, seed: int = 0) -> Dense:
    generator = torch.Generator().manual_seed(seed)
    p, g, m, v = (torch.randn(shape, generator=generator) for _ in range(4))
    (first, s1), (second, s2) = moment(m, kept, True), moment(v.square() + 0.5, kept, False)
    low = torch.randint(-(2**15), 2**15, shape, generator=generator).to(torch.int16)
    rounding = {"stochastic": Rounding(KEYS[0]), "compensated": Rounding(low=low), "nearest": NEAREST}[how]
    scales = None if s1 is None or s2 is None else (s1, s2)
    return Dense(p.to(dtype), g.to(dtype), first, second, 3.0 + seed, scales, rounding, (KEYS[1], KEYS[2]))


def copy(x: Dense) -> Dense:
    scales = None if x.scales is None else (x.scales[0].clone(), x.scales[1].clone())
    low = None if x.rounding.low is None else x.rounding.low.clone()
    moments = {"exp_avg": x.exp_avg.clone(), "exp_avg_sq": x.exp_avg_sq.clone()}
    return x._replace(p=x.p.clone(), **moments, scales=scales, rounding=x.rounding._replace(low=low))


def tensors(x: Dense) -> list[Tensor]:
    low = [] if x.rounding.low is None else [x.rounding.low]
    return [x.p, x.exp_avg, x.exp_avg_sq, *(x.scales or ()), *low]


def same(a: Dense, b: Dense) -> bool:
    return all(map(torch.equal, tensors(a), tensors(b)))


@pytest.mark.parametrize("maximize", [False, True])
@pytest.mark.parametrize(("dtype", "how", "kept"), STORAGES)
def test_is_the_equation_up_to_what_storage_takes_away(dtype, how, kept, maximize):
    x = parameter((40, 300), dtype, how, kept)
    low = x.rounding.low
    w, m, v, g = widen(x.p, low, torch.float32).double(), read(x, 0), read(x, 1), x.grad.double()
    adamw_step_([x], **SETTINGS, maximize=maximize)
    g = -g if maximize else g
    m, v = 0.9 * m + 0.1 * g, 0.99 * v + 0.01 * g**2
    w = (1 - 1e-3) * w - 1e-2 * m / (1 - 0.9**3) / ((v / (1 - 0.99**3)).sqrt() + 1e-8)
    unit = {torch.float32: 2**-23, torch.bfloat16: 2**-7, torch.float16: 2**-10}[dtype]
    unit = 2**-21 if how == "compensated" else unit
    found = widen(x.p, x.rounding.low, torch.float32).double()
    torch.testing.assert_close(found, w, rtol=2 * unit, atol=1e-6)
    largest = {torch.float32: 2**-21, torch.bfloat16: 2**-7, torch.float16: 2**-10, torch.uint8: 0.04}[kept]
    for j, expected in enumerate((m, v)):
        atol = largest * expected.abs().max().item() if kept == torch.uint8 else 1e-6
        torch.testing.assert_close(read(x, j), expected, rtol=largest, atol=atol)


@pytest.mark.parametrize(("dtype", "how", "kept"), STORAGES)
def test_several_are_stepped_as_each_alone(dtype, how, kept):
    shapes = [(5, 300), (1, 1), (0, 7), (70, 512), (3, 4, 5), (900,)]
    xs = [parameter(shape, dtype, how, kept, seed) for seed, shape in enumerate(shapes)]
    alone = [copy(x) for x in xs]
    adamw_step_(xs, **SETTINGS)
    for x, one in zip(xs, alone, strict=True):
        adamw_step_([one], **SETTINGS)
        assert same(x, one)


def test_kinds_may_be_mixed():
    xs = [parameter((5, 300), *storage, seed) for seed, storage in enumerate(STORAGES)]
    alone = [copy(x) for x in xs]
    adamw_step_(xs, **SETTINGS)
    for x, one in zip(xs, alone, strict=True):
        adamw_step_([one], **SETTINGS)
        assert same(x, one)


@pytest.mark.parametrize(("dtype", "how", "kept"), STORAGES)
def test_some_rows_are_stepped_as_in_the_whole(dtype, how, kept):
    x = parameter((40, 300), dtype, how, kept)
    rows, place = slice(13, 31), Place(13 * 300, 18 * 300, 40 * 300)
    part = Dense(
        x.p[rows].clone(),
        x.grad[rows],
        x.exp_avg[rows].clone(),
        x.exp_avg_sq[rows].clone(),
        x.age,
        None if x.scales is None else (x.scales[0][rows].clone(), x.scales[1][rows].clone()),
        Rounding(
            None if x.rounding.key is None else PartKey(KEYS[0], place),
            None if x.rounding.low is None else x.rounding.low[rows].clone(),
        ),
        (PartKey(KEYS[1], place), PartKey(KEYS[2], place)),
    )
    adamw_step_([x], **SETTINGS)
    adamw_step_([part], **SETTINGS)
    assert all(torch.equal(a[rows], b) for a, b in zip(tensors(x), tensors(part), strict=True))


@pytest.mark.parametrize(("dtype", "how", "kept"), STORAGES)
def test_numbers_as_tensors_give_the_same(dtype, how, kept):
    x = parameter((9, 300), dtype, how, kept)
    other = copy(x)._replace(age=torch.tensor(x.age, dtype=torch.float64))
    adamw_step_([x], **SETTINGS)
    lr, *betas = (torch.tensor(n, dtype=torch.float64) for n in (SETTINGS["lr"], *SETTINGS["betas"]))
    adamw_step_([other], lr=lr, betas=tuple(betas), eps=1e-8, weight_decay=0.1)
    assert same(x, other)


def test_random_bits_count_past_32_bits():
    x = parameter((4, 300), torch.bfloat16, "stochastic", torch.bfloat16)
    far = PartKey(KEYS[0], Place(2**32 - 500, 1 << 40, 1 << 40))
    x = x._replace(rounding=Rounding(far), keys=(far, far))
    pieces = [copy(x) for _ in range(2)]
    for piece, rows in zip(pieces, (slice(0, 1), slice(1, 4)), strict=True):
        key = far._replace(place=far.place._replace(start=far.place.start + 300 * rows.start))
        one = Dense(
            piece.p[rows],
            x.grad[rows],
            piece.exp_avg[rows],
            piece.exp_avg_sq[rows],
            x.age,
            None,
            Rounding(key),
            (key, key),
        )
        adamw_step_([one], **SETTINGS)
    adamw_step_([x], **SETTINGS)
    assert torch.equal(x.p, torch.cat([pieces[0].p[:1], pieces[1].p[1:]]))
    assert torch.equal(x.exp_avg_sq, torch.cat([pieces[0].exp_avg_sq[:1], pieces[1].exp_avg_sq[1:]]))


def test_infinities_stay_in_their_block():
    x = parameter((2, 512), torch.float32, "nearest", torch.uint8)
    x.grad[0, 3] = math.inf
    adamw_step_([x], **SETTINGS)
    lost = ~read(x, 0).isfinite()
    assert lost[0, :256].all() and lost.sum() == 256
    assert x.p.isfinite().sum() == 2 * 512 - 1


def test_autograd_notices_the_write():
    x = parameter((4, 300), torch.bfloat16, "stochastic", torch.float32)
    weight = torch.nn.Parameter(x.p)
    loss = weight.square().sum()
    with torch.no_grad():
        adamw_step_([x._replace(p=weight)], **SETTINGS)
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        loss.backward()


def test_what_it_takes():
    x = parameter((6, 300), torch.bfloat16, "stochastic", torch.float32)
    assert takes_adamw(x) and takes_adamw(x._replace(grad=x.grad.float()))
    assert not takes_adamw(x._replace(grad=x.grad.half()))
    assert not takes_adamw(x._replace(p=x.p.double()))
    assert not takes_adamw(x._replace(exp_avg_sq=x.exp_avg_sq.bfloat16()))
    assert not takes_adamw(x._replace(p=x.p.mT.contiguous().mT))
    assert not takes_adamw(x._replace(p=x.p.to("meta")))


def test_the_op_refuses_what_it_cannot_do():
    x = parameter((6, 300), torch.bfloat16, "stochastic", torch.float32)
    for wrong, match in (
        (x._replace(grad=x.grad.double()), "float32, bfloat16 or float16"),
        (x._replace(grad=x.grad[1:]), "gradient 0 must be"),
        (x._replace(exp_avg_sq=x.exp_avg_sq.mT), "second moment 0 must be contiguous"),
        (x._replace(exp_avg=x.exp_avg.byte(), exp_avg_sq=x.exp_avg_sq.byte()), "two scales"),
    ):
        before = [y.clone() for y in tensors(wrong)]
        with pytest.raises(RuntimeError, match=match):
            adamw_step_([wrong], **SETTINGS)
        assert all(map(torch.equal, tensors(wrong), before))
