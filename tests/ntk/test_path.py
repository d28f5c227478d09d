"""Path kernels against training itself: the model is trained, and its predictions rebuilt from the path."""

import copy
import math

import pytest
import torch
from torch import Tensor, nn
from torch.func import functional_call, jacrev

from nsrl.errors import NsrlError
from nsrl.ntk.path import (
    KernelMonitor,
    PathRecorder,
    PathResult,
    loss_path_kernel,
    path_kernel,
    tracin,
    two_minima,
)
from nsrl.ntk.slopes import fit_slope
from nsrl.projection import JacobianError
from tests.projection.builders import normal

X = torch.linspace(-1, 1, 8, dtype=torch.float64).unsqueeze(1)
Y = torch.cat([torch.sin(3 * X), X**2], 1)
QUERIES = torch.linspace(-1.2, 1.2, 5, dtype=torch.float64).unsqueeze(1)


def net(activation: type[nn.Module] = nn.Tanh, seed: int = 0, dtype: torch.dtype = torch.float64) -> nn.Sequential:
    torch.manual_seed(seed)
    return nn.Sequential(nn.Linear(1, 24), activation(), nn.Linear(24, 2)).to(dtype)


def half_sum(outputs: Tensor, targets: Tensor) -> Tensor:
    return 0.5 * (outputs - targets).square().sum()


def train(model: nn.Module, optimizer: torch.optim.Optimizer, steps: int, recorders=(), batches=None, loss=half_sum):
    for step in range(steps):
        indices = torch.arange(len(X)) if batches is None else batches[step % len(batches)]
        for recorder in recorders:
            recorder.expect(indices)
        optimizer.zero_grad()
        loss(model(X[indices]), Y[indices]).backward()
        optimizer.step()


def curved() -> nn.Sequential:
    """Strongly curved, and far from the edge of stability at the learning rates used: errors show their order."""
    model = nn.Sequential(nn.Linear(1, 6), nn.Tanh(), nn.Linear(6, 2)).double()
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.normal_(generator=generator)
    return model


def certificate(model: nn.Module, rule: str, rate: float, time: float = 0.05) -> float:
    optimizer = torch.optim.SGD(model.parameters(), lr=rate)
    recorder = PathRecorder(model, optimizer, QUERIES, rule=rule)
    train(model, optimizer, round(time / rate))
    return float(recorder.result().certificate.max())


@pytest.mark.parametrize(("rule", "order"), [("left", 1), ("midpoint", 2), ("gauss2", 4)])
def test_the_error_falls_with_the_learning_rate_as_the_rule_promises(rule, order):
    rates = [0.01, 0.005, 0.0025, 0.00125]
    slope = fit_slope(rates, [certificate(curved(), rule, rate) for rate in rates])
    # the whole interval, not the fitted value alone
    assert order - 0.3 < slope.low and slope.high < order + 0.3, slope


def test_three_nodes_are_exact_on_a_smooth_net():
    assert certificate(net(), "gauss3", 0.01) < 1e-12


def test_kinks_stop_every_rule():
    model = net(nn.ReLU)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.02)
    recorder = PathRecorder(model, optimizer, QUERIES)
    train(model, optimizer, 40)
    assert 1e-9 < float(recorder.result().certificate.max()) < 1e-2


OPTIMIZERS = {
    "sgd": lambda p: torch.optim.SGD(p, lr=0.02),
    "momentum": lambda p: torch.optim.SGD(p, lr=0.01, momentum=0.8),
    "dampening": lambda p: torch.optim.SGD(p, lr=0.01, momentum=0.8, dampening=0.5),
    "nesterov": lambda p: torch.optim.SGD(p, lr=0.01, momentum=0.8, nesterov=True),
    "adam": lambda p: torch.optim.Adam(p, lr=0.01),
    "amsgrad": lambda p: torch.optim.Adam(p, lr=0.01, amsgrad=True),
    "rmsprop": lambda p: torch.optim.RMSprop(p, lr=0.001),
    "decay": lambda p: torch.optim.AdamW(p, lr=0.01, weight_decay=0.3),
    "adagrad": lambda p: torch.optim.Adagrad(p, lr=0.01),
}


def recorded(name: str, memory: int, batches=None, steps: int = 15) -> PathResult:
    model = net()
    optimizer = OPTIMIZERS[name](model.parameters())
    recorder = PathRecorder(model, optimizer, QUERIES, samples=len(X), memory=memory)
    train(model, optimizer, steps, [recorder], batches)
    return recorder.result()


@pytest.mark.parametrize("name", OPTIMIZERS)
def test_contributions_and_rest_sum_to_the_prediction_of_any_optimizer(name):
    result = recorded(name, memory=1, batches=[torch.tensor([5, 0, 3]), torch.tensor([1, 7]), torch.tensor([2, 4, 6])])
    rebuilt = result.initial + result.contributions.sum(-1) + result.rest if result.totals else result.predicted
    torch.testing.assert_close(rebuilt, result.final, rtol=1e-11, atol=1e-12)
    assert not result.outside.any()


@pytest.mark.parametrize("name", ["sgd", "rmsprop"])
def test_without_memory_in_the_optimizer_there_is_no_rest(name):
    result = recorded(name, memory=1)
    assert float(result.rest.abs().max()) < 1e-13


@pytest.mark.parametrize("name", ["momentum", "dampening", "nesterov", "adam", "amsgrad"])
def test_the_rest_is_the_optimizers_memory(name):
    """With as many batches kept as there are steps, momentum's whole share finds its owners."""
    batches = [torch.tensor([5, 0, 3]), torch.tensor([1, 7]), torch.tensor([2, 4, 6])]
    short, whole = recorded(name, 1, batches), recorded(name, 15, batches)
    moved = float((short.final - short.initial).abs().max())
    assert float(short.rest.abs().max()) > 0.1 * moved
    assert float(whole.rest.abs().max()) < 1e-11 * moved + 1e-12


def test_weight_decay_belongs_to_nobody():
    result = recorded("decay", memory=15)
    model = net()
    optimizer = torch.optim.AdamW(model.parameters(), lr=0.01, weight_decay=0.0)
    free = PathRecorder(model, optimizer, QUERIES, samples=len(X), memory=15)
    train(model, optimizer, 15, [free])
    assert float(result.rest.abs().max()) > 1e-3 > 1e-11 > float(free.result().rest.abs().max())


def test_one_step_of_gradient_descent_against_jacrev():
    """The left rule's contribution of sample m is -lr K(x, x_m) (f(x_m) - y_m), with K from torch.func."""
    model = net()
    optimizer = torch.optim.SGD(model.parameters(), lr=1e-2)
    values = {name: p.detach().clone() for name, p in model.named_parameters()}

    def rows(inputs):
        pieces = jacrev(lambda v: functional_call(model, v, inputs))(values)
        return torch.cat([piece.flatten(2) for piece in pieces.values()], 2)

    kernel = torch.einsum("nop,bqp->nobq", rows(QUERIES), rows(X))
    cotangents = model(X).detach() - Y
    recorder = PathRecorder(model, optimizer, QUERIES, rule="left", samples=len(X), weightings={"K": path_kernel})
    train(model, optimizer, 1, [recorder])
    result = recorder.result()
    torch.testing.assert_close(result.contributions, -1e-2 * torch.einsum("nobq,bq->nob", kernel, cotangents))
    torch.testing.assert_close(result.totals["K"], 1e-2 * kernel.permute(0, 1, 3, 2))


def test_tracin_with_the_left_rule_is_the_sum_over_checkpoints():
    model, indices = net(), [torch.tensor([5, 0, 3]), torch.tensor([1, 7])]
    targets = torch.ones(len(QUERIES), 2, dtype=torch.float64)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.02)
    recorder = PathRecorder(
        model,
        optimizer,
        QUERIES,
        rule="left",
        samples=len(X),
        weightings={"tracin": tracin},
        query_slope=lambda f: f - targets,
    )
    expected = torch.zeros(len(QUERIES), len(X), dtype=torch.float64)

    def gradient(inputs, wanted):
        grads = torch.autograd.grad(half_sum(twin(inputs), wanted), list(twin.parameters()))
        return torch.cat([g.flatten() for g in grads])

    twin = net()
    for step in range(6):
        train(model, optimizer, 1, [recorder], [indices[step % 2]])
        for m in indices[step % 2]:
            theirs = gradient(X[m : m + 1], Y[m : m + 1])
            for n in range(len(QUERIES)):
                expected[n, m] += 0.02 * gradient(QUERIES[n : n + 1], targets[n : n + 1]) @ theirs
        twin.load_state_dict(model.state_dict())
    torch.testing.assert_close(recorder.result().totals["tracin"], expected)


def test_exact_tracin_sums_to_the_fall_of_the_loss():
    model = net()
    targets = torch.ones(len(QUERIES), 2, dtype=torch.float64)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.02)
    recorder = PathRecorder(
        model, optimizer, QUERIES, samples=len(X), weightings={"tracin": tracin}, query_slope=lambda f: f - targets
    )
    before = 0.5 * (model(QUERIES).detach() - targets).square().sum(1)
    train(model, optimizer, 20, [recorder])
    fall = before - 0.5 * (model(QUERIES).detach() - targets).square().sum(1)
    torch.testing.assert_close(recorder.result().totals["tracin"].sum(1), fall, rtol=1e-10, atol=1e-12)


def test_the_loss_path_kernel_of_full_batch_training_is_symmetric_with_the_left_rule():
    model = net()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.05)
    mean = lambda f, y: half_sum(f, y) / len(f)  # noqa: E731
    options = {"samples": len(X), "weightings": {"lpk": loss_path_kernel}, "query_slope": lambda f: f - Y}
    recorders = [PathRecorder(model, optimizer, X, rule=rule, **options) for rule in ("left", "gauss3")]
    train(model, optimizer, 10, recorders, loss=mean)
    left, exact = (recorder.result().totals["lpk"] for recorder in recorders)
    torch.testing.assert_close(left, left.T)
    assert float(torch.linalg.eigvalsh(left).min()) > -1e-12
    # Bell et al.: the exact discrete kernel holds the training gradient at the start of the step
    assert float((exact - exact.T).norm() / exact.norm()) > 1e-3


def test_training_is_bit_for_bit_what_it_is_without_the_recorder():
    plain, watched = net(), net()
    optimizers = [torch.optim.Adam(m.parameters(), lr=0.01) for m in (plain, watched)]
    recorder = PathRecorder(watched, optimizers[1], QUERIES, samples=len(X), residuals=True)
    train(plain, optimizers[0], 10)
    train(watched, optimizers[1], 10, [recorder])
    assert all(torch.equal(p, q) for p, q in zip(plain.parameters(), watched.parameters(), strict=True))


def test_what_moves_the_parameters_between_steps_is_outside():
    model = net()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.01)
    recorder = PathRecorder(model, optimizer, QUERIES, samples=len(X))
    train(model, optimizer, 3, [recorder])
    before = model(QUERIES).detach()
    with torch.no_grad():
        model[0].weight.mul_(0.9)
    change = model(QUERIES).detach() - before
    train(model, optimizer, 3, [recorder])
    result = recorder.result()
    torch.testing.assert_close(result.outside, change, rtol=1e-8, atol=1e-10)
    torch.testing.assert_close(result.initial + result.contributions.sum(-1) + result.outside, result.final)


def test_clipped_gradients_still_have_owners():
    model = net()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.02)
    recorder = PathRecorder(model, optimizer, QUERIES, samples=len(X))
    for _ in range(5):
        optimizer.zero_grad()
        half_sum(model(X), Y).backward()
        nn.utils.clip_grad_norm_(model.parameters(), 0.1)
        optimizer.step()
    result = recorder.result()
    assert float(result.rest.abs().max()) < 1e-8 * float(result.steps.abs().max())


def test_another_loss_is_the_rest_and_leaves_the_samples_their_own():
    """What the samples did is -lr K (f - y) whatever else was differentiated with them."""
    results = []
    for strength in (0.0, 0.5):
        model = net()
        optimizer = torch.optim.SGD(model.parameters(), lr=0.02)
        recorder = PathRecorder(model, optimizer, QUERIES, rule="left", samples=len(X))
        penalty = strength * sum(p.square().sum() for p in model.parameters())
        (half_sum(model(X), Y) + penalty).backward()
        optimizer.step()
        results.append(recorder.result())
    alone, joined = results
    torch.testing.assert_close(joined.contributions, alone.contributions)
    assert float(joined.rest.abs().max()) > 1e-3 > 1e-12 > float(alone.rest.abs().max())


def test_the_residual_of_a_step_is_of_second_order():
    sizes, residuals = [], []
    for rate in (0.04, 0.02, 0.01, 0.005):
        model = net()
        optimizer = torch.optim.SGD(model.parameters(), lr=rate)
        recorder = PathRecorder(model, optimizer, QUERIES, rule="left", residuals=True)
        train(model, optimizer, 1)
        (record,) = recorder.result().history
        sizes.append(record.displacement)
        residuals.append(record.residual)
    assert fit_slope(sizes, residuals).slope == pytest.approx(2.0, abs=0.1)


def test_across_a_barrier_the_linear_term_is_no_small_part():
    calm, wild = two_minima(0.02), two_minima(0.3)
    assert not calm.crossed and wild.crossed
    for run in (calm, wild):
        torch.testing.assert_close(
            torch.tensor(run.residuals), torch.tensor(run.displacements).square(), rtol=1e-6, atol=1e-12
        )
        assert run.exact_error < 1e-12
    assert calm.left_error < 0.2 < 0.5 < wild.left_error


def test_float32_models_are_certified_too():
    model = net(dtype=torch.float32)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.02)
    recorder = PathRecorder(model, optimizer, QUERIES.float(), rule="gauss2")
    for _ in range(20):
        optimizer.zero_grad()
        half_sum(model(X.float()), Y.float()).backward()
        optimizer.step()
    assert float(recorder.result().certificate.max()) < 1e-4


def test_a_detached_recorder_stays_where_it_was():
    model = net()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.02)
    recorder = PathRecorder(model, optimizer, QUERIES, samples=len(X))
    train(model, optimizer, 2, [recorder])
    recorder.detach()
    steps = recorder._steps.clone()
    train(model, optimizer, 2)
    assert torch.equal(recorder._steps, steps)


class Noisy(nn.Module):
    def __init__(self):
        super().__init__()
        self.layer = nn.Linear(1, 2, dtype=torch.float64)

    def forward(self, inputs: Tensor) -> Tensor:
        return self.layer(inputs) + torch.randn(len(inputs), 2, dtype=torch.float64)


def test_bad_input_is_told():
    model = net()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.02)
    with pytest.raises(NsrlError, match="rule must be one of"):
        PathRecorder(model, optimizer, QUERIES, rule="simpson")
    with pytest.raises(NsrlError, match="optimizer does not have"):
        PathRecorder(net(seed=1), optimizer, QUERIES)
    with pytest.raises(JacobianError, match="dropout"):
        bad = nn.Sequential(nn.Linear(1, 2), nn.Dropout(0.5)).double()
        recorder = PathRecorder(bad, torch.optim.SGD(bad.parameters(), lr=0.1), QUERIES)
        train(bad, recorder.optimizer, 1)
    recorder = PathRecorder(model, optimizer, QUERIES, samples=3)
    with pytest.raises(NsrlError, match="indices from 0 to 2, not 8 with 3 among them"):
        train(model, optimizer, 1, [recorder])
    with pytest.raises(NsrlError, match="-1 among them"):
        train(model, optimizer, 1, [recorder], [torch.tensor([0, -1])])
    recorder.detach()
    with pytest.raises(NsrlError, match="no trainable parameter head"):
        PathRecorder(model, optimizer, QUERIES, parameters=["0.weight", "head"])
    with pytest.raises(NsrlError, match="no queries"):
        PathRecorder(model, optimizer, QUERIES[:0])
    with pytest.raises(JacobianError, match="random"):
        KernelMonitor(Noisy(), X).measure()
    with pytest.raises(NsrlError, match="targets have shape"):
        KernelMonitor(model, X, targets=Y[:3]).measure()
    with pytest.raises(JacobianError, match="batch normalisation"):
        KernelMonitor(nn.Sequential(nn.Linear(1, 2), nn.BatchNorm1d(2)).double(), X).measure()
    with pytest.raises(NsrlError, match="query_slope"):
        recorder = PathRecorder(model, optimizer, QUERIES, samples=8, weightings={"t": tracin})
        train(model, optimizer, 1)


def test_the_monitor_measures_drift_and_kappa(tmp_path):
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator
    from torch.utils.tensorboard import SummaryWriter

    model = net()
    monitor = KernelMonitor(model, X, targets=Y)
    with SummaryWriter(tmp_path) as writer:
        first = monitor.write(writer, 0)
        train(model, torch.optim.SGD(model.parameters(), lr=0.02), 30)
        later = monitor.write(writer, 30)
    assert first.drift == 0.0 < later.drift and later.kappa is not None and math.isfinite(later.kappa)
    assert 0 < first.effective_dimension <= first.rank <= 16
    events = EventAccumulator(str(tmp_path), size_guidance={"images": 0}).Reload()
    tags = {"ntk/rank", "ntk/effective_dim", "ntk/lambda_max", "ntk/drift", "ntk/kappa"}
    assert tags <= set(events.Tags()["scalars"])
    assert events.Scalars("ntk/lambda_max")[1].value == pytest.approx(float(later.spectrum[0]))
    assert len(events.Images("ntk/spectrum")) == 2


@torch.no_grad()
def dense_kernel(model: nn.Module, inputs: Tensor, names: tuple[str, ...] | None = None) -> Tensor:
    """J J^T / N by `torch.func.jacrev`."""
    values = {name: p.detach().clone() for name, p in model.named_parameters() if names is None or name in names}
    pieces = jacrev(lambda v: functional_call(model, v, inputs))(values)
    J = torch.cat([piece.flatten(2) for piece in pieces.values()], 2).flatten(0, 1)
    return J @ J.T / len(inputs)


@pytest.mark.parametrize("names", [None, ("2.weight", "2.bias")])
def test_the_monitors_numbers_are_those_of_the_dense_kernel(names):
    model = net()
    monitor = KernelMonitor(model, X, damping=1e-2, parameters=names)
    before = dense_kernel(model, X, names)
    monitor.measure()
    train(model, torch.optim.SGD(model.parameters(), lr=0.02), 30)
    found, after = monitor.measure(), dense_kernel(model, X, names)
    values = torch.linalg.eigvalsh(after).flip(0)
    torch.testing.assert_close(found.spectrum[: found.rank], values[: found.rank], rtol=1e-6, atol=1e-12)
    assert found.drift == pytest.approx(float((after - before).norm() / before.norm()), rel=1e-8)
    damping = 1e-2 * torch.linalg.eigvalsh(before)[-1]
    assert found.effective_dimension == pytest.approx(float((values / (values + damping)).sum()), rel=1e-6)


def test_the_monitors_kappa_is_in_the_parameters_asked_for():
    """In its last layer alone a network is linear."""
    assert KernelMonitor(net(), X, targets=Y, parameters=("2.weight", "2.bias")).measure().kappa == 0.0
    assert KernelMonitor(net(), X, targets=Y).measure().kappa > 1e-3


class Switching(nn.Module):
    """Samples are put in order by their first hidden unit, so the order changes while the module learns."""

    def __init__(self):
        super().__init__()
        self.a, self.b = nn.Linear(3, 6), nn.Linear(6, 2)

    def forward(self, inputs: Tensor) -> Tensor:
        hidden = torch.tanh(self.a(inputs))
        order = hidden[:, 0].argsort()
        return self.b(hidden[order])[order.argsort()]


def test_a_module_that_uses_its_layers_differently_from_step_to_step():
    """What the first linearisation found does not hold later: contributions and path are those of a plain MLP."""
    torch.manual_seed(0)
    switching = Switching().double()
    plain = nn.Sequential(copy.deepcopy(switching.a), nn.Tanh(), copy.deepcopy(switching.b))
    x, y, queries = normal(6, 3), normal(6, 2, seed=1), normal(4, 3, seed=2)
    # the first batch of either kind is in order already
    x = x[torch.tanh(switching.a(x))[:, 0].argsort()]
    queries = queries[torch.tanh(switching.a(queries))[:, 0].argsort()]
    found = []
    for module in (switching, plain):
        optimizer = torch.optim.SGD(module.parameters(), lr=0.3)
        recorder = PathRecorder(module, optimizer, queries, samples=len(x))
        for step in range(6):
            optimizer.zero_grad()
            order = torch.arange(6) if step == 0 else torch.randperm(6, generator=torch.Generator().manual_seed(step))
            recorder.expect(order)
            half_sum(module(x[order]), y[order]).backward()
            optimizer.step()
        found.append(recorder.result())
    torch.testing.assert_close(found[0].predicted, found[1].predicted, rtol=1e-9, atol=1e-9)
    torch.testing.assert_close(found[0].contributions, found[1].contributions, rtol=1e-9, atol=1e-9)
