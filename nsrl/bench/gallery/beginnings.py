"""Networks at initialisation."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from nsrl.bench.gallery.figure import COLOURS, Plate, label, law, mark, panels, told
from nsrl.ntk.infinite import InfiniteNetwork
from nsrl.ntk.kernels import empirical_ntk
from nsrl.ntk.random_functions import fourier_functions, random_function_kernel
from nsrl.ntk.sweeps import width_sweep


def line(count: int, low: float = -2.0, high: float = 2.0) -> Tensor:
    """Points on a line, (count, 1), float64."""
    return torch.linspace(low, high, count, dtype=torch.float64).unsqueeze(1)


def random_nets(quick: bool) -> Plate:
    """F1."""
    net, x = InfiniteNetwork(2, "relu", bias_variance=0.1), line(81)
    figure, (left, right) = panels(2)
    with torch.no_grad():
        draws = torch.stack([net.finite(1, 100 if quick else 500, seed=s)(x)[:, 0] for s in range(100)])
    spread = net.nngp(x).diagonal().sqrt()
    left.plot(x, draws.T, color=COLOURS[0], alpha=0.15, linewidth=0.7)
    left.plot([], [], color=COLOURS[0], label="100 networks, width 500")
    left.plot(x, torch.stack([2 * spread, -2 * spread], 1), color=COLOURS[1], label="_")
    left.plot([], [], color=COLOURS[1], label="two standard deviations, infinite width")
    label(left, "x", "f(x)", legend=True)
    points, widths = line(5), [16, 32, 64] if quick else [16, 32, 64, 128, 256, 512]
    exact, errors = net.ntk(points), []
    for width in widths:
        kernels = [empirical_ntk(net.finite(1, width, seed=s), points) for s in range(4 if quick else 100)]
        errors.append(float(torch.stack([(k - exact).norm() / exact.norm() for k in kernels]).square().mean().sqrt()))
    fit = law(right, widths, errors, "|K - K_inf| / |K_inf|", COLOURS[2])
    label(right, "width", "relative error of the tangent kernel", legend=True)
    mark(right, widths)
    inside = float((draws.abs() <= 2 * spread).double().mean())
    return Plate(figure, {"inside_two_sigma": inside, "kernel_error": told(fit, -0.5)})


def kernel_slices(quick: bool) -> Plate:
    """F5."""
    net, x, centre = InfiniteNetwork(2, "relu", bias_variance=0.1), line(61), line(1, 0.5, 0.5)
    widths = [4, 32] if quick else [4, 32, 256]
    figure, axes = panels(len(widths))
    numbers = {}
    for axis, width in zip(axes, widths, strict=True):
        slices = torch.stack([empirical_ntk(net.finite(1, width, seed=s), x, centre)[:, 0] for s in range(10)])
        axis.plot(x, slices.T, color=COLOURS[0], alpha=0.5, linewidth=0.8)
        axis.plot([], [], color=COLOURS[0], label="ten networks")
        axis.plot(x, net.ntk(x, centre), color=COLOURS[1], linewidth=2, label="infinite width")
        label(axis, "x", "K(x, 0.5)", f"width {width}", legend=True)
        axis.set_ylim(0.0, 16.0)
        numbers[f"spread_width_{width}"] = float((slices.std(0) / slices.mean(0)).mean())
    return Plate(figure, numbers)


def tanh_net(width: int) -> nn.Sequential:
    """One hidden layer, standard parametrisation of variance 1 / width."""
    model = nn.Sequential(nn.Linear(1, width), nn.Tanh(), nn.Linear(width, 1)).double()
    for layer in (model[0], model[2]):
        nn.init.normal_(layer.weight, std=layer.in_features**-0.5)  # type: ignore[union-attr, arg-type, operator]
        nn.init.normal_(layer.bias, std=1.0)  # type: ignore[union-attr, arg-type]
    return model


def asymptotics(quick: bool) -> Plate:
    """F8."""
    widths = [128, 256, 512] if quick else [128, 256, 512, 1024, 2048, 4096]
    x, y = torch.tensor([[-2.0], [0.5]]).double(), torch.tensor([[3.0], [-1.0]]).double()
    points = width_sweep(tanh_net, widths, x, y, seeds=range(1 if quick else 5))
    figure, axes = panels(3)
    numbers = {}
    laws = (("jacobian_norm", "|J|", 0.5), ("hessian_norm", "|Hess f|", 0.0), ("kappa", "kappa", -1.0))
    for axis, (key, name, expected), colour in zip(axes, laws, COLOURS, strict=False):
        fit = law(axis, [p.width for p in points], [getattr(p, key) for p in points], name, colour)
        numbers[key] = told(fit, expected)
        label(axis, "width", name, f"expected slope {expected:g}", legend=True)
        low, high = axis.get_ylim()
        mark(axis, widths)
        axis.set_ylim(min(low, high / 10), high * 1.3)  # at least a decade, or a constant would look like noise
    return Plate(figure, numbers)


def kernel_matrix(quick: bool) -> Plate:
    """Heat map, spectrum, random functions."""
    net, x = InfiniteNetwork(1, "erf", bias_variance=0.3), line(20 if quick else 60)
    kernel = empirical_ntk(net.finite(1, 256), x)
    figure, (left, middle, right) = panels(3)
    picture = left.imshow(kernel, extent=(-2, 2, 2, -2), cmap="viridis")
    figure.colorbar(picture, ax=left, label="K(x, x')")
    label(left, "x'", "x", "erf network of width 256")
    left.grid(visible=False)
    for matrix, name, colour in ((kernel, "width 256", COLOURS[0]), (net.ntk(x), "infinite width", COLOURS[1])):
        values = torch.linalg.eigvalsh(matrix).flip(0)[:20].clamp_min(1e-14)
        middle.semilogy(range(1, len(values) + 1), values, ".-", color=colour, label=name)
    label(middle, "index", "eigenvalue", "spectrum", legend=True)
    counts, errors = [16, 64, 256] if quick else [16, 64, 256, 1024, 4096], []
    exact = torch.exp(-torch.cdist(x, x).square() / 2)
    for count in counts:
        seeds = range(10 if quick else 100)
        found = [random_function_kernel(fourier_functions(1, count, seed=s), x) - exact for s in seeds]
        errors.append(float(torch.stack([f.norm() / exact.norm() for f in found]).square().mean().sqrt()))
    fit = law(right, counts, errors, "relative error", COLOURS[2])
    label(right, "random functions P", "error of (1/P) sum f f'", "law of large numbers", legend=True)
    return Plate(figure, {"random_functions": told(fit, -0.5)})
