"""What outputs mean: the loss that fits the targets and the divergence that says how far behaviour has moved."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Protocol

import torch
import torch.nn.functional as F
from torch import Tensor

from nsrl.errors import NsrlError
from nsrl.projection.metrics import Categorical, Gaussian, OutputMetric


class Objective(Protocol):
    """A loss and the metric of the same outputs."""

    def check(self, outputs: Tensor, targets: Tensor) -> None:
        """Raise an `NsrlError` for targets that do not fit the outputs."""
        ...

    def loss(self, outputs: Tensor, targets: Tensor) -> Tensor:
        """Mean loss over the samples, a scalar."""
        ...

    def slope(self, outputs: Tensor, targets: Tensor) -> Tensor:
        """Gradient of every sample's negative log-likelihood in its outputs, shape (N, O)."""
        ...

    def loss_and_slope(self, outputs: Tensor, targets: Tensor) -> tuple[Tensor, Tensor]:
        """`loss` of detached outputs and its gradient in them, shape (N, O)."""
        ...

    def metric(self, outputs: Tensor) -> OutputMetric:
        """KL divergence between two such outputs, in nats a sample."""
        ...


@dataclass(frozen=True)
class Classification:
    """Cross-entropy; the KL divergence of the softmax.

    Attributes:
        tempering: of the softmax Hessian (see `nsrl.projection.metrics.Categorical`).
    """

    tempering: float = 0.01

    def check(self, outputs: Tensor, targets: Tensor) -> None:
        """Labels are integers from 0 to the number of outputs - 1.

        Raises:
            NsrlError: not one label a sample, or one beyond the outputs.
        """
        if targets.ndim != 1 or len(targets) != len(outputs):
            raise NsrlError(f"labels must have shape ({len(outputs)},), one a sample, not {tuple(targets.shape)}")
        low, high = torch.aminmax(targets)
        if int(low) < 0 or int(high) >= outputs.shape[1]:
            raise NsrlError(
                f"labels go from {int(low)} to {int(high)}, but the model has outputs 0 to {outputs.shape[1] - 1}; "
                "widen the output layer or count the labels within the task's head"
            )

    def loss(self, outputs: Tensor, targets: Tensor) -> Tensor:
        """Cross-entropy, shape ()."""
        return F.cross_entropy(outputs, targets)

    def slope(self, outputs: Tensor, targets: Tensor) -> Tensor:
        """Probabilities minus one at the label, (N, O)."""
        return outputs.softmax(-1) - F.one_hot(targets, outputs.shape[1])

    def loss_and_slope(self, outputs: Tensor, targets: Tensor) -> tuple[Tensor, Tensor]:
        """Cross-entropy and (probabilities minus one at the label) / N."""
        log_probabilities = F.log_softmax(outputs, -1)
        loss = F.nll_loss(log_probabilities, targets)
        return loss, log_probabilities.exp_().sub_(F.one_hot(targets, outputs.shape[1])).div_(len(targets))

    def metric(self, outputs: Tensor) -> OutputMetric:
        """One softmax over all outputs."""
        return Categorical((outputs.shape[1],), self.tempering)


@dataclass(frozen=True)
class Regression:
    """Mean squared error; the KL divergence of Gaussians of unit variance, |z - z_ref|^2 / 2."""

    def check(self, outputs: Tensor, targets: Tensor) -> None:
        """Targets have the shape of the outputs.

        Raises:
            NsrlError: they have not.
        """
        if targets.shape != outputs.shape:
            raise NsrlError(f"targets must have the outputs' shape {tuple(outputs.shape)}, not {tuple(targets.shape)}")

    def loss(self, outputs: Tensor, targets: Tensor) -> Tensor:
        """Mean squared error, shape ()."""
        return F.mse_loss(outputs, targets)

    def slope(self, outputs: Tensor, targets: Tensor) -> Tensor:
        """Error, (N, O), that of Gaussians of unit variance."""
        return outputs - targets

    def loss_and_slope(self, outputs: Tensor, targets: Tensor) -> tuple[Tensor, Tensor]:
        """Mean squared error and 2 / (N O) times the error."""
        error = outputs - targets
        return error.square().mean(), error.mul(2.0 / error.numel())

    def metric(self, outputs: Tensor) -> OutputMetric:
        """Unit variance."""
        log_std = torch.zeros(outputs.shape[1], dtype=outputs.dtype, device=outputs.device)
        return Gaussian(log_std, log_std)


def objective_of(targets: Tensor) -> Objective:
    """Classification for integer targets, regression for floating-point ones."""
    return Regression() if targets.is_floating_point() else Classification()
