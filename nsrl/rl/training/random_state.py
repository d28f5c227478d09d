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
from nsrl.reading.limits import Unreadable, shown
from nsrl.reading.tensors import check_torch_state
from nsrl.reading.values import finite, items, mapping, whole

BIT_GENERATORS = {
    kind.__name__: kind
    for kind in (np.random.PCG64, np.random.PCG64DXSM, np.random.MT19937, np.random.Philox, np.random.SFC64)
}

#: What the numbers in a generator's state may come to, where numpy keeps them as Python's.
LARGEST = {
    "pos": 624,
    "buffer_pos": 4,
    "has_uint32": 1,
    "has_gauss": 1,
    "uinteger": 2**32 - 1,
    "state": 2**128 - 1,
    "inc": 2**128 - 1,
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


def check_generators(model: BaseAlgorithm, state: Any) -> None:
    """Raise Unreadable unless these are states that generators can have, for as many environments as there are.

    numpy looks its position up in a block of 624 words without asking whether it lies inside.
    """
    here = read_generators(model)
    mapping(state, "the random generators", here)
    version, words, gauss = items(state["python"], "the state of Python's generator", 3)
    whole(version, "its version", 3, 3)
    for word in items(words, "its state", 625)[:-1]:
        whole(word, "a word of its state", 0, 2**32 - 1)
    whole(words[-1], "its position", 0, 624)
    if gauss is not None:
        finite(gauss, "its number kept back")
    _check_like(np.random.get_state(legacy=False), state["numpy"], "numpy's generator")
    for name in ("environments", "action_spaces"):
        for saved in items(state[name], f"the generators of the {name}", len(here[name])):
            if saved is not None:
                _check_like(_kind(mapping(saved, "a generator", ["bit_generator"]))().state, saved, "a generator")
    check_torch_state(state["torch"])
    for device in items(state["cuda"], "the generators of CUDA devices"):
        if not isinstance(device, torch.Tensor) or device.dtype != torch.uint8 or device.ndim != 1:
            raise Unreadable("the state of a CUDA device's generator is damaged")


def _check_like(here: Any, saved: Any, what: str) -> None:
    """Compare a state of numpy's with a template of its kind: the same keys, and numbers in their ranges."""
    mapping(saved, what, here, ())
    for key, value in here.items():
        name = f"{key} of {what}"
        if isinstance(value, dict):
            _check_like(value, saved[key], name)
        elif isinstance(value, np.ndarray):
            for word in items(saved[key], name, value.size):
                whole(word, name, 0, int(np.iinfo(value.dtype).max))
        elif isinstance(value, str):
            if saved[key] != value:
                raise Unreadable(f"{name} is {shown(saved[key])}, but must be {value}")
        elif isinstance(value, float):
            finite(saved[key], name)
        else:
            whole(saved[key], name, 0, LARGEST[key])


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


def _kind(state: dict[str, Any]) -> Any:
    name = state["bit_generator"]
    if type(name) is not str or name not in BIT_GENERATORS:
        raise NsrlError(f"the random generator {shown(name)!r} is unknown; known: {', '.join(BIT_GENERATORS)}")
    return BIT_GENERATORS[name]


def _generator(state: dict[str, Any]) -> np.random.Generator:
    bits = _kind(state)()
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
