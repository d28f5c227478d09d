"""Inputs that never moved on the buffer: their columns change, what the policy does there does not."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch
from stable_baselines3.common.policies import ActorCriticPolicy, BasePolicy
from torch import Tensor, nn

from nsrl.rl.opening.columns import redraw_columns
from nsrl.rl.policies.actor_critic import policy_outputs
from tests.rl.builders import generators_left_alone
from tests.rl.policy_builders import build_policy, draw_observations
from tests.tolerances import relative

NAME = "mlp_extractor.policy_net.0"


def states(policy: ActorCriticPolicy, context: list[float], count: int = 9, seed: int = 0) -> Tensor:
    """Two entries that vary, and two that are a one-hot context."""
    generator = torch.Generator().manual_seed(seed)
    return torch.cat([torch.rand(count, 2, generator=generator), torch.tensor(context).expand(count, 2)], 1)


def rounding(policy: ActorCriticPolicy, layer: nn.Linear, features: Tensor, dtype: torch.dtype) -> float:
    """What rounding can make of outputs when a layer's bias takes over what its columns said.

    A pre-activation is a sum of the size S = |W| |x| + |b|; off by `relative` of it, it moves the outputs by no more
    than the layers behind it stretch it, and tanh, ReLU and SiLU stretch by 1.1 at most.
    """
    size = float((features.double().abs() @ layer.weight.double().abs().T + layer.bias.double().abs()).max())
    for later in [*policy.mlp_extractor.policy_net[1:], policy.action_net]:
        if isinstance(later, nn.Linear):
            size *= 1.1 * float(later.weight.double().abs().sum(1).max())
    return relative(dtype, terms=64) * size


def features_of(policy: ActorCriticPolicy, observations: Any) -> Tensor:
    return BasePolicy.extract_features(policy, observations, policy.pi_features_extractor)


@pytest.mark.parametrize("network", ["tanh", "relu", "silu"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_outputs_on_the_buffer_stay_when_both_entries_of_a_one_hot_context_toggle(
    network: str, dtype: torch.dtype
) -> None:
    policy = build_policy(network=network)
    policy.features_extractor.forward = lambda x: torch.flatten(x, 1).to(dtype)
    policy.to(dtype)
    old, new = states(policy, [1.0, 0.0]), states(policy, [0.0, 1.0], seed=1)
    weights = {name: value.clone() for name, value in policy.state_dict().items()}
    with torch.no_grad():
        before, changed = policy_outputs(policy, old), policy_outputs(policy, new)
        largest = rounding(policy, policy.mlp_extractor.policy_net[0], features_of(policy, old), dtype)
        assert redraw_columns(policy, old, new, seed=0) == 2
        largest += rounding(policy, policy.mlp_extractor.policy_net[0], features_of(policy, old), dtype)
        assert float((policy_outputs(policy, old) - before).abs().max()) <= largest
        assert float((policy_outputs(policy, new) - changed).abs().max()) > 1e-2
    moved = {name for name, value in policy.state_dict().items() if not torch.equal(value, weights[name])}
    assert moved == {f"{NAME}.weight", f"{NAME}.bias"}
    columns = (policy.state_dict()[f"{NAME}.weight"] != weights[f"{NAME}.weight"]).any(0)
    assert columns.tolist() == [False, False, True, True]


def test_dict_observations() -> None:
    policy = build_policy(network="dict")
    old, new = draw_observations(policy, 8), draw_observations(policy, 8)
    old["b"], new["b"] = torch.full((8,), 0), torch.full((8,), 2)
    layer = policy.mlp_extractor.policy_net[0]
    with torch.no_grad():
        before = policy_outputs(policy, old)
        largest = rounding(policy, layer, features_of(policy, old), torch.float64)
        assert redraw_columns(policy, old, new, seed=0) == 2  # the old one-hot entry and the new one
        largest += rounding(policy, layer, features_of(policy, old), torch.float64)
        assert float((policy_outputs(policy, old) - before).abs().max()) <= largest


@pytest.mark.parametrize("actions", ["discrete", "box", "multi_discrete", "multi_binary"])
def test_the_new_task_is_told_as_loudly_in_any_unit(actions: str) -> None:
    """What a context is measured in, does not matter to what the first layer is told."""
    told = []
    for unit in (1.0, 1000.0, 2.0**-10):
        policy = build_policy(actions)
        old, new = states(policy, [0.0, 0.0]), states(policy, [0.0, unit])
        layer = policy.mlp_extractor.policy_net[0]
        assert redraw_columns(policy, old, new, seed=3) == 1
        with torch.no_grad():
            told.append(layer(new.double()) - layer(old.double()))
    assert float(told[0].abs().min()) > 0.0  # every unit hears of it
    for other in told[1:]:
        torch.testing.assert_close(other, told[0], rtol=1e-6, atol=1e-9)  # the change is measured in float32


def test_the_seed_decides_and_global_generators_stay() -> None:
    drawn = []
    for seed in (1, 1, 2):
        policy = build_policy()
        old, new = states(policy, [1.0, 0.0]), states(policy, [0.0, 1.0])
        generators = torch.get_rng_state(), np.random.get_state()[1].tolist()
        redraw_columns(policy, old, new, seed)
        assert torch.equal(torch.get_rng_state(), generators[0]) and np.random.get_state()[1].tolist() == generators[1]
        drawn.append(policy.state_dict()[f"{NAME}.weight"])
    assert torch.equal(drawn[0], drawn[1]) and not torch.equal(drawn[0], drawn[2])


def unlike(change: Callable[[Tensor, Tensor], None]) -> tuple[ActorCriticPolicy, Tensor, Tensor]:
    policy = build_policy()
    old, new = states(policy, [1.0, 0.0]), states(policy, [0.0, 1.0])
    change(old, new)
    return policy, old, new


def varies_before(old: Tensor, new: Tensor) -> None:
    old[0, 2:] = torch.tensor([0.5, 0.5])


def same_after(old: Tensor, new: Tensor) -> None:
    new[:, 2:] = old[:, 2:]


@pytest.mark.parametrize("change", [varies_before, same_after])
def test_inputs_that_varied_before_or_do_not_change_keep_their_columns(change: Any) -> None:
    policy, old, new = unlike(change)
    before = policy.state_dict()[f"{NAME}.weight"].clone()
    assert redraw_columns(policy, old, new, seed=0) == 0
    assert torch.equal(policy.state_dict()[f"{NAME}.weight"], before)


def frozen(policy: ActorCriticPolicy) -> None:
    policy.mlp_extractor.policy_net[0].weight.requires_grad_(False)


def frozen_bias(policy: ActorCriticPolicy) -> None:
    policy.mlp_extractor.policy_net[0].bias.requires_grad_(False)


def scaled_features(policy: ActorCriticPolicy) -> None:
    plain = policy.mlp_extractor.forward_actor
    policy.mlp_extractor.forward_actor = lambda features: plain(2.0 * features)


def shortcut(policy: ActorCriticPolicy) -> None:
    plain = policy.mlp_extractor.forward_actor
    policy.mlp_extractor.forward_actor = lambda features: plain(features) + features.sum(1, keepdim=True)


class Doubled(nn.Sequential):
    def forward(self, x: Tensor) -> Tensor:
        return super().forward(2.0 * x)


def replaced_network(policy: ActorCriticPolicy) -> None:
    policy.mlp_extractor.policy_net = Doubled(*policy.mlp_extractor.policy_net)


@pytest.mark.parametrize("change", [frozen, frozen_bias, scaled_features, shortcut, replaced_network])
def test_a_network_of_another_make_is_left_alone(change: Callable[[ActorCriticPolicy], None]) -> None:
    policy = build_policy()
    change(policy)
    old, new = states(policy, [1.0, 0.0]), states(policy, [0.0, 1.0])
    before = {name: value.clone() for name, value in policy.state_dict().items()}
    assert redraw_columns(policy, old, new, seed=0) == 0
    assert all(torch.equal(value, before[name]) for name, value in policy.state_dict().items())


def test_features_that_are_learnt_and_a_policy_without_hidden_layers_are_left_alone() -> None:
    for network in ("shared cnn", "linear"):
        policy = build_policy(network=network)
        with generators_left_alone():
            old = draw_observations(policy, 4)
        new = old.clone()
        old[:, ..., 0], new[:, ..., 0] = 0, 1
        before = {name: value.clone() for name, value in policy.state_dict().items()}
        assert redraw_columns(policy, old, new, seed=0) == 0
        assert all(torch.equal(value, before[name]) for name, value in policy.state_dict().items())
