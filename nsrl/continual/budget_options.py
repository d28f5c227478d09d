"""What can be chosen about a KL budget over a sequence of tasks."""

from __future__ import annotations

import math
from dataclasses import dataclass

from nsrl.errors import NsrlError


@dataclass(frozen=True)
class KLBudgetOptions:
    """How much behaviour may move, and how that is kept.

    Attributes:
        kl_budget: largest mean KL(then || now) of a task on its retained inputs, nats a sample (regression: half the
            squared change of the outputs).
        states_per_task: inputs retained of every task, with the outputs of then.
        replay: weight of the labels of retained inputs next to the loss of the task at hand: 0 uses no old labels, 1
            weighs every retained input like one at hand, as joint training does. An earlier task counts by the share
            of its inputs that is retained: the labels of a few, with the weight of all, would be noise.
        batch_states: of them, in a Lagrangian gradient; None: four times as many as the batch has, and in `protect`,
            which does not see it, 64.
        draw_every: most steps from one that draws retained inputs to the next. A draw stands for the steps to the next
            one, and is the rarer the less it weighs: at most as much as the batch at hand.
        enforce_every: steps from one measurement (and restoration, if needed) to the next; also at the task's end.
        alarm: whether tasks that may leave the budget in between are measured behind the step, and brought back.
        target: share of the budget that the multipliers and the restoration aim at.
        multiplier: the Lagrange multiplier that a task starts with.
        rate: integral gain of its logarithm, a step, on the relative excess of the task's KL.
        damping: proportional gain.
        restore_steps: Gauss-Newton steps tried before going back along the segment.
        restore_states: retained inputs, of all tasks mixed, that such a step is solved on; how far it is made is
            measured on all.
        curvature: weight of a quadratic model of the KL on a task's inputs that are not retained (see
            `nsrl.continual.curvature`), for every earlier task, next to the loss of the task at hand. 0: no model.
        curvature_samples: inputs of a task that it is made on.
        relax_every: steps from one implicit step on it to the next.
        seed: of the choice of states and of the draws.
    """

    kl_budget: float = 0.1
    states_per_task: int = 200
    replay: float = 1.0
    batch_states: int | None = None
    draw_every: int = 8
    enforce_every: int = 500
    alarm: bool = True
    target: float = 0.6
    multiplier: float = 1.0
    rate: float = 0.03
    damping: float = 0.3
    restore_steps: int = 4
    restore_states: int = 256
    curvature: float = 3.0
    curvature_samples: int = 5000
    relax_every: int = 100
    seed: int = 0

    def __post_init__(self) -> None:
        if not 0.0 < self.kl_budget < math.inf:
            raise NsrlError(
                f"kl_budget must be a positive number of nats, not {self.kl_budget}; where nothing at all may move, "
                "use the method 'features'"
            )
        counts = ("states_per_task", "enforce_every", "restore_steps", "restore_states", "curvature_samples")
        counts = (*counts, "relax_every", "draw_every", *(() if self.batch_states is None else ("batch_states",)))
        if min(getattr(self, name) for name in counts) < 1:
            raise NsrlError(f"{', '.join(counts)} must be at least 1")
        for name in ("replay", "curvature"):
            if not 0.0 <= getattr(self, name) < math.inf:
                raise NsrlError(f"{name} is a weight of at least 0, not {getattr(self, name)}")
        if not 0.0 < self.target <= 1.0 or not self.multiplier > 0.0:
            raise NsrlError(
                f"target must lie in (0, 1] and the multiplier be positive, not {self.target} and {self.multiplier}"
            )
