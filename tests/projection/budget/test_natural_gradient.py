"""The rollout's Fisher information and conjugate gradients on it, against autograd Hessians and dense solves."""

from __future__ import annotations

import copy
import math
from dataclasses import replace
from functools import partial

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from nsrl.projection.budget.natural_gradient import LocalModel
from nsrl.projection.jacobians.matrix_free import LayerFactors
from nsrl.projection.optimizer import FlatParameters
from nsrl.projection.solvers.conjugate_gradients import conjugate_gradients
from nsrl.rl.algorithms.surrogate import Surrogate
from tests.rl.policy_builders import ACTIONS, build_policy, dense_jacobian, draw_rollout, joint_kl

FAMILIES = [(actions, "tanh") for actions in ACTIONS]
CASES = [
    *FAMILIES,
    ("box", "relu"),
    ("box", "silu"),
    ("discrete", "linear"),
    ("multi_discrete", "dict"),
    ("box", "shared cnn"),
]


def built(actions: str, network: str = "tanh", count: int = 12) -> tuple[object, object, Surrogate]:
    policy = build_policy(actions, network)
    rollout = draw_rollout(policy, count)
    return policy, rollout, Surrogate(policy, rollout)


def distribution_parameters(policy: object, observations: object) -> Tensor:
    """What torch.distributions calls the distribution by: logits, or mean and log standard deviation, (N, D)."""
    wrapped = policy.get_distribution(observations).distribution
    if isinstance(wrapped, list):
        return torch.cat([part.logits for part in wrapped], 1)
    if isinstance(wrapped, torch.distributions.Normal):
        return torch.cat([wrapped.mean, wrapped.stddev.log()], 1)
    return wrapped.logits


def output_fisher(policy: object, values: Tensor, sizes: list[int]) -> Tensor:
    """Hessian (D, D) of KL(old || new) in the parameters of one state's distribution, by autograd on torch's own KL."""
    from torch.distributions import Bernoulli, Categorical, Normal, kl_divergence

    def kl(new: Tensor) -> Tensor:
        if policy.action_space.__class__.__name__ == "Box":
            pairs = [Normal(part[: len(part) // 2], part[len(part) // 2 :].exp()) for part in (values, new)]
            return kl_divergence(*pairs).sum()
        if policy.action_space.__class__.__name__ == "MultiBinary":
            return kl_divergence(Bernoulli(logits=values), Bernoulli(logits=new)).sum()
        heads = zip(values.split(sizes), new.split(sizes), strict=True)
        return sum(kl_divergence(Categorical(logits=a), Categorical(logits=b)) for a, b in heads)

    return torch.autograd.functional.hessian(kl, values)


def dense_factors(policy: object, observations: object, parameters: list) -> tuple[Tensor, Tensor]:
    """J (N, D, P) and H (N, D, D) / N, both from autograd: the Fisher information is the sum of J^T H J."""
    values = distribution_parameters(policy, observations).detach()
    sizes = [int(n) for n in getattr(policy.action_space, "nvec", [values.shape[1]])]
    jacobian = dense_jacobian(policy, lambda: distribution_parameters(policy, observations), parameters)
    jacobian = jacobian.view(*values.shape, -1)
    hessians = torch.stack([output_fisher(policy, row, sizes) for row in values])
    return jacobian, hessians / len(values)


def dense_fisher(policy: object, observations: object, parameters: list) -> Tensor:
    jacobian, hessians = dense_factors(policy, observations, parameters)
    return jacobian.flatten(0, 1).T @ (hessians @ jacobian).flatten(0, 1)


@pytest.mark.parametrize(("actions", "network"), CASES)
def test_products_with_the_fisher_information_equal_dense_algebra(actions: str, network: str) -> None:
    policy, rollout, surrogate = built(actions, network, 4 if "cnn" in network else 12)
    jacobian, hessians = dense_factors(policy, rollout.observations, surrogate.parameters.parameters)
    fisher = surrogate.fisher()
    for _ in range(3):
        vector = torch.randn(jacobian.shape[2], dtype=torch.float64)
        moved = jacobian @ vector
        pulled = (hessians @ moved.unsqueeze(2)).squeeze(2)
        rows = fisher.matvec(vector)
        torch.testing.assert_close(
            fisher.rmatvec(rows), torch.einsum("nap,na->p", jacobian, pulled), rtol=1e-10, atol=1e-10
        )
        assert float(rows @ rows) == pytest.approx(float((moved * pulled).sum()), rel=1e-10)


def test_products_equal_the_hessian_of_the_kl_of_the_joint_action() -> None:
    """No output Fisher information in the oracle: autograd twice through SB3's own distributions."""
    policy, rollout, surrogate = built("box")
    with torch.no_grad():
        old = copy.copy(policy.get_distribution(rollout.observations))
    kl = joint_kl(old, policy.get_distribution(rollout.observations)).mean()
    parameters = surrogate.parameters.parameters
    slope = torch.cat([g.flatten() for g in torch.autograd.grad(kl, parameters, create_graph=True)])
    vector = torch.randn_like(slope)
    twice = torch.autograd.grad(slope @ vector, parameters)
    fisher = surrogate.fisher()
    expected = torch.cat([g.flatten() for g in twice])
    torch.testing.assert_close(fisher.rmatvec(fisher.matvec(vector)), expected, rtol=1e-10, atol=1e-10)


def test_every_so_many_states() -> None:
    policy, rollout, surrogate = built("multi_binary")
    dense = dense_fisher(policy, rollout.observations[::3], surrogate.parameters.parameters)
    fisher, vector = surrogate.fisher(3), torch.randn(len(dense)).double()
    torch.testing.assert_close(fisher.rmatvec(fisher.matvec(vector)), dense @ vector, rtol=1e-10, atol=1e-10)


@pytest.mark.parametrize(("actions", "network"), [*FAMILIES, ("box", "shared cnn"), ("discrete", "dict")])
@pytest.mark.parametrize("normalize", [True, False])
def test_the_surrogate_and_its_gradient_are_those_of_the_policys_own_distribution(
    actions: str, network: str, normalize: bool
) -> None:
    policy = build_policy(actions, network)
    rollout = draw_rollout(policy, 6)
    rollout.old_log_prob = rollout.old_log_prob + 0.1 * torch.randn(6, dtype=torch.float64)
    surrogate = Surrogate(policy, rollout, normalize)
    advantages = rollout.advantages
    if normalize:
        advantages = (advantages - advantages.mean()) / (advantages.std() + 1e-8)
    choice = rollout.actions.long().flatten() if actions == "discrete" else rollout.actions

    def objective() -> Tensor:
        log_prob = policy.get_distribution(rollout.observations).log_prob(choice)
        return (advantages * torch.exp(log_prob - rollout.old_log_prob)).mean()

    named = {parameter: name for name, parameter in policy.named_parameters()}
    assert not any("value" in named[p] for p in surrogate.parameters.parameters)
    assert (policy.log_std in surrogate.parameters.parameters) if actions == "box" else True
    value, gradient = surrogate.gradient()
    expected = torch.autograd.grad(-objective(), surrogate.parameters.parameters)
    torch.testing.assert_close(gradient, torch.cat([g.flatten() for g in expected]), rtol=1e-10, atol=1e-12)
    assert value == pytest.approx(float(objective().detach()), rel=1e-12)
    with torch.no_grad():
        old = copy.copy(policy.get_distribution(rollout.observations))
        surrogate.parameters.write(surrogate.parameters.read() + 0.1 * torch.randn_like(gradient))
        kl = joint_kl(old, policy.get_distribution(rollout.observations)).mean()
        found = surrogate.measure()
    assert found[0] == pytest.approx(float(objective().detach()), rel=1e-10)
    assert found[1] == pytest.approx(float(kl), rel=1e-8) and found[1] > 1e-4


@pytest.mark.parametrize(
    ("actions", "name", "value"),
    [
        ("discrete", "action_net.bias", math.inf),
        ("multi_binary", "action_net.bias", math.nan),
        ("box", "log_std", -1e4),
    ],
)
def test_a_policy_that_is_no_distribution_any_more_has_no_objective(actions: str, name: str, value: float) -> None:
    """A line search has to be able to turn back from there."""
    policy, _, surrogate = built(actions)
    with torch.no_grad():
        dict(policy.named_parameters())[name][0] = value
    objective, kl = surrogate.measure()
    assert math.isnan(objective) and not kl <= 1e3


def random_form(size: int, rank: int, seed: int) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    factor = torch.randn(rank, size, generator=generator, dtype=torch.float64)
    return factor.T @ factor / rank


@given(size=st.integers(1, 12), seed=st.integers(0, 100), damping=st.floats(1e-3, 10.0))
def test_conjugate_gradients_equal_a_dense_solve(size: int, seed: int, damping: float) -> None:
    form = random_form(size, size, seed) + damping * torch.eye(size, dtype=torch.float64)
    rhs = torch.randn(size, generator=torch.Generator().manual_seed(seed + 1), dtype=torch.float64)
    found = conjugate_gradients(lambda v: form @ v, rhs, 4 * size, 1e-12)
    torch.testing.assert_close(found.vector, torch.linalg.solve(form, rhs), rtol=1e-8, atol=1e-10)
    assert found.curved and len(found.directions) <= 4 * size
    early = conjugate_gradients(lambda v: form @ v, rhs, 2, 1e-12)
    true = float((rhs - form @ early.vector).norm() / rhs.norm())
    assert early.residual == pytest.approx(true, rel=1e-6, abs=1e-12)


def test_conjugate_gradients_stop_at_their_precision_and_do_not_depend_on_the_scale() -> None:
    form = random_form(40, 40, 0) + 0.3 * torch.eye(40, dtype=torch.float64)
    rhs = torch.randn(40, dtype=torch.float64)
    for scale in (1e-12, 1.0, 1e12):
        found = conjugate_gradients(lambda v: form @ v, scale * rhs, 40, 0.1)
        assert found.residual <= 0.1 and 1 < len(found.directions) < 20
        torch.testing.assert_close(found.vector / scale, conjugate_gradients(lambda v: form @ v, rhs, 40, 0.1).vector)


def test_curvature_that_is_not_positive_stops_them() -> None:
    rhs = torch.tensor([1.0, 1.0], dtype=torch.float64)
    for curvature in (-1.0, 0.0, math.nan):
        found = conjugate_gradients(partial(torch.mul, torch.tensor(curvature)), rhs, 5)
        assert not found.curved and not found.vector.any()
    saddle = torch.diag(torch.tensor([1.0, -0.1])).double()
    found = conjugate_gradients(lambda v: saddle @ v, rhs, 5)
    assert not found.curved and len(found.directions) == 1 and bool(torch.isfinite(found.vector).all())
    assert conjugate_gradients(lambda v: v, torch.zeros(3), 5).residual == 0.0
    assert math.isnan(conjugate_gradients(lambda v: v, torch.full((3,), math.nan), 5).residual)


def local_model(actions: str = "box", **changes: object) -> tuple[LocalModel, Tensor]:
    policy, rollout, surrogate = built(actions)
    dense = dense_fisher(policy, rollout.observations, surrogate.parameters.parameters)
    settings = {"radius": 0.02, "damping": 0.1, "iterations": len(dense), "precision": 1e-12, **changes}
    return LocalModel(surrogate.fisher(), surrogate.gradient()[1], **settings), dense


@pytest.mark.parametrize("actions", ACTIONS)
def test_the_natural_gradient_step_is_the_dense_one_and_reaches_the_edge(actions: str) -> None:
    local, dense = local_model(actions)
    step = local.step()
    exact = torch.linalg.solve(dense + 0.1 * torch.eye(len(dense), dtype=torch.float64), -local.gradient)
    exact *= math.sqrt(0.04 / float(exact @ dense @ exact))
    torch.testing.assert_close(step.displacement, exact, rtol=1e-6, atol=1e-8)
    assert step.kl == pytest.approx(0.02) and step.kept == 1.0 and step.multiplier == 0.0
    assert step.gain == pytest.approx(-float(local.gradient @ exact), rel=1e-6) and step.gain > 0.0


def test_the_null_space_step_is_the_dense_one_and_stays_there() -> None:
    local, dense = local_model()
    protected = torch.randn(20, len(dense), dtype=torch.float64)
    _, _, rows = torch.linalg.svd(protected)
    free = rows[20:]
    step = local.null_step(lambda v: v - protected.T @ torch.linalg.solve(protected @ protected.T, protected @ v))
    inner = free @ (dense + 0.1 * torch.eye(len(dense), dtype=torch.float64)) @ free.T
    exact = -free.T @ torch.linalg.solve(inner, free @ local.gradient)
    exact *= math.sqrt(0.04 / float(exact @ dense @ exact))
    torch.testing.assert_close(step.displacement, exact, rtol=1e-6, atol=1e-8)
    assert float((protected @ step.displacement).norm()) < 1e-10 * float(step.displacement.norm())
    # From the first direction on: Krylov vectors that start at zero never leave the subspace.
    early = local_model(iterations=2)[0].null_step(lambda v: free.T @ (free @ v))
    assert float((protected @ early.displacement).norm()) < 1e-10 * float(early.displacement.norm())


@pytest.mark.parametrize("whole", [True, False])
def test_where_only_some_parameters_may_move_the_step_is_the_dense_one_of_these(whole: bool) -> None:
    local, dense = local_model("box", iterations=200)
    blocks = local.fisher.factors()
    if whole:  # rows and columns of layers, which the preconditioner has a part for
        moving = torch.ones(len(dense), dtype=torch.float64)
        for layer in blocks:
            rows, columns = len(layer.outputs), len(layer.inputs) - (layer.bias is not None)
            weight = torch.ones(rows, columns, dtype=torch.float64)
            weight[0], weight[:, columns // 2] = 0.0, 0.0
            moving[layer.weight : layer.weight + rows * columns] = weight.flatten()
            if layer.bias is not None:
                moving[layer.bias] = 0.0
    else:
        moving = (torch.rand(len(dense), generator=torch.Generator().manual_seed(2)) < 0.4).double()
    assert blocks and 0 < int(moving.sum()) < len(dense)
    step = replace(local, free=moving).step()
    free = moving > 0.0
    exact = torch.zeros_like(local.gradient)
    inner = (dense + 0.1 * torch.eye(len(dense), dtype=torch.float64))[free][:, free]
    exact[free] = torch.linalg.solve(inner, -local.gradient[free])
    exact *= math.sqrt(0.04 / float(exact @ dense @ exact))
    torch.testing.assert_close(step.displacement, exact, rtol=1e-6, atol=1e-8)
    assert not step.displacement[~free].any() and step.kl == pytest.approx(0.02)


@pytest.mark.parametrize("biased", [True, False])
def test_factors_of_some_rows_and_columns_are_those_of_the_part(biased: bool) -> None:
    drawn = torch.Generator().manual_seed(1)
    inputs, outputs = (torch.randn(n, n, generator=drawn, dtype=torch.float64) for n in (4, 3))
    inputs, outputs = inputs @ inputs.T, outputs @ outputs.T
    columns = 3 if biased else 4
    layer = LayerFactors(inputs, outputs, 0, 3 * columns if biased else None)
    rows, read = torch.tensor([1.0, 0.0, 1.0]), torch.tensor([1.0, 1.0, 0.0, 1.0])[:columns]
    free = torch.outer(rows, read).flatten()
    if biased:
        free = torch.cat([free, rows])
        read = torch.cat([read, torch.ones(1)])
    part = layer.restricted(free)
    torch.testing.assert_close(part.inputs, inputs * torch.outer(read, read).double())
    torch.testing.assert_close(part.outputs, outputs * torch.outer(rows, rows).double())
    if biased:
        still = layer.restricted(torch.cat([torch.outer(rows, read[:-1]).flatten(), torch.zeros(3)]))
        assert not still.inputs[-1].any() and not still.inputs[:, -1].any()


def test_without_a_gradient_there_is_no_step() -> None:
    local, _ = local_model()
    for gradient in (torch.zeros_like(local.gradient), torch.full_like(local.gradient, math.nan)):
        still = LocalModel(local.fisher, gradient, 0.02, 0.1, 5).step()
        assert not still.displacement.any()


def test_flat_parameters_keep_the_order_of_the_columns() -> None:
    policy, _, surrogate = built("box")
    assert isinstance(surrogate.parameters, FlatParameters)
    order = [id(p) for p in policy.parameters()]
    places = [order.index(id(p)) for p in surrogate.parameters.parameters]
    assert places == sorted(places)
