"""Before training: how far would learning the new task move the old behaviour, and how much of it would survive?"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from nsrl.analysis.behaviour import some_states
from nsrl.analysis.transitions import Transitions
from nsrl.errors import NsrlError
from nsrl.projection.budget.projection import SpectralProjection
from nsrl.rl.retention.constraint import RetentionConstraint

OPTIMIZERS = ("adam", "sgd")


@dataclass(frozen=True)
class Forecast:
    """What the cross-kernel K(old, new) = J_old S J_new^T says before the first update.

    With u the mean step over the minibatches of a rollout, n steps on each of R rollouts:

    Attributes:
        kl: mean KL on the buffer that the updates are expected to cost, drift + noise, nats per state.
        kl_drift: the part in which the rollouts agree, (R n)^2 / 2 |J E u|^2.
        kl_noise: the part in which they differ, R n^2 / 2 E |J (u - E u)|^2; 0 where one rollout was given.
        kl_step: cost of one minibatch step alone.
        displacement: norm of the way that the updates are expected to go in parameter space, by the same sum of drift
            and noise without the kernel.
        alignment: cosine between the mean step's effect on the old outputs and the largest possible one,
            |J u| / (|J| |u|): 0 where the new task lives in the old one's null space.
        surviving: share of the policy gradient's norm that the hard null space of the linearised states leaves.
        surviving_budget: share of the forecast displacement's norm that a budget leaves; None without one.
    """

    kl: float
    kl_drift: float
    kl_noise: float
    kl_step: float
    displacement: float
    alignment: float
    surviving: float
    surviving_budget: float | None


def forecast(
    constraint: RetentionConstraint,
    transitions: Transitions | Sequence[Transitions],
    *,
    learning_rate: float,
    updates: int,
    rollouts: int = 1,
    batch_size: int = 64,
    optimizer: str = "adam",
    kl_budget: float | None = None,
    states: int | None = 128,
    seed: int = 0,
) -> Forecast:
    """Forecast the forgetting by one policy update, or by several, from the policy before it.

    The old policy's whitened Jacobian meets the per-transition policy gradients of the new task; Adam divides by the
    root mean square gradient of the minibatches, entry by entry. Within an update the scatter of the minibatches does
    not count: an epoch sums them to the rollout's gradient. It is first order: right for small steps, and it knows
    nothing of PPO's clipping, nor of what the policy will meet once it has moved. A Gaussian policy's log_std is taken
    to stay where it is.

    Args:
        constraint: the agent on its retention buffer.
        transitions: of the new task, played by the same policy: one rollout, or several of equal size.
        learning_rate: of the optimizer.
        updates: steps n on each rollout, epochs times minibatches.
        rollouts: R, of the run that is forecast; more than one take several rollouts of transitions, which tell what
            the next will repeat.
        batch_size: transitions in a minibatch.
        optimizer: "adam" or "sgd".
        kl_budget: nats per state, for `surviving_budget`.
        states: buffer states to linearise.
        seed: of the split into minibatches.

    Raises:
        NsrlError: fewer than two minibatches, too few rollouts, an unknown optimizer, bad numbers.
    """
    played = [transitions] if isinstance(transitions, Transitions) else list(transitions)
    _check(played, learning_rate, updates, rollouts, batch_size, optimizer)
    old = constraint.linearise(some_states(constraint, states))
    gradients = torch.stack([_minibatch_gradients(constraint, rollout, batch_size, seed) for rollout in played])
    scale: Tensor | float = 1.0
    if optimizer == "adam":
        scale = 1.0 / (gradients.square().mean((0, 1)).sqrt() + 1e-8)
        # A parameter that the new task never reaches stays where it is.
        scale = torch.where(gradients.abs().sum((0, 1)) > 0, scale, 0.0)
    steps = -learning_rate * gradients * scale
    moves = steps.mean(1)
    effects = torch.stack([old.jacobian.matvec(move) for move in moves]).double()
    alone = torch.stack([old.jacobian.matvec(step) for step in steps.flatten(0, 1)]).double()
    drift, scatter = _moments(effects)
    kl_drift, kl_noise = 0.5 * (updates * rollouts) ** 2 * drift, 0.5 * updates**2 * rollouts * scatter
    way, wander = _moments(moves.double())
    move, gradient = moves.mean(0), gradients.mean((0, 1))
    projector = SpectralProjection.of(old)
    largest = float(projector.spectrum.values[0]) ** 0.5
    surviving = float(projector.null(gradient).norm()) / max(float(gradient.norm()), 1e-300)
    kept = None if kl_budget is None else projector.project(updates * rollouts * move, kl_budget).kept
    alignment = float(effects.mean(0).norm()) / max(largest * float(move.norm()), 1e-300)
    return Forecast(
        kl_drift + kl_noise,
        kl_drift,
        kl_noise,
        0.5 * float(alone.square().sum(1).mean()),
        updates * (rollouts**2 * way + rollouts * wander) ** 0.5,
        alignment,
        surviving,
        kept,
    )


def _check(
    played: list[Transitions], learning_rate: float, updates: int, rollouts: int, batch_size: int, optimizer: str
) -> None:
    if optimizer not in OPTIMIZERS:
        raise NsrlError(f"optimizer must be one of {', '.join(OPTIMIZERS)}, not {optimizer!r}")
    if not 0.0 < learning_rate < math.inf or updates < 1 or rollouts < 1:
        raise NsrlError(
            f"learning_rate, updates and rollouts must be positive, not {learning_rate}, {updates} and {rollouts}"
        )
    counts = [len(rollout.cotangents) for rollout in played]
    if len(set(counts)) != 1:
        raise NsrlError(f"a forecast needs one or more rollouts of equal size, not of {counts} transitions")
    count = counts[0]
    if count < 2 * batch_size or batch_size < 1:
        raise NsrlError(f"{count} transitions are fewer than two minibatches of {batch_size}; collect more")
    if rollouts > 1 and len(played) == 1:
        raise NsrlError(
            f"one rollout does not tell what the next repeats; give two or more to forecast {rollouts} of them"
        )


def _moments(vectors: Tensor) -> tuple[float, float]:
    """|E v|^2 and E |v - E v|^2, both unbiased, from samples (count, n); a single sample is taken for its mean."""
    count, mean = len(vectors), vectors.mean(0)
    if count == 1:
        return float(mean.square().sum()), 0.0
    scatter = float((vectors - mean).square().sum()) / (count - 1)
    # The mean of few rollouts carries scatter / count of noise, which the square of many would blow up.
    return max(float(mean.square().sum()) - scatter / count, 0.0), scatter


def _minibatch_gradients(constraint: RetentionConstraint, transitions: Transitions, size: int, seed: int) -> Tensor:
    """Policy gradients of minibatches, (batches, P)."""
    rows = transitions.jacobian(constraint.policy, constraint.names)
    count = len(transitions.cotangents)
    order = torch.randperm(count, generator=torch.Generator().manual_seed(seed))
    gradients = []
    for batch in order.split(size):
        if len(batch) == size:
            member = torch.zeros(count)
            member[batch] = count / size
            gradients.append(rows.rmatvec(member.to(rows.outputs.device)))
    return torch.stack(gradients)
