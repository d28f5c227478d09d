"""Opening the outputs: regression of the policy on opener outputs, by natural steps inside the retention budget."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import torch
from stable_baselines3.common.policies import ActorCriticPolicy
from torch import Tensor

from nsrl.projection.budget.natural_gradient import LocalModel
from nsrl.projection.budget.two_regions import Multipliers, retained_step
from nsrl.projection.jacobians.matrix_free import PolicyJacobian
from nsrl.rl.opening.block import FreeBlock
from nsrl.rl.opening.states import NewStates
from nsrl.rl.opening.targets import Targets
from nsrl.rl.policies.actor_critic import actor_head
from nsrl.rl.retention.constraint import RetentionConstraint

#: Steps of the regression at most, and halvings of one that measures over the budget or makes things worse.
ROUNDS = 60
HALVINGS = 10
#: Damping of the steps, in the units of the outputs; relative residual of conjugate gradients, and their iterations.
DAMPING = 1e-4
PRECISION = 0.03
ITERATIONS = 30
#: How far beyond the wanted share a step that is confined to free units may go, of the way to 1.
BEYOND = 0.1
#: Relative fall of the loss, a step, below which the budget or the network allows no more. The share would not do: as
#: long as a policy is certain, halving its logits leaves it so. A policy 30 nats deep falls by 1 % at first and by 10 %
#: later: at 0.02 one of four such openings got there, at 0.005 all four.
LEAST_FALL = 0.005


def open_outputs(
    policy: ActorCriticPolicy,
    constraint: RetentionConstraint,
    states: NewStates,
    targets: Targets,
    share: float,
    budget: float,
    on_step: Callable[[float, float], Any] | None = None,
    block: FreeBlock | None = None,
) -> int:
    """Move the policy until the mean of `targets.share` over the states is `share`, or the budget allows no more.

    A step is the Gauss-Newton step of the regression inside the second trust region that the budget is, shortened until
    the KL measured on the whole buffer is within the budget: it is so at every step. Where units are free, steps are
    confined to them, and spend nothing of it.

    Args:
        policy, constraint: as they stand; the constraint's parameters move.
        states: of the new task.
        targets: of the policy's action distribution.
        share: to be reached.
        budget: measured KL on the buffer at most, nats a state.
        on_step: told the share and the KL before every step.
        block: units that the new task has to itself; None where there are none.

    Returns:
        Steps made.
    """
    parameters = list(constraint.parameters.parameters)
    most = share + BEYOND * (1.0 - share)
    guess: Multipliers | None = None
    last = math.inf
    free, constant = None, None
    if block is not None:
        masks = dict(block.masks(policy, constraint.inputs))
        free = torch.cat([masks.get(p, torch.zeros_like(p)).flatten() for p in parameters])
        constant = block.constant(policy, constraint.inputs)
    for made in range(ROUNDS):
        head = actor_head(policy, states.inputs, parameters)
        passes = head.passes()
        now = float(targets.share(passes.outputs, states.valid).mean())
        if on_step is not None:
            on_step(now, constraint.binding_divergence())
        if now >= share:
            return made
        root = targets.root(passes.outputs, states.valid)
        # aimed beyond the share: the mean over the states gets there before every state does
        goal = share + 0.5 * (1.0 - share)
        excess = root.apply(targets.excess(passes.outputs, goal, states.valid))
        aim = root.apply(passes.outputs) - excess
        jacobian = PolicyJacobian(passes, root)
        gradient = jacobian.rmatvec((excess / math.sqrt(len(excess))).flatten())
        before = _loss(excess)
        if before > (1.0 - LEAST_FALL) * last:
            return made
        last = before
        local = LocalModel(jacobian, gradient, before, DAMPING, ITERATIONS, PRECISION, free)
        if block is None:
            step = retained_step(local, constraint.quadratic(constraint.train), budget, guess=guess)
            guess = Multipliers(step.scale, step.multiplier)
        else:
            step = local.step()
        start, length = constraint.parameters.read(), 1.0
        for _ in range(HALVINGS):
            constraint.parameters.write(start + length * step.displacement)
            if block is not None and constant is not None:
                block.settle(policy, constraint.inputs, constant)
            outputs = head.outputs()
            allowed = constraint.binding_divergence() <= budget
            if block is not None:  # nothing else holds it back
                allowed = allowed and float(targets.share(outputs, states.valid).mean()) <= most
            if allowed and _loss(root.apply(outputs) - aim) < before:
                break
            length *= 0.5
        else:
            constraint.parameters.write(start)
            return made
    return ROUNDS


def _loss(residual: Tensor) -> float:
    """Half the mean squared residual of a state: what the radius of the regression's trust region is measured in."""
    return 0.5 * float(residual.double().square().sum(1).mean())
