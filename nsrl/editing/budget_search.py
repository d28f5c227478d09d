"""The weakest preservation at which edits keep a KL budget, by bisection on the measured KL."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

from nsrl.editing.layer_memory import LayerMemory
from nsrl.editing.text_budget import TextKL
from nsrl.errors import NsrlError

#: A penalty is good where the measured KL lies between this share of the budget and the budget.
SPENT = 0.9
#: Factor between penalties while the budget is being bracketed, tries in all, and the strongest penalty in units of the
#: weakest: there next to nothing of any edit is left.
FACTOR, TRIES, STRONGEST = 4.0, 14, 1e12


def smallest_penalty(
    memories: Sequence[LayerMemory],
    text: TextKL,
    model: Any,
    budget: float,
    last: float | None,
) -> tuple[float, float]:
    """Leave the layers at the smallest penalty that was found to keep the budget; that penalty, and the measured KL.

    A KL falls with the penalty but for noise; whatever it does, what is left behind has been measured and kept it.

    Args:
        memories: of the edited layers.
        text: on which the KL is measured.
        model: the language model.
        budget: nats per token.
        last: penalty of the batch before; None for the weakest.

    Raises:
        NsrlError: the budget is not kept even where next to nothing is edited.
    """
    weakest = max(memory.weakest() for memory in memories)
    tried: dict[float, float] = {}

    def kl(penalty: float) -> float:
        if penalty not in tried:
            for memory in memories:
                memory.solve(penalty)
            tried[penalty] = text.measure(model)
        return tried[penalty]

    penalty = weakest if last is None else max(last, weakest)
    low, high = 0.0, math.inf  # breaks the budget, keeps it
    for _ in range(TRIES):
        found = kl(penalty)
        if found <= budget:
            high = min(high, penalty)
            if found >= SPENT * budget or penalty <= weakest:
                break
        else:
            low = max(low, penalty)
        if penalty > STRONGEST * weakest:
            break
        if math.isinf(high):
            penalty *= FACTOR
        elif low == 0.0:
            penalty = max(penalty / FACTOR, weakest)
        else:
            penalty = math.sqrt(low * high)
    kept = [candidate for candidate, found in tried.items() if found <= budget]
    if not kept:
        raise NsrlError(
            f"the preserved text's KL stays above the budget of {budget:g} nats even with next to nothing edited "
            f"({min(tried.values()):.3g}); the budget is below what rounding the weights costs: raise it"
        )
    best = min(kept)
    for memory in memories:
        memory.solve(best)
    return best, tried[best]
