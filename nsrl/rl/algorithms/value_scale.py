"""Values in units of their own spread while they are learnt, whatever the rewards are measured in."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import numpy as np
import torch
from stable_baselines3.common.on_policy_algorithm import OnPolicyAlgorithm
from torch import Tensor, nn


@contextmanager
def standardised_values(model: OnPolicyAlgorithm) -> Iterator[float]:
    """For an update: returns, values and the value head are standardised; behind it they are as they were, but learnt.

    An update that fails leaves the head as it was before.

    What the critic says is preserved on both ways (van Hasselt et al. 2016, "Learning values across many orders of
    magnitude": Pop-Art), so rewards and the values that bootstrap them stay in the task's own units. A fresh critic of
    a task whose returns are in the hundreds spends most of a run on getting there otherwise, and one whose returns are
    in the thousandths is never told that it errs; under one clipping of gradients it drowns out the actor, too.

    Args:
        model: behind a roll-out. One without a linear `value_net` is left as it is.

    Yields:
        The unit: the root of the returns' variance and the critic's mean squared error together; 1 where nothing is
        changed.
    """
    buffer, head = model.rollout_buffer, getattr(model.policy, "value_net", None)
    returns, values = buffer.returns, buffer.values
    centre = float(returns.mean(dtype=np.float64))
    error = np.square(returns.astype(np.float64) - values).mean()
    scale = float(np.sqrt(returns.var(dtype=np.float64) + error))
    if type(head) is not nn.Linear or head.bias is None or not 0.0 < scale < np.inf:
        yield 1.0
        return
    buffer.returns, buffer.values = _standardised(returns, centre, scale), _standardised(values, centre, scale)
    before = _read(head)
    _rescale(head, 1.0 / scale, -centre / scale)
    inside = _read(head)
    try:
        yield scale
    except BaseException:
        _write(head, before)
        raise
    else:
        if all(torch.equal(one, other) for one, other in zip(_read(head), inside, strict=True)):
            _write(head, before)  # nothing was learnt: the way there and back would round
        else:
            _rescale(head, scale, centre)
    finally:
        # SB3's buffer flattens its arrays in place when it is first asked for minibatches
        flat = buffer.returns.shape != returns.shape
        buffer.returns, buffer.values = (buffer.swap_and_flatten(x) if flat else x for x in (returns, values))


def _standardised(values: np.ndarray, centre: float, scale: float) -> Any:
    return ((values.astype(np.float64) - centre) / scale).astype(values.dtype)


def _read(head: nn.Linear) -> tuple[Tensor, Tensor]:
    return head.weight.detach().clone(), head.bias.detach().clone()


@torch.no_grad()
def _write(head: nn.Linear, values: tuple[Tensor, Tensor]) -> None:
    head.weight.copy_(values[0])
    head.bias.copy_(values[1])


@torch.no_grad()
def _rescale(head: nn.Linear, times: float, plus: float) -> None:
    """Make the head say `times` what it said, `plus` this."""
    head.weight.copy_(head.weight.double() * times)
    head.bias.copy_(head.bias.double() * times + plus)
