"""Where a constraint acts on an optimizer: on the gradient, on a step, on the way since a reference, in its metric."""

from __future__ import annotations

import warnings
from collections.abc import Sequence
from typing import Literal, get_args

import torch
from torch import Tensor, nn

from nsrl.projection.budget.projection import SpectralProjection
from nsrl.projection.constraints.constraint import Constraint, Projected
from nsrl.projection.constraints.filters import Budget, Filter, Hard, Tikhonov
from nsrl.projection.constraints.gauss_newton import JacobianConstraint
from nsrl.projection.optimizer import FlatParameters, StepHooks

Where = Literal["gradient", "step", "cumulative", "metric"]


class AttachedConstraint:
    """A constraint in the step hooks of an optimizer; made by `attach_constraint`.

    Attributes:
        last: certificate of the last projection; None before the first one and in the metric of the optimizer.
    """

    last: Projected | None = None

    def __init__(
        self,
        optimizer: torch.optim.Optimizer,
        flat: FlatParameters,
        constraint: Constraint,
        filter: Filter,
        where: Where,
        every: int,
        reference: Tensor,
    ):
        self.constraint = constraint
        self.filter = filter
        self._optimizer = optimizer
        self._flat = flat
        self._every = every
        self._steps = 0
        self._start = reference
        self._metric: SpectralProjection | None = None
        before = {"gradient": self._project_gradient, "step": self._remember}.get(where)
        after = {"step": self._project_way, "cumulative": self._project_way, "metric": self._project_in_metric}.get(
            where
        )
        self._hooks = StepHooks(optimizer, before, after)

    def detach(self) -> None:
        """Give the optimizer back as it was."""
        self._hooks.detach()

    def refresh(self) -> None:
        """Read the optimizer's metric anew at its next step (where="metric" freezes it at the first one)."""
        self._metric = None

    def _project(self, vector: Tensor) -> Tensor:
        self.last = self.constraint.project(vector, self.filter)
        return self.last.displacement

    def _project_gradient(self) -> None:
        without = [p for p in self._flat.parameters if p.grad is None]
        self._flat.set_gradient(self._project(self._flat.gradient()))
        for p in without:
            # an optimizer skips parameters without a gradient: no decay, no momentum
            if p.grad is not None and not bool(p.grad.any()):
                p.grad = None

    def _remember(self) -> None:
        if self._steps % self._every == 0:
            self._start = self._flat.read()

    def _project_way(self) -> None:
        self._steps += 1
        if self._steps % self._every == 0:
            self._flat.write(self._start + self._project(self._flat.read() - self._start))

    def _project_in_metric(self) -> None:
        self._steps += 1
        if self._steps % self._every:
            return
        if self._metric is None:
            assert isinstance(self.constraint, JacobianConstraint)
            self._metric = self.constraint.in_metric(self._flat.scale_of(self._optimizer))
        way = self._flat.read() - self._start
        if isinstance(self.filter, Budget):
            way = self._metric.project(way, self.filter.kl_budget).displacement
        else:
            way = self._metric.null(way, self.filter.damping if isinstance(self.filter, Tikhonov) else 0.0)
        self._flat.write(self._start + way)


def attach_constraint(
    optimizer: torch.optim.Optimizer,
    parameters: Sequence[nn.Parameter],
    constraint: Constraint,
    filter: Filter | None = None,
    where: Where = "cumulative",
    every: int = 1,
    reference: Tensor | None = None,
) -> AttachedConstraint:
    """Project what an optimizer is given or what it does, through its own step hooks.

    * "gradient": the gradient before the step. Keeps moments clean; Adam's scaling, old momentum and weight decay leave
      the null space.
    * "step": what the last `every` steps did, by themselves. Weight decay and momentum are projected too; round-off,
      and what soft filters let pass, adds up.
    * "cumulative": the whole way since the reference, W_ref + P(W - W_ref). For layer features an exact retraction,
      whatever happened in between. Soft filters other than `Budget` act anew on what they left the last time.
    * "metric": as "cumulative", in the optimizer's own metric V = 1 / (sqrt(v) + eps): d - V J^T (J V J^T)^+ J d, for a
      `JacobianConstraint` with `Hard()`, `Tikhonov` or `Budget`. What is left of a step -V g never points uphill, which
      the Euclidean projection of Adam's step may (Adam-NSCL's descent lemma is about the candidate, not about the
      gradient). V is read at the first step and frozen until `refresh`.

    Args:
        optimizer: any; it may hold other parameters, which are left alone.
        parameters: those that the constraint's columns belong to, in order.
        constraint: what to keep.
        filter: how much of which direction is removed; default `Hard()`.
        where: see above.
        every: project after every so many steps.
        reference: flat parameters that the way is counted from, shape (P,); default the present ones.

    Returns:
        A handle: `.last` is the latest certificate, `.detach()` removes the hooks.

    Raises:
        ValueError: an unknown place, parameters that do not fit the constraint, a constraint that holds nothing yet,
            a filter that a metric does not know.

    Warns:
        UserWarning: with the names of parameters that the constraint does not cover.
    """
    flat = FlatParameters(parameters)
    filter = filter or Hard()
    if where not in get_args(Where):
        raise ValueError(f"where must be one of {', '.join(get_args(Where))}, not {where!r}")
    if every < 1 or (every > 1 and where == "gradient"):
        raise ValueError(f"every must be at least 1 step, and 1 for gradients, not {every}")
    if sum(flat.sizes) != constraint.width:
        raise ValueError(f"the parameters have {sum(flat.sizes)} entries, the constraint {constraint.width} columns")
    if where == "metric":
        if not isinstance(constraint, JacobianConstraint):
            raise ValueError(f'where="metric" needs a JacobianConstraint, not a {type(constraint).__name__}')
        if not (filter == Hard() or isinstance(filter, Tikhonov | Budget)):
            raise ValueError(f'where="metric" knows the filters Hard(), Tikhonov and Budget, not {filter}')
    constraint.eigenspaces  # noqa: B018  raises while the constraint holds nothing: idle protection must be loud
    if constraint.uncovered:
        warnings.warn(
            f"{', '.join(constraint.uncovered)}: not covered by the constraint and free to move; freeze them to keep "
            "its guarantee",
            stacklevel=2,
        )
    reference = flat.read() if reference is None else reference.to(flat.read())
    return AttachedConstraint(optimizer, flat, constraint, filter, where, every, reference)
