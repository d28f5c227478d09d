"""New-task transitions, and what the policy gradient asks of the policy's outputs at each of them."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any, cast

import numpy as np
import torch
from gymnasium import spaces
from stable_baselines3.common.callbacks import BaseCallback
from stable_baselines3.common.on_policy_algorithm import OnPolicyAlgorithm
from stable_baselines3.common.policies import ActorCriticPolicy
from torch import Tensor, nn

from nsrl.errors import NsrlError
from nsrl.projection.jacobians.factored import FactoredJacobian
from nsrl.projection.jacobians.linearise import jacobian
from nsrl.rl.policies.actor_critic import Observation, policy_outputs


@dataclass(frozen=True)
class Transitions:
    """T transitions of a task under the present policy.

    Attributes:
        observations: as the policy takes them, T samples.
        cotangents: derivative of the loss -mean_t A_t log pi(a_t | s_t) in the policy's outputs, (T, O), with
            normalised advantages A: where the ratio is 1, PPO's clipped surrogate has the same.
    """

    observations: Observation
    cotangents: Tensor

    def jacobian(self, policy: ActorCriticPolicy, names: tuple[str, ...]) -> FactoredJacobian:
        """One row a transition, its share of the policy gradient: `rmatvec(ones)` is the gradient, (P,)."""
        return jacobian(
            policy, self.observations, forward=forward, parameters=names, seed=lambda _: self.cotangents.unsqueeze(1)
        )


def collect_transitions(model: OnPolicyAlgorithm) -> Transitions:
    """Let a model play one rollout of its environment (whose state, and the model's counters, move on).

    Raises:
        NsrlError: the model has no environment.
    """
    if model.env is None:
        raise NsrlError("the model has no environment to play in; load the agent with env=...")
    _, callback = model._setup_learn(model.n_steps * model.n_envs, cast(BaseCallback, None), False)
    model.collect_rollouts(model.env, callback, model.rollout_buffer, model.n_steps)
    return transitions_of(model)


def transitions_of(model: OnPolicyAlgorithm) -> Transitions:
    """The transitions in a model's rollout buffer, made by its present policy; training goes on as if none had looked.

    Raises:
        NsrlError: the buffer is not full.
    """
    if not model.rollout_buffer.full:
        raise NsrlError("the model's rollout buffer is not full; collect a rollout first")
    state = np.random.get_state()  # which the buffer shuffles by
    samples: Any = next(iter(model.rollout_buffer.get()))
    np.random.set_state(state)
    policy = model.policy
    actions = samples.actions
    if isinstance(model.action_space, spaces.Discrete):
        actions = actions.long().flatten()
    advantages = (samples.advantages - samples.advantages.mean()) / (samples.advantages.std() + 1e-8)
    seen: list[Tensor] = []
    with _outputs_into(policy, seen.append), torch.enable_grad():
        _, log_prob, _ = policy.evaluate_actions(samples.observations, actions)
        (cotangents,) = torch.autograd.grad(-(advantages * log_prob).mean(), seen[0])
    return Transitions(samples.observations, cotangents.detach())


def forward(policy: nn.Module, observations: Observation) -> Tensor:
    """Logits or means, (N, O)."""
    return policy_outputs(cast(ActorCriticPolicy, policy), observations)


@contextmanager
def _outputs_into(policy: ActorCriticPolicy, keep: Callable[[Tensor], Any]) -> Iterator[None]:
    def hook(*arguments: Any) -> None:
        keep(arguments[-1])

    hook.watches = True  # type: ignore[attr-defined]
    handle = policy.action_net.register_forward_hook(hook)
    try:
        yield
    finally:
        handle.remove()


class BatchWatch:
    """Tells of every minibatch of a model's update: which transitions, and dL/dz at the policy's outputs.

    Args:
        model: an SB3 on-policy algorithm.
        tell: called with observations, dL/dz (B, O) and the transitions' indices in the rollout (B,), once the loss
            has been differentiated and before the optimizer steps.
    """

    def __init__(self, model: OnPolicyAlgorithm, tell: Callable[[Observation, Tensor, Tensor], Any]):
        buffer: Any = model.rollout_buffer
        self._buffer = buffer
        self._tell = tell
        self._pending: tuple[Observation, Tensor] | None = None
        draw = buffer._get_samples

        def drawn(batch_inds: np.ndarray, *arguments: Any, **options: Any) -> Any:
            samples = draw(batch_inds, *arguments, **options)
            self._pending = (samples.observations, torch.as_tensor(np.asarray(batch_inds), dtype=torch.long))
            return samples

        buffer._get_samples = drawn
        self._handle = model.policy.action_net.register_forward_hook(self._on_outputs)

    def _on_outputs(self, _: nn.Module, __: Any, outputs: Tensor) -> None:
        # The first pass behind a draw is the loss's; retention makes others of its own.
        if self._pending is not None and outputs.requires_grad:
            observations, indices = self._pending
            self._pending = None
            outputs.register_hook(lambda slope: self._tell(observations, slope.detach().clone(), indices))

    _on_outputs.watches = True  # type: ignore[attr-defined]

    def detach(self) -> None:
        """Leave the model as it was."""
        self._handle.remove()
        self._buffer.__dict__.pop("_get_samples", None)
