"""Options of `from_pretrained` and `protect`: settings of the algorithm, and of retention."""

from __future__ import annotations

import inspect
import math
from dataclasses import fields
from typing import Any

from stable_baselines3.common.on_policy_algorithm import OnPolicyAlgorithm

from nsrl.errors import NsrlError, check_annotated, check_path, nearest
from nsrl.rl.agents.archive import SCHEDULES
from nsrl.rl.agents.stock_models import stock_class
from nsrl.rl.budget.config import RetentionConfig

#: Kinds of settings whose defaults do not tell them.
KINDS = {
    "clip_range_vf": "float",
    "target_kl": "float",
    "seed": "int",
    "policy_kwargs": "dict",
    "tensorboard_log": "path",
    "rollout_buffer_kwargs": "dict",
}
SHARES = ("gamma", "gae_lambda")
NONE_MEANS_DEFAULT = ("policy_kwargs",)
RETENTION_FIELDS = frozenset(RetentionConfig.__dataclass_fields__) - {"seed"}


def build_config(**options: Any) -> RetentionConfig:
    """A `RetentionConfig` from keywords.

    Raises:
        NsrlError: an unknown one, with the nearest known name.
    """
    known = [entry.name for entry in fields(RetentionConfig)]
    for key in options:
        if key not in known:
            near = nearest(key, known)
            hint = f"; did you mean {near}?" if near else f"; known: {', '.join(known)}"
            raise NsrlError(f"unknown retention setting {key!r}{hint}")
    return RetentionConfig(**options)


def check_options(algorithm: type[OnPolicyAlgorithm], options: dict[str, Any]) -> None:
    """Raise NsrlError unless options are settings of an algorithm, or of retention, of the right kind.

    Args:
        algorithm: one of ours; the settings are those of the stock one.
        options: by name.
    """
    stock = stock_class(algorithm)
    parameters = inspect.signature(stock.__init__).parameters
    known = [*parameters, *RETENTION_FIELDS]
    for key in options:
        if key not in known:
            near = nearest(key, known)
            hint = f"did you mean {near}?" if near else "see RetentionConfig and the arguments of the algorithm"
            raise NsrlError(f"{key!r} is no setting of {stock.__name__} or of retention; {hint}")
    for key, value in options.items():
        if value is None and (key in NONE_MEANS_DEFAULT or parameters[key].default is None):
            continue
        if isinstance(value, float) and math.isnan(value):
            raise NsrlError(f"{key} is NaN, but must be a number")
        if key in SHARES and isinstance(value, int | float) and not 0.0 <= value <= 1.0:
            raise NsrlError(f"{key} is {value}, but must lie between 0 and 1")
        if key in SCHEDULES and callable(value) and not isinstance(value, type):
            continue
        kinds = KINDS.get(key) or type(parameters[key].default).__name__
        if kinds == "path":
            check_path(key, value)
        elif kinds in ("int", "float", "bool", "dict"):
            check_annotated({key: value}, {key: kinds})


def without_optimizer(policy_kwargs: dict[str, Any]) -> dict[str, Any]:
    """Arguments of a policy without its choice of an optimizer: A2C's RMSprop is no other algorithm's."""
    return {key: value for key, value in policy_kwargs.items() if key not in ("optimizer_class", "optimizer_kwargs")}
