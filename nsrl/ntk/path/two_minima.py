"""Where the kernel picture breaks: one parameter, a loss with two minima, and steps across the barrier between them."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor, nn

from nsrl.ntk.path.recorder import PathRecorder


class DoubleWell(nn.Module):
    """f(x; w) = x (w^2 - 1) with the target 0: the loss 1/2 f^2 has its minima at w = -1 and 1 and a barrier at 0."""

    def __init__(self, start: float):
        super().__init__()
        self.weight = nn.Parameter(torch.tensor([start], dtype=torch.float64))

    def forward(self, inputs: Tensor) -> Tensor:
        """(N, 1) to (N, 1)."""
        return inputs * (self.weight.square() - 1.0)


@dataclass(frozen=True)
class Crossing:
    """Gradient descent in the double well.

    Attributes:
        learning_rate: of the run.
        weights: w_0 to w_N.
        displacements: |D_k| of every step.
        changes: |f(w_{k+1}) - f(w_k)|.
        residuals: |f(w_{k+1}) - f(w_k) - f'(w_k) D_k|; here exactly |x| D_k^2.
        left_error: relative error of the prediction rebuilt with the left rule, the kernel picture's first order.
        exact_error: the same with two Gauss-Legendre nodes, exact for this quadratic model.
    """

    learning_rate: float
    weights: tuple[float, ...]
    displacements: tuple[float, ...]
    changes: tuple[float, ...]
    residuals: tuple[float, ...]
    left_error: float
    exact_error: float

    @property
    def crossed(self) -> bool:
        """Whether the run changed its valley."""
        return self.weights[0] * self.weights[-1] < 0


def two_minima(learning_rate: float, start: float = 2.0, steps: int = 30, x: float = 1.0) -> Crossing:
    """Descend 1/2 f^2 from `start`: small rates stay in the right valley, larger ones step over the barrier."""
    module = DoubleWell(start)
    inputs = torch.tensor([[x]], dtype=torch.float64)
    optimizer = torch.optim.SGD(module.parameters(), lr=learning_rate)
    left = PathRecorder(module, optimizer, inputs, rule="left", residuals=True)
    exact = PathRecorder(module, optimizer, inputs, rule="gauss2")
    weights = [start]
    for _ in range(steps):
        optimizer.zero_grad()
        (0.5 * module(inputs).square().sum()).backward()
        optimizer.step()
        weights.append(float(module.weight.detach()))
    results = left.result(), exact.result()
    history = results[0].history
    return Crossing(
        learning_rate,
        tuple(weights),
        tuple(r.displacement for r in history),
        tuple(r.change for r in history),
        tuple(r.residual for r in history),
        float(results[0].certificate.max()),
        float(results[1].certificate.max()),
    )
