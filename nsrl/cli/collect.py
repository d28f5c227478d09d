"""`nsrl collect`."""

from __future__ import annotations

from collections.abc import Sequence

from nsrl.cli.command import print_table, read_arguments
from nsrl.runs.config import CollectConfig

EXAMPLES = """\
  nsrl collect --agent runs/pretrained/cartpole --env nsrl/CartPole-v0
  nsrl collect --agent expert.zip --env CartPole-v1 --states.n_states 4096 --out runs/buffer"""
ABOUT = """\
Collect a retention buffer: states that the agent visits on its own task, with what it does there.
`nsrl finetune --buffer` takes it; without one, finetune collects its own."""


def run(arguments: Sequence[str]) -> int:
    """Collect, and print what was collected."""
    config, options = read_arguments(CollectConfig, arguments, command="collect", about=ABOUT, examples=EXAMPLES)
    from nsrl.runs.collecting import collect
    from nsrl.runs.report import collection_table
    from nsrl.runs.training import use_one_thread

    use_one_thread()
    if options["progress"]:
        from rich.console import Console
        from rich.progress import Progress

        with Progress(console=Console(stderr=True), transient=True) as bar:
            task = bar.add_task("collecting", total=None)
            outcome = collect(config, progress=lambda done, total: bar.update(task, completed=done, total=total))
    else:
        outcome = collect(config)
    print_table(collection_table(outcome.metrics))
    print(f"buffer   {outcome.folder.buffer}")
    return 0
