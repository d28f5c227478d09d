"""A checkpoint on disk: a zip of JSON and tensors, replaced as a whole or not at all."""

from __future__ import annotations

import contextlib
import io
import json
import os
import zipfile
from pathlib import Path
from typing import Any

import torch

from nsrl.errors import NsrlError
from nsrl.reading.documents import parse_json
from nsrl.reading.limits import JSON, OF_WEIGHTS, Unreadable, opened
from nsrl.reading.tensors import read_tensors
from nsrl.reading.values import mapping, whole
from nsrl.reading.zips import opened_zip

FORMAT = 1
PARTS = ("format", "run", "spaces", "counters", "episodes", "generators", "statistics", "retention", "history")
TENSORS = ("modules", "retention", "generators")


def write_checkpoint(path: Path, state: dict[str, Any], tensors: dict[str, Any]) -> Path:
    """Write a checkpoint; a file that is there survives until the new one is complete.

    Raises:
        NsrlError: when the file cannot be written.
    """
    # one name for all attempts, so that what a killed process leaves behind is overwritten by the next one
    temporary = path.with_name(f".{path.name}.tmp")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        with temporary.open("wb") as file:
            with zipfile.ZipFile(file, "w") as archive:
                archive.writestr("state.json", json.dumps(state))
                stream = io.BytesIO()
                torch.save(tensors, stream)
                archive.writestr("tensors.pt", stream.getvalue())
            file.flush()
            os.fsync(file.fileno())
        os.replace(temporary, path)
        with contextlib.suppress(OSError):  # the new name survives a power cut only once the folder is synced
            folder = os.open(path.parent, os.O_RDONLY)
            try:
                os.fsync(folder)
            finally:
                os.close(folder)
    except OSError as error:
        raise NsrlError(f"cannot write the checkpoint {path}: {error.strerror or error}") from error
    finally:
        temporary.unlink(missing_ok=True)
    return path


def read_checkpoint(path: Path) -> tuple[dict[str, Any], dict[str, Any]]:
    """The state and the tensors of a checkpoint; no object in it is ever unpickled.

    Raises:
        NsrlError: missing, truncated or damaged file, or another format.
    """
    try:
        with opened(path) as file, opened_zip(file, OF_WEIGHTS) as members:
            text, stored = members.read("state.json", JSON), members.read("tensors.pt")
        state = mapping(parse_json(text), "its state", PARTS)
        version = whole(state["format"], "its format")
        if version == FORMAT:
            return state, mapping(read_tensors(stored), "its tensors", TENSORS, ())
    except FileNotFoundError as error:
        raise NsrlError(f"no checkpoint at {path}; there is nothing to resume, start the run without") from error
    except OSError as error:
        raise NsrlError(f"cannot read the checkpoint {path}: {error.strerror or error}") from error
    except Unreadable as error:
        raise NsrlError(f"{path} is truncated or damaged ({error}); start the run anew") from error
    raise NsrlError(f"{path} has checkpoint format {version} and this nsrl reads {FORMAT}; use the nsrl that wrote it")
