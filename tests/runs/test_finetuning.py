"""What `finetune` opens, and how often."""

from __future__ import annotations

from collections import Counter
from dataclasses import replace
from pathlib import Path

import pytest
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

from nsrl.errors import NsrlError
from nsrl.rl.agents import agent as agents
from nsrl.rl.playing import environments
from nsrl.runs.config import BufferSettings, EvaluationSettings, FinetuneConfig
from nsrl.runs.finetuning import finetune
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
