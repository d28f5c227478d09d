"""A Gaussian policy that explores with another standard deviation than the one that is retained and exported."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import numpy as np
import torch
from gymnasium import spaces
from stable_baselines3.common.policies import ActorCriticPolicy
from torch import Tensor, nn

#: Standard deviation, as a share of half the width of the action space, below which a policy tries too little.
WIDE = 0.3


def wide_log_std(space: spaces.Box) -> np.ndarray:
    """Log standard deviations that are felt everywhere in an action space, shape (A,), float32.

    Unbounded entries count as those of SB3's initial policy, which has a standard deviation of 1.
    """
    half = 0.5 * (space.high.astype(np.float64) - space.low.astype(np.float64)).flatten()
    return np.log(np.where(np.isfinite(half) & (half > 0.0), WIDE * half, 1.0)).astype(np.float32)


class ExplorationSpread:
    """The log standard deviation that new-task actions are drawn with, and that the new task teaches.

    The policy's own `log_std` stays what it is wherever anybody looks: roll-outs exchange the two for the time of a
    forward pass, updates for their own. So the distribution that is measured, saved and exported is the retained one.

    Args:
        policy: with a state-independent `log_std`.
        log_std: to begin with, shape (A,).
    """

    def __init__(self, policy: ActorCriticPolicy, log_std: Tensor):
        self._policy: Any = policy
        self.log_std = log_std.detach().clone()
        self._retained: Tensor | None = None

    @classmethod
    def wide(cls, policy: ActorCriticPolicy) -> ExplorationSpread:
        """A spread that is the policy's own, or wide where the policy's is narrower."""
        spread: Any = policy.log_std
        wide = torch.as_tensor(wide_log_std(policy.action_space)).to(spread)  # type: ignore[arg-type]
        return cls(policy, torch.maximum(spread.detach(), wide))

    @contextmanager
    def in_force(self) -> Iterator[None]:
        """For an update: the policy's `log_std` is this one, and what the optimizer makes of it stays here."""
        self._exchange()
        try:
            yield
        finally:
            self._give_back()

    @contextmanager
    def sampling(self) -> Iterator[None]:
        """For a roll-out: whenever the policy is called to act; callbacks meanwhile see the retained one."""
        enter = self._policy.register_forward_pre_hook(lambda *_: self._exchange())
        leave = self._policy.register_forward_hook(lambda *_: self._give_back(), always_call=True)
        try:
            yield
        finally:
            enter.remove()
            leave.remove()

    def _exchange(self) -> None:
        parameter: nn.Parameter = self._policy.log_std
        self._retained, parameter.data = parameter.data, self.log_std

    def _give_back(self) -> None:
        if self._retained is not None:
            self._policy.log_std.data, self._retained = self._retained, None
