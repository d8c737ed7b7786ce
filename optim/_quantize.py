"""Rows of numbers as 8-bit or 4-bit codes, for what is corrected again by what comes next: errors, not moments."""

import torch
from torch import Tensor

from slimstate.ops import Key, stochastic_round_

__all__ = ["LEVELS", "codes_shape", "decode", "encode"]

LEVELS = {"8bit": 127, "4bit": 7}

# Half precision counts in ones from 1024 to 2048, so that what rounds to it at random rounds to integers there.
INTEGERS = 1024.0


def codes_shape(n: int, bits: str) -> tuple[int, torch.dtype]:
    """Length and dtype of the codes of a row of n numbers."""
    return (n, torch.int8) if bits == "8bit" else ((n + 1) // 2, torch.uint8)


def encode(x: Tensor, bits: str, key: Key, offset: int = 0) -> tuple[Tensor, Tensor]:
    r"""Codes of the rows x, and the largest magnitude a of each row; with L = 127 or 7

    .. math:: c_i = \mathrm{round}(L x_i / a) \in [-L, L], \qquad \hat x_i = \frac{c_i}{L} a .

    Rounding is up or down at random, by `key` and the index of the element, with expectation x: what lies below half a
    step would otherwise be lost again at every step; -x rounds to minus what x rounds to. The largest magnitude, zeros
    and rows of one magnitude are exact, everything else is off by less than a step a/L.

    Args:
        x: (rows, n), float32 or float64, finite.
        bits: `8bit`, or `4bit`, two codes a byte: the first half of a row in the low bits, the second in the high ones.
        key: see `slimstate.ops.stochastic_round_`.
        offset: index of the first element within the whole tensor.

    Returns:
        (rows, n) int8 or (rows, (n + 1) // 2) uint8, and (rows,) in x's dtype.
    """
    levels = LEVELS[bits]
    largest = x.abs().amax(1)
    ratio = x / largest.masked_fill(largest == 0, 1)[:, None]
    halves = torch.empty(x.shape, dtype=torch.float16, device=x.device)
    stochastic_round_(halves, ratio.abs().mul_(levels).add_(INTEGERS).to(torch.float32), key, offset)
    codes = halves.sub_(INTEGERS).copysign_(ratio).to(torch.int8)
    if bits == "8bit":
        return codes, largest
    half = (x.shape[1] + 1) // 2
    packed = codes[:, :half] & 15
    packed[:, : x.shape[1] - half] |= codes[:, half:] << 4
    return packed.view(torch.uint8), largest


def decode(codes: Tensor, largest: Tensor, n: int, bits: str) -> Tensor:
    """The rows (rows, n) of `encode`, in the dtype of `largest`."""
    if bits == "4bit":
        x = largest.new_empty(len(codes), n)
        half, signed = codes.shape[1], codes.view(torch.int8)
        x[:, :half] = (signed << 4) >> 4  # shifts of signed integers keep the sign
        x[:, half:] = signed[:, : n - half] >> 4
    else:
        x = codes.to(largest.dtype)
    return x.div_(LEVELS[bits]).mul_(largest[:, None])
