"""What a Stable-Baselines3 policy computes: its distribution parameters as a plain function of observations."""

from __future__ import annotations

from stable_baselines3.common.distributions import (
    BernoulliDistribution,
    CategoricalDistribution,
    DiagGaussianDistribution,
    MultiCategoricalDistribution,
)
from stable_baselines3.common.policies import ActorCriticPolicy, BasePolicy
from torch import Tensor

from nsrl.errors import NsrlError

Observation = Tensor | dict[str, Tensor]

FAMILIES = {
    CategoricalDistribution: "categorical",
    MultiCategoricalDistribution: "multi_categorical",
    BernoulliDistribution: "bernoulli",
    DiagGaussianDistribution: "gaussian",
}


def action_family(policy: ActorCriticPolicy) -> str:
    """Name of the action distribution: "categorical", "multi_categorical", "bernoulli" or "gaussian".

    Raises:
        NsrlError: for a distribution whose outputs are not plain logits or a mean (gSDE, squashed Gaussian).
    """
    family = FAMILIES.get(type(policy.action_dist))
    if family is None:
        raise NsrlError(
            f"policies with {type(policy.action_dist).__name__} cannot be protected: its noise depends on the "
            "state through learnt features; train the agent with use_sde=False"
        )
    return family


def policy_outputs(policy: ActorCriticPolicy, observations: Observation) -> Tensor:
    """Logits (discrete actions) or mean (Box actions) of the policy, shape (N, O).

    Goes through the actor only, as `ActorCriticPolicy.get_distribution` does, but builds no distribution object:
    SB3's is a mutable singleton that the next call overwrites.
    """
    # The base class's method: ActorCriticPolicy's own returns a pair when actor and critic extract separately.
    features = BasePolicy.extract_features(policy, observations, policy.pi_features_extractor)
    return policy.action_net(policy.mlp_extractor.forward_actor(features))  # type: ignore[arg-type]
