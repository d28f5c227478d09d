"""The one exception that means bad input, told in a sentence; and the names nearest to a mistyped one."""

from __future__ import annotations

from collections.abc import Iterable


class NsrlError(ValueError):
    """Bad input, told in one sentence: what was wrong, what was expected, what to do.

    The command line prints the sentence on stderr and exits with code 2; nothing is written or lost.
    """


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
