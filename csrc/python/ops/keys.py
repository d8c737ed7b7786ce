# SPDX-License-Identifier: Apache-2.0
"""What random bits go by: a key for each tensor and step, and where its elements lie in another one."""

from typing import NamedTuple

from torch import Tensor

__all__ = ["WHOLE", "Key", "PartKey", "Place", "counter_key"]


class Place(NamedTuple):
    """Where the elements of a part lie in the whole tensor: rows of `width` elements, `pitch` apart, from `start` on.

    Its i-th element is number ``start + (i // width) * pitch + i % width`` of the whole. The default is the whole.
    """

    start: int = 0
    width: int = (1 << 63) - 1
    pitch: int = 0


WHOLE = Place()


class PartKey(NamedTuple):
    """A key for a part of a tensor, which is rounded as in the whole one.

    Args:
        word: the whole tensor's key.
        place: where the part lies.
    """

    word: int | Tensor
    place: Place


Key = int | Tensor | PartKey
"""What random bits go by: an int64, in compiled code as a 0-d tensor; and where the tensor lies in another one."""


def counter_key(seed: int, *words: int) -> int:
    r"""Mixes a seed and any number of words (stream, step, tag) into one key for the counter-based ops.

    Each word :math:`w` advances the state by :math:`s \leftarrow \mathrm{mix}(s + \gamma) \oplus w`, with the mixer and
    the odd constant :math:`\gamma` of SplitMix64 (Steele, Lea and Flood, "Fast Splittable Pseudorandom Number
    Generators", 2014); a last mix follows. Order and number of the words count.

    Args:
        seed: any integer; its low 64 bits are used.
        *words: likewise.

    Returns:
        An integer in [-2**63, 2**63), which fits an int64 tensor and an op's ``int``.

    Example:
        >>> counter_key(0, 3, 100) == counter_key(0, 3, 100)
        True
        >>> counter_key(0, 3, 100) == counter_key(0, 100, 3)
        False
    """
    state = seed
    for word in words:
        state = _splitmix64(state) ^ word
    state = _splitmix64(state)
    return state - ((state >> 63) << 64)


def _splitmix64(state: int) -> int:
    mask = (1 << 64) - 1
    z = (state + 0x9E3779B97F4A7C15) & mask
    z = ((z ^ (z >> 30)) * 0xBF58476D1CE4E5B9) & mask
    z = ((z ^ (z >> 27)) * 0x94D049BB133111EB) & mask
    return z ^ (z >> 31)
