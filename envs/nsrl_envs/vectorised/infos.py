"""What environments tell besides, handed out without copying what nobody can change."""

from __future__ import annotations

import copy
from typing import Any

import numpy as np

#: Exactly these types, and numpy's numbers, cannot be changed by who is given them.
_ATOMS = frozenset((type(None), bool, int, float, str))


class Infos(list[dict[str, Any]]):
    """The infos of copies stepped one by one, as a DummyVecEnv keeps them.

    A DummyVecEnv hands out a deep copy at every step, which asks of every number how it is copied: a fifth of a run on
    HalfCheetah, whose infos are half a dozen numbers each. A deep copy of this list is the same, in a fraction of the
    time: dicts are new ones, numbers and text are what they are, and everything else is deep-copied.
    """

    def __deepcopy__(self, memo: dict[int, Any]) -> list[dict[str, Any]]:
        return [_copied(info, memo) for info in self]


def _copied(info: dict[str, Any], memo: dict[int, Any]) -> dict[str, Any]:
    if type(info) is not dict or id(info) in memo:
        return copy.deepcopy(info, memo)
    fresh: dict[str, Any] = {}
    memo[id(info)] = fresh  # for infos that several copies share, or that hold themselves
    for key, value in info.items():
        plain = type(value) in _ATOMS or isinstance(value, np.number | np.bool_)
        fresh[key] = value if plain else copy.deepcopy(value, memo)
    return fresh
