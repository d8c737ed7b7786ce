"""What holds for every op of the namespace, by the samples that slimstate.ops has of them."""

from typing import Any

import pytest
import torch
from torch import Tensor

import slimstate.optim  # noqa: F401  registers the last of them
from slimstate import ops
from slimstate.ops._samples import Sample, all_samples

SAMPLES = list(all_samples("cpu"))
ONE_OF_EACH = list({sample.op: sample for sample in reversed(SAMPLES)}.values())  # the first


def registered() -> set[str]:
    names = torch._C._dispatch_get_all_op_names()
    return {name.split("::")[1] for name in names if name.startswith("slimstate::")}


def has_kernel(name: str, key: str) -> bool:
    return torch._C._dispatch_has_kernel_for_dispatch_key(f"slimstate::{name}", key)


def nodes() -> dict[str, tuple[Any, ...]]:
    """Arguments of ops that are Python functions of other folders, each one node of a compiled graph."""
    w, a, b = torch.randn(5, 3), torch.randn(5, 2), torch.randn(2, 3)
    number = torch.tensor(0.9, dtype=torch.float64)
    tensors = [[torch.rand(4, 3), torch.rand(7)] for _ in range(4)]
    directions = [[torch.rand(4, 3), torch.rand(7)] for _ in range(3)]
    return {
        "addmm_": (w, a, b, number, number),
        "adam_directions_keyed_": (*directions, [], [number + 2] * 2, [], [], number, number, 1e-8, False),
        "adamw_": (*tensors, [torch.tensor(3.0)] * 2, torch.tensor(1e-3), number, number, 1e-8, 0.01, False),
    }


def check(name: str, arguments: tuple[Any, ...]) -> None:
    torch.library.opcheck(getattr(torch.ops.slimstate, name).default, arguments)


def test_every_op_has_a_sample():
    sampled = {sample.op for sample in SAMPLES} | set(nodes())
    assert sampled >= registered()
    assert not ops.COMPILED or sampled == registered()


def test_every_compiled_op_has_a_kernel_for_every_device():
    compiled = [name for name in registered() if has_kernel(name, "CPU") or has_kernel(name, "CUDA")]
    assert bool(compiled) == ops.COMPILED
    assert all(has_kernel(name, device.upper()) for name in compiled for device in ops.DEVICES)


@pytest.mark.parametrize("sample", SAMPLES, ids=str)
def test_agrees_with_its_reference(sample):
    if sample.op not in registered():
        pytest.skip("no op is registered where nothing was compiled")
    assert sample.agrees()


@pytest.mark.parametrize("sample", ONE_OF_EACH, ids=str)
def test_opcheck(sample):
    if sample.op not in registered():
        pytest.skip("no op is registered where nothing was compiled")
    check(sample.op, sample.arguments)


@pytest.mark.slow
@pytest.mark.parametrize("sample", [x for x in SAMPLES if not any(x is one for one in ONE_OF_EACH)], ids=str)
def test_opcheck_of_the_others(sample):
    if any(isinstance(x, Tensor) and x.numel() == 0 and x.ndim > 1 for x in sample.arguments):
        pytest.skip("torch's check of schemas cannot copy every empty tensor")
    test_opcheck(sample)


@pytest.mark.parametrize("name", nodes())
def test_opcheck_of_nodes(name):
    check(name, nodes()[name])


@pytest.mark.gpu
def test_on_a_gpu():
    for sample in all_samples("cuda"):
        assert sample.agrees(), sample
        check(sample.op, sample.arguments)


@pytest.mark.parametrize(
    ("change", "tolerance", "agrees"),
    [(0, 0, True), (1e-6, 0, False), (1e-6, 1e-5, True), (1e-4, 1e-5, False), (float("nan"), 1e-5, False)],
)
def test_a_sample_sees_a_difference(change, tolerance, agrees):
    def reference(x):
        x.fill_(1)

    class Namespace:
        @staticmethod
        def fill_(x):
            x.fill_(1)[-1] += change

    assert Sample("fill_", "", (torch.zeros(5),), reference, tolerance).agrees(Namespace) == agrees
