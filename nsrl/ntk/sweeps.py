"""Laziness against width and against output scale: two views of one kappa (Chizat, Oyallon and Bach 2019)."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from functools import partial

import torch
from torch import Tensor, nn

from nsrl.ntk.dynamics import OutputDynamics
from nsrl.ntk.kernels import empirical_ntk
from nsrl.ntk.lazy import ScaledModel, kappa, kernel_drift
from nsrl.ntk.training import Loss, descend


@dataclass(frozen=True)
class WidthPoint:
    """A network of one width at initialisation; the norms are those of `nsrl.ntk.lazy.Laziness`."""

    width: int
    seed: int
    kappa: float
    jacobian_norm: float
    hessian_norm: float
    converged: bool


@dataclass(frozen=True)
class ScalePoint:
    """A network of one output scale after training.

    Attributes:
        alpha: the output scale.
        seed: of the network.
        drift: |K_T - K_0| / |K_0| on the training inputs.
        weight_change: |w_T - w_0| / |w_0|.
        linear_gap: distance of the trained outputs from the linearised model's, relative to the way they went.
        train_loss: 1/2 mean squared error.
        test_loss: the same on the test inputs, or None.
    """

    alpha: float
    seed: int
    drift: float
    weight_change: float
    linear_gap: float
    train_loss: float
    test_loss: float | None


def width_sweep(
    build: Callable[[int], nn.Module],
    widths: Sequence[int],
    inputs: Tensor,
    targets: Tensor,
    *,
    seeds: Iterable[int] = range(3),
) -> list[WidthPoint]:
    """kappa, |J| and |Hess f| of networks of growing width at initialisation, their outputs shifted to zero.

    In the standard parametrisation (variance 1 / width) they go as width^-1, width^(1/2) and width^0.

    Args:
        build: makes a network of a given width; called with torch's seed set.
    """
    points = []
    for seed in seeds:
        for width in widths:
            found = kappa(ScaledModel(_seeded(partial(build, width), seed)), inputs, targets, tolerance=1e-3, seed=seed)
            points.append(
                WidthPoint(width, seed, found.kappa, found.jacobian_norm, found.hessian_norm, found.converged)
            )
    return points


def scale_sweep(
    build: Callable[[], nn.Module],
    alphas: Sequence[float],
    inputs: Tensor,
    targets: Tensor,
    *,
    learning_rate: float,
    steps: int,
    test_inputs: Tensor | None = None,
    test_targets: Tensor | None = None,
    loss: Loss = "half_sum",
    seeds: Iterable[int] = range(3),
) -> list[ScalePoint]:
    """Train alpha * (f(w) - f(w0)) by gradient descent on loss / alpha^2, for several alpha.

    The division keeps the clock: to first order outputs move equally fast at every alpha. The kernel's drift and the
    change of the weights go as 1 / alpha for large alpha.

    Args:
        build: makes a network; called with torch's seed set.
        learning_rate: for alpha = 1; below 2 / (c lambda_max) of the network's kernel.
        loss: as in `nsrl.ntk.dynamics`.
    """
    points = []
    for seed in seeds:
        for alpha in alphas:
            model = ScaledModel(_seeded(build, seed), alpha)
            before = empirical_ntk(model, inputs)
            rate = learning_rate / alpha**2
            path = descend(model, inputs, targets, learning_rate=rate, steps=steps, every=max(steps, 1), loss=loss)
            linear = OutputDynamics(before, path.outputs[0], targets, loss=loss).train_outputs(path.times[-1:], rate)
            went = (path.outputs[-1] - path.outputs[0]).norm()
            test_loss = None
            if test_inputs is not None and test_targets is not None:
                with torch.no_grad():
                    test_loss = float((model(test_inputs) - test_targets).square().mean() / 2)
            points.append(
                ScalePoint(
                    alpha=alpha,
                    seed=seed,
                    drift=kernel_drift(empirical_ntk(model, inputs), before),
                    weight_change=float(path.weight_changes[-1]),
                    linear_gap=float((path.outputs[-1] - linear[0]).norm() / went),
                    train_loss=float((path.outputs[-1] - targets).square().mean() / 2),
                    test_loss=test_loss,
                )
            )
    return points


def _seeded(build: Callable[[], nn.Module], seed: int) -> nn.Module:
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        return build()
