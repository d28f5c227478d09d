"""Observations as a policy reads them: arrays or dicts of arrays, normalised, as tensors, in batches."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any, Protocol

import numpy as np
import torch
from stable_baselines3.common.policies import ActorCriticPolicy
from stable_baselines3.common.utils import obs_as_tensor
from torch import Tensor

from nsrl.rl.policies.actor_critic import Observation, policy_outputs


def concatenated(parts: Sequence[Observations]) -> Observations:
    """Join observations along their first axis."""
    first = parts[0]
    if isinstance(first, dict):
        return {key: np.concatenate([part[key] for part in parts]) for key in first}  # type: ignore[call-overload]
    return np.concatenate(parts)  # type: ignore[arg-type]


Observations = np.ndarray | dict[str, np.ndarray]

BATCH = 4096


class Normalizer(Protocol):
    """What a roll-out needs of an `ObservationNormalizer`."""

    def normalize(self, obs: Any) -> Any:
        """Map raw observations to what the policy was trained on."""


def map_arrays(function: Callable[[np.ndarray], np.ndarray], observations: Observations) -> Observations:
    """Apply a function to the array, or to each array of a Dict observation."""
    if isinstance(observations, dict):
        return {key: function(array) for key, array in observations.items()}
    return function(observations)


def stack(observations: list[Any]) -> Observations:
    """Stack observations along a new first axis."""
    first = observations[0]
    if isinstance(first, dict):
        return {key: np.stack([observation[key] for observation in observations]) for key in first}
    return np.stack(observations)


def policy_inputs(observations: Observations, normalizer: Normalizer | None, device: Any = "cpu") -> Observation:
    """Raw observations as the tensors that `policy.extract_features` takes.

    Floating point becomes float32; images stay uint8 and indices stay integers, since the policy scales and
    one-hot-encodes them itself.
    """
    if normalizer is not None:
        observations = normalizer.normalize(observations)

    def writeable(array: np.ndarray) -> np.ndarray:
        return np.array(array, dtype=np.float32 if array.dtype.kind == "f" else array.dtype)

    return obs_as_tensor(map_arrays(writeable, observations), torch.device(device))  # type: ignore[arg-type]


def in_batches(
    function: Callable[[Observation], Tensor],
    policy: ActorCriticPolicy,
    observations: Observations,
    normalizer: Normalizer | None,
) -> np.ndarray:
    """`function` of the policy's inputs for N raw observations, (N, ...) float32, without gradients."""
    n = len(next(iter(observations.values())) if isinstance(observations, dict) else observations)
    parts = []
    with torch.no_grad():
        for start in range(0, n, BATCH):
            batch = map_arrays(lambda array, start=start: array[start : start + BATCH], observations)  # type: ignore[misc]
            parts.append(function(policy_inputs(batch, normalizer, policy.device)).float().cpu().numpy())
    return np.concatenate(parts)


def reference_outputs(
    policy: ActorCriticPolicy, observations: Observations, normalizer: Normalizer | None
) -> np.ndarray:
    """Logits or means of the policy on N raw observations, (N, O) float32."""
    return in_batches(lambda inputs: policy_outputs(policy, inputs), policy, observations, normalizer)
