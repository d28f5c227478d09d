"""The KL budget of a sequence of tasks: how far behaviour on retained inputs may move, enforced by measurement.

    now and then    the gradient gets multiplier * grad KL of a few retained inputs, a multiplier a task (at the
                    constrained optimum the optimizer's moments see zero); with `replay` also that of their labels
    beside it       a quadratic model of the KL on all the other inputs, by its gradient or by implicit steps
    behind a step   the KL of the tasks that may have left the budget by it (see `steering.alarm`) is measured on
                    all of their retained inputs; one that has is brought back by the shortest step that does
    more rarely     the KL of every task is measured; if one is over the budget, restore (a Gauss-Newton step by Krylov
                    products with the full Jacobian, backtracking on the measured KL), and if that does not help go
                    back along the segment to the last feasible weights

The promise: after every `enforce`, the mean KL(then || now) of every learnt task is at most `kl_budget`. Between two,
it is so wherever it was measured; a task that left the budget unannounced is found and brought back a step later.
"""

from __future__ import annotations

import math
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor, nn

from nsrl.continual.budget_options import KLBudgetOptions
from nsrl.continual.curvature import Curvature, step_length
from nsrl.continual.heads import model_outputs
from nsrl.continual.retention import RetainedBehaviour
from nsrl.continual.steering.alarm import Alarm
from nsrl.continual.steering.correction import shortest_correction
from nsrl.continual.steering.multipliers import Multipliers
from nsrl.continual.tasks import Loader, Task
from nsrl.projection import SpectralProjection, jacobian
from nsrl.projection.budget.enforcement import Enforcement
from nsrl.projection.budget.model import Quadratic
from nsrl.projection.jacobians.factored import Jacobian
from nsrl.projection.optimizer import FlatParameters
from nsrl.reading import values
from nsrl.reading.limits import Unreadable
from nsrl.reading.tensors import like

#: Linearisations of a correction that are tried before a restoration.
CORRECTIONS = 3
#: Share of the budget that a correction aims at: a step's growth below it, or the next step would need one again.
WITHIN = 0.95


class KLBudget:
    """Keeps a model inside the budget on what it has learnt.

    Args:
        model: any module; its trainable parameters are what moves.
        options: budget and how.

    Attributes:
        retained: inputs and the outputs of then.
        multipliers: the dual variables.
        restorations, fallbacks: how often either was needed.
        corrections: steps of which a part was taken back, because a task had left the budget by them.
    """

    def __init__(self, model: nn.Module, options: KLBudgetOptions):
        self.model = model
        self.options = options
        self.retained = RetainedBehaviour(options.states_per_task, options.seed)
        self.curvature = Curvature(model, options.curvature_samples) if options.curvature else None
        aim = options.target * options.kl_budget
        self.multipliers = Multipliers(aim, options.rate, options.damping, options.multiplier)
        self.enforcement = Enforcement(self, options.kl_budget, aim, options.restore_steps, bisections=10)
        self.restorations = 0
        self.fallbacks = 0
        self.alarm = Alarm(options.kl_budget) if options.alarm else None
        self.corrections = 0
        self._steps = 0
        self._next, self._spacing = 0, 1
        self._shares = torch.zeros(0)  # of the inputs of each task that are retained
        self._lengths: list[float] = []
        self._feasible: Tensor | None = None
        self._learnt: Tensor | None = None

    def __len__(self) -> int:
        return len(self.retained)

    @property
    def parameters(self) -> FlatParameters:
        """The trainable parameters as one vector."""
        return FlatParameters([p for p in self.model.parameters() if p.requires_grad])

    def draws(self) -> bool:
        """Whether this step draws retained inputs."""
        return len(self) > 0 and self._steps >= self._next

    def draw(self, batch: int = 16) -> Tensor:
        """Indices of the retained inputs of the next Lagrangian gradient, (batch_states,) int64."""
        return self.retained.memory.draw(self.options.batch_states or 4 * batch)

    def pull(self, outputs: Tensor, indices: Tensor) -> Tensor:
        """Gradient of the sum over the tasks of multiplier * KL + replay * share retained * loss of the labels.

        In the outputs of some retained inputs, which stand for all. Moves the multipliers.

        Args:
            outputs: detached, shape (n, O).
            indices: which inputs.
        """
        kl, slope = self.retained.gap(outputs, indices)
        owner = self.retained.memory.owner.index_select(0, indices)
        if self.alarm is not None:
            self.alarm.drawn(kl, indices, owner)
        weights = self.multipliers.update(kl, owner, self._spacing).to(slope)
        # the less a draw weighs, the rarer: it stands for the steps to the next, and weighs no more than a batch
        whole = float(weights.sum() + self.options.replay * self._shares.sum())
        self._spacing = max(1, min(self.options.draw_every, int(1.0 / max(whole, 1e-9))))
        self._next = self._steps + self._spacing
        each = self._spacing * len(weights) / len(indices)
        if not self.options.replay:
            return slope.mul_(weights.mul_(each).index_select(0, owner).unsqueeze(1))
        labels = (self.options.replay * each) * self._shares.to(slope)
        slope.mul_(weights.mul_(each).add_(labels).index_select(0, owner).unsqueeze(1))
        errors = self.retained.errors.index_select(0, indices)
        return slope.addcmul_(errors, labels.index_select(0, owner).unsqueeze(1))

    def add_gradient(self) -> None:
        """Add the Lagrangian gradient of some retained inputs to the parameters' gradients."""
        if self.draws():
            indices = self.draw()
            outputs = self.retained.outputs(self.model, indices)
            outputs.backward(self.pull(outputs.detach(), indices))

    def tick(self, optimizer: torch.optim.Optimizer) -> None:
        """Count a step; relax every `relax_every` of them, enforce every `enforce_every` and where a task strays."""
        self._steps += 1
        groups = optimizer.param_groups
        # schedulers change the rates in between; a fresh optimizer of another shape has made no steps yet
        before = self._lengths if len(self._lengths) == len(groups) else [0.0] * len(groups)
        self._lengths = [length + step_length(group) for length, group in zip(before, groups, strict=True)]
        if self._steps % self.options.relax_every == 0:
            self.relax(optimizer)
        if self._strays() or self._steps % self.options.enforce_every == 0:
            self.enforce()

    def relax(self, optimizer: torch.optim.Optimizer) -> None:
        """An implicit step on the model of the curvature, for the steps of plain SGD since the last one."""
        lengths, self._lengths = self._lengths, []
        if self.curvature is not None and len(self) and lengths and isinstance(optimizer, torch.optim.SGD):
            self.curvature.relax(optimizer, lengths, self.options.curvature)

    def add_curvature(self, optimizer: torch.optim.Optimizer) -> None:
        """Add the gradient of the model of the curvature, for optimizers other than plain SGD."""
        if self.curvature is not None and len(self) and not isinstance(optimizer, torch.optim.SGD):
            self.curvature.add_gradient(optimizer, self.options.curvature)

    @property
    def interventions(self) -> int:
        """How often the weights were changed to keep the budget."""
        return self.restorations + self.fallbacks + self.corrections

    def retain(self, task: Task, loader: Loader, optimizer: torch.optim.Optimizer | None = None) -> None:
        """Enforce, then keep inputs of a task that was learnt, with the present outputs on them.

        Args:
            task: as learnt.
            loader: its batches.
            optimizer: whose steps are relaxed before; None: they need not be.
        """
        if optimizer is not None:
            self.relax(optimizer)
        self.enforce()
        self.retained.add(self.model, task, loader)
        seen = sum(len(batch[1]) for batch in loader)
        kept = min(1.0, self.options.states_per_task / seen)
        self._shares = torch.cat([self._shares, torch.tensor([kept])]).to(self.retained.reference.device)
        self.multipliers.add(self.retained.reference)
        self._next, self._spacing = 0, 1
        if self.curvature is not None:
            self.curvature.add(task, loader, 1.0 - kept)
        self._feasible = self._learnt = self.parameters.read()
        self._begin_alarm()

    def binding_divergence(self) -> float:
        """KL of the task that has moved most; infinity where the model has diverged, 0 with nothing retained."""
        if not len(self):
            return 0.0
        divergences = self.retained.divergences(self.model)
        self.multipliers.measured(divergences)
        return _largest(divergences)

    def largest_divergence(self) -> float:
        """As `binding_divergence`, to look at: it has no effect on the multipliers."""
        return _largest(self.retained.divergences(self.model)) if len(self) else 0.0

    def enforce(self) -> float:
        """Measure; bring every task inside the budget; returns the largest KL, which is at most `kl_budget`.

        An exception leaves the last feasible weights.
        """
        if not len(self):
            return 0.0
        assert self._feasible is not None
        kept = self.enforcement.keep(self._feasible)
        self.restorations += kept.restored
        self.fallbacks += kept.fell_back
        self._feasible = self.parameters.read()
        if kept.restored or kept.fell_back:
            self._begin_alarm()
        return kept.kl

    def _begin_alarm(self) -> None:
        if self.alarm is not None:
            self.alarm.begin(self.retained.kl(self.model), self.retained.memory.owner)

    def _strays(self) -> bool:
        """Measure the tasks that may have left the budget and bring them back; whether one is still outside."""
        if self.alarm is None or not len(self):
            return False
        near = self.alarm.near()
        if not len(near):
            return False
        for attempt in range(CORRECTIONS + 1):
            kl = self._measure(near)
            over = near[~(kl <= self.options.kl_budget)]
            if not len(over) or attempt == CORRECTIONS or not bool(torch.isfinite(kl).all()):
                break
            if not attempt:
                self.corrections += 1
                self.multipliers.pushed(over)
            step = shortest_correction(self.model, self.retained, over, WITHIN * self.options.kl_budget)
            here = self.parameters.read()
            self.parameters.write(here + step.to(here))
            # what brings one back may push another one out
            near = torch.arange(len(self.alarm), device=near.device)
        return len(over) > 0

    def _measure(self, tasks: Tensor) -> Tensor:
        """The KL of some tasks, (r,)."""
        assert self.alarm is not None
        owner = self.retained.memory.owner
        indices = torch.isin(owner, tasks).nonzero().squeeze(1)
        return self.alarm.take(tasks, self.retained.kl(self.model, indices), indices, owner[indices])

    def certificate(self, states: int = 32) -> dict[str, float]:
        """What the way since the last task's end has to do with the protected outputs, on a few retained inputs.

        Returns:
            "rank" of the whitened Jacobian J on inputs of all tasks mixed. "kept_share": what a projection onto its
            null space would keep of the way's norm, the least over the layers that moved. "leakage": how far the way d
            moves those outputs, next to an equally long way in a random direction: |J d| / |d| over |J|_F / sqrt(P).
            The budget is kept by what the gradient contains, not by a projection of steps, so unlike that of the
            strategies that project, this leakage is not a share of what was proposed.
        """
        assert self._learnt is not None
        model = self._linearise(self._mixed(states))
        projection = SpectralProjection.of(model)
        found = {"rank": float(projection.spectrum.rank)}
        way = self.parameters.read() - self._learnt
        if way.any():
            typical = math.sqrt(float(projection.spectrum.values.sum()) / len(way))
            found["leakage"] = float(model.jacobian.matvec(way).norm() / way.norm()) / typical
            found["kept_share"] = self._least_share(projection.null(way), way)
        return found

    def _least_share(self, kept: Tensor, way: Tensor) -> float:
        named = [(name.rpartition(".")[0], p.numel()) for name, p in self.model.named_parameters() if p.requires_grad]
        squares: dict[str, list[float]] = {}
        pieces = [vector.double().split([size for _, size in named]) for vector in (kept, way)]
        for (layer, _), mine, whole in zip(named, *pieces, strict=True):
            sums = squares.setdefault(layer, [0.0, 0.0])
            sums[0] += float(mine.square().sum())
            sums[1] += float(whole.square().sum())
        return min(math.sqrt(mine / whole) for mine, whole in squares.values() if whole > 0.0)

    def progress(self) -> dict[str, Any]:
        """Draws, multiplier and counters."""
        return {
            **self.retained.memory.progress(),
            "multiplier": self.multipliers.integrals,
            "divergences": self.multipliers.divergences,
            "counts": [self._steps, self.restorations, self.fallbacks],
            "corrections": self.corrections,
            "lengths": self._lengths,
            "feasible": self._feasible,
        }

    def resume(self, progress: dict[str, Any]) -> None:
        """Go on from there.

        Raises:
            Unreadable: a file that was changed.
        """
        values.mapping(progress, "progress", ["multiplier", "counts", "lengths", "feasible"])
        remembered = [self._remembered(progress, key) for key in ("multiplier", "divergences")]
        counts = [values.whole(count, "a count") for count in values.items(progress["counts"], "counts", 3)]
        corrections = values.whole(progress.get("corrections", 0), "a count")  # older files have none
        lengths = [values.finite(length, "a length") for length in values.items(progress["lengths"], "lengths")]
        feasible = progress["feasible"]
        feasible = None if feasible is None else like(feasible, self.parameters.read(), "feasible")
        self.retained.memory.resume(progress)
        self.multipliers.integrals, self.multipliers.divergences = remembered
        self._feasible = feasible
        self._steps, self.restorations, self.fallbacks = counts
        self.corrections = corrections
        self._lengths = lengths

    def _remembered(self, progress: dict[str, Any], what: str) -> Tensor:
        held = progress.get(what, 0.0)
        if isinstance(held, float):  # one for all tasks, as older files have it
            held = torch.full_like(self.multipliers.integrals, values.finite(held, what))
        found = like(held, self.multipliers.integrals, what)
        if bool((found < 0.0).any()):
            raise Unreadable(f"{what} must not be negative")
        return found

    def nbytes(self) -> int:
        """Retained inputs and outputs, and the model of the curvature."""
        return self.retained.nbytes() + (0 if self.curvature is None else self.curvature.nbytes())

    def restoration(self) -> Quadratic[Jacobian]:
        """The model that a restoration is solved on: retained inputs of all tasks mixed, and their mean KL on all."""
        model = self._linearise(self._mixed(self.options.restore_states))
        return replace(model, divergence=float(self.retained.divergences(self.model).mean()))

    def _mixed(self, count: int) -> Tensor:
        """Indices of some retained inputs, always the same ones of all tasks."""
        chosen = torch.randperm(len(self), generator=torch.Generator().manual_seed(0))[:count]
        return chosen.to(self.retained.memory.owner.device)

    def _linearise(self, indices: Tensor) -> Quadratic[Jacobian]:
        memory = self.retained.memory
        heads = memory.heads_of(indices)
        metric = self.retained.metric
        scale = len(indices) ** -0.5
        J = jacobian(
            self.model,
            memory.take(indices),
            forward=lambda module, batch: model_outputs(module, batch, heads),
            seed=metric.seeds,
            scale=scale,
        )
        residual = metric.residual(self.retained.reference[indices], J.outputs) * scale
        return Quadratic(J, residual.flatten(), 0.0)


def _largest(divergences: Tensor) -> float:
    kl = float(divergences.max())
    return kl if math.isfinite(kl) else math.inf
