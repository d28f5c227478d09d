"""What a constraint is said to cost before it is made, against what it holds; Kronecker factors on thin sides."""

from __future__ import annotations

import json
from itertools import pairwise
from pathlib import Path

import pytest
import torch
from torch import Tensor, nn

from nsrl.bench.cost.constraints import outside
from nsrl.projection import jacobian
from nsrl.projection.constraints import FeatureConstraint, Hard, KroneckerConstraint
from nsrl.projection.constraints.cost import KINDS, LayerShape, Rates, constraint_cost, measure_rates
from nsrl.projection.constraints.thin import ThinProjection
from nsrl.projection.jacobians.columns import parameter_columns
from nsrl.projection.optimizer import FlatParameters

ROOT = Path(__file__).parents[3]
RATES = Rates(single=2e9, double=1e9, stream=1e9, call=1e-6, eigh={10: 1e-3, 100: 0.5})


def net(*widths: int, bias: bool = True) -> nn.Sequential:
    torch.manual_seed(0)
    layers: list[nn.Module] = []
    for a, g in pairwise(widths):
        layers += [nn.Linear(a, g, bias=bias), nn.Tanh()]
    return nn.Sequential(*layers[:-1]).double()


def factors(module: nn.Module, samples: int) -> KroneckerConstraint:
    inputs = torch.randn(samples, next(module.parameters()).shape[1], dtype=torch.float64)
    constraint = KroneckerConstraint(parameter_columns(module))
    constraint.update(jacobian(module, inputs, scale=len(inputs) ** -0.5))
    return constraint


def leading(moment: Tensor, share: float) -> Tensor:
    """The fewest leading eigenvectors that carry a share of the trace, by the singular values."""
    vectors, values, _ = torch.linalg.svd(moment)
    count = next(n for n in range(1, len(values) + 1) if values[:n].sum() >= share * values.sum() * (1.0 - 1e-12))
    return vectors[:, :count]


class TestThinFactors:
    """Kronecker factors as two thin products a side."""

    @pytest.mark.parametrize("samples", [2, 4, 40])
    def test_all_directions_are_the_certified_hard_projection(self, samples: int) -> None:
        module = net(6, 5, 3)
        constraint = factors(module, samples)
        vector = torch.randn(constraint.width, dtype=torch.float64)
        thin = ThinProjection.of_factors(constraint, precision=torch.float64)
        expected = constraint.project(vector, Hard())
        # two orthonormal bases of fewer than ten columns: a few units in the last place of the vector's norm
        assert float((thin.null(vector) - expected.displacement).norm()) <= 1e-13 * float(vector.norm())
        assert thin.rank == expected.rank

    @pytest.mark.parametrize("shares", [(0.5, 0.5), (0.9, 0.6), (1.0, 0.7), (0.999, 0.999)])
    def test_leading_directions_are_taken_from_both_sides(self, shares: tuple[float, float]) -> None:
        module = net(6, 5, 3)
        constraint = factors(module, 30)
        vector = torch.randn(constraint.width, dtype=torch.float64)
        found = ThinProjection.of_factors(constraint, *shares, precision=torch.float64).null(vector)
        # of the last layer, whose output factor is a multiple of the identity, no directions lead
        for held in constraint.held[:1]:
            a, s = leading(held.inputs, shares[0]), leading(held.grads, shares[1])
            matrix = held.layer.matrix(vector)
            expected = matrix - s @ s.T @ matrix @ a @ a.T
            assert float((held.layer.matrix(found) - expected).norm()) <= 1e-12 * float(matrix.norm())

    def test_in_place_it_is_the_same(self) -> None:
        module = net(6, 5, 3)
        constraint = factors(module, 3)
        thin = ThinProjection.of_factors(constraint, 0.8, 0.8, torch.float64)
        parameters = list(module.parameters())
        begin = torch.cat([p.detach().flatten() for p in parameters])
        way = torch.randn_like(begin)
        with torch.no_grad():
            for p, part in zip(parameters, way.split([p.numel() for p in parameters]), strict=True):
                p.add_(part.view_as(p))
        kept = thin.retract(parameters, begin)
        left = torch.cat([p.detach().flatten() for p in parameters]) - begin
        assert torch.allclose(left, thin.null(way), rtol=0.0, atol=1e-13)
        assert kept == pytest.approx(float(left.norm() / way.norm()), rel=1e-12)

    def test_a_share_has_to_be_one(self) -> None:
        constraint = factors(net(4, 3), 3)
        for shares in ((0.0, 1.0), (1.0, 1.1)):
            with pytest.raises(ValueError, match="must be above 0 and at most 1"):
                ThinProjection.of_factors(constraint, *shares)


class TestLayerByLayer:
    """Moments of a layer at a time, so that a batch never lies in memory whole."""

    @pytest.mark.parametrize("bias", [True, False])
    def test_it_is_what_the_whole_jacobian_gives(self, bias: bool) -> None:
        module = net(6, 5, 3, bias=bias)
        inputs = torch.randn(7, 6, dtype=torch.float64)
        rows = jacobian(module, inputs, scale=len(inputs) ** -0.5)
        whole, layered = (KroneckerConstraint(parameter_columns(module)) for _ in range(2))
        whole.update(rows)
        hidden = module[1](module[0](inputs)).detach()
        last = torch.eye(3, dtype=torch.float64).expand(7, 3, 3) / 7**0.5
        first = (last @ module[2].weight.detach()) * (1.0 - hidden.square()).unsqueeze(1)
        layered.add_layer("0", inputs, first)
        layered.add_layer("2", hidden, last)
        for ours, expected in zip(layered.held, whole.held, strict=True):
            assert ours.layer == expected.layer and ours.count == expected.count
            assert torch.allclose(ours.inputs, expected.inputs) and torch.allclose(ours.grads, expected.grads)

    @pytest.mark.parametrize(
        ("name", "inputs", "grads", "told"),
        [
            ("1", (2, 6), (2, 1, 5), "1 has no weight"),
            ("0", (2, 6), (3, 1, 5), "do not fit"),
            ("0", (2, 5), (2, 1, 5), "do not fit"),
        ],
    )
    def test_what_does_not_fit_is_told(self, name, inputs, grads, told) -> None:
        constraint = KroneckerConstraint(parameter_columns(net(6, 5)))
        with pytest.raises(ValueError, match=told):
            constraint.add_layer(name, torch.ones(inputs), torch.ones(grads))


class TestForecast:
    """Bytes are those that are held; operations add up as they should."""

    def test_bytes_of_features(self) -> None:
        module = net(24, 16, 8)
        constraint = FeatureConstraint(module)
        shapes = [LayerShape(25, 16), LayerShape(17, 8)]
        rows = torch.randn(40, 5, dtype=torch.float64)
        for part in constraint.moments.values():
            part.add(rows @ torch.randn(5, part.layer.width_in, dtype=torch.float64))
        cost = constraint_cost("features", shapes, RATES, samples=40)
        assert cost.parameters == constraint.width == 25 * 16 + 17 * 8
        assert cost.gathering_bytes == constraint.nbytes()
        constraint.consolidate()
        thin = ThinProjection.of(constraint)
        ranks = [len(part.basis.T) / len(part.basis) for part in thin.layers]
        held = sum(
            constraint_cost("features", [shape], RATES, samples=40, share_in=rank).held_bytes
            for shape, rank in zip(shapes, ranks, strict=True)
        )
        assert held == pytest.approx(thin.nbytes())

    def test_bytes_of_kronecker_factors(self) -> None:
        module = net(24, 16, 8)
        constraint = factors(module, 40)
        cost = constraint_cost("kronecker", [LayerShape(25, 16), LayerShape(17, 8)], RATES, samples=40, outputs=8)
        assert cost.gathering_bytes == constraint.nbytes()

    @pytest.mark.parametrize("kind", KINDS)
    def test_as_many_layers_again_cost_as_much_again(self, kind) -> None:
        one = constraint_cost(kind, [LayerShape(30, 20)], RATES, samples=50, outputs=2)
        four = constraint_cost(kind, [LayerShape(30, 20, 3), LayerShape(30, 20)], RATES, samples=50, outputs=2)
        assert four.parameters == 4 * one.parameters == 4 * 600
        if kind != "jacobian":  # its k x k matrix is one
            for name, value in vars(one).items():
                assert getattr(four, name) == pytest.approx(4 * value), name

    def test_the_full_jacobian_is_quadratic_in_its_rows(self) -> None:
        small, large = (
            constraint_cost("jacobian", [LayerShape(30, 20)], RATES, samples=n, outputs=2) for n in (50, 500)
        )
        assert large.exchanged_bytes == 100 * small.exchanged_bytes == 8 * 1000**2
        assert large.gathering_seconds == pytest.approx(100 * small.gathering_seconds)
        assert large.decomposing_seconds == pytest.approx(RATES.decomposed(1000))

    def test_rows_of_features_are_projected_where_they_lie(self) -> None:
        features, kronecker = (
            constraint_cost(kind, [LayerShape(30, 20)], RATES, samples=50) for kind in ("features", "kronecker")
        )
        assert features.projecting_exchanged_bytes == 0.0 < kronecker.projecting_exchanged_bytes

    def test_between_two_sizes_a_decomposition_is_between_them(self) -> None:
        assert RATES.decomposed(10) == 1e-3 and RATES.decomposed(100) == 0.5
        assert RATES.decomposed(200) == pytest.approx(4.0)
        times = [RATES.decomposed(size) for size in range(5, 150)]
        assert times == sorted(times)

    @pytest.mark.parametrize(
        ("kind", "changes", "told"),
        [
            ("fisher", {}, "must be one of features, kronecker, jacobian"),
            ("features", {"samples": 0}, "must be at least 1"),
            ("features", {"share_in": 1.5}, "within 0 and 1"),
        ],
    )
    def test_what_makes_no_sense_is_told(self, kind, changes, told) -> None:
        with pytest.raises(ValueError, match=told):
            constraint_cost(kind, [LayerShape(3, 2)], RATES, **{"samples": 5, **changes})

    def test_rates_are_those_of_the_clock(self) -> None:
        # a clock that runs twice as fast finds everything twice as slow
        now = iter(range(10**9))
        rates = measure_rates((8,), clock=lambda: 0.021 * next(now))
        again = iter(range(10**9))
        slower = measure_rates((8,), clock=lambda: 0.042 * next(again))
        assert slower.double == pytest.approx(rates.double / 2) and slower.eigh[8] == pytest.approx(2 * rates.eigh[8])


def test_sharded_parameters_are_refused_with_what_to_do() -> None:
    class Piece(nn.Parameter):
        """What FSDP2 puts in a parameter's place has this method."""

        def full_tensor(self) -> Tensor:
            return self.data

    module = net(3, 2)
    module[0].weight = Piece(module[0].weight.data)
    for make in (FeatureConstraint, parameter_columns):
        with pytest.raises(ValueError, match=r"0\.weight is sharded .* before fully_shard"):
            make(module)
    with pytest.raises(ValueError, match=r"shape \(2, 3\) is sharded .* DistributedDataParallel"):
        FlatParameters(list(module.parameters()))


def test_the_committed_forecasts_are_within_the_factor_that_is_promised() -> None:
    content = json.loads((ROOT / "runs" / "reference" / "cost.json").read_text(encoding="utf-8"))
    assert content["within"] == 1.5 and outside(content) == []
    assert max(row["parameters"] for row in content["rows"]) >= 1e8
