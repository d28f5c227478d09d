"""The one exception that means bad input, told in a sentence; what was given, and names near to a mistyped one."""

from __future__ import annotations

import os
from collections.abc import Iterable
from typing import Any


class NsrlError(ValueError):
    """Bad input, told in one sentence: what was wrong, what was expected, what to do.

    The command line prints the sentence on stderr and exits with code 2; nothing is written or lost.
    """


def described(value: Any) -> str:
    """What an argument is, fit for a sentence: numbers and texts as they are, all else by its class."""
    if value is None or isinstance(value, bool | float):
        return repr(value)
    if isinstance(value, int):
        return str(value) if value.bit_length() <= 200 else f"a whole number of {value.bit_length()} bits"
    if isinstance(value, str | os.PathLike):
        text = str(value)
        return repr(text if len(text) <= 80 else f"{text[:77]}...")
    if isinstance(value, type):
        return f"the class {value.__name__} itself"
    name = type(value).__name__
    return f"{'an' if name[:1].lower() in 'aeiou' else 'a'} {name}"


def nearest(name: str, known: Iterable[str], cutoff: float = 0.6) -> str | None:
    """The known name that a mistyped one is closest to, for "did you mean ..."; None where none is close.

    Args:
        name: as it was given.
        known: the names that there are.
        cutoff: similarity from 0 to 1 below which a name is not close.
    """
    return next(iter(near(name, known, 1, cutoff)), None)


def near(name: str, known: Iterable[str], count: int, cutoff: float = 0.6) -> list[str]:
    """As `nearest`, at most `count` names, the most similar first."""
    from difflib import get_close_matches

    return get_close_matches(name, list(known), count, cutoff)
