"""Lazy and feature-learning students (Chizat, Oyallon and Bach 2019)."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from nsrl.bench.gallery.figure import COLOURS, Plate, label, mark, panels
from nsrl.ntk.kernels import empirical_ntk
from nsrl.ntk.lazy import ScaledModel
from nsrl.ntk.training import descend


class Student(nn.Module):
    """f(x) = sum_j c_j relu(a_j . x) with paired neurons, so that it starts at zero."""

    def __init__(self, inputs: int, pairs: int, seed: int):
        super().__init__()
        generator = torch.Generator().manual_seed(seed)
        inner = torch.randn(pairs, inputs, generator=generator, dtype=torch.float64) / inputs**0.5
        outer = torch.randn(1, pairs, generator=generator, dtype=torch.float64) / pairs**0.5
        self.inner = nn.Linear(inputs, 2 * pairs, bias=False, dtype=torch.float64)
        self.outer = nn.Linear(2 * pairs, 1, bias=False, dtype=torch.float64)
        with torch.no_grad():
            self.inner.weight.copy_(torch.cat([inner, inner]))
            self.outer.weight.copy_(torch.cat([outer, -outer], 1))

    def forward(self, inputs: Tensor) -> Tensor:
        """(N, d) to (N, 1)."""
        return self.outer(torch.relu(self.inner(inputs)))


def teacher(inputs: Tensor) -> Tensor:
    """Two ReLU neurons, (N, D) to (N, 1)."""
    return torch.relu(inputs[:, :1]) - torch.relu(-0.6 * inputs[:, :1] + 0.8 * inputs[:, 1:2])


def _sphere(count: int, inputs: int, seed: int) -> Tensor:
    points = torch.randn(count, inputs, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)
    return points / points.norm(dim=1, keepdim=True) * inputs**0.5


def _train(alpha: float, inputs: int, pairs: int, samples: int, steps: int, seed: int) -> tuple[ScaledModel, float]:
    x = _sphere(samples, inputs, 10 + seed)
    model = ScaledModel(Student(inputs, pairs, seed), alpha)
    top = float(torch.linalg.eigvalsh(empirical_ntk(model.model, x))[-1]) / samples
    # small scales leave the tangent's regime, where the kernel grows: the step has to leave room for that
    rate = (0.4 if alpha >= 1.0 else 0.4 * alpha) / top / alpha**2
    descend(model, x, teacher(x), learning_rate=rate, steps=steps, every=steps, loss="half_mean")
    test = _sphere(2000, inputs, 999)
    with torch.no_grad():
        error = float((model(test) - teacher(test)).square().mean() / teacher(test).square().mean())
    return model, error


def _pulls(student: nn.Module) -> Tensor:
    """Neurons a_j |c_j|, (pairs, 2)."""
    assert isinstance(student, Student)
    return (student.inner.weight * student.outer.weight.abs().T).detach()


def neurons(quick: bool) -> Plate:
    """Weights in the plane, before and after."""
    figure, axes = panels(2, 4.0, 4.0)
    numbers = {}
    for axis, alpha in zip(axes, (0.2, 20.0), strict=True):
        model, _ = _train(alpha, 2, 50, 100, 200 if quick else 6000, 0)
        ends = [_pulls(student) for student in (Student(2, 50, 0), model.model)]
        for start, end in zip(*ends, strict=True):
            axis.plot([start[0], end[0]], [start[1], end[1]], color="0.75", linewidth=0.7)
        axis.plot(*ends[0].T, "o", color=COLOURS[0], markersize=6, fillstyle="none", label="before")
        axis.plot(*ends[1].T, "o", color=COLOURS[1], markersize=3, label="after")
        for name, direction in (("teacher's neurons", (1.0, 0.0)), ("_", (-0.6, 0.8))):
            size = float(torch.stack([e.abs().max() for e in ends]).max())
            axis.plot([0, size * direction[0]], [0, size * direction[1]], "--", color=COLOURS[2], label=name)
        label(axis, "|c| a_1", "|c| a_2", f"alpha = {alpha:g}", legend=True)
        axis.set_aspect("equal", "datalim")
        numbers[f"movement_alpha_{alpha:g}"] = float((ends[1] - ends[0]).norm() / ends[0].norm())
    return Plate(figure, numbers)


def lazy_is_not_better(quick: bool) -> Plate:
    """Test error by scale; the network against its tangent kernel."""
    from sklearn.kernel_ridge import KernelRidge

    inputs, pairs = 10, 30 if quick else 100
    alphas = [0.3, 3.0] if quick else [0.1, 0.3, 1.0, 3.0, 10.0, 100.0]
    seeds, steps = range(1 if quick else 2), 200 if quick else 5000
    figure, (left, right) = panels(2)
    errors = torch.tensor([[_train(a, inputs, pairs, 200, steps, s)[1] for a in alphas] for s in seeds])
    left.loglog(alphas, errors.mean(0), "o-", color=COLOURS[0], label="mean")
    for seed, row in zip(seeds, errors, strict=True):
        left.loglog(alphas, row, "x", color=COLOURS[1], markersize=4, label="single networks" if seed == 0 else "_")
    label(left, "output scale alpha", "relative test error", "200 samples in 10 dimensions", legend=True)
    sizes = [50, 100] if quick else [50, 100, 200, 400, 800]
    trained, kernel_machine = [], []
    test = _sphere(500 if quick else 2000, inputs, 999)
    for size in sizes:
        trained.append(_train(0.3, inputs, pairs, size, steps, 0)[1])
        network, x = Student(inputs, pairs, 0), _sphere(size, inputs, 10)
        inner, outer = empirical_ntk(network, x), empirical_ntk(network, test, x)
        ridges = [KernelRidge(alpha=a, kernel="precomputed").fit(inner, teacher(x)) for a in (1e-6, 1e-3, 0.1, 10.0)]
        misses = [torch.tensor(ridge.predict(outer)) - teacher(test) for ridge in ridges]
        # the best of all ridges by the test error itself: more than the kernel could know
        kernel_machine.append(min(float(m.square().mean() / teacher(test).square().mean()) for m in misses))
    right.loglog(sizes, trained, "o-", color=COLOURS[0], label="network, alpha = 0.3")
    right.loglog(sizes, kernel_machine, "s-", color=COLOURS[1], label="its tangent kernel, best ridge")
    label(right, "training samples", "relative test error", legend=True)
    mark(right, sizes)
    ratio = float(errors.mean(0)[-1] / errors.mean(0).min())
    return Plate(
        figure,
        {
            "lazy_over_best": ratio,
            "network": trained,
            "kernel": kernel_machine,
            "samples": sizes,
            "alphas": alphas,
            "test_error": errors.mean(0).tolist(),
        },
    )
