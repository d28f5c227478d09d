"""A subspace held by itself or by its complement must be one and the same."""

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from nsrl.projection.constraints.feature_moments import Subspace
from tests.projection.builders import normal


def orthonormal(dimension: int, rank: int, seed: int = 0) -> torch.Tensor:
    return torch.linalg.qr(normal(dimension, rank, seed=seed))[0][:, :rank]


@pytest.mark.parametrize("rank", range(9))
def test_products_against_the_dense_projector(rank):
    basis, matrix = orthonormal(8, rank), normal(3, 8, seed=1)
    projector = basis @ basis.T
    subspace = Subspace(basis)
    assert (subspace.dimension, subspace.rank) == (8, rank)
    coordinates = subspace.coordinates(matrix)
    assert coordinates.shape == (3, rank)
    torch.testing.assert_close(subspace.combine(coordinates), matrix @ projector)
    torch.testing.assert_close(subspace.without(matrix), matrix - matrix @ projector)
    torch.testing.assert_close(coordinates.square().sum(), (matrix @ projector).square().sum())
    held = subspace.basis()
    assert held.shape == (8, rank)
    torch.testing.assert_close(held @ held.T, projector)
    torch.testing.assert_close(held.T @ held, torch.eye(rank).double())
    torch.testing.assert_close(matrix @ held, coordinates)


@pytest.mark.parametrize("rank", range(0, 41, 5))
def test_the_thinner_side_is_held(rank):
    thin = min(rank, 40 - rank)
    assert Subspace(orthonormal(40, rank)).nbytes() in (8 * 40 * thin, 8 * (40 + 1) * thin)


@given(sizes=st.lists(st.integers(0, 4), max_size=6), seed=st.integers(0, 50))
def test_growth_keeps_what_was_there(sizes, seed):
    subspace = Subspace.empty(12, normal(1))
    for step, size in enumerate(sizes):
        size = min(size, 12 - subspace.rank)
        before = subspace.basis()
        new = subspace.without(normal(size, 12, seed=seed + step)).T
        subspace = subspace.extended(torch.linalg.qr(new)[0])
        assert subspace.rank == before.shape[1] + size
        for inside in (before, new):
            torch.testing.assert_close(
                subspace.without(inside.T), torch.zeros(inside.shape[::-1]).double(), rtol=0, atol=1e-12
            )
