"""Retention in a hand-written training loop: wrap the model and the optimizer, report each task's end."""

from __future__ import annotations

from typing import Any, Literal, get_args

import torch
from torch import nn

from nsrl.continual.budget import KLBudget
from nsrl.continual.budget_options import KLBudgetOptions
from nsrl.continual.features import FeatureOptions, ProtectedFeatures
from nsrl.continual.heads import refuse_moving_statistics
from nsrl.continual.tasks import Loader, Task
from nsrl.errors import NsrlError
from nsrl.projection.optimizer import StepHooks

Method = Literal["kl_budget", "features", "combined"]


class Guard:
    """Keeps learnt tasks while a hand-written loop trains; made by `protect`.

    Until the first `after_task` it does nothing. From then on it acts in the optimizer's own step hooks: before a step
    it adds the Lagrangian gradient of the KL budget; after a step it projects and, every `enforce_every` steps,
    measures and enforces. `enforce()` does so at any other moment; `after_task` begins with it.

    Args:
        model, optimizer: of the loop.
        budget: KL budget, or None.
        features: protected features, or None.
    """

    def __init__(
        self,
        model: nn.Module,
        optimizer: torch.optim.Optimizer,
        budget: KLBudget | None,
        features: ProtectedFeatures | None,
    ):
        self.model = model
        self.optimizer = optimizer
        self.budget = budget
        self.features = features
        self.tasks: list[Task] = []
        self._hooks = StepHooks(optimizer, self._before_step, self._after_step)

    def after_task(self, loader: Loader, head: int | None = None) -> None:
        """Enforce, then retain a task that was learnt.

        Args:
            loader: batches (inputs, targets, ...) of the task.
            head: its output layer in a `MultiHead` model.

        Raises:
            NsrlError: an empty loader, layers with moving statistics.
        """
        refuse_moving_statistics(self.model)
        task = Task(f"task {len(self.tasks)}", len(self.tasks), head=head)
        if self.features is not None:
            self.features.enforce()
        if self.budget is not None:
            self.budget.retain(task, loader, self.optimizer)
        if self.features is not None:
            self.features.restart()
            self.features.retain(task, loader)
        self.tasks.append(task)

    def enforce(self) -> dict[str, float]:
        """Project and bring the KL inside the budget now; returns `report()`."""
        if self.features is not None:
            self.features.enforce()
        if self.budget is not None:
            self._enforce_budget()
        return self.report()

    def report(self) -> dict[str, float]:
        """The "largest_kl" of a learnt task on its retained inputs; "kept_share", "leakage", "rank" of the features."""
        measured: dict[str, float] = {} if self.budget is None else {"largest_kl": self.budget.binding_divergence()}
        return {**measured, **({} if self.features is None else self.features.certificate())}

    def detach(self) -> None:
        """Give the optimizer back as it was."""
        self._hooks.detach()

    def nbytes(self) -> int:
        """Bytes kept of learnt tasks."""
        parts = [part for part in (self.budget, self.features) if part is not None]
        return sum(part.nbytes() for part in parts) if self.tasks else 0

    def _before_step(self) -> None:
        if self.tasks and self.budget is not None:
            self.budget.add_gradient()
            self.budget.add_curvature(self.optimizer)

    def _after_step(self) -> None:
        if not self.tasks:
            return
        if self.features is not None:
            self.features.tick()
        if self.budget is not None and self.budget.due(self.optimizer):
            self._enforce_budget()

    def _enforce_budget(self) -> None:
        assert self.budget is not None
        before = self.budget.interventions
        self.budget.enforce()
        if self.features is not None and self.budget.interventions > before:
            self.features.restart()


def protect(
    model: nn.Module,
    optimizer: torch.optim.Optimizer,
    method: Method = "kl_budget",
    kl_budget: float = KLBudgetOptions.kl_budget,
    **options: Any,
) -> Guard:
    """Keep what a model has learnt while a hand-written loop trains it on.

        guard = protect(model, optimizer, kl_budget=0.02)
        ...                                   # an ordinary training loop on the first task
        guard.after_task(first_loader)
        ...                                   # the same loop on the second: the first task's KL stays in the budget

    Args:
        model: as the loop calls it; it must be in a mode without moving statistics.
        optimizer: any torch optimizer over the model's parameters; its weight decay is guarded like any other step.
        method: "kl_budget", "features" (exact) or "combined".
        kl_budget: largest mean KL(then || now) of a learnt task, nats a sample; not for "features".
        options: other fields of `KLBudgetOptions` and `FeatureOptions`.

    Raises:
        NsrlError: an unknown method or option.
    """
    if method not in get_args(Method):
        raise NsrlError(f"the method must be one of {', '.join(get_args(Method))}, not {method!r}")
    of_features = {key: options.pop(key) for key in list(options) if key in FeatureOptions.__dataclass_fields__}
    unknown = sorted(set(options) - set(KLBudgetOptions.__dataclass_fields__))
    if unknown:
        raise NsrlError(f"protect has no option {', '.join(unknown)}; see KLBudgetOptions and FeatureOptions")
    if (method == "features" and options) or (method == "kl_budget" and of_features):
        raise NsrlError(f"the method {method!r} does not use {', '.join(sorted({**options, **of_features}))}")
    budget = None if method == "features" else KLBudget(model, KLBudgetOptions(kl_budget=kl_budget, **options))
    features = None
    if method != "kl_budget":
        if method == "combined":
            of_features = {"energy": 0.5, **of_features}
        features = ProtectedFeatures(model, FeatureOptions(**of_features), freeze=method == "features")
    return Guard(model, optimizer, budget, features)
