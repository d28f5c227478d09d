"""Infinite-width kernels against quadrature, Monte-Carlo and finite networks; random functions."""

import math

import mpmath as mp
import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from scipy import special, stats

from nsrl.errors import NsrlError
from nsrl.ntk import (
    InfiniteNetwork,
    RandomFunctionModel,
    empirical_ntk,
    fit_slope,
    fourier_functions,
    random_function_kernel,
)
from nsrl.projection import jacobian
from tests.projection.builders import normal

PHI = {"relu": lambda t: np.maximum(t, 0.0), "erf": special.erf}
SLOPE = {"relu": lambda t: np.heaviside(t, 0.5), "erf": lambda t: 2 / math.sqrt(math.pi) * np.exp(-(t**2))}
activations = pytest.mark.parametrize("activation", ["relu", "erf"])


def expectation(function, covariance: np.ndarray) -> float:
    """E[function(u) function(v)] for centred normal (u, v), on a fine grid of independent normals."""
    grid = np.linspace(-9.0, 9.0, 1801)
    weights = stats.norm.pdf(grid) * (grid[1] - grid[0])
    root = np.linalg.cholesky(covariance)
    u = root[0, 0] * grid[:, None]
    v = root[1, 0] * grid[:, None] + root[1, 1] * grid[None, :]
    return float(weights @ (function(u) * function(v)) @ weights)


def recursion(network: InfiniteNetwork, x: np.ndarray, y: np.ndarray) -> tuple[float, float]:
    """NNGP and NTK of two inputs, by quadrature in every layer."""
    pair = np.stack([x, y])
    kernel = network.weight_variance * pair @ pair.T / x.size + network.bias_variance
    tangent = kernel[0, 1]
    for _ in range(network.hidden_layers):
        products = np.empty((2, 2))
        for i, j in ((0, 0), (0, 1), (1, 1)):
            block = np.array([[kernel[i, i], kernel[i, j]], [kernel[i, j], kernel[j, j]]]) + 1e-12 * np.eye(2)
            products[i, j] = products[j, i] = expectation(PHI[network.activation], block)
        slope = expectation(SLOPE[network.activation], kernel)
        kernel = network.weight_variance * products + network.bias_variance
        tangent = kernel[0, 1] + network.weight_variance * slope * tangent
    return float(kernel[0, 1]), float(tangent)


def exact(network: InfiniteNetwork, x: torch.Tensor, y: torch.Tensor) -> tuple[mp.mpf, mp.mpf]:
    """NNGP and NTK of two inputs by the closed forms, in 50 digits."""
    with mp.workdps(50):
        weight, bias = mp.mpf(network.weight_variance), mp.mpf(network.bias_variance)
        x, y = ([mp.mpf(entry) for entry in vector.tolist()] for vector in (x, y))

        def inner(u, v):
            return weight * mp.fdot(u, v) / len(u) + bias

        cross, left, right = inner(x, y), inner(x, x), inner(y, y)
        tangent = cross
        for _ in range(network.hidden_layers):
            if network.activation == "relu":
                norms = mp.sqrt(left * right)
                angle = mp.acos(min(mp.mpf(1), max(mp.mpf(-1), cross / norms)))
                products = norms * (mp.sin(angle) + (mp.pi - angle) * mp.cos(angle)) / (2 * mp.pi)
                slopes, left, right = (mp.pi - angle) / (2 * mp.pi), left / 2, right / 2
            else:
                spread = (1 + 2 * left) * (1 + 2 * right)
                products, slopes = mp.asin(2 * cross / mp.sqrt(spread)), 4 / mp.pi / mp.sqrt(spread - 4 * cross**2)
                products, left, right = (
                    2 / mp.pi * value
                    for value in (products, mp.asin(2 * left / (1 + 2 * left)), mp.asin(2 * right / (1 + 2 * right)))
                )
            cross, left, right = weight * products + bias, weight * left + bias, weight * right + bias
            tangent = cross + weight * slopes * tangent
        return cross, tangent


@activations
@pytest.mark.parametrize("layers", [1, 2, 6])
@pytest.mark.parametrize(("weight", "bias"), [(2.0, 0.0), (1.7, 0.3), (2.0, 1e-8), (300.0, 0.0)])
def test_nearly_parallel_inputs_keep_all_digits(activation, layers, weight, bias):
    """The arc cosine of a correlation that is 1 up to round-off has half of them, and so had the diagonal."""
    network = InfiniteNetwork(layers, activation, weight, bias)
    x, other, way = normal(1, 7), normal(1, 7, seed=1), normal(1, 7, seed=2)
    inputs = torch.cat(
        [x, other, (1 + 1e-9) * x, x + 1e-5 * way, x + 1e-11 * way, 2 * x, -x, -3 * other, 1e-7 * way - other]
    )
    for kernel, which in ((network.nngp(inputs), 0), (network.ntk(inputs), 1)):
        for i in range(len(inputs)):
            for j in range(i, len(inputs)):
                expected = exact(network, inputs[i], inputs[j])[which]
                error = abs(mp.mpf(float(kernel[i, j])) - expected)
                # a chain of some ten operations a layer; antiparallel inputs have tiny products of order-one terms
                assert error <= 100 * layers * 2.3e-16 * max(abs(expected), 1e-2 * float(kernel.abs().max()))


@pytest.mark.parametrize("layers", [1, 3, 8])
def test_the_diagonal_of_the_relu_kernel(layers):
    """With He's variance every layer keeps the norm and adds it once: (layers + 1) 2 |x|^2 / d, to the last digits."""
    x = normal(20, 6)
    expected = (layers + 1) * 2 * x.square().mean(1)
    torch.testing.assert_close(InfiniteNetwork(layers).ntk(x).diagonal(), expected, rtol=1e-14, atol=0)
    torch.testing.assert_close(InfiniteNetwork(layers).ntk(x, x.clone()).diagonal(), expected, rtol=1e-14, atol=0)


@activations
@pytest.mark.parametrize("layers", [0, 1, 3])
def test_kernels_are_the_recursion_by_quadrature(activation, layers):
    network = InfiniteNetwork(layers, activation, weight_variance=1.7, bias_variance=0.2)
    x = normal(2, 5)
    nngp, ntk = recursion(network, *x.numpy())
    assert network.nngp(x)[0, 1].item() == pytest.approx(nngp, rel=2e-3 if activation == "relu" else 1e-8)
    assert network.ntk(x)[0, 1].item() == pytest.approx(ntk, rel=5e-3 if activation == "relu" else 1e-8)


def test_one_relu_layer_is_the_arc_cosine_kernel():
    """Cho and Saul 2009: 1/pi |x| |y| (sin t + (pi - t) cos t) for weights of variance 2 and no biases."""
    x = normal(4, 3)
    norms = torch.outer(x.norm(dim=1), x.norm(dim=1)) / 3
    cosine = (x @ x.T / 3 / norms).clamp(-1, 1)
    angle = cosine.arccos()
    expected = 2 * norms / math.pi * (angle.sin() + (math.pi - angle) * cosine)
    torch.testing.assert_close(InfiniteNetwork(1, "relu", 2.0, 0.0).nngp(x), expected, rtol=1e-10, atol=1e-10)


@given(st.floats(0.1, 10.0), st.integers(1, 4), st.integers(0, 99))
def test_relu_kernels_without_bias_are_homogeneous(factor, layers, seed):
    network, x, y = InfiniteNetwork(layers), normal(3, 4, seed=seed), normal(2, 4, seed=seed + 1)
    for kernel in (network.nngp, network.ntk):
        torch.testing.assert_close(kernel(factor * x, y), factor * kernel(x, y), rtol=1e-9, atol=1e-9)


@activations
def test_kernels_are_symmetric_positive_and_consistent(activation):
    network, x = InfiniteNetwork(2, activation, 2.0, 0.1), normal(12, 3)
    x = torch.cat([x, torch.zeros(1, 3)])  # an input without a direction
    for kernel in (network.nngp(x), network.ntk(x)):
        torch.testing.assert_close(kernel, kernel.T, rtol=1e-12, atol=1e-12)
        assert torch.linalg.eigvalsh(kernel).min() > 0
    torch.testing.assert_close(network.ntk(x[:2], x[3:7]), network.ntk(x)[:2, 3:7], rtol=1e-12, atol=1e-12)


@activations
def test_outputs_at_initialisation_are_the_gaussian_process(activation):
    """Covariance of 1000 networks of width 64; the standard error of an entry is K sqrt(2 / 1000) = 4.5 % at most."""
    network, x = InfiniteNetwork(2, activation, 1.5, 0.3), normal(3, 4)
    with torch.no_grad():
        draws = torch.stack([network.finite(4, 64, seed=seed)(x).squeeze(1) for seed in range(1000)])
    nngp = network.nngp(x)
    error = (draws.T @ draws / len(draws) - nngp) / torch.outer(nngp.diag(), nngp.diag()).sqrt()
    assert error.abs().max() < 5 * math.sqrt(2 / 1000)


@activations
def test_empirical_kernel_converges_as_one_over_root_width(activation):
    network, x = InfiniteNetwork(2, activation, 2.0, 0.1), normal(5, 3)
    limit, widths = network.ntk(x), [16, 64, 256, 1024]
    errors = []
    for width in widths:
        kernels = [empirical_ntk(network.finite(3, width, seed=seed), x) for seed in range(6)]
        errors.append(math.sqrt(sum(float((k - limit).norm() ** 2) for k in kernels) / len(kernels)) / limit.norm())
    slope = fit_slope(widths, errors)
    assert -0.62 < slope.slope < -0.38, f"{slope}: {errors}"
    assert errors[-1] < 0.15


def test_outputs_decouple_in_infinite_width():
    network, x = InfiniteNetwork(1, "relu"), normal(4, 3)
    kernel = empirical_ntk(network.finite(3, 8192, outputs=2), x)
    expected = torch.kron(network.ntk(x), torch.eye(2, dtype=torch.float64))
    assert (kernel - expected).norm() < 0.05 * expected.norm()


def test_finite_networks_keep_their_layers_factored():
    J = jacobian(InfiniteNetwork(2, "erf", 1.0, 0.1).finite(3, 16), normal(4, 3))
    assert J.recomputed == () and {type(block).__name__ for block in J.blocks} == {"LinearBlock"}


@pytest.mark.parametrize(
    ("options", "sentence"),
    [
        ({"activation": "tanh"}, "closed form"),
        ({"hidden_layers": -1}, "not -1"),
        ({"weight_variance": 0.0}, "positive"),
    ],
)
def test_bad_networks_are_refused(options, sentence):
    with pytest.raises(NsrlError, match=sentence):
        InfiniteNetwork(**options)


@pytest.mark.parametrize("pair", [(normal(3, 2), normal(3, 4)), (normal(3), None), (normal(0, 2), None)])
def test_bad_inputs_are_refused(pair):
    with pytest.raises(NsrlError, match="same d > 0"):
        InfiniteNetwork().ntk(*pair)


def test_random_functions_obey_the_law_of_large_numbers():
    """1/P sum f_p f_p tends to the Gaussian kernel, the error as P^(-1/2)."""
    x, counts = normal(6, 2), [64, 256, 1024, 4096]
    limit = torch.exp(-torch.cdist(x, x).square() / (2 * 1.5**2))
    errors = []
    for count in counts:
        kernels = [random_function_kernel(fourier_functions(2, count, 1.5, seed=seed), x) for seed in range(10)]
        errors.append(math.sqrt(sum(float((k - limit).square().mean()) for k in kernels) / len(kernels)))
    assert fit_slope(counts, errors).slope == pytest.approx(-0.5, abs=0.1)


def test_the_tangent_kernel_of_random_functions_is_their_kernel_everywhere():
    functions, x = fourier_functions(2, 40), normal(5, 2)
    model = RandomFunctionModel(functions, 40)
    expected = random_function_kernel(functions, x[:2], x)
    torch.testing.assert_close(empirical_ntk(model, x[:2], x), expected, rtol=1e-12, atol=1e-12)
    with torch.no_grad():
        model.readout.weight.mul_(-3.0)
    torch.testing.assert_close(empirical_ntk(model, x[:2], x), expected, rtol=1e-12, atol=1e-12)
    with pytest.raises(NsrlError, match=r"shape \(5, P\)"):
        random_function_kernel(lambda inputs: inputs[:, 0], x)
