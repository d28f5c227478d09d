"""What environments cost without a policy: copies stepped as arrays against SB3's DummyVecEnv, interleaved."""

from __future__ import annotations

import statistics
from collections.abc import Iterable
from time import perf_counter
from typing import Any

#: A task of each family that is stepped as arrays.
TASKS = ("nsrl/CartPoleSwapped-v0", "nsrl/PendulumReversed-v0", "nsrl/AcrobotSwapped-v0", "MountainCar-v0")


def measure_stepping(
    tasks: Iterable[str] = TASKS, *, counts: Iterable[int] = (8, 32), steps: int = 2000, repeats: int = 5
) -> dict[str, dict[int, dict[str, float]]]:
    """Step both by the same random actions in turn, in this process.

    Args:
        tasks: environment ids.
        counts: copies side by side.
        steps: of all copies together, in a repeat.
        repeats: of each; the medians count.

    Returns:
        By task and number of copies: steps of single copies a second of "stock" and of "arrays", and their "ratio".
    """
    return {task: {count: _compare(task, count, steps, repeats) for count in counts} for task in tasks}


def _compare(task: str, count: int, steps: int, repeats: int) -> dict[str, float]:
    from stable_baselines3.common.env_util import make_vec_env

    from nsrl_envs.vectorised.vec_env import ArrayVecEnv

    kinds: dict[str, Any] = {
        "stock": make_vec_env(task, count, seed=0),
        "arrays": make_vec_env(task, count, seed=0, vec_env_cls=ArrayVecEnv),
    }
    space = kinds["stock"].action_space
    space.seed(0)
    actions = [[space.sample() for _ in range(count)] for _ in range(steps)]
    seconds: dict[str, list[float]] = {name: [] for name in kinds}
    for env in kinds.values():
        env.reset()
    for _ in range(repeats):
        for name, env in kinds.items():
            seconds[name].append(_seconds(env, actions))
    for env in kinds.values():
        env.close()
    speed = {name: steps * count / statistics.median(values) for name, values in seconds.items()}
    return {**speed, "ratio": speed["arrays"] / speed["stock"]}


def _seconds(env: Any, actions: list[Any]) -> float:
    import numpy as np

    arrays = [np.array(row) for row in actions]
    start = perf_counter()
    for row in arrays:
        env.step(row)
    return perf_counter() - start
