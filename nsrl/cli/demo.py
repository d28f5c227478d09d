"""`nsrl demo`."""

from __future__ import annotations

from collections.abc import Sequence

from nsrl.bench.config import DemoConfig
from nsrl.cli.command import interrupted, print_table, read_arguments

EXAMPLES = """\
  nsrl demo
  nsrl demo --finetuning.retention.kl_budget 0.001 --out runs/strict"""
ABOUT = """\
Pretrain PPO on CartPole (the agent is cached), collect a retention buffer, then learn CartPole with
swapped actions twice: with plain PPO, which forgets the old task, and with NullSpacePPO, which does not.
Takes about two minutes on two cores."""


def run(arguments: Sequence[str]) -> int:
    """Run the demo, and print its one table."""
    config, options = read_arguments(DemoConfig, arguments, command="demo", about=ABOUT, examples=EXAMPLES)
    from nsrl.bench.demo import run_demo
    from nsrl.bench.training import Interrupted
    from nsrl.cli.status import StatusDisplay

    try:
        with StatusDisplay(shown=options["progress"]) as display:
            outcome = run_demo(config, on_status=display.update, progress=options["progress"])
    except Interrupted as stop:
        return interrupted("demo", stop)
    print_table(outcome.table)
    print(f"curves       {outcome.figure}")
    print(f"report       {outcome.report}")
    print(f"TensorBoard  tensorboard --logdir {outcome.tensorboard}")
    return 0
