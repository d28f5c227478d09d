"""`nsrl demo`."""

from __future__ import annotations

import sys
from collections.abc import Sequence

from nsrl.cli.command import print_table, read_arguments
from nsrl.runs.config import DemoConfig

EXAMPLES = """\
  nsrl demo
  nsrl demo --finetuning.retention.kl_budget 0.001 --out runs/strict"""
ABOUT = """\
Pretrain PPO on CartPole (the agent is cached), collect a retention buffer, then learn CartPole with
swapped actions twice: with plain PPO, which forgets the old task, and with NullSpacePPO, which does not.
Takes about three minutes on two cores."""


def run(arguments: Sequence[str]) -> int:
    """Run the demo, and print its one table."""
    config, options = read_arguments(DemoConfig, arguments, command="demo", about=ABOUT, examples=EXAMPLES)
    from nsrl.bench.demo import run_demo
    from nsrl.cli.status_line import StatusLine
    from nsrl.runs.training import Interrupted

    try:
        with StatusLine("fine-tuning") as line:
            shown = options["progress"]
            outcome = run_demo(config, on_status=line.show if shown else None, progress=shown)
    except Interrupted as stop:
        print("nsrl: interrupted; starting the demo again goes on with its pretrained agent", file=sys.stderr)
        return stop.exit_status
    print_table(outcome.table)
    print(f"curves       {outcome.figure}")
    print(f"report       {outcome.report}")
    print(f"TensorBoard  tensorboard --logdir {outcome.tensorboard}")
    return 0
