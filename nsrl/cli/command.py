"""What the commands share: reading their arguments, running what can be resumed, and drawing tables."""

from __future__ import annotations

import argparse
import sys
from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, Any

from nsrl.errors import NsrlError
from nsrl.runs.settings import Config, build_parser, parse

if TYPE_CHECKING:
    from nsrl.runs.report import Table
    from nsrl.runs.training import Interrupted, Outcome

WIDTH = 100


def teller(progress: bool) -> Callable[[str], None]:
    """What prints how far a command is, to standard error; nothing where nobody wants to see it."""
    return (lambda text: print(f"nsrl: {text}", file=sys.stderr)) if progress else lambda _: None


class Parser(argparse.ArgumentParser):
    """A parser of argparse that answers what is wrong in one sentence instead of its usage."""

    def error(self, message: str) -> None:  # type: ignore[override]
        """As inherited.

        Raises:
            NsrlError: always.
        """
        raise NsrlError(f"{self.prog}: {message}; see {self.prog} --help")


def read_arguments(
    config: type[Config],
    arguments: Sequence[str],
    *,
    command: str,
    about: str,
    examples: str,
    resumable: bool = False,
    kind: str = "",
) -> tuple[Config, dict[str, Any]]:
    """Configuration and further options (`progress`, and `resume` for commands that can) of a command line.

    Prints the help and exits with code 0 when asked to; `kind` is of the packaged configurations that --config names.

    Raises:
        NsrlError: unknown key, wrong type, value out of range, unreadable YAML.
    """
    options = "[--resume FOLDER] " if resumable else ""
    parser = build_parser(
        config,
        prog=f"nsrl {command}",
        usage=f"nsrl {command} [--config FILE|NAME] {options}[--KEY VALUE ...]",
        description=about,
        epilog=f"examples:\n{examples}",
    )
    parser.add_argument("--progress", type=bool, default=True, help="show how far it is")
    extra = ["progress"]
    if resumable:
        parser.add_argument(
            "--resume",
            type=str,
            default=None,
            metavar="FOLDER",
            help="go on with an interrupted run; everything else comes from its folder",
        )
        extra.append("resume")
    return parse(config, arguments, parser, extra, kind)


def run_training(
    command: str,
    config: Any,
    options: dict[str, Any],
    start: Callable[..., Outcome | None],
    resume: Callable[..., Outcome | None],
) -> tuple[Outcome | None, int]:
    """Start or resume a run; the outcome (None if interrupted, or another process's) and the exit code.

    Raises:
        NsrlError: --resume has other options beside it, or as `start` and `resume`.
    """
    from nsrl.runs.training import Interrupted, use_one_thread

    use_one_thread()
    try:
        if options["resume"] is None:
            return start(config, progress=options["progress"]), 0
        trust = {"trust": config.trust} if hasattr(config, "trust") else {}
        if config != type(config)(**trust):
            raise NsrlError("--resume takes everything from the run's folder; leave the other options out")
        return resume(options["resume"], progress=options["progress"], **trust), 0
    except Interrupted as stop:
        return None, interrupted(command, stop)


def interrupted(command: str, stop: Interrupted) -> int:
    """Say how to go on; returns the exit code."""
    print(f"nsrl: interrupted; go on with: nsrl {command} --resume {stop.folder}", file=sys.stderr)
    return stop.exit_status


def print_outcome(outcome: Outcome, table: Table) -> None:
    """The final table, and where everything lies."""
    from nsrl.runs.report import duration

    print_table(table)
    folder = outcome.folder
    print(f"wall time    {duration(outcome.metrics['wall_seconds'])}")
    print(f"agent        {folder.agent}")
    print(f"report       {folder.report}")
    print(f"TensorBoard  tensorboard --logdir {folder.tensorboard}")


def print_table(table: Table) -> None:
    """Print a table; without a terminal it is as wide as it needs to be."""
    from rich.console import Console
    from rich.table import Table as Drawn

    drawn = Drawn(show_edge=False, pad_edge=False)  # the comparison of methods is 98 columns wide
    for position, title in enumerate(table.head):
        drawn.add_column(title, justify="left" if position == 0 else "right")
    for row in table.rows:
        drawn.add_row(*row)
    console = Console(highlight=False)
    if not console.is_terminal:  # rich assumes 80 columns there, which would break cells
        console = Console(highlight=False, width=WIDTH)
    if table.title:  # rich would break a title to the width of the columns
        console.print(table.title, style="bold")
    console.print(drawn)
