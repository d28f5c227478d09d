"""The one exception that means bad input, told in a sentence; what was given, and names near to a mistyped one."""

from __future__ import annotations

import os
from collections.abc import Iterable, Mapping
from numbers import Integral, Real
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


def check_kind(name: str, value: Any, kinds: type | tuple[type, ...], expected: str) -> None:
    """Raise NsrlError unless an argument is of some kind.

    Args:
        name: of the argument.
        value: what was given.
        kinds: classes, one of which it has to be an instance of.
        expected: the kinds in words, for the sentence.
    """
    if not isinstance(value, kinds):
        raise NsrlError(f"{name} is {described(value)}, but must be {expected}")


def check_path(name: str, value: Any) -> None:
    """Raise NsrlError unless an argument can be a path; nothing need be there."""
    check_kind(name, value, (str, os.PathLike), "a path")


def check_whole(name: str, value: Any, least: int | None = None) -> None:
    """Raise NsrlError unless an argument is a whole number, numpy's too, of at least `least`; True is none."""
    if isinstance(value, bool) or not isinstance(value, Integral) or (least is not None and value < least):
        smallest = "" if least is None else f" of at least {least}"
        raise NsrlError(f"{name} is {described(value)}, but must be a whole number{smallest}")


def check_number(name: str, value: Any) -> None:
    """Raise NsrlError unless an argument is a number, numpy's too; True is none."""
    if isinstance(value, bool) or not isinstance(value, Real):
        raise NsrlError(f"{name} is {described(value)}, but must be a number")


def check_annotated(values: Mapping[str, Any], annotations: Mapping[str, Any]) -> None:
    """Raise NsrlError unless values are of the kinds that annotations of plain data say.

    Args:
        values: by name.
        annotations: their texts by name, of `int`, `float`, `str`, `bool`, `dict[...]` and `None`, joined by |.
    """
    for name, value in values.items():
        kinds = [kind.strip() for kind in str(annotations[name]).split("|")]
        if (value is None and "None" in kinds) or (isinstance(value, str) and "str" in kinds):
            continue
        if "bool" in kinds:
            check_kind(name, value, bool, "true or false")
        elif "float" in kinds:
            check_number(name, value)
        elif "int" in kinds:
            check_whole(name, value)
        elif "str" in kinds:
            check_kind(name, value, str, "a text")
        else:
            check_kind(name, value, dict, "a mapping")


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
