"""Actor and critic of a policy that are chains of linear layers, and nothing but what SB3 makes of them."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from stable_baselines3.common.distributions import (
    BernoulliDistribution,
    CategoricalDistribution,
    DiagGaussianDistribution,
    MultiCategoricalDistribution,
)
from stable_baselines3.common.policies import ActorCriticPolicy
from stable_baselines3.common.torch_layers import FlattenExtractor
from torch import nn

from nsrl.projection.hooks import is_hooked
from nsrl.projection.jacobians.matrix_free import Stage, linear_chain
from nsrl.rl.policies.actor_critic import critic_layers, hidden_layers

#: Distributions whose likelihood is written down. Subclasses may do anything.
KNOWN = (CategoricalDistribution, MultiCategoricalDistribution, BernoulliDistribution, DiagGaussianDistribution)

#: Methods of SB3's policy by which roll-outs and updates reach its networks.
METHODS = (
    "forward",
    "evaluate_actions",
    "predict_values",
    "extract_features",
    "obs_to_tensor",
    "_get_action_dist_from_latent",
    "set_training_mode",
)


@dataclass(frozen=True)
class Chains:
    """Actor and critic as chains, and what of them is trained.

    Attributes:
        actor, critic: their stages; positions are those among the parameters of each.
        actor_parameters, critic_parameters: trainable ones of each.
        log_std: the state-independent log standard deviation, where it is trained.
    """

    actor: tuple[Stage, ...]
    critic: tuple[Stage, ...]
    actor_parameters: tuple[nn.Parameter, ...]
    critic_parameters: tuple[nn.Parameter, ...]
    log_std: nn.Parameter | None

    @property
    def parameters(self) -> tuple[nn.Parameter, ...]:
        """All that are trained: the actor's, the critic's, and log_std."""
        return (*self.actor_parameters, *self.critic_parameters, *(() if self.log_std is None else (self.log_std,)))


def chains_of(policy: ActorCriticPolicy) -> Chains | None:
    """A policy's networks as chains; None where anything is not as SB3's MlpPolicy has it.

    It is not where a method of the policy or a network's is another one, where anything hooks into a module or a
    parameter, where features are more than flattened observations, where layers are shared or of another kind, where
    the distribution is none of `KNOWN`, or on another device than the CPU.
    """
    if not _is_stock(policy) or is_hooked(policy):
        return None
    hidden, critic = hidden_layers(policy), critic_layers(policy)
    if hidden is None or critic is None:
        return None
    trained = [parameter for parameter in policy.parameters() if parameter.requires_grad]
    layers = ([*hidden, policy.action_net], critic)
    ours, theirs = ({p for layer in network for p in layer.parameters()} for network in layers)
    parameters = [[p for p in trained if p in owned] for owned in (ours, theirs)]
    chains = [linear_chain(network, some) for network, some in zip(layers, parameters, strict=True)]
    spread = getattr(policy, "log_std", None)
    others = [p for p in trained if p not in ours and p not in theirs]
    if chains[0] is None or chains[1] is None or ours & theirs or any(p is not spread for p in others):
        return None
    if others and type(policy.action_dist) is not DiagGaussianDistribution:
        return None
    log_std = others[0] if others else None
    return Chains(chains[0], chains[1], tuple(parameters[0]), tuple(parameters[1]), log_std)


def _is_stock(policy: ActorCriticPolicy) -> bool:
    kind = type(policy)
    extractors = (policy.features_extractor, policy.pi_features_extractor, policy.vf_features_extractor)
    formats = {(parameter.dtype, parameter.device.type) for parameter in policy.parameters()}
    return (
        all(getattr(kind, name) is getattr(ActorCriticPolicy, name) for name in METHODS)
        and not any(name in vars(policy) for name in METHODS)
        and type(policy.action_dist) in KNOWN
        and not policy.use_sde
        and not policy.squash_output
        and all(isinstance(extractor, FlattenExtractor) for extractor in extractors)
        and not any(True for extractor in extractors for _ in (*extractor.parameters(), *extractor.buffers()))
        and len(formats) == 1
        and formats <= {(torch.float32, "cpu"), (torch.float64, "cpu")}
    )
