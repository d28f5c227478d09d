"""What a Stable-Baselines3 policy computes: observations in, distribution parameters out."""

from nsrl.rl.policies.actor_critic import Observation, policy_outputs
from nsrl.rl.policies.distributions import distribution_of, is_maskable
from nsrl.rl.policies.observations import Observations, policy_inputs
from nsrl.rl.policies.steadiness import check_steady

__all__ = [
    "Observation",
    "Observations",
    "check_steady",
    "distribution_of",
    "is_maskable",
    "policy_inputs",
    "policy_outputs",
]
