"""How open a policy's action distribution is at a state, and what its outputs would be if it were opener."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Protocol

import torch
import torch.nn.functional as F
from torch import Tensor

from nsrl.rl.policies.distributions import with_masks

#: Bisections of a temperature: to nine digits.
HALVINGS = 30


class Targets(Protocol):
    """What the opening asks of a family of action distributions; N states, O outputs, R rows of a regression."""

    def share(self, outputs: Tensor, valid: Tensor | None) -> Tensor:
        """How open each state is, from 0 (one action is certain) to 1 (as open as can be), shape (N,)."""
        ...

    def excess(self, outputs: Tensor, share: float, valid: Tensor | None) -> Tensor:
        """What the outputs, (N, O), have to lose so that the mean of `share` over the states is this."""
        ...

    def rows(self, outputs: Tensor, valid: Tensor | None) -> Tensor:
        """The linear maps of a state's outputs in which the excess counts, shape (N, R, O)."""
        ...


@dataclass(frozen=True)
class SoftmaxTargets:
    """Logits over a temperature, one for all states: the order of the actions stays what it is.

    Attributes:
        sizes: choices of each head.
    """

    sizes: tuple[int, ...]

    def share(self, outputs: Tensor, valid: Tensor | None) -> Tensor:
        """Entropy over its maximum (that of the valid actions), the mean over the heads that have a choice."""
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
        """Centred logits times 1 - 1 / temperature."""
        centred = torch.einsum("nro,no->nr", self.rows(outputs, valid), outputs)
        low, high = 0.0, 1.0
        for _ in range(HALVINGS):
            middle = 0.5 * (low + high)
            if float(self.share(centred * middle, valid).mean()) > share:
                low = middle
            else:
                high = middle
        return centred * (1.0 - low)

    def rows(self, outputs: Tensor, valid: Tensor | None) -> Tensor:
        """A common shift of a head's logits is no change: centring over the valid actions of each head."""
        total = sum(self.sizes)
        same = torch.block_diag(*(torch.ones(size, size) for size in self.sizes)).to(outputs)
        if valid is None:
            counts = same.sum(1, keepdim=True)
            return (torch.eye(total).to(outputs) - same / counts).expand(len(outputs), total, total)
        both = same * (valid.unsqueeze(1) & valid.unsqueeze(2))
        counts = both.sum(2, keepdim=True).clamp_min(1.0)
        return torch.diag_embed(valid.to(outputs)) - both / counts


@dataclass(frozen=True)
class CoinTargets:
    """The same for independent coins: logits over a temperature."""

    def share(self, outputs: Tensor, valid: Tensor | None) -> Tensor:
        """Entropy in bits, the mean over the coins."""
        log_p, log_q = F.logsigmoid(outputs.double()), F.logsigmoid(-outputs.double())
        return -(log_p.exp() * log_p + log_q.exp() * log_q).mean(1) / math.log(2.0)

    def excess(self, outputs: Tensor, share: float, valid: Tensor | None) -> Tensor:
        """Logits times 1 - 1 / temperature."""
        low, high = 0.0, 1.0
        for _ in range(HALVINGS):
            middle = 0.5 * (low + high)
            if float(self.share(outputs * middle, valid).mean()) > share:
                low = middle
            else:
                high = middle
        return outputs * (1.0 - low)

    def rows(self, outputs: Tensor, valid: Tensor | None) -> Tensor:
        """The identity."""
        size = outputs.shape[1]
        return torch.eye(size).to(outputs).expand(len(outputs), size, size)


@dataclass(frozen=True)
class SpreadTargets:
    """Standard deviations that depend on the state (gSDE): wide enough to be felt in the action space.

    Attributes:
        wide: log of the standard deviation that counts as open, shape (A,); the outputs are means, then logs.
    """

    wide: Tensor

    def share(self, outputs: Tensor, valid: Tensor | None) -> Tensor:
        """Standard deviation over the wide one, at most 1, the mean over the entries of the action."""
        return torch.exp(-self._missing(outputs)).mean(1).double()

    def excess(self, outputs: Tensor, share: float, valid: Tensor | None) -> Tensor:
        """What the logs are short of the wide ones, all of it: 1 is reached by no more than that."""
        missing = self._missing(outputs)
        return torch.cat([torch.zeros_like(missing), -missing], 1)

    def rows(self, outputs: Tensor, valid: Tensor | None) -> Tensor:
        """The logs; the means are free."""
        size = len(self.wide)
        logs = torch.cat([torch.zeros(size, size), torch.eye(size)], 1).to(outputs)
        return logs.expand(len(outputs), size, 2 * size)

    def _missing(self, outputs: Tensor) -> Tensor:
        logs = outputs[:, len(self.wide) :]
        return (self.wide.to(outputs) - logs).clamp_min(0.0)
