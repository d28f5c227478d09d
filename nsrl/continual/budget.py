"""The KL budget of a sequence of tasks: how far behaviour on retained inputs may move, enforced by measurement.

    every step      the gradient gets multiplier * grad KL of a few retained inputs (a Lagrangian gradient: at the
                    constrained optimum the optimizer's moments see zero)
    now and then    the KL of every task is measured on all of its retained inputs; if one is over the budget, restore
                    (a Gauss-Newton step by Krylov products with the full Jacobian, backtracking on the measured KL),
                    and if that does not help go back along the segment to the last feasible weights

The promise: after every `enforce`, the mean KL(then || now) of every learnt task is at most `kl_budget`.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from nsrl.continual.heads import model_outputs
from nsrl.continual.retention import RetainedBehaviour
from nsrl.continual.tasks import Loader, Task
from nsrl.errors import NsrlError
from nsrl.projection import FactoredJacobian, KrylovProjection, SpectralProjection, jacobian
from nsrl.projection.optimizer import FlatParameters


@dataclass(frozen=True)
class KLBudgetOptions:
    """How much behaviour may move, and how that is kept.

    Attributes:
        kl_budget: largest mean KL(then || now) of a task on its retained inputs, nats a sample (regression: half the
            squared change of the outputs).
        states_per_task: inputs retained of every task, with the outputs of then.
        batch_states: of them, in every step's Lagrangian gradient.
        enforce_every: steps from one measurement (and restoration, if needed) to the next; also at the task's end.
        target: share of the budget that the multiplier and the restoration aim at.
        multiplier: the Lagrange multiplier to start with.
        rate: integral gain of its logarithm, a step, on the relative excess of the KL.
        damping: proportional gain.
        restore_steps: Gauss-Newton steps tried before going back along the segment.
        seed: of the choice of states and of the draws.
    """

    kl_budget: float = 0.02
    states_per_task: int = 200
    batch_states: int = 96
    enforce_every: int = 500
    target: float = 0.9
    multiplier: float = 1.0
    rate: float = 0.03
    damping: float = 0.3
    restore_steps: int = 4
    seed: int = 0

    def __post_init__(self) -> None:
        if not 0.0 < self.kl_budget < math.inf:
            raise NsrlError(
                f"kl_budget must be a positive number of nats, not {self.kl_budget}; where nothing at all may move, "
                "use the method 'features'"
            )
        if min(self.states_per_task, self.batch_states, self.enforce_every, self.restore_steps) < 1:
            raise NsrlError("states_per_task, batch_states, enforce_every and restore_steps must be at least 1")
        if not 0.0 < self.target <= 1.0 or not self.multiplier > 0.0:
            raise NsrlError(
                f"target must lie in (0, 1] and the multiplier be positive, not {self.target} and {self.multiplier}"
            )


class Multiplier:
    """A Lagrange multiplier driven by measured KL: proportional-integral control of its logarithm.

    Follows Stooke et al. 2020 (PID Lagrangian methods), in log space: its natural size spans orders of magnitude.
    """

    # a larger one would only make noise: the restoration keeps the budget
    LOWEST, HIGHEST = 1e-3, 30.0

    def __init__(self, start: float, target: float, rate: float, damping: float):
        self.value = start
        self.target = target
        self.rate = rate
        self.damping = damping

    def update(self, kl: float) -> float:
        """The multiplier to use after a measured KL."""
        excess = min(max(kl / self.target - 1.0, -1.0), 2.0)
        self.value = min(max(self.value * math.exp(self.rate * excess), self.LOWEST), self.HIGHEST)
        return self.value * math.exp(self.damping * excess)


class KLBudget:
    """Keeps a model inside the budget on what it has learnt.

    Args:
        model: any module; its trainable parameters are what moves.
        options: budget and how.

    Attributes:
        retained: inputs and the outputs of then.
        multiplier: the dual variable.
        restorations, fallbacks: how often either was needed.
    """

    def __init__(self, model: nn.Module, options: KLBudgetOptions):
        self.model = model
        self.options = options
        self.retained = RetainedBehaviour(options.states_per_task, options.seed)
        self.multiplier = Multiplier(
            options.multiplier, options.target * options.kl_budget, options.rate, options.damping
        )
        self.restorations = 0
        self.fallbacks = 0
        self._steps = 0
        self._feasible: Tensor | None = None

    def __len__(self) -> int:
        return len(self.retained)

    @property
    def flat(self) -> FlatParameters:
        """The trainable parameters as one vector."""
        return FlatParameters([p for p in self.model.parameters() if p.requires_grad])

    def draw(self) -> Tensor:
        """Indices of the retained inputs of the next Lagrangian gradient."""
        return self.retained.memory.draw(self.options.batch_states)

    def pull(self, outputs: Tensor, indices: Tensor) -> Tensor:
        """Gradient of multiplier * mean KL in the outputs (n, O) of some retained inputs; moves the multiplier."""
        kl, slope = self.retained.gap(outputs.detach(), indices)
        return slope * (self.multiplier.update(kl) / len(indices))

    def add_gradient(self) -> None:
        """Add the Lagrangian gradient of some retained inputs to the parameters' gradients."""
        if len(self):
            indices = self.draw()
            outputs = self.retained.outputs(self.model, indices)
            outputs.backward(self.pull(outputs, indices))

    def due(self) -> bool:
        """Count a step; whether it is time to measure and enforce."""
        self._steps += 1
        return self._steps % self.options.enforce_every == 0

    def tick(self) -> None:
        """Count a step; measure and enforce every `enforce_every` of them."""
        if self.due():
            self.enforce()

    @property
    def interventions(self) -> int:
        """How often the weights were changed by `enforce`."""
        return self.restorations + self.fallbacks

    def retain(self, task: Task, loader: Loader) -> None:
        """Enforce, then keep inputs of a task that was learnt, with the present outputs on them."""
        self.enforce()
        self.retained.add(self.model, task, loader)
        self._feasible = self.flat.read()

    def largest(self) -> float:
        """KL of the task that has moved most; infinity where the model has diverged, 0 with nothing retained."""
        if not len(self):
            return 0.0
        kl = float(self.retained.divergences(self.model).max())
        return kl if math.isfinite(kl) else math.inf

    def enforce(self) -> float:
        """Measure; bring every task inside the budget; returns the largest KL, which is at most `kl_budget`."""
        if not len(self):
            return 0.0
        kl = self.largest()
        if kl > self.options.kl_budget:
            kl = self._restore_inside(kl)
        if kl > self.options.kl_budget:
            kl = self._fall_back()
        self._feasible = self.flat.read()
        return kl

    def rank(self, states: int = 32) -> int:
        """Rank of the whitened Jacobian on a few of the retained inputs, all tasks mixed."""
        count = min(states, len(self))
        J, residual = self._linearise(torch.randperm(len(self), generator=torch.Generator().manual_seed(0))[:count])
        return SpectralProjection(J, residual, 0.0).spectrum.rank

    def nbytes(self) -> int:
        """Retained inputs and outputs."""
        return self.retained.nbytes()

    def _restore_inside(self, kl: float) -> float:
        for _ in range(self.options.restore_steps):
            if not math.isfinite(kl):
                return kl
            better = self._restore(kl)
            self.restorations += 1
            if better <= self.options.kl_budget or better > 0.99 * kl:
                return better
            kl = better
        return kl

    def _restore(self, kl: float) -> float:
        """One Gauss-Newton step on all retained inputs, backtracking on the measured KL of the worst task."""
        mean = float(self.retained.divergences(self.model).mean())
        J, residual = self._linearise(torch.arange(len(self)))
        # the model sees the mean over the tasks, the budget holds for the worst
        aim = self.options.target * self.options.kl_budget * min(1.0, mean / kl)
        flat = self.flat
        here = flat.read()
        step = KrylovProjection(J, residual, mean).project(torch.zeros_like(here), aim).displacement
        for halvings in range(5):
            flat.write(here + step * 0.5**halvings)
            reached = self.largest()
            if reached < kl:
                return reached
        flat.write(here)
        return kl

    def _fall_back(self) -> float:
        """Bisect the segment from the last feasible weights for the farthest point inside the budget."""
        assert self._feasible is not None
        self.fallbacks += 1
        flat = self.flat
        way = torch.nan_to_num(flat.read() - self._feasible, nan=0.0, posinf=0.0, neginf=0.0)
        low, high = 0.0, 1.0
        for _ in range(10):
            middle = 0.5 * (low + high)
            flat.write(self._feasible + middle * way)
            low, high = (middle, high) if self.largest() <= self.options.kl_budget else (low, middle)
        flat.write(self._feasible + low * way)
        return self.largest()

    def _linearise(self, indices: Tensor) -> tuple[FactoredJacobian, Tensor]:
        memory = self.retained.memory
        heads = memory.heads_of(indices)
        metric = self.retained.metric
        scale = len(indices) ** -0.5
        J = jacobian(
            self.model,
            memory.inputs[indices],
            forward=lambda module, batch: model_outputs(module, batch, heads),
            seed=metric.seeds,
            scale=scale,
            check=False,
        )
        return J, (metric.residual(self.retained.reference[indices], J.outputs) * scale).flatten()
