"""Bases that follow the gradient: its leading singular vectors, exact or tracked by power iteration."""

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

from slimstate.ops import counter_key

from ._base import DenseProjection, compute_dtype
from ._blocks import blocks, largest_magnitude

__all__ = ["SVD", "PowerIteration"]

SMALLEST_ITERATED = 256  # below this side eigh is too cheap to be worth avoiding


@dataclass(frozen=True, kw_only=True)
class SVD(DenseProjection):
    r"""Q = the r leading left singular vectors of M. GaLore, https://arxiv.org/abs/2403.03507

    They are the leading eigenvectors of the smaller Gram matrix,

    .. math:: M M^\top = Q \Sigma^2 Q^\top \quad (d \le k), \qquad M^\top M = V \Sigma^2 V^\top,\ Q = \mathrm{qr}(M V).

    found by block iteration where that is as accurate as a full eigendecomposition (on most gradients), else by the
    latter. Singular values below about :math:`10^{-3.5}` of the largest cannot be told apart in float32; they hold less
    than :math:`10^{-7}` of the energy. Each column's sign is such that its entry of largest magnitude is positive.

    A fit holds the Gram matrix (the smaller side squared) for a while; `PowerIteration` holds nothing of that size.
    """

    def fit(self, m: Tensor, old: Tensor | None, counter: tuple[int, ...]) -> Tensor:
        """The leading singular vectors (d x r); neither `old` nor `counter` matters."""
        rank = self.rank_of(*m.shape)
        if m.shape[0] <= m.shape[1]:
            q = _leading_eigenvectors(_gram(m, largest_magnitude(m).item()), rank)
        else:
            v = _leading_eigenvectors(_gram(m.mT, largest_magnitude(m).item()), rank)
            q = torch.linalg.qr(_product(m, v)).Q
        return fix_signs(q)

    def sketch(
        self,
        m: Tensor,
        rank: int,
        largest: float,
        old: Tensor | None,
        counter: tuple[int, ...],
        sum_: Callable[[Tensor], None],
    ) -> Tensor:
        """The Gram matrix (d x d) of these columns."""
        return _gram(m, largest)

    def solve(self, sketch: Tensor, rank: int) -> Tensor:
        """The leading eigenvectors of the Gram matrix."""
        return fix_signs(_leading_eigenvectors(sketch, rank))


@dataclass(frozen=True, kw_only=True)
class PowerIteration(DenseProjection):
    r"""Q tracks the leading left singular vectors by one block power sweep a refresh, started from the last basis:

    .. math:: Q \leftarrow \mathrm{qr}\bigl(M (M^\top Q_\text{old})\bigr).

    A sweep costs 1 to 3 % of a full decomposition and, started warm, captures nearly the same energy; the first fit
    starts from a seeded Gaussian block and makes three sweeps. The rule is LDAdam's, https://arxiv.org/abs/2410.16103
    """

    def fit(self, m: Tensor, old: Tensor | None, counter: tuple[int, ...]) -> Tensor:
        """One warm sweep from `old` (d x r), or three from a Gaussian block numbered by `counter`."""
        if old is not None:
            return fix_signs(_sweep(m, old))
        rank = self.rank_of(*m.shape)
        q = gaussian(m.shape[0], rank, counter_key(self.seed, *counter)).to(m.device, compute_dtype(m.dtype))
        for _ in range(3):
            q = _sweep(m, q)
        return fix_signs(q)

    def sketch(
        self,
        m: Tensor,
        rank: int,
        largest: float,
        old: Tensor | None,
        counter: tuple[int, ...],
        sum_: Callable[[Tensor], None],
    ) -> Tensor:
        """M (M^T Q) of these columns (d x r), in units of the largest entry of M; earlier sweeps are summed at once."""
        q, sweeps = old, 1
        if q is None:
            q, sweeps = gaussian(m.shape[0], rank, counter_key(self.seed, *counter)).to(m.device), 3
        q = q.to(compute_dtype(m.dtype))
        for i in range(sweeps):
            y = _product(m, _product(m.mT, q) / largest)
            if i < sweeps - 1:
                sum_(y)
                q = torch.linalg.qr(y).Q
        return y

    def solve(self, sketch: Tensor, rank: int) -> Tensor:
        """An orthonormal basis of the sum."""
        return fix_signs(torch.linalg.qr(sketch).Q)


def gaussian(rows: int, columns: int, key: int) -> Tensor:
    """Standard normal numbers (float32, on the CPU): the same for a key on every device and rank."""
    generator = torch.Generator().manual_seed(key)
    return torch.randn(rows, columns, generator=generator, dtype=torch.float32)


def fix_signs(q: Tensor) -> Tensor:
    """Flips columns so that the entry of largest magnitude of each is positive; contiguous and owning its memory."""
    top = q.abs().argmax(dim=0, keepdim=True)
    return torch.where(q.gather(0, top) < 0, -q, q).contiguous()


def _sweep(m: Tensor, q: Tensor) -> Tensor:
    """qr(M M^T Q). M^T Q is brought to unit size, so that a tiny or huge gradient neither vanishes nor overflows."""
    z = _product(m.mT, q)
    z /= largest_magnitude(z).clamp_min(torch.finfo(z.dtype).tiny)
    return torch.linalg.qr(_product(m, z)).Q


def _product(m: Tensor, x: Tensor) -> Tensor:
    """M X in X's dtype, widening M in blocks of rows."""
    if m.dtype == x.dtype:
        return m @ x
    out = x.new_empty(m.shape[0], x.shape[1])
    for s in blocks(m, 0, x.itemsize):
        out[s] = m[s].to(x.dtype) @ x
    return out


def _gram(m: Tensor, largest: float) -> Tensor:
    """M M^T (d x d), scaled where squares might vanish or overflow, which leaves the eigenvectors as they are."""
    dtype = compute_dtype(m.dtype)
    if m.dtype == dtype and 1e-9 < largest < 1e9:
        return m @ m.mT
    scale = 1 / largest
    gram = torch.zeros(m.shape[0], m.shape[0], dtype=dtype, device=m.device)
    for s in blocks(m, 1, dtype.itemsize):
        block = m[:, s].to(dtype) * scale
        gram.addmm_(block, block.mT)
    return gram


def _leading_eigenvectors(gram: Tensor, rank: int) -> Tensor:
    """Those of the `rank` largest eigenvalues, largest first."""
    width = rank + max(8, rank // 8)
    if gram.shape[0] >= SMALLEST_ITERATED and 3 * width <= gram.shape[0]:
        vectors = _by_subspace_iteration(gram, rank, width)
        if vectors is not None:
            return vectors
    return torch.linalg.eigh(gram).eigenvectors[:, -rank:].flip(-1)


def _by_subspace_iteration(gram: Tensor, rank: int, width: int) -> Tensor | None:
    """The same by block iteration with Rayleigh-Ritz, if within two sweeps it is as accurate as eigh; else None.

    Gradients of trained networks have spectra that fall so fast that one sweep is enough, at a fifth of eigh's cost.
    Accepted is a largest residual |A v - theta v| of a few units of rounding of |A|, which is what eigh leaves too.
    """
    tolerance = 16 * torch.finfo(gram.dtype).eps
    y = gram @ gaussian(gram.shape[0], width, key=0).to(gram)
    for _ in range(2):
        q = torch.linalg.qr(y).Q
        z = gram @ q
        theta, s = torch.linalg.eigh(q.mT @ z)
        vectors, y = q @ s, z @ s  # Ritz vectors V, and A V, from which the next sweep starts
        residual = torch.linalg.vector_norm(y - theta * vectors, dim=0)[-rank:].max() / theta[-1]
        if residual <= tolerance:
            return vectors[:, -rank:].flip(-1)
        if residual > 100 * tolerance:
            return None  # a flat spectrum: further sweeps gain too little
    return None
