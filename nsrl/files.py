"""Files written whole or not at all: text, JSON, JSON lines, and arrays in an npz without pickles."""

from __future__ import annotations

import errno
import json
import os
import re
import secrets
import stat
from collections.abc import Iterable, Iterator
from contextlib import contextmanager, suppress
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np

from nsrl.errors import NsrlError
from nsrl.reading.arrays import read_arrays
from nsrl.reading.documents import Results, parse_json, read_results
from nsrl.reading.limits import ELEMENTS, JSON, OF_OBSERVATIONS, Unreadable, about, opened, read_bytes, shown
from nsrl.reading.values import mapping, whole
from nsrl.versions import VERSION, Format

NUMBERS = (bool, int, float)


def write_npz(
    path: str | os.PathLike[str], arrays: dict[str, np.ndarray], header: dict[str, Any], version: int
) -> Path:
    """Write an npz, compressed as far as `read_npz` follows; a file that is there survives until the new one is whole.

    Raises:
        NsrlError: when the file cannot be written.
    """
    text = np.frombuffer(json.dumps({"nsrl": VERSION, **header}).encode(), dtype=np.uint8)
    content: dict[str, np.ndarray] = {"format": np.asarray(np.int64(version)), "header": text, **arrays}
    whole = sum(array.nbytes + 256 for array in content.values())  # with a header each
    with written_atomically(Path(path)) as temporary, temporary.open("wb") as file:
        np.savez_compressed(file, **content)  # type: ignore[arg-type]
        if whole > OF_OBSERVATIONS.allowed(file.tell()):  # empty boards, say: no reader tells them from a bomb
            file.seek(0)
            np.savez(file, **content)  # type: ignore[arg-type]
    return Path(path)


def read_npz(path: str | os.PathLike[str], form: Format) -> tuple[dict[str, np.ndarray], dict[str, Any]]:
    """Arrays and header of a file that `write_npz` wrote, of this format or an older one; nothing is unpickled.

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
    for key in ("format", "header"):  # of every version
        if key not in arrays:
            raise NsrlError(f"{path}: key {key!r} is missing; make the file again")
    found, text = arrays.pop("format"), arrays.pop("header")
    if not isinstance(found, np.ndarray) or found.shape != () or found.dtype.kind not in "iu" or found < 1:
        raise NsrlError(f"{path}: key 'format' is not a version number; make the file again")
    try:
        header = mapping(parse_json(text.tobytes() if text.dtype == np.uint8 else b""), "it")
        form.check(path, int(found), header.get("nsrl"))
        return arrays, header
    except Unreadable as error:
        raise NsrlError(f"{path}: key 'header' is not JSON text of an object ({error}); make the file again") from error


#: File in a folder that says which format the others have.
STAMP = "format.json"


def write_stamp(folder: Path, form: Format) -> None:
    """Write into a folder which format its files have, and which nsrl writes them."""
    write_json(folder / STAMP, {"format": form.newest, "nsrl": VERSION})


def check_stamp(folder: Path, form: Format) -> None:
    """Raise NsrlError where a folder is of a newer nsrl; one without a stamp has format 1.

    Raises:
        NsrlError: the sentence names the nsrl that is needed; or the stamp is damaged.
    """
    path = folder / STAMP
    if path.exists():
        stamp = read_results(path)
        try:
            version = whole(stamp["format"], "its format", 1)
        except Unreadable as error:
            raise NsrlError(f"{about(path, error)}; run it again") from error
        form.check(folder, version, stamp.get("nsrl"))


#: What to do where a run's output cannot be written.
ELSEWHERE = "; make room or choose another --out"
#: What a full disk, a spent quota or a limit on the size of files answer.
NO_ROOM = tuple(getattr(errno, name) for name in ("ENOSPC", "EDQUOT", "EFBIG") if hasattr(errno, name))


class NoRoom(NsrlError):
    """A file could not be written for want of room; whoever knows what it belongs to says how to go on."""


def unwritable(path: str | os.PathLike[str], error: OSError, hint: str = "") -> NsrlError:
    """The error to raise where a file cannot be written.

    Args:
        path: of the file.
        error: what the system said.
        hint: what to do, behind the reason.
    """
    kind = NoRoom if error.errno in NO_ROOM else NsrlError
    return kind(f"cannot write {path}: {error.strerror or error}{hint}")


def write_text(path: Path, text: str) -> None:
    """Write a file whole or not at all.

    Raises:
        NsrlError: it cannot be written.
    """
    with written_atomically(path, ELSEWHERE) as temporary:
        temporary.write_text(text, encoding="utf-8")


def write_json(path: Path, values: Any) -> None:
    """Write JSON, whole or not at all; NaN, which JSON does not have, becomes null."""
    write_text(path, json.dumps(finite_json(values), indent=2, allow_nan=False) + "\n")


def parsed_lines(path: Path, remedy: str = "remove it") -> Iterator[tuple[int, Any]]:
    """Number and content of every line of a JSON-lines file: `Unreadable` where it is none; nothing without a file.

    Args:
        path: the file.
        remedy: what to do about one that is beyond the limits.

    Raises:
        NsrlError: it is beyond the limits of `nsrl.reading`, or cannot be read.
    """
    try:
        content = read_bytes(path, JSON).decode("utf-8", "replace")
    except FileNotFoundError:
        return
    except OSError as error:
        raise NsrlError(f"cannot read {path}: {error.strerror or error}") from error
    except Unreadable as error:
        raise NsrlError(f"{about(path, error)}; {remedy}") from error
    for number, line in enumerate(content.splitlines(), start=1):
        try:
            yield number, parse_json(line, partial(Results.of, path))
        except Unreadable as error:
            yield number, error


def read_lines(path: Path) -> list[dict[str, Any]]:
    """The objects of a JSON-lines file; what follows a line that a crash cut short is left out.

    Raises:
        NsrlError: it is beyond the limits of `nsrl.reading`, or cannot be read.
    """
    rows: list[dict[str, Any]] = []
    for number, row in parsed_lines(path):
        if isinstance(row, Unreadable):
            break
        measured = isinstance(row, Results) and all(value is None or type(value) in NUMBERS for value in row.values())
        # The step is what rows are compared by.
        measured = measured and type(row.get("timesteps", 0)) is int and row.get("timesteps", 0) >= 0
        if not measured or number > ELEMENTS // 10:
            raise NsrlError(f"line {number} of {path} is no measurement; remove it from there on")
        rows.append(row)
    return rows


def write_lines(path: Path, rows: Iterable[dict[str, Any]]) -> None:
    """Replace a JSON-lines file."""
    write_text(path, "".join(json.dumps(finite_json(row)) + "\n" for row in rows))


def append_line(path: Path, row: dict[str, Any]) -> None:
    """Add one object to a JSON-lines file.

    Raises:
        NsrlError: it cannot be written.
    """
    try:
        with path.open("a", encoding="utf-8") as file:
            file.write(json.dumps(finite_json(row)) + "\n")
    except OSError as error:
        raise unwritable(path, error) from error


def finite_json(value: Any) -> Any:
    """Plain JSON of nested values and NumPy numbers: NaN and infinity, which JSON does not have, become null."""
    if isinstance(value, dict):
        return {key: finite_json(entry) for key, entry in value.items()}
    if isinstance(value, list | tuple):
        return [finite_json(entry) for entry in value]
    if hasattr(value, "item"):
        value = value.item()
    return None if isinstance(value, float) and value - value != 0.0 else value


#: Names of what `written_atomically` has not finished, or of what a process that was killed has left.
TEMPORARY = re.compile(r"\..+\.[0-9]+-[0-9a-f]{8}(\.[^.]*)?")


def given_path(path: str | os.PathLike[str]) -> Path:
    """A path that somebody gave, ~ resolved; nothing need be there.

    Raises:
        NsrlError: no file can have this name, or it may not be looked at.
    """
    told = shown(os.fspath(path), 200)
    try:
        found = Path(path).expanduser()
        if stat.S_ISDIR(os.stat(found).st_mode):
            os.scandir(found).close()
    except (FileNotFoundError, NotADirectoryError):
        return found
    except RuntimeError as error:
        raise NsrlError(f"{told}: there is no such user; give the folder itself instead of ~") from error
    except ValueError as error:
        raise NsrlError(f"{told!r} is no path: {error}") from error
    except OSError as error:
        raise NsrlError(f"cannot look at {told}: {error.strerror or error}") from error
    return found


@contextmanager
def written_atomically(path: str | Path, hint: str = "", durable: bool = False) -> Iterator[Path]:
    """A temporary path beside `path` that takes its place when the block ends without an exception.

    Args:
        path: of the file; its suffix is that of the temporary path, too.
        hint: what to do where it cannot be written, behind the reason.
        durable: have it on the disk before it takes its place, so that a power cut leaves one of the two. One process
            writes such a file, under one temporary name: what a killed one left there is overwritten by the next.

    Raises:
        NsrlError: it cannot be written.
    """
    path = Path(path)
    if not path.name:
        raise NsrlError(f"cannot write {str(path)!r}: it names no file; give a path with a name at its end")
    mark = "tmp" if durable else f"{os.getpid()}-{secrets.token_hex(4)}"
    temporary = path.with_name(f".{path.stem}.{mark}{path.suffix}")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        yield temporary
        if durable:
            _flush(temporary, os.O_RDWR)
        temporary.replace(path)
        if durable:
            with suppress(OSError):  # the new name is on the disk only once the folder is
                _flush(path.parent, os.O_RDONLY)
    except OSError as error:
        raise unwritable(path, error, hint) from error
    finally:
        with suppress(OSError):
            temporary.unlink()


def remove_temporaries(folder: Path) -> None:
    """Remove what killed processes have left half written in a folder in which nobody else writes now."""
    for path in folder.iterdir():
        if TEMPORARY.fullmatch(path.name):
            with suppress(OSError):
                path.unlink()


def _flush(path: Path, mode: int) -> None:
    """Have a file or a folder on the disk."""
    descriptor = os.open(path, mode)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
