"""The retention buffer: states of the old task, and what the reference policy does there."""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
from gymnasium import Env
from stable_baselines3.common.base_class import BaseAlgorithm
from stable_baselines3.common.vec_env import VecEnv

from nsrl.errors import NsrlError
from nsrl.files import read_npz, write_npz
from nsrl.rl import agents
from nsrl.rl.agents.agent import Agent
from nsrl.rl.agents.normalization import ObservationNormalizer
from nsrl.rl.agents.spaces import check_spaces
from nsrl.rl.playing.rollout import Observations, Progress, map_arrays, policy_inputs
from nsrl.rl.policies.actor_critic import Observation
from nsrl.rl.retention import arrays as sources
from nsrl.rl.retention import collection, merging
from nsrl.rl.retention.buffer_file import FORMAT, arrays_of, fields_from
from nsrl.rl.retention.validation import check_content, check_policy


@dataclass(frozen=True, eq=False, repr=False)
class RetentionBuffer:
    """N states of the old task with the reference policy's outputs on them; all arrays are read-only.

    Attributes:
        observations: raw (unnormalised) observations, (N, ...), or a dict of such arrays.
        outputs: reference logits or means on the normalised observations, (N, O) float32.
        family: "categorical", "multi_categorical", "bernoulli" or "gaussian" (`policies.action_family`).
        log_std: reference log standard deviations, (O,) float32, or one row a source, (S, O); Gaussian only, else None.
        nvec: number of choices of each action, summing to O; multi-categorical only, else None.
        heldout: states kept out of training, on which generalisation is measured, (N,) bool; default none.
        weights: weight of each state in every mean KL, (N,) float32, in any unit; default ones.
        source: which of the S buffers that were merged a state comes from, (N,) int64; default zeros.
        normalizer: frozen observation statistics of the reference agent, or None.
        provenance: plain JSON: the agent's fingerprint, env, task, seed, selection, spaces, versions, return.

    Raises:
        NsrlError: for an array of wrong type or shape, NaN or infinity, or no states.
    """

    observations: Observations
    outputs: np.ndarray
    family: str
    log_std: np.ndarray | None = None
    nvec: tuple[int, ...] | None = None
    heldout: np.ndarray = None  # type: ignore[assignment]
    weights: np.ndarray = None  # type: ignore[assignment]
    source: np.ndarray = None  # type: ignore[assignment]
    normalizer: ObservationNormalizer | None = None
    provenance: dict[str, Any] = field(default_factory=dict)

    def __post_init__(self) -> None:
        n = len(self.outputs) if isinstance(self.outputs, np.ndarray) and self.outputs.ndim else 0
        for name, default in (
            ("heldout", np.zeros(n, dtype=bool)),
            ("weights", np.ones(n, dtype=np.float32)),
            ("source", np.zeros(n, dtype=np.int64)),
        ):
            if getattr(self, name) is None:
                object.__setattr__(self, name, default)
        check_content(self)
        for name in ("observations", "outputs", "log_std", "heldout", "weights", "source"):
            if getattr(self, name) is not None:
                object.__setattr__(self, name, map_arrays(_read_only, getattr(self, name)))

    @classmethod
    def collect(
        cls,
        agent: BaseAlgorithm | Agent | str | os.PathLike[str],
        env: str | Env | VecEnv | None = None,
        n_states: int = 2048,
        select: str = "expert",
        seed: int = 0,
        *,
        n_envs: int = 8,
        oversample: float = 4.0,
        quantile: float = 0.5,
        heldout: float = 0.2,
        task: str | None = None,
        reward_scale: float | None = None,
        trust: bool = False,
        progress: Progress | None = None,
    ) -> RetentionBuffer:
        """Roll the stochastic agent out on its own task and keep `n_states` of the states that it visits.

        The same seed gives the same buffer. The agent, the statistics and flags of a `VecNormalize`, and the
        global random generators stay as they were; a `VecEnv` that is passed in is left in mid-episode.

        Args:
            agent: an SB3 on-policy model, an `nsrl.rl.agents.Agent`, or a path that `agents.load` takes.
            env: env id, gymnasium.Env or VecEnv of the old task; None takes the model's own.
            n_states: states in the buffer, N.
            select: "expert" keeps states uniformly; "advantage" only among the share `quantile` of highest
                generalised advantage under the agent's critic (which drops states from which it recovers).
            seed: of environments, actions, selection and held-out split.
            n_envs: copies of the environment when `env` is an id.
            oversample: transitions to roll out for each state kept, so that states come from whole episodes.
            quantile: share of the transitions that select="advantage" draws from.
            heldout: share of the states that is held out; neighbours in time may fall on either side.
            task: name of the task in logs; default the env id.
            reward_scale: factor from raw rewards to the critic's unit, for select="advantage"; None takes the
                frozen statistics of a `VecNormalize` with norm_reward; where the agent's observations are
                normalised but reward statistics are missing, the factor that fits the critic; else 1.
            trust: let `agents.load` unpickle, when `agent` is a path.
            progress: called with (transitions so far, total) after each step.

        Raises:
            NsrlError: for bad arguments, an agent that is not on-policy, or an env with other spaces.
        """
        config = collection.CollectionConfig(
            n_states, select, seed, n_envs, oversample, quantile, heldout, task, reward_scale
        )
        return cls(**collection.collect(agent, env, config, trust, progress))

    from_arrays = classmethod(sources.from_arrays)
    from_minari = classmethod(sources.from_minari)
    from_agents = classmethod(merging.from_agents)
    merge = classmethod(merging.merge)

    def __len__(self) -> int:
        return len(self.outputs)

    def __repr__(self) -> str:
        origin = self.provenance
        return (
            f"RetentionBuffer({len(self)} states of {origin.get('task', 'an unnamed task')}, "
            f"select={origin.get('select')!r}, {self.family} with {self.outputs.shape[1]} outputs, "
            f"{len(self.heldout_indices)} held out, {'normalised' if self.normalizer else 'raw'} inputs, "
            f"return_mean={origin.get('return_mean')})"
        )

    @property
    def origins(self) -> tuple[dict[str, Any], ...]:
        """Provenance of each source: the buffers that were merged, or this one."""
        return tuple(self.provenance.get("sources") or [self.provenance])

    @property
    def tasks(self) -> tuple[str, ...]:
        """Task of each source; the same name twice where two sources are of one task."""
        return tuple(str(origin.get("task", "old")) for origin in self.origins)

    @property
    def spreads(self) -> np.ndarray | None:
        """Reference log standard deviations, (O,), or one row a state, (N, O), where the sources differ in them."""
        return self.log_std if self.log_std is None or self.log_std.ndim == 1 else self.log_std[self.source]

    @property
    def train_indices(self) -> np.ndarray:
        """Indices of the states that may be trained on, int64."""
        return np.flatnonzero(~self.heldout)

    @property
    def heldout_indices(self) -> np.ndarray:
        """Indices of the held-out states, int64."""
        return np.flatnonzero(self.heldout)

    def inputs(self, indices: Sequence[int] | np.ndarray | None = None, device: Any = "cpu") -> Observation:
        """Normalised observations as tensors for `policy.extract_features`, of all states or of some.

        Floating point is float32; images stay uint8 in the policy's channel order; Dict spaces give a dict.
        """
        chosen = self.observations
        if indices is not None:
            chosen = map_arrays(lambda array: array[np.asarray(indices)], chosen)
        return policy_inputs(chosen, self.normalizer, device)

    def check(
        self, model: BaseAlgorithm | Agent, env: Env | VecEnv | None = None, *, trust_agent: bool = False
    ) -> None:
        """Raise NsrlError unless this buffer describes `model` (and the spaces of `env` are the model's).

        The agent's measured KL on the buffer has to be 0 up to rounding; on a merged buffer, that on one source.

        Args:
            model: the agent about to be protected.
            env: the environment that it is about to be trained on.
            trust_agent: accept an agent other than the one the buffer was made with.
        """
        check_content(self)
        agent = model if isinstance(model, BaseAlgorithm) else model.model
        for key in ("observation_space", "action_space"):
            if key not in self.provenance:
                raise NsrlError(f"the buffer's provenance has no {key!r}; collect it with RetentionBuffer.collect")
        check_spaces(agent, self.provenance["observation_space"], self.provenance["action_space"], "the buffer's task")
        if env is not None:
            agents.check_spaces(agent, env)
        if not trust_agent:
            check_policy(self, agent.policy)  # type: ignore[arg-type]

    def digest(self) -> str:
        """SHA-256 of states, outputs, family, split, weights and statistics; the provenance is left out."""
        state = hashlib.sha256()
        arrays = arrays_of(self)
        header = {name: [str(array.dtype), array.shape] for name, array in arrays.items()}
        state.update(json.dumps([self.family, header], sort_keys=True).encode())
        for name in sorted(arrays):
            state.update(np.ascontiguousarray(arrays[name]).tobytes())
        return state.hexdigest()

    def save(self, path: str | os.PathLike[str]) -> Path:
        """Write an npz that holds no pickle; a file that is there survives until the new one is whole.

        Raises:
            NsrlError: when the file cannot be written.
        """
        header = {"family": self.family, "provenance": self.provenance}
        return write_npz(path, arrays_of(self), header, FORMAT if self.source.any() else 1)

    @classmethod
    def load(cls, path: str | os.PathLike[str]) -> RetentionBuffer:
        """Read a file that `save` wrote; nothing in it is ever unpickled.

        Raises:
            NsrlError: when the file is missing, damaged, of a newer format, or its content is not valid.
        """
        arrays, header = read_npz(path, FORMAT)
        try:
            return cls(**fields_from(arrays, header))
        except NsrlError as error:
            raise NsrlError(f"{path}: {error}") from error


def _read_only(array: np.ndarray) -> np.ndarray:
    if array.flags.writeable or array.base is not None:
        array = array.copy()
        array.flags.writeable = False
    return array
