"""The lecture's panels: kernel regression, ridge regression, principal components."""

from __future__ import annotations

import itertools

import numpy as np

from nsrl.bench.gallery.figure import COLOURS, Plate, label, panels
from nsrl.ntk.regression import NadarayaWatson, NTKPrincipalComponents, NTKRegressor


def _noisy(count: int) -> tuple[np.ndarray, np.ndarray]:
    random = np.random.default_rng(0)
    x = np.sort(random.uniform(-3, 3, count))[:, None]
    return x, np.sin(2 * x[:, 0]) + 0.3 * x[:, 0] + 0.25 * random.standard_normal(count)


GRID = np.linspace(-3, 3, 200)[:, None]
TRUTH = np.sin(2 * GRID[:, 0]) + 0.3 * GRID[:, 0]


def nadaraya_watson(_: bool) -> Plate:
    """Three bandwidths."""
    x, y = _noisy(60)
    figure, axes = panels(3, 3.8, 3.2)
    numbers = {}
    for axis, bandwidth in zip(axes, (0.03, 0.2, 2.0), strict=True):
        found = NadarayaWatson(bandwidth).fit(x, y).predict(GRID)
        axis.plot(x, y, ".", color="0.6", label="data")
        axis.plot(GRID, TRUTH, "--", color="black", linewidth=1, label="truth")
        axis.plot(GRID, found, color=COLOURS[0], label="estimate")
        numbers[f"rmse_bandwidth_{bandwidth:g}"] = float(np.sqrt(np.mean((found - TRUTH) ** 2)))
        label(axis, "x", "y", f"bandwidth {bandwidth:g}")
    axes[0].legend(fontsize=8, frameon=False)
    return Plate(figure, numbers)


def ridge(quick: bool) -> Plate:
    """Gaussian kernels of three ridges, and the tangent kernel."""
    from sklearn.kernel_ridge import KernelRidge

    x, y = _noisy(60)
    figure, axes = panels(3, 3.8, 3.2)
    numbers = {}
    kernels = {
        "Gaussian, bandwidth 0.5": lambda a: KernelRidge(alpha=a, kernel="rbf", gamma=1 / (2 * 0.5**2)),
        "Gaussian, bandwidth 0.05": lambda a: KernelRidge(alpha=a, kernel="rbf", gamma=1 / (2 * 0.05**2)),
        "tangent kernel, ReLU": lambda a: NTKRegressor(alpha=a, width=64 if quick else 256),
    }
    for axis, (name, build) in zip(axes, kernels.items(), strict=True):
        axis.plot(x, y, ".", color="0.6", label="data")
        axis.plot(GRID, TRUTH, "--", color="black", linewidth=1, label="truth")
        for alpha, colour in zip((1e-3, 0.3, 30.0), COLOURS, strict=False):
            found = build(alpha).fit(x, y).predict(GRID)
            axis.plot(GRID, found, color=colour, linewidth=1.2, label=f"ridge {alpha:g}")
            numbers[f"rmse, {name}, {alpha:g}"] = float(np.sqrt(np.mean((found - TRUTH) ** 2)))
        label(axis, "x", "y", name)
        axis.set_ylim(-2.6, 3.6)
    axes[0].legend(fontsize=7, frameon=False, ncols=2, loc="upper left")
    return Plate(figure, numbers)


def kernel_pca(quick: bool) -> Plate:
    """Circles and moons."""
    from sklearn.datasets import make_circles, make_moons
    from sklearn.decomposition import KernelPCA
    from sklearn.linear_model import LogisticRegression

    count = 120 if quick else 300
    sets = {
        "circles": (*make_circles(count, factor=0.3, noise=0.05, random_state=0), 2.0),
        "moons": (*make_moons(count, noise=0.07, random_state=0), 8.0),
    }
    figure, axes = panels(6, 3.5, 3.2, rows=2)
    numbers = {}

    def score(values: np.ndarray, classes: np.ndarray) -> float:
        return float(LogisticRegression(C=1e4).fit(values, classes).score(values, classes))

    for row, (name, (points, classes, gamma)) in enumerate(sets.items()):
        views = {
            "data": points,
            "Gaussian kernel": KernelPCA(8, kernel="rbf", gamma=gamma).fit_transform(points),
            "tangent kernel": NTKPrincipalComponents(8, width=128).fit(points).transform(points),
        }
        for axis, (view, values) in zip(axes[3 * row :], views.items(), strict=False):
            # of the leading components those two that tell the classes apart best
            pair = list(
                max(
                    itertools.combinations(range(values.shape[1]), 2),
                    key=lambda chosen: score(values[:, chosen], classes),
                )
            )
            for kind in (0, 1):
                axis.plot(
                    *values[classes == kind][:, pair].T, ".", color=COLOURS[kind], markersize=3, label=f"class {kind}"
                )
            numbers[f"{name}, {view}"] = score(values[:, pair], classes)
            kind_of = "x" if view == "data" else "component"
            label(
                axis,
                f"{kind_of} {pair[0] + 1}",
                f"{kind_of} {pair[1] + 1}",
                f"{name}, {view}: separable {numbers[f'{name}, {view}']:.0%}",
            )
    axes[3].legend(fontsize=8, frameon=False, loc="upper right", markerscale=3)
    return Plate(figure, numbers)
