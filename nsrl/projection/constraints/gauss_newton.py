"""The full Jacobian as a constraint: F = J^T J, the Gauss-Newton matrix of the retained behaviour, never formed."""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor

from nsrl.projection.budget.projection import SpectralProjection
from nsrl.projection.constraints.constraint import Constraint, Eigenspace
from nsrl.projection.jacobians.blocks import Range
from nsrl.projection.jacobians.factored import FactoredJacobian, StackedJacobian
from nsrl.projection.solvers.spectrum import spectrum

#: Name of the one eigenspace of kinds that do not tell layers apart.
EVERYTHING = "all parameters"


class JacobianConstraint(Constraint):
    """F = J^T J through the spectrum U diag(s) U^T of the Gram matrix J J^T: the eigenbasis is B = J^T U s^{-1/2}.

    The most plastic kind, and first order only: outputs drift with the square of the displacement, so linearise anew.
    With more rows than parameters the Gram matrix is larger than F: stream the rows into a `LowRankConstraint` instead.

    Args:
        jacobian: J, whitened if the quadratic form is to be a KL divergence, shape (k, P).
        columns: columns of the parameters by name (`parameter_columns`), for the report by layer; default one entry.
        passes: projection passes; two leave |J d| / (|J| |d|) at round-off with float32 factors too.

    Attributes:
        jacobian: as given.
    """

    def __init__(
        self, jacobian: FactoredJacobian | StackedJacobian, columns: Mapping[str, Range] | None = None, passes: int = 2
    ):
        width = jacobian.shape[1]
        super().__init__(columns or {EVERYTHING: (0, width)}, passes)
        if self.width != width:
            raise ValueError(f"the columns end at {self.width}, but the Jacobian has {width}; linearise the same names")
        self.jacobian = jacobian
        self.storage = storage_dtype(jacobian)
        decomposed = spectrum(jacobian.gram(), self.storage)
        values = decomposed.values[: decomposed.rank]
        self._dual = decomposed.vectors[:, : decomposed.rank] / values.sqrt()
        self._spaces = (Eigenspace(EVERYTHING, values, width),)

    @property
    def eigenspaces(self) -> tuple[Eigenspace, ...]:
        """One for all parameters."""
        return self._spaces

    def components(self, vector: Tensor) -> Tensor:
        """s^{-1/2} U^T J v, (r,)."""
        return self._dual.T @ self.jacobian.matvec(vector).double()

    def combine(self, components: Tensor) -> Tensor:
        """J^T U s^{-1/2} c, (P,)."""
        return self.jacobian.rmatvec(self._dual @ components)

    def quadratic(self, displacement: Tensor) -> float:
        """1/2 |J d|^2, measured on the rows themselves."""
        return 0.5 * float(self.jacobian.matvec(displacement).double().square().sum())

    def in_metric(self, scale: Tensor | None) -> SpectralProjection:
        """The projector d - V J^T (J V J^T)^+ J d in an optimizer's metric V (`.null(d)`, or `.project(d, budget)`).

        The nearest displacement in the norm that the optimizer measures steps with: what is left of its proposal
        -V g is a descent direction, which the Euclidean projection of the same proposal need not be.

        Args:
            scale: V^{1/2}, positive, shape (P,); `FlatParameters.scale_of` reads it from Adam. None: Euclidean.
                Linear layers use its rank-one fit: the constraint holds exactly, descent up to the fit.
        """
        rows = torch.zeros(self.jacobian.shape[0], dtype=self.storage, device=self._dual.device)
        return SpectralProjection(self.jacobian, rows, 0.0, scale, self.passes)

    def nbytes(self) -> int:
        """Factors and dual vectors."""
        return self.jacobian.nbytes() + self._dual.numel() * self._dual.element_size()


def storage_dtype(jacobian: FactoredJacobian | StackedJacobian) -> torch.dtype:
    """Precision of a Jacobian's factors."""
    part = jacobian.parts[0] if isinstance(jacobian, StackedJacobian) else jacobian
    return part.outputs.dtype
