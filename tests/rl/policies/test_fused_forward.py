"""A step of a roll-out on the short way: the actions, values and log-probabilities of SB3's, bit for bit."""

from __future__ import annotations

import copy
import math
from typing import Any

import numpy as np
import pytest
import torch
from stable_baselines3.common.env_util import make_vec_env
from stable_baselines3.common.policies import ActorCriticPolicy
from torch import nn

from nsrl import NullSpacePPO
from nsrl.rl.policies.fused_forward import FusedForward, fused_forward
from tests.rl.builders import NEW, SMALL, narrow, trained
from tests.rl.oracles import same_policies
from tests.rl.policy_builders import ACTIONS, VECTOR


@pytest.fixture(autouse=True)
def checked(monkeypatch: pytest.MonkeyPatch) -> None:
    """Stock's checks are what is compared with, and some packages turn them off for all."""
    monkeypatch.setattr(torch.distributions.Distribution, "_validate_args", True)


def build(actions: str, **options: Any) -> ActorCriticPolicy:
    torch.manual_seed(0)
    policy = ActorCriticPolicy(VECTOR, ACTIONS[actions], lambda _: 1e-3, **{"net_arch": [6, 5], **options})
    with torch.no_grad():
        for parameter in policy.parameters():
            parameter.add_(0.3 * torch.randn_like(parameter))
    return policy


@pytest.mark.parametrize("count", [1, 8])
@pytest.mark.parametrize(
    "options", [{}, {"activation_fn": nn.ReLU}, {"net_arch": []}, {"share_features_extractor": False}]
)
@pytest.mark.parametrize("actions", ACTIONS)
def test_the_same_bits_from_the_same_generator(actions: str, options: dict[str, Any], count: int) -> None:
    policy = build(actions, **options)
    observations = torch.randn(20, count, 4)
    torch.manual_seed(3)
    with torch.no_grad():
        wanted = [policy(rows) for rows in observations]
    state = torch.get_rng_state()
    torch.manual_seed(3)
    with torch.no_grad(), fused_forward(policy):
        assert isinstance(policy.forward, FusedForward)
        found = [policy(rows) for rows in observations]
    assert torch.equal(torch.get_rng_state(), state)
    for one, other in zip(wanted, found, strict=True):
        for a, b in zip(one, other, strict=True):
            assert a.dtype == b.dtype and torch.equal(a, b)
    assert "forward" not in vars(policy)


def test_hooks_gradients_and_modes_see_what_they_always_do() -> None:
    policy, seen = build("box"), []
    observations = torch.randn(3, 4)
    with fused_forward(policy):
        handle = policy.action_net.register_forward_hook(lambda *_: seen.append(1))
        with torch.no_grad():
            policy(observations)
        handle.remove()
        assert seen == [1]
        assert policy(observations)[1].requires_grad
        with torch.no_grad():
            assert torch.equal(
                policy(observations, deterministic=True)[0], policy.get_distribution(observations).mode()
            )


@pytest.mark.parametrize("actions", ACTIONS)
def test_a_policy_that_is_no_number_is_refused(actions: str) -> None:
    policy = build(actions)
    with torch.no_grad(), fused_forward(policy):
        policy.action_net.bias.fill_(math.nan)
        with pytest.raises(ValueError):
            policy(torch.randn(3, 4))
        if actions == "box":
            policy.action_net.bias.fill_(0.0)
            policy.log_std.fill_(-1e4)
            with pytest.raises(ValueError):
                policy(torch.randn(3, 4))
    assert "forward" not in vars(policy)


@pytest.mark.parametrize("kind", ["discrete", "box", "narrow"])
def test_roll_outs_of_a_protected_model_are_the_stock_roll_outs(kind: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """With an exploration of its own, too; the budget is infinite or the first update has not come."""
    agent, buffer = narrow() if kind == "narrow" else trained(kind)
    calls: list[int] = []
    call = FusedForward.__call__
    monkeypatch.setattr(FusedForward, "__call__", lambda self, *args: (calls.append(1), call(self, *args))[1])
    models, rollouts = [], []
    for fused in ("auto", "off"):
        envs = make_vec_env(NEW["box" if kind == "narrow" else kind], 2, seed=1)
        budget = 0.01 if kind == "narrow" else math.inf
        model = NullSpacePPO.from_pretrained(
            copy.deepcopy(agent), envs, retain=buffer, seed=1, kl_budget=budget, fused=fused, **SMALL
        )
        assert kind != "narrow" or model.retention.exploration is not None
        model.learn(128)
        models.append(model)
        rollouts.append(model.rollout_buffer)
        assert "forward" not in vars(model.policy)
    assert calls
    for name in ("observations", "actions", "values", "log_probs", "rewards"):
        assert np.array_equal(getattr(rollouts[0], name), getattr(rollouts[1], name)), name
    assert kind == "narrow" or same_policies(*models)
