"""Passes by hand against autograd in float64, and what is left to autograd."""

import copy

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from nsrl.continual import MultiHead, OptimizerConfig, Task
from nsrl.continual.heads import model_outputs
from nsrl.continual.optimizers import is_plain_sgd
from nsrl.continual.passes import Chain, ChainPass, GraphPass, run
from nsrl.continual.strategies.projected import CERTIFIED_EVERY
from tests.continual.learning import CLASSES, blobs, build, learn, network

#: Sums of a few dozen float64 products of numbers near one, in another order.
CLOSE = {"rtol": 1e-12, "atol": 1e-14}
SGD = OptimizerConfig("sgd", lr=0.05)


def _plain(bias: bool) -> nn.Module:
    return nn.Sequential(
        nn.Sequential(nn.Flatten(), nn.Linear(12, 9, bias), nn.ReLU(), nn.Identity(), nn.Linear(9, 7, bias), nn.ReLU()),
        nn.Linear(7, CLASSES, bias),
    ).double()


def _headed(bias: bool) -> nn.Module:
    trunk = nn.Sequential(nn.Linear(12, 9, bias), nn.ReLU(), nn.Linear(9, 7, bias))
    return MultiHead(trunk, 7, [3, 2, 3], bias).double()


MODELS = [
    (_plain, None),
    (_headed, 1),
    (_headed, torch.tensor([0, 2, 2, 1, 0, 1, 2, 0])),
    (_headed, torch.tensor([1, 1, 1, 1, 1, 1, 1, 1])),
]


@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize(("make", "head"), MODELS)
def test_a_pass_by_hand_is_autograds(make, head, bias):
    model, inputs = make(bias), torch.randn(8, 12, dtype=torch.float64)
    oracle = copy.deepcopy(model)
    for parameter, other in zip(model.parameters(), oracle.parameters(), strict=True):
        if parameter.ndim == 2:  # gradients are added to those that are there
            parameter.grad, other.grad = torch.ones_like(parameter), torch.ones_like(parameter)
    outputs = model_outputs(oracle, inputs, head)
    slope = torch.randn_like(outputs)
    outputs.backward(slope)
    passed = run(model, Chain.of(model), inputs, head)
    assert isinstance(passed, ChainPass)
    torch.testing.assert_close(passed.outputs, outputs.detach(), **CLOSE)
    passed.backward(slope)
    for mine, theirs in zip(model.parameters(), oracle.parameters(), strict=True):
        if theirs.grad is None:
            assert mine.grad is None
        else:
            torch.testing.assert_close(mine.grad, theirs.grad, **CLOSE)


def test_frozen_parameters_get_no_gradient():
    model = _plain(True)
    frozen = model[0][1].weight.requires_grad_(False)
    passed = run(model, Chain.of(model), torch.randn(4, 12, dtype=torch.float64), None)
    passed.backward(torch.ones_like(passed.outputs))
    assert frozen.grad is None
    assert all(p.grad is not None for p in model.parameters() if p is not frozen)


def _tied() -> nn.Module:
    layer = nn.Linear(5, 5)
    return nn.Sequential(layer, nn.ReLU(), layer)


def _hooked() -> nn.Module:
    model = network()
    model[0].register_forward_hook(lambda *_: None)
    return model


def _watched() -> nn.Module:
    model = network()
    model[0].weight.register_hook(lambda gradient: 2 * gradient)
    return model


def _replaced() -> nn.Module:
    model = network()
    model[0].forward = lambda inputs: F.linear(inputs, model[0].weight)
    return model


def _parametrised() -> nn.Module:
    return nn.Sequential(torch.nn.utils.parametrizations.weight_norm(nn.Linear(4, 4)), nn.ReLU(), nn.Linear(4, 3))


@pytest.mark.parametrize(
    "make",
    [
        _tied,
        _hooked,
        _watched,
        _replaced,
        _parametrised,
        lambda: nn.Sequential(nn.Linear(4, 4), nn.Tanh(), nn.Linear(4, 3)),
        lambda: nn.Sequential(nn.Flatten(0, 1), nn.Linear(4, 4)),
        lambda: nn.Sequential(nn.Conv1d(4, 4, 1)),
        lambda: nn.Linear(4, 3),
    ],
)
def test_all_else_is_left_to_autograd(make):
    model = make()
    assert Chain.of(model) is None


def test_autocast_and_heads_that_are_missing_are_the_models_own():
    model, inputs = network(), torch.randn(4, 12)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        passed = run(model, Chain.of(model), inputs, None)
    assert isinstance(passed, GraphPass)
    assert passed.outputs.dtype == torch.bfloat16
    headed = MultiHead(nn.Sequential(nn.Linear(12, 4), nn.ReLU()), 4, [3, 3])
    for head in (None, 2, -1, torch.tensor([0, 0, 5, 1])):
        with pytest.raises(Exception, match="head"):
            run(headed, Chain.of(headed), inputs, head)


@pytest.mark.parametrize(
    ("name", "options"),
    [("gpm", {"energy": 0.8}), ("sgp", {"energy": 0.8}), ("adam_nscl", {"multiple": 50.0}), ("adam_nscl_official", {})],
)
def test_a_projected_gradient_makes_the_projected_step_of_plain_sgd(name, options):
    """Twice the same tasks: by hand, and, with a hook that does nothing, by autograd and a projected displacement."""
    ends = []
    for hooked in (False, True):
        torch.manual_seed(0)
        model = network()
        if hooked:
            model[0].register_forward_hook(lambda *_: None)
        strategy = build(name, model, SGD, **options)
        for index in range(2):
            learn(strategy, Task(f"task {index}", index), blobs(index), epochs=4)
        assert strategy._projected is not hooked
        ends.append(torch.cat([p.detach().flatten() for p in model.parameters()]))
    # some 24 float32 steps of weights near one, each rounded once more or less
    torch.testing.assert_close(*ends, rtol=0.0, atol=24 * 2**-23)


def test_a_projected_gradient_leaves_the_protected_span_alone():
    model = network().double()
    strategy = build("gpm", model, SGD, energy=0.9)
    loader = blobs(0)
    loader.inputs = loader.inputs.double()
    learn(strategy, Task("first", 0), loader)
    before = {name: p.detach().clone() for name, p in model.named_parameters()}
    other = blobs(1)
    other.inputs = other.inputs.double()
    task = Task("second", 1)
    strategy.before_task(task, other)
    for _ in range(5):
        for inputs, targets in other:
            strategy.step((inputs, targets, 1))
    assert 0 < strategy._steps < CERTIFIED_EVERY
    moved = 0.0
    for name, basis in strategy.bases.items():
        way = model.get_parameter(f"{name}.weight").detach() - before[f"{name}.weight"]
        moved += float(way.norm())
        assert float((way @ basis).norm()) <= 1e-13
    assert moved > 1e-2


@pytest.mark.parametrize(
    ("optimizer", "plain"),
    [
        (lambda p: torch.optim.SGD(p, 0.1), True),
        (lambda p: torch.optim.SGD(p, 0.1, momentum=0.9), False),
        (lambda p: torch.optim.SGD(p, 0.1, weight_decay=0.1), False),
        (lambda p: torch.optim.SGD(p, 0.1, maximize=True), False),
        (lambda p: torch.optim.Adam(p, 0.1), False),
    ],
)
def test_plain_sgd_is_told_from_other_optimizers(optimizer, plain):
    assert is_plain_sgd(optimizer([nn.Parameter(torch.ones(1))])) is plain
