"""Elastic weight consolidation: a quadratic penalty on every weight, as stiff as its Fisher information."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor, nn

from nsrl.continual.heads import model_outputs
from nsrl.continual.memory import Memory
from nsrl.continual.objectives import Classification, Objective, Regression
from nsrl.continual.optimizers import OptimizerConfig
from nsrl.continual.strategies.base import Strategy
from nsrl.continual.tasks import Loader, Task
from nsrl.errors import NsrlError
from nsrl.projection import DiagonalConstraint, jacobian, parameter_columns


@dataclass(frozen=True)
class EWCOptions:
    """How stiff, and on what it is estimated.

    Attributes:
        strength: lambda of the penalty lambda / 2 sum_t sum_i F_ti (theta_i - theta*_ti)^2.
        samples: inputs of a task that its Fisher information is averaged over.
        seed: of their choice.
    """

    strength: float = 100.0
    samples: int = 500
    seed: int = 0

    def __post_init__(self) -> None:
        if not self.strength >= 0.0:
            raise NsrlError(f"the strength of EWC must not be negative, but it is {self.strength}")


class EWC(Strategy):
    """Kirkpatrick et al. 2017 (arXiv 1612.00796), one quadratic a task around that task's weights.

    The Fisher diagonal is exact: the expectation over the model's own labels, from the whitened Jacobian, not the
    squared gradient of the data's labels, which vanishes where the model fits them. The sum of all quadratics is held
    in two vectors, whatever the number of tasks.

    Args:
        model, optimizer: as `Strategy`.
        options: strength and samples.
    """

    name = "ewc"

    def __init__(self, model: nn.Module, optimizer: OptimizerConfig | None = None, options: EWCOptions | None = None):
        super().__init__(model, optimizer)
        self.options = options or EWCOptions()
        # sum_t F_t and sum_t F_t theta*_t: all that the gradient of the penalties needs
        self._stiffness: Tensor | None = None
        self._pull: Tensor | None = None

    def penalty_gradient(self) -> Tensor:
        """Gradient of the penalty at the present weights, shape (P,)."""
        weights = self.flat.read()
        if self._stiffness is None or self._pull is None:
            return torch.zeros_like(weights)
        return self.options.strength * (self._stiffness * weights - self._pull)

    def memory_bytes(self) -> int:
        """Two numbers a parameter."""
        return sum(t.numel() * t.element_size() for t in (self._stiffness, self._pull) if t is not None)

    def _backward(self, inputs: Tensor, targets: Tensor, head: int | None) -> float:
        loss = super()._backward(inputs, targets, head)
        if self._stiffness is not None:
            flat = self.flat
            for parameter, piece in zip(flat.parameters, self.penalty_gradient().split(flat.sizes), strict=True):
                # the head of another task is where it was: Adam would make steps of the round-off
                if parameter.grad is not None:
                    parameter.grad += piece.view_as(parameter)
        return loss

    def _end(self, task: Task, loader: Loader) -> None:
        fisher = fisher_diagonal(self.model, task, loader, self.options.samples, self.options.seed)
        weights = self.flat.read()
        fisher = fisher.to(weights)
        self._stiffness = fisher if self._stiffness is None else self._stiffness + fisher
        self._pull = fisher * weights if self._pull is None else self._pull + fisher * weights


def fisher_diagonal(model: nn.Module, task: Task, loader: Loader, samples: int, seed: int = 0) -> Tensor:
    """Diagonal of the Fisher information, a mean over samples, expectation over the model's own labels, shape (P,)."""
    memory = Memory(samples, seed)
    memory.add(task, loader)
    constraint = DiagonalConstraint(parameter_columns(model))
    for start in range(0, len(memory), 256):
        inputs = memory.inputs[start : start + 256]
        with torch.no_grad():
            outputs = model_outputs(model, inputs[:1], task.head)
        # tempering is for null spaces: the Fisher information itself has none
        objective: Objective = Regression() if memory.targets.is_floating_point() else Classification(tempering=0.0)
        metric = objective.metric(outputs)
        constraint.update(
            jacobian(
                model,
                inputs,
                forward=lambda module, batch: model_outputs(module, batch, task.head),
                seed=metric.seeds,
                scale=len(memory) ** -0.5,
            )
        )
    return constraint.values
