"""Jacobians with some of their samples, or with float64 factors, against the dense Jacobian."""

import pytest
import torch
from torch import nn

from nsrl.projection import FactoredJacobian, ShardedJacobian, StackedJacobian, jacobian, sharded_jacobian
from nsrl.projection.jacobians.factored import doubled, is_whole, row_chunks, storage
from tests.projection.builders import Net, Products, jacrev_matrix, matrix_jacobian, mlp, normal
from tests.tolerances import assert_near


def cases() -> dict[str, tuple[nn.Module, torch.Tensor]]:
    torch.manual_seed(0)
    words = Net(lambda net, x: net.head(net.table(x).mean(1)), table=nn.Embedding(7, 3), head=nn.Linear(3, 2))
    image = nn.Sequential(nn.Conv2d(1, 2, 3), nn.ReLU(), nn.Flatten(), nn.LayerNorm(8), nn.Linear(8, 3))
    return {
        "linear": (mlp(3, 5, 2), normal(7, 3, dtype=torch.float32)),
        "embedding": (words, torch.randint(7, (6, 4))),
        "convolution": (image, normal(5, 1, 4, 4, dtype=torch.float32)),
    }


@pytest.mark.parametrize("name", cases())
@pytest.mark.parametrize("entries", [1, 60, 10**6])
def test_chunks_of_rows(name, entries):
    net, inputs = cases()[name]
    factored = jacobian(net, inputs)
    chunks = list(row_chunks(factored, entries))
    per_sample = factored.shape[0] // len(inputs) * factored.shape[1]
    assert all(chunk.dtype == torch.float64 and chunk.numel() <= max(entries, per_sample) for chunk in chunks)
    assert len(chunks) == (1 if entries == 10**6 else len(inputs) if entries == 1 else len(chunks))
    torch.testing.assert_close(torch.cat(chunks), jacrev_matrix(net, inputs).double(), rtol=1e-4, atol=1e-5)
    assert torch.equal(torch.cat(chunks), factored.dense().double())


def test_chunks_of_a_stack():
    first, second = matrix_jacobian(normal(5, 4)), matrix_jacobian(normal(3, 4, seed=1))
    stacked = StackedJacobian([first, second])
    assert torch.equal(torch.cat(list(row_chunks(stacked, 8))), stacked.dense())


@pytest.mark.parametrize("name", cases())
def test_doubled(name):
    """The same numbers, and products as exact as float64 is."""
    net, inputs = cases()[name]
    factored = jacobian(net, inputs)
    precise = doubled(factored)
    assert storage(factored)[0] == torch.float32 and storage(precise)[0] == torch.float64
    dense = precise.dense()
    assert_near(dense, factored.dense(), terms=16)  # positions of the convolution
    torch.testing.assert_close(precise.gram(), dense @ dense.T, rtol=1e-12, atol=1e-12)
    torch.testing.assert_close(precise.gram(), factored.gram(), rtol=1e-4, atol=1e-5)
    vector, rows = normal(dense.shape[1]), normal(dense.shape[0])
    torch.testing.assert_close(precise.matvec(vector), dense @ vector, rtol=1e-12, atol=1e-12)
    torch.testing.assert_close(precise.rmatvec(rows), dense.T @ rows, rtol=1e-12, atol=1e-12)


def test_what_is_not_known_is_left_alone():
    known = Products(normal(3, 4, dtype=torch.float32))
    assert doubled(known) is known and not is_whole(known) and storage(known)[0] == torch.float32
    with pytest.raises(ValueError, match="Products does not hold the factors of all columns"):
        next(row_chunks(known))


def test_a_stack_is_whole():
    part = matrix_jacobian(normal(3, 4, dtype=torch.float32))
    assert is_whole(part) and is_whole(StackedJacobian([part]))
    precise = doubled(StackedJacobian([part, part]))
    assert isinstance(precise, StackedJacobian) and isinstance(precise.parts[0], FactoredJacobian)
    assert storage(precise)[0] == torch.float64 and precise.shape == (6, 4)


def test_a_shard_is_doubled_in_place_of_its_local_factors():
    """In one process, a shard has all columns; but it is not known to, so it is solved by rows."""
    net, inputs = cases()["linear"]
    shard, factored = sharded_jacobian(net, inputs), jacobian(net, inputs)
    precise = doubled(shard)
    assert isinstance(precise, ShardedJacobian) and not is_whole(shard)
    assert (storage(shard)[0], storage(precise)[0]) == (torch.float32, torch.float64)
    vector = normal(factored.shape[1])
    torch.testing.assert_close(precise.matvec(vector), doubled(factored).matvec(vector), rtol=1e-12, atol=1e-12)
    assert storage(shard)[0] == torch.float32
