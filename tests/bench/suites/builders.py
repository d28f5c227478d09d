"""Jobs that take a second, shared by the tests of jobs and of what becomes of them when they are killed."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

from nsrl.bench.suites.jobs import Job
from nsrl.runs.config import EvaluationSettings, PretrainConfig
from nsrl.runs.hyperparameters import PPOSettings

TINY = PretrainConfig(
    env="nsrl/CartPole-v0",
    total_timesteps=128,
    ppo=PPOSettings(n_envs=1, n_steps=64, batch_size=64, n_epochs=1),
    evaluation=EvaluationSettings(every=128, episodes=1, final_episodes=1),
)


def jobs(root: Path, *seeds: int) -> list[Job]:
    """A pretraining for each seed."""
    return [Job(f"seed {seed}", "pretrain", replace(TINY, seed=seed), root / str(seed)) for seed in seeds]


def long(job: Job) -> Job:
    """The same, long enough to be interrupted."""
    return replace(job, config=replace(job.config, total_timesteps=3200, checkpoint_every=640))
