"""Random states stepped as columns of an array, and by gymnasium one by one; prints how many outcomes differ.

A program of its own, since NumPy chooses its instruction sets when it is imported.
"""

import json
from typing import Any

import numpy as np
from gymnasium.envs.classic_control.acrobot import AcrobotEnv
from gymnasium.envs.classic_control.cartpole import CartPoleEnv
from gymnasium.envs.classic_control.mountain_car import MountainCarEnv
from gymnasium.envs.classic_control.pendulum import PendulumEnv
from numpy._core import _multiarray_umath as umath

from nsrl_envs.vectorised.families import family_of

#: Enough that squares by multiplication, which differ from powers once in a thousand, would be seen several times.
STATES = 4000
#: Columns at a time: whole vectors and all remainders of any instruction set.
WIDTHS = (*range(1, 20), 31, 32, 33, 64, 100)
#: How far states reach from zero.
REACH: dict[Any, tuple[float, ...]] = {
    CartPoleEnv: (2.6, 3.0, 0.25, 3.0),
    PendulumEnv: (20.0, 8.0, 2.0),
    AcrobotEnv: (3.2, 3.2, 12.0, 28.0),
    MountainCarEnv: (1.3, 0.07),
}


def differences(base: Any, reach: tuple[float, ...]) -> int:
    """Numbers whose bits differ among next states, rewards, ends and observations."""
    family, rng = family_of(base), np.random.default_rng(0)
    assert family is not None
    states = rng.uniform(-1.0, 1.0, (len(reach), STATES)) * np.array(reach)[:, None]
    if hasattr(base.action_space, "n"):
        actions = rng.integers(base.action_space.n, size=STATES)
    else:
        actions = rng.uniform(-3.0, 3.0, (STATES, 1)).astype(np.float32)
    base.reset(seed=0)
    single = []
    for state, action in zip(states.T, actions, strict=True):
        family.write(base, state.copy())
        if isinstance(base, CartPoleEnv):
            base.steps_beyond_terminated = None
        observation, reward, terminated, _, _ = base.step(action)
        single.append((*base.state, float(reward), float(terminated), *observation.astype(np.float64)))
    expected = np.array(single, dtype=np.float64)

    wrong, entries = 0, base.observation_space.shape[0]
    for width in (*WIDTHS, STATES):
        start = int(rng.integers(STATES - width + 1))
        columns = slice(start, start + width)
        following, rewards, terminated = family.step(np.ascontiguousarray(states[:, columns]), actions[columns])
        shown = np.zeros((width, entries), dtype=np.float32)
        family.show(following, shown)
        found = np.column_stack([following[: len(base.state)].T, rewards, terminated, shown])
        wrong += int((found.view(np.uint64) != expected[columns].view(np.uint64)).sum())
    return wrong


if __name__ == "__main__":
    features = [name for name, available in umath.__cpu_features__.items() if available]
    print(json.dumps({"features": features, **{kind.__name__: differences(kind(), REACH[kind]) for kind in REACH}}))
