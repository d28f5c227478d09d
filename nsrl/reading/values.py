"""Checks of single values that a file gave: each returns the value, or says what is wrong with it."""

from __future__ import annotations

import math
from collections.abc import Iterable
from typing import Any

import numpy as np

from nsrl.reading.limits import Unreadable, shown


def whole(value: Any, what: str, low: int = 0, high: int = 2**53) -> int:
    """A whole number from `low` to `high`.

    Raises:
        Unreadable: it is none.
    """
    if type(value) is not int or not low <= value <= high:
        raise Unreadable(f"{what} is {shown(value)}, but must be a whole number from {low} to {high}")
    return value


def finite(value: Any, what: str, low: float = -math.inf) -> float:
    """A finite number of at least `low`.

    Raises:
        Unreadable: it is none.
    """
    if type(value) not in (int, float) or not (abs(value) < 1e300 and value >= low):
        least = f" of at least {low}" if low > -math.inf else ""
        raise Unreadable(f"{what} is {shown(value)}, but must be a finite number{least}")
    return float(value)


def mapping(value: Any, what: str, keys: Iterable[str] = (), optional: Iterable[str] | None = None) -> dict[str, Any]:
    """A mapping with text as keys.

    Args:
        value: it.
        what: it is, for the sentence.
        keys: that it must have.
        optional: further ones that it may have; None lets it have any.

    Raises:
        Unreadable: it is none, or has other keys.
    """
    if type(value) is not dict or any(type(key) is not str for key in value):
        raise Unreadable(f"{what} is {shown(value)}, but must hold names and values")
    keys = set(keys)
    missing = keys - value.keys()
    unknown = set() if optional is None else value.keys() - keys - set(optional)
    if missing or unknown:
        raise Unreadable(f"{what} {'lacks' if missing else 'has the unknown entry'} {shown(min(missing or unknown))}")
    return value


def items(value: Any, what: str, count: int | None = None) -> list[Any]:
    """A list, of `count` entries where that is given.

    Raises:
        Unreadable: it is none, or has another length.
    """
    if type(value) is not list or (count is not None and len(value) != count):
        length = "" if count is None else f" of {count} entries"
        raise Unreadable(f"{what} is {shown(value)}, but must be a list{length}")
    return value


def numbers(value: Any, what: str, shape: tuple[int, ...]) -> np.ndarray:
    """Finite numbers in nested lists, as an array of this shape, (...,), float64."""
    flat = [value]
    for size in shape:
        flat = [entry for part in flat for entry in items(part, what, size)]
    return np.array([finite(entry, what) for entry in flat], dtype=np.float64).reshape(shape)
