"""The diagonal of the Gauss-Newton matrix as a constraint: elastic weight consolidation as the degenerate case."""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor

from nsrl.projection.constraints.constraint import Constraint, Eigenspace
from nsrl.projection.constraints.gauss_newton import EVERYTHING
from nsrl.projection.jacobians.blocks import Range
from nsrl.projection.jacobians.factored import FactoredJacobian


class DiagonalConstraint(Constraint):
    """F = diag(J^T J) summed over batches: the eigenbasis is the parameters themselves.

    With a whitened Jacobian this is the diagonal Fisher matrix of EWC (arXiv 1612.00796), here as a projection: the
    filter freezes single parameters. It ignores that parameters can compensate each other, so nearly every parameter
    counts as important and the null space is far smaller than the Jacobian's.

    Args:
        columns: columns of the parameters by name (`parameter_columns`).
    """

    def __init__(self, columns: Mapping[str, Range]):
        super().__init__(columns, passes=1)
        self._squares: Tensor | None = None

    def update(self, jacobian: FactoredJacobian) -> None:
        """Add the squared column norms of a batch; scale its rows for a mean.

        Raises:
            ValueError: other columns, or NaN or infinite entries.
        """
        if jacobian.shape[1] != self.width:
            raise ValueError(f"the Jacobian has {jacobian.shape[1]} columns, the constraint {self.width}")
        squares = jacobian.column_squares()
        if not bool(torch.isfinite(squares).all()):
            raise ValueError("the Jacobian has NaN or infinite entries; the model has diverged")
        self._squares = squares if self._squares is None else self._squares + squares

    def merged(self, other: DiagonalConstraint) -> DiagonalConstraint:
        """The sum of two diagonals.

        Raises:
            ValueError: they are over other parameters.
        """
        if other.columns != self.columns:
            raise ValueError("only constraints over the same parameters can be merged")
        result = DiagonalConstraint(self.columns)
        result._squares = self._diagonal() + other._diagonal()
        return result

    @property
    def eigenspaces(self) -> tuple[Eigenspace, ...]:
        """One for all parameters, with a value a parameter, zeros too."""
        return (Eigenspace(EVERYTHING, self._diagonal(), self.width),)

    def components(self, vector: Tensor) -> Tensor:
        """The vector itself, (P,)."""
        return vector.double()

    def combine(self, components: Tensor) -> Tensor:
        """The components themselves, (P,)."""
        return components

    def nbytes(self) -> int:
        """One number a parameter."""
        return 0 if self._squares is None else self._squares.numel() * self._squares.element_size()

    def _diagonal(self) -> Tensor:
        if self._squares is None:
            raise ValueError("the constraint holds nothing yet; call update with a Jacobian first")
        return self._squares
