"""The discrete cosine transform as a basis. DCT-AdamW, https://arxiv.org/abs/2505.17967"""

import math
from collections.abc import Callable
from dataclasses import dataclass
from functools import wraps
from typing import Literal

import torch
from torch import Tensor

from ._dictionary import FixedDictionary

__all__ = ["DCT"]

SMALLEST_FFT = 512  # from this size on the FFT is faster than the product with all rows
SMALLEST_FFT_RANK = 256  # and from this rank on than the product with the chosen ones
LARGEST_MATRIX = 2048  # 16 MiB in float32: above, the FFT's users look the chosen rows up instead


@dataclass(frozen=True, kw_only=True)
class DCT(FixedDictionary):
    r"""Q = the orthonormal cosines, a column a frequency; kept are the r frequencies that hold most of the gradient.

    .. math::
        Q_{ij} = c_j \cos \frac{\pi (2i+1) j}{2d}, \qquad c_0 = \sqrt{1/d}, \quad c_j = \sqrt{2/d},

    so that :math:`Q^\top M` is the orthonormal DCT-II of M along d. Phases are reduced in integers and their cosines
    taken in float64: Q is orthonormal to the rounding of its dtype at every size.

    All d coefficients, which the selection needs, cost 2d flop a weight as a product, and O(log d) by a real FFT of the
    sequence :math:`(x_0, x_2, x_4, \dots, x_5, x_3, x_1)` (Makhoul, "A fast cosine transform in one and two
    dimensions", 1980): with its first half spectrum :math:`V_j`,

    .. math:: y_j = c_j e^{-i \pi j / 2d} V_j, \qquad S_j = \mathrm{Re}\, y_j, \quad S_{d-j} = -\mathrm{Im}\, y_j .

    The matrix is shared by all parameters of one size, dtype and device and never saved; above a size of 2048 the FFT
    makes do without, and the chosen columns are looked up among 4d values of the cosine, to the same bits. R and the
    write-back are products with the r chosen columns; where the FFT is used and r is at least 256 they are transforms
    too, except into weights of low precision.

    Args:
        rank: r, see `Projection`.
        side: the axis that is compressed.
        seed: not used, nothing is random.
        norm: 1 (default, as DCT-AdamW's code) or 2, what the frequencies are ranked by.
        kind: 2 (default), the DCT-II above, DCT-AdamW's `makhoul`; 3 takes :math:`Q^\top` for Q, whose coefficients are
            the DCT-III and whose columns are no cosines: what DCT-AdamW's `matmul` does, and its default.
        method: how all coefficients are computed: `matmul`, `fft`, or `auto` (default), the FFT from a size of 512 on,
            where it is measured to be faster on a CPU. They agree to rounding.

    Raises:
        ValueError: for a rank, side, norm, kind or method out of range.

    Example:
        >>> m = torch.cos(torch.pi / 4 * (torch.arange(4.0) + 0.5) * 2)[:, None] * torch.ones(4, 5)
        >>> DCT(rank=1).fit(m, None, ())
        tensor([2], dtype=torch.int32)
    """

    kind: Literal[2, 3] = 2
    method: Literal["auto", "matmul", "fft"] = "auto"

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.kind not in (2, 3):
            raise ValueError(f"kind must be 2 or 3, got {self.kind!r}")
        if self.method not in ("auto", "matmul", "fft"):
            raise ValueError(f"method must be auto, matmul or fft, got {self.method!r}")

    def matrix(self, d: int, dtype: torch.dtype = torch.float32, device: torch.device | str = "cpu") -> Tensor:
        """Q (d x d), shared: not to be written to."""
        cosines = _cosines(d, dtype, torch.device(device))  # DCT-II analysis, frequencies along its rows
        return cosines.mT if self.kind == 2 else cosines

    def _by_fft(self, d: int) -> bool:
        return d >= SMALLEST_FFT if self.method == "auto" else self.method == "fft"

    def _transform(self, x: Tensor) -> Tensor:
        if self._by_fft(x.shape[0]):
            return _dct2(x) if self.kind == 2 else _dct3(x)
        return self.matrix(x.shape[0], x.dtype, x.device).mT @ x

    def _inverse(self, x: Tensor) -> Tensor:
        if self._by_fft(x.shape[0]):
            return _dct3(x) if self.kind == 2 else _dct2(x)
        return self.matrix(x.shape[0], x.dtype, x.device) @ x

    def _by_transform(self, rank: int, d: int) -> bool:
        return rank >= SMALLEST_FFT_RANK and self._by_fft(d)

    def _rows(self, index: Tensor, d: int, dtype: torch.dtype) -> Tensor:
        if d > LARGEST_MATRIX and self._by_fft(d):
            return _analysis_rows(index, d, dtype, self.kind)
        return self.matrix(d, dtype, index.device).mT.index_select(0, index)


_SHARED: dict[tuple[object, ...], Tensor] = {}


def _shared(make: Callable[[int, torch.dtype, torch.device], Tensor]) -> Callable[..., Tensor]:
    """Makes each tensor once. A dict, which compiled code takes tensors from, as it does not from functools.cache."""

    @wraps(make)
    def find(d: int, dtype: torch.dtype, device: torch.device) -> Tensor:
        key = (make.__name__, d, dtype, device)
        if key not in _SHARED:
            _SHARED[key] = make(d, dtype, device)
        return _SHARED[key]

    return find


def _analysis_rows(index: Tensor, d: int, dtype: torch.dtype, kind: int) -> Tensor:
    """The rows `index` of Q^T (r x d), looked up among the 4d values of the cosine."""
    every, chosen = torch.arange(d, device=index.device), index.long()
    frequencies, places = (chosen[:, None], every) if kind == 2 else (every, chosen[:, None])
    phases = (frequencies * (2 * places + 1)).remainder_(4 * d)
    rows = _cosine_table(d, dtype, index.device)[phases]
    constant = math.sqrt(1 / d)
    if kind == 2:
        return rows.masked_fill_(frequencies == 0, constant)
    rows[:, 0] = constant
    return rows


def _dct2(x: Tensor) -> Tensor:
    """The orthonormal DCT-II of the columns (d x c)."""
    d, half = x.shape[0], (x.shape[0] + 1) // 2
    v = x.new_empty(x.shape[1], d)  # sequences in rows, where the FFT is fastest
    v[:, :half] = x[::2].mT
    v[:, half:] = x[1::2].flip(0).mT
    y = torch.fft.rfft(v).mul_(_twiddle(d, x.dtype, x.device))
    edge = y.shape[1]
    v[:, :edge] = y.real
    v[:, edge:] = y.imag[:, 1 : d - edge + 1].flip(1).neg_()
    return v.mT


def _dct3(x: Tensor) -> Tensor:
    """The orthonormal DCT-III of the columns (d x c), the inverse of `_dct2` step by step."""
    d, half = x.shape[0], (x.shape[0] + 1) // 2
    edge = d // 2 + 1
    y = torch.zeros(x.shape[1], edge, dtype=_complex(x.dtype), device=x.device)
    y.real.copy_(x[:edge].mT)
    y.imag[:, 1:] = x[d - edge + 1 :].flip(0).neg_().mT
    v = torch.fft.irfft(y.div_(_twiddle(d, x.dtype, x.device)), n=d)
    out = torch.empty_like(v)
    out[:, ::2] = v[:, :half]
    out[:, 1::2] = v[:, half:].flip(1)
    return out.mT


def _complex(dtype: torch.dtype) -> torch.dtype:
    return torch.complex128 if dtype == torch.float64 else torch.complex64


@_shared
def _cosines(d: int, dtype: torch.dtype, device: torch.device) -> Tensor:
    """The matrix of the DCT-II (d x d), frequencies along its rows."""
    with torch.inference_mode(False):
        matrix = torch.empty(d, d, dtype=dtype, device=device)
        step = max(1, (1 << 19) // d)
        for start in range(0, d, step):
            index = torch.arange(start, min(start + step, d), device=device)
            matrix[start : start + step] = _analysis_rows(index, d, dtype, kind=2)
        return matrix


@_shared
def _cosine_table(d: int, dtype: torch.dtype, device: torch.device) -> Tensor:
    """sqrt(2/d) cos(pi i / 2d) for i = 0 ... 4d - 1."""
    with torch.inference_mode(False):
        phases = torch.arange(4 * d, dtype=torch.float64) * (math.pi / (2 * d))
        return (phases.cos() * math.sqrt(2 / d)).to(device, dtype)


@_shared
def _twiddle(d: int, dtype: torch.dtype, device: torch.device) -> Tensor:
    """c_j exp(-i pi j / 2d) for j = 0 ... d // 2."""
    with torch.inference_mode(False):
        phases = torch.arange(d // 2 + 1, dtype=torch.float64) * (-math.pi / (2 * d))
        twiddle = torch.polar(torch.full_like(phases, math.sqrt(2 / d)), phases)
        twiddle[0] = math.sqrt(1 / d)
        return twiddle.to(device, _complex(dtype))
