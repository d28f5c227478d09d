"""PPO's update with its derivatives written down: the numbers of SB3's `PPO.train` to rounding, without autograd.

A small policy's minibatches take SB3 much longer than their matrix products do: distributions are built and validated,
a graph is recorded, every loss is read, and Adam keeps books on a dozen small tensors. Where actor and critic are
chains of linear layers everything is known beforehand. What is not known is left to SB3.
"""

from __future__ import annotations

from collections.abc import Sequence
from itertools import accumulate
from typing import Any

import numpy as np
import torch
from stable_baselines3.common.buffers import RolloutBuffer
from stable_baselines3.common.utils import explained_variance
from torch import Tensor, nn

from nsrl.projection.jacobians.workspace import ChainWorkspace
from nsrl.projection.optimizer import StepHooks
from nsrl.rl.algorithms.adam import AdamStep, is_plain_adam
from nsrl.rl.algorithms.numbers import Diverged
from nsrl.rl.policies.actor_critic import Observation
from nsrl.rl.policies.chains import Chains, chains_of
from nsrl.rl.policies.distributions import distribution_of
from nsrl.rl.policies.likelihood import Likelihood


def fused_update(model: Any, hooks: StepHooks | None) -> FusedUpdate | None:
    """The fused update of a PPO whose roll-out is complete, or None where only SB3's will do.

    Args:
        model: an SB3 PPO.
        hooks: what is done before and after each of its optimizer's steps; they are called without its `step`.
    """
    buffer, optimizer, chains = model.rollout_buffer, model.policy.optimizer, chains_of(model.policy)
    if chains is None or hooks is None or not hooks.alone or model.n_epochs < 1:
        return None
    if type(buffer) is not RolloutBuffer or "get" in vars(buffer) or not is_plain_adam(optimizer):
        return None
    stepped = set(optimizer.param_groups[0]["params"])
    if not chains.parameters or not set(chains.parameters) <= stepped <= set(model.policy.parameters()):
        return None
    return FusedUpdate(model, chains, hooks)


class FusedUpdate:
    """One update of an SB3 PPO on its roll-out.

    Args:
        model: the PPO.
        chains: its actor and critic.
        hooks: of its optimizer, called before and after each step.
    """

    def __init__(self, model: Any, chains: Chains, hooks: StepHooks):
        self._model, self._policy, self._chains, self._hooks = model, model.policy, chains, hooks
        self._distribution = distribution_of(model.policy)
        self._parameters = chains.parameters
        self._gradients = _Gradients(self._parameters)
        views, count = self._gradients.views, len(chains.actor_parameters)
        rows = min(model.batch_size, model.rollout_buffer.buffer_size * model.rollout_buffer.n_envs)
        self._actor = ChainWorkspace(chains.actor, chains.actor_parameters, rows, views[:count])
        values = views[count : count + len(chains.critic_parameters)]
        self._critic = ChainWorkspace(chains.critic, chains.critic_parameters, rows, values)
        self._spread = None if chains.log_std is None else views[-1]

    def run(self) -> None:
        """Train, and log what SB3 logs.

        Raises:
            Diverged: the policy has diverged to NaN, which SB3's distributions refuse.
        """
        model = self._model
        model.policy.set_training_mode(True)
        model._update_learning_rate(model.policy.optimizer)
        progress = model._current_progress_remaining
        self._clip = model.clip_range(progress)
        self._clip_values = None if model.clip_range_vf is None else model.clip_range_vf(progress)
        model.policy.optimizer.zero_grad()
        self._adam = AdamStep(model.policy.optimizer, self._parameters)
        epochs: list[_Epoch] = []
        with torch.no_grad():
            for number in range(model.n_epochs):
                epochs.append(self._epoch(number))
                model._n_updates += 1
                if epochs[-1].stopped:
                    break
        self._log(epochs)

    def _epoch(self, number: int) -> _Epoch:
        """One pass over the roll-out, in a new random order."""
        model = self._model
        # all of it in one minibatch: the buffer's own order, drawn as it draws it
        samples = next(model.rollout_buffer.get())
        actor, critic = self._features(samples.observations)
        advantages = samples.advantages
        if model.normalize_advantage:
            advantages = _normalised(advantages, model.batch_size)
        epoch = _Epoch()
        for start in range(0, len(advantages), model.batch_size):
            rows = slice(start, start + model.batch_size)
            batch = _Minibatch(
                actor[rows],
                critic[rows],
                samples.actions[rows],
                samples.old_values[rows],
                samples.old_log_prob[rows],
                advantages[rows],
                samples.returns[rows],
            )
            if self._pass(batch, epoch):
                epoch.stopped = True
                if model.verbose >= 1:
                    print(f"Early stopping at step {number} due to reaching max kl: {epoch.kl:.2f}")
                break
            self._step()
        epoch.close(model.batch_size, self._clip)
        return epoch

    def _features(self, observations: Observation) -> tuple[Tensor, Tensor]:
        features = self._policy.extract_features(observations)
        return features if isinstance(features, tuple) else (features, features)

    def _pass(self, batch: _Minibatch, epoch: _Epoch) -> bool:
        """Gradients of the loss at a minibatch, into their places; whether the update is to stop before the step."""
        model, size = self._model, len(batch.advantages)
        actor, critic = self._actor.batch(size), self._critic.batch(size)
        likelihood = self._distribution.likelihood(self._policy, actor.push(batch.actor), batch.actions)
        assert likelihood is not None
        log_ratio = likelihood.log_prob - batch.old_log_prob
        ratio = log_ratio.exp()
        free = batch.advantages * ratio
        clipped = batch.advantages * ratio.clamp(1 - self._clip, 1 + self._clip)
        error, inside = self._value_errors(critic.push(batch.critic).flatten(), batch)
        epoch.add(log_ratio, torch.min(free, clipped), error, likelihood)
        if model.target_kl is not None and epoch.exceeds(1.5 * model.target_kl):
            return True
        # d ratio / d log-prob is the ratio; behind the clip there is no slope. A product, so that NaN stays NaN.
        weights = (free <= clipped) * free * (-1.0 / size)
        bonus = -model.ent_coef / size
        actor.cotangents.copy_(likelihood.slope(weights, bonus))
        actor.pull(batch.actor)
        if self._spread is not None:
            spread = likelihood.spread_slope(weights, bonus)
            assert spread is not None
            self._spread.copy_(spread)
        pull = error * (2.0 * model.vf_coef / size)
        critic.cotangents.copy_((pull if inside is None else pull * inside).unsqueeze(1))
        critic.pull(batch.critic)
        return False

    def _value_errors(self, values: Tensor, batch: _Minibatch) -> tuple[Tensor, Tensor | None]:
        """Predicted minus wanted, shape (N,), and where values are not clipped; None where that is everywhere."""
        if self._clip_values is None:
            return values - batch.returns, None
        moved = values - batch.old_values
        predicted = batch.old_values + moved.clamp(-self._clip_values, self._clip_values)
        return predicted - batch.returns, moved.abs() <= self._clip_values

    def _step(self) -> None:
        """Clip the gradients, and step as the optimizer would, its hooks around it."""
        self._gradients.clip(self._model.max_grad_norm)
        for parameter, view in zip(self._parameters, self._gradients.views, strict=True):
            parameter.grad = view
        if self._hooks.before is not None:
            self._hooks.before()
        self._adam([parameter.grad for parameter in self._parameters])
        if self._hooks.after is not None:
            self._hooks.after()

    def _log(self, epochs: Sequence[_Epoch]) -> None:
        """What SB3 logs of an update."""
        model, last = self._model, epochs[-1]
        record = model.logger.record
        entropies, objectives, errors, clipped = (
            np.concatenate([getattr(epoch, name) for epoch in epochs])
            for name in ("entropies", "objectives", "errors", "clipped")
        )
        buffer = model.rollout_buffer
        record("train/entropy_loss", -np.mean(entropies))
        record("train/policy_gradient_loss", -np.mean(objectives))
        record("train/value_loss", np.mean(errors))
        record("train/approx_kl", np.mean(last.divergences))
        record("train/clip_fraction", np.mean(clipped))
        loss = -objectives[-1] - model.ent_coef * entropies[-1] + model.vf_coef * errors[-1]
        record("train/loss", float(loss))
        record("train/explained_variance", explained_variance(buffer.values.flatten(), buffer.returns.flatten()))
        if hasattr(model.policy, "log_std"):
            record("train/std", torch.exp(model.policy.log_std.detach()).mean().item())
        record("train/n_updates", model._n_updates, exclude="tensorboard")
        record("train/clip_range", self._clip)
        if self._clip_values is not None:
            record("train/clip_range_vf", self._clip_values)


class _Gradients:
    """One tensor in which the gradients of all parameters lie, one behind the other.

    Attributes:
        views: each parameter's.
    """

    def __init__(self, parameters: Sequence[nn.Parameter]):
        sizes = [parameter.numel() for parameter in parameters]
        starts = [0, *accumulate(sizes)]
        self._flat = torch.zeros(starts[-1], dtype=parameters[0].dtype)
        self.views = [
            self._flat[start : start + size].view_as(parameter)
            for start, size, parameter in zip(starts, sizes, parameters, strict=False)
        ]

    def clip(self, norm: float) -> None:
        """Scale them so that their norm is at most this, as torch and SB3 do."""
        factor = norm / (torch.linalg.vector_norm(self._flat) + 1e-6)
        self._flat.mul_(factor.clamp_(max=1.0))


class _Minibatch:
    """Rows of a roll-out.

    Attributes:
        actor, critic: features, (N, d).
        actions: (N, A).
        old_values, old_log_prob, advantages, returns: (N,).
    """

    __slots__ = ("actions", "actor", "advantages", "critic", "old_log_prob", "old_values", "returns")

    def __init__(
        self,
        actor: Tensor,
        critic: Tensor,
        actions: Tensor,
        old_values: Tensor,
        old_log_prob: Tensor,
        advantages: Tensor,
        returns: Tensor,
    ):
        self.actor, self.critic, self.actions = actor, critic, actions
        self.old_values, self.old_log_prob, self.advantages, self.returns = (
            old_values,
            old_log_prob,
            advantages,
            returns,
        )


class _Epoch:
    """What a pass over a roll-out has shown, kept as it comes and summed up once, at the end.

    Attributes:
        stopped: whether it was left before its end.
        entropies, objectives, errors, clipped, divergences: means over each minibatch, float64.
    """

    def __init__(self) -> None:
        self.stopped = False
        self._rows: list[tuple[Tensor, Tensor, Tensor]] = []
        self._entropies: list[Tensor] = []

    def add(self, log_ratio: Tensor, objective: Tensor, error: Tensor, likelihood: Likelihood) -> None:
        """One minibatch: log-ratios of probabilities, what is maximised, errors of values, all (N,)."""
        self._rows.append((log_ratio, objective, error))
        self._entropies.append(likelihood.mean_entropy())

    @property
    def kl(self) -> float:
        """Estimated KL of the latest minibatch."""
        return float(_divergences(self._rows[-1][0]).mean())

    def exceeds(self, limit: float) -> bool:
        """Whether the estimated KL of the latest minibatch is over a limit."""
        return self.kl > limit

    def close(self, size: int, clip: float) -> None:
        """Sum up minibatches of this size (the last may be smaller).

        Raises:
            Diverged: NaN among them.
        """
        log_ratio, objective, error = (torch.cat(column) for column in zip(*self._rows, strict=True))
        self.entropies = torch.stack(self._entropies).double().numpy()
        self.objectives = _means(objective, size)
        self.errors = _means(error.square(), size)
        self.clipped = _means(((log_ratio.exp() - 1).abs() > clip).float(), size)
        self.divergences = _means(_divergences(log_ratio), size)
        self._rows, self._entropies = [], []
        if np.isnan(self.objectives).any() or np.isnan(self.errors).any():
            raise Diverged(
                "the losses of an update are NaN: the policy has diverged, or the rewards are no numbers; a smaller "
                "learning_rate or max_grad_norm, or rewards of ordinary size, may help"
            )


def _divergences(log_ratio: Tensor) -> Tensor:
    """SB3's estimate of the KL a sample (Schulman 2020, Approximating KL Divergence), shape (N,)."""
    return (log_ratio.exp() - 1) - log_ratio


def _minibatches(values: Tensor, size: int) -> list[Tensor]:
    """Values (N,) as rows of minibatches: the whole ones, and then what is left, where there are any."""
    whole = len(values) // size * size
    parts = (values[:whole].view(-1, size), values[whole:].view(1, -1))
    return [part for part in parts if part.numel()]


def _means(values: Tensor, size: int) -> np.ndarray:
    """Mean over each minibatch, float64."""
    return torch.cat([part.mean(1) for part in _minibatches(values, size)]).double().numpy()


def _normalised(advantages: Tensor, size: int) -> Tensor:
    """Advantages (N,) less their mean and over their spread in each minibatch; one that is alone is left as it is."""
    parts = []
    for part in _minibatches(advantages, size):
        if part.shape[1] > 1:
            part = (part - part.mean(1, keepdim=True)) / (part.std(1, keepdim=True) + 1e-8)
        parts.append(part.flatten())
    return torch.cat(parts)
