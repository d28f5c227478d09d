"""Before training: how far would learning the new task move the old behaviour, and how much of it would survive?"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from nsrl.errors import NsrlError
from nsrl.ntk.rl.behaviour import some_states
from nsrl.ntk.rl.transitions import Transitions
from nsrl.projection.budget import SpectralProjection
from nsrl.rl.constraint import RetentionConstraint

OPTIMIZERS = ("adam", "sgd")


@dataclass(frozen=True)
class Forecast:
    """What the cross-kernel K(old, new) = J_old S J_new^T says before the first update.

    Attributes:
        kl: mean KL on the buffer that so many updates are expected to cost, drift + noise, nats per state.
        kl_drift: the part of all updates going the same way, n^2 / 2 |J lr u|^2 for the mean update u.
        kl_noise: the part of their scatter, n / 2 E |J lr (u_b - u)|^2.
        kl_step: cost of one update, E 1/2 |J lr u_b|^2.
        alignment: cosine between the mean update's effect on the old outputs and the largest possible one,
            |J u| / (|J| |u|): 0 where the new task lives in the old one's null space.
        surviving: share of the policy gradient's norm that the hard null space of the linearised states leaves.
        surviving_budget: share of the forecast displacement's norm that a budget leaves; None without one.
    """

    kl: float
    kl_drift: float
    kl_noise: float
    kl_step: float
    alignment: float
    surviving: float
    surviving_budget: float | None


def forecast(
    constraint: RetentionConstraint, transitions: Transitions, *, learning_rate: float, updates: int,
    batch_size: int = 64, optimizer: str = "adam", kl_budget: float | None = None, states: int | None = 128,
    seed: int = 0,
) -> Forecast:  # fmt: skip
    """Forecast the forgetting of a fine-tuning run from the policy before it.

    The old policy's whitened Jacobian meets the per-transition policy gradients of the new task. Minibatches give the
    mean update and its scatter; Adam divides by the root mean square gradient, entry by entry.

    Args:
        constraint: the agent on its retention buffer.
        transitions: of the new task, played by the same policy.
        learning_rate: of the optimizer.
        updates: its number of steps n.
        batch_size: transitions in each.
        optimizer: "adam" or "sgd".
        kl_budget: nats per state, for `surviving_budget`.
        states: buffer states to linearise.
        seed: of the split into minibatches.

    Raises:
        NsrlError: fewer than two minibatches, an unknown optimizer, bad numbers.
    """
    if optimizer not in OPTIMIZERS:
        raise NsrlError(f"optimizer must be one of {', '.join(OPTIMIZERS)}, not {optimizer!r}")
    if not learning_rate > 0.0 or updates < 1:
        raise NsrlError(f"learning_rate and updates must be positive, not {learning_rate} and {updates}")
    if len(transitions.cotangents) < 2 * batch_size or batch_size < 1:
        raise NsrlError(
            f"{len(transitions.cotangents)} transitions are fewer than two minibatches of {batch_size}; collect more"
        )
    old = constraint.linearise(some_states(constraint, states))
    gradients = _minibatch_gradients(constraint, transitions, batch_size, seed)
    scale: Tensor | float = 1.0
    if optimizer == "adam":
        scale = 1.0 / (gradients.square().mean(0).sqrt() + 1e-8)
        # A parameter that the new task never reaches stays where it is.
        scale = torch.where(gradients.abs().sum(0) > 0, scale, 0.0)
    moves = -learning_rate * gradients * scale
    effects = torch.stack([old.jacobian.matvec(move) for move in moves]).double()
    count = len(effects)
    mean = effects.mean(0)
    scatter = float((effects - mean).square().sum()) / (count - 1)
    # The mean of few minibatches carries scatter / count of noise, which n^2 would blow up.
    drift = max(float(mean.square().sum()) - scatter / count, 0.0)
    kl_drift, kl_noise = 0.5 * updates**2 * drift, 0.5 * updates * scatter
    move, gradient = moves.mean(0), gradients.mean(0)
    projector = SpectralProjection(old.jacobian, old.residual, old.divergence)
    largest = float(projector.spectrum.values[0]) ** 0.5
    surviving = float(projector.null(gradient).norm()) / max(float(gradient.norm()), 1e-300)
    kept = None if kl_budget is None else projector.project(updates * move, kl_budget).kept
    return Forecast(
        kl_drift + kl_noise, kl_drift, kl_noise, 0.5 * float(effects.square().sum(1).mean()),
        float(mean.norm()) / max(largest * float(move.norm()), 1e-300), surviving, kept,
    )  # fmt: skip


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
