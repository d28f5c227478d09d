"""Numbers: a roll-out or a critic that holds none ends the run in a sentence, before it is learnt from."""

from __future__ import annotations

from typing import Any

import numpy as np
import torch

from nsrl.errors import NsrlError

BROKEN = (
    "the last update has left {} infinite or no number, so that nothing can be learnt any more: lower the learning "
    "rate, or scale the rewards down, and begin again from the last checkpoint; the actor is inside its budget"
)


def check_numbers(model: Any) -> None:
    """Raise NsrlError unless rewards, values, returns and advantages of a roll-out are finite.

    From one that is not, the critic would become NaN for good, and with it every update of the actor, which a budget
    undoes: the run would go on to its end and learn nothing.

    Args:
        model: of SB3, behind a roll-out.
    """
    buffer: Any = model.rollout_buffer
    if np.isfinite(buffer.returns).all() and np.isfinite(buffer.advantages).all():
        return
    if not np.isfinite(buffer.rewards).all():
        what = "the new task gave a reward that is infinite or no number; mend its reward"
    elif not np.isfinite(buffer.values).all():
        what = "the critic says what is no number; lower the learning rate, or learn with a fresh critic"
    else:
        what = "the returns are too large for single precision; scale the rewards down, as by VecNormalize"
    raise NsrlError(f"nothing can be learnt from the last roll-out: {what}. The policy is as it was")


def check_weights(model: Any) -> None:
    """Raise NsrlError where an update has left weights that are no numbers; those of the actor are inside the budget.

    Args:
        model: a protected one, behind an update.
    """
    exploration = model.retention.exploration
    explored = [] if exploration is None else [("log_std of the exploration", exploration.log_std)]
    for name, values in [*model.policy.named_parameters(), *explored]:
        if not bool(torch.isfinite(values).all()):
            raise NsrlError(BROKEN.format(name))


class Diverged(ValueError):
    """An update in closed form has come upon losses that are no numbers, as torch's distributions refuse them."""


def is_no_number(error: BaseException) -> bool:
    """Whether it is a refusal, torch's or the closed form's, of distributions whose parameters are no numbers."""
    return isinstance(error, Diverged) or (isinstance(error, ValueError) and "to satisfy the constraint" in str(error))
