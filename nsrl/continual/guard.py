"""Retention in a hand-written training loop: wrap the model and the optimizer, report each task's end."""

from __future__ import annotations

from collections.abc import Callable
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
from nsrl.projection.precision import full_precision

Method = Literal["kl_budget", "features", "combined"]


def _unless_plain(act: Callable[[Guard], None]) -> Callable[[Guard], None]:
    """Without autocast, if a step is made inside one; the switches cost as much as a small step, so only then."""

    def acting(guard: Guard) -> None:
        if torch.is_autocast_enabled("cpu") or torch.is_autocast_enabled("cuda"):
            with full_precision():
                act(guard)
        else:
            act(guard)

    return acting


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
        self._refusal = optimizer.register_step_pre_hook(_refuse_closure)
        self._hooks = StepHooks(optimizer, self._before_step, self._after_step)

    @full_precision()
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

    @full_precision()
    def enforce(self) -> dict[str, float]:
        """Project and bring the KL inside the budget now; returns `report()`."""
        if self.features is not None:
            self.features.enforce()
        if self.budget is not None:
            self._keep(KLBudget.enforce)
        return self.report()

    @full_precision()
    def report(self) -> dict[str, float]:
        """The "largest_kl" of a learnt task on its retained inputs; "kept_share", "leakage", "rank" of the features."""
        measured: dict[str, float] = {} if self.budget is None else {"largest_kl": self.budget.binding_divergence()}
        return {**measured, **({} if self.features is None else self.features.certificate())}

    def detach(self) -> None:
        """Give the optimizer back as it was."""
        self._hooks.detach()
        self._refusal.remove()

    def nbytes(self) -> int:
        """Bytes kept of learnt tasks."""
        parts = [part for part in (self.budget, self.features) if part is not None]
        return sum(part.nbytes() for part in parts) if self.tasks else 0

    @_unless_plain
    def _before_step(self) -> None:
        if self.tasks and self.budget is not None:
            if getattr(self.optimizer, "grad_scale", None) is not None:
                raise NsrlError(
                    "a fused optimizer gets scaled gradients from GradScaler, to which no others can be added; call "
                    "scaler.unscale_(optimizer) before scaler.step(optimizer), or build the optimizer without fused"
                )
            self.budget.add_gradient()
            self.budget.add_curvature(self.optimizer)

    @_unless_plain
    def _after_step(self) -> None:
        if not self.tasks:
            return
        if self.features is not None:
            self.features.tick()
        if self.budget is not None:
            self._keep(lambda budget: budget.tick(self.optimizer))

    def _keep(self, act: Callable[[KLBudget], Any]) -> None:
        assert self.budget is not None
        before = self.budget.interventions
        act(self.budget)
        if self.features is not None and self.budget.interventions > before:
            self.features.restart()


def _refuse_closure(optimizer: torch.optim.Optimizer, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
    if any(value is not None for value in (*args[1:], kwargs.get("closure"))):
        raise NsrlError(
            "a closure makes the gradients inside the optimizer's step, where nothing can be added to them; call "
            "backward before optimizer.step()"
        )


def _check(model: nn.Module, optimizer: torch.optim.Optimizer) -> None:
    if isinstance(model, nn.parallel.DistributedDataParallel):
        raise NsrlError(
            "protect works in one process: with DistributedDataParallel every process would pull its copy of the "
            "weights elsewhere; train in one process, or with DataParallel"
        )
    if isinstance(optimizer, torch.optim.LBFGS):
        raise NsrlError("LBFGS evaluates its closure inside a step, where no gradient can be added; take SGD or Adam")
    if any(group.get("maximize") for group in optimizer.param_groups):
        raise NsrlError("the optimizer maximizes, and would drive the KL up; give it the negative loss instead")


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
        optimizer: any torch optimizer over the model's parameters but LBFGS; momentum, weight decay and schedulers are
            guarded like any other step. What is added to the gradient comes after the loop's own clipping, unscaling
            and accumulation.
        method: "kl_budget", "features" (exact) or "combined".
        kl_budget: largest mean KL(then || now) of a learnt task, nats a sample; not for "features".
        options: other fields of `KLBudgetOptions` and `FeatureOptions`.

    Raises:
        NsrlError: an unknown method or option, an optimizer or a wrapper that cannot be guarded.
    """
    _check(model, optimizer)
    if isinstance(model, nn.DataParallel):
        model = model.module  # the same weights; what is retained fits one device
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
