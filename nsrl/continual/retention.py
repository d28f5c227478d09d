"""Retained behaviour: a few inputs of every task with the outputs that the model gave when it had learnt them."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from nsrl.continual.heads import model_outputs
from nsrl.continual.memory import Memory
from nsrl.continual.objectives import Classification, Objective, objective_of
from nsrl.continual.tasks import Loader, Task
from nsrl.projection.metrics import OutputMetric


class RetainedBehaviour:
    """KL divergence between what the model did when a task was learnt and what it does now.

    Args:
        states: number of inputs kept of a task.
        seed: of their choice.

    Attributes:
        memory: the inputs.
        reference: outputs of the model when their task was learnt, shape (N, O).
        errors: gradient of the labels' negative log-likelihood in them, shape (N, O). For softmax and Gaussian alike
            the one at any other outputs is this plus that of the KL divergence.
    """

    def __init__(self, states: int, seed: int = 0):
        self.memory = Memory(states, seed)
        self.reference = torch.zeros(0)
        self.errors = torch.zeros(0)
        self._probabilities = self._negentropies = torch.zeros(0)

    def __len__(self) -> int:
        return len(self.memory)

    @torch.no_grad()
    def add(self, model: nn.Module, task: Task, loader: Loader) -> None:
        """Keep inputs of a task and the model's present outputs on them."""
        before = len(self.memory)
        self.memory.add(task, loader)
        new = torch.arange(before, len(self.memory), device=self.memory.owner.device)
        outputs = self.outputs(model, new)
        self.reference = torch.cat([self.reference, outputs]) if before else outputs
        self.errors = self.objective.slope(self.reference, self.memory.targets)
        if isinstance(self.objective, Classification):
            log_probabilities = F.log_softmax(self.reference, -1)
            self._probabilities = log_probabilities.exp()
            self._negentropies = (self._probabilities * log_probabilities).sum(-1)

    @property
    def objective(self) -> Objective:
        """That of the retained targets."""
        return objective_of(self.memory.targets)

    def outputs(self, model: nn.Module, indices: Tensor | None = None) -> Tensor:
        """The model's outputs on some of the inputs (None: all), (n, O)."""
        if indices is None:
            return model_outputs(model, self.memory.inputs, self.memory.heads)
        return model_outputs(model, self.memory.take(indices), self.memory.heads_of(indices))

    @property
    def metric(self) -> OutputMetric:
        """Metric of the outputs."""
        return self.objective.metric(self.reference)

    @torch.no_grad()
    def divergences(self, model: nn.Module) -> Tensor:
        """Mean KL(then || now) of every task, nats a sample, shape (tasks,), float64."""
        kl = self.metric.divergence(self.reference, self.outputs(model)).double()
        owner = self.memory.owner
        total = torch.zeros(len(self.memory.tasks), dtype=kl.dtype, device=kl.device).index_add_(0, owner, kl)
        return total / torch.bincount(owner, minlength=len(total))

    @torch.no_grad()
    def kl(self, model: nn.Module, indices: Tensor | None = None) -> Tensor:
        """KL(then || now) of some of the inputs (None: all), nats, (n,)."""
        reference = self.reference if indices is None else self.reference[indices]
        return self.metric.divergence(reference, self.outputs(model, indices))

    @torch.no_grad()
    def divergence(self, model: nn.Module, position: int) -> float:
        """Mean KL(then || now) of the task at a position in `memory.tasks`, nats a sample."""
        mine = (self.memory.owner == position).nonzero().squeeze(1)
        return float(self.metric.divergence(self.reference[mine], self.outputs(model, mine)).double().mean())

    def gap(self, outputs: Tensor, indices: Tensor) -> tuple[Tensor, Tensor]:
        """KL of each of some inputs, (n,), with these detached outputs (n, O), and its gradient in them, (n, O)."""
        if isinstance(self.objective, Classification):
            # every step comes by here: nothing of then is computed anew, and float32 is enough
            then, now = self._probabilities.index_select(0, indices), F.log_softmax(outputs, -1)
            kl = self._negentropies.index_select(0, indices).sub_((then * now).sum(-1))
            return kl, now.exp_().sub_(then)
        metric, reference = self.metric, self.reference[indices]
        return metric.divergence(reference, outputs), metric.slope(reference, outputs)

    def nbytes(self) -> int:
        """All that is held, in bytes: inputs, targets, outputs of then and what is derived from them."""
        tensors = (self.reference, self.errors, self._probabilities, self._negentropies)
        return self.memory.nbytes() + sum(t.numel() * t.element_size() for t in tensors) if len(self) else 0
