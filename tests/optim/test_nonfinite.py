"""Gradients that are not finite: taken as torch takes them, skipped or refused, by `nonfinite`."""

import copy
import math

import pytest
import torch

from cases import assert_equal, backward, build, contract, every, few, model, train, weights
from slimstate.optim import AdamW, GaLoreAdamW

BAD = [math.nan, math.inf, -math.inf]


def spoil(net, value, i=3):
    backward(net, i)
    list(net.parameters())[4].grad[0, 0] = value


@contract("gradients that are not finite: propagated, skipped and counted, or refused by name")
@every
@pytest.mark.parametrize("value", BAD)
def test_a_step_with_a_gradient_that_is_not_finite_is_skipped_and_counted(name, value):
    net, same = model(), model()
    optimizer, reference = build(name, net.parameters(), nonfinite="skip"), build(name, same.parameters())
    train(net, optimizer, 0, 2)
    train(same, reference, 0, 2)
    spoil(net, value)
    before = weights(net), copy.deepcopy(optimizer.state_dict()["state"])
    optimizer.step()
    assert_equal((weights(net), optimizer.state_dict()["state"]), before)
    assert optimizer.param_groups[0]["nonfinite_steps"] == 1
    train(net, optimizer, 2, 4)
    train(same, reference, 2, 4)
    assert_equal(weights(net), weights(same))
    copied = copy.deepcopy(net)
    resumed = build(name, copied.parameters(), nonfinite="skip")
    resumed.load_state_dict(optimizer.state_dict())
    assert resumed.param_groups[0]["nonfinite_steps"] == 1


@contract("gradients that are not finite: propagated, skipped and counted, or refused by name")
@every
def test_a_gradient_that_is_not_finite_raises_before_anything_is_changed(name):
    net = model()
    optimizer = build(name, net.named_parameters(), nonfinite="raise")
    train(net, optimizer, 0, 2)
    spoil(net, math.nan)
    before = weights(net), copy.deepcopy(optimizer.state_dict()["state"])
    with pytest.raises(FloatingPointError, match=r"1 parameters are not finite, such as that of 3\.weight"):
        optimizer.step()
    assert_equal((weights(net), optimizer.state_dict()["state"]), before)
    assert optimizer.param_groups[0]["nonfinite_steps"] == 1


@contract("gradients that are not finite: propagated, skipped and counted, or refused by name")
@few
def test_by_default_it_goes_where_torch_would_let_it_go(name):
    """Into the weights that it belongs to, and into no basis."""
    net = model()
    optimizer = build(name, net.parameters())
    train(net, optimizer, 0, 2)
    spoil(net, math.nan)
    optimizer.step()
    bad = [not p.isfinite().all() for p in net.parameters()]
    assert bad == [False] * 4 + ["sign" not in name and "FRUGAL" not in name] + [False] * 3 or bad[4]
    for state in optimizer.state.values():
        assert state.get("basis", torch.zeros(1)).isfinite().all()


def test_the_policy_of_a_group_stops_the_step_of_all():
    net = model()
    groups = [{"params": net[3:].parameters(), "nonfinite": "skip"}, {"params": net[:3].parameters()}]
    optimizer = AdamW(groups)
    before = weights(net)
    spoil(net, math.nan)
    optimizer.step()
    assert_equal(weights(net), before)
    assert [group["nonfinite_steps"] for group in optimizer.param_groups] == [1, 0]
    assert not optimizer.state


def test_the_largest_finite_gradients_are_finite():
    p = torch.nn.Parameter(torch.ones(4, 6, dtype=torch.float16))
    optimizer = GaLoreAdamW([p], rank=2, nonfinite="raise")
    p.grad = torch.full_like(p, 65504.0)
    optimizer.step()
    assert p.isfinite().all()


def test_unknown_policies_are_refused():
    with pytest.raises(ValueError, match="nonfinite must be one of propagate, skip, raise, got 'ignore'"):
        AdamW([torch.nn.Parameter(torch.ones(2))], nonfinite="ignore")
