"""The weakest preservation at which edits keep a KL budget, by bisection on the measured KL."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

from nsrl.editing.text_budget import TextKL
from nsrl.errors import NsrlError

#: A penalty is good where the measured KL lies between this share of the budget and the budget.
SPENT = 0.9
#: First factor between penalties while the budget is being bracketed, squared from step to step; tries in all, and the
#: strongest penalty in units of the weakest: there next to nothing of any edit is left.
FACTOR, TRIES, STRONGEST = 2.0, 14, 1e12


def smallest_penalty(
    solve: Callable[[float], None],
    weakest: float,
    text: TextKL,
    model: Any,
    budget: float,
    last: float | None,
    spent: float = SPENT,
) -> tuple[float, float]:
    """Leave the layers at the smallest penalty that was found to keep the budget; that penalty, and the measured KL.

    A KL falls with the penalty but for noise; whatever it does, what is left behind has been measured and kept it.

    Args:
        solve: writes all edits into the layers at some penalty; asked twice for one, it comes to the same bits.
        weakest: penalty that may be asked for.
        text: on which the KL is measured.
        model: the language model.
        budget: nats per token.
        last: penalty of the batch before; None for the weakest.
        spent: share of the budget that a penalty above the weakest has to use.

    Raises:
        NsrlError: the budget is not kept even where next to nothing is edited.
    """
    tried: dict[float, float] = {}
    now: float | None = None

    def kl(penalty: float) -> float:
        nonlocal now
        if penalty not in tried:
            solve(penalty)
            now = penalty
            tried[penalty] = text.measure(model)
        return tried[penalty]

    penalty = weakest if last is None else max(last, weakest)
    low, high, factor = 0.0, math.inf, FACTOR  # breaks the budget, keeps it
    for _ in range(TRIES):
        found = kl(penalty)
        if found <= budget:
            high = min(high, penalty)
            if found >= spent * budget or penalty <= weakest:
                break
        else:
            low = max(low, penalty)
        if penalty > STRONGEST * weakest:
            break
        if math.isinf(high) or low == 0.0:
            penalty = max(penalty * factor if math.isinf(high) else penalty / factor, weakest)
            factor *= factor
        else:
            penalty = math.sqrt(low * high)
    kept = [candidate for candidate, found in tried.items() if found <= budget]
    if not kept:
        raise NsrlError(
            f"the preserved text's KL stays above the budget of {budget:g} nats even with next to nothing edited "
            f"({min(tried.values()):.3g}); the budget is below what rounding the weights costs: raise it"
        )
    best = min(kept)
    if now != best:
        solve(best)
    return best, tried[best]
