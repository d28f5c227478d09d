"""Environments and callbacks that raise: their own traceback, and the run saved as it was before."""

import traceback
from pathlib import Path

import gymnasium as gym
import pytest
from stable_baselines3 import PPO

from nsrl.errors import NsrlError
from nsrl.files import read_lines
from nsrl.rl.training.checkpoint import read_checkpoint
from nsrl.runs.config import EvaluationSettings, PretrainConfig
from nsrl.runs.hyperparameters import PPOSettings
from nsrl.runs.pretraining import pretrain, resume_pretraining

ROLLOUT = 64


class Brittle(gym.Wrapper):
    """CartPole that raises at a step of the whole process; None is never."""

    at: int | None = None
    steps = 0

    def step(self, action):
        Brittle.steps += 1
        if Brittle.steps == Brittle.at:
            raise ZeroDivisionError("the simulator has fallen over")
        return self.env.step(action)


@pytest.fixture
def brittle():
    name = "Brittle-v0"
    gym.register(name, entry_point=lambda: Brittle(gym.make("CartPole-v1")))
    yield name
    gym.registry.pop(name)
    Brittle.at, Brittle.steps = None, 0


def config(env: str) -> PretrainConfig:
    return PretrainConfig(
        env=env,
        total_timesteps=4 * ROLLOUT,
        ppo=PPOSettings(n_envs=1, n_steps=ROLLOUT, batch_size=64, n_epochs=1),
        evaluation=EvaluationSettings(every=10**6, episodes=1, final_episodes=1),
        checkpoint_every=10**6,
    )


def test_an_environment_that_raises_keeps_its_traceback_and_the_run_goes_on(brittle, tmp_path: Path, monkeypatch):
    counted = []
    with monkeypatch.context() as patched:
        started = PPO.collect_rollouts
        patched.setattr(
            PPO, "collect_rollouts", lambda *args, **kw: counted.append(Brittle.steps) or started(*args, **kw)
        )
        whole = pretrain(config(brittle), tmp_path / "whole").metrics
    before = counted[0]
    Brittle.steps = 0
    # In the third rollout; evaluations come before the first.
    Brittle.at = before + 2 * ROLLOUT + ROLLOUT // 2
    with pytest.warns(UserWarning, match="is saved as it was before the error.*--resume"):
        with pytest.raises(ZeroDivisionError, match="has fallen over") as caught:
            pretrain(config(brittle), tmp_path / "run")
    assert "raise ZeroDivisionError" in "".join(traceback.format_exception(caught.value))
    reached = read_checkpoint(tmp_path / "run" / "checkpoint.zip")[0]["counters"]["num_timesteps"]
    assert reached == 2 * ROLLOUT
    Brittle.at = None
    assert resume_pretraining(tmp_path / "run").metrics["timesteps"] == whole["timesteps"]
    steps = [row["timesteps"] for row in read_lines(tmp_path / "run" / "history.jsonl")]
    assert steps == list(range(0, 4 * ROLLOUT + 1, ROLLOUT))


def test_a_step_that_raises_in_the_middle_of_an_update_leaves_the_checkpoint_before(brittle, tmp_path, monkeypatch):
    def fail(self):
        raise RuntimeError("in the middle of an update")

    monkeypatch.setattr(PPO, "train", fail)
    with pytest.warns(UserWarning, match="is saved"), pytest.raises(RuntimeError, match="in the middle"):
        pretrain(config(brittle), tmp_path / "run")
    assert read_checkpoint(tmp_path / "run" / "checkpoint.zip")[0]["counters"]["num_timesteps"] == 0


def test_an_environment_that_cannot_be_made_says_why(tmp_path):
    gym.register("Broken-v0", entry_point=lambda needed: None)
    try:
        with pytest.raises(NsrlError, match=r"cannot make the environment 'Broken-v0'.*needed"):
            pretrain(config("Broken-v0"), tmp_path / "run")
    finally:
        gym.registry.pop("Broken-v0")
    assert not (tmp_path / "run").exists()
