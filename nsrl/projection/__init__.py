"""The projection core: factored Jacobians, budgeted null-space projections, optimizer hooks. Torch only."""

from nsrl.projection.budget.model import Projection
from nsrl.projection.budget.projection import KrylovProjection, SpectralProjection
from nsrl.projection.constraints.attach import AttachedConstraint, attach_constraint
from nsrl.projection.constraints.constraint import Constraint, Projected
from nsrl.projection.constraints.diagonal import DiagonalConstraint
from nsrl.projection.constraints.features import FeatureConstraint
from nsrl.projection.constraints.filters import Budget, Filter, Hard, ScaledGradient, SmallestMultiple, Tikhonov
from nsrl.projection.constraints.gauss_newton import JacobianConstraint
from nsrl.projection.constraints.kronecker import KroneckerConstraint
from nsrl.projection.constraints.lowrank import LowRankConstraint
from nsrl.projection.jacobians.capture import JacobianError
from nsrl.projection.jacobians.columns import parameter_columns
from nsrl.projection.jacobians.factored import FactoredJacobian, StackedJacobian
from nsrl.projection.jacobians.linearise import jacobian
from nsrl.projection.jacobians.sharded import ShardedJacobian, shard_layers, sharded_jacobian
from nsrl.projection.optimizer import FlatParameters, StepHooks
from nsrl.projection.precision import full_precision
from nsrl.projection.solvers.factorise import factorise, null_projection, solve
from nsrl.projection.solvers.plan import Plan
from nsrl.projection.solvers.solver import Certificate, Solution
from nsrl.projection.solvers.spectrum import Spectrum, spectrum

__all__ = [
    "AttachedConstraint",
    "Budget",
    "Certificate",
    "Constraint",
    "DiagonalConstraint",
    "FactoredJacobian",
    "FeatureConstraint",
    "Filter",
    "FlatParameters",
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
    "StepHooks",
    "Tikhonov",
    "attach_constraint",
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
