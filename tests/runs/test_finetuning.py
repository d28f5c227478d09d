"""What `finetune` opens, and how often."""

from __future__ import annotations

from collections import Counter
from dataclasses import replace
from pathlib import Path

import pytest

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
