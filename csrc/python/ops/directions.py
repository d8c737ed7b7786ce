# SPDX-License-Identifier: Apache-2.0
"""Low-rank Adam: projected gradients into their moments, and the directions in the subspaces."""

import math
from collections.abc import Iterator, Sequence

import torch
from torch import Tensor

from ._compiled import COMPILED, TAKEN
from ._samples import Sample
from .codes import CODES, decode, encode_, encode_reference_, scale_shape
from .keys import WHOLE, Key, PartKey, Place, counter_key
from .rounding import stochastic_round_

__all__ = ["adam_direction_reference_", "adam_directions_"]

_BLOCK = 1 << 20  # elements; what the reference allocates at once
_MOMENTS = (torch.float32, torch.bfloat16, *CODES)


def adam_directions_(
    rs: Sequence[Tensor],
    exp_avgs: Sequence[Tensor],
    exp_avg_sqs: Sequence[Tensor],
    ages: Sequence[float | Tensor],
    *,
    betas: tuple[float, float] | tuple[Tensor, Tensor],
    eps: float,
    maximize: bool = False,
    keys: Sequence[tuple[Key, Key]] = (),
    scales: Sequence[tuple[Tensor, Tensor]] = (),
) -> None:
    r"""Takes gradients R into their moments, and puts the directions U of Adam in their place, for a list of tensors:

    .. math::
        M \leftarrow \beta_1 M + (1-\beta_1) R, \quad V \leftarrow \beta_2 V + (1-\beta_2) R^2, \quad
        R \leftarrow U = -\frac{M / (1-\beta_1^t)}{\sqrt{V / (1-\beta_2^t)} + \epsilon}.

    R in float32 with both moments in float32 or bfloat16 is one pass over contiguous memory where the op is compiled.

    Args:
        rs: R (r,), (r, k) or (b, r, k) of each, float32 or float64; overwritten.
        exp_avgs: M of each, of R's shape and any floating dtype. Where that is bfloat16 or float16 and R float32, it is
            rounded stochastically.
        exp_avg_sqs: V of each, likewise.
        ages: t of each, the number of gradients in the moments, this one included, at least 1: a number, or an int32
            tensor (r,) or (b, r) of one for each row.
        betas: :math:`\beta_1, \beta_2` in [0, 1).
        eps: :math:`\epsilon`, at least 0.
        maximize: turns U around.
        keys: of the random bits of each M and V. None are needed where nothing is rounded stochastically.
        scales: of each M and V, if these are 8-bit codes; see :func:`encode_`, layout ``columns``.

    Numbers may be 0-d CPU tensors, so that compiled code does not depend on their values.

    Raises:
        ValueError: the lists differ in length, or shapes do.
        TypeError: a dtype is not one of the above.
    """
    if not len(rs) == len(exp_avgs) == len(exp_avg_sqs) == len(ages):
        raise ValueError(
            f"as many R, moments and ages needed, got {len(rs)}, {len(exp_avgs)}, {len(exp_avg_sqs)} and {len(ages)}"
        )
    if scales and len(scales) != len(rs):
        raise ValueError(f"two scales for each of {len(rs)} matrices needed, got {len(scales)} pairs")
    if keys and len(keys) != len(rs):
        raise ValueError(f"two keys for each of {len(rs)} matrices needed, got {len(keys)} pairs")
    for r, m, v, age in zip(rs, exp_avgs, exp_avg_sqs, ages, strict=True):
        if r.dtype not in (torch.float32, torch.float64):
            raise TypeError(f"R must be float32 or float64, got {r.dtype}")
        if not r.shape == m.shape == v.shape or not 1 <= r.ndim <= 3:
            shapes = f"{tuple(r.shape)}, {tuple(m.shape)} and {tuple(v.shape)}"
            raise ValueError(f"R and its moments must have one shape (r,), (r, k) or (b, r, k), got {shapes}")
        if isinstance(age, Tensor) and age.ndim and (age.shape != r.shape[:-1] or age.dtype != torch.int32):
            raise ValueError(f"ages must be int32 of shape {tuple(r.shape[:-1])}, got {age.dtype}, {tuple(age.shape)}")
        rounded = r.dtype == torch.float32 and {m.dtype, v.dtype} & {torch.bfloat16, torch.float16}
        if rounded and not keys:
            raise ValueError(f"moments in {m.dtype} and {v.dtype} need keys")
    if not rs:
        return
    if isinstance(betas[0], Tensor):
        words = [key.word if isinstance(key, PartKey) else key for pair in keys for key in pair]
        torch.ops.slimstate.adam_directions_keyed_(
            rs,
            exp_avgs,
            exp_avg_sqs,
            [scale for pair in scales for scale in pair],
            [age if isinstance(age, Tensor) else torch.tensor(age, dtype=torch.float64) for age in ages],
            [word if isinstance(word, Tensor) else torch.tensor(word) for word in words],
            [n for pair in keys for n in _place(pair[0])],
            *betas,
            eps,
            maximize,
        )
        return
    _adam_directions_(rs, exp_avgs, exp_avg_sqs, ages, *betas, eps, maximize, keys, scales)


def _adam_directions_(
    rs: Sequence[Tensor],
    ms: Sequence[Tensor],
    vs: Sequence[Tensor],
    ages: Sequence[float | Tensor],
    beta1: float,
    beta2: float,
    eps: float,
    maximize: bool,
    keys: Sequence[tuple[Key, Key]],
    scales: Sequence[tuple[Tensor, Tensor]],
) -> None:
    lists: dict[tuple[torch.dtype, bool], list[int]] = {}
    for i, (r, m, v) in enumerate(zip(rs, ms, vs, strict=True)):
        if is_compiled_for(r, m, v):
            lists.setdefault((m.dtype, isinstance(ages[i], Tensor)), []).append(i)
        elif scales:
            _codes_reference_(r, m, v, scales[i], ages[i], (beta1, beta2), eps, maximize)
        else:
            bias = _bias_of(ages[i], beta1, beta2, maximize, r.dtype)
            adam_direction_reference_(r, m, v, bias, (beta1, beta2), eps, keys[i] if keys else None)
    for (dtype, by_row), chosen in lists.items():
        low = [keys[i] for i in chosen] if dtype == torch.bfloat16 else []
        torch.ops.slimstate.adam_directions_(
            [rs[i] for i in chosen],
            [ms[i] for i in chosen],
            [vs[i] for i in chosen],
            [scale for i in chosen for scale in scales[i]] if dtype in CODES else [],
            [ages[i] for i in chosen] if by_row else [],
            []
            if by_row
            else corrections([age for i in chosen if not isinstance(age := ages[i], Tensor)], beta1, beta2, maximize),
            [_word(key) for pair in low for key in pair],
            [n for pair in low for n in _place(pair[0])],
            beta1,
            beta2,
            eps,
            maximize,
        )


def is_compiled_for(r: Tensor, m: Tensor, v: Tensor) -> bool:
    """Whether the compiled op takes these."""
    return (
        r.device.type in TAKEN
        and r.dtype == torch.float32
        and m.dtype in _MOMENTS
        and m.dtype == v.dtype
        and r.is_contiguous()
        and m.is_contiguous()
        and v.is_contiguous()
    )


def corrections(ages: Sequence[float], beta1: float, beta2: float, maximize: bool) -> list[float]:
    """s1, s2 of each age: U = s1 M / (s2 sqrt(V) + eps)."""
    known: dict[float, tuple[float, float]] = {}
    for age in ages:
        if age not in known:
            first = 1 / (1 - beta1**age)
            known[age] = (first if maximize else -first, 1 / math.sqrt(1 - beta2**age))
    return [s for age in ages for s in known[age]]


def _row_corrections(
    ages: Tensor, beta1: float, beta2: float, maximize: bool, dtype: torch.dtype
) -> tuple[Tensor, Tensor]:
    t = ages.double()
    first, second = 1 / (1 - beta1**t), 1 / (1 - beta2**t).sqrt()
    return (first if maximize else -first).to(dtype), second.to(dtype)


def _bias_of(
    age: float | Tensor, beta1: float, beta2: float, maximize: bool, dtype: torch.dtype
) -> Sequence[float | Tensor]:
    if isinstance(age, Tensor):
        return _row_corrections(age, beta1, beta2, maximize, dtype)
    return corrections([age], beta1, beta2, maximize)


def _codes_reference_(
    r: Tensor,
    m: Tensor,
    v: Tensor,
    scales: tuple[Tensor, Tensor],
    age: float | Tensor,
    betas: tuple[float, float],
    eps: float,
    maximize: bool,
) -> None:
    """Of columns, since the blocks of codes go down them."""
    step = max(1, _BLOCK // max(1, r[..., 0].numel())) if r.numel() else 1
    bias = _bias_of(age, *betas, maximize, r.dtype)
    for start in range(0, r.shape[-1], step):
        _columns_reference_(r, m, v, scales, slice(start, start + step), bias, betas, eps)


def _columns_reference_(
    r: Tensor,
    m: Tensor,
    v: Tensor,
    scales: tuple[Tensor, Tensor],
    s: slice,
    bias: Sequence[float | Tensor],
    betas: tuple[float, float],
    eps: float,
) -> None:
    kept = [
        (codes[..., s], scale[..., s], signed)
        for codes, scale, signed in zip((m, v), scales, (True, False), strict=True)
    ]
    wide = [decode(codes, scale, signed=signed, layout="columns", dtype=r.dtype) for codes, scale, signed in kept]
    adam_direction_reference_(r[..., s], wide[0], wide[1], bias, betas, eps)
    for (codes, scale, signed), value in zip(kept, wide, strict=True):
        encode_(codes, scale, value, signed=signed, layout="columns")


def _root(x: Tensor) -> Tensor:
    # Through float64: what torch calls for float32 on the CPU, MKL's, is off by a unit in the last place at times.
    return x.double().sqrt_().float() if x.dtype == torch.float32 and x.device.type == "cpu" else x.sqrt()


def _word(key: Key) -> int:
    word = key.word if isinstance(key, PartKey) else key
    assert isinstance(word, int)
    return word


def _place(key: Key) -> Place:
    return key.place if isinstance(key, PartKey) else WHOLE


@torch.library.custom_op("slimstate::adam_directions_keyed_", mutates_args=("rs", "exp_avgs", "exp_avg_sqs", "scales"))
def _(
    rs: list[Tensor],
    exp_avgs: list[Tensor],
    exp_avg_sqs: list[Tensor],
    scales: list[Tensor],
    ages: list[Tensor],
    words: list[Tensor],
    places: list[int],
    beta1: Tensor,
    beta2: Tensor,
    eps: float,
    maximize: bool,
) -> None:
    """One node of a compiled graph; its numbers are on the CPU, so that nothing waits for a device."""
    keys = []
    for i in range(len(words) // 2):
        place = Place(*places[3 * i : 3 * i + 3])
        first, second = (PartKey(int(word), place) for word in words[2 * i : 2 * i + 2])
        keys.append((first, second))
    numbers = [age if age.ndim else age.item() for age in ages]
    pairs = list(zip(scales[::2], scales[1::2], strict=True))
    _adam_directions_(rs, exp_avgs, exp_avg_sqs, numbers, beta1.item(), beta2.item(), eps, maximize, keys, pairs)


def adam_direction_reference_(
    r: Tensor,
    m: Tensor,
    v: Tensor,
    bias: Sequence[float | Tensor],
    betas: tuple[float, float],
    eps: float,
    keys: tuple[Key, Key] | None = None,
) -> None:
    """What the op ``adam_directions_`` does with one of its tensors, in PyTorch; see :func:`adam_directions_`.

    `bias` is s1, s2 in U = s1 M / (s2 sqrt(V) + eps), numbers or, for each row of R, tensors in R's dtype.
    """
    beta1, beta2 = betas
    stack = [x[:, None] if x.ndim == 1 else x for x in (r, m, v)]
    stack = [x if x.ndim == 3 else x[None] for x in stack]
    members, rows, columns = stack[0].shape
    step = max(1, _BLOCK // max(1, columns))
    for j in range(members):
        for start in range(0, rows, step):
            s = slice(start, start + step)
            g, *moments = (x[j, s] for x in stack)
            first, second = (x.view(members, rows, 1)[j, s] if isinstance(x, Tensor) else x for x in bias)
            mean, square = (x.to(r.dtype) for x in moments)
            mean.mul_(beta1).add_(g * (1 - beta1))
            square.mul_(beta2).add_(g * g * (1 - beta2))
            torch.div(mean * first, _root(square).mul_(second).add_(eps), out=g)
            for i, (kept, value) in enumerate(zip(moments, (mean, square), strict=True)):
                if kept.dtype in (torch.bfloat16, torch.float16) and r.dtype == torch.float32:
                    assert keys is not None
                    stochastic_round_(kept, value, keys[i], (j * rows + start) * columns)
                elif kept.dtype != r.dtype:
                    kept.copy_(value)


if COMPILED:

    @torch.library.register_fake("slimstate::adam_directions_")
    def _(
        rs: list[Tensor],
        exp_avgs: list[Tensor],
        exp_avg_sqs: list[Tensor],
        scales: list[Tensor],
        ages: list[Tensor],
        biases: list[float],
        keys: list[int],
        places: list[int],
        beta1: float,
        beta2: float,
        eps: float,
        maximize: bool,
    ) -> None:
        torch._check(len(rs) == len(exp_avgs) == len(exp_avg_sqs))


def samples(device: str) -> Iterator[Sample]:
    """What the compiled op is compared with its reference by."""
    generator = torch.Generator().manual_seed(0)
    lists: dict[str, list[tuple[int, ...]]] = {
        "": [(3, 1000), (2, 5, 129), (0, 7), (1, 1)],
        " of one": [(257, 67)],
    }
    for dtype in _MOMENTS:
        for by_row in (False, True):
            for what, shapes in lists.items():
                rs = [torch.randn(s, generator=generator).to(device) for s in shapes]
                ms = [(torch.randn(s, generator=generator) * 0.1).to(device) for s in shapes]
                vs = [torch.rand(s, generator=generator).to(device) for s in shapes]
                scales: list[Tensor] = []
                if dtype in CODES:
                    for some, signed in ((ms, True), (vs, False)):
                        coded = [_coded(x, dtype, signed) for x in some]
                        some[:] = [codes for codes, _ in coded]
                        scales += [scale for _, scale in coded]
                    scales = [x for pair in zip(scales[: len(ms)], scales[len(ms) :], strict=True) for x in pair]
                else:
                    ms, vs = ([x.to(dtype) for x in some] for some in (ms, vs))
                ages = [
                    torch.randint(1, 300, s[:-1], generator=generator, dtype=torch.int32).to(device) for s in shapes
                ]
                biases = corrections([float(3 + i) for i in range(len(shapes))], 0.9, 0.999, False)
                words = [counter_key(0, i) for i in range(2 * len(rs))]
                places = [n for i in range(len(rs)) for n in (i, 50 if i % 2 else 2**62, 70)]
                what = f"{dtype}{', ages by row' if by_row else ''}{what}"
                numbers = ages if by_row else [], [] if by_row else biases, words, places, 0.9, 0.999, 1e-8
                yield Sample("adam_directions_", what, (rs, ms, vs, scales, *numbers, by_row), _reference)
                tensors = (
                    ages if by_row else [torch.tensor(float(3 + i), dtype=torch.float64) for i in range(len(rs))],
                    [torch.tensor(word) for word in words],
                    places,
                    *(torch.tensor(beta, dtype=torch.float64) for beta in (0.9, 0.999)),
                    1e-8,
                )
                yield Sample("adam_directions_keyed_", what, (rs, ms, vs, scales, *tensors, by_row), _keyed_reference)


def _coded(x: Tensor, dtype: torch.dtype, signed: bool) -> tuple[Tensor, Tensor]:
    codes = torch.zeros_like(x, dtype=dtype)
    scale = x.new_zeros(scale_shape(x.shape, "columns"))
    encode_reference_(codes, scale, x, signed=signed, layout="columns")
    return codes, scale


def _reference(
    rs: list[Tensor],
    ms: list[Tensor],
    vs: list[Tensor],
    scales: list[Tensor],
    ages: list[Tensor],
    biases: list[float],
    words: list[int],
    places: list[int],
    beta1: float,
    beta2: float,
    eps: float,
    maximize: bool,
) -> None:
    for i, (r, m, v) in enumerate(zip(rs, ms, vs, strict=True)):
        if scales:
            own = (scales[2 * i], scales[2 * i + 1])
            bias = _row_corrections(ages[i], beta1, beta2, maximize, r.dtype) if ages else biases[2 * i : 2 * i + 2]
            _columns_reference_(r, m, v, own, slice(None), bias, (beta1, beta2), eps)
            continue
        place = Place(*places[3 * i : 3 * i + 3])
        keys = PartKey(words[2 * i], place), PartKey(words[2 * i + 1], place)
        bias = _row_corrections(ages[i], beta1, beta2, maximize, r.dtype) if ages else biases[2 * i : 2 * i + 2]
        adam_direction_reference_(r, m, v, bias, (beta1, beta2), eps, keys)


def _keyed_reference(
    rs: list[Tensor],
    ms: list[Tensor],
    vs: list[Tensor],
    scales: list[Tensor],
    ages: list[Tensor],
    words: list[Tensor],
    places: list[int],
    beta1: Tensor,
    beta2: Tensor,
    eps: float,
    maximize: bool,
) -> None:
    betas = beta1.item(), beta2.item()
    by_row = any(age.ndim for age in ages)
    biases = [] if by_row else corrections([age.item() for age in ages], *betas, maximize)
    numbers = ages if by_row else [], biases, [int(word) for word in words]
    _reference(rs, ms, vs, scales, *numbers, places, *betas, eps, maximize)
