"""What is wrapped around the equations of a copy, so far as it can be done on arrays."""

from __future__ import annotations

from dataclasses import dataclass

import gymnasium as gym
import numpy as np
from gymnasium import spaces
from gymnasium.wrappers import OrderEnforcing, PassiveEnvChecker, TimeLimit
from stable_baselines3.common.monitor import Monitor

from nsrl_envs.actions import ReverseActions, SwapActions
from nsrl_envs.context import TaskContext
from nsrl_envs.observations import ReverseSensors
from nsrl_envs.vectorised.families import Family, family_of


@dataclass(frozen=True)
class Layers:
    """One copy of a task, taken apart.

    Attributes:
        family: the equations of the innermost environment.
        base: that environment.
        limit: cuts episodes off.
        monitor: notes episodes down; None if there is none.
        actions: wrappers that change actions, the outermost first.
        sign: what the base's observation entries are multiplied with, (entries,) float32.
        context: what follows them, (size,) float32.
    """

    family: Family
    base: gym.Env
    limit: TimeLimit
    monitor: Monitor | None
    actions: tuple[SwapActions | ReverseActions, ...]
    sign: np.ndarray
    context: np.ndarray

    @property
    def steps(self) -> int:
        """Steps after which an episode is cut off."""
        return self.limit._max_episode_steps

    def alike(self, other: Layers) -> bool:
        """Whether another copy obeys the same rules."""
        return (
            self.family == other.family
            and self.steps == other.steps
            and (self.monitor is None) == (other.monitor is None)
            and [type(layer) for layer in self.actions] == [type(layer) for layer in other.actions]
            and np.array_equal(self.sign, other.sign)
            and np.array_equal(self.context, other.context)
        )

    @classmethod
    def of(cls, env: gym.Env) -> Layers | None:
        """Take an environment apart; None if any part is not known here, or is not as its class makes it."""
        layers: list[gym.Wrapper] = []
        while isinstance(env, gym.Wrapper):
            layers.append(env)
            env = env.env
        family = family_of(env)
        if family is None or any({"step", "reset"} & vars(part).keys() for part in (*layers, env)):
            return None
        if not isinstance(env.action_space, spaces.Discrete | spaces.Box) or env.render_mode == "human":
            return None
        known = {Monitor, TimeLimit, OrderEnforcing, PassiveEnvChecker, *_CHANGING}
        limits = [layer for layer in layers if isinstance(layer, TimeLimit)]
        monitors = [layer for layer in layers if isinstance(layer, Monitor)]
        if not known.issuperset(type(layer) for layer in layers) or len(limits) != 1 or monitors[1:]:
            return None
        monitor = monitors[0] if monitors else None
        if monitor is not None and (
            monitor is not layers[0] or monitor.results_writer or monitor.reset_keywords or monitor.info_keywords
        ):
            return None
        sign, context = _observation(layers, np.ones(env.observation_space.shape or (), np.float32))
        return cls(
            family=family,
            base=env,
            limit=limits[0],
            monitor=monitor,
            actions=tuple(layer for layer in layers if isinstance(layer, SwapActions | ReverseActions)),
            sign=sign,
            context=context,
        )


#: Wrappers that change actions or observations.
_CHANGING = (SwapActions, ReverseActions, ReverseSensors, TaskContext)


def _observation(layers: list[gym.Wrapper], shown: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Signs of the base's entries and the constants behind them, from an observation of nothing but ones."""
    entries = len(shown)
    for layer in reversed(layers):
        if isinstance(layer, ReverseSensors | TaskContext):
            shown = layer.observation(shown)
    return shown[:entries], shown[entries:]
