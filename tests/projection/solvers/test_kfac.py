"""Kronecker factors against dense algebra, and what they do for conjugate gradients on a policy."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor, nn

from nsrl.projection.jacobians.matrix_free import WIDEST, LayerFactors, LayerPasses, linear_chain
from nsrl.projection.roots import DenseRoot
from nsrl.projection.solvers.conjugate_gradients import conjugate_gradients
from nsrl.projection.solvers.kfac import KroneckerPreconditioner
from nsrl.rl.algorithms.surrogate import Surrogate
from tests.rl.policy_builders import build_policy, draw_rollout


def layer(inputs: int, outputs: int, weight: int, *, bias: bool, generator: torch.Generator) -> LayerFactors:
    def square(size: int) -> Tensor:
        root = torch.randn(size, size, generator=generator, dtype=torch.float64)
        return root @ root.T + 0.1 * torch.eye(size, dtype=torch.float64)

    start = weight + inputs * outputs if bias else None
    return LayerFactors(square(inputs + bias), square(outputs), weight, start)


def dense(factors: Sequence[LayerFactors], size: int) -> Tensor:
    """The block-diagonal matrix that factors stand for, by the definition of the Kronecker product."""
    whole = torch.zeros(size, size, dtype=torch.float64)
    for block in factors:
        rows, columns = len(block.outputs), len(block.inputs) - (block.bias is not None)
        where = [block.weight + i * columns + j for i in range(rows) for j in range(columns)]
        places = torch.tensor(where).view(rows, columns)
        if block.bias is not None:
            places = torch.cat([places, block.bias + torch.arange(rows).unsqueeze(1)], 1)
        flat = places.flatten()
        whole[flat.unsqueeze(1), flat] = torch.kron(block.outputs.double(), block.inputs.double())
    return whole


def damped(factors: LayerFactors, damping: float) -> LayerFactors:
    """Martens & Grosse, section 6.3: the square root of the damping to each factor, in proportion to its mean."""
    balance = (factors.inputs.diagonal().mean() / factors.outputs.diagonal().mean()).sqrt()
    eyes = [torch.eye(len(factor), dtype=torch.float64) for factor in (factors.inputs, factors.outputs)]
    return replace(
        factors,
        inputs=factors.inputs + damping**0.5 * balance * eyes[0],
        outputs=factors.outputs + damping**0.5 / balance * eyes[1],
    )


@given(
    inputs=st.integers(1, 5),
    outputs=st.integers(1, 5),
    bias=st.booleans(),
    mu=st.floats(0.0, 100.0),
    damping=st.floats(0.01, 10.0),
    seed=st.integers(0, 1000),
)
def test_it_inverts_the_sum_of_two_kronecker_products(
    inputs: int, outputs: int, bias: bool, mu: float, damping: float, seed: int
) -> None:
    generator = torch.Generator().manual_seed(seed)
    size = inputs * outputs + bias * outputs + 3
    one, other = (layer(inputs, outputs, 2, bias=bias, generator=generator) for _ in range(2))
    vector = torch.randn(size, generator=generator, dtype=torch.float64)
    found = KroneckerPreconditioner([one], damping, [other])(vector, mu)
    product = (dense([damped(one, damping)], size) + mu * dense([other], size)) @ found
    covered = slice(2, size - 1)
    torch.testing.assert_close(product[covered], vector[covered], rtol=1e-7, atol=1e-7)
    assert torch.equal(found[:2], vector[:2]) and found[-1] == vector[-1]


@pytest.mark.parametrize("bias", [True, False])
def test_the_factors_of_one_state_and_one_output_are_its_fisher_information(bias: bool) -> None:
    torch.manual_seed(0)
    net = nn.Sequential(
        nn.Linear(4, 5, bias=bias), nn.Tanh(), nn.Linear(5, 3, bias=bias), nn.ReLU(), nn.Linear(3, 2, bias=bias)
    ).double()
    parameters = list(net.parameters())
    inputs, seeds = torch.randn(1, 4, dtype=torch.float64), torch.randn(1, 1, 2, dtype=torch.float64)
    stages = linear_chain(list(net), parameters)
    assert stages is not None
    factors = LayerPasses(stages, inputs, parameters).factors(DenseRoot(seeds))
    grads = torch.autograd.grad((net(inputs) * seeds[:, 0]).sum(), parameters)
    row = torch.cat([grad.flatten() for grad in grads])
    found = dense(factors, len(row))
    expected = torch.zeros_like(found)
    for block in factors:  # the factors know nothing of products between layers; a bias follows its weight
        own = torch.zeros_like(row)
        columns = slice(block.weight, block.weight + len(block.outputs) * len(block.inputs))
        own[columns] = row[columns]
        expected += torch.outer(own, own)
    torch.testing.assert_close(found, expected, rtol=1e-9, atol=1e-12)


def test_factors_are_means_of_inputs_and_sums_of_output_gradients() -> None:
    torch.manual_seed(1)
    net = nn.Sequential(nn.Linear(3, 2)).double()
    inputs, seeds = torch.randn(7, 3, dtype=torch.float64), torch.randn(7, 4, 2, dtype=torch.float64)
    stages = linear_chain(list(net), list(net.parameters()))
    assert stages is not None
    (factors,) = LayerPasses(stages, inputs, list(net.parameters())).factors(DenseRoot(seeds))
    ones = torch.cat([inputs, torch.ones(7, 1, dtype=torch.float64)], 1)
    torch.testing.assert_close(factors.inputs, ones.T @ ones / 7)
    torch.testing.assert_close(factors.outputs, torch.einsum("nro,nrp->op", seeds, seeds))


def test_layers_too_wide_to_invert_have_none() -> None:
    """Their columns pass through unchanged, and conjugate gradients still find the same."""
    torch.manual_seed(2)
    net = nn.Sequential(nn.Linear(WIDEST + 1, 3), nn.Tanh(), nn.Linear(3, 2)).double()
    parameters = list(net.parameters())
    stages = linear_chain(list(net), parameters)
    assert stages is not None
    passes = LayerPasses(stages, torch.randn(5, WIDEST + 1, dtype=torch.float64), parameters)
    factors = passes.factors(DenseRoot(torch.randn(5, 2, 2, dtype=torch.float64)))
    assert [factor.weight for factor in factors] == [3 * (WIDEST + 1) + 3]
    vector = torch.randn(sum(p.numel() for p in parameters), dtype=torch.float64)
    divide = KroneckerPreconditioner(factors, 0.1)
    assert torch.equal(divide(vector)[:-8], vector[:-8]) and not torch.equal(divide(vector)[-8:], vector[-8:])

    def product(moved: Tensor) -> Tensor:
        return passes.pull(passes.push(moved)) + 0.1 * moved

    exact, found = (conjugate_gradients(product, vector, 100, 1e-10, how).vector for how in (None, divide))
    torch.testing.assert_close(found, exact, rtol=1e-6, atol=1e-6)


@pytest.mark.parametrize("actions", ["discrete", "multi_discrete", "multi_binary", "box"])
def test_conjugate_gradients_need_fewer_iterations_on_a_policy_and_find_the_same(actions: str) -> None:
    policy = build_policy(actions, "tanh")
    surrogate = Surrogate(policy, draw_rollout(policy, 200))
    fisher = surrogate.fisher()
    gradient = surrogate.gradient()[1]

    def product(vector: Tensor) -> Tensor:
        return fisher.rmatvec(fisher.matvec(vector)) + 0.01 * vector

    divide = KroneckerPreconditioner(fisher.factors(), 0.01)
    exact = conjugate_gradients(product, gradient, 500, 1e-5).vector
    same = conjugate_gradients(product, gradient, 500, 1e-5, divide).vector
    torch.testing.assert_close(same, exact, rtol=1e-2, atol=1e-3 * float(exact.abs().max()))

    def error(vector: Tensor) -> float:
        left = exact - vector
        return float(left @ product(left)) / float(exact @ product(exact))

    plain, better = (conjugate_gradients(product, gradient, 5, 0.0, how).vector for how in (None, divide))
    assert error(better) < 0.95 * error(plain)
