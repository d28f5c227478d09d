"""What a guard is told."""

from __future__ import annotations

from dataclasses import dataclass
from typing import get_args

from nsrl.editing.post_training.way import Kind
from nsrl.errors import NsrlError


@dataclass(frozen=True)
class GuardOptions:
    """How behaviour is kept.

    Attributes:
        kl_budget: largest mean KL(then || now), nats a token; infinity measures and changes nothing.
        constraint: "features" projects onto the null space of what the layers saw of the preserved tokens,
            "kronecker" removes as little as a Kronecker-factored model of the KL asks for (small models), "none"
            leaves it to the gradient and to enforcement.
        energy: of "features": share of a layer's feature energy that is protected, in (0, 1].
        hold_uncovered: norm scales, embeddings and tied heads, which no layer's features protect, do not move.
        project_every: steps from one projection of the whole way to the next.
        measure_every: steps from one measurement (and enforcement, where needed) to the next.
        pull_every: steps from one Lagrangian gradient to the next; 0 for none.
        target: share of the budget that the multiplier and a restoration aim at.
        multiplier: the Lagrange multiplier to start with, in units of the loss per nat.
        rate: integral gain of its logarithm, a pull.
        damping: proportional gain of its logarithm.
        restore_steps: Gauss-Newton steps tried before going back to the last feasible parameters; 0 only goes back.
        restore_tokens: preserved tokens that such a step is solved on; all count for how far it is made.
        top_k: keep so many likeliest classes of the reference and the rest as one mass; None keeps all. The KL measured
            is then a lower bound of the full one.
        precision: of the projection's products, "float32" or "float64".
        seed: of the order in which preserved batches pull.
    """

    kl_budget: float = 0.02
    constraint: Kind = "features"
    energy: float = 0.5
    hold_uncovered: bool = False
    project_every: int = 10
    measure_every: int = 50
    pull_every: int = 1
    target: float = 0.75
    multiplier: float = 1.0
    rate: float = 0.02
    damping: float = 1.0
    restore_steps: int = 2
    restore_tokens: int = 64
    top_k: int | None = None
    precision: str = "float32"
    seed: int = 0

    def __post_init__(self) -> None:
        if not self.kl_budget > 0.0:
            raise NsrlError(
                f"kl_budget must be a positive number of nats a token, not {self.kl_budget}; where nothing may move, "
                "take a small one with energy=1.0 and hold_uncovered=True"
            )
        if self.constraint not in get_args(Kind):
            raise NsrlError(f"constraint must be one of {', '.join(get_args(Kind))}, not {self.constraint!r}")
        if not 0.0 < self.energy <= 1.0 or not 0.0 < self.target <= 1.0:
            raise NsrlError(f"energy and target are shares in (0, 1], not {self.energy} and {self.target}")
        for name in ("project_every", "measure_every", "restore_tokens"):
            if getattr(self, name) < 1:
                raise NsrlError(f"{name} must be at least 1, not {getattr(self, name)}")
        if min(self.pull_every, self.restore_steps) < 0 or not self.multiplier > 0.0:
            raise NsrlError("pull_every and restore_steps must not be negative, and the multiplier must be positive")
        if self.precision not in ("float32", "float64"):
            raise NsrlError(f"precision must be float32 or float64, not {self.precision!r}")
