"""Full-batch gradient descent on a squared loss, on the clock of the closed forms: t = learning rate * steps."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, Literal

import torch
from torch import Tensor, nn

from nsrl.errors import NsrlError
from nsrl.projection.jacobians.fallback import Forward

#: L(f) for outputs f and targets y with k = N * O entries: 1/2 |f - y|^2, 1/(2k) |f - y|^2, or 1/k |f - y|^2 (that is
#: `torch.nn.MSELoss()`).
Loss = Literal["half_sum", "half_mean", "mse"]


@dataclass(frozen=True)
class Trajectory:
    """What a network did while it was trained.

    Attributes:
        times: learning rate * steps, (T,), from 0 on.
        outputs: on the training inputs, (T, N, O).
        losses: of the training outputs, in the loss that was asked for, (T,).
        weight_changes: |w - w0| / |w0| of the trainable parameters, (T,).
        test_outputs: on the test inputs, (T, M, O), or None.
    """

    times: Tensor
    outputs: Tensor
    losses: Tensor
    weight_changes: Tensor
    test_outputs: Tensor | None


def loss_rate(loss: Loss, entries: int) -> float:
    """The number c in dL/df = c (f - y), for outputs with `entries` = N * O entries.

    Raises:
        NsrlError: there is no such loss.
    """
    rates = {"half_sum": 1.0, "half_mean": 1.0 / entries, "mse": 2.0 / entries}
    if loss not in rates:
        raise NsrlError(f"loss must be one of {', '.join(rates)}, not {loss!r}")
    return rates[loss]


def descend(
    model: nn.Module,
    inputs: Any,
    targets: Tensor,
    *,
    learning_rate: float,
    steps: int,
    every: int = 1,
    loss: Loss = "half_sum",
    test_inputs: Any = None,
    forward: Forward | None = None,
) -> Trajectory:
    """Train the model in place by full-batch gradient descent, recording every so many steps (and the last).

    Args:
        targets: (N, O), like the outputs.
        every: steps between two records.
        forward: function (model, inputs) -> outputs (N, O); default `model(inputs)`.

    Raises:
        NsrlError: targets of another shape than the outputs, or a loss that became infinite.
    """
    call = forward or (lambda module, batch: module(batch))
    parameters = [parameter for parameter in model.parameters() if parameter.requires_grad]
    start = [parameter.detach().clone() for parameter in parameters]
    norm = torch.stack([piece.norm() for piece in start]).norm()
    times, outputs, losses, changes, test_outputs = [], [], [], [], []
    for step in range(steps + 1):
        current = call(model, inputs)
        if current.shape != targets.shape:
            raise NsrlError(f"the targets have shape {tuple(targets.shape)}, the outputs {tuple(current.shape)}")
        value = loss_rate(loss, targets.numel()) / 2 * (current - targets).square().sum()
        if not bool(torch.isfinite(value)):
            raise NsrlError(f"the loss is not finite after {step} steps; lower the learning rate of {learning_rate:g}")
        if step % every == 0 or step == steps:
            moved = torch.stack([(p.detach() - s).norm() for p, s in zip(parameters, start, strict=True)]).norm()
            times.append(step * learning_rate)
            outputs.append(current.detach())
            losses.append(value.detach())
            changes.append(moved / norm)
            if test_inputs is not None:
                with torch.no_grad():
                    test_outputs.append(call(model, test_inputs))
        if step < steps:
            gradients = torch.autograd.grad(value, parameters, allow_unused=True)
            with torch.no_grad():
                for parameter, gradient in zip(parameters, gradients, strict=True):
                    if gradient is not None:
                        parameter.sub_(learning_rate * gradient)
    return Trajectory(
        torch.tensor(times, dtype=torch.float64),
        torch.stack(outputs),
        torch.stack(losses),
        torch.stack(changes),
        torch.stack(test_outputs) if test_outputs else None,
    )
