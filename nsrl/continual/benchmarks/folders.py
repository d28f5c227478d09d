"""Where the user's data lie, and what to say when they do not."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from nsrl.continual.config import BenchmarkSettings
from nsrl.errors import NsrlError
from nsrl.files import given_path


def find_folder(settings: BenchmarkSettings, title: str, wanted: str, inside: Sequence[str], mark: str) -> Path:
    """The folder that holds a data set.

    Args:
        settings: whose `data` is the folder, or one above it.
        title: of the data set.
        wanted: what to download, for the sentence.
        inside: folders below `data` to look in, "" for itself.
        mark: a file or folder that must be there (with .gz or without).

    Raises:
        NsrlError: there is none; says what to download and where to put it.
    """
    default = f"data/{title.lower().replace('-', '')}"
    given = given_path(settings.data or default)
    for part in inside:
        if (given / part / mark).exists() or (given / part / f"{mark}.gz").exists():
            return given / part
    place = f"in {given}" if settings.data else f"in {given}, and no other folder is named by --benchmark.data"
    raise NsrlError(f"there is no {title} {place}: download {wanted}, unpack it there, or name its folder")
