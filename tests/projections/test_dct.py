import importlib
import json
from pathlib import Path

import numpy as np
import pytest
import scipy.fft
import torch
from hypothesis import given
from hypothesis import strategies as st

from slimstate.projections import DCT, matrix_view

FOLDER = Path(__file__).parent.parent / "golden"
CASES = sorted(path.stem for path in FOLDER.glob("dct_*.npz") if "_ef_" not in path.stem)


@pytest.mark.parametrize("method", ["matmul", "fft"])
@pytest.mark.parametrize("kind", [2, 3])
@given(d=st.one_of(st.integers(1, 70), st.sampled_from([251, 256, 257])), k=st.integers(1, 5))
def test_equals_scipy(kind, method, d, k):
    m = torch.randn(d, k, dtype=torch.float64)
    expected = torch.from_numpy(scipy.fft.dct(m.numpy(), type=kind, axis=0, norm="ortho"))
    torch.testing.assert_close(DCT(kind=kind, method=method).transform(m), expected, atol=1e-13, rtol=1e-12)


def test_columns_are_frequencies():
    q = DCT().matrix(16, torch.float64)
    crossings = (q[1:] * q[:-1] < 0).sum(0)
    assert torch.equal(crossings, torch.arange(16))
    assert torch.equal(DCT(kind=3).matrix(16, torch.float64), q.mT)


@pytest.mark.parametrize("d", [64, 1000, 1024])
def test_is_orthonormal_to_the_rounding_of_its_dtype(d):
    for dtype, tolerance in ((torch.float32, 1e-6), (torch.float64, 1e-13)):
        q = DCT().matrix(d, dtype).double()
        assert (q.mT @ q - torch.eye(d)).abs().max() < tolerance


@pytest.mark.parametrize("d", [511, 512])
def test_both_methods_choose_the_same(d):
    m = torch.randn(d, 300) * torch.logspace(0, -2, 300)
    choices = [DCT(rank=40, method=method).fit(m, None, ()) for method in ("matmul", "fft", "auto")]
    assert torch.equal(choices[0], choices[1])
    assert torch.equal(choices[0], choices[2])


@pytest.mark.parametrize("kind", [2, 3])
def test_rows_are_the_same_bits_without_the_matrix(kind, monkeypatch):
    index = torch.tensor([0, 1, 17, 32], dtype=torch.int32)
    projection = DCT(kind=kind, method="fft")
    rows = projection._rows(index, 33, torch.float32)
    monkeypatch.setattr(importlib.import_module("slimstate.projections.dct"), "LARGEST_MATRIX", 0)
    assert torch.equal(projection._rows(index, 33, torch.float32), rows)


def test_the_matrix_is_shared_and_usable_after_inference_mode():
    with torch.inference_mode():
        first = DCT().matrix(37)
    assert not first.is_inference()
    assert DCT(rank=3, norm=2).matrix(37).data_ptr() == first.data_ptr()
    assert DCT().matrix(37, torch.float64).dtype == torch.float64


def test_a_smooth_gradient_needs_few_frequencies():
    m = torch.cumsum(torch.cumsum(torch.randn(64, 40), 0), 0)
    projection = DCT(rank=8)
    r = projection.down(m, projection.fit(m, None, ()))
    assert r.square().sum() > 0.99 * m.square().sum()


def test_the_golden_cases_are_here():
    assert len(CASES) == 9


@pytest.mark.parametrize("case", CASES)
@pytest.mark.parametrize("method", ["matmul", "fft"])
def test_chooses_what_the_reference_chooses(case, method):
    arrays = np.load(FOLDER / f"{case}.npz")
    meta = json.loads(str(arrays["meta"]))
    hp, g = meta["hp"], torch.from_numpy(arrays["G_0"])
    q = torch.from_numpy(arrays["Q"])
    settings = dict(kind=2 if "makhoul" in case else 3, norm=2 if "_l2_" in case else 1)
    projection = DCT(rank=hp["rank"], side=hp["side"], method=method, **settings)
    torch.testing.assert_close(projection.matrix(len(q)), q, atol=1e-5, rtol=0)
    chosen = np.sort(arrays["indices"], axis=1)
    steps = hp["refresh_steps"]
    assert len(steps) == len(chosen)
    view = matrix_view((*g.shape[1:],), hp["side"])
    for step, expected in zip(steps, chosen, strict=True):
        assert projection.fit(view.open(g[step - 1]), None, ()).tolist() == expected.tolist(), step


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"kind": 4}, "kind must be 2 or 3, got 4"),
        ({"method": "fast"}, "method must be auto, matmul or fft, got 'fast'"),
    ],
)
def test_refuses_settings_out_of_range(settings, message):
    with pytest.raises(ValueError, match=message):
        DCT(**settings)
