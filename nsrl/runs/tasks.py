"""The tasks that a configuration names, and whether an agent can act in them."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from nsrl.errors import NsrlError
from nsrl.runs.config import EvaluateConfig, FinetuneConfig
from nsrl.runs.memory import ENVIRONMENT, check_memory

if TYPE_CHECKING:
    from stable_baselines3.common.vec_env import VecEnv


@dataclass(frozen=True)
class Tasks:
    """The two tasks of a fine-tuning run.

    Attributes:
        old: environment id of the task that the agent is good at.
        new: environment id of the task to learn.
        name: what the run is called.
    """

    old: str
    new: str
    name: str


def resolve_tasks(config: FinetuneConfig | EvaluateConfig) -> Tasks:
    """The tasks that a configuration names, by pair or by environment ids.

    Raises:
        NsrlError: none or contradicting ones, or an unknown pair.
    """
    old, new = getattr(config, "old_env", None), getattr(config, "new_env", None)
    if config.pair is None:
        if old is None or new is None:
            raise NsrlError("no tasks: set pair (as in --pair cartpole_swapped), or both old_env and new_env")
        return Tasks(old, new, config.name or new)  # type: ignore[union-attr]
    if old is not None or new is not None:
        raise NsrlError("pair and old_env or new_env are both set; use one or the other")
    import nsrl_envs

    try:
        found = nsrl_envs.pair(config.pair)
    except nsrl_envs.TaskError as error:
        raise NsrlError(str(error)) from error
    return Tasks(found.retained, found.new, getattr(config, "name", None) or found.name)


def fitting_envs(model: Any, env: str, count: int, seed: int) -> VecEnv:
    """Copies of an environment that a model can act in, side by side.

    Raises:
        NsrlError: it cannot be made, or its spaces are not the model's; both are named.
    """
    from nsrl.rl.agents.spaces import check_spaces
    from nsrl.rl.playing.environments import make_envs

    check_memory(f"n_envs {count}", count * ENVIRONMENT)
    copies = make_envs(env, count, seed)
    try:
        check_spaces(model, copies)
    except NsrlError as error:
        copies.close()
        raise NsrlError(f"{env}: {error}") from error
    return copies


def check_fits(model: Any, env: str) -> None:
    """Raise NsrlError, naming both spaces, unless a model can act in an environment."""
    fitting_envs(model, env, 1, 0).close()
