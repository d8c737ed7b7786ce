"""Intruder dimensions and update sparsity, of matrices of which both are known."""

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from slimstate.optim import intruder_dimensions, update_sparsity

SIGNS = torch.tensor([[1, 1, 1, 1], [1, -1, 1, -1], [1, 1, -1, -1]], dtype=torch.float64)


@given(st.integers(12, 20), st.integers(12, 20), st.integers(0, 3), st.integers(0, 2**16))
def test_new_directions_above_all_others_are_intruders_and_new_lengths_are_not(m, n, new, seed):
    generator = torch.Generator().manual_seed(seed)
    side = min(m, n)
    left, right = (torch.linalg.qr(torch.randn(size, side, generator=generator).double()).Q for size in (m, n))
    lengths = 2.0 ** -torch.arange(side).double()
    before = left * lengths @ right.mT
    mixed = left[:, :4] @ SIGNS[:new].mT / 2  # of cosine 1/2 with four old directions each
    turned = torch.cat([mixed, torch.linalg.qr(torch.cat([mixed, left], 1)).Q[:, new:side]], 1)
    lengths[:new] = 100 + 50 * torch.arange(new)
    after = turned * lengths * (1 + 0.2 * torch.rand(side, generator=generator)) @ right.mT
    assert intruder_dimensions({"w": before}, {"w": after}, top=max(1, new), epsilon=0.6) == {"w": new}


def test_a_module_is_compared_by_its_matrices():
    before = torch.nn.Sequential(torch.nn.Conv2d(3, 8, 3), torch.nn.Linear(8, 5))
    after = torch.nn.Sequential(torch.nn.Conv2d(3, 8, 3), torch.nn.Linear(8, 5))
    after.load_state_dict(before.state_dict())
    assert intruder_dimensions(before, after) == {"0.weight": 0, "1.weight": 0}
    assert intruder_dimensions(before.to(torch.bfloat16), after.to(torch.bfloat16).state_dict()) == {
        "0.weight": 0,
        "1.weight": 0,
    }


@given(st.integers(1, 40), st.integers(0, 40), st.sampled_from([torch.float32, torch.bfloat16, torch.float16]))
def test_unchanged_weights_are_counted(size, changed, dtype):
    changed = min(changed, size)
    before = {"a": torch.ones(size, dtype=dtype), "b": torch.ones(3, dtype=dtype)}
    after = {"a": before["a"].clone(), "b": before["b"].clone()}
    after["a"][:changed] += 0.5
    found = update_sparsity(before, after)
    assert found.each == {"a": (size - changed) / size, "b": 1.0}
    assert found.total == (size - changed + 3) / (size + 3)


def test_changes_within_the_tolerance_are_none():
    before, after = {"w": torch.zeros(4)}, {"w": torch.tensor([0.0, 9e-6, 2e-5, -1.0])}
    assert update_sparsity(before, after).total == 0.5
    assert update_sparsity(before, after, tolerance=0).total == 0.25
    assert update_sparsity(before, {"w": torch.full((4,), torch.nan)}).total == 0


def test_a_learning_rate_below_the_spacing_of_bfloat16_changes_nothing():
    net = torch.nn.Linear(8, 8).to(torch.bfloat16)
    before = {name: p.detach().clone() for name, p in net.named_parameters()}
    optimizer = torch.optim.AdamW(net.parameters(), lr=1e-9, weight_decay=0)
    net(torch.ones(1, 8, dtype=torch.bfloat16)).sum().backward()
    optimizer.step()
    assert update_sparsity(before, net, tolerance=0).total == 1


@pytest.mark.parametrize("compare", [intruder_dimensions, update_sparsity])
def test_what_does_not_belong_together_is_refused(compare):
    w = torch.ones(4, 4)
    with pytest.raises(ValueError, match="'b' is only in `after`"):
        compare({"a": w}, {"a": w, "b": w})
    with pytest.raises(ValueError, match=r"'a' has shape \(4, 4\) before and \(4, 3\) after"):
        compare({"a": w}, {"a": w[:, :3]})


def test_values_out_of_range_are_refused():
    w = {"w": torch.ones(4, 4)}
    for name, value in (("top", 0), ("top", 2.5), ("epsilon", 0), ("epsilon", 1.5)):
        with pytest.raises(ValueError, match=f"{name} must be .*, got {value}"):
            intruder_dimensions(w, w, **{name: value})
    with pytest.raises(ValueError, match="tolerance must be a number >= 0, got -1"):
        update_sparsity(w, w, tolerance=-1)
    with pytest.raises(ValueError, match=r"'w' is torch\.float32 before and torch\.bfloat16 after"):
        update_sparsity(w, {"w": w["w"].bfloat16()})
    with pytest.raises(ValueError, match="there are no weights to compare"):
        update_sparsity({}, {})
