"""Constraints on optimizers: where they act, what leaves the null space where, and when a projected step climbs."""

import warnings

import pytest
import torch
from torch import Tensor, nn

from nsrl.projection import (
    Budget,
    Constraint,
    FeatureConstraint,
    Hard,
    JacobianConstraint,
    KroneckerConstraint,
    ScaledGradient,
    Tikhonov,
    attach_constraint,
    jacobian,
    parameter_columns,
)
from nsrl.projection.optimizer import FlatParameters
from tests.projection.builders import matrix_jacobian, mlp, normal
from tests.tolerances import assert_near

OPTIMIZERS = {
    "sgd": lambda p: torch.optim.SGD(p, lr=0.05),
    "sgd momentum": lambda p: torch.optim.SGD(p, lr=0.05, momentum=0.9, nesterov=True),
    "sgd decay": lambda p: torch.optim.SGD(p, lr=0.05, momentum=0.9, weight_decay=0.1),
    "adam": lambda p: torch.optim.Adam(p, lr=0.01),
    "adamw": lambda p: torch.optim.AdamW(p, lr=0.01, weight_decay=0.5),
}
every_optimizer = pytest.mark.parametrize("name", OPTIMIZERS)


class Problem:
    """A network with 4 retained inputs, whose features leave a null space, and a new task on other inputs."""

    def __init__(self, name: str, kind: str = "features"):
        torch.manual_seed(0)
        self.net = mlp(10, 16, 2).double()
        self.inputs = normal(4, 10)
        self.parameters = list(self.net.parameters())
        self.optimizer = OPTIMIZERS[name](self.parameters)
        self.constraint: Constraint
        if kind == "features":
            self.constraint = FeatureConstraint(self.net)
            self.constraint.update(self.net, self.inputs)
        else:
            self.constraint = JacobianConstraint(jacobian(self.net, self.inputs), parameter_columns(self.net))
        self.flat = FlatParameters(self.parameters)
        self.anchor = self.flat.read()
        self.before = self.outputs()
        self.task = normal(16, 10, seed=1), normal(16, 2, seed=2)

    def outputs(self) -> Tensor:
        return self.net(self.inputs).detach()

    def loss(self) -> Tensor:
        return (self.net(self.task[0]) - self.task[1]).square().mean()

    def steps(self, count: int) -> None:
        for _ in range(count):
            self.optimizer.zero_grad()
            self.loss().backward()
            self.optimizer.step()

    def violation(self) -> float:
        """|B^T d| / |d|."""
        moved = self.flat.read() - self.anchor
        return float(self.constraint.components(moved).norm() / moved.norm())

    def drift(self) -> float:
        return float((self.outputs() - self.before).abs().max())


@every_optimizer
@pytest.mark.parametrize("where", ["step", "cumulative"])
def test_outputs_stay_whatever_the_optimizer_does(name, where):
    """Weight decay and momentum do not leave the subspace, and with layer features that means the outputs stay."""
    problem = Problem(name)
    start = float(problem.loss().detach())
    handle = attach_constraint(problem.optimizer, problem.parameters, problem.constraint, where=where)
    problem.steps(25)
    assert problem.violation() < 1e-12
    assert problem.drift() < 1e-11
    assert float(problem.loss().detach()) < start - 0.05
    assert handle.last is not None and handle.last.leakage < 1e-6 and 0.0 < handle.last.kept <= 1.0


@pytest.mark.parametrize(
    "name,leaves",
    [
        ("sgd", False),
        ("sgd momentum", False),
        ("sgd decay", True),
        ("adam", True),
        ("adamw", True),
    ],
)
def test_projecting_the_gradient_is_enough_for_linear_optimizers_only(name, leaves):
    problem = Problem(name)
    attach_constraint(problem.optimizer, problem.parameters, problem.constraint, where="gradient")
    problem.steps(10)
    assert problem.violation() > 1e-2 if leaves else problem.violation() < 1e-12


def test_cumulative_forgives_what_happened_before():
    """The exact retraction: a kick from outside the optimizer is undone where the features see it."""
    for where, healed in (("cumulative", True), ("step", False)):
        problem = Problem("adam")
        attach_constraint(problem.optimizer, problem.parameters, problem.constraint, where=where)
        problem.steps(2)
        problem.flat.write(problem.flat.read() + 0.1 * normal(problem.constraint.width, seed=3))
        problem.steps(1)
        assert (problem.drift() < 1e-11) is healed


def test_cumulative_is_the_retraction_of_the_weights():
    problem = Problem("adamw")
    reference = problem.flat.read() + normal(problem.constraint.width, seed=4)
    attach_constraint(problem.optimizer, problem.parameters, problem.constraint, reference=reference)
    twin = Problem("adamw")
    problem.steps(1)
    twin.steps(1)
    moved = twin.flat.read() - reference
    torch.testing.assert_close(problem.flat.read(), reference + problem.constraint.project(moved).displacement)


@pytest.mark.parametrize("where", ["step", "cumulative"])
def test_every(where):
    problem, stock = Problem("adam"), Problem("adam")
    attach_constraint(problem.optimizer, problem.parameters, problem.constraint, where=where, every=3)
    for step in range(1, 7):
        problem.steps(1)
        if step < 3:
            stock.steps(1)
            assert torch.equal(problem.flat.read(), stock.flat.read())
        assert (problem.drift() < 1e-11) is (step % 3 == 0)


def test_steps_of_several_are_projected_whole():
    """With every=3 the displacement of three steps is projected, not the third one."""
    problem, stock = Problem("sgd", "full"), Problem("sgd", "full")
    attach_constraint(problem.optimizer, problem.parameters, problem.constraint, where="step", every=3)
    problem.steps(3)
    stock.steps(3)
    expected = problem.constraint.project(stock.flat.read() - stock.anchor).displacement
    torch.testing.assert_close(problem.flat.read() - problem.anchor, expected)


def test_a_budget_on_the_way_is_spent_once():
    problem = Problem("adam", "full")
    handle = attach_constraint(problem.optimizer, problem.parameters, problem.constraint, Budget(1e-3))
    for _ in range(20):
        problem.steps(1)
        assert problem.constraint.quadratic(problem.flat.read() - problem.anchor) <= 1e-3 * (1 + 1e-6)
    assert handle.last.predicted == pytest.approx(1e-3, rel=1e-4)


def test_detach():
    problem, stock = Problem("sgd"), Problem("sgd")
    handle = attach_constraint(problem.optimizer, problem.parameters, problem.constraint)
    problem.steps(2)
    handle.detach()
    handle.detach()
    stock.net.load_state_dict(problem.net.state_dict())
    problem.steps(2)
    stock.steps(2)
    assert torch.equal(problem.flat.read(), stock.flat.read())
    assert problem.violation() > 1e-4


def test_parameters_without_a_gradient_stay_without():
    """An optimizer skips them; a gradient of zeros would let weight decay loose on them."""
    net = nn.ModuleDict({"old": nn.Linear(6, 2), "new": nn.Linear(6, 2)}).double()
    inputs = normal(2, 6)
    constraint = FeatureConstraint(net)
    constraint.update(net, inputs, forward=lambda net, x: net["old"](x))
    optimizer = torch.optim.AdamW(net.parameters(), lr=0.1, weight_decay=1.0)
    attach_constraint(optimizer, list(net.parameters()), constraint, where="gradient")
    before = net["new"].weight.detach().clone()
    net["old"](normal(3, 6, seed=1)).square().mean().backward()
    optimizer.step()
    assert net["new"].weight.grad is None and torch.equal(net["new"].weight, before)


# J has the null direction (1, 2), the loss the gradient (10, -1): Adam's first step is -lr (1, -1), and what is left of
# it along (1, 2) is +lr / 5 (1, 2), which climbs by 8 lr / 5.
ASCENT_ROWS, ASCENT_GRADIENT = [[2.0, -1.0]], [10.0, -1.0]


def climb(where: str) -> tuple[float, float, float]:
    """G.d of Adam's first projected step, |J d| and |d|."""
    weight = nn.Parameter(torch.zeros(2, dtype=torch.float64))
    gradient = torch.tensor(ASCENT_GRADIENT, dtype=torch.float64)
    constraint = JacobianConstraint(matrix_jacobian(torch.tensor(ASCENT_ROWS, dtype=torch.float64)))
    optimizer = torch.optim.Adam([weight], lr=0.1)
    attach_constraint(optimizer, [weight], constraint, where=where)
    (weight @ gradient).backward()
    optimizer.step()
    moved = weight.detach()
    return float(gradient @ moved), float(constraint.jacobian.matvec(moved).norm()), float(moved.norm())


def test_euclidean_projection_of_adam_may_climb_where_the_metric_descends():
    for where in ("step", "cumulative"):
        slope, left, _ = climb(where)
        assert slope == pytest.approx(8 * 0.1 / 5, rel=1e-4) and left < 1e-12
    slope, left, size = climb("metric")
    assert slope < -0.01 and left < 1e-12 and size > 0.01


def test_the_metric_never_climbs():
    """G.d <= 0 for d = (I - V J^T (J V J^T)^+ J)(-V g), the exact diagonal on dense blocks; Euclidean: not always."""
    climbs = 0
    for seed in range(50):
        matrix, gradient, scale = (
            normal(3, 5, seed=seed),
            normal(5, seed=seed + 100),
            (2 * normal(5, seed=seed + 200)).exp(),
        )
        constraint = JacobianConstraint(matrix_jacobian(matrix))
        step = -scale.square() * gradient
        moved = constraint.in_metric(scale).null(step)
        form = matrix @ torch.diag(scale.square()) @ matrix.T
        expected = step - scale.square() * (matrix.T @ torch.linalg.solve(form, matrix @ step))
        # the projector is orthogonal for step / scale, and has J V J^T to solve with, whose scales lie far apart
        size = float(scale.max() * (step / scale).norm())
        assert_near(moved, expected, terms=5, condition=float(torch.linalg.cond(form)), scale=size)
        assert float(gradient @ moved) < 0.0
        climbs += float(gradient @ constraint.project(step).displacement) > 0.0
    assert climbs > 3


@every_optimizer
@pytest.mark.parametrize("filter", [Hard(), Tikhonov(1e-3), Budget(1e-4)], ids=str)
def test_metric_on_networks(name, filter):
    problem = Problem(name, "full")
    start = float(problem.loss().detach())
    handle = attach_constraint(problem.optimizer, problem.parameters, problem.constraint, filter, where="metric")
    problem.steps(3)
    handle.refresh()
    problem.steps(5)
    way = problem.flat.read() - problem.anchor
    if filter == Hard():
        assert problem.violation() < 1e-10
    if isinstance(filter, Budget):
        assert problem.constraint.quadratic(way) <= 1e-4 * (1 + 1e-6)
    assert float(problem.loss().detach()) < start


def test_refresh_reads_the_metric_anew():
    problem = Problem("adam", "full")
    handle = attach_constraint(problem.optimizer, problem.parameters, problem.constraint, where="metric")
    problem.steps(2)
    first = handle._metric
    problem.steps(1)
    assert handle._metric is first
    handle.refresh()
    problem.steps(1)
    assert handle._metric is not first


def test_uncovered_parameters_are_named():
    net = nn.Sequential(nn.Linear(3, 4), nn.LayerNorm(4)).double()
    constraint = FeatureConstraint(net)
    constraint.update(net, normal(2, 3))
    optimizer = torch.optim.SGD(net.parameters(), lr=0.1)
    with pytest.warns(UserWarning, match=r"1\.weight, 1\.bias: not covered"):
        attach_constraint(optimizer, list(net.parameters()), constraint)
    problem = Problem("sgd")
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        attach_constraint(problem.optimizer, problem.parameters, problem.constraint)


def test_an_idle_constraint_is_loud():
    """A projector that holds nothing must not let steps pass in silence."""
    net = mlp(3, 4, 2)
    optimizer = torch.optim.SGD(net.parameters(), lr=0.1)
    for constraint in (FeatureConstraint(net), KroneckerConstraint(parameter_columns(net))):
        with pytest.raises(ValueError, match="update"):
            attach_constraint(optimizer, list(net.parameters()), constraint)


@pytest.mark.parametrize(
    "change,match",
    [
        ({"where": "sideways"}, "where must be one of"),
        ({"every": 0}, "every"),
        ({"where": "gradient", "every": 2}, "every"),
        ({"parameters": 2}, "entries"),
        ({"where": "metric", "kind": "features"}, "JacobianConstraint"),
        ({"where": "metric", "filter": ScaledGradient(1.0)}, "filters"),
        ({"where": "metric", "filter": Hard(rank=1)}, "filters"),
    ],
)
def test_nonsense_is_refused(change, match):
    problem = Problem("sgd", change.pop("kind", "full"))
    parameters = problem.parameters[: change.pop("parameters", None)]
    with pytest.raises(ValueError, match=match):
        attach_constraint(problem.optimizer, parameters, problem.constraint, **change)
