"""The settings that rl-zoo3 wrote beside an agent's zip, read as data: what it was trained with, in plain text."""

from __future__ import annotations

import math
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from stable_baselines3.common.utils import LinearSchedule

from nsrl.reading.documents import parse_yaml
from nsrl.reading.limits import YAML, Unreadable, read_text

#: How rl-zoo's settings begin: the only class in them, a list of pairs otherwise.
ORDERED = "!!python/object/apply:collections.OrderedDict"

SETTINGS = "config.yml"

#: What every settings of rl-zoo3 have.
ALWAYS = {"policy", "n_timesteps"}

NUMBER = re.compile(r"[-+]?(\d+\.?\d*|\.\d+)([eE][-+]?\d+)?")


def read_settings(path: Path) -> dict[str, Any]:
    """The settings that rl-zoo3 wrote beside an agent's zip; empty where there are none that are plain data.

    Looked for are `ENV/config.yml` beside `ENV.zip` and, for `best_model.zip`, in the folder that the run's is named
    after; and `config.yml` beside the zip, as on the Hugging Face hub.

    Args:
        path: of the zip.
    """
    for folder in (path.with_suffix(""), path.parent / environment_name(path.parent), path.parent):
        try:
            values = parse_yaml(read_text(folder / SETTINGS, YAML).removeprefix(ORDERED))
        except (OSError, UnicodeDecodeError, Unreadable):
            continue
        pairs = values[0] if isinstance(values, list) and len(values) == 1 else None
        if isinstance(pairs, list) and all(isinstance(pair, list) and len(pair) == 2 for pair in pairs):
            values = {str(key): value for key, value in pairs}
        if isinstance(values, dict) and values.keys() >= ALWAYS:
            return values
    return {}


def environment_name(run: Path) -> str:
    """The name of the environment in a run folder's: ENV of ENV_3."""
    return re.sub(r"_\d+$", "", run.name)


def told_schedule(settings: Mapping[str, Any], name: str, default: Any) -> float | LinearSchedule | None:
    """A schedule as rl-zoo3's settings say it: a number, or lin_X for X falling to 0.

    Args:
        settings: of the run.
        name: of the schedule, as in learning_rate.
        default: the algorithm's own, which the run had where the settings do not name it.

    Returns:
        None where they say anything else.
    """
    value = settings.get(name, default)
    text = value.removeprefix("lin_") if isinstance(value, str) else ""
    if NUMBER.fullmatch(text):
        number = float(text)
        linear = value != text
    elif isinstance(value, int | float) and not isinstance(value, bool):
        number, linear = float(value), False
    else:
        return None
    if not (math.isfinite(number) and number > 0.0):
        return None
    return LinearSchedule(number, 0.0, 1.0) if linear else number
