"""Kronecker factors: what they are exact for, the bound of a merge, and which parameters they leave out."""

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor, nn

from nsrl.projection import Hard, KroneckerConstraint, Tikhonov, jacobian, parameter_columns
from tests.projection.builders import Net, mlp, normal


def build(net: nn.Module, *batches: Tensor, scale: float = 1.0) -> KroneckerConstraint:
    constraint = KroneckerConstraint(parameter_columns(net))
    for batch in batches:
        constraint.update(jacobian(net, batch, scale=scale))
    return constraint


def form(constraint: KroneckerConstraint) -> Tensor:
    """F as a dense matrix."""
    eye = torch.eye(len(constraint.values)).double()
    basis = torch.stack([constraint.combine(unit) for unit in eye], 1)
    return basis * constraint.values @ basis.T


def block_gauss_newton(net: nn.Module, inputs: Tensor) -> Tensor:
    """J^T J without the terms between layers."""
    matrix = jacobian(net, inputs).dense()
    result = torch.zeros(matrix.shape[1], matrix.shape[1]).double()
    start = 0
    for layer in net.modules():
        own = sum(p.numel() for p in layer.parameters(recurse=False))
        part = matrix[:, start : start + own]
        result[start : start + own, start : start + own] = part.T @ part
        start += own
    return result


def test_exact_for_one_sample():
    net, inputs = mlp(4, 5, 2).double(), normal(1, 4)
    torch.testing.assert_close(form(build(net, inputs)), block_gauss_newton(net, inputs))


def test_exact_when_the_inputs_of_a_layer_agree():
    net = nn.Linear(4, 3).double()
    inputs = normal(1, 4).expand(6, 4)
    torch.testing.assert_close(form(build(net, inputs)), block_gauss_newton(net, inputs))


def test_positions_are_samples_of_their_own():
    """Expand: on tokens that do not talk to each other the factors are those of as many samples."""
    net = mlp(4, 5, 2).double()
    tokens = normal(3, 6, 4)
    per_sample = KroneckerConstraint(parameter_columns(net))
    per_sample.update(jacobian(net, tokens, forward=lambda net, x: net(x).flatten(1)))
    per_token = build(net, tokens.flatten(0, 1))
    torch.testing.assert_close(form(per_sample), form(per_token))


@pytest.mark.parametrize(
    "make,shape,covered",
    [
        (
            lambda: nn.Sequential(nn.Conv2d(2, 4, 2, groups=2), nn.Tanh(), nn.Flatten(), nn.Linear(16, 2)),
            (3, 2, 3, 3),
            2,
        ),
        (
            lambda: Net(
                lambda net, x: net.out(net.inner(torch.tanh(net.inner(x)))), inner=nn.Linear(5, 5), out=nn.Linear(5, 2)
            ),
            (4, 5),
            2,
        ),
        (lambda: nn.Sequential(nn.Linear(5, 6, bias=False), nn.Tanh(), nn.Linear(6, 2)), (4, 5), 2),
    ],
)
def test_the_null_space_lies_within_that_of_the_jacobian(make, shape, covered):
    net, inputs = make().double(), normal(*shape)
    constraint = build(net, inputs)
    assert constraint.uncovered == ()
    assert len(constraint.project(normal(constraint.width)).kept_by_layer) == covered
    displacement = normal(constraint.width)
    moved = constraint.project(displacement).displacement
    matrix = jacobian(net, inputs).dense()
    assert float((matrix @ moved).norm()) < 1e-9 * float((matrix @ displacement).norm())
    assert float(moved.norm()) > 0.1


def test_batches_pool():
    net, inputs = mlp(4, 5, 2).double(), normal(9, 4)
    stream, shot = build(net, *inputs.split([2, 3, 4])), build(net, inputs)
    torch.testing.assert_close(form(stream), form(shot), rtol=1e-10, atol=1e-10)
    displacement = normal(stream.width)
    for filter in (Tikhonov(0.5), Hard(tolerance=0.1)):
        results = [constraint.project(displacement, filter).displacement for constraint in (stream, shot)]
        torch.testing.assert_close(*results, rtol=1e-9, atol=1e-9)


@given(seed=st.integers(0, 50), sizes=st.tuples(st.integers(1, 5), st.integers(1, 5)), loudness=st.integers(-3, 3))
def test_a_merge_is_an_upper_bound(seed, sizes, loudness):
    """S1 (x) A1 + S2 (x) A2 <= (S1 + S2) (x) (A1 + A2): over-protection, never under-protection."""
    torch.manual_seed(seed)
    net = mlp(3, 4, 2).double()
    parts = [
        build(net, normal(sizes[0], 3, seed=seed)),
        build(net, normal(sizes[1], 3, seed=seed + 1), scale=10.0**loudness),
    ]
    forms, merged = [form(part) for part in parts], parts[0].merged(parts[1])
    excess = torch.linalg.eigvalsh(form(merged) - forms[0] - forms[1])
    scale = float(form(merged).norm())
    assert float(excess.min()) > -1e-11 * scale
    assert float(excess.max()) > 1e-6 * scale  # and it is a bound, not the sum
    left = merged.project(normal(merged.width)).displacement
    for part in parts:
        assert float(part.components(left).norm()) < 1e-6 * float(left.norm() + 1e-9) + 1e-9


def test_a_merged_constraint_takes_no_more_batches():
    net = mlp(3, 4, 2).double()
    parts = [build(net, normal(3, 3, seed=seed)) for seed in range(3)]
    merged = parts[0].merged(parts[1])
    with pytest.raises(ValueError, match="merge"):
        merged.update(jacobian(net, normal(3, 3)))
    torch.testing.assert_close(form(merged.merged(parts[2])), form(parts[0].merged(parts[1].merged(parts[2]))))
    with pytest.raises(ValueError, match="same parameters"):
        merged.merged(build(mlp(3, 5, 2).double(), normal(2, 3)))


def test_what_has_no_factors_is_uncovered():
    net = Net(
        lambda net, x: net.out(net.norm(net.body(net.embed(x)).sum(1))) * net.gain,
        embed=nn.Embedding(7, 5),
        body=nn.Linear(5, 6),
        norm=nn.LayerNorm(6),
        out=nn.Linear(6, 2),
        gain=nn.Parameter(torch.ones(2)),
    )
    constraint = build(net, torch.randint(7, (3, 4)))
    assert constraint.uncovered == ("gain", "embed.weight", "norm.weight", "norm.bias")


def test_a_tied_weight_is_uncovered():
    net = Net(lambda net, x: net.b(torch.tanh(net.a(x))), a=nn.Linear(4, 4), b=nn.Linear(4, 4))
    net.b.weight = net.a.weight
    assert "a.weight" in build(net.double(), normal(3, 4)).uncovered


def test_a_layer_that_turns_dense_loses_its_factors():
    net, inputs = mlp(4, 5, 2).double(), normal(3, 4)
    constraint = build(net, inputs)
    constraint.update(jacobian(net, inputs, dense=["0.weight"]))
    assert constraint.uncovered == ("0.weight", "0.bias")
    merged = build(net, inputs).merged(constraint)
    assert merged.uncovered == ("0.weight", "0.bias")


def test_memory_is_that_of_the_factors():
    net = mlp(30, 40, 2).double()
    constraint = build(net, normal(3, 30))
    assert constraint.nbytes() == 8 * (31**2 + 40**2 + 41**2 + 2**2)


def test_an_empty_net_has_no_factors():
    net = nn.Sequential(nn.LayerNorm(4)).double()
    with pytest.raises(ValueError, match="linear layers"):
        build(net, normal(3, 4)).project(normal(8))
