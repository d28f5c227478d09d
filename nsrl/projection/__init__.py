"""The projection core: factored Jacobians, budgeted null-space projections, optimizer hooks. Torch only."""

from nsrl.projection.application import AttachedConstraint, attach_constraint
from nsrl.projection.budget import KrylovProjection, Projection, SpectralProjection
from nsrl.projection.capture import JacobianError
from nsrl.projection.certificate import Certificate
from nsrl.projection.columns import parameter_columns
from nsrl.projection.constraint import Constraint, Projected
from nsrl.projection.diagonal import DiagonalConstraint
from nsrl.projection.features import FeatureConstraint
from nsrl.projection.filters import Budget, Filter, Hard, ScaledGradient, SmallestMultiple, Tikhonov
from nsrl.projection.full import JacobianConstraint
from nsrl.projection.jacobian import FactoredJacobian, StackedJacobian, jacobian
from nsrl.projection.kronecker import KroneckerConstraint
from nsrl.projection.lowrank import LowRankConstraint
from nsrl.projection.optimizer import attach_projection
from nsrl.projection.plan import Plan
from nsrl.projection.precision import full_precision
from nsrl.projection.refinement import Solution
from nsrl.projection.sharding import ShardedJacobian, shard_layers, sharded_jacobian
from nsrl.projection.solvers import factorise, null_projection, solve
from nsrl.projection.spectrum import Spectrum, spectrum

__all__ = [
    "AttachedConstraint",
    "Budget",
    "Certificate",
    "Constraint",
    "DiagonalConstraint",
    "FactoredJacobian",
    "FeatureConstraint",
    "Filter",
    "Hard",
    "JacobianConstraint",
    "JacobianError",
    "KroneckerConstraint",
    "KrylovProjection",
    "LowRankConstraint",
    "Plan",
    "Projected",
    "Projection",
    "ScaledGradient",
    "ShardedJacobian",
    "SmallestMultiple",
    "Solution",
    "SpectralProjection",
    "Spectrum",
    "StackedJacobian",
    "Tikhonov",
    "attach_constraint",
    "attach_projection",
    "factorise",
    "full_precision",
    "jacobian",
    "null_projection",
    "parameter_columns",
    "shard_layers",
    "sharded_jacobian",
    "solve",
    "spectrum",
]
