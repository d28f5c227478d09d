"""The thin projection of layer features against dense float64 algebra."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from nsrl.projection.constraints import FeatureConstraint, Hard
from nsrl.projection.constraints.feature_moments import Subspace
from nsrl.projection.constraints.thin import ThinProjection


def made(samples: int) -> tuple[nn.Module, FeatureConstraint, torch.Tensor]:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(12, 20), nn.Tanh(), nn.LayerNorm(20), nn.Linear(20, 6, bias=False))
    constraint = FeatureConstraint(model)
    constraint.update(model, torch.randn(samples, 12))
    constraint.consolidate(Hard())
    return model, constraint, torch.randn(constraint.width)


@pytest.mark.parametrize("samples", [3, 15, 200])  # a thin subspace, a thin complement, everything
@pytest.mark.parametrize("precision", [torch.float32, torch.float64])
def test_it_is_the_certified_projection(samples: int, precision: torch.dtype) -> None:
    _, constraint, way = made(samples)
    way = way.to(precision)
    thin = ThinProjection.of(constraint, precision)
    # rounding of products of numbers of size 1 over 20 terms, a few times
    atol = 60 * torch.finfo(precision).eps
    torch.testing.assert_close(thin.null(way), constraint.project(way).displacement, rtol=0, atol=atol)
    torch.testing.assert_close(thin.null(thin.null(way)), thin.null(way), rtol=0, atol=atol)
    assert thin.rank == constraint.project(way).rank
    assert thin.nbytes() <= thin.dense_nbytes() / 2 + 1


@pytest.mark.parametrize("samples", [3, 15, 200])
@pytest.mark.parametrize("held", [False, True])
def test_in_place_it_is_the_same(samples: int, held: bool) -> None:
    model, constraint, way = made(samples)
    thin = ThinProjection.of(constraint, hold_uncovered=held)
    parameters = [p.data for p in model.parameters()]
    reference = torch.cat([p.flatten() for p in parameters])
    for p, piece in zip(parameters, way.split([p.numel() for p in parameters]), strict=True):
        p.add_(piece.view_as(p))
    before = torch.cat([p.flatten() for p in parameters])
    kept = thin.retract(parameters, reference)
    after = torch.cat([p.flatten() for p in parameters])
    expected = reference + thin.null(before - reference)
    # one more rounding of numbers of size 1
    torch.testing.assert_close(after, expected, rtol=0, atol=1e-6)
    columns = [slice(*constraint.columns[name]) for name in ("2.weight", "2.bias")]
    assert all(torch.equal(after[c], (reference if held else before)[c]) for c in columns)
    norms = [
        float(torch.cat([v[:260], v[300:], *(v[c] for c in columns if held)]).norm()) for v in (after - reference, way)
    ]
    assert kept == pytest.approx(norms[0] / norms[1], abs=1e-5)
    with pytest.raises(ValueError, match="entries"):
        thin.retract(parameters[1:], reference)


def test_what_is_held_does_not_move_and_what_is_free_keeps_its_bits() -> None:
    _, constraint, way = made(3)
    free, held = ThinProjection.of(constraint).null(way), ThinProjection.of(constraint, hold_uncovered=True).null(way)
    for name in ("2.weight", "2.bias"):
        columns = slice(*constraint.columns[name])
        assert torch.equal(free[columns], way[columns]) and not bool(held[columns].any())
    with pytest.raises(ValueError, match="entries"):
        ThinProjection.of(constraint).null(way[1:])


@pytest.mark.parametrize("rank", [0, 2, 5, 7, 8])
def test_a_subspace_shows_its_thinner_side(rank: int) -> None:
    q = torch.linalg.qr(torch.randn(8, 8, dtype=torch.float64, generator=torch.Generator().manual_seed(0)))[0]
    basis, inside = Subspace(q[:, :rank].contiguous()).thin()
    assert basis.shape == (8, min(rank, 8 - rank))
    projector = basis @ basis.T if inside else torch.eye(8, dtype=torch.float64) - basis @ basis.T
    torch.testing.assert_close(projector, q[:, :rank] @ q[:, :rank].T, rtol=0, atol=1e-14)
