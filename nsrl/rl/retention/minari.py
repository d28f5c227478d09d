"""States of a Minari data set, for retention buffers; needs the extra `minari`."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

import numpy as np
from gymnasium import spaces
from stable_baselines3.common.on_policy_algorithm import OnPolicyAlgorithm
from stable_baselines3.common.preprocessing import is_image_space, is_image_space_channels_first

from nsrl.errors import NsrlError
from nsrl.rl.agents.agent import Agent, resolve_agent
from nsrl.rl.agents.normalization import ObservationNormalizer
from nsrl.rl.playing.rollout import Rollout, advantages, evaluation_mode
from nsrl.rl.policies.observations import Observations, concatenated, map_arrays, stack
from nsrl.rl.retention import minari
from nsrl.rl.retention.arrays import Reference, heldout_states, labelled
from nsrl.rl.retention.collection import CollectionConfig, reward_unit
from nsrl.rl.retention.states import RetainedStates


def opened(dataset: Any) -> Any:
    """A `minari.MinariDataset`: the one given, the folder given, or the local one of this id.

    Raises:
        NsrlError: minari is not installed, or no such data set on this machine.
    """
    try:
        import minari
    except ImportError as error:
        raise NsrlError('Minari data sets need the package minari: pip install "nsrl[minari]"') from error
    if isinstance(dataset, minari.MinariDataset):
        return dataset
    if not isinstance(dataset, str | os.PathLike):
        raise NsrlError(f"the data set is a {type(dataset).__name__}, but must be a MinariDataset, an id or a folder")
    folder = Path(dataset).expanduser()
    folder = folder / "data" if (folder / "data").is_dir() else folder
    try:
        return minari.MinariDataset(folder) if folder.is_dir() else minari.load_dataset(os.fspath(dataset))
    except FileNotFoundError as error:
        raise NsrlError(
            f"there is no Minari data set {dataset} on this machine; fetch it with: minari download {dataset}"
        ) from error
    except (ValueError, KeyError, OSError, ImportError) as error:
        raise NsrlError(f"the Minari data set {dataset} cannot be read: {error}") from error


def chosen_states(
    dataset: Any,
    model: OnPolicyAlgorithm,
    normalizer: ObservationNormalizer | None,
    n_states: int,
    select: str,
    seed: int,
    quantile: float,
    reward_scale: float | None,
) -> tuple[Observations, dict[str, Any]]:
    """Raw observations of `n_states` steps of the data set, (n_states, ...), and the data set as plain JSON.

    select="advantage" holds the whole data set in memory; generalised advantages are the agent's own critic's, on the
    rewards of the data set.

    Raises:
        NsrlError: for bad arguments, or more states than the data set has.
    """
    CollectionConfig(n_states, select, seed, quantile=quantile, reward_scale=reward_scale)
    total = int(dataset.total_steps)
    if n_states > total:
        raise NsrlError(f"n_states is {n_states}, but the data set {dataset.id} has only {total} steps; ask for fewer")
    rng = np.random.default_rng(seed)
    candidates: Any = total
    scale = None
    if select == "advantage":
        rollout = _as_rollout(dataset)
        unit = reward_unit(reward_scale, model.get_vec_normalize_env(), normalizer)
        with evaluation_mode(model.policy):
            advantage, scale = advantages(model.policy, rollout, normalizer, model.gamma, model.gae_lambda, *unit)
        n_best = max(n_states, round(quantile * total))
        candidates = np.argsort(-advantage.ravel(), kind="stable")[:n_best]
    observations = _gathered(dataset, np.sort(rng.choice(candidates, n_states, replace=False)))
    env_spec = dataset.env_spec
    return observations, {
        "dataset": dataset.id,
        "env_id": None if env_spec is None else env_spec.id,
        "select": select,
        "n_transitions": total,
        "quantile": float(quantile) if select == "advantage" else None,
        "reward_scale": scale,
        "episodes": int(dataset.total_episodes),
    }


def _gathered(dataset: Any, chosen: np.ndarray) -> Observations:
    """Observations of the chosen steps, numbered through all episodes in order."""
    pieces, start = [], 0
    for episode in dataset.iterate_episodes():
        inside = chosen[(chosen >= start) & (chosen < start + len(episode))] - start
        if inside.size:
            pieces.append(_channels_first(map_arrays(lambda a, i=inside: a[i], episode.observations), dataset))  # type: ignore[misc]
        start += len(episode)
    return concatenated(pieces)


def _as_rollout(dataset: Any) -> Rollout:
    """The episodes one after the other, as if one environment had been stepped through them: T steps, E = 1."""
    seen, rewards, dones, truncations, finals = [], [], [], [], []
    steps = 0
    for episode in dataset.iterate_episodes():
        observations = _channels_first(episode.observations, dataset)
        seen.append(map_arrays(lambda array: array[:-1], observations))
        rewards.append(np.asarray(episode.rewards, dtype=np.float32))
        ends = np.zeros(len(episode), dtype=bool)
        ends[-1] = True
        dones.append(ends)
        steps += len(episode)
        # Whatever did not terminate was cut off: by a time limit, or by the end of the recording.
        if not episode.terminations[-1]:
            truncations.append((steps - 1, 0))
            finals.append(map_arrays(lambda array: array[-1], observations))
    last = map_arrays(lambda array: array[-1], observations)
    return Rollout(
        observations=map_arrays(lambda array: array[:, None], concatenated(seen)),
        rewards=np.concatenate(rewards)[:, None],
        dones=np.concatenate(dones)[:, None],
        last_observations=stack([last]),
        truncations=truncations,
        truncation_observations=finals,
        episode_returns=[float(part.sum()) for part in rewards],
    )


def _channels_first(observations: Observations, dataset: Any) -> Observations:
    """Images as SB3 shows them to a policy."""
    space = dataset.observation_space

    def moved(array: np.ndarray, part: spaces.Space) -> np.ndarray:
        last = isinstance(part, spaces.Box) and is_image_space(part) and not is_image_space_channels_first(part)
        return np.moveaxis(array, -1, 1) if last else array

    if isinstance(observations, dict):
        return {key: moved(array, space[key]) for key, array in observations.items()}
    return moved(observations, space)


def from_minari(
    kind: type[RetainedStates],
    dataset: Any,
    agent: Reference,
    n_states: int = 2048,
    select: str = "expert",
    seed: int = 0,
    *,
    quantile: float = 0.5,
    reward_scale: float | None = None,
    heldout: float | np.ndarray = 0.2,
    task: str | None = None,
    trust: bool = False,
) -> RetainedStates:
    """A buffer of states from a Minari data set; the reference outputs are the agent's, not the data's actions.

    Data without an agent: `nsrl.rl.retention.cloning.clone` makes one by behaviour cloning of the data's actions.

    Args:
        kind: the class of the buffer; `RetentionBuffer.from_minari` passes it.
        dataset: a `minari.MinariDataset`, the id of a local one, or its folder. Needs the extra `minari`.
        agent: the reference policy.
        n_states: states in the buffer, N.
        select: "expert" draws from all states, "advantage" from those of highest advantage, as in `collect`.
        seed: of the draw and the held-out split.
        quantile, reward_scale: as in `collect`.
        heldout, task, trust: as in `from_arrays`; the task is by default the environment's id.

    Raises:
        NsrlError: minari is not installed, no such data set, too few states, or an agent with other spaces.
    """
    data = minari.opened(dataset)
    model, trained, source = resolve_agent(agent, trust, data)
    observations, origin = minari.chosen_states(data, model, trained, n_states, select, seed, quantile, reward_scale)
    fields = labelled(observations, Agent(model, trained), None, trust)
    name = task or origin["env_id"] or data.id
    fields["provenance"] |= {**origin, "agent": source, "task": name, "seed": int(seed), "n_states": int(n_states)}
    return kind(**fields, heldout=heldout_states(n_states, heldout, seed))
