"""What a Stable-Baselines3 policy computes: observations in, distribution parameters out."""

from nsrl.rl.policies.actor_critic import Observation, check_steady, policy_outputs
from nsrl.rl.policies.distributions import action_family, is_maskable
from nsrl.rl.policies.observations import Observations, policy_inputs

__all__ = [
    "Observation",
    "Observations",
    "action_family",
    "check_steady",
    "is_maskable",
    "policy_inputs",
    "policy_outputs",
]
