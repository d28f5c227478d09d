"""What has been retained, for a user to read."""

from __future__ import annotations

import math
from dataclasses import dataclass, field

from nsrl.rl.opening.stage import OpeningRecord


@dataclass(frozen=True)
class RetentionReport:
    """What has been retained, measured on the buffer now.

    Attributes:
        kl_mean, kl_max, kl_heldout, agreement, agreement_heldout, kl_worst, kl_by_task: see `Measurement`.
        budget: the KL budget, nats per state.
        rank: numerical rank of the whitened Jacobian on a subset of the buffer.
        parameters: number of protected parameters; `rank / parameters` is the share that is spoken for.
        effective_dimension: sum s / (s + lambda) at the damping that the budget implies for a step of the size of the
            last update.
        states: buffer states (training, held out).
        updates: policy updates made under the budget.
        restored: Gauss-Newton restorations made after updates that ended over the budget.
        rollbacks: updates that had to fall back towards the last feasible parameters.
        overhead_fraction: share of the learning time spent on retention.
        seconds: that time, by stage.
        kl_most: largest KL that counted against the budget behind an update.
        held: updates behind which the budget, and every other promise, held.
        opening: what was done before the first roll-out; None where nothing was yet, or ever will be.
    """

    kl_mean: float
    kl_max: float
    kl_heldout: float
    agreement: float
    agreement_heldout: float
    budget: float
    rank: int
    parameters: int
    effective_dimension: float
    states: tuple[int, int]
    updates: int
    restored: int
    rollbacks: int
    overhead_fraction: float
    seconds: dict[str, float]
    kl_worst: float = math.nan
    kl_by_task: dict[str, float] = field(default_factory=dict)
    kl_most: float = 0.0
    held: int = 0
    opening: OpeningRecord | None = None
