"""Confinement: an update that moves only what the new task has to itself, and so not what is retained."""

from __future__ import annotations

import copy
from collections.abc import Sequence

import torch
from torch import Tensor, nn

from nsrl.rl.opening.block import FreeBlock
from nsrl.rl.retention.constraint import RetentionConstraint


class Confinement:
    """One policy update inside a free block.

    Args:
        block: what may move.
        constraint: policy against buffer, the policy as it was before the update.
        constant: what the head is to say beside the kept units on the old task, (O,) float64, where that is known
            from an earlier update; None has it read off the policy.

    Attributes:
        constant: the same.
    """

    def __init__(self, block: FreeBlock, constraint: RetentionConstraint, constant: Tensor | None = None):
        self._block, self._constraint = block, constraint
        policy, old = constraint.policy, constraint.inputs
        self._masks = dict(block.masks(policy, old))
        self.constant = block.constant(policy, old) if constant is None else constant

    def against(self, constraint: RetentionConstraint) -> Confinement:
        """This one, on the states of another constraint of the same policy."""
        other = copy.copy(self)
        other._constraint = constraint
        return other

    def free(self, parameters: Sequence[nn.Parameter]) -> Tensor:
        """Which entries of these parameters, one flat vector (P,), may move: 1 or 0. All of what is not the actor's."""
        return torch.cat([self._masks.get(p, torch.ones_like(p)).flatten() for p in parameters])

    def shape_gradients(self) -> None:
        """Leave the gradients of what may move."""
        gradients = {parameter: parameter.grad for parameter in self._masks if parameter.grad is not None}
        if gradients:
            torch._foreach_mul_(list(gradients.values()), [self._masks[parameter] for parameter in gradients])

    @torch.no_grad()
    def project(self, feasible: Tensor, share: float = 1.0) -> None:
        """Project the displacement from the constraint's parameters as they were onto the null space.

        Args:
            feasible: the parameters as they were, (P,).
            share: of the displacement that is made.
        """
        flat = self._constraint.parameters
        here = flat.read()
        if share < 1.0:
            here = feasible + share * (here - feasible)
        flat.write(torch.where(self.free(flat.parameters) > 0.0, here, feasible))
        self.settle()

    def settle(self) -> None:
        """Push the fresh units off on the old task (see `FreeBlock.settle`)."""
        self._block.settle(self._constraint.policy, self._constraint.inputs, self.constant)
