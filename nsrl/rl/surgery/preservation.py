"""Whether an enlarged policy is still the old one: both evaluated on random inputs."""

from __future__ import annotations

import copy
from typing import Any

import numpy as np
import torch
from gymnasium import spaces
from stable_baselines3.common.policies import ActorCriticPolicy, BasePolicy
from torch import Tensor

from nsrl.errors import NsrlError
from nsrl.rl.playing.rollout import policy_inputs, stack
from nsrl.rl.policies.actor_critic import Observation
from nsrl.rl.surgery.widening import Widening

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
