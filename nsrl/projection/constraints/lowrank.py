"""A stream of Jacobians as one constraint: a thin eigenbasis in bounded memory, with a core that never shrinks."""

from __future__ import annotations

from collections.abc import Iterator, Mapping

import torch
from torch import Tensor

from nsrl.projection.constraints.constraint import Constraint, Eigenspace
from nsrl.projection.constraints.filters import Hard
from nsrl.projection.constraints.gauss_newton import EVERYTHING, storage_dtype
from nsrl.projection.jacobians.blocks import Range
from nsrl.projection.jacobians.factored import FactoredJacobian, StackedJacobian
from nsrl.projection.solvers.spectrum import tolerance


class LowRankConstraint(Constraint):
    """F = sum of J^T J over everything that was streamed in, as an orthonormal basis (P, r) and r eigenvalues.

    Incremental singular value decomposition (Brand 2006): the rows of a batch join the scaled basis in a thin QR
    decomposition, so nothing is squared and streaming equals one shot as long as r <= max_rank. Beyond that the
    weakest directions are dropped; `dropped` is the exact trace of what F misses, and F never exceeds the exact sum.

    What never shrinks: `consolidate` moves directions into a protected core. Its columns are kept verbatim, are never
    rotated, dropped or outweighed, and `project` removes them fully under every filter. Later batches are
    decomposed on the orthogonal complement of the core only, which loses nothing: for a displacement orthogonal to
    the core d^T F d involves F on the complement alone. Of later batches on the core only the diagonal is kept (the
    eigenvalues that the report shows for it). Only `reset` empties the core. Directions that were not consolidated
    compete for the places left and may be dropped.

    Args:
        columns: columns of the parameters by name (`parameter_columns`).
        max_rank: most directions to hold; memory is P * max_rank numbers, about five times that during an update.
        passes: projection passes.

    Attributes:
        dropped: trace of F that was dropped, round-off included.
        protected_rank: number of directions in the core.
    """

    def __init__(self, columns: Mapping[str, Range], max_rank: int, passes: int = 2):
        super().__init__(columns, passes)
        if max_rank < 1:
            raise ValueError(f"max_rank must be at least 1 direction, not {max_rank}")
        self.max_rank = max_rank
        self.reset()

    def reset(self) -> None:
        """Forget everything, the protected core too."""
        self.basis = torch.zeros(self.width, 0, dtype=torch.float64)
        self._values = torch.zeros(0, dtype=torch.float64)
        self._storage = torch.float64
        self._started = False
        self.protected_rank = 0
        self.dropped = 0.0

    def update(self, jacobian: FactoredJacobian | StackedJacobian) -> None:
        """Add J^T J of a batch, max_rank rows at a time; scale its rows for a mean.

        Small batches are cheaper: one with more than max_rank rows is never materialised whole, at a product with J^T
        for every row.

        Raises:
            ValueError: other columns, or NaN or infinite entries.
        """
        if jacobian.shape[1] != self.width:
            raise ValueError(f"the Jacobian has {jacobian.shape[1]} columns, the constraint {self.width}")
        self._storage = _coarser(self._storage, storage_dtype(jacobian))
        for part in jacobian.parts if isinstance(jacobian, StackedJacobian) else (jacobian,):
            for rows in _transposed(part, self.max_rank):
                self._absorb(rows.double())

    def consolidate(self, filter: Hard | None = None) -> int:
        """Move the directions that a hard filter takes into the protected core; returns how many were added."""
        chosen = (filter or Hard()).removed(self._values, None, self._mask()).bool()
        order = torch.cat([chosen.nonzero(), (~chosen).nonzero()]).flatten()
        added = int(chosen.sum()) - self.protected_rank
        # the core comes first in both orders and stays as it is
        self.basis, self._values = self.basis[:, order], self._values[order]
        self.protected_rank += added
        return added

    def merged(self, other: LowRankConstraint) -> LowRankConstraint:
        """The sum of two streams, which protects whatever either of them protects.

        Raises:
            ValueError: different parameters, or more protected directions than this constraint's max_rank.
        """
        if other.columns != self.columns:
            raise ValueError("only constraints over the same parameters can be merged")
        result = LowRankConstraint(self.columns, self.max_rank, self.passes)
        ours, theirs = self.basis[:, : self.protected_rank], other.basis[:, : other.protected_rank]
        core = torch.cat([ours, _beyond(ours, theirs.to(ours))], 1)
        if core.shape[1] > self.max_rank:
            raise ValueError(
                f"together {core.shape[1]} directions are protected, but max_rank is {self.max_rank}; raise it"
            )
        result.basis, result.protected_rank = core, core.shape[1]
        result._values = core.new_zeros(core.shape[1])
        result._storage = _coarser(self._storage, other._storage)
        result.dropped = self.dropped + other.dropped
        for part in (self, other):
            result._absorb(part.basis * part._values.sqrt())
        return result

    @property
    def eigenspaces(self) -> tuple[Eigenspace, ...]:
        """One for all parameters: the protected core, then the others by descending value.

        Raises:
            ValueError: the constraint holds nothing yet.
        """
        if not self._started:
            raise ValueError("the constraint holds nothing yet; call update with a Jacobian first")
        return (Eigenspace(EVERYTHING, self._values, self.width, 1, self._mask()),)

    def components(self, vector: Tensor) -> Tensor:
        """Basis^T v, (r,)."""
        return self.basis.T @ vector.to(self.basis)

    def combine(self, components: Tensor) -> Tensor:
        """Basis c, (P,)."""
        return self.basis @ components

    def nbytes(self) -> int:
        """Basis and values."""
        return sum(t.numel() * t.element_size() for t in (self.basis, self._values))

    def _absorb(self, rows: Tensor) -> None:
        """Add R R^T for R of shape (P, c)."""
        if not bool(torch.isfinite(rows).all()):
            raise ValueError("the rows to add have NaN or infinite entries; the model has diverged")
        self._started = True
        self.basis, self._values = self.basis.to(rows.device), self._values.to(rows.device)
        core, free = self.basis.split([self.protected_rank, self.basis.shape[1] - self.protected_rank], 1)
        held = self._values[: self.protected_rank]
        for _ in range(2):  # twice is enough (Giraud et al. 2005)
            inside = core.T @ rows
            rows = rows - core @ inside
            held = held + inside.square().sum(1)
        scaled = torch.cat([free * self._values[self.protected_rank :].sqrt(), rows], 1)
        left, small = torch.linalg.qr(scaled)
        vectors, singular, _ = torch.linalg.svd(small, full_matrices=False)
        values = singular.square()
        largest = float(torch.cat([held, values]).max())
        real = values > tolerance(scaled.shape[1], self._storage) * largest
        keep = min(int(real.sum()), self.max_rank - self.protected_rank)
        self.dropped += float(values[keep:].sum())
        self.basis = torch.cat([core, left @ vectors[:, :keep]], 1)
        self._values = torch.cat([held, values[:keep]])

    def _mask(self) -> Tensor:
        return torch.arange(self._values.numel(), device=self._values.device) < self.protected_rank


def _transposed(jacobian: FactoredJacobian, size: int) -> Iterator[Tensor]:
    """J^T in pieces of at most `size` columns (P, c)."""
    count = jacobian.shape[0]
    if count <= size:
        yield jacobian.dense().T
        return
    for start in range(0, count, size):
        units = torch.zeros(count, min(size, count - start))
        units.diagonal(-start).fill_(1.0)
        yield jacobian.rmatmat(units)


def _beyond(core: Tensor, others: Tensor) -> Tensor:
    """Orthonormal directions that, with the core, span the core and the others."""
    rest = others - core @ (core.T @ others)
    rest = rest - core @ (core.T @ rest)
    left, singular, _ = torch.linalg.svd(rest, full_matrices=False)
    new = left[:, singular > 1e-12]
    # a small singular value magnifies what was left of the core in its direction
    new = new - core @ (core.T @ new)
    return torch.linalg.qr(new)[0]


def _coarser(one: torch.dtype, other: torch.dtype) -> torch.dtype:
    return max(one, other, key=lambda dtype: torch.finfo(dtype).eps)
