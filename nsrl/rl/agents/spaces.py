"""Gymnasium spaces as plain JSON, and whether two of them are the same to a policy."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import numpy as np
from gymnasium import Env, spaces
from stable_baselines3.common.base_class import BaseAlgorithm
from stable_baselines3.common.preprocessing import is_image_space, is_image_space_channels_first
from stable_baselines3.common.vec_env import VecEnv, VecTransposeImage

from nsrl.errors import NsrlError, check_kind
from nsrl.reading.limits import shown


def describe_space(space: spaces.Space) -> dict[str, Any]:
    """A gymnasium space as plain JSON, with its text for messages under "text"."""
    description: dict[str, Any] = {"type": type(space).__name__, "text": " ".join(str(space).split())}
    if isinstance(space, spaces.Dict):
        description["spaces"] = {key: describe_space(sub) for key, sub in space.spaces.items()}
    elif isinstance(space, spaces.Box):
        description |= {"shape": list(space.shape), "dtype": str(space.dtype), "image": is_image_space(space)}
        description |= {"low": _bound(space.low), "high": _bound(space.high)}
    elif isinstance(space, spaces.Discrete):
        description["n"] = int(space.n)
    elif isinstance(space, spaces.MultiDiscrete):
        description["nvec"] = [int(n) for n in np.ravel(space.nvec)]
    elif isinstance(space, spaces.MultiBinary):
        description["shape"] = list(space.shape)
    return description


def _bound(values: np.ndarray) -> Any:
    # Infinity is not JSON, so bounds travel as text.
    texts = [repr(float(value)) for value in np.ravel(values)]
    return texts[0] if len(set(texts)) == 1 else texts


def same_observations(first: dict[str, Any], second: dict[str, Any]) -> bool:
    """Whether a policy reads both observation spaces alike: bounds and float width mean nothing to it."""

    def read(description: Any) -> Any:
        if not isinstance(description, dict):  # a description comes from a file
            return None
        kept = {key: value for key, value in description.items() if key in ("type", "shape", "image", "n", "nvec")}
        parts = description.get("spaces", {})
        return kept | {"spaces": {key: read(sub) for key, sub in parts.items()} if isinstance(parts, dict) else None}

    return read(first) == read(second)


def same_actions(first: dict[str, Any], second: dict[str, Any]) -> bool:
    """Whether two action spaces mean the same actions: bounds count, since SB3 clips to them."""
    return {**first, "text": "", "dtype": ""} == {**second, "text": "", "dtype": ""}


def check_described(model: BaseAlgorithm, observations: dict[str, Any], actions: dict[str, Any], whose: str) -> None:
    """Raise NsrlError, naming both, unless the described spaces are those of the model."""
    for kind, same, found, space in (
        ("observation", same_observations, observations, model.observation_space),
        ("action", same_actions, actions, model.action_space),
    ):
        expected = describe_space(space)
        described = found if isinstance(found, dict) else {}
        if not same(described, expected):
            raise NsrlError(
                f"{whose} has the {kind} space {shown(described.get('text'), 200)}, but the agent has "
                f"{expected['text']}; use the task and the wrappers that the agent was trained with"
            )


def policy_spaces(env: Any) -> tuple[spaces.Space, spaces.Space]:
    """Observation and action space as a policy in `env` sees them: SB3 moves image channels to the front."""
    observation_space = env.observation_space
    if isinstance(observation_space, spaces.Dict):
        entries = [(key, _channels_first(space)) for key, space in observation_space.spaces.items()]
        return spaces.Dict(entries), env.action_space
    return _channels_first(observation_space), env.action_space


def _channels_first(space: spaces.Space) -> spaces.Space:
    if isinstance(space, spaces.Box) and is_image_space(space) and not is_image_space_channels_first(space):
        return VecTransposeImage.transpose_space(space)
    return space


def check_spaces(model_or_spaces: BaseAlgorithm | tuple[spaces.Space, spaces.Space], env: Any) -> None:
    """Raise NsrlError, naming both, unless a policy for these spaces can act in `env` (see `nsrl.rl.agents.spaces`).

    Args:
        model_or_spaces: a model, or its observation and action space.
        env: a gymnasium environment or VecEnv; channels-last images count as SB3 would transpose them.
    """
    owner: Any = model_or_spaces
    if not isinstance(model_or_spaces, tuple):
        check_kind("the model", model_or_spaces, BaseAlgorithm, "a Stable-Baselines3 model, or two spaces")
    check_kind("env", env, (Env, VecEnv), "a gymnasium.Env or an SB3 VecEnv")
    if isinstance(model_or_spaces, tuple):
        owner = SimpleNamespace(observation_space=model_or_spaces[0], action_space=model_or_spaces[1])
    observations, actions = (describe_space(space) for space in policy_spaces(env))
    check_described(owner, observations, actions, "the environment")
