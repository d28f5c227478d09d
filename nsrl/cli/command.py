"""What the commands share: reading their arguments, and drawing tables."""

from __future__ import annotations

import sys
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

from nsrl.bench.settings import Config, build_parser, parse

if TYPE_CHECKING:
    from nsrl.bench.report import Table

WIDTH = 100


def read_arguments(
    config: type[Config], arguments: Sequence[str], *, command: str, about: str, examples: str, resumable: bool = False
) -> tuple[Config, dict[str, Any]]:
    """Configuration and further options (`progress`, and `resume` for commands that can) of a command line.

    Prints the help and exits with code 0 when asked to.

    Raises:
        NsrlError: unknown key, wrong type, value out of range, unreadable YAML.
    """
    options = "[--resume FOLDER] " if resumable else ""
    parser = build_parser(
        config,
        prog=f"nsrl {command}",
        usage=f"nsrl {command} [--config FILE.yaml] {options}[--KEY VALUE ...]",
        description=about,
        epilog=f"examples:\n{examples}",
    )
    parser.add_argument("--progress", type=bool, default=sys.stderr.isatty(), help="show a progress bar")
    extra = ["progress"]
    if resumable:
        parser.add_argument("--resume", type=str, default=None, metavar="FOLDER",
                            help="go on with an interrupted run; everything else comes from its folder")  # fmt: skip
        extra.append("resume")
    return parse(config, arguments, parser, extra)


def print_table(table: Table) -> None:
    """Print a table with rich; it stays within 100 columns."""
    from rich.console import Console
    from rich.table import Table as Drawn

    drawn = Drawn(title=table.title, title_justify="left", title_style="bold")
    for position, title in enumerate(table.head):
        drawn.add_column(title, justify="left" if position == 0 else "right", no_wrap=True)
    for row in table.rows:
        drawn.add_row(*row)
    console = Console(highlight=False)
    # In a pipe rich assumes 80 columns, which would cut cells off.
    Console(highlight=False, width=max(console.width, WIDTH) if not console.is_terminal else None).print(drawn)
