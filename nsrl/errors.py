"""The one exception that means bad input, told in a sentence; and the nearest name to a mistyped one."""

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
    from difflib import get_close_matches

    found = get_close_matches(name, list(known), 1, cutoff)
    return found[0] if found else None
