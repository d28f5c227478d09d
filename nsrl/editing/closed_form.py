"""The closed form of all editors, solved in the number of edits or of dimensions, whichever is smaller; float64."""

from __future__ import annotations

from dataclasses import dataclass, field

import torch
from torch import Tensor

from nsrl.editing.methods import Method
from nsrl.errors import NsrlError
from nsrl.projection import Hard
from nsrl.projection.constraints.feature_moments import LayerMoments, Subspace

#: Times the mean of a Gram's diagonal is added to it: two edits of one subject have one key.
JITTER = 1e-10


@dataclass
class Preservation:
    """A = P (penalty C + ridge) P of one layer, through the eigenbasis of C: what a change of its weight costs.

    C = V diag(s) V^T + 0 is the second moment of the preserved keys. Excluded directions are stored as such, thin, and
    no projector is formed.

    Attributes:
        name: of the layer.
        values: s > 0, descending, shape (r,), float64.
        vectors: V, orthonormal, shape (d, r), float64.
        excluded: how many of the leading directions are excluded.
        penalty: weight of C.
        ridge: weight of the identity.
        closed: directions that deflation has excluded beside them.
    """

    name: str
    values: Tensor
    vectors: Tensor
    excluded: int
    penalty: float
    ridge: float
    closed: Subspace = field(init=False)

    def __post_init__(self) -> None:
        self.closed = Subspace.empty(self.dimension, self.vectors)
        if not self.ridge and len(self.values) < self.dimension:
            raise NsrlError(
                f"the preserved keys of {self.name} span {len(self.values)} of {self.dimension} dimensions, so without "
                "a ridge the system is singular; preserve more text, or set ridge"
            )

    @classmethod
    def of(cls, moments: LayerMoments, method: Method, penalty: float | None = None) -> Preservation:
        """What a method makes of a layer's second moment.

        Raises:
            NsrlError: its projector leaves more or less of the directions than `Method.kept` allows, or the system is
                singular.
        """
        values, vectors = moments.residual()
        dimension = vectors.shape[0]
        excluded = excluded_count(values, method)
        share = 1.0 - excluded / dimension
        if method.projects and not method.kept[0] <= share <= method.kept[1]:
            little = share > method.kept[1]
            raise NsrlError(
                f"the projector of {moments.layer.name} leaves {100 * share:.2f} % of {dimension} directions, so it "
                f"{'protects next to nothing' if little else 'lets next to nothing be edited'}: the cut does not fit "
                "the scale of this model's keys; give energy instead of a threshold, or kept=(0, 1) to run it as it is"
            )
        weight = method.penalty if penalty is None else penalty
        # Where values are searched for together the ridge stays, so that a stronger penalty turns to what is preserved.
        unit = (weight if method.together is None else method.penalty) * float(values.sum()) / dimension
        return cls(moments.layer.name, values, vectors, excluded, weight, method.ridge + method.relative_ridge * unit)

    @property
    def dimension(self) -> int:
        """d: of the keys."""
        return self.vectors.shape[0]

    @property
    def kept_share(self) -> float:
        """Share of all directions that may be edited."""
        return 1.0 - (self.excluded + self.closed.rank) / self.dimension

    def root(self, rows: Tensor) -> Tensor:
        """A^{-1/2}, pseudo-inverted, times rows (n, d), shape (n, d)."""
        coordinates = rows @ self.vectors
        free = self.values[self.excluded :]
        if self.ridge:
            outside = self.ridge**-0.5
            inside = torch.cat([self.values.new_zeros(self.excluded), (self.penalty * free + self.ridge).rsqrt()])
            result = outside * rows + (coordinates * (inside - outside)) @ self.vectors.T
        else:
            inside = torch.cat([self.values.new_zeros(self.excluded), (self.penalty * free).rsqrt()])
            result = (coordinates * inside) @ self.vectors.T
        return self.closed.without(result) if self.closed.rank else result

    def project(self, rows: Tensor) -> Tensor:
        """P times rows (n, d), shape (n, d)."""
        leading = self.vectors[:, : self.excluded]
        rows = rows - (rows @ leading) @ leading.T
        return self.closed.without(rows) if self.closed.rank else rows

    def close(self, keys: Tensor, energy: float) -> int:
        """Close the leading directions of P keys (n, d) that hold a share of their energy (EvoEdit); how many."""
        left = self.project(self.project(keys))
        _, singular, directions = torch.linalg.svd(left, full_matrices=False)
        chosen = Hard(energy=energy).removed(singular.square()).bool()
        self.closed = self.closed.extended(directions[chosen].T)
        return int(chosen.sum())

    def nbytes(self) -> tuple[int, int]:
        """Memory of the excluded directions as they are stored, and of the projector as a matrix, in bytes."""
        thin = min(self.excluded, self.dimension - self.excluded) * self.dimension * 8 + self.closed.nbytes()
        return thin, self.dimension**2 * 8


def excluded_count(values: Tensor, method: Method) -> int:
    """Leading directions that a method excludes, of descending eigenvalues (r,)."""
    if method.threshold is not None:
        return int((values >= method.threshold).sum())
    if method.energy is not None:
        return int(Hard(energy=method.energy).removed(values).sum())
    return 0


def solve_update(preservation: Preservation, keys: Tensor, residuals: Tensor, earlier: Tensor | None = None) -> Tensor:
    """The minimiser D of |D K - R|^2 + |D Kp|^2 + tr(D A D^T), shape (d_out, d).

    With S = A^{-1/2} [Kp, K] it is D = R (I + S^T S)^{-1} S^T A^{-1/2} on the rows of R (Woodbury: a system in the
    number of edits), or the same through I + S S^T, where there are more edits than dimensions. Either matrix has
    eigenvalues of at least one.

    Args:
        preservation: A.
        keys: K^T, shape (n, d).
        residuals: R^T, shape (n, d_out).
        earlier: Kp^T, shape (m, d).

    Raises:
        NsrlError: keys or residuals that are NaN or infinite, or so large that the system cannot be solved.
    """
    every = keys if earlier is None else torch.cat([earlier, keys])
    scaled = preservation.root(every)
    targets = residuals.double()
    if not bool(torch.isfinite(scaled).all()) or not bool(torch.isfinite(targets).all()):
        raise NsrlError(f"the keys or values of {preservation.name} are NaN or infinite; the model has diverged")
    count, dimension = scaled.shape
    if count <= dimension:
        gram = scaled @ scaled.T
        wanted = torch.cat([targets.new_zeros(count - len(keys), targets.shape[1]), targets])
        weights = _solve(gram, wanted, preservation.name)
        return preservation.root(weights.T @ scaled)
    moment = scaled.T @ scaled
    right = scaled[count - len(keys) :].T @ targets
    return preservation.root(_solve(moment, right, preservation.name).T)


def factor(price: Tensor) -> Tensor:
    """L of L L^T = Q + jitter, lower triangular, for a Gram Q of shape (n, n).

    Raises:
        NsrlError: it is NaN or infinite.
    """
    size = price.diagonal().mean()
    root, failed = torch.linalg.cholesky_ex(price + JITTER * size * torch.eye(len(price)).to(price))
    if int(failed) or not bool(torch.isfinite(root).all()):
        raise NsrlError("the keys of the edits are NaN, infinite or all zero; the model has diverged")
    return root


def least_update(rows: Tensor, price: Tensor, delta: Tensor) -> Tensor:
    """D A^{1/2} of the least D, in the metric A, with D K = delta, shape (d_out, d_in).

    Args:
        rows: A^{-1/2} times the keys, K^T A^{-1/2}, shape (n, d_in), float64.
        price: their Gram, shape (n, n).
        delta: shape (n, d_out).
    """
    return torch.cholesky_solve(delta, factor(price)).T @ rows


def _solve(gram: Tensor, right: Tensor, name: str) -> Tensor:
    system = gram + torch.eye(len(gram), dtype=gram.dtype, device=gram.device)
    factor, failed = torch.linalg.cholesky_ex(system)
    if int(failed):
        raise NsrlError(
            f"the system of the edits of {name} is singular in float64: its keys are too long against ridge and "
            "penalty; raise one of them"
        )
    return torch.cholesky_solve(right, factor)
