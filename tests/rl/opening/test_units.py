"""Free units: what the old task does is condensed, and the new task has a fresh network to itself."""

from __future__ import annotations

import math

import numpy as np
import pytest
import scipy.linalg
import torch
from torch import nn

from nsrl.rl.opening.block import OFF
from nsrl.rl.opening.condensing import ActorLayers, condense, spanning_units
from nsrl.rl.opening.switch import Switch
from nsrl.rl.opening.units import HEAD_GAIN, free_units
from nsrl.rl.policies.actor_critic import policy_outputs
from tests.rl.opening.builders import ACTIVATIONS, measured, policy_of, states
from tests.tolerances import relative


@pytest.mark.parametrize("activation", ACTIVATIONS)
@pytest.mark.parametrize("widths", [[48], [48, 40], [40, 32, 40]])
def test_the_old_task_pays_no_more_than_the_cost_and_the_new_one_starts_fresh(
    activation: type[nn.Module], widths: list[int]
) -> None:
    policy = policy_of(activation, widths)
    old, new = states(policy, 0.0), states(policy, 1.0, seed=1)
    divergence = measured(policy, old)
    freed = free_units(policy, old, new, divergence, 1e-3, seed=0)
    assert freed is not None and 0 < freed.units < sum(widths)
    assert divergence() <= 1e-3
    with torch.no_grad():
        logits = policy_outputs(policy, new)
    # as a fresh SB3 policy's: orthonormal rows of HEAD_GAIN on units of size 1, their mean taken away
    assert float(logits.std(0).max()) <= HEAD_GAIN * max(widths) ** 0.5
    assert float((logits.softmax(1) - 1.0 / logits.shape[1]).abs().max()) < 0.1


def test_the_weights_out_of_fresh_units_are_free_but_for_what_the_bias_makes_up_for() -> None:
    policy = policy_of()
    old, new = states(policy, 0.0), states(policy, 1.0, seed=1)
    assert free_units(policy, old, new, measured(policy, old), 1e-3, seed=0)
    head, hidden = policy.action_net, policy.mlp_extractor.policy_net
    with torch.no_grad():
        idle, before, here = hidden(old), policy_outputs(policy, old), policy_outputs(policy, new)
        fresh = (idle.std(0) < 1e-5).nonzero().flatten()  # they say a constant
        assert 2 <= len(fresh) < idle.shape[1]
        way = torch.randn(len(head.weight), len(fresh), generator=torch.Generator().manual_seed(0))
        head.weight[:, fresh] += way
        head.bias -= way @ idle[0, fresh]
        size = float(before.abs().max()) + float(way.abs().sum(1).max())
        # the constants are off by the tail of tanh at 8, 2.3e-7, beside rounding
        atol = relative(torch.float32, terms=64) * size + 5e-7 * float(way.abs().sum(1).max())
        assert float((policy_outputs(policy, old) - before).abs().max()) <= atol
        assert float((policy_outputs(policy, new) - here).abs().max()) > 100.0 * atol


def test_the_weights_into_fresh_units_are_in_the_null_space_of_the_buffer() -> None:
    policy = policy_of()
    old, new = states(policy, 0.0), states(policy, 1.0, seed=1)
    weight = policy.mlp_extractor.policy_net[0].weight.detach().clone()
    assert free_units(policy, old, new, measured(policy, old), 1e-3, seed=0)
    first = policy.mlp_extractor.policy_net[0]
    fresh = ((first.weight[:, :-1] != weight[:, :-1]).any(1)).nonzero().flatten()
    rows = torch.func.jacrev(
        lambda w: torch.func.functional_call(policy.mlp_extractor.policy_net, {"0.weight": w}, (old,)).sum(0)
    )(first.weight.detach())
    moved = torch.func.jacrev(
        lambda w: torch.func.functional_call(policy.mlp_extractor.policy_net, {"0.weight": w}, (new,)).sum(0)
    )(first.weight.detach())
    # tanh' at 8 is 4.5e-7: nothing moves on the old task, and much does on the new one
    assert float(rows[:, fresh].detach().abs().max()) < 1e-4 * float(moved[:, fresh].detach().abs().max())


@pytest.mark.parametrize("activation", ACTIVATIONS)
@pytest.mark.parametrize("widths", [[48], [48, 40], [40, 32, 40]])
def test_the_new_task_goes_on_with_a_copy_of_the_old_one(activation: type[nn.Module], widths: list[int]) -> None:
    """The outputs under the new flag are those that the kept units have under the old one, and may all be moved."""
    policy = policy_of(activation, widths)
    with torch.no_grad():
        policy.mlp_extractor.policy_net[0].weight[:, -1] = 0.0
    old, new = states(policy, 0.0), states(policy, 1.0, seed=1)
    alike = new.clone()
    alike[:, -1] = 0.0
    block = free_units(policy, old, new, measured(policy, old), math.inf, seed=0, go_on=True)
    assert block is not None and not block.heard
    with torch.no_grad():
        wanted, found = policy_outputs(policy, alike), policy_outputs(policy, new)
    # a unit that is off says the same below -OFF to within its spread there; what it feeds is a sum over layers
    idle = activation()(torch.linspace(-10.0 * OFF, -OFF, 1000, dtype=torch.float64))
    weights = max(float(layer.weight.detach().abs().sum(1).max()) for layer in block.layers.linears)
    bound = 4.0 * float(idle.max() - idle.min()) * weights ** len(widths)
    bound += 64.0 * relative(torch.float32) * float(wanted.abs().max() + 1.0) * weights
    assert float((found - wanted).abs().max()) <= bound
    # of the copy everything may move: each weight of the kept units has one that is free
    masks = dict(block.masks(policy, old))
    for number, layer in enumerate(block.layers.linears[:-1]):
        kept = layer.out_features - len(block.free[number])
        assert int((masks[layer.bias] > 0.0).sum()) == len(block.free[number]) - 1 >= kept


def test_a_copy_makes_of_the_context_what_its_original_does() -> None:
    """As of an agent that is fine-tuned on the new task again: what it does under the flag is another thing."""
    policy = policy_of(widths=[96, 96])
    old, new = states(policy, 0.0), states(policy, 1.0, seed=1)
    with torch.no_grad():
        policy.mlp_extractor.policy_net[0].weight[:, -1] *= 3.0
        before = policy_outputs(policy, new)
        alike = old.clone()
        alike[:, -1] = 1.0
        assert float((policy_outputs(policy, alike) - policy_outputs(policy, old)).abs().max()) > 2.0
    both = torch.cat([old, new])
    block = free_units(policy, old, new, measured(policy, both), 1e-3, seed=0, go_on=True, used=both)
    assert block is not None and not block.heard
    after = torch.distributions.Categorical(logits=policy_outputs(policy, new).double())
    kl = torch.distributions.kl_divergence(torch.distributions.Categorical(logits=before.double()), after)
    assert float(kl.mean()) <= 2e-3  # the mean over both tasks' states, of which these are one half


def test_with_too_few_units_for_a_copy_the_new_task_hears_what_the_old_ones_say(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr("nsrl.rl.opening.units.KEPT", (0.6,))
    monkeypatch.setattr("nsrl.rl.opening.units.COPIED", 0.6)
    policy = policy_of()
    old, new = states(policy, 0.0), states(policy, 1.0, seed=1)
    with torch.no_grad():
        before = policy_outputs(policy, new).argmax(1)
    block = free_units(policy, old, new, measured(policy, old), 1e-3, seed=0, go_on=True)
    assert block is not None and block.heard
    with torch.no_grad():
        after = policy_outputs(policy, new).argmax(1)
    # the old task alone was to be kept: beyond it, condensing is off by a little
    assert float((before == after).double().mean()) > 0.75


@pytest.mark.parametrize("spoil", ["no switch", "flicker", "no units", "cost"])
def test_where_it_cannot_be_done_nothing_is_changed(spoil: str) -> None:
    policy = policy_of(widths=[2, 2] if spoil == "no units" else None)
    old, new = states(policy, 0.0), states(policy, 1.0, seed=1)
    if spoil == "no switch":
        new[:, -1] = 0.0
    if spoil == "flicker":
        new[::2, -1] = 0.5
    kept = {name: value.clone() for name, value in policy.state_dict().items()}
    cost = 0.0 if spoil == "cost" else 1e-3
    divergence = (lambda: 1.0) if spoil == "cost" else measured(policy, old)
    assert free_units(policy, old, new, divergence, cost, seed=0) is None
    assert all(torch.equal(value, kept[name]) for name, value in policy.state_dict().items())


@pytest.mark.parametrize("unit", [1e-3, 1.0, 1e3])
def test_the_unit_of_the_inputs_does_not_matter(unit: float) -> None:
    """A fresh unit sees inputs in units of their spread."""
    found = []
    for scale in (1.0, unit):
        policy = policy_of()
        old, new = states(policy, 0.0), states(policy, 1.0, seed=1)
        with torch.no_grad():
            policy.mlp_extractor.policy_net[0].weight[:, 0] /= scale
        old[:, 0] *= scale
        new[:, 0] *= scale
        free_units(policy, old, new, measured(policy, old), 1e-3, seed=0)
        with torch.no_grad():
            found.append(policy_outputs(policy, new).double())
    # logits of size 0.1 from sums of some 50 float32 terms of size up to the switch's 10
    torch.testing.assert_close(found[0], found[1], rtol=0.0, atol=relative(torch.float32, terms=64) * 100.0)


def test_spanning_units_are_scipys_pivots() -> None:
    generator = np.random.default_rng(0)
    values = generator.normal(size=(60, 5)) @ generator.normal(size=(5, 12)) + 0.1 * generator.normal(size=(60, 12))
    importance = generator.uniform(0.5, 2.0, size=12)
    centred = (values - values.mean(0)) * importance
    _, _, pivots = scipy.linalg.qr(centred, pivoting=True, mode="economic")
    chosen = spanning_units(torch.as_tensor(values), torch.as_tensor(importance), 7)
    assert chosen.tolist() == sorted(pivots[:7].tolist())


def test_a_layer_whose_units_repeat_is_condensed_exactly() -> None:
    policy = policy_of(widths=[16])
    layers = ActorLayers.of(policy)
    assert layers is not None
    with torch.no_grad():
        layers.linears[0].weight[4:] = layers.linears[0].weight[:4].repeat(3, 1)
        layers.linears[0].bias[4:] = layers.linears[0].bias[:4].repeat(3)
    old = states(policy, 0.0).double()
    before = layers.outputs(old)
    kept = condense(layers, old, 0.25)
    assert [len(rows) for rows in kept] == [4]
    # weights are rounded to float32 on the way back
    atol = relative(torch.float32, terms=64) * float(before.detach().abs().max())
    torch.testing.assert_close(layers.outputs(old), before, rtol=0.0, atol=atol)


def test_the_switch_is_0_on_the_old_task_and_1_on_the_new_one() -> None:
    before = torch.tensor([[0.3, 1.0, 0.0], [0.1, 1.0, 0.0]])
    after = torch.tensor([[0.2, 0.0, 2.0], [0.4, 0.0, 2.0]])
    switch = Switch.between(before, after)
    assert switch is not None and switch.columns.tolist() == [1, 2] and switch.flicker < 1e-12
    for features, value in ((before, 0.0), (after, 1.0)):
        said = features[:, switch.columns].double() @ switch.weights - switch.offset
        torch.testing.assert_close(said, torch.full((2,), value, dtype=torch.float64), rtol=0.0, atol=1e-12)
    assert Switch.between(before, before) is None


def test_one_seed_draws_one_network_and_global_generators_stay() -> None:
    drawn = []
    for seed in (1, 1, 2):
        policy = policy_of()
        old, new = states(policy, 0.0), states(policy, 1.0, seed=1)
        state = torch.get_rng_state()
        free_units(policy, old, new, measured(policy, old), 1e-3, seed)
        assert torch.equal(torch.get_rng_state(), state)
        drawn.append(policy.action_net.weight.detach().clone())
    assert torch.equal(drawn[0], drawn[1]) and not torch.equal(drawn[0], drawn[2])
