"""Before any training: what would learning from some new batches cost the old behaviour?

First order, through the cross-kernel J_old V J_new^T: the steps that an optimizer would make on the new batches, as the
gradients are now, meet the whitened Jacobian of the preserved tokens. It knows nothing of what comes after the first
step's neighbourhood: gradients that shrink as the task is learnt make it too high, curvature may make it too low. How
well it is calibrated is measured (runs/reference/post_training/forecast.json).
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from nsrl.editing.post_training.preserved import Preserved, evaluated, metric_of
from nsrl.editing.post_training.token_budget import differentiable_attention
from nsrl.errors import NsrlError
from nsrl.projection.jacobians.matrix_free import GraphPasses, PolicyJacobian

OPTIMIZERS = ("adam", "sgd")


@dataclass(frozen=True)
class TokenForecast:
    """What new data is expected to cost.

    Attributes:
        kl: mean KL(then || afterwards) on the preserved tokens, drift + noise, nats a token.
        kl_drift: the part in which the new batches agree, n^2 / 2 |J E u|^2 for n steps u.
        kl_noise: the part in which they differ, n / 2 E |J (u - E u)|^2.
        kl_step: of one step alone.
        alignment: |J u| / (|J|_F |u| / sqrt(P)): 1 where the step disturbs as much as one in a random direction.
    """

    kl: float
    kl_drift: float
    kl_noise: float
    kl_step: float
    alignment: float


@dataclass(frozen=True)
class Calibration:
    """Measured against forecast KL: log measured = intercept + slope log forecast, with what is left over.

    Attributes:
        slope, intercept: of the line.
        spread: standard deviation of what is left over, in natural logarithms.
        rank_correlation: Spearman's, of forecast and measured.
        runs: fine-tunings that it is from.
    """

    slope: float
    intercept: float
    spread: float
    rank_correlation: float
    runs: int

    @classmethod
    def fit(cls, forecast: Sequence[float], measured: Sequence[float]) -> Calibration:
        """Least squares in logarithms.

        Raises:
            NsrlError: fewer than three pairs, or a KL that is not positive.
        """
        if len(forecast) != len(measured) or len(forecast) < 3 or min([*forecast, *measured]) <= 0.0:
            raise NsrlError("a calibration needs at least three pairs of positive forecast and measured KL")
        x, y = (torch.tensor(values, dtype=torch.float64).log() for values in (forecast, measured))
        slope = float(((x - x.mean()) * (y - y.mean())).sum() / (x - x.mean()).square().sum())
        intercept = float(y.mean()) - slope * float(x.mean())
        left = y - intercept - slope * x
        ranks = torch.stack([x.argsort().argsort().double(), y.argsort().argsort().double()])
        spread = float((left.square().sum() / (len(x) - 2)).sqrt())
        return cls(slope, intercept, spread, float(torch.corrcoef(ranks)[0, 1]), len(x))

    def expected(self, kl: float) -> tuple[float, float, float]:
        """Low, middle and high of what is measured after a forecast: a factor of two spreads either way."""
        middle = self.intercept + self.slope * math.log(kl)
        return tuple(math.exp(middle + sign * 2.0 * self.spread) for sign in (-1, 0, 1))  # type: ignore[return-value]


def forecast_cost(
    model: nn.Module,
    preserve: Iterable[Any],
    new: Iterable[Any],
    loss: Callable[[nn.Module, Any], Tensor],
    *,
    learning_rate: float,
    steps: int,
    optimizer: str = "adam",
) -> TokenForecast:
    """Forecast what fine-tuning would cost on preserved tokens, without any training.

    Args:
        model: as it would be fine-tuned.
        preserve: batches as for `protect_module`.
        new: batches of the new data, at least two; what they agree on tells the drift, what not the noise.
        loss: function (model, batch) -> the loss of a step.
        learning_rate: of the optimizer.
        steps: n that it would make.
        optimizer: "adam" (each entry divided by its root mean square gradient over the batches) or "sgd".

    Raises:
        NsrlError: fewer than two batches, an unknown optimizer or a bad number.
    """
    batches = list(new)
    if optimizer not in OPTIMIZERS:
        raise NsrlError(f"optimizer must be one of {', '.join(OPTIMIZERS)}, not {optimizer!r}")
    if len(batches) < 2:
        raise NsrlError("a forecast needs at least two batches of the new data, to tell what they have in common")
    if not 0.0 < learning_rate < math.inf or steps < 1:
        raise NsrlError(f"learning_rate and steps must be positive, not {learning_rate} and {steps}")
    parameters = [p for p in model.parameters() if p.requires_grad]
    with evaluated(model), torch.enable_grad():
        gradients = torch.stack([_gradient(loss(model, batch), parameters) for batch in batches])
    scale: Tensor | float = 1.0
    if optimizer == "adam":
        root = gradients.square().mean(0).sqrt()
        scale = torch.where(root > 0.0, 1.0 / (root + 1e-8), 0.0)
    moves = -learning_rate * gradients * scale
    preserved = Preserved(model, preserve)
    gram, size = _old_gram(preserved, parameters, moves)
    count = len(moves)
    # unbiased: the mean of few batches carries scatter / count of noise, which n^2 would blow up
    whole, mean = float(gram.trace()) / count, float(gram.mean())
    scatter = max(whole - mean, 0.0) * count / (count - 1)
    drift, noise = 0.5 * steps**2 * max(mean - scatter / count, 0.0), 0.5 * steps * scatter
    typical = math.sqrt(size / moves.shape[1]) * float(moves.norm(dim=1).square().mean().sqrt())
    return TokenForecast(drift + noise, drift, noise, 0.5 * whole, math.sqrt(whole) / max(typical, 1e-300))


def _gradient(value: Tensor, parameters: Sequence[nn.Parameter]) -> Tensor:
    pieces = torch.autograd.grad(value, list(parameters), allow_unused=True)
    return torch.cat(
        [torch.zeros_like(p).flatten() if g is None else g.flatten() for p, g in zip(parameters, pieces, strict=True)]
    )


def _old_gram(preserved: Preserved, parameters: Sequence[nn.Parameter], moves: Tensor) -> tuple[Tensor, float]:
    """Products (J u_i) (J u_j) of the whitened changes, a mean over tokens, (B, B); and an estimate of |J|_F^2."""
    gram = torch.zeros(len(moves), len(moves), dtype=torch.float64)
    size, generator = 0.0, torch.Generator().manual_seed(0)
    for number in range(len(preserved)):
        with evaluated(preserved.module), torch.enable_grad(), differentiable_attention():
            outputs = preserved.outputs(number)
            passes = GraphPasses(outputs, parameters)
            passes.push(torch.zeros_like(moves[0]))  # the graph is differentiated where attention is the plain one
        share = len(outputs) / preserved.tokens
        rows = PolicyJacobian(passes, metric_of(outputs.detach()).root(outputs.detach()))
        effects = torch.stack([rows.matvec(move) for move in moves]).double().cpu()
        gram += share * (effects @ effects.T)
        probe = torch.randn(rows.shape[0], generator=generator).to(outputs)
        size += share * float(rows.rmatvec(probe).double().square().sum())
    return gram, size
