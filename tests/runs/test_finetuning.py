"""What `finetune` opens, and how often."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import gymnasium as gym
import numpy as np
import pytest
from gymnasium.envs.registration import registry
from stable_baselines3 import PPO
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

from nsrl.errors import NsrlError
from nsrl.rl.agents import agent as agents
from nsrl.rl.playing import environments
from nsrl.rl.retention.buffer import RetentionBuffer
from nsrl.runs.config import BufferSettings, EvaluationSettings, FinetuneConfig
from nsrl.runs.finetuning import finetune, resume_finetuning
from nsrl.runs.hyperparameters import PPOOverrides

AGENT = Path(__file__).parent / "formats" / "finetune_1" / "pretrained" / "agent.zip"
SMALL = FinetuneConfig(
    agent=str(AGENT),
    pair="cartpole_swapped",
    states=BufferSettings(n_states=16, n_envs=2),
    ppo=PPOOverrides(n_envs=2, n_steps=32, batch_size=32),
    total_timesteps=64,
    evaluation=EvaluationSettings(10**6, 1, 1),
)


def test_the_agent_is_read_once_and_each_task_opened_once(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """But for the copies that are played on to evaluate, which are others: theirs are not in the middle of anything."""
    counted: Counter[str] = Counter()
    read, make = agents._from_disk, environments.make_vec_env

    def reading(path, *rest):
        counted[path.name] += 1
        return read(path, *rest)

    def making(env, *rest, **options):
        counted[env] += 1
        return make(env, *rest, **options)

    monkeypatch.setattr(agents, "_from_disk", reading)
    monkeypatch.setattr(environments, "make_vec_env", making)
    finetune(SMALL, tmp_path / "run")
    assert counted == {"agent.zip": 1, "nsrl/CartPole-v0": 1, "nsrl/CartPoleSwapped-v0": 1}


@pytest.mark.parametrize(
    ("old", "new", "told"),
    [
        ("nsrl/CartPole-v0", "nsrl/Pendulum-v0", "nsrl/Pendulum-v0: "),
        ("nsrl/Pendulum-v0", "nsrl/CartPole-v0", "nsrl/Pendulum-v0: "),
        ("nsrl/CartPole-v0", "nsrl/Nothing-v0", "cannot make the environment 'nsrl/Nothing-v0'"),
    ],
)
def test_a_task_that_does_not_fit_is_named_and_nothing_is_written(
    old: str, new: str, told: str, tmp_path: Path
) -> None:
    with pytest.raises(NsrlError, match=told):
        finetune(replace(SMALL, pair=None, old_env=old, new_env=new), tmp_path / "run")
    assert not (tmp_path / "run").exists()


def test_the_buffer_is_refreshed_as_asked(tmp_path: Path) -> None:
    outcome = finetune(replace(SMALL, total_timesteps=320, refresh_every=100, refresh_states=8), tmp_path / "run")
    events = EventAccumulator(str(outcome.folder.tensorboard)).Reload()
    # roll-outs of 64 steps, behind an opening of some: the last boundary beyond a multiple of 100 may be the run's end
    counts = [event.value for event in events.Scalars("retain/refreshes")]
    assert counts in ([1.0, 2.0], [1.0, 2.0, 3.0])
    assert [event.value for event in events.Scalars("retain/states")] == [16.0 + 8.0 * count for count in counts]


def test_states_are_not_asked_of_an_agent_whose_behaviour_is_not_what_is_retained() -> None:
    with pytest.raises(NsrlError, match="refresh_every"):
        replace(SMALL, refresh_every=100, trust_buffer=True)
    with pytest.raises(NsrlError, match="refresh_states must be at least 1"):
        replace(SMALL, refresh_states=0)


@pytest.fixture
def plain(tmp_path: Path) -> Iterator[str]:
    """An agent that was trained without a context; tasks that are registered on the way are gone behind the test."""
    before = set(registry)
    path = tmp_path / "plain.zip"
    PPO("MlpPolicy", "CartPole-v1", seed=0, device="cpu").save(path)
    yield str(path)
    for id in set(registry) - before:
        del registry[id]


def acts_alike(path: Path, agent: str, buffer: Path) -> bool:
    """Whether an agent with a context of 0 has the logits of the one without, on a run's buffer, to rounding."""
    model, narrow = PPO.load(path, device="cpu"), PPO.load(agent, device="cpu")
    states = RetentionBuffer.load(buffer).observations
    logits = [
        each.policy.get_distribution(each.policy.obs_to_tensor(seen)[0]).distribution.logits.detach()
        for each, seen in ((model, states), (narrow, states[:, : narrow.observation_space.shape[0]]))
    ]
    return bool(np.all(states[:, -1] == 0.0)) and np.allclose(*logits, atol=1e-6)


def test_an_agent_is_given_the_inputs_in_which_the_tasks_show_which_they_are(tmp_path: Path, plain: str) -> None:
    config = replace(SMALL, agent=plain)
    folder = finetune(config, tmp_path / "run").folder
    assert PPO.load(folder.agent, device="cpu").observation_space.shape == (5,)
    assert acts_alike(folder.pretrained, plain, folder.buffer)
    with pytest.raises(NsrlError, match=r"nsrl/CartPoleSwapped-v0: the environment has the observation space .*\(5,\)"):
        finetune(replace(config, context="off"), tmp_path / "other")
    assert not (tmp_path / "other").exists()


def test_tasks_that_look_the_same_are_told_apart_where_that_is_asked_for(tmp_path: Path, plain: str) -> None:
    config = replace(SMALL, agent=plain, pair=None, old_env="CartPole-v1", new_env="CartPole-v1", context="add")
    narrow = tmp_path / "narrow.npz"
    RetentionBuffer.collect(plain, "CartPole-v1", n_states=16, seed=0).save(narrow)
    for number, buffer in enumerate((None, str(narrow))):
        outcome = finetune(replace(config, buffer=buffer), tmp_path / str(number))
        assert acts_alike(outcome.folder.pretrained, plain, outcome.folder.buffer)
        assert outcome.metrics["old_env"] == "nsrl/CartPole-v1.context0"
        assert outcome.metrics["new_env"] == "nsrl/CartPole-v1.context1"
        assert "--context" not in outcome.folder.report.read_text()
    untold = finetune(replace(config, context="auto"), tmp_path / "untold")
    assert "--context add" in untold.folder.report.read_text()
    assert np.array_equal(
        RetentionBuffer.load(outcome.folder.buffer).observations[:, :4], RetentionBuffer.load(narrow).observations
    )
    # a run that ended does not go on, and says so: it found its agent and tasks, told apart as they were
    with pytest.raises(NsrlError, match="finished"):
        resume_finetuning(outcome.folder.path)


def test_only_inputs_between_0_and_1_are_a_context(tmp_path: Path, plain: str) -> None:
    with pytest.raises(NsrlError, match="action space"):
        finetune(replace(SMALL, agent=plain, pair="pendulum_reversed"), tmp_path / "run")
    before = set(registry)
    for number in range(2):
        gym.register(
            id=f"Wide{number}-v0",
            entry_point=lambda: gym.wrappers.TransformObservation(
                gym.make("CartPole-v1"),
                lambda seen: np.append(seen, np.float32(0.0)),
                gym.spaces.Box(-np.inf, np.inf, (5,), np.float32),
            ),
        )
    with pytest.raises(NsrlError, match=r"Wide1-v0: .*observation space"):
        finetune(replace(SMALL, agent=plain, pair=None, old_env="Wide0-v0", new_env="Wide1-v0"), tmp_path / "run")
    assert set(registry) - before == {"Wide0-v0", "Wide1-v0"}
