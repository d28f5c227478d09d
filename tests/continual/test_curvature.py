"""The quadratic model of the KL on all inputs: factors, implicit steps and gradient against dense algebra."""

import pytest
import torch
import torch.nn.functional as F
from torch import nn
from torch.func import functional_call, jacrev, vmap

from nsrl.continual import MultiHead, OptimizerConfig, Task
from nsrl.continual.budget import KLBudget
from nsrl.continual.budget_options import KLBudgetOptions
from nsrl.continual.curvature import Curvature, step_length
from nsrl.continual.objectives import Classification
from tests.continual.learning import CLASSES, Batches, blobs, build, learn, network

#: Factors are held in float32, of entries near one and sums of a few dozen products.
CLOSE = 1e-4


def _dense_factors(model: nn.Sequential, inputs: torch.Tensor) -> dict[str, tuple[torch.Tensor, torch.Tensor]]:
    """S and A of every linear layer by torch.func: gradients of the outputs in what the layer gives, whitened."""
    parameters = {name: p.detach() for name, p in model.named_parameters()}
    with torch.no_grad():
        seeds = Classification().metric(model(inputs)).seeds(model(inputs)).double()
    found, features = {}, inputs
    for name, layer in model.named_children():
        if isinstance(layer, nn.Linear):
            # a bias's derivative is that of what the layer gives
            J = vmap(
                jacrev(
                    lambda b, x, name=name: functional_call(model, {**parameters, f"{name}.bias": b}, (x[None],))[0]
                ),
                (None, 0),
            )(parameters[f"{name}.bias"], inputs).double()
            G = torch.einsum("nro,nod->nrd", seeds, J).flatten(0, 1)
            A = torch.cat([features.detach(), torch.ones(len(features), 1)], 1).double()
            found[name] = G.T @ G / len(inputs), A.T @ A / len(inputs)
        features = layer(features)
    return found


def _dense_model(model: nn.Sequential, factors: list[dict[str, tuple[torch.Tensor, torch.Tensor]]]) -> torch.Tensor:
    """F, (P, P), in the order of `named_parameters()`: weight before bias."""
    blocks = []
    for name, layer in model.named_children():
        if isinstance(layer, nn.Linear):
            S, A = (sum(task[name][side] for task in factors) for side in (0, 1))
            block = torch.kron(S, A) / len(factors)
            out, width = layer.out_features, layer.in_features + 1
            places = torch.arange(out * width).view(out, width)
            order = torch.cat([places[:, :-1].flatten(), places[:, -1]])
            blocks.append(block[order][:, order])
    return torch.block_diag(*blocks)


def _learnt(optimizer: OptimizerConfig | None = None) -> tuple[Curvature, torch.Tensor]:
    """A model of two tasks, and the dense one."""
    model = network(width=8)
    curvature, factors = Curvature(model, samples=96), []
    for index in range(2):
        for parameter in model.parameters():
            parameter.data += 0.1 * torch.randn_like(parameter)
        loader = blobs(index)
        curvature.add(Task(f"task {index}", index), loader)
        factors.append(_dense_factors(model, loader.inputs))
    return curvature, _dense_model(model, factors)


def _flat(tensors) -> torch.Tensor:
    return torch.cat([t.detach().flatten() for t in tensors]).double()


def test_the_modelled_kl_is_the_dense_quadratic_form():
    curvature, F_dense = _learnt()
    before = _flat(curvature.model.parameters())
    assert curvature.modelled() == 0.0
    for parameter in curvature.model.parameters():
        parameter.data += 0.1 * torch.randn_like(parameter)
    way = _flat(curvature.model.parameters()) - before
    assert curvature.modelled() == pytest.approx(float(0.5 * way @ F_dense @ way), rel=CLOSE)


@pytest.mark.parametrize("momentum", [0.0, 0.5])
def test_an_implicit_step_is_that_of_the_dense_model(momentum):
    curvature, F_dense = _learnt()
    parameters = list(curvature.model.parameters())
    optimizer = torch.optim.SGD(parameters, lr=0.03, momentum=momentum)
    before = _flat(parameters)
    for parameter in parameters:
        parameter.data += 0.1 * torch.randn_like(parameter)
    way = _flat(parameters) - before
    lengths = [7 * step_length(group) for group in optimizer.param_groups]
    curvature.relax(optimizer, lengths, weight=2.0)
    stiff = 7 * 0.03 / (1 - momentum) * 2.0
    wanted = torch.linalg.solve(torch.eye(len(way), dtype=torch.float64) + stiff * F_dense, way)
    assert torch.allclose(_flat(parameters) - before, wanted, atol=1e-6)
    assert float((wanted - way).norm()) > 0.01 * float(way.norm())  # there was something to take


def test_the_gradient_is_that_of_the_dense_model():
    curvature, F_dense = _learnt()
    parameters = list(curvature.model.parameters())
    before = _flat(parameters)
    for parameter in parameters[:-1]:
        parameter.data += 0.1 * torch.randn_like(parameter)
        parameter.grad = torch.ones_like(parameter)
    curvature.add_gradient(torch.optim.Adam(parameters), weight=1.5)
    wanted = 1.5 * F_dense @ (_flat(parameters) - before)
    found = _flat(p.grad for p in parameters)
    found[: -len(parameters[-1])] -= 1.0  # the last one had no gradient
    assert torch.allclose(found, wanted, atol=1e-5 * float(wanted.abs().max()))


def test_with_many_inputs_the_model_tells_the_kl_of_a_short_way():
    """Kronecker factors are an approximation, but not one by an order of magnitude."""
    model = network(width=16)
    learn(build("naive", model), Task("first", 0), blobs(0, samples=192), epochs=3)
    inputs = blobs(0, samples=192).inputs
    curvature = Curvature(model, samples=1000)
    curvature.add(Task("first", 0), blobs(0, samples=192))
    then = model(inputs).detach().log_softmax(1)
    for parameter in model.parameters():
        parameter.data += 2e-3 * torch.randn_like(parameter)
    kl = float(F.kl_div(model(inputs).detach().log_softmax(1), then, log_target=True, reduction="batchmean"))
    assert 0.3 * kl < curvature.modelled() < 3.0 * kl


def test_heads_count_the_tasks_that_used_them():
    model = MultiHead(nn.Sequential(nn.Linear(12, 8), nn.ReLU()), 8, [3, 3])
    curvature = Curvature(model, samples=96)
    for index in range(2):
        curvature.add(Task(f"task {index}", index, head=index), blobs(index))
    assert {name: part.tasks for name, part in curvature.layers.items()} == {"trunk.0": 2, "heads.0": 1, "heads.1": 1}
    packed = sum(n * (n + 1) // 2 for n in (13, 8, 9, 3, 9, 3))
    assert curvature.nbytes() == 4 * (packed + sum(p.numel() for p in model.parameters()))


@pytest.mark.parametrize("optimizer", ["sgd", "adam"])
def test_the_budget_uses_the_model_and_forgets_less_with_few_retained_inputs(optimizer):
    kl, first = {}, blobs(0)
    # the same classes under other labels, told apart by a shift of the inputs
    second = Batches(first.inputs + 1.5, (first.targets + 1) % CLASSES)
    for curvature in (0.0, 10.0):
        torch.manual_seed(0)
        config = OptimizerConfig(optimizer, lr=0.05 if optimizer == "sgd" else 3e-3)
        # a budget without end, and next to no multiplier: only the model keeps anything
        alone = {"kl_budget": 1e3, "multiplier": 1e-3, "rate": 0.0, "damping": 0.0, "states_per_task": 2, "replay": 0.0}
        strategy = build("kl_budget", optimizer=config, curvature=curvature, relax_every=3, **alone)
        learn(strategy, Task("first", 0), first, epochs=10)
        then = strategy.model(first.inputs).detach().log_softmax(1)
        learn(strategy, Task("second", 1), second, epochs=10)
        now = strategy.model(first.inputs).detach().log_softmax(1)
        kl[curvature] = float(F.kl_div(now, then, log_target=True, reduction="batchmean"))
    assert kl[10.0] < 0.5 * kl[0.0]


def test_convolutions_are_minded_and_what_has_no_factors_is_left_alone():
    model = nn.Sequential(
        nn.Conv2d(1, 4, 3), nn.ReLU(), nn.Flatten(), nn.Linear(16, 6), nn.LayerNorm(6), nn.Linear(6, 3)
    )
    loader = [(torch.randn(12, 1, 4, 4), torch.arange(12) % 3)]
    budget = KLBudget(model, KLBudgetOptions(states_per_task=4))
    budget.retain(Task("first", 0), loader)
    assert budget.curvature is not None and set(budget.curvature.layers) == {"0", "3", "5"}
    for parameter in model.parameters():
        parameter.data += 0.1 * torch.randn_like(parameter)
    there = _flat(model.parameters())
    budget.curvature.relax(torch.optim.SGD(model.parameters(), lr=0.1), [1.0], 1.0)
    moved = dict(
        zip(
            [n for n, _ in model.named_parameters()],
            (_flat(model.parameters()) - there).split([p.numel() for p in model.parameters()]),
            strict=True,
        )
    )
    for name, way in moved.items():
        assert bool(way.any()) != name.startswith("4."), name
