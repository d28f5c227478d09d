"""One process at a time in a folder: a lock that the system takes back when its holder ends, however it ends."""

from __future__ import annotations

import errno
import os
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

from nsrl.errors import NsrlError
from nsrl.files import NO_ROOM, NoRoom, unwritable

try:
    import fcntl
except ImportError:  # Windows
    fcntl = None  # type: ignore[assignment]

#: The file that is locked; it holds the number of the process, and goes with the lock.
LOCK = ".lock"
#: Seconds between looks at a lock that is held.
LOOK = 0.1
#: What file systems without locks answer: a run there is as safe as without this file.
WITHOUT = (errno.ENOLCK, errno.ENOSYS, errno.EOPNOTSUPP, errno.EBADF)


@contextmanager
def locked(folder: Path, patience: float = 0.0) -> Iterator[None]:
    """Within the block no other process holds this folder.

    Args:
        folder: it must be there.
        patience: seconds to wait for another process to end.

    Raises:
        NsrlError: another process holds it, by its number; or nothing can be written there.
    """
    path = folder / LOCK
    descriptor = _acquire(path, time.monotonic() + patience)
    try:
        yield
    finally:
        # Removed before it is let go: whoever waits finds that its file is no longer the one of this name.
        with suppress(OSError):
            path.unlink()
        os.close(descriptor)


@contextmanager
def alone_in(folder: Path) -> Iterator[None]:
    """As `locked`, for a folder that may not be there yet; where nothing was put into it, it goes again.

    Raises:
        NsrlError: as there; or it cannot be made.
    """
    new: list[Path] = []
    try:
        try:
            new = [path for path in (folder, *folder.parents) if not os.path.lexists(path)]
            folder.mkdir(parents=True, exist_ok=True)
        except OSError as error:
            kind = NoRoom if error.errno in NO_ROOM else NsrlError
            raise kind(
                f"cannot make the output folder {folder}: {error.strerror or error}; choose another --out"
            ) from error
        with locked(folder):
            yield
    finally:
        for path in new:
            with suppress(OSError):  # it is not empty, or was never made
                path.rmdir()


def _acquire(path: Path, deadline: float) -> int:
    while True:
        try:
            descriptor = os.open(path, os.O_RDWR | os.O_CREAT | getattr(os, "O_NOFOLLOW", 0), 0o644)
        except OSError as error:
            raise unwritable(f"into {path.parent}", error) from error
        try:
            if not _is_locked_elsewhere(descriptor):
                if _is_file_of(descriptor, path):
                    with suppress(OSError):  # the number is for people
                        os.ftruncate(descriptor, 0)
                        os.write(descriptor, str(os.getpid()).encode())
                    return descriptor
            elif time.monotonic() >= deadline:
                number = os.read(descriptor, 20).decode("ascii", "replace")
                holder = f"process {number}" if number.isdecimal() else "another process"
                raise NsrlError(f"{path.parent} is in use by {holder}; wait until that has ended, or stop it")
            else:
                time.sleep(LOOK)
        except BaseException:
            os.close(descriptor)
            raise
        os.close(descriptor)


def _is_locked_elsewhere(descriptor: int) -> bool:
    """Take the lock if it is free; whether another process has it."""
    if fcntl is None:
        return False
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except OSError as error:
        if error.errno in WITHOUT:
            return False
        if error.errno in (errno.EWOULDBLOCK, errno.EACCES):
            return True
        raise
    return False


def _is_file_of(descriptor: int, path: Path) -> bool:
    """Whether an open file is still the one under its name."""
    try:
        return os.path.samestat(os.fstat(descriptor), os.stat(path, follow_symlinks=False))
    except OSError:
        return False
