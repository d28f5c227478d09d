"""The environments of all processes of a run as one vectorised environment.

Every process hands the same actions to all, steps those of its own, and sees what all of them answer: one all-gather of
a fixed number of bytes a step. So every process collects the whole roll-out, statistics and episodes included.
"""

from __future__ import annotations

import pickle
import zlib
from collections.abc import Callable
from typing import Any

import numpy as np
from gymnasium import spaces
from stable_baselines3.common.vec_env import VecEnv, VecEnvWrapper, VecNormalize, unwrap_vec_wrapper

from nsrl.errors import NsrlError
from nsrl.rl.parallel.ranks import Ranks

Observations = Any  # an array, or arrays by key
#: What of an environment's infos the other processes get to see, beside the last observation of an episode.
EPISODE = ("r", "l", "t")


class SharedEnvs(VecEnv):
    """All environments of several processes, this one's own among them.

    Environment number i of process r has the seed of number r * n + i of one process with all of them. Of infos, the
    other processes see the last observation of an episode, `TimeLimit.truncated`, the `episode` of a Monitor and
    `is_success`. Whatever is asked of the environments has to be asked by all processes alike.

    Args:
        own: environments of this process, as many and of the same spaces in each; not inside a VecNormalize, whose
            statistics belong around all of them.
        ranks: the processes.

    Attributes:
        stopping: asked at every step whether this process has been told to stop.
        stopped: whether any has been, as of the last step; the same in all.

    Raises:
        NsrlError: their number, or their spaces, differ between the processes, or cannot be shared.
    """

    def __init__(self, own: VecEnv, ranks: Ranks):
        if isinstance(own, VecEnvWrapper) and unwrap_vec_wrapper(own, VecNormalize) is not None:
            raise NsrlError(
                "environments inside a VecNormalize cannot be shared by several processes, each with other statistics; "
                "share the bare ones and put VecNormalize around SharedEnvs"
            )
        self.own, self.ranks = own, ranks
        self.stopping: Callable[[], bool] = lambda: False
        self.stopped = False
        self._parts = _parts(own.observation_space)
        told = repr((own.num_envs, own.observation_space, own.action_space)).encode()
        others = ranks.gather_bytes(told)
        if any(other != told for other in others):
            raise NsrlError(
                "the environments of the processes differ: "
                f"{' and '.join(sorted({other.decode() for other in others}))}; give all the same task and n_envs"
            )
        self._first = ranks.number * own.num_envs
        self._rows = slice(self._first, self._first + own.num_envs)
        super().__init__(ranks.count * own.num_envs, own.observation_space, own.action_space)

    @property
    def envs(self) -> Any:
        """The single environments of this process, where they can be reached."""
        return getattr(self.own, "envs", ())

    def seed(self, seed: int | None = None) -> list[int | None]:
        """As SB3's: environment i of all has seed + i; without a seed, process 0 draws one for all."""
        drawn = int(np.random.randint(0, 2**32 - 1, dtype=np.uint32)) if seed is None else int(seed)
        if seed is None:
            drawn = int.from_bytes(self.ranks.gather_bytes(drawn.to_bytes(8, "little"))[0], "little")
        self.own.seed(drawn + self._first)
        self._seeds = [drawn + index for index in range(self.num_envs)]
        return self._seeds

    def set_options(self, options: Any = None) -> None:
        """As SB3's."""
        super().set_options(options)
        self.own.set_options(self._options[self._rows])

    def reset(self) -> Observations:
        """Observations of all, (N, ...)."""
        found = self.ranks.gather(self._packed(self.own.reset()))
        self._reset_seeds()
        self._reset_options()
        return self._observations(self._columns(found))

    def step_async(self, actions: np.ndarray) -> None:
        """Hand this process's environments their rows of the actions of all, (N, ...)."""
        self._told = zlib.crc32(np.ascontiguousarray(actions).tobytes())
        self.own.step_async(actions[self._rows])

    def step_wait(self) -> Any:
        """Observations, rewards, ends and infos of all.

        Raises:
            NsrlError: the processes have given different actions: they have ceased to compute the same.
            ProcessLost: one of them has ended.
        """
        observations, rewards, dones, infos = self.own.step_wait()
        head = np.array([(self._told, self.stopping())], dtype=[("actions", "<u4"), ("stop", "u1")])
        ends = np.zeros(self.own.num_envs, dtype=END)
        last = {key: np.zeros((self.own.num_envs, *shape), kind) for key, shape, kind in self._parts}
        for row, info in enumerate(infos):
            _describe(ends, row, info)
            if "terminal_observation" in info:
                for key, part in _by_key(info["terminal_observation"]).items():
                    last[key][row] = part
        ends["reward"], ends["done"] = rewards, dones
        sent = [_bytes(head), _bytes(ends), self._packed(observations), *(_bytes(part) for part in last.values())]
        found = self.ranks.gather(np.concatenate(sent))
        heads, found = _taken(found, head.dtype, 1)
        ends, found = _taken(found, END, self.own.num_envs)
        if len(set(heads["actions"].tolist())) > 1:
            raise NsrlError(
                "the processes of this run act differently: an environment or a callback draws from the global random "
                "generators in one of them, they were given different seeds, or their processors round differently; "
                "give all the same seed, and let environments draw from their own np_random"
            )
        self.stopped = bool(heads["stop"].any())
        size = sum(part.size * part.itemsize for part in last.values())
        seen, ended = self._columns(found[:, :-size]), self._columns(found[:, -size:])
        shown = [_info(end, _at(ended, row)) for row, end in enumerate(ends)]
        shown[self._rows] = infos  # of its own, a process sees everything
        return self._observations(seen), np.array(ends["reward"]), ends["done"].astype(bool), shown

    def close(self) -> None:
        """Close this process's environments."""
        self.own.close()

    def get_attr(self, attr_name: str, indices: Any = None) -> list[Any]:
        """As SB3's, of all environments."""
        return self._asked(lambda: self.own.get_attr(attr_name), indices)

    def set_attr(self, attr_name: str, value: Any, indices: Any = None) -> None:
        """As SB3's; every process sets those of its own."""
        own = [
            index - self._first for index in self._get_indices(indices) if 0 <= index - self._first < self.own.num_envs
        ]
        if own:
            self.own.set_attr(attr_name, value, own)

    def env_method(self, method_name: str, *args: Any, indices: Any = None, **options: Any) -> list[Any]:
        """As SB3's, of all environments, which all are asked whatever the indices."""
        return self._asked(lambda: self.own.env_method(method_name, *args, **options), indices)

    def env_is_wrapped(self, wrapper_class: Any, indices: Any = None) -> list[bool]:
        """As SB3's, of all environments, which are wrapped alike."""
        wrapped = self.own.env_is_wrapped(wrapper_class) * self.ranks.count
        return [wrapped[index] for index in self._get_indices(indices)]

    def _reset_seeds(self) -> None:
        super()._reset_seeds()
        self.own._reset_seeds()

    def _reset_options(self) -> None:
        super()._reset_options()
        self.own._reset_options()

    def _asked(self, ask: Callable[[], list[Any]], indices: Any) -> list[Any]:
        """Answers of all processes, and what any of them raises; one program, whose pickles are its own."""
        try:
            answer = pickle.dumps((ask(), None))
        except Exception as error:  # the others wait for an answer
            answer = pickle.dumps((None, _sendable(error)))
        answers: list[Any] = []
        for part, refusal in map(pickle.loads, self.ranks.gather_bytes(answer)):
            if refusal is not None:
                raise refusal
            answers += part
        return [answers[index] for index in self._get_indices(indices)]

    def _packed(self, observations: Observations) -> np.ndarray:
        given = _by_key(observations)
        return np.concatenate([_bytes(np.asarray(given[key], kind)) for key, _, kind in self._parts])

    def _columns(self, found: np.ndarray) -> dict[str | None, np.ndarray]:
        """Arrays by key, of all processes one below the other."""
        columns = {}
        for key, shape, kind in self._parts:
            rows, found = _taken(found, kind, self.own.num_envs * int(np.prod(shape)))
            columns[key] = rows.reshape(-1, *shape)
        return columns

    def _observations(self, columns: dict[str | None, np.ndarray]) -> Observations:
        return columns[None] if None in columns else columns


#: What of a step is sent of an environment: reward, end, and what its info says.
END = np.dtype(
    [
        ("reward", "<f4"),
        ("done", "u1"),
        ("ended", "u1"),  # whether there is a last observation
        ("told", "u1"),  # whether the info says if the episode was cut off
        ("truncated", "u1"),
        ("judged", "u1"),  # whether the info says if it was a success
        ("success", "u1"),
        ("episode", "u1"),
        *((name, "<f8") for name in EPISODE),
    ]
)


def _describe(ends: np.ndarray, row: int, info: dict[str, Any]) -> None:
    ends["ended"][row] = "terminal_observation" in info
    ends["told"][row] = "TimeLimit.truncated" in info
    ends["truncated"][row] = bool(info.get("TimeLimit.truncated", False))
    ends["judged"][row] = info.get("is_success") is not None
    ends["success"][row] = bool(info.get("is_success") or False)
    if "episode" in info:
        ends["episode"][row] = True
        for name in EPISODE:
            ends[name][row] = info["episode"].get(name, np.nan)


def _info(end: Any, last: Observations) -> dict[str, Any]:
    info: dict[str, Any] = {}
    if end["told"]:
        info["TimeLimit.truncated"] = bool(end["truncated"])
    if end["judged"]:
        info["is_success"] = bool(end["success"])
    if end["episode"]:
        info["episode"] = {"r": float(end["r"]), "l": int(end["l"]), "t": float(end["t"])}
    if end["ended"]:
        info["terminal_observation"] = last
    return info


def _at(columns: dict[str | None, np.ndarray], row: int) -> Observations:
    return columns[None][row].copy() if None in columns else {key: part[row].copy() for key, part in columns.items()}


def _by_key(observations: Observations) -> dict[str | None, Any]:
    return observations if isinstance(observations, dict) else {None: observations}


def _parts(space: spaces.Space) -> list[tuple[str | None, tuple[int, ...], np.dtype]]:
    """Key, shape and kind of every array that an observation consists of."""
    by_key = space.spaces if isinstance(space, spaces.Dict) else {None: space}
    for part in by_key.values():
        if part.shape is None or part.dtype is None:
            raise NsrlError(
                f"observations of {part} cannot be shared by several processes; give arrays, or a Dict of them"
            )
    return [(key, tuple(part.shape), np.dtype(part.dtype)) for key, part in by_key.items()]  # type: ignore[arg-type,misc]


def _bytes(array: np.ndarray) -> np.ndarray:
    return np.frombuffer(np.ascontiguousarray(array).tobytes(), np.uint8)


def _taken(found: np.ndarray, kind: Any, count: int) -> tuple[np.ndarray, np.ndarray]:
    """So many entries of a kind from the front of every process's bytes, and what is behind them."""
    size = np.dtype(kind).itemsize * count
    return np.array(found[:, :size]).reshape(-1).view(kind), found[:, size:]  # a copy, which may be written to


def _sendable(error: Exception) -> Exception:
    try:
        return pickle.loads(pickle.dumps(error))
    except Exception:  # one that holds what cannot be sent
        return RuntimeError(repr(error))
