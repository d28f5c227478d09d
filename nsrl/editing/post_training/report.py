"""What a guard has to say."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class GuardReport:
    """A guard's latest measurement, and what it took.

    Attributes:
        kl_mean: latest measured mean KL(then || now) on the preserved tokens, nats a token.
        kl_max: of the token that moved most.
        agreement: share of tokens with the same likeliest class.
        kl_budget: as asked for.
        tokens: preserved, padding not counted.
        steps: of the optimizer.
        multiplier: the Lagrange multiplier.
        kept_share: |P d| / |d| of the latest projection, d the way of the parameters.
        rank: directions that the projection takes out, of `parameters`; 0 without one.
        parameters: that move.
        measurements, restorations, fallbacks: how often each was made.
        seconds: wall time in "pull", "project" and "measure" (with enforcement), and "all" since the guard was made.
        nbytes: memory of the "constraint", of the "reference" outputs and inputs, of the "parameters" kept aside.
        dense_nbytes: what dense projectors of the same layers would hold.
    """

    kl_mean: float
    kl_max: float
    agreement: float
    kl_budget: float
    tokens: int
    steps: int
    multiplier: float
    kept_share: float
    rank: int
    parameters: int
    measurements: int
    restorations: int
    fallbacks: int
    seconds: dict[str, float]
    nbytes: dict[str, int]
    dense_nbytes: int

    @property
    def overhead_fraction(self) -> float:
        """Share of the wall time since the guard was made that went into it."""
        spent = sum(value for key, value in self.seconds.items() if key != "all")
        return spent / max(self.seconds["all"], 1e-9)
