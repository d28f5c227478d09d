"""Every operation of the factored Jacobian against `torch.func.jacrev`, over the architecture matrix."""

import copy
import math
from functools import cache

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given
from hypothesis import strategies as st
from torch import nn

from nsrl.projection import FactoredJacobian, JacobianError, StackedJacobian, jacobian
from nsrl.projection.jacobians.blocks import DenseBlock, EmbeddingBlock, LinearBlock
from tests.projection.architecture import Architecture, vectors
from tests.projection.architectures import ARCHITECTURES
from tests.projection.builders import Net, copied, jacrev_matrix, matrix_jacobian, mlp, normal, single

EXACT = {"rtol": 1e-10, "atol": 1e-10}


def assert_near(actual: torch.Tensor, expected: torch.Tensor) -> None:
    """Equal to 1e-5 of the whole: float32 round-off of 6e-8, times ten to a hundred for depth and conditioning."""
    assert float((actual.double() - expected).norm()) <= 1e-5 * float(expected.norm())


every_architecture = pytest.mark.parametrize("architecture", ARCHITECTURES, ids=str)


# vmap falls back to loops for a few operators of the matrix
pytestmark = pytest.mark.filterwarnings("ignore:There is a performance drop")


def build(architecture: Architecture):
    torch.manual_seed(0)
    return architecture.build().double(), architecture.inputs(4, 1)


@cache
def solve(architecture: Architecture):
    """The factored Jacobian and the oracle's matrix, once for all tests that only read them."""
    module, inputs = build(architecture)
    return jacobian(module, inputs), architecture.oracle(module, inputs)


@every_architecture
def test_rows_and_columns(architecture: Architecture):
    module, inputs = build(architecture)
    result, expected = jacobian(module, inputs), architecture.oracle(module, inputs)
    assert result.shape == tuple(expected.shape)
    torch.testing.assert_close(result.dense(), expected, **EXACT)
    assert result.names == tuple(name for name, p in module.named_parameters() if p.requires_grad)
    torch.testing.assert_close(result.outputs, module(copied(inputs)).detach(), **EXACT)
    assert not result.outputs.requires_grad


@every_architecture
def test_products(architecture: Architecture):
    result, expected = solve(architecture)
    vector, rows = normal(expected.shape[1], seed=5), normal(expected.shape[0], seed=6)
    torch.testing.assert_close(result.matvec(vector), expected @ vector, **EXACT)
    torch.testing.assert_close(result.rmatvec(rows), expected.T @ rows, **EXACT)


@every_architecture
def test_products_with_many_vectors(architecture: Architecture):
    result, expected = solve(architecture)
    vectors, rows = normal(expected.shape[1], 3, seed=5), normal(expected.shape[0], 3, seed=6)
    torch.testing.assert_close(result.matmat(vectors), expected @ vectors, **EXACT)
    torch.testing.assert_close(result.rmatmat(rows), expected.T @ rows, **EXACT)


@every_architecture
def test_squared_column_norms(architecture: Architecture):
    result, expected = solve(architecture)
    torch.testing.assert_close(result.column_squares(), expected.square().sum(0), **EXACT)


@every_architecture
def test_gram_and_cross_gram(architecture: Architecture):
    module, _ = build(architecture)
    others = architecture.inputs(3, 2)
    here, expected = solve(architecture)
    there, others_expected = jacobian(module, others), architecture.oracle(module, others)
    gram = here.gram()
    torch.testing.assert_close(gram, expected @ expected.T, **EXACT)
    assert torch.equal(gram, gram.T)
    torch.testing.assert_close(here.cross_gram(there), expected @ others_expected.T, **EXACT)


@every_architecture
def test_scaled_columns(architecture: Architecture):
    result, expected = solve(architecture)
    wanted = normal(expected.shape[1], seed=7).exp()
    scaled, fitted = result.scaled(wanted)
    expected = expected * fitted
    vector, rows = normal(expected.shape[1], seed=5), normal(expected.shape[0], seed=6)
    torch.testing.assert_close(scaled.dense(), expected, **EXACT)
    torch.testing.assert_close(scaled.matvec(vector), expected @ vector, **EXACT)
    torch.testing.assert_close(scaled.rmatvec(rows), expected.T @ rows, **EXACT)
    torch.testing.assert_close(scaled.gram(), expected @ expected.T, **EXACT)
    for block in result.blocks:
        if isinstance(block, DenseBlock):
            torch.testing.assert_close(fitted[slice(*block.columns)], wanted[slice(*block.columns)], **EXACT)


@every_architecture
def test_single_precision(architecture: Architecture):
    module, inputs = build(architecture)
    expected = solve(architecture)[1]
    result = jacobian(module.float(), single(inputs))
    vector, rows = normal(expected.shape[1], seed=5), normal(expected.shape[0], seed=6)
    assert result.dense().dtype == torch.float32
    assert_near(result.dense(), expected)
    assert_near(result.matvec(vector.float()), expected @ vector)
    assert_near(result.rmatvec(rows.float()), expected.T @ rows)
    assert result.gram().dtype == torch.float64
    assert_near(result.gram(), expected @ expected.T)
    assert result.gram(torch.float32).dtype == torch.float32
    assert_near(result.gram(torch.float32), expected @ expected.T)
    others = architecture.inputs(3, 2)
    others_expected = architecture.oracle(build(architecture)[0], others)
    others = jacobian(module, single(others))
    assert_near(result.cross_gram(others), expected @ others_expected.T)


@every_architecture
def test_kinds_of_blocks(architecture: Architecture):
    """The fast form is used where there is one: a silent fall-back to dense columns would still pass the oracle."""
    result, _ = solve(architecture)
    dense = [block for block in result.blocks if isinstance(block, DenseBlock)]
    assert len(dense) <= architecture.dense
    assert all(isinstance(block, (DenseBlock, LinearBlock, EmbeddingBlock)) for block in result.blocks)


@every_architecture
def test_leaves_the_module_alone(architecture: Architecture):
    module, inputs = build(architecture)
    before, hooks = copy.deepcopy(module.state_dict()), [len(m._forward_hooks) for m in module.modules()]
    jacobian(module, inputs)
    after = module.state_dict()
    assert all(torch.equal(after[name], value) for name, value in before.items())
    assert all(p.grad is None for p in module.parameters())
    assert [len(m._forward_hooks) for m in module.modules()] == hooks


@pytest.mark.parametrize("wanted", [["2.bias"], ["2.weight", "0.weight"], ["0.bias", "2.bias", "0.weight"]])
def test_parameter_subset_keeps_the_order_of_the_module(wanted):
    module, inputs = mlp(4, 5, 3).double(), vectors(4, 0)
    result = jacobian(module, inputs, parameters=iter(wanted))
    assert result.names == tuple(name for name, _ in module.named_parameters() if name in wanted)
    torch.testing.assert_close(result.dense(), jacrev_matrix(module, inputs, names=wanted), **EXACT)
    torch.testing.assert_close(result.gram(), result.dense() @ result.dense().T, **EXACT)


@pytest.mark.parametrize("rows", [1, 2, 3, 5])
def test_seed_combines_the_outputs(rows):
    """S may have fewer or more rows than outputs, and may depend on them."""
    module, inputs = mlp(4, 5, 3).double(), vectors(4, 0)
    mixing = normal(4, rows, 3, seed=3)

    def seed(outputs):
        assert not outputs.requires_grad
        return mixing * outputs.unsqueeze(1).cos()

    result = jacobian(module, inputs, seed=seed)
    plain = jacrev_matrix(module, inputs).view(4, 3, -1)
    expected = (seed(module(inputs).detach()) @ plain).flatten(0, 1)
    assert result.shape == tuple(expected.shape)
    torch.testing.assert_close(result.dense(), expected, **EXACT)
    torch.testing.assert_close(result.gram(), expected @ expected.T, **EXACT)


def test_scale_multiplies_every_row():
    module = Net(lambda net, x: net.a(x) * net.g, a=nn.Linear(4, 3), g=nn.Parameter(normal(3))).double()
    inputs = vectors(4, 0)
    plain, scaled = jacobian(module, inputs), jacobian(module, inputs, scale=1 / math.sqrt(4))
    torch.testing.assert_close(scaled.dense(), plain.dense() / 2, **EXACT)
    torch.testing.assert_close(scaled.gram(), plain.gram() / 4, **EXACT)
    torch.testing.assert_close(scaled.matvec(normal(18)), plain.matvec(normal(18)) / 2, **EXACT)
    torch.testing.assert_close(scaled.outputs, plain.outputs, **EXACT)


def test_nested_inputs_through_forward():
    def forward(module, inputs):
        return module(torch.cat([inputs["a"], inputs["rest"][0]], 1)) * module[0].bias[:2]

    module = mlp(4, 5, 2).double()
    inputs = {"a": normal(3, 1), "rest": (normal(3, 3, seed=1),)}
    result = jacobian(module, inputs, forward=forward)
    torch.testing.assert_close(result.dense(), jacrev_matrix(module, inputs, forward), **EXACT)


def test_works_inside_no_grad():
    module, inputs = mlp(4, 5, 3).double(), vectors(4, 0)
    with torch.no_grad():
        result = jacobian(module, inputs)
    torch.testing.assert_close(result.dense(), jacrev_matrix(module, inputs), **EXACT)


def test_later_changes_of_the_module_do_not_reach_the_factors():
    module, inputs = mlp(4, 5, 3).double(), vectors(4, 0)
    result = jacobian(module, inputs)
    before = result.dense()
    with torch.no_grad():
        for p in module.parameters():
            p.add_(1.0)
    torch.testing.assert_close(result.dense(), before, rtol=0, atol=0)


def test_memory_of_a_wide_layer_stays_factored():
    result = jacobian(nn.Linear(300, 200), torch.randn(4, 300))
    assert result.nbytes() < 0.01 * result.dense().numel() * 4


@pytest.mark.parametrize("method", ["matvec", "rmatvec"])
def test_wrong_lengths_are_refused(method):
    result = jacobian(mlp(4, 5, 3), torch.randn(2, 4))
    for wrong in (torch.zeros(7), torch.zeros(result.shape[1 if method == "matvec" else 0], 1)):
        with pytest.raises(JacobianError, match="must have shape"):
            getattr(result, method)(wrong)


def test_cross_gram_of_other_parameters_is_refused():
    module, inputs = mlp(4, 4, 3), torch.randn(2, 4)
    with pytest.raises(JacobianError, match="same parameters"):
        jacobian(module, inputs).cross_gram(jacobian(module, inputs, parameters=["0.weight"]))


def test_scale_of_a_linear_layer_is_its_rank_one_geometric_fit():
    """The least-squares fit of log s by row + column terms; exact when s is an outer product already."""
    scale = normal(3, 5, seed=2).exp()  # d_out x (d_in + bias)
    flat = torch.cat([scale[:, :4].flatten(), scale[:, 4]])
    result = jacobian(nn.Linear(4, 3).double(), vectors(2, 0))
    fitted = result.scaled(flat)[1]
    matrix = torch.cat([fitted[:12].view(3, 4), fitted[12:].view(3, 1)], 1)
    logs = scale.log()
    expected = (logs.mean(1, keepdim=True) + logs.mean(0, keepdim=True) - logs.mean()).exp()
    torch.testing.assert_close(matrix, expected, **EXACT)
    torch.testing.assert_close(result.scaled(fitted)[1], fitted, **EXACT)


def stack_of_three():
    torch.manual_seed(0)
    module = Net(lambda net, x: net.a(x) * net.g, a=nn.Linear(4, 3), g=nn.Parameter(normal(3))).double()
    return StackedJacobian(
        [
            jacobian(module, vectors(4, 0)),
            jacobian(module, vectors(2, 1), seed=lambda outputs: normal(2, 2, 3)),
            _gain_rows(),
        ]
    )


def _gain_rows() -> FactoredJacobian:
    """Rows that touch the gain only, as the constraint adds them for a log standard deviation."""
    rows = DenseBlock(torch.eye(3, dtype=torch.float64).unsqueeze(0), (0, 3))
    return FactoredJacobian([rows], (3, 18), 3, ("g", "a.weight", "a.bias"), torch.zeros(1, 3, dtype=torch.float64))


def test_stack_equals_concatenation():
    stack = stack_of_three()
    expected = torch.cat([part.dense() for part in stack.parts])
    assert stack.shape == tuple(expected.shape) == (12 + 4 + 3, 18)
    torch.testing.assert_close(stack.dense(), expected, **EXACT)
    torch.testing.assert_close(stack.matvec(normal(18)), expected @ normal(18), **EXACT)
    torch.testing.assert_close(stack.rmatvec(normal(19)), expected.T @ normal(19), **EXACT)
    torch.testing.assert_close(stack.matmat(normal(18, 2)), expected @ normal(18, 2), **EXACT)
    torch.testing.assert_close(stack.rmatmat(normal(19, 2)), expected.T @ normal(19, 2), **EXACT)
    torch.testing.assert_close(stack.column_squares(), expected.square().sum(0), **EXACT)
    gram, first = stack.gram(), stack.parts[0]
    torch.testing.assert_close(gram, expected @ expected.T, **EXACT)
    assert torch.equal(gram, gram.T)
    torch.testing.assert_close(stack.cross_gram(first), expected @ first.dense().T, **EXACT)
    torch.testing.assert_close(first.cross_gram(stack), first.dense() @ expected.T, **EXACT)
    torch.testing.assert_close(stack.cross_gram(stack), gram, **EXACT)
    assert stack.nbytes() == sum(part.nbytes() for part in stack.parts)


def test_a_stack_needs_the_same_parameters():
    module = mlp(4, 5, 3).double()
    parts = [jacobian(module, vectors(4, 0)), jacobian(module, vectors(4, 0), parameters=["0.weight"])]
    for wrong in ([], parts):
        with pytest.raises(JacobianError, match="same parameters"):
            StackedJacobian(wrong)


def test_scaled_stack_equals_concatenation():
    stack = stack_of_three()
    scaled, fitted = stack.scaled(normal(18, seed=4).exp())
    expected = stack.dense() * fitted
    torch.testing.assert_close(scaled.dense(), expected, **EXACT)
    torch.testing.assert_close(scaled.gram(), expected @ expected.T, **EXACT)


def outside(module: nn.Module, x: torch.Tensor) -> torch.Tensor:
    return module(x) + module.bias.square()


def outside_weight(module: nn.Module, x: torch.Tensor) -> torch.Tensor:
    return module(x) + F.linear(x.sin(), module.weight)


@pytest.mark.parametrize("forward", [outside, outside_weight])
@pytest.mark.parametrize("order", [1, -1])
def test_factored_against_partly_dense_columns(forward, order):
    """One of two Jacobians of the same layer had to fall back to dense columns for one of its parameters."""
    module = nn.Linear(4, 3).double()
    parts = [jacobian(module, vectors(4, 0)), jacobian(module, vectors(3, 1), forward=forward)][::order]
    stack = StackedJacobian(parts)
    torch.testing.assert_close(parts[0].cross_gram(parts[1]), parts[0].dense() @ parts[1].dense().T, **EXACT)
    torch.testing.assert_close(stack.gram(), stack.dense() @ stack.dense().T, **EXACT)


@pytest.mark.parametrize("forward", [outside, outside_weight])
def test_scaled_stack_of_factored_and_partly_dense_columns(forward):
    module = nn.Linear(4, 3).double()
    stack = StackedJacobian([jacobian(module, vectors(4, 0)), jacobian(module, vectors(3, 1), forward=forward)])
    scaled, fitted = stack.scaled(normal(15, seed=4).exp())
    torch.testing.assert_close(scaled.dense(), stack.dense() * fitted, **EXACT)


@given(
    samples=st.integers(1, 4),
    width_in=st.integers(1, 6),
    width_out=st.integers(1, 6),
    positions=st.integers(1, 4),
    bias=st.booleans(),
    seed=st.integers(0, 99),
)
def test_positions_of_any_shape(samples, width_in, width_out, positions, bias, seed):
    """Both sides of the rule T^2 (d_in + d_out) < d_in d_out give the same Gram matrix."""
    torch.manual_seed(seed)
    module = Net(lambda net, x: net.a(x).cos().sum(1), a=nn.Linear(width_in, width_out, bias=bias)).double()
    inputs = normal(samples, positions, width_in, seed=seed)
    result, expected = jacobian(module, inputs), jacrev_matrix(module, inputs)
    torch.testing.assert_close(result.gram(), expected @ expected.T, **EXACT)
    torch.testing.assert_close(result.matvec(expected[0]), expected @ expected[0], **EXACT)
    torch.testing.assert_close(result.rmatvec(expected[:, 0]), expected.T @ expected[:, 0], **EXACT)


@pytest.mark.parametrize("widths", [(4, 30, 20), (4, 2, 2)], ids=["factored", "materialised"])
@pytest.mark.parametrize("positions", [(1, 3), (3, 1), (2, 3)])
def test_cross_gram_of_sequences_of_different_length(widths, positions):
    torch.manual_seed(0)
    body = mlp(*widths).double()
    module = Net(lambda net, x: net.a(x).mean(1), a=body)
    here, there = (normal(3, length, 4, seed=length) for length in positions)
    expected = jacrev_matrix(module, here) @ jacrev_matrix(module, there).T
    torch.testing.assert_close(jacobian(module, here).cross_gram(jacobian(module, there)), expected, **EXACT)


def test_the_builder_of_matrices_is_honest():
    matrix = normal(3, 5)
    torch.testing.assert_close(matrix_jacobian(matrix).dense(), matrix, **EXACT)
    torch.testing.assert_close(matrix_jacobian(matrix).gram(), matrix @ matrix.T, **EXACT)
