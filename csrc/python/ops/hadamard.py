# SPDX-License-Identifier: Apache-2.0
"""The Walsh-Hadamard transform: norms of its rows, some of its rows, and back from them into a weight."""

import math
from collections.abc import Iterator, Sequence

import torch
from torch import Tensor

from ._compiled import COMPILED, TAKEN
from ._samples import Sample
from .directions import adam_directions_
from .keys import WHOLE, Key, PartKey, Place, counter_key
from .rounding import stochastic_round_

__all__ = [
    "MOST_ROWS_CUDA",
    "carry_",
    "hadamard_adam_",
    "hadamard_adam_reference_",
    "hadamard_down",
    "hadamard_down_reference",
    "hadamard_scores",
    "hadamard_scores_reference",
    "hadamard_transform_reference",
    "hadamard_write_back_",
    "hadamard_write_back_reference_",
    "powers_of_two",
    "takes_hadamard",
    "takes_hadamard_adam",
    "transforms_hadamard",
]

_LOW_PRECISION = (torch.bfloat16, torch.float16)
_BLOCK = 1 << 20  # elements
_MOST_ROWS = 1 << 16  # a tile of 4 MiB
MOST_ROWS_CUDA = (1 << 14) - 1  # whose largest power of two is a tile of 32 KiB


def powers_of_two(d: int) -> list[tuple[int, int]]:
    """(start, size) of the blocks that d is cut into: its binary digits, the largest first."""
    cuts, start = [], 0
    for bit in reversed(range(d.bit_length())):
        if d >> bit & 1:
            cuts.append((start, 1 << bit))
            start += 1 << bit
    return cuts


def transforms_hadamard(device: torch.device, d: int) -> bool:
    """Whether columns of d rows are transformed by a compiled op there: on CUDA up to 16383 rows."""
    return device.type in TAKEN and (device.type == "cpu" or d <= MOST_ROWS_CUDA)


def takes_hadamard(m: Tensor, *, weight: bool = False) -> bool:
    """Whether a compiled op runs on this matrix (d x k): float32, with rows or columns contiguous, on CUDA of at most
    16383 rows; a weight also in bfloat16 or float16, without gaps.

    Args:
        m: the matrix.
        weight: whether it is to be written to.
    """
    if m.ndim != 2 or not transforms_hadamard(m.device, m.shape[0]):
        return False
    (d, k), (row, column) = m.shape, m.stride()
    if m.dtype == torch.float32:
        return (column == 1 and row >= k) or (row == 1 and column >= d)
    return weight and m.dtype in _LOW_PRECISION and (row, column) in ((k, 1), (1, d))


def takes_hadamard_adam(w: Tensor, g: Tensor, m: Tensor, v: Tensor) -> bool:
    """Whether :func:`hadamard_adam_` is compiled for these: on the CPU, float32, of at most 65536 rows."""
    return (
        w.device.type == "cpu"
        and w.dtype == m.dtype == v.dtype == torch.float32
        and w.shape[0] <= _MOST_ROWS
        and takes_hadamard(w)
        and takes_hadamard(g)
        and m.is_contiguous()
        and v.is_contiguous()
    )


def hadamard_scores(m: Tensor, norm: int, scale: Tensor | None = None) -> Tensor:
    r"""Norms of the rows of :math:`S = c\,Q^\top M`, with Q the orthonormal Walsh-Hadamard matrix.

    Q is block-diagonal over the powers of two that d consists of, the largest first. Of l2 norms the square is
    returned. M is read once, and S is never kept.

    Args:
        m: M (d x k), float32.
        norm: 1 or 2.
        scale: c, a 0-d tensor. None: a power of two for which nothing is lost above or below the range of float32,
            which depends on M alone. NaN or infinite scores mean that M is not finite.

    Returns:
        d numbers, float32. Their order of addition depends on the shape alone.

    Raises:
        TypeError: M is not float32.
        ValueError: M is not a matrix, or another norm.
    """
    _check("m", m, (torch.float32,))
    if norm not in (1, 2):
        raise ValueError(f"norm must be 1 or 2, got {norm!r}")
    if not takes_hadamard(m):
        return hadamard_scores_reference(m, norm, scale)
    scores = m.new_empty(m.shape[0])
    torch.ops.slimstate.hadamard_scores_(scores, m, scale, norm)
    return scores


def hadamard_down(m: Tensor, index: Tensor) -> Tensor:
    r"""The rows `index` of :math:`Q^\top M` (r x k), with Q as in :func:`hadamard_scores`.

    Args:
        m: M (d x k), float32.
        index: which (r,), int32, sorted (which is checked on the CPU only).

    Returns:
        R (r x k), float32 and contiguous; equal bits whatever the order of M in memory.

    Raises:
        TypeError: a dtype is not one of these.
        ValueError: M is not a matrix.
    """
    _check("m", m, (torch.float32,))
    if index.dtype != torch.int32:
        raise TypeError(f"index must be int32, got {index.dtype}")
    if not takes_hadamard(m):
        return hadamard_down_reference(m, index)
    r = m.new_empty(len(index), m.shape[1])
    torch.ops.slimstate.hadamard_down_(r, m, index)
    return r


def hadamard_write_back_(
    w: Tensor,
    index: Tensor,
    u: Tensor,
    *,
    alpha: float | Tensor,
    beta: float | Tensor,
    key: Key | None = None,
    offset: int = 0,
) -> None:
    r"""W <- beta W + alpha Q_J U in one pass, with Q as in :func:`hadamard_scores` and J = `index`.

    Args:
        w: W (d x k), float32, bfloat16 or float16, the columns or the rows contiguous; where it is of low precision,
            both without gaps.
        index: J (r,), int32, sorted.
        u: U (r x k), float32.
        alpha: factor of the update; in compiled code a 0-d CPU tensor, as the next two.
        beta: factor of the weight.
        key: of the stochastic rounding of a weight of low precision; None rounds to nearest.
        offset: number of the first element within the whole weight, for the random bits; elements are counted in the
            order in which they lie in memory.

    Raises:
        TypeError: a dtype is not one of these.
        ValueError: the shapes do not fit, or `offset` is negative.
    """
    _check("w", w, (torch.float32, *_LOW_PRECISION))
    _check("u", u, (torch.float32,))
    if index.dtype != torch.int32:
        raise TypeError(f"index must be int32, got {index.dtype}")
    if u.shape != (len(index), w.shape[1]):
        raise ValueError(f"u must be of shape {(len(index), w.shape[1])}, got {tuple(u.shape)}")
    if offset < 0:
        raise ValueError(f"offset must be >= 0, got {offset}")
    u = u.contiguous()
    if isinstance(alpha, Tensor) or isinstance(beta, Tensor):
        numbers = (torch.as_tensor(x, dtype=torch.float64) for x in (alpha, beta))
        word, place = key if isinstance(key, PartKey) else (key, WHOLE)
        word = None if word is None else torch.as_tensor(word)
        torch.ops.slimstate.hadamard_write_back_keyed_(w, index, u, *numbers, word, offset, *place)
        return
    if not takes_hadamard(w, weight=True):
        hadamard_write_back_reference_(w, index, u, alpha=alpha, beta=beta, key=key, offset=offset)
        return
    word, place = key if isinstance(key, PartKey) else (key, WHOLE)
    random = word is not None and w.dtype in _LOW_PRECISION
    torch.ops.slimstate.hadamard_write_back_(
        w, index, u, alpha, beta, random, int(word) if word is not None else 0, offset, *place
    )
    torch.autograd.graph.increment_version(w)  # so that a backward that saved it raises


@torch.library.custom_op("slimstate::hadamard_write_back_keyed_", mutates_args=("w",))
def _(
    w: Tensor,
    index: Tensor,
    u: Tensor,
    alpha: Tensor,
    beta: Tensor,
    key: Tensor | None,
    offset: int,
    start: int,
    width: int,
    pitch: int,
) -> None:
    """One node of a compiled graph, whatever the numbers."""
    word = None if key is None else PartKey(int(key), Place(start, width, pitch))
    hadamard_write_back_(w, index, u, alpha=alpha.item(), beta=beta.item(), key=word, offset=offset)


def hadamard_adam_(
    ws: Sequence[Tensor],
    gs: Sequence[Tensor],
    exp_avgs: Sequence[Tensor],
    exp_avg_sqs: Sequence[Tensor],
    ages: Sequence[Tensor],
    indices: Sequence[Tensor],
    *,
    norm: int,
    carry: bool,
    alpha: float,
    beta: float,
    betas: tuple[float, float],
    eps: float,
    maximize: bool = False,
) -> None:
    r"""The step of Adam in the columns of the Walsh-Hadamard matrix that hold most of a gradient, for a list of
    matrices, which on the CPU are read and written once after the choice of J:

    .. math::
        J = \text{the } r \text{ largest rows of } Q^\top G, \qquad R = Q_J^\top G, \qquad
        W \leftarrow \beta W + \alpha\,Q_J U,

    with U the directions of :func:`adam_directions_`, each row corrected by its own age. Equal bits to
    :func:`hadamard_scores`, :func:`carry_`, :func:`hadamard_down`, :func:`adam_directions_` and
    :func:`hadamard_write_back_` one after another. A gradient of zeros or one that is not finite keeps J.

    Args:
        ws: W (d x k) of each; a compiled op takes those that :func:`takes_hadamard_adam` says.
        gs: G (d x k).
        exp_avgs: M (r x k).
        exp_avg_sqs: V (r x k).
        ages: of each row (r,), int32; afterwards they count this step.
        indices: J (r,), int32, sorted, as it was; afterwards as it is.
        norm: 1 or 2, what J is chosen by, the first of equal rows; 0 leaves J as it is.
        carry: whether the moments of a row that stays in J move with it, and others begin at zero, of age 0; else they
            stay where they are.
        alpha: factor of the update.
        beta: factor of the weight.
        betas: decay rates of the moments.
        eps: as in :func:`adam_directions_`.
        maximize: turns U around.

    Raises:
        TypeError: a dtype is not one of these.
        ValueError: the shapes do not fit, or another norm.
    """
    if norm not in (0, 1, 2):
        raise ValueError(f"norm must be 0, 1 or 2, got {norm!r}")
    compiled = True
    for w, g, m, v, age, index in zip(ws, gs, exp_avgs, exp_avg_sqs, ages, indices, strict=True):
        r = index.shape[0]
        if w.ndim != 2 or g.shape != w.shape or not m.shape == v.shape == (r, w.shape[1]) or age.shape != (r,):
            shapes = ", ".join(str(tuple(x.shape)) for x in (w, g, m, v, age, index))
            raise ValueError(f"W and G must be (d, k), both moments (r, k), ages and J (r,), got {shapes}")
        if not w.dtype == g.dtype == m.dtype == v.dtype == torch.float32:
            raise TypeError(f"W, G and the moments must be float32, got {w.dtype}, {g.dtype}, {m.dtype}, {v.dtype}")
        if not age.dtype == index.dtype == torch.int32:
            raise TypeError(f"ages and J must be int32, got {age.dtype}, {index.dtype}")
        compiled = compiled and takes_hadamard_adam(w, g, m, v)
    lists = (list(ws), list(gs), list(exp_avgs), list(exp_avg_sqs), list(ages), list(indices))
    step = torch.ops.slimstate.hadamard_adam_ if compiled and ws else hadamard_adam_reference_
    step(*lists, norm, carry, alpha, beta, *betas, eps, maximize)
    torch.autograd.graph.increment_version([x for i in (0, 2, 3, 4, 5) for x in lists[i]])


def carry_(moments: Sequence[Tensor], ages: Tensor, old: Tensor, new: Tensor) -> None:
    """Gives the rows of the moments (r x k) and their ages (r,) to the columns `new` that were chosen as `old` before,
    both sorted; rows of columns that were not become zeros of age 0."""
    place = torch.searchsorted(old, new).clamp_(max=len(old) - 1)
    fresh = old.index_select(0, place) != new
    ages.copy_(ages.index_select(0, place).masked_fill_(fresh, 0))
    for moment in moments:
        step = max(1, _BLOCK // max(1, len(moment)))
        for start in range(0, moment.shape[1], step):
            s = slice(start, start + step)
            moment[:, s] = moment[:, s].index_select(0, place).masked_fill_(fresh[:, None], 0)


def hadamard_adam_reference_(
    ws: list[Tensor],
    gs: list[Tensor],
    exp_avgs: list[Tensor],
    exp_avg_sqs: list[Tensor],
    ages: list[Tensor],
    indices: list[Tensor],
    norm: int,
    carry: bool,
    alpha: float,
    beta: float,
    beta1: float,
    beta2: float,
    eps: float,
    maximize: bool,
) -> None:
    """What :func:`hadamard_adam_` computes, one thing after another."""
    for w, g, m, v, age, index in zip(ws, gs, exp_avgs, exp_avg_sqs, ages, indices, strict=True):
        chosen = index.clone()
        if norm:
            scores = hadamard_scores(g, norm)
            total = scores.sum()
            order = scores.sort(descending=True, stable=True).indices[: len(index)].sort().values
            chosen = torch.where((total > 0) & total.isfinite(), order.int(), index)
        if carry:
            carry_([m, v], age, index, chosen)
        index.copy_(chosen)
        age += 1
        r = hadamard_down_reference(g, index)
        adam_directions_([r], [m], [v], [age], betas=(beta1, beta2), eps=eps, maximize=maximize)
        hadamard_write_back_reference_(w, index, r, alpha=alpha, beta=beta)


def _check(name: str, x: Tensor, dtypes: tuple[torch.dtype, ...]) -> None:
    if x.dtype not in dtypes:
        allowed = ", ".join(str(dtype).removeprefix("torch.") for dtype in dtypes)
        raise TypeError(f"{name} must be {allowed}, got {x.dtype}")
    if x.ndim != 2:
        raise ValueError(f"{name} must be a matrix, got shape {tuple(x.shape)}")


def hadamard_transform_reference(x: Tensor) -> Tensor:
    """Q X for the columns of X (d x c), in float32 or float64, in the order of additions that the ops have."""
    parts = [_sylvester(x[start : start + size]) for start, size in powers_of_two(len(x))]
    return parts[0] if len(parts) == 1 else torch.cat(parts)


def _sylvester(x: Tensor) -> Tensor:
    """The orthonormal transform for a power of two, factors of two first, so that nothing exceeds the result."""
    d, c = x.shape
    bits = d.bit_length() - 1
    x = x.mul(2.0 ** -(bits // 2))
    other: Tensor | None = None
    for bit in range(bits):
        pairs = x.view(-1, 2, 1 << bit, c)
        first, second = pairs[:, 0], pairs[:, 1]
        if torch.compiler.is_compiling():  # which takes no `out` with strides
            x = torch.stack((first + second, first - second), 1).view(d, c)
            continue
        other = torch.empty_like(x) if other is None else other
        results = other.view(-1, 2, 1 << bit, c)
        torch.add(first, second, out=results[:, 0])
        torch.sub(first, second, out=results[:, 1])
        x, other = other, x
    return x.mul_(math.sqrt(0.5)) if bits % 2 else x


def hadamard_scores_reference(m: Tensor, norm: int, scale: Tensor | None = None) -> Tensor:
    """What :func:`hadamard_scores` computes, in PyTorch; but the order of the sums over k."""
    if scale is None:
        largest = m.abs().amax() if m.numel() else m.new_zeros(())
        tiny = torch.finfo(m.dtype).tiny
        largest = largest.nan_to_num(1.0).clamp(tiny, 1 / tiny)
        scale = torch.frexp(largest).mantissa / largest
    s = hadamard_transform_reference(m * scale)
    return (s.abs() if norm == 1 else s.square()).sum(1)


def hadamard_down_reference(m: Tensor, index: Tensor) -> Tensor:
    """What :func:`hadamard_down` computes, in PyTorch."""
    return hadamard_transform_reference(m).index_select(0, index)


def hadamard_write_back_reference_(
    w: Tensor, index: Tensor, u: Tensor, *, alpha: float, beta: float, key: Key | None = None, offset: int = 0
) -> None:
    """What :func:`hadamard_write_back_` computes, in PyTorch."""
    x = hadamard_transform_reference(u.new_zeros(w.shape).index_add_(0, index, u))
    x = (w.float() * beta).add_(x.mul_(alpha))
    if key is None or w.dtype == torch.float32:
        w.copy_(x)
    elif w.is_contiguous():
        stochastic_round_(w, x, key, offset)
    else:
        stochastic_round_(w.mT, x.mT, key, offset)


if COMPILED:

    @torch.library.register_fake("slimstate::hadamard_scores_")
    def _(scores: Tensor, m: Tensor, scale: Tensor | None, norm: int) -> None:
        torch._check(scores.shape[0] == m.shape[0])

    @torch.library.register_fake("slimstate::hadamard_down_")
    def _(r: Tensor, m: Tensor, index: Tensor) -> None:
        torch._check(r.shape == (index.shape[0], m.shape[1]))

    @torch.library.register_fake("slimstate::hadamard_write_back_")
    def _(w: Tensor, index: Tensor, u: Tensor, *_: object) -> None:
        torch._check(u.shape == (index.shape[0], w.shape[1]))

    @torch.library.register_fake("slimstate::hadamard_adam_")
    def _(ws: list[Tensor], gs: list[Tensor], *_: object) -> None:
        torch._check(len(ws) == len(gs))


def samples(device: str) -> Iterator[Sample]:
    """What the compiled ops are compared with their references by."""
    generator = torch.Generator().manual_seed(0)

    def normal(*shape: int) -> Tensor:
        return torch.randn(shape, generator=generator).to(device)

    for d, k in ((1, 1), (12, 5), (37, 16), (64, 3), (1376, 37), (512, 80), (8200, 17)):
        index = torch.randperm(d, generator=generator)[: max(1, d // 3)].sort().values.int().to(device)
        for by_columns in (False, True):
            what = f"{d} x {k}, {'columns' if by_columns else 'rows'} contiguous"

            def laid_out(x: Tensor, by_columns: bool = by_columns) -> Tensor:
                return x.mT.contiguous().mT if by_columns else x

            m = laid_out(normal(d, k))
            for norm in (1, 2):
                for scale in (None, torch.tensor(0.25, device=device)):
                    sample = (torch.zeros(d, device=device), m, scale, norm)
                    yield Sample("hadamard_scores_", f"{what}, l{norm}", sample, _scores_reference, 1e-5)
            r = torch.zeros(len(index), k, device=device)
            yield Sample("hadamard_down_", what, (r, m, index), _down_reference)
            u = normal(len(index), k)
            for dtype in (torch.float32, *_LOW_PRECISION):
                for random in (False, True)[: 1 if dtype == torch.float32 else 2]:
                    w = laid_out(normal(d, k)).to(dtype)
                    numbers = (-0.1, 0.99, random, counter_key(0, 1), 3, 2, 50, 70)
                    arguments = (w, index, u, *numbers)
                    yield Sample(
                        "hadamard_write_back_",
                        f"{what}, {dtype}{', random' if random else ''}",
                        arguments,
                        _write_back_reference,
                    )
            alpha, beta = (torch.tensor(x, dtype=torch.float64) for x in (-0.1, 0.99))
            keyed = (laid_out(normal(d, k)), index, u, alpha, beta, None, 0, *WHOLE)
            yield Sample("hadamard_write_back_keyed_", what, keyed, _keyed_reference)
            if device != "cpu":  # elsewhere Adam's step has no kernel of its own
                continue
            ages = torch.randint(0, 300, (len(index),), generator=generator, dtype=torch.int32)
            for norm, carry in ((0, False), (1, False), (1, True), (2, True)):
                one = (laid_out(normal(d, k)), m, normal(*u.shape), normal(*u.shape).square(), ages, index)
                yield Sample(
                    "hadamard_adam_",
                    f"{what}{f', l{norm}' if norm else ''}{', carried' if carry else ''}",
                    (*([x, x.clone()] for x in one), norm, carry, -0.1, 0.99, 0.9, 0.999, 1e-8, False),
                    hadamard_adam_reference_,
                )


def _scores_reference(scores: Tensor, m: Tensor, scale: Tensor | None, norm: int) -> None:
    one = torch.ones((), device=m.device)  # which needs no other scale here
    scores.copy_(hadamard_scores_reference(m, norm, one if scale is None else scale))


def _down_reference(r: Tensor, m: Tensor, index: Tensor) -> None:
    r.copy_(hadamard_down_reference(m, index))


def _write_back_reference(
    w: Tensor,
    index: Tensor,
    u: Tensor,
    alpha: float,
    beta: float,
    random: bool,
    key: int,
    offset: int,
    start: int,
    width: int,
    pitch: int,
) -> None:
    word = PartKey(key, Place(start, width, pitch)) if random else None
    hadamard_write_back_reference_(w, index, u, alpha=alpha, beta=beta, key=word, offset=offset)


def _keyed_reference(w: Tensor, index: Tensor, u: Tensor, alpha: Tensor, beta: Tensor, *_: object) -> None:
    hadamard_write_back_reference_(w, index, u, alpha=alpha.item(), beta=beta.item())
