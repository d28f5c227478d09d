"""Trust-region gradient projection against its equations by NumPy and plain autograd."""

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch import nn

from nsrl.continual import OptimizerConfig, Task
from nsrl.continual.config import (
    BenchmarkSettings,
    ContinualConfig,
    ModelSettings,
    StrategySettings,
    TrainingSettings,
)
from nsrl.continual.runner import run_continual
from nsrl.errors import NsrlError
from tests.continual.learning import blobs, build, learn, network

# imported here, as it sets environment variables, which no test may do: the digits are its
pytest.importorskip("sklearn")

SGD = OptimizerConfig("sgd", lr=0.05)
FIRST, SECOND = Task("first", 0), Task("second", 1)
#: Round-off of steps of float32 through bases of float64.
CLOSE = 2e-6


def _strategy(**options):
    model = nn.Sequential(nn.Linear(12, 10, False), nn.ReLU(), nn.Linear(10, 3, False))
    return build("trgp", model, SGD, **{"energy": 0.9, "samples_per_task": 1000, "trust": 0.0, **options})


def test_a_tasks_inputs_are_the_strongest_directions_old_and_new():
    strategy = _strategy()
    learn(strategy, FIRST, blobs(0), epochs=2)
    old = strategy.bases["0"].numpy()
    loader = blobs(1)
    learn(strategy, SECOND, loader, epochs=2)
    X = loader.inputs.double().numpy().T
    rest = X - old @ old.T @ X
    left, singular, _ = np.linalg.svd(rest, full_matrices=False)
    strengths = [(float(((u @ X) ** 2).sum()), u) for u in old.T]
    strengths += list(zip(singular**2, left.T, strict=True))
    strengths.sort(key=lambda pair: -pair[0])
    held, span = 0.0, []
    while held < 0.9 * (X**2).sum():
        strength, u = strengths.pop(0)
        held += strength
        span.append(u)
    span = np.array(span).T
    found = strategy.bases["0"][:, strategy.spans[1, "0"]].numpy()
    assert np.allclose(found @ found.T, span @ span.T, atol=1e-5)
    whole = strategy.bases["0"].numpy()
    assert np.allclose(whole.T @ whole, np.eye(whole.shape[1]), atol=1e-10)


def test_a_step_moves_the_weights_outside_old_inputs_and_the_matrices_by_autograd():
    strategy = _strategy()
    learn(strategy, FIRST, blobs(0), epochs=3)
    loader = blobs(1)
    strategy.before_task(SECOND, loader)
    reused = strategy.reused[1]
    assert [reuse.weight for reuse in reused] == ["0.weight", "2.weight"]
    with torch.no_grad():
        for reuse in reused:
            reuse.scale.add_(0.1 * torch.randn_like(reuse.scale))
    weights = [strategy.model[place].weight.detach().clone().requires_grad_() for place in (0, 2)]
    scales = [reuse.scale.detach().clone().requires_grad_() for reuse in reused]
    U = [strategy.bases[name].float() for name in ("0", "2")]
    used = [W + W.detach() @ u @ (Q - torch.eye(len(Q))) @ u.T for W, Q, u in zip(weights, scales, U, strict=True)]
    loss = F.cross_entropy((loader.inputs @ used[0].T).relu() @ used[1].T, loader.targets)
    *of_weights, first, second = torch.autograd.grad(loss, [*weights, *scales])
    assert strategy.step((loader.inputs, loader.targets, 1)) == pytest.approx(float(loss.detach()), rel=1e-5)
    for place, W, g, u in zip((0, 2), weights, of_weights, U, strict=True):
        assert torch.allclose(strategy.model[place].weight, W - 0.05 * (g - g @ u @ u.T), atol=CLOSE)
    for reuse, Q, g in zip(reused, scales, (first, second), strict=True):
        assert torch.allclose(reuse.scale, Q - 0.05 * g, atol=CLOSE)


def test_related_tasks_are_those_that_hold_most_of_the_gradient():
    strategy = _strategy(related=1, energy=0.999)
    halves = [blobs(0), blobs(1)]
    halves[0].inputs[:, 6:] = halves[1].inputs[:, :6] = 0.0
    for index, loader in enumerate(halves):
        learn(strategy, Task(f"task {index}", index), loader, epochs=2)
    again = halves[0]  # the first task's inputs: it holds most of the gradient in the first layer
    strategy.before_task(Task("again", 2), again)
    span = strategy.bases["0"][:, strategy.spans[0, "0"]].float()
    first = [reuse for reuse in strategy.reused[2] if reuse.weight == "0.weight"]
    assert len(first) == 1 and torch.allclose(first[0].basis, span)
    assert not _related_at(trust=1.0)


def _related_at(trust: float) -> list:
    strategy = _strategy(trust=trust)
    learn(strategy, FIRST, blobs(0), epochs=2)
    strategy.before_task(SECOND, blobs(1))
    return strategy.reused[1]


def test_a_task_is_recalled_as_it_was_and_the_weights_come_back():
    strategy = build("trgp", network(width=24), OptimizerConfig("sgd", lr=0.02), energy=1 - 1e-6, samples_per_task=96)
    first, second = blobs(0, rank=3), blobs(1, rank=3)
    learn(strategy, FIRST, first, epochs=5)
    learn(strategy, SECOND, second, epochs=5)
    with strategy.recalled(SECOND):
        then = strategy.model(second.inputs).detach()
    plain = [p.detach().clone() for p in strategy.model.parameters()]
    learn(strategy, Task("third", 2), blobs(2, rank=3), epochs=5)
    moved = float((strategy.model[0].weight - plain[0]).detach().norm())
    with pytest.raises(KeyError), strategy.recalled(SECOND):
        now = strategy.model(second.inputs).detach()
        raise KeyError
    # a millionth of the inputs' energy is not protected: a thousandth of their size, in each of three layers
    assert moved > 0.0 and torch.allclose(now, then, atol=1e-2 * float(then.abs().max()))
    after = [p.detach().clone() for p in strategy.model.parameters()]
    with strategy.recalled(SECOND):
        pass
    assert all(torch.equal(a, b) for a, b in zip(after, strategy.model.parameters(), strict=True))


def test_the_runner_recalls_every_task_before_it_measures():
    training = TrainingSettings(epochs=2, learning_rate=1e-2)
    benchmark = BenchmarkSettings("permuted_digits", tasks=3)
    metrics = run_continual(ContinualConfig(benchmark, ModelSettings(hidden=[16]), training, StrategySettings("trgp")))
    assert metrics["memory_bytes"] > 0 and np.isfinite(metrics["matrix"]).all()
    with pytest.raises(NsrlError, match="trust is a share"):
        build("trgp", trust=1.5)
