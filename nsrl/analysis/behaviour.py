"""The behaviour that a buffer retains, as a spectrum: how many directions of the parameters it speaks for."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from nsrl.errors import NsrlError
from nsrl.projection.solvers.spectrum import Spectrum, spectrum
from nsrl.rl import agents
from nsrl.rl.retention.buffer import RetentionBuffer
from nsrl.rl.retention.constraint import RetentionConstraint


@dataclass(frozen=True)
class BehaviourSpectrum:
    """Spectrum of the whitened Jacobian of the retention constraint, K = J J^T: the buffer's own Fisher metric.

    A step d in the direction of eigenvalue s changes the mean KL by 1/2 s |d|^2.

    Attributes:
        spectrum: of K, (k,) values in descending order and their modes.
        parameters: number of protected parameters, P.
        states: buffer states that were linearised.
    """

    spectrum: Spectrum
    parameters: int
    states: int

    @property
    def rank_fraction(self) -> float:
        """Share of the parameter directions that some retained state can see."""
        return self.spectrum.rank / self.parameters

    def effective_dimension(self, kl_budget: float, step: float) -> float:
        """Directions in which a step of this norm would spend the whole budget, each counted by how much it would.

        That is sum s / (s + l) with l = 2 kl_budget / step^2: in a direction with s = l the step costs the budget.

        Raises:
            NsrlError: `kl_budget` or `step` is not positive.
        """
        if not kl_budget > 0.0 or not step > 0.0:
            raise NsrlError(f"kl_budget and step must be positive, not {kl_budget} and {step}")
        return self.spectrum.effective_dimension(2.0 * kl_budget / step**2)


def constraint_of(
    agent: Any, buffer: RetentionBuffer, *, preserve: str = "distribution", trust_buffer: bool = False
) -> RetentionConstraint:
    """The constraint of an agent (path, `Agent` or model) on a buffer that was made with it.

    Raises:
        NsrlError: unreadable agent, or another agent's buffer.
    """
    source = agents.load(agent)
    buffer.check(source, trust_agent=trust_buffer)
    return RetentionConstraint(source.model.policy, buffer, preserve)


def some_states(constraint: RetentionConstraint, states: int | None) -> Tensor:
    """Indices of training states of the buffer, (states,) int64, evenly spaced, at most so many.

    Raises:
        NsrlError: fewer than one.
    """
    if states is not None and states < 1:
        raise NsrlError(f"states must be at least 1, not {states}")
    train = constraint.train
    if states is None or states >= len(train):
        return train
    return train[torch.linspace(0, len(train) - 1, states).round().long()]


def retained_behaviour(
    agent: Any,
    buffer: RetentionBuffer | None = None,
    *,
    states: int | None = 256,
    preserve: str = "distribution",
    trust_buffer: bool = False,
) -> BehaviourSpectrum:
    """Spectrum of what a buffer retains of an agent's behaviour.

    Args:
        agent: path of an SB3 zip or run folder, an `Agent`, a model, or a `RetentionConstraint`.
        buffer: its retention buffer (not with a constraint).
        states: buffer states to linearise, evenly spaced; None takes all.
        preserve: "distribution" or "mode", as in `RetentionConfig`.
        trust_buffer: accept a buffer that was made with another policy.

    Raises:
        NsrlError: unreadable agent, another agent's buffer, no buffer.
    """
    if isinstance(agent, RetentionConstraint):
        constraint = agent
    elif buffer is None:
        raise NsrlError("give the agent's retention buffer")
    else:
        constraint = constraint_of(agent, buffer, preserve=preserve, trust_buffer=trust_buffer)
    chosen = some_states(constraint, states)
    J = constraint.linearise(chosen).jacobian
    return BehaviourSpectrum(spectrum(J.gram()), J.shape[1], len(chosen))
