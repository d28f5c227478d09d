"""How much each state of a buffer counts in a mean KL: its own weight, and its task's budget."""

from __future__ import annotations

from collections.abc import Mapping
from statistics import harmonic_mean
from typing import Any

import numpy as np
import torch
from torch import Tensor

from nsrl.errors import NsrlError
from nsrl.rl.retention.states import RetainedStates


class StateWeights:
    """Weights of the states of a buffer, and the tasks that they belong to.

    Args:
        buffer: states with their weights and sources.
        budgets: budget of each task, nats; the states of a task then weigh, all together, 1 / budget.
        device: of the indices and weights.

    Attributes:
        tasks: indices of each task's states of a merged buffer, or with budgets; else empty. States of weight zero
            belong to none.
        shares: with budgets, each one's as a multiple of their harmonic mean; else empty.

    Raises:
        NsrlError: budgets for other tasks than the buffer's.
    """

    def __init__(self, buffer: RetainedStates, budgets: Mapping[str, float] | None = None, device: Any = "cpu"):
        self.tasks = _states_by_task(buffer, device, alone=budgets is not None)
        self.shares = _shares(self.tasks, budgets)
        weights = torch.tensor(buffer.weights, device=device).double()
        for task, share in self.shares.items():
            weights[self.tasks[task]] /= share * weights[self.tasks[task]].sum()
        # Equal weights take the plain means, whose results do not depend on there being weights at all.
        self._weights = None if bool((weights == weights[0]).all()) else weights

    def relative(self, indices: Tensor | None = None, importance: Tensor | None = None) -> Tensor | None:
        """Weights of n states (None: all) times their importance, (n,) float64, of mean 1; None for equal ones."""
        weights = self._weights if self._weights is None or indices is None else self._weights[indices]
        if importance is not None:
            weights = importance.double() if weights is None else weights * importance
        return None if weights is None else weights / weights.mean()

    def mean(self, values: Tensor, indices: Tensor | None = None) -> float:
        """Weighted mean over some states (None: all) of values for all states, shape (N,)."""
        return weighted_mean(values if indices is None else values[indices], self.relative(indices))

    def mean_by_task(self, values: Tensor) -> dict[str, float]:
        """Weighted mean over each task's states of values for all states, shape (N,)."""
        return {task: self.mean(values, states) for task, states in self.tasks.items()}


def weighted_mean(values: Tensor, weights: Tensor | None) -> float:
    """Mean of values (N,) times weights of mean 1; None for equal ones."""
    return float(values.mean() if weights is None else (weights * values).mean())


def rows_times(weights: Tensor | None, values: Tensor) -> Tensor:
    """Values (N, ...) with those of state n multiplied by its weight; None multiplies by nothing."""
    if weights is None:
        return values
    return values * weights.to(values).view(-1, *[1] * (values.ndim - 1))


def _states_by_task(buffer: RetainedStates, device: Any, *, alone: bool) -> dict[str, Tensor]:
    """Indices of each task's states, those of weight zero left out; none for a task that is alone unless asked for."""
    if len(buffer.tasks) == 1 and not alone:
        return {}
    names = np.asarray(buffer.tasks)[buffer.source]
    found = {task: np.flatnonzero((names == task) & (buffer.weights > 0.0)) for task in dict.fromkeys(buffer.tasks)}
    return {task: torch.tensor(states, device=device) for task, states in found.items() if len(states)}


def _shares(tasks: Mapping[str, Tensor], budgets: Mapping[str, float] | None) -> dict[str, float]:
    """Each budget as a multiple of their harmonic mean.

    In that unit the mean KL, every task weighing 1 / budget, is at the overall budget where all tasks are at theirs.
    """
    if budgets is None:
        return {}
    if budgets.keys() != tasks.keys():
        raise NsrlError(
            f"task_budgets is for the tasks {', '.join(budgets)}, but the buffer holds states of {', '.join(tasks)}; "
            "give each of these its budget"
        )
    unit = harmonic_mean(list(budgets.values()))
    return {task: budget / unit for task, budget in budgets.items()}
