"""Observation statistics, frozen: what VecNormalize did to an agent's inputs and must go on doing."""

from __future__ import annotations

import contextlib
import pickle
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from gymnasium import spaces
from gymnasium.wrappers import NormalizeObservation
from stable_baselines3.common.running_mean_std import RunningMeanStd
from stable_baselines3.common.vec_env import VecEnv, VecEnvWrapper, VecNormalize, unwrap_vec_normalize

from nsrl.errors import NsrlError, check_path
from nsrl.files import written_atomically
from nsrl.reading.arrays import read_arrays
from nsrl.reading.limits import STATISTICS, Expansion, opened
from nsrl.rl.agents.openai_gym import gym_in_gymnasium
from nsrl.rl.agents.unpickling import Statistic, read_statistics

#: How a zip, which an npz is, begins.
ZIP = b"PK\x03\x04"

OF_STATISTICS = Expansion(STATISTICS, 1)


@dataclass(frozen=True, eq=False)
class ObservationNormalizer:
    """`(obs - mean) / sqrt(var + epsilon)`, clipped, bit for bit as `VecNormalize.normalize_obs` computes it.

    Raises:
        NsrlError: mean and var differ in form, are not finite, or var is negative.
    """

    mean: Statistic
    """float64, shape of one observation; for Dict observations a dict over the keys that are normalised."""
    var: Statistic
    """As `mean`."""
    epsilon: float = 1e-8
    """Added to the variance."""
    clip_obs: float = 10.0
    """Largest magnitude of a normalised entry."""
    count: float = 1e6
    """Observations that the statistics stand for; matters only to stock code that goes on updating them."""

    def __post_init__(self) -> None:
        for name in ("mean", "var"):
            object.__setattr__(self, name, _frozen(getattr(self, name)))
        mean, var = _by_key(self.mean), _by_key(self.var)
        if mean.keys() != var.keys() or any(mean[key].shape != var[key].shape for key in mean):
            raise NsrlError("mean and variance of the observation statistics differ in shape or keys; save them again")
        if not all(np.isfinite(array).all() for array in [*mean.values(), *var.values()]):
            raise NsrlError("the observation statistics contain NaN or infinity; use those of an earlier checkpoint")
        if any((array < 0).any() for array in var.values()):
            raise NsrlError("the observation statistics contain a negative variance; save them again")
        if not (0 <= self.epsilon < np.inf and self.clip_obs > 0 and 0 < self.count < np.inf):
            raise NsrlError(
                f"epsilon={self.epsilon}, clip_obs={self.clip_obs} and count={self.count} of the observation "
                "statistics must be positive"
            )

    def normalize(self, obs: Any) -> Any:
        """Normalised observations, float32, in any batch shape; Dict keys without statistics pass through."""
        if isinstance(self.mean, dict):
            return {
                key: self._normalized(value, key) if key in self.mean else np.copy(value) for key, value in obs.items()
            }
        return self._normalized(obs)

    def _normalized(self, obs: np.ndarray, key: str = "") -> np.ndarray:
        mean, var = _by_key(self.mean)[key], _by_key(self.var)[key]
        normalized = np.clip((obs - mean) / np.sqrt(var + self.epsilon), -self.clip_obs, self.clip_obs)
        return normalized.astype(np.float32)

    def fits(self, space: spaces.Space) -> bool:
        """Whether observations of `space` can be normalised with these statistics."""
        try:
            self.check(space)
        except NsrlError:
            return False
        return True

    def check(self, space: spaces.Space) -> None:
        """Raise NsrlError unless observations of `space` can be normalised with these statistics."""
        parts = space.spaces if isinstance(space, spaces.Dict) else {"": space}
        for key, mean in _by_key(self.mean).items():
            if isinstance(self.mean, dict) != isinstance(space, spaces.Dict) or key not in parts:
                raise NsrlError(
                    f"the observation statistics are for the keys {sorted(_by_key(self.mean))}, "
                    f"which {space} lacks; use the statistics that were saved with the agent"
                )
            shape = parts[key].shape
            if shape == mean.shape:
                continue
            if stacked := _frames(mean.shape, shape or ()):
                raise NsrlError(
                    f"the observation statistics are of single frames, shape {mean.shape}, and observations are stacks "
                    f"of {stacked}, shape {shape}, that were normalised before they were stacked, as rl-zoo does it; "
                    "let each environment normalise: gymnasium.wrappers.TransformObservation(env, "
                    "nsrl.rl.agents.ObservationNormalizer.load(path).normalize, None), then VecFrameStack; and load "
                    "the agent without its statistics: agents.load(path, statistics=False), or Agent(model)"
                )
            raise NsrlError(
                f"the observation statistics have shape {mean.shape}, but observations {parts[key]}; "
                "use the statistics that were saved with the agent"
            )

    def to_arrays(self) -> dict[str, np.ndarray]:
        """Plain arrays for `from_arrays`; those of Dict observations are named "mean.KEY" and "var.KEY"."""
        arrays = {name: np.float64(getattr(self, name)) for name in ("epsilon", "clip_obs", "count")}
        for name in ("mean", "var"):
            value = getattr(self, name)
            arrays |= {f"{name}.{key}": v for key, v in value.items()} if isinstance(value, dict) else {name: value}
        return {name: np.asarray(value) for name, value in arrays.items()}

    @classmethod
    def from_arrays(cls, arrays: Mapping[str, np.ndarray]) -> ObservationNormalizer:
        """Inverse of `to_arrays`.

        Raises:
            NsrlError: an entry is missing or damaged.
        """
        try:
            statistics: dict[str, Any] = {}
            for name in ("mean", "var"):
                keyed = {key.removeprefix(f"{name}."): arrays[key] for key in arrays if key.startswith(f"{name}.")}
                statistics[name] = keyed or arrays[name]
            statistics |= {name: float(arrays[name]) for name in ("epsilon", "clip_obs", "count")}
            return cls(**statistics)
        except KeyError as error:
            raise NsrlError(
                f"observation statistics lack {error}; expected mean, var, epsilon, clip_obs, count"
            ) from error
        except TypeError as error:
            raise NsrlError("epsilon, clip_obs and count of observation statistics must be one number each") from error

    @classmethod
    def from_vec_normalize(cls, vec_normalize: VecNormalize) -> ObservationNormalizer | None:
        """Copy of a VecNormalize's observation statistics; None where it normalises rewards only."""
        if not vec_normalize.norm_obs:
            return None
        running: Any = vec_normalize.obs_rms
        parts = running if isinstance(running, dict) else {"": running}
        mean, var = ({key: getattr(part, name) for key, part in parts.items()} for name in ("mean", "var"))
        return cls(
            mean=mean if isinstance(running, dict) else mean[""],
            var=var if isinstance(running, dict) else var[""],
            epsilon=float(vec_normalize.epsilon),
            clip_obs=float(vec_normalize.clip_obs),
            count=float(max(part.count for part in parts.values())),
        )

    @classmethod
    def load(cls, path: str | Path, *, trust: bool = False) -> ObservationNormalizer | None:
        """Read statistics from our npz or from the pickle that `VecNormalize.save` writes.

        The pickle is read as data (see `nsrl.rl.agents.unpickling`). None where the VecNormalize normalised rewards
        only.

        Args:
            path: the file.
            trust: unpickle with Python's own unpickler instead, which runs whatever the file says.

        Raises:
            NsrlError: missing, damaged or other file; or one that asks for imports beyond the allow list.
        """
        check_path("path", path)
        path = Path(path)
        try:
            with opened(path) as file:
                if file.read(4) == ZIP or path.suffix == ".npz":
                    return cls.from_arrays(read_arrays(file, OF_STATISTICS))
                if trust:
                    file.seek(0)
                    with gym_in_gymnasium():
                        return cls.from_vec_normalize(pickle.load(file))
            saved = read_statistics(path)
            return None if saved is None else cls(**vars(saved))
        except FileNotFoundError as error:
            raise NsrlError(f"no observation statistics at {path}; expected an npz or a VecNormalize pickle") from error
        except NsrlError as error:
            raise error if str(path) in str(error) else NsrlError(f"cannot use {path}: {error}") from error
        except Exception as error:  # trusted pickles can raise anything
            raise NsrlError(
                f"{path} holds no observation statistics or is damaged ({error}); save them again"
            ) from error

    def save(self, path: str | Path) -> None:
        """Write an npz, atomically."""
        with written_atomically(path) as temporary, temporary.open("wb") as file:
            np.savez(file, **self.to_arrays())  # type: ignore[arg-type]


def seen_statistics(env: VecEnv | None) -> ObservationNormalizer | None:
    """Copy of the statistics through which an environment shows its observations; None where it shows them raw.

    Raises:
        NsrlError: two VecNormalize normalise them one after the other, and a buffer has one set of statistics.
    """
    found = []
    while isinstance(env, VecEnvWrapper):
        if isinstance(env, VecNormalize) and env.norm_obs:
            found.append(env)
        env = env.venv
    if len(found) > 1:
        raise NsrlError(
            "the environment is inside two VecNormalize that both normalise observations, of which nsrl could hold and "
            "export one only; leave one of them out, or give it norm_obs=False"
        )
    return ObservationNormalizer.from_vec_normalize(found[0]) if found else None


class FrozenMeanStd(RunningMeanStd):
    """Running statistics that no longer run: VecNormalize may call `update` on every step, to no effect."""

    def update(self, arr: np.ndarray) -> None:
        """Do nothing."""

    def update_from_moments(self, batch_mean: np.ndarray, batch_var: np.ndarray, batch_count: float) -> None:
        """Do nothing."""


def freeze_observations(env: VecEnv) -> None:
    """Stop the observation statistics around and inside an environment where they are; those of rewards go on.

    They are those of a VecNormalize, and of gymnasium's `NormalizeObservation` around single environments.
    """
    with contextlib.suppress(NotImplementedError):  # a VecEnv of somebody else's, without single environments
        if any(env.env_is_wrapped(NormalizeObservation)):
            env.env_method("set_wrapper_attr", "update_running_mean", False)
    around = unwrap_vec_normalize(env)
    normalizer = None if around is None else ObservationNormalizer.from_vec_normalize(around)
    if around is not None and normalizer is not None:
        around.obs_rms = running_statistics(normalizer, FrozenMeanStd)


class RetainingVecNormalize(VecNormalize):
    """VecNormalize for fine-tuning: the agent's observation statistics frozen, reward statistics fresh.

    Stock VecNormalize has one `training` flag for both. While it moves the observation statistics, the
    policy's map from raw observations to actions changes though no weight does, and nothing about the old
    task can be promised.

    Args:
        venv: the new task.
        normalizer: observation statistics; None leaves observations as they are.
        training: whether to update the reward statistics.
        norm_reward, clip_reward, gamma: as in VecNormalize.

    Raises:
        NsrlError: observations of `venv` do not have the statistics' shape.
    """

    def __init__(
        self,
        venv: VecEnv,
        normalizer: ObservationNormalizer | None,
        *,
        training: bool = True,
        norm_reward: bool = True,
        clip_reward: float = 10.0,
        gamma: float = 0.99,
    ) -> None:
        options: dict[str, Any] = {}
        if normalizer is not None:
            normalizer.check(venv.observation_space)
            keys = list(normalizer.mean) if isinstance(normalizer.mean, dict) else None
            options = {"clip_obs": normalizer.clip_obs, "epsilon": normalizer.epsilon, "norm_obs_keys": keys}
        super().__init__(
            venv,
            training=training,
            norm_obs=normalizer is not None,
            norm_reward=norm_reward,
            clip_reward=clip_reward,
            gamma=gamma,
            **options,
        )
        if normalizer is not None:
            self.obs_rms = running_statistics(normalizer, FrozenMeanStd)

    def save_stock(self, path: str | Path) -> None:
        """Write what rl-zoo calls vecnormalize.pkl; `VecNormalize.load` reads it without nsrl installed."""
        save_stock(self, path)


def save_stock(vec_normalize: VecNormalize, path: str | Path) -> None:
    """Write a stock VecNormalize with the statistics of `vec_normalize`, atomically.

    Its `training` is off, so that playing the agent does not move the statistics, and nothing of the last
    episode (observations, infos) is in it.
    """
    stock: VecNormalize = VecNormalize.__new__(VecNormalize)
    state = vec_normalize.__getstate__()
    state.pop("old_obs", None)
    if vec_normalize.norm_obs:
        normalizer = ObservationNormalizer.from_vec_normalize(vec_normalize)
        assert normalizer is not None
        state["obs_rms"] = running_statistics(normalizer, RunningMeanStd)
    n_envs = vec_normalize.num_envs
    state |= {"training": False, "old_reward": np.array([]), "reset_infos": [{} for _ in range(n_envs)]}
    state |= {"_seeds": [None] * n_envs, "_options": [{} for _ in range(n_envs)]}
    stock.__dict__ |= {**state, "venv": None, "class_attributes": {}, "returns": np.zeros(n_envs)}
    with written_atomically(path) as temporary, temporary.open("wb") as file:
        pickle.dump(stock, file)


def running_statistics(normalizer: ObservationNormalizer, kind: type[RunningMeanStd]) -> Any:
    """The statistics as SB3 objects of class `kind`: one, or for Dict observations a dict of them."""
    parts = {}
    for key, mean in _by_key(normalizer.mean).items():
        parts[key] = kind(shape=mean.shape)
        parts[key].mean, parts[key].var = mean.copy(), _by_key(normalizer.var)[key].copy()
        parts[key].count = normalizer.count
    return parts if isinstance(normalizer.mean, dict) else parts[""]


def _frames(frame: tuple[int, ...], shape: tuple[int, ...]) -> int:
    """Frames in a stack of `shape`, along the last axis or the first, as SB3 stacks them; 0 where it is none."""
    for axis in (-1, 0):
        if not frame or len(frame) != len(shape) or shape[axis] <= frame[axis] or shape[axis] % max(frame[axis], 1):
            continue
        count = shape[axis] // frame[axis]
        widened = list(frame)
        widened[axis] *= count
        if tuple(widened) == shape:
            return count
    return 0


def _by_key(value: Statistic) -> dict[str, np.ndarray]:
    return value if isinstance(value, dict) else {"": value}


def _frozen(value: Any) -> Statistic:
    if isinstance(value, Mapping):
        return {key: np.asarray(_frozen(array)) for key, array in value.items()}
    array = np.array(value, dtype=np.float64)
    array.setflags(write=False)
    return array


def same_statistics(first: ObservationNormalizer, second: ObservationNormalizer) -> bool:
    """Whether two normalisers map every observation alike."""
    one, other = first.to_arrays() | {"count": np.zeros(())}, second.to_arrays() | {"count": np.zeros(())}
    return one.keys() == other.keys() and all(np.array_equal(one[key], other[key]) for key in one)
