"""`nsrl evaluate`."""

from __future__ import annotations

from collections.abc import Sequence

from nsrl.cli.command import print_table, read_arguments
from nsrl.runs.config import EvaluateConfig

EXAMPLES = """\
  nsrl evaluate --agent runs/pretrained/cartpole --pair cartpole_swapped
  nsrl evaluate --agent expert.zip --env CartPole-v1 --episodes 100 --deterministic false
  nsrl evaluate --agent RUN --pair cartpole_swapped --buffer RUN --out results/cartpole"""
ABOUT = """\
Play an agent on one task (--env) or on both tasks of a pair (--pair), and measure its KL on a retention
buffer (--buffer). Prints a table; with --out, metrics.json goes there."""


def run(arguments: Sequence[str]) -> int:
    """Play, and print the table."""
    config, _ = read_arguments(EvaluateConfig, arguments, command="evaluate", about=ABOUT, examples=EXAMPLES)
    from nsrl.runs.evaluating import play
    from nsrl.runs.report import evaluation_table
    from nsrl.runs.training import use_one_thread

    use_one_thread()
    print_table(evaluation_table(play(config)))
    return 0
