"""`nsrl collect`."""

from __future__ import annotations

from collections.abc import Sequence
from contextlib import ExitStack

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

        with ExitStack() as stack:
            bar = Progress(console=Console(stderr=True), transient=True)
            task = bar.add_task("collecting", total=None)

            def show(done: int, total: int) -> None:
                if not bar.live.is_started:  # not before there is something to show: bad input is told first, and alone
                    stack.enter_context(bar)
                bar.update(task, completed=done, total=total)

            outcome = collect(config, progress=show)
    else:
        outcome = collect(config)
    print_table(collection_table(outcome.metrics))
    print(f"buffer   {outcome.folder.buffer}")
    return 0
