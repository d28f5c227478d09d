"""gSDE's standard deviation on a part of an actor's units: the old task's as it was, and one for the new task alone."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from stable_baselines3.common.distributions import StateDependentNoiseDistribution
from stable_baselines3.common.policies import ActorCriticPolicy
from torch import Tensor, nn

from nsrl.rl.opening.spread import wide_log_std

#: Multiplicative updates of the fit: its relative error falls below 1e-3 within some hundreds.
ROUNDS = 2000
#: Variance that stands for none, and activation that counts as none.
NOTHING, SILENT = 1e-12, 1e-3
#: What fresh units without a part in the old task make of the new one's variance; the rest is the switch's, which is
#: the same at every state.
OWN = 0.9


@dataclass(frozen=True)
class HiddenNoise:
    """The spread of a policy under gSDE: variances of its last hidden units' weights in the noise.

    At a state with activations z the variance of an action is sum_h z_h^2 v_h, v = std(log_std)^2 (Raffin et al. 2021).

    Attributes:
        log_std: the policy's, (H, A) or (H, 1).
        expln: whether SB3 takes its standard deviations through `expln` rather than exp.
        wide: standard deviations that are felt everywhere in the action space, (A,), float64.
    """

    log_std: nn.Parameter
    expln: bool
    wide: Tensor

    @classmethod
    def of(cls, policy: ActorCriticPolicy) -> HiddenNoise | None:
        """A policy's; None for one without gSDE."""
        distribution: Any = policy.action_dist
        if not isinstance(distribution, StateDependentNoiseDistribution):
            return None
        parameter: Any = policy.log_std
        wide = torch.as_tensor(wide_log_std(policy.action_space)).to(parameter.device).double().exp()  # type: ignore[arg-type]
        return cls(parameter, bool(distribution.use_expln), wide)

    def variances(self, hidden: Tensor) -> Tensor:
        """Of the noise at activations of the last hidden layer, (N, H) float64: (N, A) or (N, 1)."""
        return hidden.square() @ self._stds(self.log_std.detach().double()).square()

    def divide(
        self, wanted: Tensor, before: Tensor, after: Tensor, kept: Tensor, free: Tensor, spread: float = 1.0
    ) -> None:
        """Give the old task its variances on the kept units, and the new one a spread of its own on the free ones.

        The first free unit at least is silent on the old task, so that what the noise makes of it is the new task's
        alone.

        Args:
            wanted: variances at the old states, (N, A) or (N, 1).
            before, after: activations of the divided layer on old states, (N, H), and on new ones, (M, H), float64.
            kept, free: indices of units.
            spread: standard deviation on the new task, as a share of the wide one.
        """
        constant = before[:, free[1:]].square().mean(0)
        said = constant > SILENT**2  # what a unit that is off says is noise on the old task, the same at every state
        columns = torch.cat([before[:, kept].square(), constant[said].sum().expand(len(before), 1)], 1)
        variance = torch.full_like(self.log_std, NOTHING, dtype=torch.float64)
        goal = (spread * self.wide).square()
        if variance.shape[1] == 1:
            goal = goal.mean(0, keepdim=True)
        loud = after.square().mean(0)
        own = OWN / loud[free[1:]].sum().clamp_min(NOTHING)
        for column in range(variance.shape[1]):
            found = fit_variances(columns, wanted[:, column])
            variance[kept, column] = found[:-1]
            left = (goal[column] - loud[kept] @ found[:-1]).clamp_min(0.0)
            variance[free[1:], column] = torch.where(said, found[-1], own * left)
            left = goal[column] - loud @ variance[:, column]
            variance[free[0], column] = left.clamp_min(NOTHING) / loud[free[0]].clamp_min(SILENT)
        self.write(self._logs(variance.clamp_min(NOTHING).sqrt()))

    def write(self, log_std: Tensor) -> None:
        """Set the logs of the standard deviations, of the parameter's shape."""
        with torch.no_grad():
            self.log_std.copy_(log_std)

    def _stds(self, log_std: Tensor) -> Tensor:
        std = log_std.exp()
        return torch.where(log_std > 0.0, log_std.clamp_min(0.0).log1p() + 1.0, std) if self.expln else std

    def _logs(self, std: Tensor) -> Tensor:
        return torch.where(std > 1.0, (std - 1.0).expm1(), std.log()) if self.expln else std.log()


def fit_variances(columns: Tensor, wanted: Tensor) -> Tensor:
    """Weights v >= 0, (K,), of columns >= 0, (N, K), that minimise the relative error |columns v / wanted - 1|^2.

    By multiplicative updates (Lee and Seung 2001), which keep signs and never raise it; a column of zeros gets 0.

    Args:
        columns: squared activations, float64.
        wanted: variances, (N,), float64.
    """
    relative = columns / wanted.clamp_min(NOTHING).unsqueeze(1)
    gram, slope = relative.T @ relative, relative.sum(0)
    used = slope > 0.0
    found = torch.where(used, len(wanted) / slope.sum().clamp_min(NOTHING), 0.0)
    for _ in range(ROUNDS):
        found = torch.where(used, found * slope / (gram @ found).clamp_min(NOTHING), found)
    return found
