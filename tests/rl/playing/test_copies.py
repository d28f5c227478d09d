"""Copies stepped as arrays against one by one: whole evaluations, collections and fine-tuning runs, bit for bit."""

from collections.abc import Callable
from typing import Any

import gymnasium as gym
import numpy as np
import pytest
import torch
from stable_baselines3 import PPO
from stable_baselines3.common.vec_env import DummyVecEnv

import nsrl_envs  # noqa: F401  registers the ids
from nsrl import NullSpacePPO
from nsrl.errors import NsrlError
from nsrl.rl.playing.environments import as_vec_env, make_envs, open_copies, training_env
from nsrl.rl.playing.evaluation import evaluate
from nsrl.rl.retention.buffer import RetentionBuffer
from nsrl.rl.training.callbacks import TaskEvaluation
from nsrl_envs.vectorised.batch import SWITCH, Batch
from nsrl_envs.vectorised.vec_env import ArrayVecEnv
from tests.rl.builders import NEW, OLD, SMALL, trained

ACROBOT = "nsrl/AcrobotSwapped-v0"


@pytest.fixture
def with_and_without(monkeypatch) -> Callable[[Callable[[], Any]], tuple[Any, Any]]:
    """The same twice: with arrays, which must have been stepped, and without, where they must not."""
    steps = []
    step = Batch.step
    monkeypatch.setattr(Batch, "step", lambda *arguments: steps.append(1) or step(*arguments))

    def run(action: Callable[[], Any]) -> tuple[Any, Any]:
        monkeypatch.delenv(SWITCH, raising=False)
        arrays = action()
        assert steps, "nothing was stepped as arrays"
        steps.clear()
        monkeypatch.setenv(SWITCH, "0")
        singly = action()
        assert not steps
        return arrays, singly

    return run


def agent_of(task: str) -> PPO:
    agent = PPO("MlpPolicy", task, n_steps=32, batch_size=32, device="cpu", seed=1)
    with torch.no_grad():
        agent.policy.action_net.weight.mul_(300.0)  # episodes that differ
    return agent


@pytest.mark.parametrize("deterministic", [True, False])
@pytest.mark.parametrize("episodes, n_envs", [(11, 5), (4, 20)])
@pytest.mark.parametrize("task", [NEW["discrete"], NEW["box"], ACROBOT])
def test_evaluations_are_the_same(with_and_without, task, episodes, n_envs, deterministic):
    agent = agent_of(task)
    settings = {"episodes": episodes, "n_envs": n_envs, "seed": 7, "deterministic": deterministic}
    arrays, singly = with_and_without(lambda: evaluate(agent, task, **settings))
    assert arrays == singly
    assert len(set(arrays.returns)) > 1


def test_given_copies_end_up_where_they_would_have(with_and_without):
    agent = agent_of(OLD["discrete"])

    def played() -> tuple[Any, ...]:
        copies = open_copies(OLD["discrete"], 6)
        found = [evaluate(agent, copies, episodes=episodes) for episodes in (9, 5)]
        left = [(copy.unwrapped.state.tobytes(), copy.unwrapped.steps_beyond_terminated) for copy in copies]
        generators = [copy.unwrapped.np_random.bit_generator.state for copy in copies]
        return found, left, generators, [copy.get_wrapper_attr("_elapsed_steps") for copy in copies]

    arrays, singly = with_and_without(played)
    assert arrays == singly


def test_actions_of_a_strange_kind_are_the_copies_own_affair(monkeypatch):
    agent = agent_of(OLD["box"])
    predict = agent.policy.predict
    monkeypatch.setattr(
        agent.policy, "predict", lambda *seen, **how: (predict(*seen, **how)[0].astype(np.float64), None)
    )
    found = [evaluate(agent, OLD["box"], episodes=4)]
    monkeypatch.setenv(SWITCH, "0")
    assert found == [evaluate(agent, OLD["box"], episodes=4)]


def test_collections_are_the_same(with_and_without):
    agent, _ = trained()
    arrays, singly = with_and_without(
        lambda: RetentionBuffer.collect(agent, OLD["discrete"], n_states=96, n_envs=4, seed=3, select="advantage")
    )
    assert arrays.digest() == singly.digest()
    assert {**arrays.provenance, "created": None} == {**singly.provenance, "created": None}


@pytest.mark.parametrize("kind", ["discrete", "box"])
def test_a_whole_fine_tuning_run_is_the_same(with_and_without, kind):
    agent, buffer = trained(kind)

    def run() -> tuple[Any, ...]:
        model = NullSpacePPO.from_pretrained(agent, NEW[kind], buffer, kl_budget=0.05, n_envs=4, seed=5, **SMALL)
        callback = TaskEvaluation((NEW[kind], None), {"old": (OLD[kind], None)}, every=256, episodes=4, n_envs=4)
        model.learn(1024, callback=callback)
        rows = [{key: value for key, value in row.items() if key != "seconds"} for row in callback.history]
        episodes = [(episode["r"], episode["l"]) for episode in model.ep_info_buffer]
        assert episodes and len(rows) >= 4
        generators = [generator.bit_generator.state for generator in model.get_env().get_attr("np_random")]
        weights = {name: value.numpy().tobytes() for name, value in model.policy.state_dict().items()}
        return rows, episodes, generators, weights, model._last_obs.tobytes()

    arrays, singly = with_and_without(run)
    for found, expected in zip(arrays, singly, strict=True):
        assert found == expected


def test_ids_have_arrays_and_other_environments_do_not(monkeypatch):
    def kinds(count: int) -> list[type]:
        made = [training_env("CartPole-v1", None, n_envs=count, seed=1), as_vec_env("CartPole-v1", count)]
        return [type(env) for env in [*made, make_envs("nsrl/CartPole-v0", count, 0)]]

    assert kinds(4) == [ArrayVecEnv] * 3
    assert kinds(1) == [DummyVecEnv] * 3  # nothing to gain
    assert type(as_vec_env(gym.make("CartPole-v1"), 4)) is DummyVecEnv
    monkeypatch.setenv(SWITCH, "0")
    assert kinds(4) == [DummyVecEnv] * 3
    with pytest.raises(NsrlError, match="cannot make the environment 'NoSuchEnv-v0'"):
        training_env("NoSuchEnv-v0", None, n_envs=4)
