"""Quadratic forms that a displacement should leave alone, from layer features to the full Gauss-Newton matrix."""

from nsrl.projection.constraints.attach import AttachedConstraint, attach_constraint
from nsrl.projection.constraints.constraint import Constraint, Eigenspace, Projected
from nsrl.projection.constraints.diagonal import DiagonalConstraint
from nsrl.projection.constraints.features import FeatureConstraint
from nsrl.projection.constraints.filters import Budget, Filter, Hard, ScaledGradient, SmallestMultiple, Tikhonov
from nsrl.projection.constraints.gauss_newton import JacobianConstraint
from nsrl.projection.constraints.kronecker import KroneckerConstraint
from nsrl.projection.constraints.lowrank import LowRankConstraint

__all__ = [
    "AttachedConstraint",
    "Budget",
    "Constraint",
    "DiagonalConstraint",
    "Eigenspace",
    "FeatureConstraint",
    "Filter",
    "Hard",
    "JacobianConstraint",
    "KroneckerConstraint",
    "LowRankConstraint",
    "Projected",
    "ScaledGradient",
    "SmallestMultiple",
    "Tikhonov",
    "attach_constraint",
]
