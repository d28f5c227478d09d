"""The KL budget of preserved tokens: a Lagrangian gradient on the way, and enforcement by measurement.

The mechanisms are those of `nsrl.projection.budget`: its multiplier, its restoration and its
way back along the segment.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from nsrl.editing.post_training.preserved import Measured, Preserved, evaluated, metric_of
from nsrl.projection.budget.enforcement import Enforcement
from nsrl.projection.budget.model import Quadratic
from nsrl.projection.budget.multiplier import Multiplier
from nsrl.projection.jacobians.matrix_free import GraphPasses, PolicyJacobian
from nsrl.projection.optimizer import FlatParameters

Projector = Callable[[Tensor], Tensor]

#: Batches that the tokens of a restoration are taken from, at most: each is one pass that is differentiated twice.
BATCHES = 8


@dataclass(frozen=True)
class ProjectedProducts:
    """J P: a Jacobian seen by displacements that stay in a null space, so that a restoration stays in it, too.

    Attributes:
        inner: J.
        project: P, symmetric, (P,) to (P,).
    """

    inner: PolicyJacobian
    project: Projector

    @property
    def shape(self) -> tuple[int, int]:
        """(k, P)."""
        return self.inner.shape

    def matvec(self, vector: Tensor) -> Tensor:
        """J P v, (k,)."""
        return self.inner.matvec(self.project(vector))

    def rmatvec(self, rows: Tensor) -> Tensor:
        """P J^T u, (P,)."""
        return self.project(self.inner.rmatvec(rows))

    def gram(self) -> Tensor:
        """Refused: the rows are tokens times classes, and K would be their square.

        Returns:
            Nothing, not even a (k, k) matrix.

        Raises:
            NotImplementedError: always.
        """
        raise NotImplementedError

    def scaled(self, scale: Tensor) -> tuple[Any, Tensor]:
        """Refused, as `gram`.

        Raises:
            NotImplementedError: always.
        """
        raise NotImplementedError

    def factors(self) -> list[Any]:
        """None."""
        return []


class TokenBudget:
    """Keeps a module inside a KL budget on what is preserved.

    Args:
        preserved: batches and what was answered.
        parameters: what moves.
        kl_budget: largest mean KL(then || now), nats a token.
        target: share of it that the multiplier and the restoration aim at.
        multiplier: the Lagrange multiplier to start with.
        rate, damping: integral gain of its logarithm, a pull, and proportional gain.
        restore_steps: Gauss-Newton steps tried before going back; 0 only goes back.
        restore_tokens: preserved tokens that such a step is solved on.
        seed: of the batches that pull.
        bisections: of the segment back to the last feasible parameters.

    Attributes:
        multiplier: the dual variable.
        last: the latest measurement.
        measurements, restorations, fallbacks: how often each was made.
    """

    def __init__(
        self,
        preserved: Preserved,
        parameters: Sequence[nn.Parameter],
        kl_budget: float,
        *,
        target: float,
        multiplier: float,
        rate: float,
        damping: float,
        restore_steps: int,
        restore_tokens: int,
        seed: int,
        bisections: int = 8,
    ):
        self.preserved = preserved
        self.parameters = FlatParameters(parameters)
        self.kl_budget = kl_budget
        self.multiplier = Multiplier(
            target * kl_budget, rate, damping, start=multiplier, floor=1e-3, ceiling=100.0, relative=False
        )
        exact = all(p.dtype in (torch.float32, torch.float64) for p in parameters)
        # Half-precision weights cannot be differentiated twice to any use: they only go back.
        steps = restore_steps if exact else 0
        self.enforcement = Enforcement(self, kl_budget, target * kl_budget, steps, bisections)
        self.restore_tokens = restore_tokens
        self.projector: Projector | None = None
        self.last: Measured | None = None
        self.measurements = self.restorations = self.fallbacks = 0
        self.reduce: Callable[[float], float] = float
        self.feasible = self.parameters.read()
        self._generator = torch.Generator().manual_seed(seed)
        self._order: list[int] = []

    def add_gradient(self) -> None:
        """Add multiplier * grad KL of one preserved batch to the parameters' gradients; moves the multiplier."""
        if not self._order:
            self._order = torch.randperm(len(self.preserved), generator=self._generator).tolist()
        kl, pieces = self.preserved.pull(self._order.pop(), self.parameters.parameters)
        self.parameters.add_gradients(pieces, self.multiplier.update(self.reduce(kl)))

    def binding_divergence(self) -> float:
        """Mean KL(then || now), nats a token; infinity where the module has diverged."""
        self.measurements += 1
        self.last = self.preserved.measure()
        return self.reduce(self.last.kl_mean)

    def enforce(self) -> float:
        """Measure; restore, or go back; returns the KL that was measured last, at most the budget.

        An exception leaves the last feasible parameters.
        """
        kept = self.enforcement.keep(self.feasible)
        self.restorations += kept.restored
        self.fallbacks += kept.fell_back
        kl = kept.kl
        try:
            if kept.restored and not kept.fell_back:
                kl = self.binding_divergence()  # a restoration's last try may have been taken back
            if not kl <= self.kl_budget:
                # Half precision may round the point that was found feasible; the last feasible one is known to be.
                self.parameters.write(self.feasible)
                kl = self.binding_divergence()
        except BaseException:
            self.parameters.write(self.feasible)
            raise
        self.feasible = self.parameters.read()
        return kl

    def restoration(self) -> Quadratic[Any]:
        """The model that a restoration is solved on: some preserved tokens, always the same, and the KL on all."""
        assert self.last is not None
        chosen = self._chosen()
        with evaluated(self.preserved.module), torch.enable_grad(), differentiable_attention():
            answers = [self.preserved.outputs(number) for number in chosen]
            outputs = torch.cat([answer[rows] for answer, rows in zip(answers, chosen.values(), strict=True)])
            passes = GraphPasses(outputs, self.parameters.parameters)
            # The graph has to be differentiated where attention still is the plain one.
            passes.push(torch.zeros_like(self.feasible))
        now = outputs.detach()
        then = [
            self.preserved.references[number].completed(answer.detach())[rows]
            for (number, rows), answer in zip(chosen.items(), answers, strict=True)
        ]
        metric = metric_of(now)
        residual = metric.residual(torch.cat(then).to(now), now) / math.sqrt(len(now))
        jacobian: Any = PolicyJacobian(passes, metric.root(now))
        if self.projector is not None:
            jacobian = ProjectedProducts(jacobian, self.projector)
        return Quadratic(jacobian, residual.flatten(), self.last.kl_mean)

    def progress(self) -> dict[str, Any]:
        """Draws, multiplier, counters and the last feasible parameters."""
        return {
            "multiplier": self.multiplier.integral,
            "order": list(self._order),
            "draws": self._generator.get_state(),
            "counts": [self.measurements, self.restorations, self.fallbacks],
            "feasible": self.feasible.clone(),
        }

    def resume(self, progress: dict[str, Any]) -> None:
        """Go on from there."""
        self.multiplier.integral = float(progress["multiplier"])
        self._order = [int(number) for number in progress["order"]]
        self._generator.set_state(progress["draws"].cpu())
        self.measurements, self.restorations, self.fallbacks = (int(count) for count in progress["counts"])
        self.feasible = progress["feasible"].to(self.feasible)

    def _chosen(self) -> dict[int, Tensor]:
        """Evenly spaced positions of evenly spaced batches."""
        sizes = [len(reference.outputs) for reference in self.preserved.references]
        held = [number for number, size in enumerate(sizes) if size]
        count = min(len(held), BATCHES, self.restore_tokens)
        numbers = {held[int(place)] for place in torch.linspace(0, len(held) - 1, count)}
        share = -(-self.restore_tokens // len(numbers))
        return {
            number: torch.linspace(0, sizes[number] - 1, min(share, sizes[number])).long().to(self.feasible.device)
            for number in sorted(numbers)
        }


def differentiable_attention() -> Any:
    """The attention kernel that can be differentiated twice."""
    from torch.nn.attention import SDPBackend, sdpa_kernel

    return sdpa_kernel(SDPBackend.MATH)
