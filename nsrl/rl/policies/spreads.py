"""A Gaussian metric whose states differ in reference spread (merged buffers) or in weight."""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from torch import Tensor

from nsrl.projection.metrics import Gaussian


@dataclass(frozen=True)
class StatewiseGaussian(Gaussian):
    """`Gaussian` with one reference standard deviation a state, and weights in the mean over states.

    Attributes:
        log_std: current log standard deviations, shape (A,) or (N, A).
        reference_log_std: those of the reference policy, shape (A,) or (N, A).
        weights: weight of each state, mean 1, shape (N,); None for ones.
    """

    weights: Tensor | None = None

    def divergence(self, reference: Tensor, outputs: Tensor) -> Tensor:
        """KL(N(reference, s_ref) || N(outputs, s)), summed over dimensions, shape (N,)."""
        log_std, ref = self.log_std.double(), self.reference_log_std.double()
        shift = (reference.double() - outputs.double()) * torch.exp(-log_std)
        constant = (log_std - ref + 0.5 * torch.exp(2 * (ref - log_std)) - 0.5).sum(-1)
        return 0.5 * shift.square().sum(-1) + constant

    def seeds(self, outputs: Tensor) -> Tensor:
        """diag(1 / s) of each state, shape (N, A, A)."""
        return torch.diag_embed(torch.exp(-self.log_std.detach()).to(outputs).expand_as(outputs))

    def log_std_residual(self, reference: Tensor, outputs: Tensor) -> Tensor:
        """D weighted-mean-KL / d log_std divided by sqrt(2), shape (A,)."""
        log_std, ref = self.log_std.detach().double(), self.reference_log_std.double()
        spread = torch.exp(2 * ref) + (reference.double() - outputs.double()).square()
        if self.weights is not None:
            spread = spread * self.weights.to(spread).unsqueeze(-1)
        return ((1.0 - spread.mean(0) * torch.exp(-2 * log_std)) / math.sqrt(2.0)).to(outputs.dtype)
