"""How open a policy's action distribution is at a state, and what its outputs would be if it were opener."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Protocol

import torch
import torch.nn.functional as F
from torch import Tensor

from nsrl.projection.roots import DiagonalRoot, Root, SoftmaxRoot
from nsrl.rl.policies.distributions import with_masks

#: Where a mean that was outside of the action space is brought to, between its centre and the bound.
HALF_WAY = 0.5
#: Bisections of a temperature: to nine digits.
HALVINGS = 30


class Targets(Protocol):
    """What the opening asks of a family of action distributions; N states, O outputs, R rows of a root."""

    def share(self, outputs: Tensor, valid: Tensor | None) -> Tensor:
        """How open each state is, from 0 (one action is certain) to 1 (as open as can be), shape (N,)."""
        ...

    def excess(self, outputs: Tensor, share: float, valid: Tensor | None) -> Tensor:
        """What the outputs, (N, O), have to lose so that the mean of `share` over the states is this."""
        ...

    def root(self, outputs: Tensor, valid: Tensor | None) -> Root:
        """The linear maps of a state's outputs in which the excess counts, (N, R, O)."""
        ...


@dataclass(frozen=True)
class SoftmaxTargets:
    """Logits over a temperature, one for all states: the order of the actions stays what it is.

    Attributes:
        sizes: choices of each head.
    """

    sizes: tuple[int, ...]

    def share(self, outputs: Tensor, valid: Tensor | None) -> Tensor:
        """Entropy over its maximum (of the valid actions), the mean over the heads that have a choice, shape (N,)."""
        logits = outputs.double() if valid is None else with_masks(outputs.double(), valid)
        found, counted = torch.zeros(len(logits), dtype=torch.float64), torch.zeros(len(logits), dtype=torch.float64)
        found, counted = found.to(logits.device), counted.to(logits.device)
        known = torch.ones_like(outputs, dtype=torch.bool) if valid is None else valid
        for head, choices in zip(logits.split(list(self.sizes), 1), known.split(list(self.sizes), 1), strict=True):
            log_p = F.log_softmax(head, 1)
            top = choices.sum(1).double().log()
            several = top > 0.0
            entropy = -(log_p.exp() * log_p).sum(1)
            found += torch.where(several, entropy / top.clamp_min(1e-12), torch.zeros_like(entropy))
            counted += several
        return torch.where(counted > 0, found / counted.clamp_min(1.0), torch.ones_like(found)).clamp(0.0, 1.0)

    def excess(self, outputs: Tensor, share: float, valid: Tensor | None) -> Tensor:
        """Centred logits times 1 - 1 / temperature, shape (N, O)."""
        centred = outputs - self._head_means(outputs, valid)
        if valid is not None:
            centred = centred * valid
        low, high = 0.0, 1.0
        for _ in range(HALVINGS):
            middle = 0.5 * (low + high)
            if float(self.share(centred * middle, valid).mean()) > share:
                low = middle
            else:
                high = middle
        return centred * (1.0 - low)

    def root(self, outputs: Tensor, valid: Tensor | None) -> Root:
        """That of the KL's Hessian at the uniform distribution over the valid actions of each head.

        A common shift of a head's logits is no change to it. The policy's own distribution would not do: where it is
        certain, its Hessian sees nothing.
        """
        known = torch.ones_like(outputs) if valid is None else valid.to(outputs)
        heads = [head / head.sum(1, keepdim=True).clamp_min(1.0) for head in known.split(list(self.sizes), 1)]
        return SoftmaxRoot(torch.cat(heads, 1).sqrt(), self.sizes, torch.ones_like(outputs[:, :1]), valid)

    def _head_means(self, outputs: Tensor, valid: Tensor | None) -> Tensor:
        """Mean logit of each state's valid actions, of each head, shape (N, O)."""
        known = torch.ones_like(outputs) if valid is None else valid.to(outputs)
        means = []
        for head, counts in zip(outputs.split(list(self.sizes), 1), known.split(list(self.sizes), 1), strict=True):
            total = torch.where(counts > 0, head, torch.zeros_like(head)).sum(1, keepdim=True)
            means.append((total / counts.sum(1, keepdim=True).clamp_min(1.0)).expand_as(head))
        return torch.cat(means, 1)


@dataclass(frozen=True)
class CoinTargets:
    """The same for independent coins: logits over a temperature."""

    def share(self, outputs: Tensor, valid: Tensor | None) -> Tensor:
        """Entropy in bits, the mean over the coins, shape (N,)."""
        log_p, log_q = F.logsigmoid(outputs.double()), F.logsigmoid(-outputs.double())
        return -(log_p.exp() * log_p + log_q.exp() * log_q).mean(1) / math.log(2.0)

    def excess(self, outputs: Tensor, share: float, valid: Tensor | None) -> Tensor:
        """Logits times 1 - 1 / temperature, shape (N, O)."""
        low, high = 0.0, 1.0
        for _ in range(HALVINGS):
            middle = 0.5 * (low + high)
            if float(self.share(outputs * middle, valid).mean()) > share:
                low = middle
            else:
                high = middle
        return outputs * (1.0 - low)

    def root(self, outputs: Tensor, valid: Tensor | None) -> Root:
        """That of the KL's Hessian at even odds: half of the identity."""
        return DiagonalRoot(torch.full_like(outputs, 0.5))


@dataclass(frozen=True)
class SpreadTargets:
    """Standard deviations that depend on the state (gSDE): wide enough to be felt in the action space.

    Attributes:
        wide: log of the standard deviation that counts as open, shape (A,); the outputs are means, then logs.
    """

    wide: Tensor

    def share(self, outputs: Tensor, valid: Tensor | None) -> Tensor:
        """Standard deviation over the wide one, at most 1, the mean over the entries of the action, shape (N,)."""
        return torch.exp(-self._missing(outputs)).mean(1).double()

    def excess(self, outputs: Tensor, share: float, valid: Tensor | None) -> Tensor:
        """What the logs are short of the wide ones, all of it, as outputs have it, shape (N, 2 A)."""
        missing = self._missing(outputs)
        return torch.cat([torch.zeros_like(missing), -missing], 1)

    def root(self, outputs: Tensor, valid: Tensor | None) -> Root:
        """The logs, as the KL's Hessian has them; the means are free."""
        size = len(self.wide)
        counted = torch.zeros_like(outputs)
        counted[:, size:] = math.sqrt(2.0)
        return DiagonalRoot(counted)

    def _missing(self, outputs: Tensor) -> Tensor:
        logs = outputs[:, len(self.wide) :]
        return (self.wide.to(outputs) - logs).clamp_min(0.0)


@dataclass(frozen=True)
class MeanTargets:
    """Means of a Gaussian inside the action space: beyond it, all actions that are tried are the bound.

    Attributes:
        centre, half: of the action space, (A,); entries without bounds have an infinite half.
    """

    centre: Tensor
    half: Tensor

    def share(self, outputs: Tensor, valid: Tensor | None) -> Tensor:
        """Share of the entries whose mean is inside, shape (N,)."""
        return ((outputs - self.centre.to(outputs)).abs() <= self.half.to(outputs)).double().mean(1)

    def excess(self, outputs: Tensor, share: float, valid: Tensor | None) -> Tensor:
        """What means outside have to lose to be half-way between the centre and the bound, shape (N, A)."""
        away, half = outputs - self.centre.to(outputs), self.half.to(outputs)
        aim = torch.where(away.abs() > half, away.sign() * HALF_WAY * half, away)
        return away - torch.where(half.isfinite(), aim, away)

    def root(self, outputs: Tensor, valid: Tensor | None) -> Root:
        """Means in units of the action space; entries without bounds are free."""
        return DiagonalRoot((1.0 / self.half).to(outputs).expand_as(outputs))
