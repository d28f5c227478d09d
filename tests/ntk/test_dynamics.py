"""Closed forms against matrix exponentials, dense solves, and the training of the linearised model itself."""

import math

import numpy as np
import pytest
import scipy.linalg
import torch
from gymnasium import spaces
from hypothesis import given
from hypothesis import strategies as st
from stable_baselines3.common.policies import ActorCriticPolicy
from torch import Tensor, nn

from nsrl.errors import NsrlError
from nsrl.ntk import OutputDynamics, descend, empirical_ntk, fit_slope, kernel_descent, linearize
from nsrl.projection import JacobianError, jacobian
from nsrl.rl.policies.actor_critic import policy_outputs
from tests.projection.builders import jacrev_matrix, mlp, normal

RATE = {"half_sum": lambda k: 1.0, "half_mean": lambda k: 1 / k, "mse": lambda k: 2 / k}
every_loss = pytest.mark.parametrize("loss", RATE)


def problem(width: int = 30) -> tuple[nn.Module, Tensor, Tensor, Tensor]:
    """A network, training inputs and targets (6 x 2), test inputs."""
    return mlp(3, width, 2).double(), normal(6, 3, seed=1), normal(6, 2, seed=2), normal(4, 3, seed=3)


def kernel_of(rank: int, size: int, seed: int = 0) -> Tensor:
    factor = normal(size, rank, seed=seed)
    return factor @ factor.T / rank


def dense_flow(kernel: Tensor, cross: Tensor, residual: Tensor, time: float) -> tuple[np.ndarray, np.ndarray]:
    """Residual at `time`, and displacement of the test outputs, by one exponential of the joint linear system."""
    k, m = kernel.shape[0], cross.shape[0]
    system = np.zeros((k + m, k + m))
    system[:k, :k], system[k:, :k] = -kernel.numpy(), -cross.numpy()
    state = scipy.linalg.expm(system * time) @ np.concatenate([residual.numpy(), np.zeros(m)])
    return state[:k], state[k:]


@every_loss
@pytest.mark.parametrize("rank", [6, 3], ids=["full rank", "singular"])
def test_gradient_flow_is_the_matrix_exponential(loss, rank):
    kernel, cross = kernel_of(rank, 6), normal(4, 6, seed=5)
    outputs, targets, test = normal(3, 2, seed=6), normal(3, 2, seed=7), normal(2, 2, seed=8)
    dynamics, times = OutputDynamics(kernel, outputs, targets, loss=loss), [0.0, 0.3, 5.0, 400.0]
    train_curve, test_curve = dynamics.train_outputs(times), dynamics.test_outputs(times, cross, test)
    assert train_curve.shape == (4, 3, 2) and test_curve.shape == (4, 2, 2)
    for index, time in enumerate(times):
        residual, moved = dense_flow(kernel, cross, (outputs - targets).flatten(), RATE[loss](6) * time)
        np.testing.assert_allclose((train_curve[index] - targets).flatten(), residual, rtol=1e-8, atol=1e-9)
        # a singular kernel keeps moving test points along its zero modes, by numbers that grow with time
        np.testing.assert_allclose((test_curve[index] - test).flatten(), moved, rtol=1e-8, atol=1e-7)


@every_loss
def test_finite_steps_are_the_training_of_the_linearised_model(loss):
    """Kernel gradient descent equals parameter gradient descent in the linear model, to 1e-10."""
    model, x, y, test = problem()
    kernel, cross = empirical_ntk(model, x), empirical_ntk(model, test, x)
    linear = linearize(model)
    dynamics = OutputDynamics(kernel, model(x), y, loss=loss)
    # above half of the largest stable rate the leading mode changes sign at every step
    rate = 0.8 * dynamics.largest_learning_rate
    measured = descend(linear, x, y, learning_rate=rate, steps=300, every=20, loss=loss, test_inputs=test)
    predicted = dynamics.train_outputs(measured.times, rate)
    elsewhere = dynamics.test_outputs(measured.times, cross, model(test).detach(), rate)
    assert measured.test_outputs is not None
    assert (predicted - measured.outputs).abs().max() < 1e-10
    assert (elsewhere - measured.test_outputs).abs().max() < 1e-10
    assert (measured.outputs[-1] - measured.outputs[0]).norm() > 1.0  # it did learn


def test_kernel_descent_is_parameter_descent_for_any_loss():
    model, x, _, test = problem()
    labels, rate = torch.tensor([0, 1, 1, 0, 1, 0]), 0.5
    linear = linearize(model)
    optimizer = torch.optim.SGD(linear.parameters(), lr=rate)
    curve, elsewhere = [linear(x).detach()], [linear(test).detach()]
    for _ in range(100):
        optimizer.zero_grad()
        nn.functional.cross_entropy(linear(x), labels).backward()
        optimizer.step()
        curve.append(linear(x).detach())
        elsewhere.append(linear(test).detach())
    ours, ours_elsewhere = kernel_descent(
        empirical_ntk(model, x),
        model(x),
        lambda f: nn.functional.cross_entropy(f, labels),
        learning_rate=rate,
        steps=100,
        cross_kernel=empirical_ntk(model, test, x),
        test_outputs=model(test).detach(),
    )
    assert ours_elsewhere is not None
    assert (ours - torch.stack(curve)).abs().max() < 1e-10
    assert (ours_elsewhere - torch.stack(elsewhere)).abs().max() < 1e-10
    assert (ours[-1] - ours[0]).norm() > 1.0


def test_kernel_descent_on_a_square_is_the_closed_form():
    kernel, outputs, targets = kernel_of(8, 6), normal(3, 2), normal(3, 2, seed=1)
    iterated, none = kernel_descent(
        kernel, outputs, lambda f: (f - targets).square().sum() / 2, learning_rate=0.05, steps=40
    )
    times = 0.05 * torch.arange(41, dtype=torch.float64)
    closed = OutputDynamics(kernel, outputs, targets).train_outputs(times, 0.05)
    assert none is None
    torch.testing.assert_close(iterated, closed, rtol=1e-11, atol=1e-11)


@given(st.integers(1, 8), st.floats(1e-3, 1.9), st.integers(0, 200), st.integers(0, 99))
def test_finite_steps_are_matrix_powers(rank, share, steps, seed):
    kernel, outputs, targets = kernel_of(rank, 5, seed), normal(5, 1, seed=seed), normal(5, 1, seed=seed + 1)
    dynamics = OutputDynamics(kernel, outputs, targets)
    rate = share * dynamics.largest_learning_rate / 2
    power = torch.linalg.matrix_power(torch.eye(5, dtype=torch.float64) - rate * kernel, steps)
    expected = targets + power @ (outputs - targets)
    ours = dynamics.train_outputs([steps * rate], rate)[0]
    torch.testing.assert_close(ours, expected, rtol=1e-8, atol=1e-8)


def test_each_mode_decays_at_its_own_eigenvalue():
    kernel, outputs, targets = kernel_of(8, 6), normal(6, 1), normal(6, 1, seed=1)
    dynamics = OutputDynamics(kernel, outputs, targets)
    times = torch.linspace(0.0, 3.0, 7, dtype=torch.float64)
    amplitudes = dynamics.residual_modes(times)
    slopes = -(amplitudes[-1] / amplitudes[0]).log() / 3.0
    expected = torch.as_tensor(scipy.linalg.eigvalsh(kernel.numpy())[::-1].copy())
    torch.testing.assert_close(slopes, expected, rtol=1e-8, atol=1e-10)
    torch.testing.assert_close(dynamics.rates, expected, rtol=1e-10, atol=1e-12)
    residuals = (dynamics.train_outputs(times) - targets).flatten(1)
    torch.testing.assert_close(residuals @ dynamics.modes, amplitudes, rtol=1e-10, atol=1e-12)


def test_infinite_time_interpolates_and_is_the_limit():
    model, x, y, test = problem()
    kernel, cross, start = empirical_ntk(model, x), empirical_ntk(model, test, x), model(test).detach()
    dynamics = OutputDynamics(kernel, model(x), y)
    assert dynamics.rank == 12
    torch.testing.assert_close(dynamics.train_outputs([math.inf])[0], y, rtol=1e-12, atol=1e-12)
    solved = scipy.linalg.solve(kernel.numpy(), (y - model(x).detach()).flatten().numpy(), assume_a="pos")
    final, late = dynamics.test_outputs([math.inf, 1e9], cross, start)
    np.testing.assert_allclose((final - start).flatten(), cross.numpy() @ solved, rtol=1e-6, atol=1e-8)
    torch.testing.assert_close(late, final, rtol=1e-6, atol=1e-8)


def test_infinite_time_is_the_minimum_norm_solution():
    """More rows than parameters, or repeated inputs: the least-squares displacement of least norm, by lstsq."""
    model, (x, y, test) = mlp(3, 2, 2).double(), problem()[1:]
    x, y = torch.cat([x, x]), torch.cat([y, normal(6, 2, seed=9)])
    J, J_test = jacrev_matrix(model, x), jacrev_matrix(model, test)
    displacement = np.linalg.lstsq(J.numpy(), (y - model(x).detach()).flatten().numpy(), rcond=1e-10)[0]
    dynamics = OutputDynamics(J @ J.T, model(x), y)
    assert dynamics.rank == np.linalg.matrix_rank(J.numpy()) < 24
    final = dynamics.test_outputs([math.inf], J_test @ J.T, model(test).detach())[0]
    expected = model(test).detach().flatten() + J_test @ torch.as_tensor(displacement)
    torch.testing.assert_close(final.flatten(), expected, rtol=1e-6, atol=1e-6)
    reached = model(x).detach().flatten() + J @ torch.as_tensor(displacement)
    torch.testing.assert_close(dynamics.train_outputs([math.inf])[0].flatten(), reached, rtol=1e-6, atol=1e-6)


def test_slow_modes_keep_their_digits():
    """At lambda t = 1e-14 a plain 1 - exp has no digit left."""
    kernel = torch.diag(torch.tensor([1.0, 1e-14], dtype=torch.float64))
    outputs, targets = torch.zeros(2, 1, dtype=torch.float64), torch.ones(2, 1, dtype=torch.float64)
    dynamics = OutputDynamics(kernel, outputs, targets)
    cross = torch.tensor([[0.0, 1.0]], dtype=torch.float64)
    for rate in (None, 0.5):
        moved = dynamics.test_outputs([1.0], cross, torch.zeros(1, 1), rate)
        assert float(moved) == pytest.approx(1.0, rel=1e-13)


def test_small_steps_tend_to_the_flow():
    kernel, outputs, targets = kernel_of(8, 6), normal(6, 1), normal(6, 1, seed=1)
    dynamics, rates = OutputDynamics(kernel, outputs, targets), [0.04, 0.02, 0.01, 0.005]
    flow = dynamics.train_outputs([2.0])
    gaps = [float((dynamics.train_outputs([2.0], rate) - flow).norm()) for rate in rates]
    assert fit_slope(rates, gaps).slope == pytest.approx(1.0, abs=0.1)


def test_a_wide_network_follows_its_prediction():
    """Predicted against measured curves on one clock: the gap to the real network shrinks with width."""
    gaps = []
    for width in (32, 2048):
        torch.manual_seed(1)
        model, x, y, _ = problem(width)
        dynamics = OutputDynamics(empirical_ntk(model, x), model(x), y, loss="mse")
        rate = 0.5 * dynamics.largest_learning_rate
        measured = descend(model, x, y, learning_rate=rate, steps=200, every=10, loss="mse")
        predicted = dynamics.train_outputs(measured.times, rate)
        gaps.append(float((predicted - measured.outputs).norm() / (measured.outputs - measured.outputs[0]).norm()))
    assert gaps[1] < 0.2 * gaps[0] and gaps[1] < 0.02, gaps


@every_loss
def test_measured_losses_are_in_the_loss_asked_for(loss):
    model, x, y, _ = problem()
    expected = {
        "half_sum": nn.MSELoss(reduction="sum")(model(x), y) / 2,
        "half_mean": nn.MSELoss()(model(x), y) / 2,
        "mse": nn.MSELoss()(model(x), y),
    }[loss]
    path = descend(model, x, y, learning_rate=1e-3, steps=7, every=3, loss=loss)
    assert float(path.losses[0]) == pytest.approx(expected.item())
    assert path.times.tolist() == pytest.approx([0.0, 0.003, 0.006, 0.007])
    assert float(path.losses[-1]) < float(path.losses[0]) and float(path.weight_changes[0]) == 0.0


def test_descend_is_torch_sgd():
    model, x, y, _ = problem()
    twin = mlp(3, 30, 2).double()
    twin.load_state_dict(model.state_dict())
    optimizer = torch.optim.SGD(twin.parameters(), lr=0.05)
    for _ in range(20):
        optimizer.zero_grad()
        nn.MSELoss()(twin(x), y).backward()
        optimizer.step()
    descend(model, x, y, learning_rate=0.05, steps=20, loss="mse")
    for ours, theirs in zip(model.parameters(), twin.parameters(), strict=True):
        torch.testing.assert_close(ours, theirs, rtol=1e-12, atol=1e-12)


def test_linearized_model_is_the_taylor_expansion():
    model, x = mlp(3, 5, 2).double(), normal(4, 3)
    model[0].weight.requires_grad_(False)
    linear, J = linearize(model), jacrev_matrix(model, x)
    step = normal(J.shape[1], seed=4)
    with torch.no_grad():
        torch.testing.assert_close(linear(x), model(x), rtol=0, atol=0)
        linear.displacement.copy_(step)
        expected = model(x) + (J @ step).view(4, 2)
        model[2].weight.zero_()  # the expansion keeps its own point
        torch.testing.assert_close(linear(x), expected, rtol=1e-12, atol=1e-12)
    gradient = torch.autograd.grad(linear(x).square().sum(), linear.displacement)[0]
    torch.testing.assert_close(gradient, 2 * J.T @ expected.flatten(), rtol=1e-10, atol=1e-10)
    kernel = empirical_ntk(linear, x)  # and it has the model's kernel, wherever it is
    torch.testing.assert_close(kernel, J @ J.T, rtol=1e-10, atol=1e-10)


def test_linearization_error_is_of_second_order():
    model, x = mlp(3, 8, 2).double(), normal(4, 3)
    linear, sizes, gaps = linearize(model), [0.2, 0.1, 0.05, 0.025], []
    direction, start = normal(linear.displacement.numel(), seed=5), nn.utils.parameters_to_vector(model.parameters())
    direction = direction / direction.norm()
    for size in sizes:
        with torch.no_grad():
            nn.utils.vector_to_parameters(start + size * direction, model.parameters())
            linear.displacement.copy_(size * direction)
            gaps.append(float((model(x) - linear(x)).norm()))
    assert fit_slope(sizes, gaps).slope == pytest.approx(2.0, abs=0.1)


def test_policies_of_agents_are_linearised():
    """SB3 registers its features extractor under two names, which `functional_call` alone would leave damaged."""
    policy = ActorCriticPolicy(
        spaces.Box(-1.0, 1.0, (3,), np.float32),
        spaces.Box(-1.0, 1.0, (2,), np.float32),
        lambda _: 1e-3,
        net_arch=[6],
        features_extractor_class=TrainableExtractor,
        ortho_init=False,
    )
    policy.set_training_mode(False)
    x = normal(4, 3, dtype=torch.float32)
    linear, J = linearize(policy, forward=policy_outputs), jacobian(policy, x, forward=policy_outputs)
    step = normal(J.shape[1], seed=1, dtype=torch.float32)
    with torch.no_grad():
        before = policy_outputs(policy, x)
        linear.displacement.copy_(step)
        for _ in range(2):
            expected = before + J.matvec(step).view_as(before)
            torch.testing.assert_close(linear(x), expected, rtol=1e-4, atol=1e-5)
        torch.testing.assert_close(policy_outputs(policy, x), before, rtol=0, atol=0)


def test_bad_input_is_refused():
    kernel, outputs, targets = kernel_of(8, 6), normal(6, 1), normal(6, 1, seed=1)
    dynamics = OutputDynamics(kernel, outputs, targets)
    with pytest.raises(NsrlError, match="does not belong"):
        OutputDynamics(kernel, outputs[:3], targets[:3])
    with pytest.raises(NsrlError, match="one of half_sum"):
        OutputDynamics(kernel, outputs, targets, loss="sum")  # type: ignore[arg-type]
    with pytest.raises(NsrlError, match="from 0 on"):
        dynamics.train_outputs([-1.0])
    with pytest.raises(NsrlError, match="whole numbers of steps"):
        dynamics.train_outputs([0.25], 0.1)
    with pytest.raises(NsrlError, match="does not converge"):
        dynamics.train_outputs([math.inf], 1.1 * dynamics.largest_learning_rate)
    with pytest.raises(NsrlError, match="test rows first"):
        dynamics.test_outputs([1.0], normal(6, 4), normal(4, 1))
    with pytest.raises(NsrlError, match="come together"):
        kernel_descent(kernel, outputs, torch.sum, learning_rate=0.1, steps=1, cross_kernel=kernel)
    model, x, y, _ = problem()
    with pytest.raises(NsrlError, match="targets have shape"):
        descend(model, x, y[:, :1], learning_rate=0.1, steps=1)
    with pytest.raises(NsrlError, match="lower the learning rate"):
        descend(model, x, y, learning_rate=1e200, steps=10)
    with pytest.raises(NsrlError, match="no trainable parameter"):
        linearize(mlp(2, 2).requires_grad_(False))
    with pytest.raises(JacobianError, match="train mode"):
        linearize(nn.Sequential(nn.Linear(3, 3), nn.BatchNorm1d(3)))


class TrainableExtractor(nn.Module):
    """A features extractor with weights of its own."""

    def __init__(self, observation_space: spaces.Box):
        super().__init__()
        self.features_dim = 4
        self.layer = nn.Linear(observation_space.shape[0], 4)

    def forward(self, observations: Tensor) -> Tensor:
        return torch.tanh(self.layer(observations))
