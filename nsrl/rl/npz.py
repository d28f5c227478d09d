"""Named arrays and a JSON header in one npz file: written atomically, never pickled."""

from __future__ import annotations

import json
import os
import zipfile
import zlib
from pathlib import Path
from typing import Any

import numpy as np

from nsrl.errors import NsrlError
from nsrl.rl.archive import written_atomically

# What NumPy, zipfile and zlib raise on files that are damaged, encrypted or something else altogether.
UNREADABLE: tuple[type[Exception], ...] = (
    OSError,
    ValueError,
    KeyError,
    EOFError,
    TypeError,
    AttributeError,
    MemoryError,
    RuntimeError,
)
UNREADABLE += (SyntaxError, zipfile.BadZipFile, zlib.error)


def write_npz(
    path: str | os.PathLike[str], arrays: dict[str, np.ndarray], header: dict[str, Any], version: int
) -> Path:
    """Write a compressed npz; a file that is there survives until the new one is whole.

    Raises:
        NsrlError: when the file cannot be written.
    """
    text = np.frombuffer(json.dumps(header).encode(), dtype=np.uint8)
    with written_atomically(Path(path)) as temporary, temporary.open("wb") as file:
        np.savez_compressed(file, format=np.int64(version), header=text, **arrays)  # type: ignore[arg-type]
    return Path(path)


def read_npz(path: str | os.PathLike[str], version: int) -> tuple[dict[str, np.ndarray], dict[str, Any]]:
    """Arrays and header of a file that `write_npz` wrote, of this version or older; nothing is unpickled.

    Raises:
        NsrlError: naming the file, and the key where one is at fault.
    """
    if not os.path.isfile(path):
        raise NsrlError(f"{path}: there is no such file; give the path of a file that was saved before")
    key, arrays = "", {}
    try:
        with open(path, "rb") as content, np.load(content, allow_pickle=False) as file:
            for key in file.files:
                arrays[key] = file[key]
    except UNREADABLE as error:
        raise NsrlError(
            f"{path}: {f'key {key!r}' if key else 'the file'} is damaged or not in npz format without pickles"
            "; make the file again"
        ) from error
    for key in ("format", "header"):
        if key not in arrays:
            raise NsrlError(f"{path}: key {key!r} is missing; make the file again")
    found, text = arrays.pop("format"), arrays.pop("header")
    if not isinstance(found, np.ndarray) or found.shape != () or found.dtype.kind not in "iu" or found < 1:
        raise NsrlError(f"{path}: key 'format' is not a version number; make the file again")
    if found > version:
        raise NsrlError(f"{path}: format {found} is newer than this nsrl knows ({version}); upgrade nsrl")
    try:
        header = json.loads(text.tobytes() if text.dtype == np.uint8 else b"")
        if not isinstance(header, dict):
            raise ValueError("not an object")
    except (ValueError, AttributeError, RecursionError) as error:
        raise NsrlError(f"{path}: key 'header' is not JSON text; make the file again") from error
    return arrays, header
