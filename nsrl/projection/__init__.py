"""The projection core: factored Jacobians, budgeted null-space projections, optimizer hooks. Torch only."""

from nsrl.projection.budget import KrylovProjection, Projection, SpectralProjection
from nsrl.projection.capture import JacobianError
from nsrl.projection.jacobian import FactoredJacobian, StackedJacobian, jacobian
from nsrl.projection.optimizer import attach_projection
from nsrl.projection.spectrum import Spectrum, spectrum

__all__ = [
    "FactoredJacobian",
    "JacobianError",
    "KrylovProjection",
    "Projection",
    "SpectralProjection",
    "Spectrum",
    "StackedJacobian",
    "attach_projection",
    "jacobian",
    "spectrum",
]
