"""Matrix-free roots of a Hessian against the rows that they stand for, and against autograd."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor
from torch.func import hessian

from nsrl.projection import roots
from nsrl.projection.metrics import Bernoulli, Categorical, Gaussian
from nsrl.projection.roots import DenseRoot, Root, largest_rows
from nsrl.rl.policies.distributions import MaskedCategorical
from tests.tolerances import assert_near

STATES = 5


def metric(name: str) -> tuple[object, int]:
    """A metric, and its number of outputs."""
    torch.manual_seed(0)
    if name == "masked":
        valid = torch.rand(STATES, 9) < 0.5
        valid[:, 3] = True
        return MaskedCategorical((9,), 0.01, valid), 9
    if name == "gaussian":
        return Gaussian(torch.randn(6).double(), torch.randn(6).double()), 6
    return {
        "categorical": (Categorical((9,), 0.01), 9),
        "untempered": (Categorical((9,), 0.0), 9),
        "several": (Categorical((2, 5, 3), 0.01), 10),
        "two": (Categorical((2,), 0.01), 2),
        "bernoulli": (Bernoulli(0.01), 7),
    }[name]


NAMES = ["categorical", "untempered", "several", "two", "masked", "bernoulli", "gaussian"]


@pytest.fixture
def matrix_free(monkeypatch: pytest.MonkeyPatch) -> None:
    """As if no number of outputs were small enough to keep the rows."""
    for module in ("nsrl.projection.metrics", "nsrl.rl.policies.distributions"):
        monkeypatch.setattr(f"{module}.KEPT", 0)


def drawn(name: str) -> tuple[Root, Tensor, Tensor]:
    """A matrix-free root, the rows that it stands for, and outputs."""
    held, width = metric(name)
    outputs = 2.0 * torch.randn(STATES, width, dtype=torch.float64)
    root = held.root(outputs)  # type: ignore[attr-defined]
    assert not isinstance(root, DenseRoot)
    return root, held.seeds(outputs), outputs  # type: ignore[attr-defined]


@pytest.mark.usefixtures("matrix_free")
@pytest.mark.parametrize("name", NAMES)
def test_products_are_those_of_the_rows(name: str) -> None:
    root, rows, outputs = drawn(name)
    assert root.shape == tuple(rows.shape)
    factors = torch.rand(STATES, dtype=torch.float64)
    root, rows = root.times(None).times(factors).divided(3.0), rows * factors.view(-1, 1, 1) / 3.0
    pushed = torch.randn(rows.shape[:2], dtype=torch.float64)
    assert_near(root.apply(outputs), (rows @ outputs.unsqueeze(2)).squeeze(2), terms=20)
    assert_near(root.transpose(pushed), (pushed.unsqueeze(1) @ rows).squeeze(1), terms=20)


@pytest.mark.usefixtures("matrix_free")
@pytest.mark.parametrize("name", ["untempered", "two"])
def test_the_root_of_a_softmax_is_that_of_autograd_s_hessian(name: str) -> None:
    _, width = metric(name)
    outputs = torch.randn(STATES, width, dtype=torch.float64)
    root = Categorical((width,), 0.0).root(outputs)
    curvature = torch.stack([hessian(lambda z: torch.logsumexp(z, 0))(row) for row in outputs])
    for column in torch.eye(width, dtype=torch.float64):
        product = root.transpose(root.apply(column.expand(STATES, -1)))
        assert_near(product, curvature @ column, terms=20, scale=1.0)


@pytest.mark.usefixtures("matrix_free")
@pytest.mark.parametrize("name", NAMES)
def test_the_largest_rows_are_rows_and_the_largest_ones(name: str) -> None:
    root, rows, _ = drawn(name)
    r = rows.shape[1]
    for count in (1, r, r + 3):
        found, which = largest_rows(root, count)
        assert_near(found, rows.gather(1, which.unsqueeze(2).expand(-1, -1, rows.shape[2])), terms=20, scale=1.0)
        assert which.shape == (STATES, min(count, r))
    dense, chosen = largest_rows(DenseRoot(rows), 1)
    assert torch.equal(chosen[:, 0], rows.square().sum(2).argmax(1)) and dense.shape == (STATES, 1, rows.shape[2])


@pytest.mark.usefixtures("matrix_free")
@pytest.mark.parametrize("name", ["categorical", "masked", "several", "bernoulli"])
def test_a_sketch_is_right_on_average(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    root, rows, _ = drawn(name)
    before = torch.get_rng_state()
    monkeypatch.setattr(roots, "SKETCHED", 4000)
    sketch = root.sampled(2)
    assert torch.equal(before, torch.get_rng_state())
    exact, found = (part.transpose(1, 2) @ part for part in (rows[::2], sketch))
    # An entry is a mean of 4000 products of size at most |H|: its standard error is |H| / sqrt(4000); six of them.
    assert float((found - exact).abs().max()) <= 6.0 * float(exact.abs().max()) * rows.shape[1] ** 0.5 / 4000**0.5


def test_divergences_in_pieces_are_those_at_once(monkeypatch: pytest.MonkeyPatch) -> None:
    reference, outputs = torch.randn(2, 11, 10)
    for held in (Categorical((10,)), Categorical((4, 6))):
        whole = held.divergence(reference, outputs)
        monkeypatch.setattr("nsrl.projection.metrics.AT_ONCE", 25)
        assert torch.equal(held.divergence(reference, outputs), whole)
        monkeypatch.undo()
