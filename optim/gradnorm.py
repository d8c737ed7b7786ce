"""GradNormLoRP. Huang et al., 2024. https://arxiv.org/abs/2412.19616"""

from collections.abc import Iterator
from typing import ClassVar

import torch
from torch import Tensor

from slimstate.projections import Projection
from slimstate.projections._base import compute_dtype, rewrite_
from slimstate.projections._bases import add_product_, project_
from slimstate.projections._blocks import blocks
from slimstate.projections._rounding import Rounding, widen

from ._adam import adam_directions, rounding
from ._base import Entry, Group, Spec
from ._projected import Arranged, Matrix
from ._sharding import total_
from .galore import GaLoreAdamW

__all__ = ["GradNormLoRP"]

SHORTEST = 1e-12  # the norm of a row; below it, it has no direction
LENGTH_MOMENTS = ("lengths_avg", "lengths_avg_sq")
NORMS, PRODUCTS = "norms", "products"  # |W_i| and <G_i, W_i> in this step, where they are sums over processes


class GradNormLoRP(GaLoreAdamW):
    r"""Adam on the directions of weight rows, in a low-rank subspace, and on their lengths.

    Row i of a matrix is seen as :math:`W_i = g_i v_i` with a length and a direction, :math:`\|v_i\| = 1`. What the
    gradient G says of them is, by the chain rule,

    .. math::
        \partial g_i = \langle G_i, v_i \rangle, \qquad
        \partial v_i = g_i \left( G_i - \langle G_i, v_i \rangle v_i \right).

    Every `update_proj_gap` steps the basis Q (d x r) is fitted to :math:`\partial V`, and the moments are carried over.
    In each step, with :math:`\partial V` seen so that its compressed axis d comes first, and Adam of `betas` and `eps`,

    .. math::
        R &= Q^\top \partial V, \qquad U = \mathrm{Adam}(R), \qquad u = \mathrm{Adam}(\partial g) \\
        v_i &\leftarrow \frac{v_i - \eta\,\alpha\,(Q U)_i}{\|v_i - \eta\,\alpha\,(Q U)_i\|}, \qquad
        g_i \leftarrow (1-\eta\lambda)\, g_i - \eta\, u_i, \qquad W_i \leftarrow g_i v_i.

    A length may go through zero and change its sign. Rows are those of dim 0, the output features of a linear layer and
    the output channels of a convolution. A row shorter than 1e-12 has no direction: it takes GaLore's step,
    :math:`W_i \leftarrow W_i - \eta\,\alpha\,(Q U)_i` with :math:`\partial v_i = G_i`, until it is longer.

    State of an m x n matrix: 2 max(m,n) r + min(m,n) r + 3 m elements (moments, basis; lengths and their moments),
    where AdamW keeps 2 m n; directions are read off the weight. Only when a basis is fitted is :math:`\partial V` of
    that one matrix held whole. What is not projected (vectors, groups without a rank) gets AdamW. Which matrices are
    projected is said as in `GaLoreAdamW`.

    The weight is the truth: a row's length is its norm, with the sign that the state keeps; of a bfloat16 or float16
    weight it is the state's float32 length, as long as rounding explains the difference. So weights can be loaded,
    merged or clipped between steps.

    Of parameters that are divided over processes, a step sends nothing where rows are divided and columns compressed;
    where the compressed axis is divided, R, in one message. Where columns are divided, rows are summed in two messages
    for all matrices of a group: 2 m numbers each before the step, and their m new norms, for which Q U is computed
    twice.

    Where this differs from the published code, which leaves out the projection onto the tangent, forgets the lengths at
    every step and keeps a copy of the weight, is on this optimizer's page.

    Args:
        params: parameters, named parameters, or groups, as in `GaLoreAdamW`.
        lr: learning rate :math:`\eta`: of directions relative to their unit norm, a row turns by an angle of about
            :math:`\eta\,\alpha\sqrt r` in a step whatever its length (:math:`\eta\,\alpha\sqrt{rn/m}` where the rows of
            m x n are compressed); of lengths, and of what is not projected, as in Adam. Default 1e-3, as in
            torch.optim.AdamW; the authors' script pretrains with 0.01.
        betas: decay rates of the moments. Default (0.9, 0.999), as in torch.optim.AdamW and the published code.
        eps: :math:`\epsilon`. Default 1e-8, as in torch.optim.AdamW; the published code has 1e-6.
        weight_decay: decoupled weight decay :math:`\lambda`, of lengths alone: a direction has nothing to decay.
            Default 0.01, as in torch.optim.AdamW; the published code has 0.
        rank: r as a count (int >= 1) or as a share of d (float in (0, 1]); clamped to the smaller side; None: dense.
            Default 0.25, as in `GaLoreAdamW`; the authors fine-tune with 4 and 8.
        update_proj_gap: steps between two refreshes of a matrix, staggered over the group's matrices. Default 200, as
            in GaLore and the published code; the authors' script pretrains with 250.
        scale: :math:`\alpha`, the step of directions relative to `lr`. Default 0.25, the authors' for pretraining; for
            fine-tuning they take 4.
        projection: `svd`, `power` or `random`, or an object of `slimstate.projections`, as in `GaLoreAdamW`.
        side: `auto`, `left`, `right` or `reverse`, as in `GaLoreAdamW`; rows are those of dim 0 on either side.
        batch_dims: how many leading axes of a parameter count matrices (1 for stacked experts).
        transport: `rotate` (default), `keep` or `reset`, as in `GaLoreAdamW`; the moments of lengths, which are in no
            subspace, stay whatever becomes of the others.
        maximize: ascend instead.
        moment_dtype: of the moments in the subspace: `float32`, `bfloat16` (rounded stochastically) or `param` (the
            parameter's); None means float32, and float64 for float64 parameters, as lengths and their moments always
            are.
        basis_dtype: what bases are kept in: `bfloat16` or `8bit`; None means float32, and float64 for float64
            parameters; as in `GaLoreAdamW`.
        stochastic_rounding: of weights in bfloat16 and float16; None means on.
        compensation: instead, round weights in bfloat16 and float16 to nearest and keep what that takes away: training
            is then that of float32 weights, at 2 bytes a weight more of state.
        nonfinite: what a gradient that is not finite does: `propagate` (default, as torch), `skip` (no parameter takes
            this step) or `raise` (FloatingPointError); the last two wait for the device once a step and count such
            steps in the group, `nonfinite_steps`.
        seed: of random bases and of the rounding.
        torch_keywords: `foreach`, `fused`, `capturable`, `differentiable` and `amsgrad`, where they change nothing.

    Raises:
        ValueError: for a value out of range, an unknown group key, a torch keyword that is not supported, or a rank
            where nothing can be projected.
        NotImplementedError: for galore-torch's `proj_type="full"` and `dim`.

    Example:
        >>> import torch
        >>> model = torch.nn.Linear(16, 8)
        >>> optimizer = GradNormLoRP(model.parameters(), lr=0.01, rank=4)
        >>> _ = optimizer.step(lambda: model(torch.ones(1, 16)).square().sum().backward())
        >>> torch.allclose(optimizer.state[model.weight]["lengths"], model.weight.norm(dim=1))
        True
    """

    axes: ClassVar[dict[str, str]] = GaLoreAdamW.axes | dict.fromkeys(("lengths", *LENGTH_MOMENTS), "m")

    def _spec(self, p: Tensor, group: Group) -> Spec:
        spec = super()._spec(p, group)
        if self._is_projected(p, group):
            view = self._view(p, group)
            for key in ("lengths", *LENGTH_MOMENTS):
                spec[key] = ((*view.lead, view.rows), compute_dtype(p.dtype))
        return spec

    def _refresh_all(self, matrices: list[tuple[Matrix, bool]], group: Group, projection: Projection) -> None:
        """As ProjectedOptimizer's, after what processes with other columns of a row know of it."""
        self._inform([x for x, _ in matrices])
        super()._refresh_all(matrices, group, projection)

    def _inform(self, matrices: list[Matrix]) -> None:
        """Norms of rows, and their products with gradients, that are sums over processes."""
        split = [x for x in matrices if _is_split(x)]
        sums = [_over_columns(x) for x in split]
        _total_(split, sums)
        for x, of in zip(split, sums, strict=True):
            x.state[NORMS], x.state[PRODUCTS] = of[0].sqrt(), of[1]  # in this step's dict alone

    def _arranged(self, group: Group, entries: list[Entry]) -> Arranged:
        """As ProjectedOptimizer's, but rows whose norms are sums over processes are updated together."""
        dense, lists = super()._arranged(group, entries)
        split = [x for some, _ in lists for x in some if _is_split(x)]
        if split:
            lists = [pair for pair in lists if not _is_split(pair[0][0])] + [(split, self._projection(group))]
        return Arranged(dense, lists)

    def _divided(self, matrix: Matrix, group: Group, projection: Projection) -> tuple[list[Matrix], Projection] | None:
        divided = super()._divided(matrix, group, projection)
        # Who has no column of a row keeps its length all the same.
        return ([matrix], projection) if divided is None and _is_split(matrix) else divided

    def _fitted_to(self, matrix: Matrix, group: Group, j: int) -> Tensor:
        """The gradient of the directions of matrix j: the only time that one is held whole."""
        view = matrix.view
        dv = matrix.p.new_empty(view.rows, view.columns, dtype=compute_dtype(matrix.p.dtype))
        for s, block, _ in _reparametrized(matrix, j):
            dv[s] = block
        return dv.mT if view.transposed else dv

    def _reduce(self, matrix: Matrix, group: Group, projection: Projection) -> tuple[Tensor, ...]:
        """R (r x k) and the gradients of the lengths (rows,), or stacks of them."""
        view, basis, lengths = matrix.view, matrix.basis, matrix.state["lengths"]
        r, dg = lengths.new_zeros(*view.lead, basis.shape[-1], view.k), torch.empty_like(lengths)
        for j in range(len(lengths) if view.lead else 1):
            q, r_j, dg_j = matrix.member(basis, j), matrix.member(r, j), matrix.member(dg, j)
            for s, dv, of_lengths in _reparametrized(matrix, j):
                dg_j[s] = of_lengths
                if view.transposed:
                    project_(r_j[:, s], q, dv.mT)
                else:
                    project_(r_j, q[s], dv)
        return r, dg

    def _update(
        self, matrices: list[Matrix], reduced: list[tuple[Tensor, ...]], group: Group, projection: Projection
    ) -> None:
        lr = group["lr"]
        rs, dgs = map(list, zip(*reduced, strict=True))
        us = adam_directions(matrices, rs, group, [x.age for x in matrices])
        dus = adam_directions(matrices, dgs, group, [x.step for x in matrices], LENGTH_MOMENTS)
        norms = _norms_after(matrices, [u.mul_(lr * group["scale"]) for u in us])
        for x, u, du, norm in zip(matrices, us, dus, norms, strict=True):
            radius = _radii(x)
            old = _lengths(x, radius)
            new = (old * (1 - lr * group["weight_decay"])).add_(du.mul_(lr)).masked_fill_(radius == 0, 0)
            _write_back_(x, u, radius, old, new, norm, rounding(x, group))
            x.state["lengths"].copy_(new)


def _weights(matrix: Matrix, j: int) -> Iterator[tuple[slice, Tensor, Tensor]]:
    """Matrix j of the stack in blocks of rows, in the dtype of arithmetic.

    Yields:
        which rows; the rows (rows x columns); and their norms with the signs of their lengths, 0 where a row is too
        short to have a direction.
    """
    view, dtype, low = matrix.view, compute_dtype(matrix.p.dtype), matrix.state.get("compensation")
    weight, rest = view.members(matrix.p)[j], None if low is None else view.members(low)[j]
    lengths, norms = matrix.member(matrix.state["lengths"], j), matrix.state.get(NORMS)
    for s in blocks(weight, 0, dtype.itemsize):
        w = widen(weight[s], None if rest is None else rest[s], dtype, copy=False).flatten(1)
        norm = torch.linalg.vector_norm(w, dim=1) if norms is None else matrix.member(norms, j)[s]
        yield s, w, norm.copysign(lengths[s]).masked_fill_(norm < SHORTEST, 0)


def _reparametrized(matrix: Matrix, j: int) -> Iterator[tuple[slice, Tensor, Tensor]]:
    """Matrix j of the stack in blocks of rows: which, the gradient of their directions, and that of their lengths."""
    gradient, products = matrix.view.members(matrix.grad)[j], matrix.state.get(PRODUCTS)
    for s, w, radius in _weights(matrix, j):
        dw = gradient[s].to(w.dtype).reshape(w.shape)
        divisor = _or_one(radius)
        dg = ((w * dw).sum(1) if products is None else matrix.member(products, j)[s]) / divisor
        dv = (dw * divisor[:, None]).sub_(w * dg[:, None])  # g (G - <G, v> v), as W = g v
        yield s, dv, dg


def _radii(matrix: Matrix) -> Tensor:
    """The norms of all rows, with the signs of their lengths."""
    radius = torch.empty_like(matrix.state["lengths"])
    for j in range(len(radius) if matrix.view.lead else 1):
        for s, _, norms in _weights(matrix, j):
            matrix.member(radius, j)[s] = norms
    return radius


def _is_split(x: Entry) -> bool:
    """Whether processes hold other columns of the same rows."""
    return x.part is not None and x.part.divides("n")


def _over_columns(matrix: Matrix) -> Tensor:
    """|W_i|^2 and <G_i, W_i> over the columns that are here (2 x rows), or (2 x b x rows)."""
    sums = torch.stack([torch.zeros_like(matrix.state["lengths"])] * 2)
    for j, gradient in enumerate(matrix.view.members(matrix.grad)):
        squares, products = (matrix.member(x, j) for x in sums)
        for s, w, _ in _weights(matrix, j):
            squares[s] = w.square().sum(1)
            products[s] = (w * gradient[s].to(w.dtype).reshape(w.shape)).sum(1)
    return sums


@torch.compiler.disable
def _total_(split: list[Matrix], sums: list[Tensor]) -> None:
    """Sums over processes what is a sum over columns."""
    total_([(x, matrix.part.groups("n")) for x, matrix in zip(sums, split, strict=True) if matrix.part])


def _norms_after(matrices: list[Matrix], steps: list[Tensor]) -> list[Tensor | None]:
    """|W_i| |v_i + (Q S)_i| of all rows whose norms are sums over processes; None where `_write_back_` takes them."""
    split = [x for x in matrices if _is_split(x)]
    if not split:
        return [None] * len(matrices)
    norms = [_squares_after(x, step) if _is_split(x) else None for x, step in zip(matrices, steps, strict=True)]
    _total_(split, [x for x in norms if x is not None])
    return [None if x is None else x.sqrt_() for x in norms]


def _squares_after(matrix: Matrix, step: Tensor) -> Tensor:
    """The squares of what `_norms_after` returns over the columns that are here, from a product that is not kept."""
    squares = torch.zeros_like(matrix.state["lengths"])
    for j in range(len(squares) if matrix.view.lead else 1):
        for s, w, radius in _weights(matrix, j):
            moved = w.clone()
            _add_step_(moved, matrix, step, j, s, _or_one(radius)[:, None])
            matrix.member(squares, j)[s] = moved.square_().sum(1)
    return squares


def _add_step_(w: Tensor, matrix: Matrix, step: Tensor, j: int, s: slice, lengths: Tensor) -> None:
    """Adds rows s of Q S, as matrix j is stored and times these lengths, to those of W."""
    basis, u = matrix.member(matrix.basis, j), matrix.member(step, j)
    add_product_(w, basis, u, matrix.view.transposed, s, beta=1.0, alpha=1.0, lengths=lengths)


def _or_one(radius: Tensor) -> Tensor:
    """dW/dv: a row without a direction is its own parameter."""
    return radius.masked_fill(radius == 0, 1)


def _lengths(matrix: Matrix, radius: Tensor) -> Tensor:
    """The lengths before the step: what float32 and float64 weights say, and for lower precision what was left behind,
    unless rounding does not explain the difference."""
    kept, dtype = matrix.state["lengths"], matrix.p.dtype
    if dtype == radius.dtype or "compensation" in matrix.state:
        return radius
    return torch.where((radius - kept).abs() <= torch.finfo(dtype).eps * radius.abs(), kept, radius)


def _write_back_(
    matrix: Matrix,
    step: Tensor,
    radius: Tensor,
    old: Tensor,
    new: Tensor,
    norms: Tensor | None,
    rounding: Rounding,
) -> None:
    """W_i <- g_i (v_i + (Q S)_i) / |v_i + (Q S)_i| in place, and W_i <- W_i + (Q S)_i where W_i has no direction.

    Args:
        matrix: whose weight W is.
        step: S (r x k), or a stack of them.
        radius: the norms of W's rows with the signs of v, 0 where there is no direction.
        old: the lengths before the step.
        new: the lengths g after it.
        norms: see `_norms_after`.
        rounding: how a low-precision weight is read and rounded.
    """
    stretch, gain = _or_one(radius), radius.sign() * new
    turned = step.flatten(-2).any(-1, keepdim=True) if norms is None else norms != radius.abs()
    moved = (new != old) | (turned & (radius != 0))  # what did not keeps its bits

    def edit(w: Tensor, j: int, s: slice) -> None:
        stretched, gained, changed = (matrix.member(x, j)[s, None] for x in (stretch, gain, moved))
        _add_step_(w, matrix, step, j, s, stretched)
        if norms is None:
            norm = torch.linalg.vector_norm(w, dim=1, keepdim=True)
        else:
            norm = matrix.member(norms, j)[s, None]
        w.mul_(torch.where(changed, gained / norm.clamp(min=SHORTEST), 1))

    rewrite_(matrix.p, matrix.view, edit, step.dtype, rounding)
