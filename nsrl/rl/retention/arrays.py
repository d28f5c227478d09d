"""Where retention buffers come from besides a roll-out: arrays and data sets (`RetentionBuffer.from_...`)."""

from __future__ import annotations

import os
from typing import Any

import numpy as np
from gymnasium import spaces
from stable_baselines3.common.base_class import BaseAlgorithm

from nsrl.errors import NsrlError
from nsrl.rl.agents.agent import Agent, resolve_agent
from nsrl.rl.agents.normalization import ObservationNormalizer, same_statistics
from nsrl.rl.agents.spaces import describe_space
from nsrl.rl.playing.rollout import evaluation_mode
from nsrl.rl.policies.distributions import (
    DISTRIBUTIONS,
    INVALID,
    choices_of,
    described_distribution,
    distribution_for,
    is_maskable,
)
from nsrl.rl.policies.observations import Observations, map_arrays, reference_outputs
from nsrl.rl.retention.collection import circumstances, identity, split
from nsrl.rl.retention.states import RetainedStates

Reference = BaseAlgorithm | Agent | str | os.PathLike[str]


def from_arrays(
    kind: type[RetainedStates],
    observations: Observations,
    agent: Reference | None = None,
    *,
    outputs: Any = None,
    action_space: spaces.Space | None = None,
    observation_space: spaces.Space | None = None,
    log_std: Any = None,
    action_masks: Any = None,
    weights: Any = None,
    normalizer: ObservationNormalizer | None = None,
    heldout: float | np.ndarray = 0.2,
    seed: int = 0,
    task: str | None = None,
    trust: bool = False,
) -> RetainedStates:
    """A buffer of given states, with the outputs of an agent on them or with given outputs.

    Args:
        kind: the class of the buffer; `RetentionBuffer.from_arrays` passes it.
        observations: raw observations, (N, ...), or a dict of such arrays; images with their channels first.
        agent: the reference policy; or else give `outputs` and `action_space`.
        outputs: reference logits or means, (N, O).
        action_space: what the outputs are for; it tells the family.
        observation_space: of the policy to be protected; default Box observations of the arrays' shapes.
        log_std: reference log standard deviations of given means, (O,).
        action_masks: which actions are valid in each state, (N, O) bool; of a MaskablePPO.
        weights: importance of each state, (N,), in any unit; stored with mean 1.
        normalizer: what the policy to be protected does to raw observations; default the agent's.
        heldout: share of the states held out, or which they are, (N,) bool.
        seed: of the held-out split.
        task: name of the task in logs.
        trust: let `agents.load` unpickle, when `agent` is a path.

    Raises:
        NsrlError: for arrays that do not fit each other or the agent.
    """
    if (agent is None) == (outputs is None):
        raise NsrlError("give either the agent whose outputs are the reference, or the outputs themselves")
    observations = _as_arrays(observations)
    if agent is not None:
        fields = labelled(observations, agent, normalizer, trust, action_masks)
    else:
        fields = _recorded(observations, outputs, action_space, observation_space, log_std, normalizer)
    if action_masks is not None:
        if not DISTRIBUTIONS[fields["family"]].takes_masks:
            raise NsrlError("action_masks are for Discrete and MultiDiscrete actions only; leave them out")
        fields["outputs"] = _masked(fields["outputs"], action_masks)
    n = len(fields["outputs"])
    fields["provenance"] |= {
        "env_id": None,
        "task": task or "old",
        "seed": int(seed),
        "select": "arrays",
        "n_states": n,
    }
    return kind(**fields, weights=_mean_one(weights), heldout=heldout_states(n, heldout, seed))


def labelled(
    observations: Observations,
    agent: Reference,
    normalizer: ObservationNormalizer | None,
    trust: bool,
    action_masks: Any = None,
) -> dict[str, Any]:
    """Fields of a buffer with an agent's outputs.

    Raises:
        NsrlError: it acts under masks that are not given, or has other observation statistics than those given.
    """
    model, trained, source = resolve_agent(agent, trust)
    if is_maskable(model.policy) and action_masks is None:
        raise NsrlError(
            f"{type(model).__name__} acts under action masks, which only from_arrays takes: pass it action_masks, "
            "(N, O) bool, or collect the buffer from the environment"
        )
    if trained is not None and normalizer is not None and not same_statistics(trained, normalizer):
        raise NsrlError(
            "the normalizer has other observation statistics than the agent; leave it out to use the agent's"
        )
    normalizer = trained or normalizer
    observations = fitting(observations, model.observation_space)
    if normalizer is not None:
        normalizer.check(model.observation_space)
    with evaluation_mode(model.policy):
        outputs = reference_outputs(model.policy, observations, normalizer)  # type: ignore[arg-type]
    return {
        "observations": observations,
        "outputs": outputs,
        **described_distribution(model),
        "normalizer": normalizer,
        "provenance": identity(model, source),
    }


def _recorded(
    observations: Observations,
    outputs: Any,
    action_space: spaces.Space | None,
    observation_space: spaces.Space | None,
    log_std: Any,
    normalizer: ObservationNormalizer | None,
) -> dict[str, Any]:
    """Fields of a buffer with given outputs."""
    distribution = distribution_for(action_space)
    if action_space is None or distribution is None:
        raise NsrlError(
            f"action_space is {action_space}, but must say what the outputs are for: a Discrete, MultiDiscrete, "
            "MultiBinary or Box space"
        )
    outputs = np.asarray(outputs, dtype=np.float32)
    observation_space = observation_space or _box_space(observations)
    observations = fitting(observations, observation_space)
    width = sum(distribution.sizes(action_space))
    if outputs.ndim != 2 or outputs.shape[1] != width:
        raise NsrlError(f"outputs has shape {outputs.shape}, but {action_space} needs (N, {width})")
    if normalizer is not None:
        normalizer.check(observation_space)
    described = {"observation_space": observation_space, "action_space": action_space}
    return {
        "observations": observations,
        "outputs": outputs,
        "family": distribution.family,
        "log_std": None if log_std is None else np.asarray(log_std, dtype=np.float32),
        "nvec": choices_of(action_space),
        "normalizer": normalizer,
        "provenance": {**{key: describe_space(space) for key, space in described.items()}, **circumstances()},
    }


def _masked(outputs: np.ndarray, action_masks: Any) -> np.ndarray:
    """Reference logits with those of invalid actions at -1e8, as `nsrl.rl.retention.collection` has them."""
    masks = np.asarray(action_masks)
    if masks.dtype != np.bool_ or masks.shape != outputs.shape or not masks.any(1).all():
        raise NsrlError(
            f"action_masks has dtype {masks.dtype} and shape {masks.shape}, but must be bool, {outputs.shape}, with a "
            "valid action in each row"
        )
    return np.where(masks, outputs, np.float32(INVALID))


def _mean_one(weights: Any) -> Any:
    if weights is None:
        return None
    weights = np.asarray(weights, dtype=np.float32)
    mean = float(weights.mean()) if weights.size else 0.0
    return weights / np.float32(mean) if mean > 0.0 else weights


def heldout_states(n: int, heldout: float | np.ndarray, seed: int) -> np.ndarray:
    """Which of n states are held out, (n,) bool: those given, or a random share.

    Raises:
        NsrlError: a share outside [0, 1), or an array of another shape.
    """
    if isinstance(heldout, np.ndarray):
        return heldout
    if not 0.0 <= heldout < 1.0:
        raise NsrlError(f"heldout is {heldout!r}, but must be in [0, 1) or an array that says which states are")
    return split(n, heldout, np.random.default_rng(seed))


def _as_arrays(observations: Any) -> Observations:
    arrays = map_arrays(np.asarray, dict(observations) if isinstance(observations, dict) else observations)
    named = arrays if isinstance(arrays, dict) else {"": arrays}
    if not named or any(array.ndim == 0 or len(array) == 0 for array in named.values()):
        raise NsrlError("observations is empty; give at least one state, samples first")
    return arrays


def fitting(observations: Observations, space: spaces.Space) -> Observations:
    """Observations in the number format of a space, where they can be observations of it.

    Raises:
        NsrlError: naming both, for other keys, shapes, or numbers that a policy of this space would misread.
    """
    parts = space.spaces if isinstance(space, spaces.Dict) else {"": space}
    named = observations if isinstance(observations, dict) else {"": observations}
    if isinstance(space, spaces.Dict) != isinstance(observations, dict) or parts.keys() != named.keys():
        raise NsrlError(f"observations has the keys {sorted(named)}, but the agent reads {space}")
    fitted = {
        key: _fitting(f"observations[{key!r}]" if key else "observations", array, parts[key])
        for key, array in named.items()
    }
    return fitted if isinstance(observations, dict) else fitted[""]


def _fitting(name: str, array: np.ndarray, space: spaces.Space) -> np.ndarray:
    if array.shape[1:] != space.shape:
        raise NsrlError(f"{name} has shape {array.shape}, but {space} needs (N, ...) with {space.shape}")
    if array.dtype.kind not in "biuf" or space.dtype is None:
        return array  # the buffer's own checks name what is no number
    whole = array.dtype.kind != "f"
    if space.dtype.kind == "f":
        if whole and isinstance(space, spaces.Box) and bool(((array < space.low) | (array > space.high)).any()):
            raise NsrlError(
                f"{name} holds whole numbers up to {array.max()}, but the policy reads numbers up to "
                f"{space.high.max():g} ({space}); pass the observations as it was given them"
            )
        return array
    if not whole and not bool((np.mod(array, 1.0) == 0.0).all()):
        raise NsrlError(
            f"{name} holds fractions, but the policy reads {space.dtype} ({space}); pass the observations as the "
            "environment gives them: images from 0 to 255, which the policy divides by 255 itself"
        )
    if not whole and array.size and array.max() <= 1.0 and isinstance(space, spaces.Box) and space.high.max() > 1.0:
        raise NsrlError(
            f"{name} holds the numbers 0 and 1 only, as {array.dtype}: images scaled to [0, 1] would be scaled again; "
            f"pass them from 0 to 255, or as {space.dtype} where 1 is meant"
        )
    low, high = _bounds(space)
    if bool(((array < low) | (array > high)).any()):
        raise NsrlError(f"{name} has values from {array.min()} to {array.max()}, which are not all in {space}")
    return array if whole else array.astype(space.dtype)


def _bounds(space: spaces.Space) -> tuple[Any, Any]:
    """Smallest and largest numbers of a space of whole ones."""
    if isinstance(space, spaces.Discrete):
        return space.start, space.start + space.n - 1
    if isinstance(space, spaces.MultiDiscrete):
        return space.start, space.start + space.nvec - 1
    if isinstance(space, spaces.Box):
        return space.low, space.high
    return 0, 1


def _box_space(observations: Observations) -> spaces.Space:
    def box(array: np.ndarray) -> spaces.Box:
        return spaces.Box(-np.inf, np.inf, array.shape[1:], np.float32)

    if isinstance(observations, dict):
        return spaces.Dict({key: box(array) for key, array in observations.items()})
    return box(observations)
