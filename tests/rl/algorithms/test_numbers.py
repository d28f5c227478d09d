"""Rewards, returns and critics that are no numbers: one sentence, and the actor is as it was last measured."""

from __future__ import annotations

from typing import Any

import gymnasium as gym
import numpy as np
import pytest
import torch
from stable_baselines3.common.env_util import make_vec_env

from nsrl import NullSpacePPO, NullSpaceTRPO
from nsrl.errors import NsrlError
from tests.rl.builders import NEW, SMALL, trained
from tests.rl.oracles import independent_kl, within

BUDGET = 0.01
SETTINGS: dict[type, dict[str, Any]] = {
    NullSpacePPO: SMALL,
    NullSpaceTRPO: {"n_steps": 64, "batch_size": 64, "n_critic_updates": 2},
}


class Late(gym.RewardWrapper):
    """A reward of the task's own, and from a step on another."""

    def __init__(self, env: gym.Env, value: float, start: int):
        super().__init__(env)
        self.value, self.left = value, start

    def reward(self, reward: Any) -> float:
        self.left -= 1
        return float(reward) if self.left >= 0 else self.value


def learner(algorithm: type, envs: Any, **options: Any) -> tuple[Any, Any]:
    agent, buffer = trained()
    settings = {**SETTINGS[algorithm], "opening": "off", **options}
    return algorithm.from_pretrained(agent, envs, retain=buffer, seed=1, kl_budget=BUDGET, **settings), buffer


def finite(model: Any) -> bool:
    return all(bool(torch.isfinite(parameter).all()) for parameter in model.policy.parameters())


@pytest.mark.parametrize("algorithm", SETTINGS)
@pytest.mark.parametrize("value", [np.nan, np.inf, -np.inf, 1e300])
def test_a_reward_that_is_no_number_ends_the_run_before_it_is_learnt_from(algorithm: type, value: float) -> None:
    envs = make_vec_env(NEW["discrete"], 2, seed=1, wrapper_class=Late, wrapper_kwargs={"value": value, "start": 100})
    model, buffer = learner(algorithm, envs)
    with pytest.raises(NsrlError, match="gave a reward that is infinite or no number"):
        model.learn(600)
    assert model.num_timesteps == 256 and model.retention.updates == 1  # the roll-out with 65 ordinary steps was learnt
    assert finite(model) and independent_kl(model, buffer) <= within(BUDGET, buffer)
    model.set_env(make_vec_env(NEW["discrete"], 2, seed=1))  # once the reward is mended, it goes on
    model.learn(128, reset_num_timesteps=False)
    assert finite(model)


@pytest.mark.parametrize("algorithm", SETTINGS)
def test_rewards_too_large_to_be_added_up_are_told_as_such(algorithm: type) -> None:
    envs = make_vec_env(NEW["discrete"], 2, seed=1, wrapper_class=Late, wrapper_kwargs={"value": 3e38, "start": 0})
    model, _ = learner(algorithm, envs)
    with pytest.raises(NsrlError, match="too large for single precision"):
        model.learn(600)
    assert finite(model)


def test_a_critic_that_says_no_number_is_told_as_such() -> None:
    model, buffer = learner(NullSpacePPO, make_vec_env(NEW["discrete"], 2, seed=1))
    with torch.no_grad():
        model.policy.value_net.bias.fill_(np.nan)
    with pytest.raises(NsrlError, match="critic says what is no number"):
        model.learn(128)
    assert independent_kl(model, buffer) <= within(BUDGET, buffer)


@pytest.mark.parametrize("algorithm", SETTINGS)
def test_an_update_that_breaks_the_critic_is_told_behind_it(algorithm: type) -> None:
    """With a learning rate in place of a step, as a slipped exponent makes it."""
    model, buffer = learner(algorithm, make_vec_env(NEW["discrete"], 2, seed=1), learning_rate=1e37)
    with pytest.raises(NsrlError, match=r"the last update has left .* infinite or no number"):
        model.learn(600)
    assert independent_kl(model, buffer) <= within(BUDGET, buffer)
