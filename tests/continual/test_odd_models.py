"""Models whose weights act outside their layers, or on some samples only, against dense algebra."""

import math

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from nsrl.continual import MultiHead, Task
from nsrl.continual.budget import KLBudget
from nsrl.continual.budget_options import KLBudgetOptions
from nsrl.continual.memory import Memory
from nsrl.continual.strategies.ewc import fisher_diagonal
from nsrl.errors import NsrlError
from nsrl.projection.budget.multiplier import Multiplier
from tests.continual.learning import CLASSES, Batches, blobs, build, learn
from tests.projection.builders import Net, rows_matrix

FIRST, SECOND = Task("first", 0), Task("second", 1)


def outside(net: Net, x: Tensor) -> Tensor:
    """The head's weight is used once more; only for some samples."""
    hidden = torch.tanh(net.a(x))
    return net.b(hidden) + torch.where(x[:, :1] > 0.5, hidden.sin() @ net.b.weight.T, 0.0)


def experts(net: Net, x: Tensor) -> Tensor:
    rows = x[:, 0] > 0
    hidden = x.new_zeros(len(x), 16)
    for layer, chosen in ((net.a, rows), (net.c, ~rows)):
        if chosen.any():
            hidden = hidden.index_put((chosen.nonzero().flatten(),), torch.tanh(layer(x[chosen])))
    return net.b(hidden)


def hooked(module: Net) -> Net:
    module.a.register_forward_hook(lambda layer, args, output: 1.5 * output)
    return module


def scaled(net: Net, x: Tensor) -> Tensor:
    return net.scale.exp() * net.b(torch.tanh(net.a(x)))


def build_model(name: str) -> nn.Module:
    torch.manual_seed(0)
    layers = {"a": nn.Linear(12, 16), "b": nn.Linear(16, CLASSES)}
    if name == "experts":
        return Net(experts, c=nn.Linear(12, 16), **layers)
    if name == "logit scale":
        return Net(scaled, scale=nn.Parameter(torch.tensor(0.3)), **layers)
    if name == "weight norm":
        layers["a"] = nn.utils.weight_norm(layers["a"])
        return Net(lambda net, x: net.b(torch.tanh(net.a(x))), **layers)
    if name == "hook":
        return hooked(Net(lambda net, x: net.b(torch.tanh(net.a(x))), **layers))
    return Net(outside, **layers)


every_model = pytest.mark.parametrize("name", ["outside", "experts", "hook", "weight norm", "logit scale"])
pytestmark = [
    pytest.mark.filterwarnings(f"ignore:{text}")
    for text in (".*weight_norm", ".*no constraint covers", ".*no layer features cover", "There is a performance drop")
]


def whitened(model: nn.Module, inputs: Tensor) -> Tensor:
    """Rows of the softmax's Fisher information, (N, O, P): a symmetric root of diag(p) - p p^T times the Jacobian."""
    rows = rows_matrix(model.double(), inputs.double()).view(len(inputs), CLASSES, -1)
    p = model(inputs.double()).softmax(-1).detach()
    model.float()
    values, vectors = torch.linalg.eigh(torch.diag_embed(p) - p.unsqueeze(2) * p.unsqueeze(1))
    root = vectors @ torch.diag_embed(values.clamp_min(0.0).sqrt()) @ vectors.mT
    return torch.einsum("nro,nop->nrp", root, rows)


@every_model
def test_fisher_information_over_several_batches(name):
    """264 samples are two batches, of which the first has other experts and branches than the second."""
    model, loader = build_model(name), blobs(0, samples=264)
    order = loader.inputs[:, 0].argsort()
    loader = Batches(loader.inputs[order], loader.targets[order])
    found = fisher_diagonal(model, FIRST, loader, samples=264)
    expected = whitened(model, loader.inputs).square().sum((0, 1)) / 264
    # float32 factors: eps times sqrt(264) terms, relative to the whole
    assert float((found.double() - expected).norm()) <= 1e-5 * float(expected.norm())


@every_model
def test_stored_gradients_of_later_tasks(name):
    """After two tasks, a projected step leaves the stored logits of both where they are, to first order."""
    model = build_model(name)
    strategy = build("ogd", model, samples_per_task=24)
    loaders = [blobs(0), blobs(1)]
    for task, loader in zip((FIRST, SECOND), loaders, strict=True):
        learn(strategy, task, loader, epochs=1)
    parts = strategy._projector.jacobian.parts
    assert len(parts) == 2
    displacement = torch.randn(sum(p.numel() for p in model.parameters()), generator=torch.Generator().manual_seed(1))
    kept = strategy._project(displacement)
    # the second part was captured at the present weights
    memory = Memory(24, 0)
    memory.add(SECOND, loaders[1])
    rows = rows_matrix(model.double(), memory.inputs.double()).view(24, CLASSES, -1)
    model.float()
    rows = rows[torch.arange(24), memory.targets]
    assert float((parts[1].dense().double() - rows).norm()) <= 1e-5 * float(rows.norm())
    assert float((rows @ kept.double()).norm()) <= 1e-4 * float(rows.norm() * displacement.norm())


@every_model
def test_the_budgets_linearisation(name):
    model = build_model(name)
    budget = KLBudget(model, KLBudgetOptions(states_per_task=20))
    for index in range(2):
        budget.retain(Task(f"task {index}", index), blobs(index))
    for states in (8, 8, 31):
        indices = budget._mixed(states).roll(3)
        rows = budget._linearise(indices).jacobian
        inputs = budget.retained.memory.inputs[indices]
        expected = whitened(model, inputs).flatten(0, 1)
        expected = expected.T @ expected / states
        found = rows.dense().double()
        # the metric's root is another one, so it is the form J^T J that has to agree (up to the metric's tempering)
        error = float((found.T @ found - expected).norm())
        assert error <= 0.05 * float(expected.norm())
        outputs = model(inputs)
        torch.testing.assert_close(rows.outputs, outputs.detach())
        seeds = budget.retained.metric.seeds(outputs.detach()).double()
        plain = rows_matrix(model.double(), inputs.double()).view(states, CLASSES, -1)
        model.float()
        exact = torch.einsum("nro,nop->nrp", seeds, plain).flatten(0, 1) / math.sqrt(states)
        assert float((found - exact).norm()) <= 1e-5 * float(exact.norm())


@every_model
@pytest.mark.parametrize("method", ["kl_budget", "ewc", "ogd", "features"])
def test_strategies_run(name, method):
    strategy = build(method, build_model(name))
    for task in (FIRST, SECOND):
        learn(strategy, task, blobs(task.index), epochs=2)
    for parameter in strategy.model.parameters():
        assert torch.isfinite(parameter).all()
    if method == "kl_budget":
        assert strategy.diagnostics()["preserved_kl"] <= strategy.options.kl_budget * (1 + 1e-6)


# -- what later tasks must not undo -----------------------------------------------------------------------------------


def with_bilinear() -> MultiHead:
    class Trunk(nn.Module):
        def __init__(self):
            super().__init__()
            self.mix, self.layer = nn.Bilinear(12, 12, 8), nn.Linear(8, 8)

        def forward(self, x: Tensor) -> Tensor:
            return torch.tanh(self.layer(torch.tanh(self.mix(x, x))))

    return MultiHead(Trunk(), 8, [CLASSES, CLASSES])


def test_a_head_that_a_later_task_does_not_use_keeps_its_columns():
    """The bilinear weight is frozen after the first task, which moves all columns behind it."""
    torch.manual_seed(0)
    strategy = build("gpm", with_bilinear())
    tasks = [Task("a", 0, head=0), Task("b", 1, head=1)]
    with pytest.warns(UserWarning, match="trunk.mix.weight"):
        learn(strategy, tasks[0], blobs(0, rank=4), epochs=1)
    learn(strategy, tasks[1], blobs(1, rank=4), epochs=1)
    constraint = strategy.constraint
    part = next(part for part in constraint.layers if part.layer.name == "heads.0")
    assert part.layer.weight == constraint.columns["heads.0.weight"]
    displacement = torch.randn(constraint.width, generator=torch.Generator().manual_seed(0))
    kept = constraint.applied(displacement)[slice(*constraint.columns["heads.0.weight"])].view(CLASSES, 8)
    assert float((kept.double() @ part.basis).norm()) <= 1e-5 * float(displacement.norm())


class Late(nn.Module):
    """Uses a weight outside its layer for large inputs only."""

    def __init__(self):
        super().__init__()
        self.a, self.b = nn.Linear(12, 8), nn.Linear(8, CLASSES)

    def forward(self, x: Tensor) -> Tensor:
        hidden = torch.tanh(self.a(x))
        out = self.b(hidden)
        return out + F.linear(hidden.sin(), self.b.weight) if bool((x.abs() > 50.0).any()) else out


@pytest.mark.parametrize("method", ["gpm", "features"])
def test_protection_that_would_be_lost_in_silence_is_refused(method):
    strategy = build(method, Late())
    learn(strategy, FIRST, blobs(0), epochs=1)
    far = blobs(1)
    with pytest.raises((NsrlError, ValueError), match="outside their own layer"):
        learn(strategy, SECOND, Batches(40.0 * far.inputs, far.targets), epochs=1)


@pytest.mark.parametrize(
    "multiplier",
    [Multiplier(0.01, 0.1, 0.1), Multiplier(0.01, 0.1, 0.1, start=1.0, floor=1e-3, ceiling=30.0, relative=False)],
)
def test_a_multiplier_outlives_a_divergence(multiplier):
    """One minibatch of a policy that has diverged must not leave NaN behind for good."""
    before = multiplier.update(0.02)
    assert multiplier.update(math.nan) > before  # as far over the budget as can be
    assert math.isfinite(multiplier.update(0.005))
    assert multiplier.update(math.inf) > 0.0 and math.isfinite(multiplier.update(0.005))
