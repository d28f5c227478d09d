"""What a policy does on a retention buffer, in numbers."""

from __future__ import annotations

from dataclasses import dataclass, field


@dataclass(frozen=True)
class Measurement:
    """What the policy does on the buffer now, against the reference.

    Attributes:
        kl_mean: mean KL(pi_ref || pi) over the whole buffer, nats per state, by the buffer's weights (and, with task
            budgets, 1 / budget): the quantity under the budget.
        kl_max: largest KL of a state, whatever its weight.
        kl_heldout: mean KL over the held-out states, on which nothing is ever differentiated; NaN without any.
        agreement: share of states on which both policies act alike (same likeliest action; Gaussian means within half
            a reference standard deviation).
        agreement_heldout: the same over the held-out states.
        kl_by_task: mean KL over the states of each task of a merged buffer, the quantities under task budgets; empty
            for a buffer of one source without them.
    """

    kl_mean: float
    kl_max: float
    kl_heldout: float
    agreement: float
    agreement_heldout: float
    kl_by_task: dict[str, float] = field(default_factory=dict)
