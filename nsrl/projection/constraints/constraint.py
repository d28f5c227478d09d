"""One interface for all kinds of constraint: a quadratic form with an orthonormal eigenbasis.

A constraint is F = B diag(s) B^T over the flat parameter vector, positive semi-definite: 1/2 d^T F d is (a model of)
how much a displacement d changes the behaviour that is to be kept. A kind says how F was obtained and how B is
multiplied with; what to do with it (`project`, the certificate, the rank report) is written here once. From the safest
and smallest null space to the most plastic:

    features (exact for any step)  <  Kronecker factors  <  full Jacobian  =  its low-rank stream  (diagonal: EWC)
"""

from __future__ import annotations

import math
from abc import ABC, abstractmethod
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from time import perf_counter

import torch
from torch import Tensor

from nsrl.projection.constraints.filters import Filter, Hard
from nsrl.projection.jacobians.blocks import Range


@dataclass(frozen=True)
class Eigenspace:
    """Eigenvalues of one layer, or of all parameters at once.

    Attributes:
        name: of the layer.
        values: s >= 0, shape (r,), float64, without those that are round-off.
        dimension: number of parameters that the directions live in.
        multiplicity: every eigenvalue belongs to this many components, laid out (multiplicity, r): the output neurons
            of a layer share its feature directions.
        protected: mask (r,) of directions that are removed whatever the filter says; None when there is none.
    """

    name: str
    values: Tensor
    dimension: int
    multiplicity: int = 1
    protected: Tensor | None = None

    @property
    def size(self) -> int:
        """Number of components."""
        return self.multiplicity * self.values.numel()

    @property
    def rank(self) -> int:
        """Number of components that the constraint minds."""
        return self.multiplicity * int((self.values > 0.0).sum())


@dataclass(frozen=True)
class LayerRank:
    """What a constraint holds of a layer.

    Attributes:
        name: of the layer, or "all parameters".
        rank: directions with an eigenvalue above round-off.
        dimension: number of parameters.
        effective_dimension: sum of the removed fractions: how many directions the filter really took.
    """

    name: str
    rank: int
    dimension: int
    effective_dimension: float


@dataclass(frozen=True)
class Projected:
    """A projected displacement and its certificate.

    Attributes:
        displacement: d, shape (P,).
        kept: |d| / |d0|.
        removed_share: |d0 - d| / |d0|.
        kept_by_layer: |d| / |d0| on the parameters of each layer.
        leakage: sqrt(d^T F d / d0^T F d0), measured: the share of the protected change that is still made.
        predicted: 1/2 d^T F d.
        rank: directions that F holds above round-off.
        effective_dimension: directions that the filter took.
        ranks: the same for each layer.
        residual: |B^T d - (1 - f) B^T d0| / |B^T d0|, measured after the last pass.
        passes: projection passes made.
        seconds: wall time.
    """

    displacement: Tensor
    kept: float
    removed_share: float
    kept_by_layer: Mapping[str, float]
    leakage: float
    predicted: float
    rank: int
    effective_dimension: float
    ranks: tuple[LayerRank, ...]
    residual: float
    passes: int
    seconds: float

    @property
    def kept_share(self) -> float:
        """The least |d| / |d0| over the layers: a mean would hide the layer that cannot move any more."""
        return min(self.kept_by_layer.values(), default=self.kept)


class Constraint(ABC):
    """A positive semi-definite quadratic form F over the flat displacement, through its eigenbasis B.

    Args:
        columns: start and stop of every parameter in the flat vector (P,), by name; see `parameter_columns`.
        passes: largest number of projection passes; two make up for float32 products.

    Attributes:
        columns: as given.
        width: P.
    """

    def __init__(self, columns: Mapping[str, Range], passes: int = 2):
        self.columns = dict(columns)
        self.width = max((stop for _, stop in self.columns.values()), default=0)
        self.passes = passes

    @property
    @abstractmethod
    def eigenspaces(self) -> Sequence[Eigenspace]:
        """The eigenvalues, in the order of the components."""

    @abstractmethod
    def components(self, vector: Tensor) -> Tensor:
        """B^T v for v of shape (P,): shape (r,), float64."""

    @abstractmethod
    def combine(self, components: Tensor) -> Tensor:
        """B c for c of shape (r,): shape (P,)."""

    @abstractmethod
    def nbytes(self) -> int:
        """Memory held, in bytes."""

    @property
    def uncovered(self) -> tuple[str, ...]:
        """Parameters that the constraint knows nothing about: it lets their displacement pass."""
        return ()

    @property
    def covered(self) -> dict[str, Range]:
        """Columns of the parameters that the constraint covers, by name."""
        return {name: columns for name, columns in self.columns.items() if name not in set(self.uncovered)}

    @property
    def values(self) -> Tensor:
        """Eigenvalue of every component, shape (r,), float64."""
        return _joined([space.values.repeat(space.multiplicity) for space in self.eigenspaces])

    def quadratic(self, displacement: Tensor) -> float:
        """1/2 d^T F d."""
        return 0.5 * float((self.values * self.components(displacement).square()).sum())

    def removed(self, components: Tensor, filter: Filter) -> Tensor:
        """Fraction of every component that a filter takes, shape (r,).

        Raises:
            ValueError: eigenvalues that are NaN or infinite, of which a filter would take none.
        """
        spaces = self.eigenspaces
        broken = [space.name for space in spaces if not bool(torch.isfinite(space.values).all())]
        if broken:
            raise ValueError(
                f"the constraint on {', '.join(broken)} has NaN or infinite eigenvalues; its model has diverged"
            )
        masks = [_mask(space) for space in spaces]
        if filter.joint:
            mask = _joined([m.repeat(space.multiplicity) for m, space in zip(masks, spaces, strict=True)])
            return filter.removed(self.values, components, mask.bool())
        fractions = [filter.removed(space.values, None, m) for m, space in zip(masks, spaces, strict=True)]
        return _joined([f.repeat(space.multiplicity) for f, space in zip(fractions, spaces, strict=True)])

    def project(self, displacement: Tensor, filter: Filter | None = None) -> Projected:
        """Take the filtered share of every eigen-component out of a displacement.

        Args:
            displacement: d0, shape (P,).
            filter: how much of which direction; default `Hard()`, everything that is not round-off.

        Raises:
            ValueError: a displacement of another length or with NaN or infinite entries, or a constraint that holds
                nothing yet.
        """
        start = perf_counter()
        if displacement.shape != (self.width,) or not bool(torch.isfinite(displacement).all()):
            raise ValueError(f"the displacement must be {self.width} finite numbers, one for every covered parameter")
        before = self.components(displacement)
        removed = self.removed(before, filter or Hard())
        target = (1.0 - removed) * before
        norm = float(before.norm())
        result, wrong, passes = displacement, before - target, 0
        while passes < self.passes and float(wrong.norm()) > 1e-13 * norm:
            result = result - self.combine(wrong).to(displacement)
            wrong = self.components(result) - target
            passes += 1
        proposed, predicted = self.quadratic(displacement), self.quadratic(result)
        ranks = self._ranks(removed)
        return Projected(
            displacement=result,
            kept=_share(result, displacement),
            removed_share=_share(displacement - result, displacement, empty=0.0),
            kept_by_layer=self._kept_by_layer(result, displacement),
            leakage=math.sqrt(predicted / proposed) if proposed > 0.0 else 0.0,
            predicted=predicted,
            rank=sum(rank.rank for rank in ranks),
            effective_dimension=sum(rank.effective_dimension for rank in ranks),
            ranks=ranks,
            residual=float(wrong.norm()) / norm if norm > 0.0 else 0.0,
            passes=passes,
            seconds=perf_counter() - start,
        )

    def _ranks(self, removed: Tensor) -> tuple[LayerRank, ...]:
        spaces = self.eigenspaces
        pieces = removed.split([space.size for space in spaces])
        return tuple(
            LayerRank(space.name, space.rank, space.dimension, float(piece.sum()))
            for space, piece in zip(spaces, pieces, strict=True)
        )

    def _kept_by_layer(self, result: Tensor, displacement: Tensor) -> dict[str, float]:
        layers: dict[str, list[Range]] = {}
        for name, columns in self.covered.items():
            layers.setdefault(name.rpartition(".")[0] or name, []).append(columns)
        return {
            layer: _share(
                _joined([result[slice(*c)] for c in columns]), _joined([displacement[slice(*c)] for c in columns])
            )
            for layer, columns in layers.items()
        }


def _joined(pieces: Sequence[Tensor]) -> Tensor:
    return torch.cat(list(pieces)) if pieces else torch.zeros(0, dtype=torch.float64)


def _mask(space: Eigenspace) -> Tensor:
    return torch.zeros_like(space.values, dtype=torch.bool) if space.protected is None else space.protected


def _share(part: Tensor, whole: Tensor, empty: float = 1.0) -> float:
    norm = float(whole.norm())
    return float(part.norm()) / norm if norm > 0.0 else empty
