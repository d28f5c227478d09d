"""Runs of a study as lines of JSON: what is there is not run again.

`nsrl.files` has the lines of one run, measurements by timestep; these here hold whole runs, curves and settings.
"""

from __future__ import annotations

import json
import time
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path
from typing import Any, Protocol, TypeVar

from nsrl.bench.suites.jobs import Status
from nsrl.errors import NsrlError
from nsrl.files import NO_ROOM, NoRoom, parsed_lines, unwritable
from nsrl.reading.documents import Results
from nsrl.reading.limits import Unreadable


class Named(Protocol):
    """A run that is planned."""

    @property
    def name(self) -> str:
        """Unique among those of a study, and the line's `cell`."""
        ...


#: What to do where a line cannot be written; those that are there stay.
AGAIN = "; make room and give the command again"

Cell = TypeVar("Cell", bound=Named)


def read_runs(path: Path) -> list[dict[str, Any]]:
    """The runs of a file; a line that a crash cut short is left out, and its run is made again.

    Raises:
        NsrlError: it cannot be read, is beyond the limits of `nsrl.reading`, or a line is no run.
    """
    rows: list[dict[str, Any]] = []
    for number, row in parsed_lines(path, "remove it, or name another folder"):
        if isinstance(row, Unreadable):
            continue
        if not isinstance(row, Results):
            raise NsrlError(f"line {number} of {path} is no run; remove it")
        rows.append(row)
    return rows


def append_run(path: Path, row: dict[str, Any]) -> None:
    """Add a run to a file.

    Raises:
        NsrlError: it cannot be written.
    """
    try:
        with path.open("a+", encoding="utf-8") as file:
            whole = file.tell() == 0 or path.read_bytes().endswith(b"\n")
            file.write(("" if whole else "\n") + json.dumps(row) + "\n")
    except OSError as error:
        raise unwritable(path, error, AGAIN) from error


def run_missing(
    cells: Sequence[Cell],
    files: Iterable[Path],
    file_of: Callable[[Cell], Path],
    run: Callable[[Sequence[Cell]], Iterable[tuple[Cell, dict[str, Any] | BaseException]]],
    on_status: Callable[[Status], Any] | None = None,
) -> dict[str, str]:
    """Run the cells that have no line yet, and write the line of each as it ends.

    Args:
        cells: all that are wanted.
        files: in which lines may be already.
        file_of: where a cell's line belongs.
        run: gives cells with their lines, or with what kept them from one, as they end.
        on_status: called after every run.

    Returns:
        Why runs came to no result, by name.

    Raises:
        NsrlError: a file cannot be read or written; or there is no room left, of which the runs to come would die, too.
    """
    start = time.monotonic()
    done = {row["cell"] for path in files for row in read_runs(path)}
    waiting = [cell for cell in cells if cell.name not in done]
    finished, failures = [cell.name for cell in cells if cell.name in done], dict[str, str]()
    for path in {file_of(cell).parent for cell in waiting}:
        try:
            path.mkdir(parents=True, exist_ok=True)
        except OSError as error:
            raise unwritable(path, error, "; choose another folder") from error
    for number, (cell, result) in enumerate(run(waiting), start=1):
        if isinstance(result, dict):
            append_run(file_of(cell), result)
            finished.append(cell.name)
        elif isinstance(result, NoRoom):
            raise result
        elif isinstance(result, OSError) and result.errno in NO_ROOM:
            raise unwritable(Path(result.filename or file_of(cell)), result, AGAIN) from result
        else:
            failures[cell.name] = str(result) if isinstance(result, NsrlError) else repr(result)
        if on_status is not None:
            seconds = time.monotonic() - start
            remaining = seconds / number * (len(waiting) - number)
            on_status(Status(len(cells), finished, [], list(failures), seconds, remaining))
    return failures
