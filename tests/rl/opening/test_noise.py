"""gSDE on a part of the units: the old spread is there, and the new task has one of its own that the old never sees."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import scipy.optimize
import torch
from gymnasium import spaces
from stable_baselines3.common.policies import ActorCriticPolicy
from torch import Tensor, nn

from nsrl.rl.opening.condensing import ActorLayers
from nsrl.rl.opening.noise import HiddenNoise, fit_variances
from nsrl.rl.opening.units import free_units
from nsrl.rl.policies.actor_critic import policy_outputs
from tests.rl.builders import generators_left_alone

COST = 2e-3
KINDS = [{}, {"full_std": False}, {"use_expln": True}]


def policy_of(activation: type[nn.Module] = nn.Tanh, widths: tuple[int, ...] = (48, 40), **kind: Any) -> Any:
    with generators_left_alone():
        torch.manual_seed(0)
        policy = ActorCriticPolicy(
            spaces.Box(-9.0, 9.0, (4,)),
            spaces.Box(-2.0, 2.0, (2,)),
            lambda _: 1e-3,
            net_arch=list(widths),
            activation_fn=activation,
            use_sde=True,
            log_std_init=-3.0,
            **kind,
        )
        with torch.no_grad():
            policy.action_net.weight.mul_(30.0)
            policy.log_std.add_(0.5 * torch.randn(policy.log_std.shape))
        return policy


def states(context: float, count: int = 400, seed: int = 0) -> Tensor:
    drawn = torch.randn(count, 4, generator=torch.Generator().manual_seed(seed))
    drawn[:, -1] = context
    return drawn


def normal(policy: Any, inputs: Tensor) -> torch.distributions.Normal:
    """What SB3 itself acts by."""
    with torch.no_grad():
        drawn = policy.get_distribution(inputs).distribution
    return torch.distributions.Normal(drawn.mean.double(), drawn.stddev.double())


def test_variances_are_stock_sb3s() -> None:
    for kind in KINDS:
        policy = policy_of(**kind)
        layers, noise = ActorLayers.of(policy), HiddenNoise.of(policy)
        assert layers is not None and noise is not None
        ours = noise.variances(layers.hidden(states(0.0).double())).detach()
        theirs = normal(policy, states(0.0)).stddev.square()
        # SB3 adds 1e-6 under the root, and goes through float32: 48 terms
        torch.testing.assert_close(ours.expand_as(theirs) + 1e-6, theirs, rtol=1e-5, atol=0.0)


@pytest.mark.parametrize("kind", KINDS, ids=["full", "one", "expln"])
@pytest.mark.parametrize("activation", [nn.Tanh, nn.ReLU, nn.SiLU])
@pytest.mark.parametrize("widths", [(48,), (48, 40)])
def test_the_old_distribution_stays_and_the_new_one_is_wide(
    kind: dict[str, Any], activation: type[nn.Module], widths: tuple[int, ...]
) -> None:
    policy = policy_of(activation, widths, **kind)
    old, new = states(0.0), states(1.0, seed=1)
    reference = normal(policy, old)

    def divergence() -> float:
        return float(torch.distributions.kl_divergence(reference, normal(policy, old)).sum(1).mean())

    assert free_units(policy, old, new, divergence, COST, seed=0) is not None
    assert 0.0 < divergence() <= COST
    wide = 0.3 * 2.0
    share = normal(policy, new).stddev / wide
    # the goal is the mean variance over the states, of which a fresh network has some
    assert float(share.square().mean()) == pytest.approx(1.0, rel=0.1) or float(share.min()) > 1.0
    assert float(normal(policy, new).mean.abs().max()) < 1.0  # a fresh policy's, where the old one's went to the bounds


@pytest.mark.parametrize("activation", [nn.Tanh, nn.ReLU])
def test_the_new_spread_is_in_the_null_space(activation: type[nn.Module]) -> None:
    """What the new task makes of its spread the old one never sees."""
    policy = policy_of(activation)
    old, new = states(0.0), states(1.0, seed=1)
    reference = normal(policy, old)

    def divergence() -> float:
        return float(torch.distributions.kl_divergence(reference, normal(policy, old)).sum(1).mean())

    assert free_units(policy, old, new, divergence, COST, seed=0) is not None
    with torch.no_grad():
        hidden = policy.mlp_extractor.policy_net(old)
        own = hidden.abs().amax(0) < 1e-5
        before, here = divergence(), normal(policy, new).stddev
        policy.log_std[own] += 1.0
    # their activations are of float32's making there, and squared
    assert 2 < int(own.sum()) < len(own) and abs(divergence() - before) < 1e-8
    assert float((normal(policy, new).stddev / here).min()) > 1.5


def test_what_costs_too_much_leaves_everything() -> None:
    policy = policy_of()
    kept = {name: value.clone() for name, value in policy.state_dict().items()}
    assert free_units(policy, states(0.0), states(1.0, seed=1), lambda: 1.0, COST, seed=0) is None
    assert all(torch.equal(value, kept[name]) for name, value in policy.state_dict().items())


def test_the_fit_is_scipys() -> None:
    generator = np.random.default_rng(0)
    for _ in range(5):
        columns = generator.uniform(0.0, 1.0, size=(80, 6)) ** 2
        columns[:, 4] = 0.0
        wanted = columns @ generator.uniform(0.0, 1.0, size=6) * generator.uniform(0.8, 1.25, size=80)
        best, error = scipy.optimize.nnls(columns / wanted[:, None], np.ones(80))
        ours = fit_variances(torch.as_tensor(columns), torch.as_tensor(wanted))
        reached = float(((torch.as_tensor(columns) @ ours / torch.as_tensor(wanted)) - 1.0).norm())
        # 2,000 multiplicative updates of a problem this small are at the optimum to four digits
        assert float(ours.min()) >= 0.0 and float(ours[4]) == best[4] == 0.0
        assert reached == pytest.approx(error, rel=1e-4)


def test_a_policy_without_gsde_has_none() -> None:
    policy = ActorCriticPolicy(spaces.Box(-1.0, 1.0, (3,)), spaces.Box(-1.0, 1.0, (2,)), lambda _: 1e-3)
    assert HiddenNoise.of(policy) is None
    assert policy_outputs(policy, torch.zeros(1, 3)).shape == (1, 2)
