"""What is promised of a policy on a buffer besides its mean KL: its worst states, and its actions."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

#: Weight, in a restoration for the sake of some states, of the others: they are to stay where they are.
OTHERS = 0.1


@dataclass(frozen=True)
class Promises:
    """Limits on a policy's behaviour on a buffer, each of them kept as the mean KL's budget is.

    They are brought to the mean's unit: what is measured, over its limit, times the budget. The largest of these is at
    most the budget if and only if every promise is kept.

    Attributes:
        kl_budget: largest mean KL, nats a state.
        worst_budget: largest mean KL over the worst states, nats a state; None promises nothing of them.
        worst_share: share of the states, by weight, that are the worst (the q of a conditional value at risk).
        agreement: smallest share of states on which both policies act alike; None promises none.
    """

    kl_budget: float
    worst_budget: float | None = None
    worst_share: float = 0.05
    agreement: float | None = None

    @property
    def any(self) -> bool:
        """Whether anything is promised besides the mean."""
        return self.worst_budget is not None or self.agreement is not None

    def worst(self, worst_mean: float) -> float:
        """Mean KL over the worst states in the mean's unit; 0 where nothing is promised of them."""
        return 0.0 if self.worst_budget is None else worst_mean / self.worst_budget * self.kl_budget

    def unlike(self, agreement: float) -> float:
        """Share of states on which the policies act otherwise, in the mean's unit; 0 where nothing is promised."""
        if self.agreement is None:
            return 0.0
        allowed = max(1.0 - self.agreement, 1e-9)
        return (1.0 - agreement) / allowed * self.kl_budget


def worst_mean(values: Tensor, weights: Tensor | None, share: float) -> float:
    """Mean of the largest values, as many as make up a share of the weight; the last one counts in part.

    The conditional value at risk of Rockafellar & Uryasev (2000), which is convex where the values are.

    Args:
        values: shape (N,).
        weights: shape (N,), in any unit; None for ones.
        share: in (0, 1].
    """
    ordered, order = values.double().sort(descending=True)
    counted = torch.ones_like(ordered) if weights is None else weights.double()[order]
    room = share * counted.sum()
    before = counted.cumsum(0) - counted
    taken = torch.minimum(counted, (room - before).clamp_min(0.0))
    return float((taken * ordered).sum() / room)
