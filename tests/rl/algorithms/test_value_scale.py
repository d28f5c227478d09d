"""The critic is learnt in units of the returns' spread: what it says stays, and the rewards' scale is no matter."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import gymnasium as gym
import numpy as np
import pytest
import torch
from stable_baselines3 import PPO
from stable_baselines3.common.env_util import make_vec_env

from nsrl import NullSpacePPO, NullSpaceTRPO
from nsrl.rl.algorithms.value_scale import standardised_values
from tests.rl.builders import NEW, SMALL, trained
from tests.tolerances import relative

SETTINGS: dict[type, dict[str, Any]] = {
    NullSpacePPO: SMALL,
    NullSpaceTRPO: {"n_steps": 64, "batch_size": 64, "n_critic_updates": 2},
}


class Scaled(gym.RewardWrapper):
    def __init__(self, env: gym.Env, factor: float):
        super().__init__(env)
        self.factor = factor

    def reward(self, reward: Any) -> float:
        return self.factor * float(reward)


def learner(algorithm: type, factor: float = 1.0, **options: Any) -> Any:
    agent, buffer = trained()
    envs = make_vec_env(NEW["discrete"], 2, seed=1, wrapper_class=Scaled, wrapper_kwargs={"factor": factor})
    return algorithm.from_pretrained(agent, envs, retain=buffer, seed=1, **SETTINGS[algorithm], **options)


def collected(factor: float) -> Any:
    model = learner(NullSpacePPO, factor)
    model.learn(64)
    return model


@pytest.mark.parametrize("factor", [1e-3, 1.0, 1e4])
def test_inside_they_are_standard_and_behind_it_they_are_as_they_were(factor: float) -> None:
    model = collected(factor)
    buffer, head = model.rollout_buffer, model.policy.value_net
    returns, values = buffer.returns.copy(), buffer.values.copy()
    weight, bias = head.weight.detach().clone(), head.bias.detach().clone()
    observations = torch.as_tensor(buffer.observations).reshape(-1, *model.observation_space.shape)
    with torch.no_grad():
        said = model.policy.predict_values(observations)
    with standardised_values(model) as unit:
        # the variance of the returns and the mean squared error add up to 1
        inside = buffer.returns.astype(np.float64)
        error = np.square(inside - buffer.values).mean()
        assert inside.var() + error == pytest.approx(1.0, rel=1e-5) and abs(inside.mean()) < 1e-5
        with torch.no_grad():
            now = model.policy.predict_values(observations).double() * unit + float(returns.mean(dtype=np.float64))
        size = float(said.abs().max()) + unit + float(np.abs(returns).max())
        assert float((now - said.double()).abs().max()) <= relative(torch.float32, terms=64) * size
    assert buffer.returns is not None and np.array_equal(buffer.returns, returns)
    assert np.array_equal(buffer.values, values)
    tiny = relative(torch.float32)
    assert torch.allclose(head.weight, weight, rtol=tiny, atol=0.0)
    assert float((head.bias - bias).abs().max()) <= tiny * size


@pytest.mark.parametrize("algorithm", SETTINGS)
def test_the_scale_of_the_rewards_is_no_matter(algorithm: type) -> None:
    """A power of two scales floating-point numbers exactly; what is left is the rounding of sums and of advantages'
    1e-8, SB3's guard against a division by zero."""
    found = []
    for factor in (1.0, 64.0):
        model = learner(algorithm, factor)
        with torch.no_grad():  # so that the very first values scale too
            model.policy.value_net.weight.mul_(factor)
            model.policy.value_net.bias.mul_(factor)
        model.learn(256)
        found.append(torch.cat([p.detach().flatten() for p in model.retention.constraint.parameters.parameters]))
    assert float((found[0] - found[1]).abs().max()) < 1e-4
    raw = []
    for factor in (1.0, 64.0):
        model = learner(algorithm, factor, values="raw")
        with torch.no_grad():
            model.policy.value_net.weight.mul_(factor)
            model.policy.value_net.bias.mul_(factor)
        model.learn(256)
        raw.append(torch.cat([p.detach().flatten() for p in model.retention.constraint.parameters.parameters]))
    assert float((raw[0] - raw[1]).abs().max()) > 10.0 * float((found[0] - found[1]).abs().max())


def test_the_loss_is_logged_in_the_rewards_own_units() -> None:
    losses = []
    for factor in (1.0, 64.0):
        model = learner(NullSpaceTRPO, factor)
        with torch.no_grad():
            model.policy.value_net.weight.mul_(factor)
            model.policy.value_net.bias.mul_(factor)
        model.learn(128)
        losses.append(model.logger.name_to_value["train/value_loss"])
    assert losses[1] == pytest.approx(64.0**2 * losses[0], rel=1e-3)


def test_an_exception_in_the_update_leaves_the_critic_as_it_was() -> None:
    model = collected(1000.0)
    head, returns = model.policy.value_net, model.rollout_buffer.returns.copy()
    weight = head.weight.detach().clone()
    with pytest.raises(KeyError), standardised_values(model):
        raise KeyError
    assert torch.allclose(head.weight, weight, rtol=relative(torch.float32), atol=0.0)
    assert np.array_equal(model.rollout_buffer.returns, returns)


def test_without_a_buffer_learning_is_stocks(tmp_path: Path) -> None:
    policies = []
    for algorithm in (PPO, NullSpacePPO):
        envs = make_vec_env(NEW["discrete"], 2, seed=1)
        model = algorithm("MlpPolicy", envs, seed=0, device="cpu", **SMALL)
        model.learn(128)
        policies.append(model.policy.state_dict())
    assert all(torch.equal(policies[0][name], policies[1][name]) for name in policies[0])
