"""`nsrl pretrain`."""

from __future__ import annotations

from collections.abc import Sequence

from nsrl.cli.command import print_outcome, read_arguments, run_training
from nsrl.runs.config import PretrainConfig

EXAMPLES = """\
  nsrl pretrain --config pretrain_cartpole
  nsrl pretrain --env nsrl/Pendulum-v0 --total_timesteps 200000 --ppo.gamma 0.9
  nsrl pretrain --resume runs/pretrain-HalfCheetah-v0-20250101-120000"""
ABOUT = """\
Train an agent from scratch with stock PPO of Stable-Baselines3. The folder that it makes (agent.zip, and
vecnormalize.pkl with --normalize true) is what `nsrl finetune --agent` takes; any other SB3 zip of PPO,
A2C or TRPO will do as well."""


def run(arguments: Sequence[str]) -> int:
    """Train, and print the table."""
    config, options = read_arguments(
        PretrainConfig, arguments, command="pretrain", about=ABOUT, examples=EXAMPLES, resumable=True
    )
    from nsrl.runs.pretraining import pretrain, resume_pretraining
    from nsrl.runs.report import pretraining_table

    outcome, status = run_training("pretrain", config, options, pretrain, resume_pretraining)
    if outcome is not None:
        print_outcome(outcome, pretraining_table(outcome.metrics))
    return status
