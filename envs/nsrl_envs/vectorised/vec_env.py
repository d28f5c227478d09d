"""SB3's interface: a DummyVecEnv that steps its copies as arrays for as long as nobody looks inside."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import gymnasium as gym
import numpy as np
from gymnasium import spaces
from gymnasium.envs.registration import EnvSpec
from stable_baselines3.common.vec_env import DummyVecEnv
from stable_baselines3.common.vec_env.base_vec_env import VecEnvIndices, VecEnvObs, VecEnvStepReturn

from nsrl_envs.vectorised.batch import Batch, batched
from nsrl_envs.vectorised.infos import Infos


def side_by_side(makers: Sequence[Callable[[], gym.Env]]) -> DummyVecEnv:
    """Environments behind SB3's interface: stepped as arrays if they are copies of a task known here, else one by one.

    Takes the place of `DummyVecEnv` (as `make_vec_env(..., vec_env_cls=side_by_side)` too): observations, rewards,
    dones, infos and random draws are the same, bit for bit.

    Args:
        makers: each returns a new environment.
    """
    copies = [maker() for maker in makers]
    again: list[Callable[[], gym.Env]] = [lambda copy=copy: copy for copy in copies]  # type: ignore[misc]
    envs = DummyVecEnv(again) if batched(copies) is None else ArrayVecEnv(again)
    envs.buf_infos = Infos(envs.buf_infos)
    return envs


# attributes and methods that change nothing a step depends on but what the copies themselves hold
_HARMLESS = {"np_random", "action_space"}
_ASKING = {
    "render",
    "has_wrapper_attr",
    "get_total_steps",
    "get_episode_rewards",
    "get_episode_lengths",
    "get_episode_times",
}
_PLAIN = (type(None), bool, int, float, str, tuple, type, np.generic, np.random.Generator, spaces.Space, EnvSpec)


class ArrayVecEnv(DummyVecEnv):
    """Copies of a classic-control task, stepped as arrays.

    `get_attr`, `env_method` and the like answer from the copies, which are brought up to date first. Whoever gets
    hold of a copy itself, or changes one in a way that the arrays do not know, has them stepped one by one from then
    on: slower, and right.
    """

    def __init__(self, makers: Sequence[Callable[[], gym.Env]]):
        """Make the copies.

        Args:
            makers: each returns a new copy.

        Raises:
            ValueError: their task is not known here; `side_by_side` asks first.
        """
        self._ahead = self._lent = False
        super().__init__(list(makers))
        batch = Batch.of(self._copies)
        if batch is None:
            raise ValueError(
                f"{self._copies[0]} is no task that can be stepped as arrays, or not all are copies of it; "
                "use nsrl_envs.vectorised.side_by_side, which falls back to DummyVecEnv"
            )
        self._batch, self._lent = batch, False

    @property
    def envs(self) -> list[gym.Env]:  # type: ignore[override]
        """The copies, up to date; stepped one by one from now on, for they may be changed."""
        self._bring_up_to_date()
        self._lent = True
        return self._copies

    @envs.setter
    def envs(self, copies: list[gym.Env]) -> None:
        self._copies = copies

    def step_wait(self) -> VecEnvStepReturn:
        """Step all copies, as arrays where they can be; ended episodes are followed by the next ones."""
        if not self._ahead:
            self._ahead = not self._lent and self._batch.read()
        if not self._ahead or not self._batch.accepts(self.actions):
            return self._borrowing(super().step_wait)
        observations, rewards, terminated, truncated = self._batch.step(self.actions)
        dones = terminated | truncated
        infos: list[dict[str, Any]] = [{"TimeLimit.truncated": False} for _ in range(self.num_envs)]
        for row in dones.nonzero()[0].tolist():
            infos[row] = self._batch.end(row)
            infos[row]["TimeLimit.truncated"] = not terminated[row]
            infos[row]["terminal_observation"] = observations[row].copy()
            observations[row], self.reset_infos[row] = self._batch.reset(row)
        return observations, rewards.astype(np.float32), dones, infos

    def reset(self) -> VecEnvObs:
        """Begin an episode in every copy, with the seeds and options that are set."""
        return self._borrowing(super().reset)

    def get_images(self) -> Sequence[np.ndarray | None]:
        """A picture of each copy's present state."""
        return self._borrowing(super().get_images)

    def get_attr(self, attr_name: str, indices: VecEnvIndices = None) -> list[Any]:
        """The copies' attributes; what can be changed from outside lends the copies out."""
        values = super().get_attr(attr_name, indices)
        if not all(isinstance(value, _PLAIN) or attr_name == "metadata" for value in values):
            self._lent = True
        return values

    def set_attr(self, attr_name: str, value: Any, indices: VecEnvIndices = None) -> None:
        """Set the copies' attributes; all but generators and spaces lend the copies out."""
        super().set_attr(attr_name, value, indices)
        self._lent |= attr_name not in _HARMLESS

    def env_method(
        self, method_name: str, *method_args: Any, indices: VecEnvIndices = None, **method_kwargs: Any
    ) -> Any:
        """Call the copies' methods; all but those that only ask lend the copies out."""
        values = super().env_method(method_name, *method_args, indices=indices, **method_kwargs)
        self._lent |= method_name not in _ASKING
        return values

    def _get_target_envs(self, indices: VecEnvIndices) -> list[gym.Env]:
        self._bring_up_to_date()
        return [self._copies[index] for index in self._get_indices(indices)]

    def _bring_up_to_date(self) -> None:
        if self._ahead:
            self._batch.write()
            self._ahead = False

    def _borrowing(self, action: Callable[[], Any]) -> Any:
        """Let DummyVecEnv do something with the copies, which does not mean that they are lent."""
        lent = self._lent
        self._bring_up_to_date()
        result = action()
        self._lent = lent
        return result
