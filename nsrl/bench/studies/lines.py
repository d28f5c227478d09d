"""Runs of a study as lines of JSON: what is there is not run again.

`nsrl.files` has the lines of one run, measurements by timestep; these here hold whole runs, curves and settings.
"""

from __future__ import annotations

import json
from functools import partial
from pathlib import Path
from typing import Any

from nsrl.errors import NsrlError
from nsrl.reading.documents import Results, parse_json
from nsrl.reading.limits import JSON, Unreadable, about, read_bytes


def read_runs(path: Path) -> list[dict[str, Any]]:
    """The runs of a file; a line that a crash cut short is left out, and its run is made again.

    Raises:
        NsrlError: it cannot be read, is beyond the limits of `nsrl.reading`, or a line is no run.
    """
    rows: list[dict[str, Any]] = []
    try:
        content = read_bytes(path, JSON).decode("utf-8", "replace")
    except FileNotFoundError:
        return rows
    except OSError as error:
        raise NsrlError(f"cannot read {path}: {error.strerror or error}") from error
    except Unreadable as error:
        raise NsrlError(f"{about(path, error)}; remove it, or name another folder") from error
    for number, line in enumerate(content.splitlines(), start=1):
        try:
            row = parse_json(line, partial(Results.of, path))
        except Unreadable:
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
        raise NsrlError(f"cannot write {path}: {error.strerror or error}") from error
