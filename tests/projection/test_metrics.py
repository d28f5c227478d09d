"""KL, gradient and Hessian of every policy head against `torch.distributions` and autograd."""

import math

import pytest
import torch
import torch.distributions as D
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from nsrl.projection.metrics import Bernoulli, Categorical, Gaussian, HeteroscedasticGaussian
from tests.projection.builders import normal

CLOSE = {"rtol": 1e-7, "atol": 1e-8}
seeds = st.integers(0, 10_000)
spreads = st.sampled_from([0.0, 0.3, 2.0, 6.0])


def gaussian(size: int, spread: float, seed: int) -> Gaussian:
    return Gaussian(spread * normal(size, seed=seed + 1) / 4, spread * normal(size, seed=seed + 2) / 4)


HEADS = {
    "discrete": (4, lambda spread, seed: Categorical((4,), 0.0)),
    "two actions": (2, lambda spread, seed: Categorical((2,), 0.0)),
    "multi-discrete": (6, lambda spread, seed: Categorical((3, 1, 2), 0.0)),
    "multi-binary": (3, lambda spread, seed: Bernoulli(0.0)),
    "box": (3, lambda spread, seed: gaussian(3, spread, seed)),
    "box, gSDE": (4, lambda spread, seed: HeteroscedasticGaussian()),
}
every_head = pytest.mark.parametrize("name", HEADS)


def build(name: str, spread: float, seed: int, samples: int = 5):
    width, metric = HEADS[name]
    reference, outputs = spread * normal(samples, width, seed=seed), spread * normal(samples, width, seed=seed + 9)
    if name == "box, gSDE":  # logs of standard deviations, as those of "box"
        reference[:, width // 2 :] /= 4
        outputs[:, width // 2 :] /= 4
    return metric(spread, seed), reference, outputs


def torch_divergence(metric, reference: Tensor, outputs: Tensor) -> Tensor:
    """KL(pi_ref || pi) per state, by `torch.distributions` alone."""
    if isinstance(metric, Bernoulli):
        return D.kl_divergence(D.Bernoulli(logits=reference), D.Bernoulli(logits=outputs)).sum(-1)
    if isinstance(metric, Gaussian):
        scales = metric.reference_log_std.exp(), metric.log_std.exp()
        return D.kl_divergence(D.Normal(reference, scales[0]), D.Normal(outputs, scales[1])).sum(-1)
    if isinstance(metric, HeteroscedasticGaussian):
        (mean, log), (now, log_now) = reference.chunk(2, -1), outputs.chunk(2, -1)
        return D.kl_divergence(D.Normal(mean, log.exp()), D.Normal(now, log_now.exp())).sum(-1)
    pairs = zip(reference.split(metric.sizes, -1), outputs.split(metric.sizes, -1), strict=True)
    return sum(D.kl_divergence(D.Categorical(logits=a), D.Categorical(logits=b)) for a, b in pairs)


def hessians(metric, reference: Tensor, outputs: Tensor) -> Tensor:
    """Hessian of each state's KL in its outputs, (N, O, O), by `torch.func.hessian` of the sum (states do not mix)."""
    full = torch.func.hessian(lambda out: torch_divergence(metric, reference, out).sum())(outputs)
    return torch.stack([full[n, :, n] for n in range(len(outputs))])


@every_head
@given(spread=spreads, seed=seeds)
def test_divergence(name, spread, seed):
    metric, reference, outputs = build(name, spread, seed)
    result = metric.divergence(reference, outputs)
    assert result.shape == (5,)
    torch.testing.assert_close(result, torch_divergence(metric, reference, outputs), **CLOSE)
    torch.testing.assert_close(
        metric.divergence(outputs, outputs) - metric.divergence(reference, reference),
        torch.zeros(5, dtype=torch.float64),
        **CLOSE,
    )


@every_head
def test_divergence_is_evaluated_in_double_precision(name):
    """A KL of 1e-9 is invisible in float32 arithmetic."""
    metric, reference, _ = build(name, 2.0, 3)
    if isinstance(metric, Gaussian):
        metric = Gaussian(metric.log_std.float(), metric.log_std.float())
    reference = reference.float()
    outputs = reference + 1e-4 * normal(*reference.shape, seed=5, dtype=torch.float32)
    result = metric.divergence(reference, outputs)
    assert result.dtype == torch.float64
    if isinstance(metric, Gaussian):
        metric = Gaussian(metric.log_std.double(), metric.log_std.double())
    expected = torch_divergence(metric, reference.double(), outputs.double())
    assert 0 < float(expected.mean()) < 1e-7
    torch.testing.assert_close(result, expected, rtol=1e-6, atol=1e-15)


@every_head
@given(spread=spreads, seed=seeds)
def test_residual_gives_the_gradient(name, spread, seed):
    metric, reference, outputs = build(name, spread, seed)
    outputs.requires_grad_(True)
    (gradient,) = torch.autograd.grad(torch_divergence(metric, reference, outputs).sum(), outputs)
    outputs = outputs.detach()
    result = torch.einsum("nro,nr->no", metric.seeds(outputs), metric.residual(reference, outputs))
    torch.testing.assert_close(result, gradient, **CLOSE)
    torch.testing.assert_close(metric.slope(reference, outputs), gradient, **CLOSE)


@every_head
@given(spread=spreads, seed=seeds)
def test_seeds_give_the_hessian_at_the_reference(name, spread, seed):
    metric, _, outputs = build(name, spread, seed)
    result = metric.seeds(outputs).mT @ metric.seeds(outputs)
    torch.testing.assert_close(result, hessians(metric, outputs, outputs), **CLOSE)


@given(spread=spreads, seed=seeds)
def test_categorical_seeds_give_the_covariance_at_the_current_outputs(spread, seed):
    """diag(p) - p p^T per head, zero between heads, whatever the reference (DESIGN, trap 3)."""
    metric = Categorical((3, 1, 2), 0.0)
    outputs = spread * normal(4, 6, seed=seed)
    blocks = [h.softmax(-1) for h in outputs.split([3, 1, 2], -1)]
    expected = torch.stack(
        [torch.block_diag(*[torch.diag(p[n]) - torch.outer(p[n], p[n]) for p in blocks]) for n in range(4)]
    )
    result = metric.seeds(outputs).mT @ metric.seeds(outputs)
    torch.testing.assert_close(result, expected, **CLOSE)
    torch.testing.assert_close(result, hessians(metric, normal(4, 6, seed=seed + 1), outputs), **CLOSE)


@pytest.mark.parametrize("sizes", [(2,), (5,), (2, 3), (4, 1, 2)])
def test_categorical_rows_are_independent(sizes):
    """One row less than logits a head: a common shift of the logits changes nothing."""
    metric = Categorical(sizes)
    outputs = normal(6, sum(sizes), seed=2)
    rows = metric.seeds(outputs)
    assert rows.shape == (6, sum(sizes) - len(sizes), sum(sizes))
    assert metric.residual(normal(6, sum(sizes)), outputs).shape == rows.shape[:2]
    assert bool((torch.linalg.matrix_rank(rows) == rows.shape[1]).all())


@given(tempering=st.floats(0.001, 1.0), spread=spreads, seed=seeds)
def test_tempering_mixes_in_the_uniform_distribution(tempering, spread, seed):
    outputs = spread * normal(4, 5, seed=seed)
    metric = Categorical((3, 2), tempering)
    p = [(1 - tempering) * h.softmax(-1) + tempering / h.shape[-1] for h in outputs.split([3, 2], -1)]
    expected = torch.stack(
        [torch.block_diag(*[torch.diag(q[n]) - torch.outer(q[n], q[n]) for q in p]) for n in range(4)]
    )
    torch.testing.assert_close(metric.seeds(outputs).mT @ metric.seeds(outputs), expected, **CLOSE)


@given(tempering=st.floats(0.001, 1.0), spread=spreads, seed=seeds)
@pytest.mark.parametrize("kind", ["categorical", "bernoulli"])
def test_tempering_leaves_divergence_and_gradient_alone(kind, tempering, spread, seed):
    metric = Categorical((3, 2), tempering) if kind == "categorical" else Bernoulli(tempering)
    reference, outputs = spread * normal(4, 5, seed=seed), spread * normal(4, 5, seed=seed + 1)
    outputs.requires_grad_(True)
    expected = torch_divergence(metric, reference, outputs)
    (gradient,) = torch.autograd.grad(expected.sum(), outputs)
    outputs = outputs.detach()
    torch.testing.assert_close(metric.divergence(reference, outputs), expected.detach(), **CLOSE)
    result = torch.einsum("nro,nr->no", metric.seeds(outputs), metric.residual(reference, outputs))
    torch.testing.assert_close(result, gradient, **CLOSE)


@pytest.mark.parametrize("metric", [Categorical((3,)), Bernoulli()])
def test_saturated_logits_stay_finite_with_the_default_tempering(metric):
    outputs = torch.tensor([[90.0, -90.0, 0.0], [-200.0, 200.0, 199.0]])
    other = outputs.flip(0)
    for value in (metric.seeds(outputs), metric.residual(other, outputs), metric.divergence(other, outputs)):
        assert torch.isfinite(value).all()


@pytest.mark.parametrize("metric", [Categorical((3,), 0.0), Bernoulli(0.0)], ids=["categorical", "bernoulli"])
def test_saturated_logits_stay_finite_without_tempering(metric):
    outputs = torch.tensor([[90.0, -90.0, 0.0], [-200.0, 200.0, 199.0]])
    for value in (metric.seeds(outputs), metric.residual(outputs, outputs)):
        assert torch.isfinite(value).all()


def test_gaussian_hessian_of_the_mean_holds_away_from_the_reference():
    metric, reference, outputs = build("box", 2.0, 4)
    result = metric.seeds(outputs).mT @ metric.seeds(outputs)
    torch.testing.assert_close(result, hessians(metric, reference, outputs), **CLOSE)


@given(spread=spreads, seed=seeds)
def test_log_std_residual_gives_the_gradient_of_the_mean_divergence(spread, seed):
    """The rows of a log standard deviation are sqrt(2): S^T rho = sqrt(2) rho must be dKL / dlog_std."""
    metric, reference, outputs = build("box", spread, seed)
    log_std = metric.log_std.clone().requires_grad_(True)
    loss = torch_divergence(Gaussian(log_std, metric.reference_log_std), reference, outputs).mean()
    (gradient,) = torch.autograd.grad(loss, log_std)
    torch.testing.assert_close(math.sqrt(2.0) * metric.log_std_residual(reference, outputs), gradient, **CLOSE)


def test_log_std_rows_give_the_hessian_at_the_reference():
    reference, log_std = normal(5, 3), normal(3, seed=1)

    def mean_divergence(value: Tensor) -> Tensor:
        return torch_divergence(Gaussian(value, log_std), reference, reference).mean()

    expected = torch.func.hessian(mean_divergence)(log_std)
    torch.testing.assert_close(math.sqrt(2.0) ** 2 * torch.eye(3, dtype=torch.float64), expected, **CLOSE)


def test_seeds_and_residuals_carry_no_graph_from_log_std():
    log_std = torch.zeros(2, requires_grad=True)
    metric, outputs = Gaussian(log_std, torch.zeros(2)), torch.zeros(3, 2)
    assert not metric.seeds(outputs).requires_grad
    assert not metric.residual(outputs, outputs).requires_grad
    assert not metric.log_std_residual(outputs, outputs).requires_grad


@pytest.mark.parametrize(
    "metric,reference,outputs,expected",
    [
        (Categorical((3,)), [[1.0, 0, 0], [0, 2, 1]], [[0.2, 0.1, 0], [0, 1, 1.5]], 0.5),
        (Categorical((2, 2)), [[1.0, 0, 1, 0], [1, 0, 1, 0]], [[2.0, 0, 0, 1], [3, 2, 1, 0]], 0.5),
        (Bernoulli(), [[1.0, -1], [1, 1]], [[0.1, -3], [1, -1]], 0.5),
        (Gaussian(torch.zeros(2), torch.zeros(2)), [[0.0, 0], [0, 0]], [[0.4, -0.5], [0.6, 0]], 0.5),
        (Gaussian(torch.zeros(1), torch.full((1,), -1.0)), [[0.0], [0.0]], [[0.18], [0.19]], 0.5),
        (HeteroscedasticGaussian(), [[0.0, -1.0], [0.0, 0.0]], [[0.19, 5.0], [0.19, 5.0]], 0.5),
    ],
)
def test_agreement(metric, reference, outputs, expected):
    assert metric.agreement(torch.tensor(reference), torch.tensor(outputs)) == expected


@pytest.mark.parametrize("name", HEADS)
def test_second_order_model_of_the_divergence(name):
    """KL - 1/2 |rho|^2 + 1/2 |rho + S dz|^2 misses the true KL by a cubic term only, near the reference."""
    metric, reference, _ = build(name, 1.0, 7)
    here, step = reference + 1e-2 * normal(*reference.shape, seed=1), normal(*reference.shape, seed=2)
    rho = metric.residual(reference, here)
    errors = []
    for size in (2e-2, 1e-2):
        model = metric.divergence(reference, here) - 0.5 * rho.square().sum(-1)
        model = model + 0.5 * (rho + torch.einsum("nro,no->nr", metric.seeds(here), size * step)).square().sum(-1)
        errors.append(float((model - metric.divergence(reference, here + size * step)).abs().max()))
    assert errors[1] < errors[0] / 5 or errors[0] < 1e-12
