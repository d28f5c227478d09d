"""Runs of a study as lines of JSON: what is there is not run again.

`nsrl.files` has the lines of one run, measurements by timestep; these here hold whole runs, curves and settings.
"""

from __future__ import annotations

import json
from contextlib import suppress
from pathlib import Path
from typing import Any

from nsrl.errors import NsrlError


def read_runs(path: Path) -> list[dict[str, Any]]:
    """The runs of a file; a line that a crash cut short is left out, and its run is made again."""
    rows = []
    for line in path.read_text(encoding="utf-8").splitlines() if path.is_file() else ():
        with suppress(json.JSONDecodeError):
            rows.append(json.loads(line))
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
