"""Path kernels: certificates, contributions, residuals, and where the picture breaks."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from nsrl.bench.gallery.beginnings import line
from nsrl.bench.gallery.figure import COLOURS, Plate, label, law, mark, panels, told
from nsrl.ntk.kernels import empirical_ntk
from nsrl.ntk.path import PathRecorder, loss_path_kernel
from nsrl.ntk.path import two_minima as descend_double_well

X, QUERIES = line(8, -1, 1), line(5, -1.2, 1.2)
Y = torch.sin(3 * X)


def curved(activation: type[nn.Module] = nn.Tanh, width: int = 12, seed: int = 0) -> nn.Sequential:
    """A strongly curved network, which shows the order of every rule."""
    model = nn.Sequential(nn.Linear(1, width), activation(), nn.Linear(width, 1)).double()
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.normal_(generator=generator)
    return model


def descend(model: nn.Module, optimizer: torch.optim.Optimizer, steps: int) -> None:
    """Full-batch training on 1/2 |f - y|^2."""
    for _ in range(steps):
        optimizer.zero_grad()
        (0.5 * (model(X) - Y).square().sum()).backward()
        optimizer.step()


def certificate(quick: bool) -> Plate:
    """Error against learning rate, smooth and kinked."""
    rates = [0.01, 0.005, 0.0025] if quick else [0.004, 0.002, 0.001, 0.0005, 0.00025]
    time = 0.05 if quick else 0.2
    numbers: dict[str, Any] = {}
    figure, axes = panels(2, 5.0, 4.2)
    for axis, activation in zip(axes, (nn.Tanh, nn.ReLU), strict=True):
        for (rule, order), colour in zip(
            (("left", 1), ("midpoint", 2), ("gauss2", 4), ("gauss3", 6)), COLOURS, strict=False
        ):
            errors = []
            for rate in rates:
                model = curved(activation)
                optimizer = torch.optim.SGD(model.parameters(), lr=rate)
                recorder = PathRecorder(model, optimizer, QUERIES, rule=rule)
                descend(model, optimizer, round(time / rate))
                errors.append(float(recorder.result().certificate.max()))
            if activation is nn.Tanh and rule != "gauss3":
                above = [(r, e) for r, e in zip(rates, errors, strict=True) if e > 3e-14]
                numbers[rule] = told(law(axis, [r for r, _ in above], [e for _, e in above], rule, colour), order)
            else:
                axis.loglog(rates, errors, "s--", color=colour, markersize=4, linewidth=0.8, label=rule)
            numbers[f"{activation.__name__}, {rule}"] = errors
        label(axis, "learning rate", "largest relative error of a query", activation.__name__, legend=True)
        mark(axis, rates)
    return Plate(figure, numbers)


def contributions(quick: bool) -> Plate:
    """Heat map over training, and sums without and with momentum."""
    figure, axes = panels(3, 4.6)
    query, chunks, steps = QUERIES[3:4], 10 if quick else 30, 5
    numbers: dict[str, Any] = {}
    table: Tensor | None = None
    for axis, name in zip(axes[1:], ("SGD", "SGD, momentum and decay"), strict=True):
        model = curved()
        if name == "SGD":
            optimizer: torch.optim.Optimizer = torch.optim.SGD(model.parameters(), lr=0.01)
        else:
            optimizer = torch.optim.SGD(model.parameters(), lr=0.004, momentum=0.6, weight_decay=0.02)
        recorder = PathRecorder(model, optimizer, query, samples=len(X))
        rows, rest = [], []
        for _ in range(chunks):
            descend(model, optimizer, steps)
            found = recorder.result()
            rows.append(found.contributions[0, 0].clone())
            rest.append(found.rest[0, 0].clone())
        running = torch.stack(rows)
        final = [*running[-1].tolist(), float(rest[-1])]
        names = [f"{float(x):.2g}" for x in X] + ["rest"]
        axis.bar(names, final, color=[COLOURS[0]] * len(X) + [COLOURS[1]])
        axis.axhline(0, color="black", linewidth=0.6)
        moved = float(found.final - found.initial)
        label(
            axis,
            "training point x",
            f"share of f({float(query):.1f})",
            f"{name}\nsum {sum(final):.3f}, f moved {moved:.3f}",
        )
        axis.tick_params(axis="x", rotation=60, labelsize=8)
        numbers[name] = {
            "rest": final[-1],
            "sum": sum(final),
            "moved": moved,
            "certificate": float(found.certificate.max()),
        }
        table = running.diff(dim=0, prepend=torch.zeros(1, len(X), dtype=torch.float64)) if table is None else table
    assert table is not None
    limit = float(table.abs().max())
    picture = axes[0].imshow(
        table.T, aspect="auto", cmap="RdBu", vmin=-limit, vmax=limit, extent=(0, chunks * steps, len(X) - 0.5, -0.5)
    )
    figure.colorbar(picture, ax=axes[0], label=f"change of f({float(query):.1f})")
    label(axes[0], "step", "training point", f"SGD, every {steps} steps")
    axes[0].grid(visible=False)
    return Plate(figure, numbers)


def residuals(quick: bool) -> Plate:
    """Second-order residual per step."""
    figure, (left, right) = panels(2, 5.0)
    numbers: dict[str, Any] = {}
    sizes: list[float] = []
    missed: list[float] = []
    for rate, colour in zip((0.01, 0.0025), COLOURS, strict=False):
        model = curved()
        optimizer = torch.optim.SGD(model.parameters(), lr=rate)
        recorder = PathRecorder(model, optimizer, QUERIES, rule="left", residuals=True)
        descend(model, optimizer, 30 if quick else round(2.0 / rate))
        history = recorder.result().history
        shares = [r.residual / max(r.change, 1e-300) for r in history]
        left.semilogy(shares, color=colour, label=f"learning rate {rate:g}")
        right.loglog(
            [r.displacement for r in history],
            [r.residual for r in history],
            ".",
            color=colour,
            markersize=3,
            label=f"learning rate {rate:g}, all steps",
        )
        numbers[f"largest_share_{rate:g}"] = max(shares)
    for rate in (0.01, 0.005, 0.0025, 0.00125):
        model = curved()
        optimizer = torch.optim.SGD(model.parameters(), lr=rate)
        recorder = PathRecorder(model, optimizer, QUERIES, rule="left", residuals=True)
        descend(model, optimizer, 1)
        record = recorder.result().history[0]
        sizes.append(record.displacement)
        missed.append(record.residual)
    numbers["first_step"] = told(law(right, sizes, missed, "first step", COLOURS[2], "s"), 2.0)
    label(left, "step", "|residual| / |change| of the queries", legend=True)
    label(right, "|w_(k+1) - w_k|", "|residual|", legend=True)
    return Plate(figure, numbers)


def _rates(quick: bool) -> list[float]:
    """Learning rates on both sides of the first crossing, at 1/6 from w = 2."""
    return [0.02, 0.1, 0.2, 0.3] if quick else [0.01, 0.02, 0.05, 0.1, 0.13, 0.15, 0.18, 0.2, 0.22, 0.25, 0.28, 0.3]


def two_minima(quick: bool) -> Plate:
    """Runs in the double well."""
    figure, (left, middle, right) = panels(3, 4.6)
    w = torch.linspace(-2.2, 2.2, 200)
    left.plot(w, 0.5 * (w.square() - 1).square(), color="0.6", label="loss")
    for rate, colour in zip((0.02, 0.3), COLOURS, strict=False):
        run = descend_double_well(rate)
        path = torch.tensor(run.weights)
        left.plot(
            path,
            0.5 * (path.square() - 1).square(),
            "o-",
            color=colour,
            markersize=4,
            linewidth=0.8,
            label=f"learning rate {rate:g}",
        )
        shares = [r / max(c, 1e-300) for r, c in zip(run.residuals, run.changes, strict=True) if c > 1e-12]
        middle.semilogy(
            range(1, len(shares) + 1),
            shares,
            "o-",
            color=colour,
            markersize=4,
            linewidth=0.8,
            label=f"learning rate {rate:g}",
        )
    runs = [descend_double_well(rate) for rate in _rates(quick)]
    for crossed, marker, name in ((False, "o", "stays"), (True, "s", "crosses")):
        chosen = [run for run in runs if run.crossed == crossed]
        right.semilogy(
            [r.learning_rate for r in chosen],
            [r.left_error for r in chosen],
            marker,
            color=COLOURS[1],
            label=f"first order, {name}",
        )
        right.semilogy(
            [r.learning_rate for r in chosen],
            [max(r.exact_error, 1e-17) for r in chosen],
            marker,
            color=COLOURS[2],
            label=f"two nodes, {name}",
        )
    label(left, "w", "loss 1/2 (w² - 1)²", legend=True)
    label(middle, "step", "|residual| / |change|", legend=True)
    label(right, "learning rate", "relative error of the rebuilt prediction", legend=True)
    return Plate(
        figure,
        {
            f"{r.learning_rate:g}": {"crossed": r.crossed, "first_order": r.left_error, "two_nodes": r.exact_error}
            for r in runs
        },
    )


def path_kernels(quick: bool) -> Plate:
    """Loss path kernels by rule, beside the tangent kernels at both ends."""
    model = curved(width=24, seed=2)
    before = empirical_ntk(model, X)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.01)
    options = {"samples": len(X), "weightings": {"loss_path": loss_path_kernel}, "query_slope": lambda f: f - Y}
    recorders = [PathRecorder(model, optimizer, X, rule=rule, **options) for rule in ("left", "gauss3")]  # type: ignore[arg-type]
    descend(model, optimizer, 10 if quick else 200)
    left, exact = (recorder.result().totals["loss_path"] for recorder in recorders)
    after = empirical_ntk(model, X)
    figure, axes = panels(4, 3.7, 3.2)
    pictures = (
        ("tangent kernel, before", before),
        ("tangent kernel, after", after),
        ("loss path kernel, left rule", left),
        ("its exact form", exact),
    )
    for axis, (name, matrix) in zip(axes, pictures, strict=True):
        figure.colorbar(axis.imshow(matrix, cmap="viridis"), ax=axis)
        label(axis, "training point", "query", name)
        axis.grid(visible=False)
    skew = {name: float((m - m.T).norm() / m.norm()) for name, m in (("left", left), ("exact", exact))}
    drift = float((after - before).norm() / before.norm())
    return Plate(figure, {"asymmetry": skew, "drift": drift})
