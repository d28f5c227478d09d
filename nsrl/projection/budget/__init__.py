"""Steps inside a KL budget: the second-order model, projections, natural gradients, the multiplier."""

from nsrl.projection.budget.model import Projection, Quadratic
from nsrl.projection.budget.multiplier import Multiplier
from nsrl.projection.budget.natural_gradient import LocalModel, Step
from nsrl.projection.budget.projection import KrylovProjection, SpectralProjection
from nsrl.projection.budget.two_regions import Multipliers, retained_step

__all__ = [
    "KrylovProjection",
    "LocalModel",
    "Multiplier",
    "Multipliers",
    "Projection",
    "Quadratic",
    "SpectralProjection",
    "Step",
    "retained_step",
]
