"""Behaviour cloning of Minari data sets: the clone acts like the data, and can be retained and fine-tuned."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import gymnasium as gym
import numpy as np
import pytest
import torch
from gymnasium import spaces
from stable_baselines3 import PPO
from stable_baselines3.common.env_util import make_vec_env

from nsrl import NullSpacePPO, RetentionBuffer
from nsrl.errors import NsrlError
from nsrl.rl.playing.evaluation import evaluate
from nsrl.rl.retention.cloning import LEAST_LOG_STD, clone
from tests.rl.builders import SMALL
from tests.rl.oracles import independent_kl, within

minari = pytest.importorskip("minari")
pytestmark = pytest.mark.filterwarnings("ignore::UserWarning:minari")

VECTOR = spaces.Box(-1.0, 1.0, (3,), np.float32)


def balance(observation: np.ndarray) -> int:
    """A controller of CartPole-v1 that holds the pole up for most of an episode."""
    return int(observation @ [0.05, 0.3, 1.0, 1.0] > 0.0)


def recorded(env: gym.Env, act: Any, episodes: int, folder: Path, monkeypatch: pytest.MonkeyPatch) -> Any:
    from minari.data_collector import EpisodeBuffer

    monkeypatch.setenv("MINARI_DATASETS_PATH", str(folder))
    found = []
    for index in range(episodes):
        seen, actions, rewards, ends = [env.reset(seed=index)[0]], [], [], []
        while not (ends and any(ends[-1])):
            actions.append(act(seen[-1]))
            after, reward, *end, _ = env.step(actions[-1])
            seen.append(after)
            rewards.append(float(reward))
            ends.append(end)
        if isinstance(seen[0], dict):
            shown: Any = {key: np.stack([one[key] for one in seen]) for key in seen[0]}
        else:
            shown = np.stack(seen)
        terminations, truncations = np.array(ends).T
        found.append(
            EpisodeBuffer(
                id=index,
                observations=shown,
                actions=np.array(actions),
                rewards=np.array(rewards),
                terminations=terminations,
                truncations=truncations,
                infos={},
            )
        )
    return minari.create_dataset_from_buffers(
        "clone/test-v0",
        found,
        observation_space=env.observation_space,
        action_space=env.action_space,
        algorithm_name="none",
        author="nobody",
        author_email="nobody@example.com",
        code_permalink="none",
    )


def test_a_clone_plays_as_well_as_the_data_and_is_fine_tuned_inside_a_budget(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    dataset = recorded(gym.make("CartPole-v1"), balance, 10, tmp_path, monkeypatch)
    before = torch.get_rng_state()
    agent, report = clone(dataset, epochs=30, learning_rate=3e-3, seed=1)
    assert torch.equal(before, torch.get_rng_state()) and type(agent.model) is PPO
    assert report.steps + report.heldout_steps == dataset.total_steps and report.heldout_steps > 0
    assert np.exp(report.log_likelihood) > 0.9 and np.exp(report.heldout_log_likelihood) > 0.85
    data_return = dataset.total_steps / dataset.total_episodes  # one a step
    assert evaluate(agent, "CartPole-v1", episodes=10).mean > 0.8 * data_return > 80.0
    again, _ = clone("clone/test-v0", epochs=30, learning_rate=3e-3, seed=1)
    for key, value in agent.model.policy.state_dict().items():
        assert torch.equal(value, again.model.policy.state_dict()[key])

    buffer = RetentionBuffer.from_minari(dataset, agent, n_states=100)
    assert buffer.normalizer is agent.normalizer is not None
    buffer.check(agent)
    model = NullSpacePPO.from_pretrained(agent, make_vec_env("CartPole-v1", 2), buffer, 1e-3, **SMALL)
    model.learn(256)
    assert model.retention_report().updates == 2 and independent_kl(model, buffer) <= within(1e-3, buffer)


class Random(gym.Env):
    """Random observations; five steps an episode."""

    def __init__(self, observation_space: spaces.Space, action_space: spaces.Space):
        self.observation_space, self.action_space = observation_space, action_space

    def reset(self, *, seed: int | None = None, options: dict | None = None) -> tuple[Any, dict]:
        super().reset(seed=seed)
        self.observation_space.seed(seed)
        self._steps = 0
        return self.observation_space.sample(), {}

    def step(self, action: Any) -> tuple[Any, float, bool, bool, dict]:
        self._steps += 1
        return self.observation_space.sample(), 0.0, self._steps == 5, False, {}


def test_gaussian_clones_fit_mean_and_spread(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    rng = np.random.default_rng(0)
    noise = np.array([0.3, 0.0])

    def act(observation: np.ndarray) -> np.ndarray:
        return np.float32([observation[0], -0.5 * observation[1]] + noise * rng.standard_normal(2))

    dataset = recorded(Random(VECTOR, spaces.Box(-2.0, 2.0, (2,))), act, 300, tmp_path, monkeypatch)
    agent, report = clone(
        dataset, epochs=40, learning_rate=5e-3, batch_size=50, hidden=(16,), heldout=0.0, normalize=False
    )
    assert report.heldout_steps == 0 and np.isnan(report.heldout_log_likelihood) and agent.normalizer is None
    spread = agent.model.policy.log_std.detach().exp().numpy()
    assert spread[0] == pytest.approx(0.3, rel=0.1) and spread[1] == pytest.approx(np.exp(LEAST_LOG_STD), rel=0.02)
    seen = np.random.default_rng(1).uniform(-0.9, 0.9, (50, 3)).astype(np.float32)
    mean = agent.model.predict(seen, deterministic=True)[0]
    assert np.abs(mean - np.stack([seen[:, 0], -0.5 * seen[:, 1]], 1)).mean() < 0.05


@pytest.mark.parametrize("actions", [spaces.MultiDiscrete([3, 2]), spaces.MultiBinary(2), spaces.Box(-1, 1, (2, 1))])
def test_every_kind_of_action_and_dict_observations(
    actions: spaces.Space, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    env = Random(spaces.Dict(v=VECTOR, d=spaces.Discrete(2)), actions)
    actions.seed(0)
    agent, report = clone(recorded(env, lambda _: actions.sample(), 4, tmp_path, monkeypatch), epochs=2)
    assert np.isfinite([report.log_likelihood, report.heldout_log_likelihood]).all()
    assert agent.normalizer is None and len(RetentionBuffer.from_minari("clone/test-v0", agent, n_states=10)) == 10


def test_what_cannot_be_cloned_is_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    env = Random(spaces.Box(0, 255, (36, 36, 3), np.uint8), spaces.Discrete(2))
    dataset = recorded(env, lambda _: 0, 1, tmp_path, monkeypatch)
    with pytest.raises(NsrlError, match="images"):
        clone(dataset)
    for options in ({"epochs": 0}, {"heldout": 1.0}, {"batch_size": 0}):
        with pytest.raises(NsrlError, match="at least 1"):
            clone(dataset, **options)
    with pytest.raises(NsrlError, match="minari download"):
        clone("no/such-v0")
