"""Texts of a file that a user has, one on every line."""

from __future__ import annotations

from nsrl.errors import NsrlError
from nsrl.files import given_path
from nsrl.reading.limits import Unreadable, read_text

#: Bytes of a file of texts.
TEXTS = 2**30


def read_texts(name: str) -> list[str]:
    """The lines of a text file that are not empty.

    Raises:
        NsrlError: it cannot be read, or holds none.
    """
    path = given_path(name)
    try:
        lines = read_text(path, TEXTS).splitlines()
    except (OSError, UnicodeDecodeError, Unreadable) as error:
        raise NsrlError(f"cannot read the texts of {name}: {error}; give a text file with one on every line") from error
    found = [line for line in lines if line.strip()]
    if not found:
        raise NsrlError(f"{name} holds no texts; give a text file with one on every line")
    return found
