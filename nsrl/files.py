"""Named arrays and a JSON header in one npz file: written atomically, never pickled."""

from __future__ import annotations

import json
import os
from pathlib import Path
from typing import Any

import numpy as np

from nsrl.errors import NsrlError
from nsrl.reading.arrays import read_arrays
from nsrl.reading.documents import parse_json
from nsrl.reading.limits import OF_OBSERVATIONS, Unreadable, opened
from nsrl.reading.values import mapping
from nsrl.rl.agents.archive import written_atomically


def write_npz(
    path: str | os.PathLike[str], arrays: dict[str, np.ndarray], header: dict[str, Any], version: int
) -> Path:
    """Write an npz, compressed as far as `read_npz` follows; a file that is there survives until the new one is whole.

    Raises:
        NsrlError: when the file cannot be written.
    """
    text = np.frombuffer(json.dumps(header).encode(), dtype=np.uint8)
    content: dict[str, np.ndarray] = {"format": np.asarray(np.int64(version)), "header": text, **arrays}
    whole = sum(array.nbytes + 256 for array in content.values())  # with a header each
    with written_atomically(Path(path)) as temporary, temporary.open("wb") as file:
        np.savez_compressed(file, **content)  # type: ignore[arg-type]
        if whole > OF_OBSERVATIONS.allowed(file.tell()):  # empty boards, say: no reader tells them from a bomb
            file.seek(0)
            np.savez(file, **content)  # type: ignore[arg-type]
    return Path(path)


def read_npz(path: str | os.PathLike[str], version: int) -> tuple[dict[str, np.ndarray], dict[str, Any]]:
    """Arrays and header of a file that `write_npz` wrote, of this version or older; nothing is unpickled.

    Raises:
        NsrlError: naming the file, and the key where one is at fault.
    """
    if not os.path.isfile(path):
        raise NsrlError(f"{path}: there is no such file; give the path of a file that was saved before")
    try:
        with opened(path) as content:
            arrays = read_arrays(content, OF_OBSERVATIONS)
    except OSError as error:
        raise NsrlError(f"{path} cannot be read: {error.strerror or error}") from error
    except Unreadable as error:
        raise NsrlError(f"{path}: {error}; make the file again") from error
    for key in ("format", "header"):
        if key not in arrays:
            raise NsrlError(f"{path}: key {key!r} is missing; make the file again")
    found, text = arrays.pop("format"), arrays.pop("header")
    if not isinstance(found, np.ndarray) or found.shape != () or found.dtype.kind not in "iu" or found < 1:
        raise NsrlError(f"{path}: key 'format' is not a version number; make the file again")
    if found > version:
        raise NsrlError(f"{path}: format {found} is newer than this nsrl knows ({version}); upgrade nsrl")
    try:
        return arrays, mapping(parse_json(text.tobytes() if text.dtype == np.uint8 else b""), "it")
    except Unreadable as error:
        raise NsrlError(f"{path}: key 'header' is not JSON text of an object ({error}); make the file again") from error
