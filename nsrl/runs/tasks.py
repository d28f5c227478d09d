"""The tasks that a configuration names, and whether an agent can act in them."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from gymnasium.spaces import Box

from nsrl.errors import NsrlError
from nsrl.rl.agents.agent import Agent
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
        return _told(config, Tasks(old, new, config.name or new))  # type: ignore[union-attr]
    if old is not None or new is not None:
        raise NsrlError("pair and old_env or new_env are both set; use one or the other")
    import nsrl_envs

    try:
        found = nsrl_envs.pair(config.pair)
    except nsrl_envs.TaskError as error:
        raise NsrlError(str(error)) from error
    return _told(config, Tasks(found.retained, found.new, getattr(config, "name", None) or found.name))


def _told(config: FinetuneConfig | EvaluateConfig, tasks: Tasks) -> Tasks:
    """The tasks with one more input that says which of them it is, where the configuration asks for that."""
    if getattr(config, "context", "off") != "add":
        return tasks
    from nsrl_envs import told

    return Tasks(told(tasks.old, 0), told(tasks.new, 1), tasks.name)


def with_context(config: FinetuneConfig, agent: Agent, envs: VecEnv) -> Agent:
    """The agent, with the inputs in which a task says which one it is, where it lacks them.

    Args:
        config: of the run; its `context` says whether.
        agent: as it was loaded.
        envs: of a task whose observations may go on, behind the agent's own, with entries in [0, 1].

    Raises:
        NsrlError: the agent cannot be given them.
    """
    from nsrl.rl.surgery.surgery import add_context

    if config.context == "off":
        return agent
    space: Any = envs.observation_space
    narrow: Any = agent.model.observation_space
    if not all(isinstance(each, Box) and len(each.shape) == 1 for each in (space, narrow)):
        return agent
    missing = space.shape[0] - narrow.shape[0]
    if missing < 1 or space.low[-missing:].min() < 0.0 or space.high[-missing:].max() > 1.0:
        return agent
    return add_context(agent, missing)


def fitting_envs(model: Any, env: str, count: int, seed: int) -> VecEnv:
    """Copies of an environment that a model can act in, side by side.

    Raises:
        NsrlError: it cannot be made, or its spaces are not the model's; both are named.
    """
    copies = open_envs(env, count, seed)
    check_copies(model, env, copies)
    return copies


def open_envs(env: str, count: int, seed: int) -> VecEnv:
    """Copies of an environment, side by side.

    Raises:
        NsrlError: it cannot be made, or so many would not fit into memory.
    """
    from nsrl.rl.playing.environments import make_envs

    check_memory(f"n_envs {count}", count * ENVIRONMENT)
    return make_envs(env, count, seed)


def check_copies(model: Any, env: str, copies: VecEnv) -> None:
    """Raise NsrlError, naming both spaces, unless a model can act in copies of an environment; they are closed then."""
    from nsrl.rl.agents.spaces import check_spaces

    try:
        check_spaces(model, copies)
    except NsrlError as error:
        copies.close()
        raise NsrlError(f"{env}: {error}") from error


def check_fits(model: Any, env: str) -> None:
    """Raise NsrlError, naming both spaces, unless a model can act in an environment."""
    fitting_envs(model, env, 1, 0).close()
