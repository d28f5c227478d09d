"""`nsrl cost`: what a fine-tuning run would take."""

from __future__ import annotations

from collections.abc import Sequence

from nsrl.cli.command import read_arguments
from nsrl.runs.config import FinetuneConfig

EXAMPLES = """\
  nsrl cost --config cartpole_swapped
  nsrl cost --agent expert.zip --old_env CartPole-v1 --new_env MyCartPole-v0 --ppo.n_envs 64"""
ABOUT = """\
Say what nsrl finetune with the same words would take, in time and memory, before it starts: two updates are
tried on environments of their own, and nothing is written. The opening and the evaluations are not counted."""


def run(arguments: Sequence[str]) -> int:
    """Try, and print a line."""
    config, _ = read_arguments(FinetuneConfig, arguments, command="cost", about=ABOUT, examples=EXAMPLES)
    from nsrl.runs.cost import forecast_run
    from nsrl.runs.training import use_one_thread

    use_one_thread()
    print(forecast_run(config))
    return 0
