"""The state of every random generator that a training run draws from, as plain data."""

from __future__ import annotations

import random
from typing import Any

import numpy as np
import torch
from gymnasium import spaces
from stable_baselines3.common.base_class import BaseAlgorithm
from stable_baselines3.common.vec_env import VecEnv

from nsrl.errors import NsrlError

BIT_GENERATORS = {
    kind.__name__: kind
    for kind in (np.random.PCG64, np.random.PCG64DXSM, np.random.MT19937, np.random.Philox, np.random.SFC64)
}


def read_generators(model: BaseAlgorithm) -> dict[str, Any]:
    """States of the global generators (Python, NumPy, torch), of each environment and of its action space.

    Everything is JSON, but for the ByteTensors under "torch" and "cuda".
    """
    env = model.get_env()
    return {
        "python": random.getstate(),
        "numpy": plain(np.random.get_state(legacy=False)),
        "torch": torch.get_rng_state(),
        "cuda": torch.cuda.get_rng_state_all() if torch.cuda.is_initialized() else [],
        "environments": [] if env is None else [_state(g) for g in _attributes(env, "np_random")],
        "action_spaces": [] if env is None else [_space_state(s) for s in _attributes(env, "action_space")],
    }


def write_generators(model: BaseAlgorithm, state: dict[str, Any]) -> None:
    """Put the states back; environments must be as many as there were.

    Raises:
        NsrlError: another number of environments, or a kind of generator that NumPy does not have.
    """
    env = model.get_env()
    if env is not None:
        for index, saved in enumerate(state["environments"]):
            if saved is not None:
                env.set_attr("np_random", _generator(saved), index)
        for index, saved in enumerate(state["action_spaces"]):
            if saved is not None:
                # the space itself in a DummyVecEnv, a copy in a SubprocVecEnv: hence set as well
                space = env.get_attr("action_space", index)[0]
                space._np_random = _generator(saved)
                env.set_attr("action_space", space, index)
    version, words, gauss = state["python"]
    random.setstate((version, tuple(words), gauss))
    np.random.set_state(state["numpy"])
    torch.set_rng_state(state["torch"])
    if state["cuda"] and torch.cuda.is_available():
        torch.cuda.set_rng_state_all(state["cuda"])


def _attributes(env: VecEnv, name: str) -> list[Any]:
    try:
        return env.get_attr(name)
    except (AttributeError, NotImplementedError):  # natively vectorised environments have no single ones
        return []


def _space_state(space: spaces.Space) -> dict[str, Any] | None:
    return None if space._np_random is None else _state(space._np_random)


def _state(generator: Any) -> dict[str, Any] | None:
    # an environment may draw from something else under this name
    return plain(generator.bit_generator.state) if isinstance(generator, np.random.Generator) else None


def _generator(state: dict[str, Any]) -> np.random.Generator:
    kind = BIT_GENERATORS.get(state["bit_generator"])
    if kind is None:
        raise NsrlError(
            f"the random generator {state['bit_generator']!r} is unknown; known: {', '.join(BIT_GENERATORS)}"
        )
    bits = kind()
    bits.state = state  # type: ignore[assignment]
    return np.random.Generator(bits)


def plain(value: Any) -> Any:
    """`value` with NumPy arrays and scalars as lists and Python numbers; tensors stay."""
    if isinstance(value, dict):
        return {key: plain(part) for key, part in value.items()}
    if isinstance(value, list | tuple):
        return [plain(part) for part in value]
    if isinstance(value, np.ndarray | np.generic):
        return value.tolist()
    return value
