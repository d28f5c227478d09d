"""OpenAI Gym, from which agents of Stable-Baselines3 before 2.0 were pickled, found in gymnasium."""

from __future__ import annotations

import sys
from collections.abc import Iterator
from contextlib import contextmanager
from importlib.util import find_spec


@contextmanager
def gym_in_gymnasium() -> Iterator[None]:
    """While it lasts, modules of Gym are gymnasium's of the same name, where Gym is not installed.

    gymnasium's spaces take the states of Gym's (`Space.__setstate__`).
    """
    names = [name for name in sys.modules if name.partition(".")[0] == "gymnasium"]
    if "gym" in sys.modules or find_spec("gym") is not None:
        names = []
    aliases = {f"gym{name.removeprefix('gymnasium')}": sys.modules[name] for name in names}
    sys.modules.update(aliases)
    try:
        yield
    finally:
        for alias, module in aliases.items():
            if sys.modules.get(alias) is module:
                del sys.modules[alias]
