"""The surrogate objective of a rollout: its value, its gradient, and the KL divergence that a step makes on it."""

from __future__ import annotations

import math
from collections.abc import Iterable
from dataclasses import replace
from typing import Any

import torch
from gymnasium import spaces
from stable_baselines3.common.policies import ActorCriticPolicy
from torch import Tensor, nn

from nsrl.projection.jacobians.matrix_free import PolicyJacobian
from nsrl.projection.metrics import OutputMetric
from nsrl.projection.optimizer import FlatParameters
from nsrl.rl.policies.actor_critic import (
    Observation,
    actor_candidates,
    actor_head,
    joined,
    policy_outputs,
    reached_at_any,
    select,
)
from nsrl.rl.policies.distributions import distribution_of


class Surrogate:
    """Mean advantage-weighted probability ratio on a rollout, as a function of the policy's present parameters.

    Args:
        policy: the policy that made the rollout, not moved since.
        samples: observations, actions, old_log_prob and advantages, one row a state, as SB3's buffers give them.
        normalize: centre the advantages and divide them by their standard deviation.
        besides: parameters that are to be moved too, although the rollout may not depend on them.

    Attributes:
        parameters: those, and all that the action distribution depends on, found by autograd, as one flat vector.
    """

    def __init__(
        self, policy: ActorCriticPolicy, samples: Any, normalize: bool = True, besides: Iterable[nn.Parameter] = ()
    ):
        self.policy = policy
        self._distribution = distribution_of(policy)
        self._actions = samples.actions
        if isinstance(policy.action_space, spaces.Discrete):
            self._actions = samples.actions.long().flatten()
        self._old_log_prob = samples.old_log_prob
        advantages = samples.advantages
        self._advantages = (advantages - advantages.mean()) / (advantages.std() + 1e-8) if normalize else advantages

        def log_prob(rows: slice) -> Tensor:
            outputs = policy_outputs(policy, select(samples.observations, rows))
            return self._distribution.log_prob(policy, outputs, self._actions[rows])

        reached = {*reached_at_any(policy, log_prob, len(self._actions), actor_candidates(policy)), *besides}
        moved = [parameter for parameter in policy.parameters() if parameter in reached]
        self.parameters = FlatParameters(moved)
        spread: Any = policy.log_std if self._distribution.has_spread else None
        self._log_std = next((p for p in moved if p is spread), None)
        self._head = actor_head(policy, samples.observations, [p for p in moved if p is not self._log_std])
        self._passes = self._head.passes()
        # The rollout's states are where the policy acts, so nothing is tempered.
        self._metric: OutputMetric = self._distribution.metric(
            self._distribution.sizes(policy.action_space),
            0.0,
            log_std=spread,
            reference_log_std=None if spread is None else spread.detach().clone(),
        )

    def gradient(self) -> tuple[float, Tensor]:
        """The objective before the step, and minus its gradient, shape (P,)."""
        outputs = self._passes.outputs.requires_grad_()
        with torch.enable_grad():
            objective = self._objective(outputs)
        reached = [outputs] if self._log_std is None else [outputs, self._log_std]
        slope, *spread = torch.autograd.grad(-objective, reached)
        pulled = self._passes.pull(slope)
        if self._log_std is not None:
            start = self._columns()[0]
            pulled = torch.cat([pulled[:start], spread[0].flatten(), pulled[start:]])
        outputs.requires_grad_(False)
        return float(objective.detach()), pulled

    def fisher(self, every: int = 1, besides: Observation | None = None) -> PolicyJacobian:
        """Whitened Jacobian whose Gram J^T J is the Fisher information, of every so many states.

        Args:
            every: thins the rollout's states out.
            besides: further states, whose Fisher information joins the mean.
        """
        head = self._head if every == 1 else self._head.select(slice(None, None, every))
        if besides is not None:
            more = actor_head(self.policy, besides, self._head.parameters)
            head = replace(head, inputs=joined(head.inputs, more.inputs))
        passes = self._passes if head is self._head else head.passes()
        return PolicyJacobian(
            passes, self._metric.root(passes.outputs), None if self._log_std is None else self._columns()
        )

    @torch.no_grad()
    def measure(self) -> tuple[float, float]:
        """The objective, and the mean KL(pi_old || pi) in nats a state, at the present parameters.

        The objective is NaN where the policy has diverged so far that it is no distribution any more.
        """
        outputs = self._head.outputs()
        kl = float(self._metric.divergence(self._passes.outputs, outputs).mean())
        try:
            return float(self._objective(outputs)), kl
        except ValueError:  # torch.distributions refuses NaN logits and spreads of zero
            return math.nan, kl

    def _objective(self, outputs: Tensor) -> Tensor:
        ratio = torch.exp(self._distribution.log_prob(self.policy, outputs, self._actions) - self._old_log_prob)
        return (self._advantages * ratio).mean()

    def _columns(self) -> tuple[int, int]:
        """Where log_std lies in the flat vector."""
        assert self._log_std is not None
        position = next(i for i, p in enumerate(self.parameters.parameters) if p is self._log_std)
        start = sum(self.parameters.sizes[:position])
        return start, start + self.parameters.sizes[position]
