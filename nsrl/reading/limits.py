"""How much a file may ask for, and how its text is shown: the bounds that hold before anything is allocated.

They follow from what a file costs a reader in the worst case (a Python object takes up to some 200 bytes, deflate
expands a thousandfold) and lie a hundred times above what the agents, buffers and runs seen so far need.
"""

from __future__ import annotations

import os
import reprlib
import stat
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any, BinaryIO

from nsrl.errors import NsrlError

MIB = 2**20
#: Lists, mappings and their entries in one document; opcodes of one pickle, which take some microseconds each.
ELEMENTS = 10**6
OPCODES = ELEMENTS // 2
#: Lists and mappings inside each other.
DEPTH = 100
#: Bytes of a JSON text. Agents hold the last observations of all environments in theirs.
JSON = 64 * MIB
#: Bytes of a YAML text, and its entries as often as aliases repeat them. Configurations are some kilobytes long.
YAML = MIB // 4
NODES = 20_000
#: Bytes of observation statistics.
STATISTICS = 64 * MIB
#: Digits of a whole number: the states of random generators have 39.
DIGITS = 50


class Unreadable(NsrlError):
    """Why a file is not read: half a sentence, which whoever knows the file completes."""


@dataclass(frozen=True)
class Expansion:
    """How much the members of a zip may come to, unpacked.

    Attributes:
        least: bytes that any file may come to.
        ratio: for larger ones, bytes a byte of the file.
    """

    least: int
    ratio: int

    def allowed(self, size: int) -> int:
        """Bytes that a file of `size` bytes may come to."""
        return max(self.least, self.ratio * size)


#: Weights: random to a compressor, and stored uncompressed by `torch.save` and Stable-Baselines3.
OF_WEIGHTS = Expansion(64 * MIB, 4)
#: Observations: boards and dark images compress well. Deflate itself reaches 1032.
OF_OBSERVATIONS = Expansion(128 * MIB, 100)


@contextmanager
def opened(path: str | os.PathLike[str]) -> Iterator[BinaryIO]:
    """A file for reading, which has to be one: a pipe would be waited for, a device never ends.

    Raises:
        OSError: it is missing or may not be read.
        Unreadable: it is a folder, a pipe or a device, or large without taking room on the disk.
    """
    # Without O_NONBLOCK the opening of a pipe waits for somebody to write into it.
    descriptor = os.open(path, os.O_RDONLY | getattr(os, "O_NONBLOCK", 0) | getattr(os, "O_BINARY", 0))
    try:
        found = os.fstat(descriptor)
        if not stat.S_ISREG(found.st_mode):
            raise Unreadable("it is no ordinary file")
        # What is allowed follows from a file's size, which holes make as large as one likes. Some file systems say 0.
        if 0 < 512 * getattr(found, "st_blocks", 0) < found.st_size // 8 and found.st_size > 64 * MIB:
            raise Unreadable("it consists of holes")
        with os.fdopen(descriptor, "rb", closefd=False) as file:
            yield file
    finally:
        os.close(descriptor)


def read_bytes(path: str | os.PathLike[str], limit: int) -> bytes:
    """The content of a file of at most `limit` bytes.

    Raises:
        OSError: it is missing or may not be read.
        Unreadable: it is larger, or no ordinary file.
    """
    with opened(path) as file:
        content = file.read(limit + 1)
    if len(content) > limit:
        raise Unreadable(f"it has more than {limit} bytes")
    return content


def read_text(path: str | os.PathLike[str], limit: int) -> str:
    """As `read_bytes`, for UTF-8.

    Raises:
        OSError, Unreadable: as there.
        UnicodeDecodeError: it is no text.
    """
    return read_bytes(path, limit).decode("utf-8")


def about(path: str | os.PathLike[str], reason: Unreadable) -> str:
    """The sentence about a file: its name, and what is wrong with it."""
    text = str(reason)
    return f"{path} {text[3:]}" if text.startswith("it ") else f"{path}: {text}"


def shown(value: Any, length: int = 60) -> str:
    """What a file says, fit for a sentence: at most `length` characters, none of which a terminal would obey."""
    text = value[: length + 1] if isinstance(value, str) else _BRIEF.repr(value)
    text = "".join(sign if sign.isprintable() else "?" for sign in text)
    return text if len(text) <= length else f"{text[: length - 3]}..."


class _Brief(reprlib.Repr):
    """A repr that takes no longer for a large value than for a small one."""

    def repr_int(self, value: int, level: int) -> str:
        # Python takes quadratic time for the digits, and refuses from some thousand of them on.
        return repr(value) if value.bit_length() <= 400 else f"a whole number of {value.bit_length()} bits"

    def repr_instance(self, value: Any, level: int) -> str:
        return repr(value) if isinstance(value, float | bool | None) else f"a {type(value).__name__}"

    def repr_dict(self, value: Any, level: int) -> str:  # the inherited one sorts all keys
        return super().repr_dict(value, level) if len(value) <= self.maxdict else f"{len(value)} keys and values"


_BRIEF = _Brief()
_BRIEF.maxlevel = 2
