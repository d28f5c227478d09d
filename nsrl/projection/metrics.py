"""Output metrics: the KL divergence of a policy head, its gradient and a factor of its Hessian.

For outputs z (N states x O outputs) and the reference outputs z_ref, every metric offers

* `divergence(reference, outputs)`: KL(pi_ref || pi) per state, shape (N,), evaluated in float64;
* `slope(reference, outputs)`: dKL/dz, shape (N, O);
* `seeds(outputs)`: S of shape (N, R, O) with S^T S = H, the Hessian of the KL in the outputs *at the current outputs*
  (the Fisher information), so that S dz/dtheta is the whitened Jacobian;
* `residual(reference, outputs)`: rho of shape (N, R) with S^T rho = dKL/dz, so that 1/2 |rho + S dz|^2 has the slope
  and the curvature of the KL;
* `agreement(reference, outputs)`: share of states on which the two policies act alike.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Protocol

import torch
import torch.nn.functional as F
from torch import Tensor

#: Probabilities below this count as this much in a denominator: a float32 softmax underflows to zero.
SMALLEST = 1e-30


class OutputMetric(Protocol):
    """What the projection core asks of a policy head."""

    def divergence(self, reference: Tensor, outputs: Tensor) -> Tensor: ...

    def slope(self, reference: Tensor, outputs: Tensor) -> Tensor: ...

    def seeds(self, outputs: Tensor) -> Tensor: ...

    def residual(self, reference: Tensor, outputs: Tensor) -> Tensor: ...

    def agreement(self, reference: Tensor, outputs: Tensor) -> float: ...


@dataclass(frozen=True)
class Categorical:
    """Independent softmax heads over consecutive logits.

    Attributes:
        sizes: number of logits of each head (one entry for Discrete actions, several for MultiDiscrete).
        tempering: weight of the uniform distribution mixed into the probabilities *of the Hessian only*. A saturated
            softmax has almost no Fisher information, so its "null space" holds steps that flip the action.
    """

    sizes: tuple[int, ...]
    tempering: float = 0.01

    def divergence(self, reference: Tensor, outputs: Tensor) -> Tensor:
        """KL(softmax(reference) || softmax(outputs)), summed over heads, shape (N,)."""
        parts = []
        for ref, out in self._heads(reference, outputs):
            log_p, log_q = F.log_softmax(ref, -1, dtype=torch.float64), F.log_softmax(out, -1, dtype=torch.float64)
            parts.append((log_p.exp() * (log_p - log_q)).sum(-1))
        return parts[0] if len(parts) == 1 else torch.stack(parts).sum(0)

    def slope(self, reference: Tensor, outputs: Tensor) -> Tensor:
        """P - p_ref per head, shape (N, O)."""
        parts = [F.softmax(out, -1) - F.softmax(ref, -1) for ref, out in self._heads(reference, outputs)]
        return parts[0] if len(parts) == 1 else torch.cat(parts, -1)

    def seeds(self, outputs: Tensor) -> Tensor:
        """A factor of diag(p) - p p^T per head with one row less than logits, shape (N, O - heads, O).

        The Hessian does not see a common shift of the logits. With q = sqrt(p) it is diag(q) (I - q q^T) diag(q), and
        a Householder reflection that carries q onto the first axis leaves O - 1 rows of the middle factor.
        """
        blocks = []
        for (out,) in self._heads(outputs):
            q = self._tempered(out).sqrt()
            first, others = q[:, :1], q[:, 1:]
            left = -others * first
            right = torch.diag_embed(others) - others.unsqueeze(2) * (others.square() / (1.0 + first)).unsqueeze(1)
            blocks.append(torch.cat([left.unsqueeze(2), right], 2))
        return _block_diagonal(blocks)

    def residual(self, reference: Tensor, outputs: Tensor) -> Tensor:
        """The same reflection of (p - p_ref) / q, which is orthogonal to q, shape (N, O - heads)."""
        parts = []
        for ref, out in self._heads(reference, outputs):
            q = self._tempered(out).clamp_min(SMALLEST).sqrt()
            pull = (F.softmax(out, -1) - F.softmax(ref, -1)) / q
            parts.append(pull[:, 1:] - q[:, 1:] * (pull[:, :1] / (1.0 + q[:, :1])))
        return torch.cat(parts, -1)

    def agreement(self, reference: Tensor, outputs: Tensor) -> float:
        """Share of states on which every head has the same most likely action."""
        same = outputs.new_ones(outputs.shape[0], dtype=torch.bool)
        for ref, out in self._heads(reference, outputs):
            same &= ref.argmax(-1) == out.argmax(-1)
        return float(same.double().mean())

    def _tempered(self, logits: Tensor) -> Tensor:
        p = F.softmax(logits, -1)
        return (1.0 - self.tempering) * p + self.tempering / p.shape[-1]

    def _heads(self, *tensors: Tensor) -> list[tuple[Tensor, ...]]:
        if len(self.sizes) == 1:
            return [tensors]
        return list(zip(*(t.split(list(self.sizes), dim=-1) for t in tensors), strict=True))


def _block_diagonal(blocks: list[Tensor]) -> Tensor:
    """Matrices (N, r_i, c_i) as one block diagonal (N, sum r, sum c)."""
    if len(blocks) == 1:
        return blocks[0]
    rows, columns = (sum(block.shape[axis] for block in blocks) for axis in (1, 2))
    whole = blocks[0].new_zeros(blocks[0].shape[0], rows, columns)
    row = column = 0
    for block in blocks:
        whole[:, row : row + block.shape[1], column : column + block.shape[2]] = block
        row, column = row + block.shape[1], column + block.shape[2]
    return whole


@dataclass(frozen=True)
class Bernoulli:
    """Independent coins with the given logits (MultiBinary actions); `tempering` as for `Categorical`."""

    tempering: float = 0.01

    def divergence(self, reference: Tensor, outputs: Tensor) -> Tensor:
        """Sum over coins of KL(sigmoid(reference) || sigmoid(outputs)), shape (N,)."""
        ref, out = reference.double(), outputs.double()
        p = torch.sigmoid(ref)
        heads = F.logsigmoid(ref) - F.logsigmoid(out)
        tails = F.logsigmoid(-ref) - F.logsigmoid(-out)
        return (p * heads + (1.0 - p) * tails).sum(-1)

    def slope(self, reference: Tensor, outputs: Tensor) -> Tensor:
        """P - p_ref, shape (N, O)."""
        return torch.sigmoid(outputs) - torch.sigmoid(reference)

    def seeds(self, outputs: Tensor) -> Tensor:
        """diag(sqrt(p (1 - p))), shape (N, O, O)."""
        return torch.diag_embed(self._variance(outputs).sqrt())

    def residual(self, reference: Tensor, outputs: Tensor) -> Tensor:
        """(p - p_ref) / sqrt(p (1 - p)), shape (N, O)."""
        return (torch.sigmoid(outputs) - torch.sigmoid(reference)) / self._variance(outputs).clamp_min(SMALLEST).sqrt()

    def agreement(self, reference: Tensor, outputs: Tensor) -> float:
        """Share of states on which every coin falls on the same likelier side."""
        return float(((reference > 0) == (outputs > 0)).all(-1).double().mean())

    def _variance(self, logits: Tensor) -> Tensor:
        p = (1.0 - self.tempering) * torch.sigmoid(logits) + self.tempering / 2
        return p * (1.0 - p)


@dataclass(frozen=True)
class Gaussian:
    """Means of a diagonal Gaussian whose standard deviations do not depend on the state.

    The state-independent log standard deviation is not an output: it adds to `divergence`, the same for all states,
    and one row per dimension to the Jacobian (see `nsrl.rl.retention.constraint`).

    Attributes:
        log_std: current log standard deviations, shape (A,).
        reference_log_std: those of the reference policy, shape (A,).
    """

    log_std: Tensor
    reference_log_std: Tensor

    def divergence(self, reference: Tensor, outputs: Tensor) -> Tensor:
        """KL(N(reference, s_ref) || N(outputs, s)), summed over dimensions, shape (N,)."""
        log_std, ref = self.log_std.double(), self.reference_log_std.double()
        shift = (reference.double() - outputs.double()) * torch.exp(-log_std)
        constant = (log_std - ref + 0.5 * torch.exp(2 * (ref - log_std)) - 0.5).sum()
        return 0.5 * shift.square().sum(-1) + constant

    def slope(self, reference: Tensor, outputs: Tensor) -> Tensor:
        """(mean - mean_ref) / s^2, shape (N, A)."""
        return (outputs - reference) * torch.exp(-2 * self.log_std.detach())

    def seeds(self, outputs: Tensor) -> Tensor:
        """diag(1 / s), shape (N, A, A) (an expanded view)."""
        whitening = torch.diag(torch.exp(-self.log_std.detach())).to(outputs)
        return whitening.expand(outputs.shape[0], -1, -1)

    def residual(self, reference: Tensor, outputs: Tensor) -> Tensor:
        """(mean - mean_ref) / s, shape (N, A)."""
        return (outputs - reference) * torch.exp(-self.log_std.detach())

    def agreement(self, reference: Tensor, outputs: Tensor) -> float:
        """Share of states on which every mean lies within half a reference standard deviation of the old one."""
        shift = (outputs - reference).abs() * torch.exp(-self.reference_log_std)
        return float((shift <= 0.5).all(-1).double().mean())

    def log_std_residual(self, reference: Tensor, outputs: Tensor) -> Tensor:
        """D mean-KL / d log_std divided by sqrt(2), shape (A,): the log_std rows of rho."""
        log_std, ref = self.log_std.detach().double(), self.reference_log_std.double()
        spread = torch.exp(2 * ref) + (reference.double() - outputs.double()).square().mean(0)
        return ((1.0 - spread * torch.exp(-2 * log_std)) / math.sqrt(2.0)).to(outputs.dtype)
