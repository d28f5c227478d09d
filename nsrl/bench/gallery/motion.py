"""Networks in training: the figures of rajatvd's NTK experiments."""

from __future__ import annotations

import copy
import math
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from torch import Tensor, nn

from nsrl.bench.gallery.beginnings import line, tanh_net
from nsrl.bench.gallery.figure import COLOURS, Plate, label, law, panels, told
from nsrl.ntk.dynamics import OutputDynamics
from nsrl.ntk.kernels import empirical_ntk
from nsrl.ntk.lazy import ScaledModel, kernel_drift, relative_weight_change
from nsrl.ntk.sweeps import scale_sweep
from nsrl.ntk.training import descend

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

X = torch.tensor([[-2.0], [0.5]]).double()
Y = torch.tensor([[3.0], [-1.0]]).double()


def deep_net(width: int = 100, seed: int | None = None) -> nn.Sequential:
    """Two hidden ReLU layers."""
    if seed is not None:
        torch.manual_seed(seed)
    layers = [nn.Linear(1, width), nn.ReLU(), nn.Linear(width, width), nn.ReLU(), nn.Linear(width, 1)]
    return nn.Sequential(*layers).double()


def _rate(model: nn.Module, share: float = 0.3) -> float:
    """A share of the largest stable learning rate, for the loss 1/2 sum of squares."""
    return share * 2.0 / float(torch.linalg.eigvalsh(empirical_ntk(model, X))[-1])


def training(quick: bool) -> Plate:
    """F2."""
    grid, shown = line(121, -3, 2), (0, 10, 40, 200, 2000)
    figure, axes = panels(2)
    numbers = {}
    for axis, alpha in zip(axes, (0.3, 30.0), strict=True):
        model = ScaledModel(deep_net(seed=0), alpha)
        rate = 0.03 * _rate(deep_net(seed=0)) / alpha**2
        run = descend(model, X, Y, learning_rate=rate, steps=400 if quick else 2000, every=10, test_inputs=grid)
        assert run.test_outputs is not None
        for step, shade in zip(shown, (0.2, 0.35, 0.5, 0.7, 1.0), strict=True):
            snapshot = min(step // 10, len(run.test_outputs) - 1)
            axis.plot(grid, run.test_outputs[snapshot], color=COLOURS[0], alpha=shade, label=f"step {step}")
        axis.plot(X, Y, "o", color=COLOURS[1], label="data")
        label(axis, "x", "f(x)", f"output scale {alpha:g}", legend=True)
        numbers[f"weight_change_alpha_{alpha:g}"] = float(run.weight_changes[-1])
    return Plate(figure, numbers)


def weights(quick: bool) -> Plate:
    """F3."""
    widths = [10, 100] if quick else [10, 30, 100, 300, 1000]
    figure, axes = panels(6, 4.0, 3.2, rows=2)
    shown = iter(axes[:3])
    moved: dict[str, list[tuple[int, float]]] = {"weight change": [], "kernel drift": []}
    for width, colour in zip(widths, COLOURS, strict=False):
        for seed in range(1 if quick or width == 1000 else 5):
            model = deep_net(width, seed=1 + seed)
            start, before = copy.deepcopy(model), empirical_ntk(model, X)
            run = descend(model, X, Y, learning_rate=_rate(model, 0.1), steps=150 if quick else 400)
            moved["weight change"].append((width, relative_weight_change(model, start)))
            moved["kernel drift"].append((width, kernel_drift(empirical_ntk(model, X), before)))
            if seed > 0:
                continue
            axes[3].semilogy(run.losses.clamp_min(1e-16), color=colour, label=f"width {width}")
            axes[4].plot(run.weight_changes, color=colour)
            if width in (10, 100, 1000):
                _change(figure, next(shown), width, start[2], model[2])
    for axis in shown:
        axis.set_axis_off()
    label(axes[3], "step", "loss", legend=True)
    axes[3].set_ylim(1e-9, None)
    label(axes[4], "step", "|w - w0| / |w0|", "colours as on the left")
    numbers: dict[str, Any] = {}
    for (name, points), colour in zip(moved.items(), COLOURS, strict=False):
        if not quick:
            narrow, wide = ([p for p in points if (p[0] >= 100) == is_wide] for is_wide in (False, True))
            axes[5].loglog(*zip(*narrow, strict=True), "o", color=colour, markersize=4, fillstyle="none")
            fit = law(axes[5], [width for width, _ in wide], [change for _, change in wide], name, colour)
            numbers[name] = told(fit, -1.0)
        numbers[f"{name} at width"] = {str(w): float(np.median([c for v, c in points if v == w])) for w in widths}
    if not quick:
        axes[5].plot([], [], "o", color="0.4", fillstyle="none", label="narrow, not fitted")
        axes[5].set_ylim(None, 300)  # room for the legend
        axes[5].legend(fontsize=8, frameon=False, loc="upper right")
    label(axes[5], "width", "relative change")
    return Plate(figure, numbers)


def _change(figure: Figure, axis: Axes, width: int, before: nn.Module, after: nn.Module) -> None:
    """The change of a layer's weights, in units of their spread."""
    assert isinstance(before, nn.Linear) and isinstance(after, nn.Linear)
    change = (after.weight - before.weight).detach()[:40, :40] / float(before.weight.detach().std())
    picture = axis.imshow(change, cmap="RdBu", vmin=-1, vmax=1)
    label(axis, "column", "row", f"width {width}")
    axis.grid(visible=False)
    figure.colorbar(picture, ax=axis, label="change / std of the weights", shrink=0.8)


def drift(quick: bool) -> Plate:
    """F4."""
    alphas = np.logspace(-1, 3, 5 if quick else 9).tolist()
    points = scale_sweep(
        lambda: tanh_net(64),
        alphas,
        X,
        Y,
        learning_rate=5e-4,
        steps=100 if quick else 1500,
        seeds=range(1 if quick else 5),
    )
    figure, axes = panels(2)
    numbers = {}
    laws = (("drift", "|K_T - K_0| / |K_0|"), ("weight_change", "|w_T - w_0| / |w_0|"))
    for axis, (key, name), colour in zip(axes, laws, COLOURS, strict=False):
        small = [p for p in points if p.alpha < 10]
        axis.loglog(
            [p.alpha for p in small],
            [getattr(p, key) for p in small],
            "o",
            color="0.7",
            markersize=4,
            label="not lazy, not fitted",
        )
        lazy = [p for p in points if p.alpha >= 10]
        numbers[key] = told(law(axis, [p.alpha for p in lazy], [getattr(p, key) for p in lazy], "fit", colour), -1.0)
        label(axis, "output scale alpha", name, legend=True)
    return Plate(figure, numbers)


def ellipses(quick: bool) -> Plate:
    """F6."""
    alphas = (0.3, 1.0, 30.0)
    figure, axes = panels(3)
    numbers = {}
    for axis, alpha in zip(axes, alphas, strict=True):
        model = ScaledModel(deep_net(seed=3), alpha)
        before = empirical_ntk(model, X) / alpha**2
        rate = 0.1 * _rate(deep_net(seed=3))
        run = descend(model, X, Y, learning_rate=rate / alpha**2, steps=100 if quick else 2000, every=5)
        after = empirical_ntk(model, X) / alpha**2
        path = run.outputs[:, :, 0]
        times = torch.linspace(0, float(run.times[-1] * alpha**2), 300, dtype=torch.float64)
        straight = OutputDynamics(before, run.outputs[0], Y).train_outputs(times)[:, :, 0]
        axis.plot(*straight.T, ":", color="0.4", label="linearised")
        axis.plot(*path.T, color=COLOURS[0], label="network")
        axis.plot(*Y[:, 0], "*", color=COLOURS[1], markersize=10, label="target")
        # both in the unit of the first kernel, so that growth shows
        unit = float(torch.linalg.eigvalsh(before)[-1])
        for kernel, style, name in ((before, "--", "kernel, before"), (after, "-", "kernel, after")):
            axis.plot(*_ellipse(kernel / unit, Y[:, 0]), style, color=COLOURS[2], linewidth=1, label=name)
        label(axis, "f(-2)", "f(0.5)", f"alpha = {alpha:g}")
        axis.set_xlim(-0.4, 6.2)
        axis.set_ylim(-3.6, 2.2)
        numbers[f"drift_alpha_{alpha:g}"] = float((after - before).norm() / before.norm())
    axes[-1].legend(fontsize=8, frameon=False, loc="upper right")
    return Plate(figure, numbers)


def _ellipse(kernel: Tensor, centre: Tensor) -> Tensor:
    angles = torch.linspace(0, 2 * math.pi, 100, dtype=torch.float64)
    values, vectors = torch.linalg.eigh(kernel)
    circle = torch.stack([angles.cos(), angles.sin()])
    return centre.unsqueeze(1) + vectors @ (values.clamp_min(0).sqrt().unsqueeze(1) * circle)


def one_parameter(_: bool) -> Plate:
    """F7."""
    x, y, start = 1.5, 3.0, 0.4
    figure, axes = panels(4, 3.8, 3.1, rows=2)
    numbers = {}

    def f(w: Tensor, alpha: float) -> Tensor:
        return alpha * (w * x + w**2 * x + torch.sin(torch.exp(0.1 * w))) * (w - start)

    for column, alpha in enumerate((1.0, 30.0)):
        w0 = torch.tensor(start, dtype=torch.float64, requires_grad=True)
        (slope,) = torch.autograd.grad(f(w0, alpha), w0)
        reach = 2.0 * abs(y) / float(slope)  # twice the step that the linear model needs
        w = torch.linspace(start - reach, start + reach, 200, dtype=torch.float64)
        model, linear = f(w, alpha), slope * (w - start)
        for row, (curve, tangent, name) in enumerate(
            ((model, linear, "f"), (0.5 * (model - y) ** 2, 0.5 * (linear - y) ** 2, "loss"))
        ):
            axis = axes[2 * row + column]
            axis.plot(w, curve, color=COLOURS[0], label="model")
            axis.plot(w, tangent, "--", color=COLOURS[1], label="linearised at 0.4")
            label(axis, "w", name, f"alpha = {alpha:g}" if row == 0 else "", legend=row == 0)
            axis.set_ylim((-12, 14) if row == 0 else (-2, 45))
        numbers[f"gap_alpha_{alpha:g}"] = float((model - linear).abs().max() / model.abs().max())
    return Plate(figure, numbers)
