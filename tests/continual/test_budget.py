"""The gradient that the KL budget adds to every step, and its certificate, against autograd and dense algebra."""

import copy
import math

import pytest
import torch
import torch.nn.functional as F
from torch import nn
from torch.func import functional_call, jacrev, vmap

from nsrl.continual import Task
from nsrl.continual.budget import KLBudget
from nsrl.continual.budget_options import KLBudgetOptions
from nsrl.continual.objectives import Classification, Regression
from nsrl.continual.steering.multipliers import CEILING, Multipliers
from nsrl.errors import NsrlError
from tests.continual.learning import Batches, blobs, build, learn, network


def _moved_budget(regression: bool, **options) -> KLBudget:
    """A budget with two tasks, and its model moved since."""
    model = network()
    budget = KLBudget(model, KLBudgetOptions(states_per_task=20, **{"draw_every": 1, **options}))
    for index in range(2):
        loader = blobs(index)
        if regression:
            loader = Batches(loader.inputs, torch.randn(len(loader.inputs), 3))
        budget.retain(Task(f"task {index}", index), loader)
    for parameter in model.parameters():
        parameter.data += 0.05 * torch.randn_like(parameter)
    return budget


@pytest.mark.parametrize("regression", [False, True])
@pytest.mark.parametrize("replay", [0.0, 0.7])
def test_the_pull_is_the_gradient_of_multiplier_times_kl_and_labels(regression, replay):
    budget = _moved_budget(regression, replay=replay, rate=0.0, damping=0.0, multiplier=2.5)
    memory, reference = budget.retained.memory, budget.retained.reference
    indices = torch.tensor([3, 17, 21, 39, 8])
    budget._shares[1] *= 0.5  # as if the second task had twice as many inputs
    shares = torch.where(memory.owner[indices] == 0, 1.0, 0.5) * 20 / 96
    outputs = budget.retained.outputs(budget.model, indices).detach().requires_grad_()
    if regression:
        kl = 0.5 * (outputs - reference[indices]).square().sum(1)
        labels = 0.5 * (outputs - memory.targets[indices]).square().sum(1)
    else:
        then = reference[indices].log_softmax(-1)
        kl = F.kl_div(outputs.log_softmax(-1), then, log_target=True, reduction="none").sum(1)
        labels = F.cross_entropy(outputs, memory.targets[indices], reduction="none")
    # each of the five stands for two fifths of a task
    (wanted,) = torch.autograd.grad((2 / 5 * (2.5 * kl + replay * shares * labels)).sum(), outputs)
    found = budget.pull(outputs.detach(), indices)
    torch.testing.assert_close(found, wanted, atol=1e-6, rtol=1e-4)
    measured = budget.retained.gap(outputs.detach(), indices)[0].to(kl)
    torch.testing.assert_close(measured, kl.detach(), rtol=1e-3, atol=1e-6)


def test_the_task_that_has_moved_most_is_pulled_hardest_and_the_others_let_go():
    multipliers = Multipliers(aim=0.1, rate=0.1, damping=0.0, start=1.0)
    for _ in range(3):
        multipliers.add(torch.zeros(1))
    owner = torch.arange(30) % 3
    moved = torch.tensor([0.0, 0.1, 0.3])
    for _ in range(20):
        weights = multipliers.update(moved[owner], owner)
    # 10 of 30 samples a draw: the running mean is near what is drawn, and the integral is that of its excess
    divergences, integrals = torch.zeros(3, dtype=torch.float64), torch.ones(3, dtype=torch.float64)
    for _ in range(20):
        divergences += (1 - math.exp(-10 / 32)) * (moved.double() - divergences)
        integrals = (integrals * torch.exp(0.1 * (divergences / 0.1 - 1).clamp(-1, 2))).clamp(max=CEILING)
    torch.testing.assert_close(weights.double(), integrals, rtol=1e-5, atol=0.0)
    assert weights[0] < 0.2 and weights[2] > 5.0
    held = multipliers.integrals.clone()
    for _ in range(3):
        multipliers.update(torch.full((10,), math.nan), torch.zeros(10, dtype=torch.long))
    assert bool(torch.isfinite(multipliers.integrals).all())
    # a task without a sample in the draw is judged by what was seen of it before
    torch.testing.assert_close(multipliers.divergences[1:], divergences[1:].float(), rtol=1e-5, atol=0.0)
    assert multipliers.integrals[0] > held[0]


def test_draws_are_as_rare_as_they_weigh_little():
    """Over many steps the draws add up to the same weight, and none weighs more than a batch."""
    budget = _moved_budget(False, rate=0.0, damping=0.0, multiplier=0.05, replay=1.0, draw_every=50)
    whole = 2 * (0.05 + 20 / 96)
    budget.multipliers.integrals.fill_(0.05)
    optimizer = torch.optim.Adam(budget.model.parameters())
    drawn, total = [], 0.0
    for step in range(40):
        if budget.draws():
            indices = torch.arange(40)
            outputs = budget.retained.outputs(budget.model, indices).detach()
            drawn.append(step)
            budget.pull(outputs, indices)
            total += budget._spacing
        budget.tick(optimizer)
    assert drawn == list(range(0, 40, int(1 / whole)))
    assert total == 40


@pytest.mark.parametrize("objective", [Classification(), Regression()])
def test_losses_and_slopes_are_autograds(objective):
    outputs = torch.randn(6, 3, requires_grad=True)
    targets = torch.arange(6) % 3 if isinstance(objective, Classification) else torch.randn(6, 3)
    loss = objective.loss(outputs, targets)
    (wanted,) = torch.autograd.grad(loss, outputs)
    found, slope = objective.loss_and_slope(outputs.detach(), targets)
    torch.testing.assert_close(found, loss.detach())
    torch.testing.assert_close(slope, wanted)
    # the negative log-likelihood of a unit Gaussian has half of the squared error
    likelihood = (
        F.cross_entropy
        if isinstance(objective, Classification)
        else lambda z, y, reduction: 0.5 * F.mse_loss(z, y, reduction=reduction)
    )
    (wanted,) = torch.autograd.grad(likelihood(outputs, targets, reduction="sum"), outputs)
    torch.testing.assert_close(objective.slope(outputs.detach(), targets), wanted)


def test_a_step_takes_the_gradient_of_the_whole_objective():
    """One shared pass with slopes in closed form, against the sum of three losses by autograd."""
    strategy = build(
        "kl_budget",
        replay=0.5,
        states_per_task=30,
        batch_states=60,
        rate=0.0,
        damping=0.0,
        draw_every=1,
        curvature=2.0,
    )
    learn(strategy, Task("first", 0), blobs(0), epochs=2)
    second = blobs(1)
    strategy.before_task(Task("second", 1), second)
    strategy.step((second.inputs[:32], second.targets[:32], 1))
    curvature = copy.deepcopy(strategy.budget.curvature)
    twin = copy.deepcopy(strategy.model)
    # all 30 retained inputs are drawn, so that the order of the draws does not matter
    retained = strategy.budget.retained
    new = F.cross_entropy(twin(second.inputs[32:64]), second.targets[32:64])
    outputs = twin(retained.memory.inputs)
    kl = F.kl_div(outputs.log_softmax(1), retained.reference.log_softmax(1), log_target=True, reduction="batchmean")
    total = new + kl + 0.5 * 30 / 96 * F.cross_entropy(outputs, retained.memory.targets)
    wanted = torch.autograd.grad(total, list(twin.parameters()))
    strategy.step((second.inputs[32:64], second.targets[32:64], 1))
    # the model's own gradient has a test of its own
    curvature.model = twin
    curvature.add_gradient(torch.optim.Adam(twin.parameters()), weight=2.0)
    wanted = [gradient + p.grad for gradient, p in zip(wanted, twin.parameters(), strict=True)]
    for parameter, gradient in zip(strategy.model.parameters(), wanted, strict=True):
        torch.testing.assert_close(parameter.grad, gradient, atol=1e-6, rtol=1e-3)


def test_the_certificate_is_that_of_the_dense_whitened_jacobian():
    budget = _moved_budget(regression=True)
    model = budget.model
    found = budget.certificate(states=1000)
    parameters = {name: p.detach() for name, p in model.named_parameters()}
    blocks = vmap(jacrev(lambda p, x: functional_call(model, p, (x[None],))[0]), (None, 0))(
        parameters, budget.retained.memory.inputs
    )
    # unit variance: nothing to whiten but the mean over the samples
    J = torch.cat([block.flatten(2) for block in blocks.values()], 2).flatten(0, 1).double() / len(budget) ** 0.5
    way = (budget.parameters.read() - budget._learnt).double()
    _, values, right = torch.linalg.svd(J, full_matrices=False)
    rank = int((values > 1e-6 * values[0]).sum())
    assert found["rank"] == rank
    free = way - right[:rank].T @ (right[:rank] @ way)
    sizes = [sum(p.numel() for p in layer.parameters()) for layer in model if isinstance(layer, nn.Linear)]
    shares = [float(a.norm() / b.norm()) for a, b in zip(free.split(sizes), way.split(sizes), strict=True)]
    assert found["kept_share"] == pytest.approx(min(shares), rel=1e-3)
    random = float(J.norm()) / len(way) ** 0.5
    assert found["leakage"] == pytest.approx(float((J @ way).norm() / way.norm()) / random, rel=1e-3)


def test_a_negative_weight_of_old_labels_is_refused():
    with pytest.raises(NsrlError, match="replay is a weight of at least 0, not -1"):
        KLBudgetOptions(replay=-1.0)


@pytest.mark.parametrize("part", ["restoration", "binding_divergence"])
def test_an_exception_leaves_the_last_feasible_weights(part, monkeypatch):
    budget = _moved_budget(False, kl_budget=1e-4)
    budget.enforce()
    feasible, measure, measured = budget.parameters.read(), budget.binding_divergence, []

    def fail():
        measured.append(part)
        if part == "restoration" or len(measured) > 1:
            raise KeyboardInterrupt
        return measure()

    for parameter in budget.model.parameters():
        parameter.data += 0.05
    monkeypatch.setattr(budget, part, fail)
    with pytest.raises(KeyboardInterrupt):
        budget.enforce()
    assert torch.equal(budget.parameters.read(), feasible)
