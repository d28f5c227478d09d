"""`nsrl finetune`."""

from __future__ import annotations

from collections.abc import Sequence

from nsrl.bench.config import FinetuneConfig
from nsrl.cli.command import print_outcome, read_arguments, run_training

EXAMPLES = """\
  nsrl finetune --config configs/cartpole_swapped.yaml
  nsrl finetune --agent expert.zip --old_env CartPole-v1 --new_env MyCartPole-v0 --retention.kl_budget 0.02
  nsrl finetune --config configs/cartpole_swapped.yaml --method kl_penalty --penalty 1.0 --seed 3
  nsrl finetune --resume runs/finetune-cartpole_swapped-20250101-120000"""
ABOUT = """\
Fine-tune a pretrained agent on a new task while the mean KL divergence from the pretrained policy, over a
buffer of states of its old task, stays within --retention.kl_budget nats per state. Writes a folder with
the agent (a stock Stable-Baselines3 zip), the buffer, learning curves, TensorBoard events, metrics.json
and report.md."""


def run(arguments: Sequence[str]) -> int:
    """Fine-tune, and print the table."""
    config, options = read_arguments(
        FinetuneConfig, arguments, command="finetune", about=ABOUT, examples=EXAMPLES, resumable=True
    )
    from nsrl.bench.finetuning import finetune, resume_finetuning
    from nsrl.bench.report import finetuning_table

    outcome, status = run_training("finetune", config, options, finetune, resume_finetuning)
    if outcome is not None:
        print_outcome(outcome, finetuning_table(outcome.metrics))
    return status
