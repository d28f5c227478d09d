"""Log-probabilities of actions and entropies with their derivatives in a policy's outputs, in closed form.

What SB3's distribution objects and autograd make of the same outputs, to rounding, at a tenth of the bookkeeping.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Protocol

import torch
import torch.nn.functional as F
from torch import Tensor

#: 1/2 log(2 pi), of the Gaussian density.
HALF_LOG_TWO_PI = 0.5 * math.log(2.0 * math.pi)


class Likelihood(Protocol):
    """Actions under the distributions that some outputs are the parameters of.

    Attributes:
        log_prob: of each action, shape (N,).
    """

    log_prob: Tensor

    def mean_entropy(self) -> Tensor:
        """Mean entropy of the distributions, shape ()."""
        ...

    def slope(self, weights: Tensor, bonus: float) -> Tensor:
        """Gradient of sum(weights * log_prob) + bonus * sum(entropy) in the outputs, shape (N, O).

        Args:
            weights: shape (N,).
            bonus: of the entropies.
        """
        ...

    def spread_slope(self, weights: Tensor, bonus: float) -> Tensor | None:
        """Gradient of the same in the log standard deviation, shape (A,); None where there is none."""
        ...


class CategoricalLikelihood:
    """Independent softmax heads over consecutive logits.

    Args:
        logits: shape (N, O).
        actions: choices, (N, heads) int64.
        sizes: logits of each head.
    """

    def __init__(self, logits: Tensor, actions: Tensor, sizes: Sequence[int]):
        self._actions, self._sizes = actions, list(sizes)
        heads = logits.split(self._sizes, 1) if len(sizes) > 1 else (logits,)
        self._log_p = [F.log_softmax(head, 1) for head in heads]
        self._p = [log_p.exp() for log_p in self._log_p]
        chosen = [log_p.gather(1, column) for log_p, column in zip(self._log_p, self._columns(), strict=True)]
        self.log_prob = chosen[0].squeeze(1) if len(chosen) == 1 else torch.cat(chosen, 1).sum(1)

    def mean_entropy(self) -> Tensor:
        """See `Likelihood`, shape ()."""
        parts = [torch.dot(p.flatten(), log_p.flatten()) for p, log_p in zip(self._p, self._log_p, strict=True)]
        return sum(parts[1:], parts[0]) / -len(self.log_prob)

    def slope(self, weights: Tensor, bonus: float) -> Tensor:
        """See `Likelihood`, (N, O): w (e - p) - bonus p (log p + H)."""
        column = weights.unsqueeze(1)
        slopes = []
        for p, log_p, actions in zip(self._p, self._log_p, self._columns(), strict=True):
            pull = -column
            if bonus != 0.0:
                entropy = (p * log_p).sum(1, keepdim=True)
                pull = (log_p - entropy).mul_(-bonus).sub_(column)
            slopes.append((p * pull).scatter_add_(1, actions, column))
        return slopes[0] if len(slopes) == 1 else torch.cat(slopes, 1)

    def spread_slope(self, weights: Tensor, bonus: float) -> None:
        """None; see `Likelihood`."""

    def _columns(self) -> Sequence[Tensor]:
        return (self._actions,) if len(self._sizes) == 1 else self._actions.split(1, 1)


class BernoulliLikelihood:
    """Independent bits.

    Args:
        logits: shape (N, O).
        actions: zeros and ones, (N, O).
    """

    def __init__(self, logits: Tensor, actions: Tensor):
        self._logits, self._actions = logits, actions
        self._softplus = F.softplus(logits)
        self.log_prob = (actions * logits - self._softplus).sum(1)

    def mean_entropy(self) -> Tensor:
        """See `Likelihood`, shape ()."""
        return (self._softplus - self._logits * self._logits.sigmoid()).sum() / len(self._logits)

    def slope(self, weights: Tensor, bonus: float) -> Tensor:
        """See `Likelihood`, (N, O): w (a - p) - bonus z p (1 - p)."""
        p = self._logits.sigmoid()
        slope = (self._actions - p).mul_(weights.unsqueeze(1))
        return slope if bonus == 0.0 else slope.sub_((bonus * self._logits) * p * (1.0 - p))

    def spread_slope(self, weights: Tensor, bonus: float) -> None:
        """None; see `Likelihood`."""


class GaussianLikelihood:
    """Diagonal Gaussians of one standard deviation for all states.

    Args:
        means: shape (N, A).
        actions: shape (N, A).
        log_std: log standard deviations, shape (A,).
    """

    def __init__(self, means: Tensor, actions: Tensor, log_std: Tensor):
        self._log_std = log_std
        self._precision = torch.exp(-2.0 * log_std)
        self._shift = actions - means
        self._squares = self._shift.square() * self._precision
        constant = log_std.sum() + len(log_std) * HALF_LOG_TWO_PI
        self.log_prob = self._squares.sum(1).mul_(-0.5).sub_(constant)

    def mean_entropy(self) -> Tensor:
        """See `Likelihood`, shape (); all of them are the same."""
        return self._log_std.sum() + len(self._log_std) * (0.5 + HALF_LOG_TWO_PI)

    def slope(self, weights: Tensor, bonus: float) -> Tensor:
        """See `Likelihood`, (N, A): w (a - m) / s^2."""
        return (self._shift * self._precision).mul_(weights.unsqueeze(1))

    def spread_slope(self, weights: Tensor, bonus: float) -> Tensor:
        """See `Likelihood`, (A,): w ((a - m)^2 / s^2 - 1) + bonus, summed over the states."""
        return weights @ (self._squares - 1.0) + bonus * len(weights)
