"""Laziness against dense derivatives; the exponents of its sweeps; Fourier features."""

import copy

import numpy as np
import pytest
import torch
from scipy import stats
from torch import Tensor, nn
from torch.func import functional_call, hessian

from nsrl.errors import NsrlError
from nsrl.ntk import (
    FourierFeatures,
    InfiniteNetwork,
    ScaledModel,
    descend,
    empirical_ntk,
    fit_slope,
    frequency_spectrum,
    kappa,
    kernel_drift,
    relative_weight_change,
    scale_sweep,
    width_sweep,
)
from tests.projection.builders import jacrev_matrix, mlp, normal


def dense_hessian(model: nn.Module, inputs: Tensor) -> Tensor:
    """Second derivatives of all outputs, (N O, P, P), by `torch.func.hessian`."""
    names, parameters = zip(*((n, p.detach()) for n, p in model.named_parameters() if p.requires_grad), strict=True)
    sizes = [p.numel() for p in parameters]

    def outputs(vector: Tensor) -> Tensor:
        pieces = vector.split(sizes)
        values = {n: piece.view(p.shape) for n, piece, p in zip(names, pieces, parameters, strict=True)}
        return functional_call(model, values, (inputs,)).flatten()

    return hessian(outputs)(torch.cat([p.flatten() for p in parameters]))


def operator_norm(tensor: Tensor, starts: int = 20) -> float:
    """Sup of |T[u, v]| over unit u, v, by alternating least squares on the dense tensor from many starts."""
    best = 0.0
    for seed in range(starts):
        v = normal(tensor.shape[2], seed=seed)
        for _ in range(100):
            matrix = tensor @ (v / v.norm())
            v = torch.linalg.svd(matrix, full_matrices=False)[2][0]
        best = max(best, float(torch.linalg.matrix_norm(tensor @ v, 2)))
    return best


def test_kappa_of_one_output_is_dense_algebra():
    """For one output of one sample the norm of the Hessian is its largest absolute eigenvalue."""
    model, x, y = mlp(3, 6, 1).double(), normal(1, 3), torch.tensor([[2.0]], dtype=torch.float64)
    found = kappa(model, x, y, tolerance=1e-8, iterations=1000)
    curvature = float(torch.linalg.eigvalsh(dense_hessian(model, x)[0]).abs().max())
    slope = float(jacrev_matrix(model, x).norm())
    residual = (model(x) - y).norm().item()
    assert found.converged
    assert found.hessian_norm == pytest.approx(curvature, rel=1e-6)
    assert found.jacobian_norm == pytest.approx(slope, rel=1e-6)
    assert found.residual_norm == pytest.approx(residual)
    assert found.kappa == pytest.approx(residual * curvature / slope**2, rel=1e-6)


def test_kappa_of_many_outputs_is_the_norm_of_the_tensor():
    model, x, y = mlp(2, 4, 2).double(), normal(3, 2), normal(3, 2, seed=1)
    found = kappa(model, x, y, tolerance=1e-8, iterations=1000, starts=4)
    assert found.hessian_norm == pytest.approx(operator_norm(dense_hessian(model, x)), rel=1e-5)
    assert found.jacobian_norm == pytest.approx(float(torch.linalg.matrix_norm(jacrev_matrix(model, x), 2)), rel=1e-5)


def test_kappa_is_cut_off_honestly():
    found = kappa(mlp(2, 4, 2).double(), normal(3, 2), normal(3, 2, seed=1), tolerance=1e-14, iterations=2)
    assert not found.converged


def test_kappa_of_a_linear_model_is_zero():
    found = kappa(nn.Linear(3, 2).double(), normal(4, 3), normal(4, 2, seed=1))
    assert found.kappa == 0.0 and found.converged


def test_kappa_falls_as_one_over_the_output_scale():
    model, x, y, alphas = mlp(3, 6, 1).double(), normal(5, 3), normal(5, 1, seed=1), [1.0, 30.0, 1000.0]
    kappas = [kappa(ScaledModel(model, alpha), x, y, tolerance=1e-2, starts=1).kappa for alpha in alphas]
    assert fit_slope(alphas, kappas).slope == pytest.approx(-1.0, abs=1e-6)
    assert bool((ScaledModel(model, 7.0)(x) == 0).all())


def test_width_exponents():
    """In the standard parametrisation kappa ~ 1 / width, |J| ~ width^(1/2), |Hess f| ~ width^0."""
    points = width_sweep(
        lambda width: nn.Sequential(nn.Linear(2, width), nn.Tanh(), nn.Linear(width, 1)).double(),
        [128, 512, 2048],
        normal(4, 2),
        torch.ones(4, 1).double(),
        seeds=range(2),
    )
    widths = [point.width for point in points]
    assert len(points) == 6 and all(point.converged for point in points)
    for name, expected in (("kappa", -1.0), ("jacobian_norm", 0.5), ("hessian_norm", 0.0)):
        slope = fit_slope(widths, [getattr(point, name) for point in points])
        assert abs(slope.slope - expected) < 0.05, f"{name}: {slope}"
        assert expected - 0.1 < slope.low and slope.high < expected + 0.1, f"{name}: {slope}"


def test_scale_exponents():
    """Drift of the kernel, change of the weights and distance from the linearisation all fall as 1 / alpha."""
    points = scale_sweep(
        lambda: mlp(2, 32, 1).double(),
        [100.0, 300.0, 1000.0, 3000.0],
        normal(5, 2),
        normal(5, 1, seed=1),
        learning_rate=0.02,
        steps=150,
        seeds=range(2),
    )
    for seed in range(2):  # networks differ in the prefactor
        own = [point for point in points if point.seed == seed]
        for name in ("drift", "weight_change", "linear_gap"):
            slope = fit_slope([point.alpha for point in own], [getattr(point, name) for point in own])
            assert abs(slope.slope + 1.0) < 0.05, f"{name}: {slope}"
            assert -1.1 < slope.low and slope.high < -0.9, f"{name}: {slope}"
    assert points[0].test_loss is None


def teacher(inputs: Tensor) -> Tensor:
    """Two ReLU neurons in ten dimensions."""
    first, second = torch.relu(inputs[:, 0]), torch.relu(inputs[:, 1])
    return (first - second).unsqueeze(1)


def test_lazy_is_not_better():
    """Chizat et al. 2019, figure 2: a student that may learn features beats its own kernel on new data."""
    train, test = normal(150, 10, seed=1), normal(500, 10, seed=2)
    points = scale_sweep(
        lambda: mlp(10, 40, 1, activation=nn.ReLU).double(),
        [1.0, 100.0],
        train,
        teacher(train),
        learning_rate=0.3,
        steps=600,
        test_inputs=test,
        test_targets=teacher(test),
        loss="half_mean",
        seeds=[0],
    )
    rich, lazy = points
    assert rich.drift > 100 * lazy.drift
    assert rich.test_loss is not None and lazy.test_loss is not None
    assert rich.test_loss < 0.5 * lazy.test_loss, points


def test_change_and_drift_are_relative_norms():
    model, x, y = mlp(3, 5, 1).double(), normal(4, 3), normal(4, 1, seed=1)
    origin, before = copy.deepcopy(model), empirical_ntk(model, x)
    path = descend(model, x, y, learning_rate=0.1, steps=10)
    flat, start = (nn.utils.parameters_to_vector(m.parameters()).detach() for m in (model, origin))
    expected = float((flat - start).norm() / start.norm())
    assert relative_weight_change(model, origin) == pytest.approx(expected)
    assert float(path.weight_changes[-1]) == pytest.approx(expected)
    after = empirical_ntk(model, x)
    assert kernel_drift(after, before) == pytest.approx(np.linalg.norm(after - before) / np.linalg.norm(before))
    with pytest.raises(NsrlError, match="equal ones"):
        kernel_drift(after, before[:2])
    with pytest.raises(NsrlError, match="copy of the model"):
        relative_weight_change(model, mlp(3, 6, 1))


def test_slope_is_scipys_with_students_interval():
    x, y = np.array([1.0, 2.0, 4.0, 8.0]), np.array([1.1, 1.9, 4.3, 7.7])
    found = fit_slope(x, y)
    design = np.stack([np.log(x), np.ones(4)], 1)
    (slope, intercept), rest, *_ = np.linalg.lstsq(design, np.log(y), rcond=None)
    error = np.sqrt(rest[0] / 2 * np.linalg.inv(design.T @ design)[0, 0])
    assert found.slope == pytest.approx(slope) and found.intercept == pytest.approx(intercept)
    assert found.high - found.slope == pytest.approx(error * stats.t.ppf(0.975, 2))
    assert found.slope - found.low == pytest.approx(error * stats.t.ppf(0.975, 2)) and found.points == 4
    for bad in ([1.0, 2.0], [1.0, 0.0, 2.0, 3.0], [1.0, np.nan, 2.0, 3.0]):
        with pytest.raises(NsrlError):
            fit_slope(x[: len(bad)], bad)


def test_a_seed_is_a_network():
    def sweep() -> list:
        return width_sweep(lambda width: mlp(2, width, 1).double(), [4, 8], normal(3, 2), normal(3, 1), seeds=[3])

    state = torch.get_rng_state()
    assert sweep() == sweep()
    assert torch.equal(torch.get_rng_state(), state)


def test_bad_models_are_refused():
    x = normal(3, 2)
    with pytest.raises(NsrlError, match="targets have shape"):
        kappa(mlp(2, 4, 1).double(), x, normal(3, 2))
    dead = mlp(2, 4, 1, activation=nn.ReLU, bias=False).double()
    with torch.no_grad():
        dead[0].weight.zero_()
        dead[2].weight.zero_()
    with pytest.raises(NsrlError, match="Jacobian is zero"):
        kappa(dead, x, normal(3, 1))


GRID = torch.arange(32, dtype=torch.float64).unsqueeze(1) / 32


def test_fourier_features_make_the_kernel_stationary():
    """Its eigenvalues are then the discrete Fourier transform of one row, two for each inner frequency."""
    features = FourierFeatures.decaying(16, 1.0)(GRID)
    kernel = InfiniteNetwork(2, "erf").ntk(features)
    shifted = torch.roll(kernel, (1, 1), (0, 1))
    torch.testing.assert_close(shifted, kernel, rtol=1e-10, atol=1e-10)
    found = frequency_spectrum(kernel)
    torch.testing.assert_close(found, torch.fft.rfft(kernel[0]).real, rtol=1e-9, atol=1e-9)
    twice = torch.cat([found, found[1:-1]]).sort().values
    torch.testing.assert_close(twice, torch.linalg.eigvalsh(kernel), rtol=1e-8, atol=1e-8)


def test_fourier_features_widen_the_spectrum():
    """Tancik et al. 2020, figure 3: slower decaying amplitudes raise high frequencies against low ones."""
    spectra = {}
    for power in (0.0, 1.0, 2.0):
        torch.manual_seed(0)
        network = nn.Sequential(FourierFeatures.decaying(16, power), *mlp(32, 256, 1, activation=nn.ReLU).double())
        spectra[power] = frequency_spectrum(empirical_ntk(network, GRID))
    plain = frequency_spectrum(empirical_ntk(mlp(1, 256, 1, activation=nn.ReLU).double(), GRID))
    share = {power: float(values[8:].sum() / values.sum()) for power, values in spectra.items()}
    assert share[0.0] > 2 * share[1.0] > 4 * share[2.0]
    assert share[0.0] > 10 * float(plain[8:].sum() / plain.sum())


def test_random_fourier_features_estimate_a_gaussian_kernel():
    x, scale = normal(5, 2), 0.3
    features = FourierFeatures.random(2, 20000, scale)(x)
    limit = 2 * torch.exp(-2 * (np.pi * scale * torch.cdist(x, x)).square())
    torch.testing.assert_close(features @ features.T, limit, rtol=0.0, atol=5 * 2 / 20000**0.5)
    torch.testing.assert_close(features.square().sum(1), torch.full((5,), 2.0, dtype=torch.float64))


def test_bad_fourier_features_are_refused():
    for amplitudes in (normal(3), normal(4, 1)):
        with pytest.raises(NsrlError, match=r"\(4, 2\) and"):
            FourierFeatures(normal(4, 2), amplitudes)
    with pytest.raises(NsrlError, match="square kernel"):
        frequency_spectrum(normal(4, 2))
