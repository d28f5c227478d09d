"""The step inside two trust regions: the rollout's, and the retention budget.

With g the gradient of the loss, F = J^T J the rollout's Fisher information and the second-order model of the KL on the
buffer (see `nsrl.projection.budget.projection`), K = J_ret^T J_ret, it solves

    min g.d    subject to    1/2 d^T F d <= radius    and    KL(0) - 1/2 |rho|^2 + 1/2 |rho + J_ret d|^2 <= budget

Stationarity leaves two numbers, mu and s, in (F + mu K) d = -(s g + mu J_ret^T rho). In a subspace of some tens of
directions F and K become diagonal together, so that every (mu, s) costs nothing there and the root in mu, at which both
constraints bind, is found by bisection. The subspace starts as the (preconditioned) Krylov space of the gradient, at
the mu of the step before, and grows by conjugate gradients on what is left of the stationarity condition, until that is
small.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, replace
from functools import partial

import torch
from torch import Tensor

from nsrl.projection.budget.model import Quadratic
from nsrl.projection.budget.natural_gradient import LocalModel, Step
from nsrl.projection.jacobians.matrix_free import Products
from nsrl.projection.solvers.conjugate_gradients import conjugate_gradients
from nsrl.projection.solvers.kfac import KroneckerPreconditioner

#: Range in which the ratio of the multipliers, retention over rollout, is looked for. Where the budget alone binds, its
#: end leaves that share, 1e-12, of the rollout's radius unused of the budget.
MULTIPLIERS = (1e-6, 1e12)

#: Largest multiplier that conjugate gradients are run with: beyond it they only see the buffer.
STIFF = 1e3

#: Residual of stationarity that is let be, in units of the precision of conjugate gradients: 0.3 costs 1 % of the gain.
STATIONARITY = 3.0

#: Share of the largest eigenvalue below which a combination of float32 directions is round-off.
ROUND_OFF = 1e-6

#: Of that range on a logarithmic scale: mu comes out to 13 digits.
HALVINGS = 48

#: Share by which round-off may lead the modelled KL over a bound: both are met to it at the root in mu, in float64.
SLACK = 1e-9

Interval = tuple[float, float]

#: a, b and c of a s^2 + 2 b s + c.
Form = tuple[float, float, float]


@dataclass(frozen=True)
class Multipliers:
    """The two numbers of the stationarity condition.

    Attributes:
        scale: s.
        multiplier: mu.
    """

    scale: float
    multiplier: float


@dataclass(frozen=True)
class Candidate:
    """The solution within a subspace.

    Attributes:
        displacement: d, shape (P,).
        scale: s.
        multiplier: mu.
        kl: 1/2 d^T F d.
        retained: modelled KL on the buffer.
        free: what the linearised surrogate gains by the best step without the buffer in the same subspace.
    """

    displacement: Tensor
    scale: float
    multiplier: float
    kl: float
    retained: float
    free: float


def retained_step(
    local: LocalModel,
    retention: Quadratic[Products],
    budget: float,
    *,
    guess: Multipliers | None = None,
    rounds: int = 2,
) -> Step:
    """The step inside both trust regions; where the buffer's is out of reach, no modelled KL above today's is allowed.

    Args:
        local: the rollout.
        retention: the buffer, over the same parameters.
        budget: largest modelled KL on the buffer.
        guess: those of the step before, which change slowly: they say what the subspace is to begin with.
        rounds: growths of the subspace at most, each by one run of conjugate gradients.
    """
    subspace = SearchSpace(local, retention)
    usable = 0.0 < float(local.gradient.norm()) < math.inf  # without a gradient a guess would lead nowhere
    scale, multiplier = _softened(guess) if guess and usable else (0.0, 0.0)
    if multiplier > 0.0:
        products = subspace.grow(-(scale * local.gradient + multiplier * subspace.slope), multiplier)
        subspace.add(subspace.divide(local.gradient, multiplier))
    else:
        free, directions = local.explore()
        predicted = retention.predict(free.displacement)
        if predicted <= budget or not free.gain > 0.0:  # NaN too: no step
            return replace(free, retained=predicted)
        for direction in directions:
            subspace.add(direction)
        products = len(directions)
    subspace.add(subspace.divide(subspace.slope, multiplier))
    found = subspace.solve(budget)
    if multiplier > 0.0 and not found.multiplier > 2.0 * MULTIPLIERS[0]:
        return retained_step(local, retention, budget, rounds=rounds)
    missing, residual = subspace.missing(found)
    while residual > STATIONARITY * local.precision and rounds > 0:
        products += subspace.grow(missing, min(found.multiplier, STIFF))
        found = subspace.solve(budget)
        missing, residual = subspace.missing(found)
        rounds -= 1
    gain = -float(local.gradient @ found.displacement)
    kept = gain / found.free if found.free > 0.0 else 0.0
    return Step(
        found.displacement, found.multiplier, kept, gain, found.kl, found.retained, residual, products, found.scale
    )


def _softened(guess: Multipliers) -> tuple[float, float]:
    """Its scale and multiplier in the same ratio, the multiplier no larger than conjugate gradients are run with."""
    multiplier = min(guess.multiplier, STIFF)
    return guess.scale * (multiplier / guess.multiplier if guess.multiplier > 0.0 else 1.0), multiplier


class SearchSpace:
    """Directions, with the images that F and K are made of, and the problem solved in their span.

    Attributes:
        slope: gradient of the buffer's KL, J_ret^T rho, shape (P,).
        divide: an approximate inverse of F + damping + multiplier K.
    """

    def __init__(self, local: LocalModel, retention: Quadratic[Products]):
        self.local = local
        self.retention = retention
        self.slope = retention.jacobian.rmatvec(retention.residual)
        self.divide = KroneckerPreconditioner(local.fisher.factors(), local.damping, retention.jacobian.factors())
        self._directions: list[Tensor] = []
        self._rollout: list[Tensor] = []
        self._buffer: list[Tensor] = []

    def grow(self, rhs: Tensor, multiplier: float) -> int:
        """Add the directions of conjugate gradients on F + damping + multiplier K; returns their number."""
        add, divide = (partial(method, multiplier=multiplier) for method in (self.add, self.divide))
        found = conjugate_gradients(add, rhs, self.local.iterations, self.local.precision, divide)
        return len(found.directions)

    def add(self, direction: Tensor, multiplier: float = 0.0) -> Tensor:
        """Add a direction (P,); returns its product with F + damping + multiplier K."""
        rollout = self.local.fisher.matvec(direction)
        buffer = self.retention.jacobian.matvec(direction)
        size = float(direction.norm())
        if size > 0.0:
            self._directions.append(direction / size)
            self._rollout.append(rollout / size)
            self._buffer.append(buffer / size)
        return self._product(direction, rollout, buffer, multiplier)

    def missing(self, found: Candidate) -> tuple[Tensor, float]:
        """What stationarity lacks at a candidate, b - (F + damping + mu K) d, and its size relative to b.

        Sizes are those of the preconditioner, as in conjugate gradients.
        """
        unit = 1.0 / max(found.multiplier, 1.0)  # squares of the multiplier may be more than float32 holds
        wanted = -(unit * found.scale * self.local.gradient + unit * found.multiplier * self.slope)
        rollout = self.local.fisher.matvec(found.displacement)
        buffer = self.retention.jacobian.matvec(found.displacement)
        missing = wanted - unit * self._product(found.displacement, rollout, buffer, found.multiplier)
        multiplier = min(found.multiplier, STIFF)
        size, left = (float(vector @ self.divide(vector, multiplier)) for vector in (wanted, missing))
        if math.isnan(size):
            return missing, math.nan
        return missing, math.sqrt(max(left, 0.0) / size) if size > 0.0 else 0.0

    def solve(self, budget: float) -> Candidate:
        """The best displacement in the span that both models allow."""
        directions, rollout, buffer = (
            torch.stack(vectors).double() for vectors in (self._directions, self._rollout, self._buffer)
        )
        fisher, kept = rollout @ rollout.T, buffer @ buffer.T
        damped = fisher + self.local.damping * (directions @ directions.T)
        basis, shares = _diagonalise(damped, kept)
        diagonal = _Diagonal(
            basis.T @ fisher @ basis,
            shares,
            basis.T @ (directions @ self.local.gradient.double()),
            basis.T @ (buffer @ self.retention.residual.double()),
            self.local.radius,
            SLACK * max(budget, self.retention.divergence),
        )
        room = budget - self.retention.divergence
        coordinates, scale, multiplier = diagonal.bisect(room) or diagonal.bisect(max(room, 0.0)) or diagonal.rest()
        displacement = directions.T @ (basis @ coordinates)
        retained = self.retention.divergence + diagonal.change(coordinates)
        return Candidate(
            displacement.to(self.local.gradient),
            scale,
            multiplier,
            diagonal.kl(coordinates),
            retained,
            diagonal.free_gain(),
        )

    def _product(self, direction: Tensor, rollout: Tensor, buffer: Tensor, multiplier: float) -> Tensor:
        product = self.local.fisher.rmatvec(rollout) + self.local.damping * direction
        return product + multiplier * self.retention.jacobian.rmatvec(buffer) if multiplier > 0.0 else product


def _diagonalise(first: Tensor, second: Tensor) -> tuple[Tensor, Tensor]:
    """A basis B with B^T (first + second) B = I and B^T second B = diag(shares), shares in [0, 1].

    Directions that are combinations of others up to round-off are left out.
    """
    total = first + second
    scale = total.diagonal().clamp_min(1e-300).rsqrt()
    values, vectors = torch.linalg.eigh(scale[:, None] * total * scale)
    real = values > ROUND_OFF * values[-1]
    basis = scale[:, None] * vectors[:, real] / values[real].sqrt()
    shares, rotation = torch.linalg.eigh(basis.T @ second @ basis)
    return basis @ rotation, shares.clamp(0.0, 1.0)


@dataclass(frozen=True)
class _Diagonal:
    """The problem in coordinates c in which F + damping = diag(1 - shares) and K = diag(shares).

    Attributes:
        fisher: F without damping, which the length of a step is measured by, shape (m, m).
        shares: shape (m,).
        gradient: of the loss, shape (m,).
        slope: of the buffer's KL, shape (m,).
        radius: of the rollout's trust region.
        slack: change of the buffer's KL that is round-off.
    """

    fisher: Tensor
    shares: Tensor
    gradient: Tensor
    slope: Tensor
    radius: float
    slack: float

    def bisect(self, room: float) -> tuple[Tensor, float, float] | None:
        """Coordinates, s and mu at which the buffer's KL has changed by `room` on the edge of the rollout's region.

        Where the rollout's region ends first whatever mu is, on that edge; None when no mu keeps to both regions.
        """
        low, high = (math.log(multiplier) for multiplier in MULTIPLIERS)
        for _ in range(HALVINGS):
            middle = 0.5 * (low + high)
            if self._is_weak(math.exp(middle), room):
                low = middle
            else:
                high = middle
        # To first order one side of the root keeps to both regions, and not always the upper one: where d(s) enters the
        # rollout's region at the very point at which it leaves the buffer's, it is the lower one.
        found = [point for point in (self._inside(math.exp(end), room) for end in (low, high)) if point is not None]
        return min(found, key=lambda point: float(self.gradient @ point[0]), default=None)

    def rest(self) -> tuple[Tensor, float, float]:
        """No step."""
        return torch.zeros_like(self.gradient), 0.0, MULTIPLIERS[1]

    def kl(self, coordinates: Tensor) -> float:
        """1/2 c^T F c."""
        return 0.5 * float(coordinates @ self.fisher @ coordinates)

    def change(self, coordinates: Tensor) -> float:
        """Of the buffer's modelled KL."""
        return float(self.slope @ coordinates) + 0.5 * float(coordinates @ (self.shares * coordinates))

    def free_gain(self) -> float:
        """Gain of the natural-gradient step at the edge of the rollout's region."""
        towards, _ = self._stationary(0.0)
        length = self.kl(towards)
        return -float(self.gradient @ towards) * math.sqrt(self.radius / length) if length > 0.0 else math.inf

    def _stationary(self, multiplier: float) -> tuple[Tensor, Tensor]:
        """X and y of d = s x + y."""
        inverse = 1.0 / (1.0 - self.shares + multiplier * self.shares).clamp_min(1e-12)
        return -inverse * self.gradient, -multiplier * inverse * self.slope

    def _is_weak(self, multiplier: float, room: float) -> bool:
        """Whether the solution has a larger mu.

        Let q1 and q2 be what the two KLs exceed their bounds by. The region q1 + mu q2 <= 0 holds all that both allow,
        and the d(s) that leaves it is its best point. If q2 > 0 there, so do the regions of all smaller mu hold this
        point, and their best ones gain as much or more. The solution, which no region gains less than, is not there.
        With damping, which F's length leaves out, the sign still changes where both bind.
        """
        _, _, rollout, buffer = self._along(multiplier, room)
        a, b, c = (first + multiplier * second for first, second in zip(rollout, buffer, strict=True))
        both = _not_positive(a, b, c)
        scale = 0.0 if both is None or math.isinf(both[1]) else both[1]  # nearest to a region that is empty
        a, b, c = buffer
        return (a * scale + 2.0 * b) * scale + c > 0.0

    def _inside(self, multiplier: float, room: float) -> tuple[Tensor, float, float] | None:
        """The last d(s) in both regions, s and mu; None where there is none."""
        x, y, rollout, buffer = self._along(multiplier, room)
        first = _not_positive(*rollout[:2], rollout[2] - 2.0 * SLACK * self.radius)
        second = _not_positive(*buffer[:2], buffer[2] - 2.0 * self.slack)
        if first is None or second is None or min(first[1], second[1]) < max(first[0], second[0]):
            return None
        scale = min(first[1], second[1])
        if math.isinf(scale):  # x is zero
            scale = 0.0
        return scale * x + y, scale, multiplier

    def _along(self, multiplier: float, room: float) -> tuple[Tensor, Tensor, Form, Form]:
        """X and y, and twice what the KLs of s x + y exceed their bounds by, the rollout's and the buffer's."""
        x, y = self._stationary(multiplier)
        fx, kx = self.fisher @ x, self.shares * x
        rollout = float(x @ fx), float(y @ fx), 2.0 * (self.kl(y) - self.radius)
        buffer = float(x @ kx), float(y @ kx + self.slope @ x), 2.0 * (self.change(y) - room)
        return x, y, rollout, buffer


def _not_positive(a: float, b: float, c: float) -> Interval | None:
    """The s >= 0 with a s^2 + 2 b s + c <= 0, for a >= 0; None where there are none."""
    if a <= 0.0:  # then b is 0 too, as the form is positive semi-definite
        return (0.0, math.inf) if c <= 0.0 else None
    root = b * b - a * c
    if root < 0.0 or (b > 0.0 and c > 0.0):
        return None
    far = math.sqrt(root) + abs(b)  # the root of the larger size, and the other by their product: nothing cancels
    if b > 0.0:
        return 0.0, max(-c / far, 0.0)
    return (max(c / far, 0.0) if far > 0.0 else 0.0), far / a
