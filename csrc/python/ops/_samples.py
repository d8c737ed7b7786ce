# SPDX-License-Identifier: Apache-2.0
"""What shows that a kernel computes what its reference does.

Each module of ops has a function ``samples(device)``, which yields a :class:`Sample` for every op and kind of input.
This one list serves ``python -m slimstate.ops``, the tests of all ops at once (``torch.library.opcheck``, sanitizers)
and those of the CUDA kernels where no GPU is at hand. An op without a sample fails a test.
"""

import pkgutil
from collections.abc import Callable, Iterator
from copy import deepcopy
from importlib import import_module
from typing import Any, NamedTuple

import torch
from torch import Tensor

__all__ = ["Sample", "all_samples"]


class Sample(NamedTuple):
    """One call of an op.

    Args:
        op: its name in ``torch.ops.slimstate``.
        what: what is particular about this call, for people.
        arguments: in the schema's order. They are copied before each use, with their strides and alignment.
        reference: the same computation in PyTorch, called with the same arguments.
        tolerance: 0 where the bits must be the same, as element-wise kernels reach them. For results of sums the error
            that is allowed, as a share of the largest magnitude in the tensor.
    """

    op: str
    what: str
    arguments: tuple[Any, ...]
    reference: Callable[..., Any]
    tolerance: float = 0.0

    def __str__(self) -> str:
        return f"{self.op} {self.what}".strip()

    def agrees(self, namespace: Any = torch.ops.slimstate) -> bool:
        """Whether the op and its reference return and write the same."""
        mine, theirs = deepcopy(self.arguments), deepcopy(self.arguments)
        results = [getattr(namespace, self.op)(*mine), mine]
        expected = [self.reference(*theirs), theirs]
        pairs = zip(_tensors(results), _tensors(expected), strict=True)
        return all(_same(a, b, self.tolerance) for a, b in pairs)


def all_samples(device: str) -> Iterator[Sample]:
    """The samples of all modules of this package."""
    package = __package__ or ""
    for module in pkgutil.iter_modules(import_module(package).__path__):
        if not module.name.startswith("_"):
            samples = getattr(import_module(f"{package}.{module.name}"), "samples", None)
            yield from samples(device) if samples is not None else ()


def _tensors(values: Any) -> list[Tensor]:
    if isinstance(values, Tensor):
        return [values]
    return [tensor for value in values for tensor in _tensors(value)] if isinstance(values, (list, tuple)) else []


def _same(result: Tensor, expected: Tensor, tolerance: float) -> bool:
    if result.shape != expected.shape or result.dtype != expected.dtype:
        return False
    if tolerance == 0 or not result.is_floating_point():
        return torch.equal(*(x.flatten().contiguous().view(torch.uint8) for x in (result, expected)))
    finite = expected.double().nan_to_num(0, 0, 0).abs()
    largest = finite.max().item() if finite.numel() else 0.0
    return torch.allclose(result.double(), expected.double(), rtol=0, atol=tolerance * largest, equal_nan=True)
