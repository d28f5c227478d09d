"""Training in closed form, minimum norm, and the spectrum that Fourier features make."""

from __future__ import annotations

import math

import torch
from torch import nn

from nsrl.bench.gallery.beginnings import line
from nsrl.bench.gallery.figure import COLOURS, Plate, label, panels
from nsrl.ntk.dynamics import OutputDynamics
from nsrl.ntk.fourier import FourierFeatures, frequency_spectrum
from nsrl.ntk.functions import linearize
from nsrl.ntk.infinite import InfiniteNetwork
from nsrl.ntk.kernels import empirical_ntk
from nsrl.ntk.training import descend


def modes(quick: bool) -> Plate:
    """Eigenmode decay and measured losses."""
    torch.manual_seed(0)
    model = InfiniteNetwork(1, "erf", bias_variance=0.3).finite(1, 200 if quick else 2000)
    x = line(6)
    y = torch.sin(2 * x)
    with torch.no_grad():
        start = model(x)
    kernel = empirical_ntk(model, x)
    dynamics = OutputDynamics(kernel, start, y)
    rate = 0.2 * dynamics.largest_learning_rate
    steps = 300 if quick else 2000
    linear = descend(linearize(model), x, y, learning_rate=rate, steps=steps, every=steps // 100)
    run = descend(model, x, y, learning_rate=rate, steps=steps, every=steps // 100)
    figure, (left, right) = panels(2)
    measured = (run.outputs - y).flatten(1) @ dynamics.modes
    exact = dynamics.residual_modes(run.times, rate)
    for mode, colour in zip(range(4), COLOURS, strict=False):
        scale = exact[0, mode].abs()
        left.semilogy(
            run.times,
            (measured[:, mode] / scale).abs(),
            ".",
            color=colour,
            markersize=3,
            label=f"eigenvalue {float(dynamics.rates[mode]):.3g}",
        )
        left.semilogy(run.times, (exact[:, mode] / scale).abs(), color=colour, linewidth=1)
    left.set_ylim(1e-6, 2)
    label(left, "t = learning rate × steps", "|mode of f - y|, relative", "dots: network; lines: closed form", True)
    loss = 0.5 * (dynamics.train_outputs(run.times, rate) - y).square().sum((1, 2))
    right.semilogy(run.times, run.losses, color=COLOURS[0], label="network")
    right.semilogy(run.times, linear.losses, color=COLOURS[2], linewidth=3, alpha=0.4, label="linearised, trained")
    right.semilogy(run.times, loss, "--", color=COLOURS[1], label="closed form")
    label(right, "t = learning rate × steps", "loss 1/2 |f - y|²", legend=True)
    exactness = float((linear.outputs - dynamics.train_outputs(run.times, rate)).abs().max())
    gap = float((run.outputs - dynamics.train_outputs(run.times, rate)).square().mean().sqrt())
    return Plate(figure, {"linearised_minus_closed_form": exactness, "network_rmse": gap})


def minimum_norm(_: bool) -> Plate:
    """Random cosine features, more of them than data."""
    generator = torch.Generator().manual_seed(1)
    frequencies, grid = torch.arange(0, 40, dtype=torch.float64), line(300, 0, 1)
    x = torch.tensor([[0.08], [0.2], [0.45], [0.6], [0.85]]).double()
    y = torch.tensor([[0.3], [1.0], [-0.5], [0.2], [0.8]]).double()

    def features(points: torch.Tensor) -> torch.Tensor:
        return torch.cos(math.pi * points * frequencies) / (1.0 + frequencies) ** 0.75

    design = features(x)
    smallest = torch.linalg.pinv(design) @ y
    null = torch.eye(40, dtype=torch.float64) - torch.linalg.pinv(design) @ design
    descended = torch.zeros(40, 1, dtype=torch.float64)
    rate = 1.0 / torch.linalg.matrix_norm(design, 2) ** 2
    for _step in range(20_000):
        descended = descended - rate * design.T @ (design @ descended - y)
    figure, (axis,) = panels(1, 6.0)
    for index in range(4):
        other = smallest + 2.0 * null @ torch.randn(40, 1, generator=generator, dtype=torch.float64)
        name = "other interpolants" if index == 0 else "_"
        axis.plot(grid, features(grid) @ other, color="0.75", linewidth=0.8, label=name)
    axis.plot(grid, features(grid) @ smallest, color=COLOURS[0], linewidth=4, alpha=0.4, label="minimum norm")
    axis.plot(grid, features(grid) @ descended, "--", color=COLOURS[1], label="gradient descent from 0")
    axis.plot(x, y, "o", color="black", label="data")
    label(axis, "x", "f(x)", legend=True)
    return Plate(figure, {"distance": float((smallest - descended).norm() / smallest.norm())})


class Homogeneous(nn.Module):
    """x -> (x, 1), so that a network without biases has them in its first layer."""

    def forward(self, inputs: torch.Tensor) -> torch.Tensor:
        """(N, d) to (N, d + 1)."""
        return torch.cat([inputs, torch.ones_like(inputs[:, :1])], 1)


def fourier(quick: bool) -> Plate:
    """Spectra, and fits after equal time."""
    count = 32 if quick else 128
    grid = torch.arange(count, dtype=torch.float64).unsqueeze(1) / count
    net = InfiniteNetwork(2, "relu")
    maps: list[tuple[str, nn.Module]] = [("none (x on a line)", Homogeneous())]
    powers = (("amplitudes 1/j²", 2.0), ("amplitudes 1/j", 1.0), ("amplitudes all alike", 0.0))
    maps += [(name, FourierFeatures.decaying(min(32, count // 2), power)) for name, power in powers]
    target = torch.sin(2 * math.pi * grid) + 0.5 * torch.sin(2 * math.pi * 9 * grid)
    figure, (left, right) = panels(2, 5.0)
    numbers = {}
    for (name, features), colour in zip(maps, COLOURS, strict=False):
        kernel = net.ntk(features(grid))
        kernel = kernel / kernel.diagonal().mean()
        spectrum = frequency_spectrum(kernel)
        left.semilogy(spectrum.clamp_min(1e-6), color=colour, label=name)
        fit = OutputDynamics(kernel, torch.zeros_like(target), target).train_outputs([3.0])[0]
        right.plot(grid, fit, color=colour, label=name, linewidth=1)
        numbers[f"high_over_low, {name}"] = float(spectrum[9] / spectrum[1])
    right.plot(grid, target, ":", color="black", label="target: frequencies 1 and 9")
    label(left, "frequency", "learning rate of the frequency", "spectrum of the tangent kernel", legend=True)
    label(right, "x", "f(x) at t = 3", legend=True)
    right.set_ylim(-1.6, 2.9)
    return Plate(figure, numbers)
