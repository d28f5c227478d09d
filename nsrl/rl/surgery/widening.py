"""A widened observation: which entries of the new one are the old one's, and what follows for arrays and statistics."""

from __future__ import annotations

import copy
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from gymnasium import spaces
from stable_baselines3.common.policies import ActorCriticPolicy, BasePolicy
from stable_baselines3.common.preprocessing import get_flattened_obs_dim
from stable_baselines3.common.torch_layers import BaseFeaturesExtractor, CombinedExtractor, FlattenExtractor
from torch import Tensor, nn

from nsrl.errors import NsrlError
from nsrl.rl.agents.normalization import ObservationNormalizer
from nsrl.rl.policies.actor_critic import Observation
from nsrl.rl.policies.observations import Observations, policy_inputs, stack

Positions = Sequence[int] | Mapping[str, Sequence[int]]


@dataclass(frozen=True)
class Widening:
    """How the entries of an old observation lie in a new one.

    Attributes:
        new: the new observation space.
        kept: for each key of the old space ("" for one that is no Dict), the flat positions in the new array that hold
            the old entries, in the old order.
        shapes: shape of each old array.
    """

    new: spaces.Space
    kept: dict[str, np.ndarray]
    shapes: dict[str, tuple[int, ...]]

    def observations(self, observations: Observations, fill: float | Observations = 0.0) -> Observations:
        """Old observations as new ones, (N, ...); new entries are `fill`, or those of whole new observations."""
        old = _named(observations)
        n = len(next(iter(old.values())))
        widened = {}
        for key, space in _parts(self.new).items():
            if not isinstance(fill, float | int):
                array = np.array(_named(fill)[key])
            else:
                array = np.full((n, *(space.shape or ())), fill, old[key].dtype if key in old else space.dtype)
            if key in old:
                array.reshape(n, -1)[:, self.kept[key]] = old[key].reshape(n, -1)
            widened[key] = array
        return widened if isinstance(self.new, spaces.Dict) else widened[""]

    def normalizer(self, normalizer: ObservationNormalizer) -> ObservationNormalizer:
        """Statistics of the new observations: mean 0 and variance 1 where entries are new; new keys have none."""
        keyed = isinstance(normalizer.mean, dict)
        statistics: dict[str, Any] = {}
        for name, start in (("mean", 0.0), ("var", 1.0)):
            old, parts = _named(getattr(normalizer, name)), {}
            for key, array in old.items():
                parts[key] = np.full(_parts(self.new)[key].shape or (), start)
                parts[key].reshape(-1)[self.kept[key]] = array.reshape(-1)
            statistics[name] = parts if keyed else parts[""]
        return ObservationNormalizer(
            **statistics, epsilon=normalizer.epsilon, clip_obs=normalizer.clip_obs, count=normalizer.count
        )


def widening(
    shapes: Mapping[str, tuple[int, ...]] | tuple[int, ...], new: spaces.Space, positions: Positions | None = None
) -> Widening:
    """The widening from arrays of these shapes to a space.

    Args:
        shapes: shape of one old observation, or one a key.
        new: the new space; of a Dict, keys that are not in `shapes` are new.
        positions: where the new entries are in the (flattened) new observation; of a Dict, for each key that grew.
            Default: at the end of a vector.

    Raises:
        NsrlError: keys or entries would be lost, or the positions do not account for the new entries.
    """
    old, parts = _named(shapes), _parts(new)
    if isinstance(shapes, Mapping) != isinstance(new, spaces.Dict) or not old.keys() <= parts.keys():
        raise NsrlError(
            f"the new observation space {new} lacks {sorted(old.keys() - parts.keys()) or 'the form'} of the old one; "
            "a widened space keeps all that the old one has"
        )
    given: Mapping[str, Sequence[int]] = {}
    if positions is not None:
        given = positions if isinstance(positions, Mapping) else {"": positions}
    if not given.keys() <= old.keys():
        raise NsrlError(
            f"positions name {sorted(given.keys() - old.keys())}, but the old observation has {sorted(old)}"
        )
    kept = {key: _kept(key, shape, parts[key].shape or (), given.get(key)) for key, shape in old.items()}
    return Widening(new, kept, dict(old))


def feature_columns(old: ActorCriticPolicy, new: ActorCriticPolicy, wide: Widening) -> np.ndarray:
    """Where the F old features are among the new ones, (F,) int64.

    Raises:
        NsrlError: the feature extractor mixes its inputs before the first linear layer.
    """
    extractor, wider = old.features_extractor, new.features_extractor
    if type(extractor) is FlattenExtractor:
        return wide.kept[""]
    if type(extractor) is not CombinedExtractor:
        raise NsrlError(
            f"the features come from {type(extractor).__name__}, which mixes its inputs before the first linear layer; "
            "only policies on flattened observations (MlpPolicy, MultiInputPolicy) can be widened"
        )
    starts, start = {}, 0
    for key, part in wider.extractors.items():  # type: ignore[union-attr, operator]
        starts[key] = start
        start += _width(part, new.observation_space[key])  # type: ignore[index]
    columns = []
    for key, part in extractor.extractors.items():  # type: ignore[union-attr, operator]
        width = _width(part, old.observation_space[key])  # type: ignore[index]
        grew = width != _width(wider.extractors[key], new.observation_space[key])  # type: ignore[index, arg-type]
        columns.append(starts[key] + (wide.kept[key] if grew else np.arange(width)))
    return np.concatenate(columns)


def _width(extractor: nn.Module, space: spaces.Space) -> int:
    return extractor.features_dim if isinstance(extractor, BaseFeaturesExtractor) else get_flattened_obs_dim(space)


def _kept(key: str, old: tuple[int, ...], new: tuple[int, ...], positions: Sequence[int] | None) -> np.ndarray:
    name = f"observations[{key!r}]" if key else "the observation"
    before, after = int(np.prod(old)), int(np.prod(new))
    if positions is None:
        if old != new and (len(old) != 1 or len(new) != 1):
            raise NsrlError(f"{name} grows from {old} to {new}; pass positions, the flat positions of the new entries")
        positions = range(before, after)
    chosen = {int(position) for position in positions}
    if after < before or len(chosen) != after - before or len(chosen) != len(positions):
        raise NsrlError(
            f"{name} grows from {old} to {new}, which is {after - before} new entries, but positions are "
            f"{list(positions)}"
        )
    if chosen and not 0 <= min(chosen) <= max(chosen) < after:
        raise NsrlError(f"positions {list(positions)} leave {name}, which has the flat positions 0 to {after - 1}")
    return np.setdiff1d(np.arange(after), list(chosen))


def shapes_of(space: spaces.Space) -> dict[str, tuple[int, ...]] | tuple[int, ...]:
    """Shape of one observation of the space, or one a key."""
    if isinstance(space, spaces.Dict):
        return {key: tuple(part.shape or ()) for key, part in space.spaces.items()}
    return tuple(space.shape or ())


def _parts(space: spaces.Space) -> Mapping[str, spaces.Space]:
    return space.spaces if isinstance(space, spaces.Dict) else {"": space}


def _named(value: Any) -> Mapping[str, Any]:
    return value if isinstance(value, Mapping) else {"": value}


#: Largest difference of outputs or values that surgery may make, on random inputs.
EXACT = 1e-6

CHECKED = 256


def check_exact(old: ActorCriticPolicy, new: ActorCriticPolicy, wide: Widening, scale: float) -> None:
    """Raise NsrlError unless both policies have the same outputs (the old ones) and values on random inputs."""
    inputs, widened = random_inputs(wide, scale, old.device)
    before, after = _evaluated(old, inputs), _evaluated(new, widened)
    actions = before[0].shape[1]
    # torch's maximum is NaN where there is one, Python's may leave it out
    worst = float(torch.stack([(a - b[:, : a.shape[1]]).abs().max() for a, b in zip(before, after, strict=True)]).max())
    if not worst <= EXACT:
        raise NsrlError(
            f"surgery changed the {actions} outputs or the values by {worst:.3g} on random inputs, where {EXACT:g} is "
            "allowed; the policy reads its features in a way that surgery does not know"
        )


@torch.no_grad()
def _evaluated(policy: ActorCriticPolicy, inputs: Observation) -> tuple[Tensor, Tensor]:
    """Outputs and values behind the features in float64, in which another order of summation does not show."""
    networks = (policy.mlp_extractor, policy.action_net, policy.value_net)
    extractor, actor_head, critic_head = (copy.deepcopy(network).double() for network in networks)
    actor = BasePolicy.extract_features(policy, inputs, policy.pi_features_extractor)
    critic = BasePolicy.extract_features(policy, inputs, policy.vf_features_extractor)
    outputs = actor_head(extractor.forward_actor(actor.double()))  # type: ignore[operator]
    return outputs, critic_head(extractor.forward_critic(critic.double()))  # type: ignore[operator]


def random_inputs(wide: Widening, scale: float, device: Any) -> tuple[Observation, Observation]:
    """Random old observations, and the same widened: by random entries, or by zeros where new weights are not zero."""
    space = _drawable(wide.new)
    space.seed(0)
    widened = stack([space.sample() for _ in range(CHECKED)])
    named = widened if isinstance(widened, dict) else {"": widened}
    parts = {
        key: named[key].reshape(CHECKED, -1)[:, kept].reshape(CHECKED, *wide.shapes[key])
        for key, kept in wide.kept.items()
    }
    old = parts if isinstance(widened, dict) else parts[""]
    return policy_inputs(old, None, device), policy_inputs(wide.observations(old) if scale else widened, None, device)


def _drawable(space: spaces.Space) -> spaces.Space:
    """A copy of the space whose bounds of 1e3 and more count as none: uniform numbers between them say nothing."""
    if isinstance(space, spaces.Dict):
        return spaces.Dict([(key, _drawable(part)) for key, part in space.spaces.items()])
    if not isinstance(space, spaces.Box) or space.dtype.kind != "f":
        return copy.deepcopy(space)
    low = np.where(space.low > -1e3, space.low, -np.inf).astype(space.dtype)
    high = np.where(space.high < 1e3, space.high, np.inf).astype(space.dtype)
    return spaces.Box(low, high, dtype=space.dtype.type)
