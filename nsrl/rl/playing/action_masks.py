"""Invalid-action masks (MaskablePPO): asked of the environment, kept in a buffer's outputs, and left out of the KL.

What is protected is the masked distribution, the one that the agent acts by. The unmasked one would be simpler and
wrong: KL(masked) <= KL(all actions) / P(valid) is all that is known, and nothing trains P(valid), so a small KL over
all actions says little about what the agent does. A buffer needs no extra array for masks: an invalid action's
reference logit is -1e8, the value that sb3-contrib itself puts there.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import gymnasium as gym
import numpy as np
import torch
from sb3_contrib.common.maskable.distributions import MaskableDistribution
from sb3_contrib.common.maskable.utils import get_action_masks, is_masking_supported
from stable_baselines3.common.policies import BasePolicy
from stable_baselines3.common.vec_env import VecEnv
from torch import Tensor, nn

from nsrl.errors import NsrlError
from nsrl.projection.metrics import Categorical

#: Logit of an invalid action, as in `sb3_contrib.common.maskable.distributions`.
INVALID = -1e8


def is_maskable(policy: Any) -> bool:
    """Whether a policy takes action masks."""
    return isinstance(getattr(policy, "action_dist", None), MaskableDistribution)


def with_masks(logits: Tensor, valid: Tensor) -> Tensor:
    """Logits (N, O) in which those of invalid actions are -1e8; `valid` is (N, O) bool."""
    return torch.where(valid, logits, torch.full_like(logits, INVALID))


def valid_actions(reference: Tensor) -> Tensor | None:
    """Which actions a buffer's reference logits (N, O) call valid, (N, O) bool; None if all are."""
    valid = reference > 0.5 * INVALID
    return None if bool(valid.all()) else valid


def read_masks(env: gym.Env | VecEnv, outputs: int) -> np.ndarray:
    """Masks of the current observations, one row an environment, (E, outputs) bool; heads side by side.

    Raises:
        NsrlError: an environment whose masks have another size.
    """
    rows = env.num_envs if isinstance(env, VecEnv) else 1
    masks = np.asarray(get_action_masks(env)).reshape(rows, -1).astype(bool)  # type: ignore[arg-type]
    if masks.shape[1] != outputs:
        raise NsrlError(
            f"action_masks() of the environment has {masks.shape[1]} entries, but the policy has {outputs} logits; "
            "return one entry for each choice of each action"
        )
    return masks


def mask_reader(policy: BasePolicy, env: gym.Env | VecEnv) -> Callable[[gym.Env | VecEnv], np.ndarray] | None:
    """`read_masks` for a policy on environments like `env`; None where policy or environment knows no masks."""
    if not (is_maskable(policy) and is_masking_supported(env)):  # type: ignore[arg-type]
        return None
    outputs = int(policy.action_net.out_features)  # type: ignore[union-attr, arg-type]
    return lambda played: read_masks(played, outputs)


@contextmanager
def masked_by(env: VecEnv, policy: BasePolicy) -> Iterator[list[np.ndarray]]:
    """Let a maskable policy's logits be masked as `env` says at that moment; collects the masks, (E, O) each.

    Does nothing, and collects nothing, for other policies and for environments without masks.
    """
    masks: list[np.ndarray] = []
    read = mask_reader(policy, env)
    if read is None:
        yield masks
        return

    def apply(_: nn.Module, __: Any, logits: Tensor) -> Tensor:
        masks.append(read(env))
        return with_masks(logits, torch.as_tensor(masks[-1], device=logits.device))

    hook = policy.action_net.register_forward_hook(apply)  # type: ignore[union-attr, operator]
    try:
        yield masks
    finally:
        hook.remove()


@dataclass(frozen=True)
class MaskedCategorical(Categorical):
    """`Categorical` over the valid actions only: outputs are masked before they are compared, and so are their rows.

    Attributes:
        valid: valid actions of each state, (N, O) bool.
    """

    valid: Tensor | None = None

    def divergence(self, reference: Tensor, outputs: Tensor) -> Tensor:
        """KL between the masked distributions, shape (N,)."""
        return super().divergence(reference, self._masked(outputs))

    def slope(self, reference: Tensor, outputs: Tensor) -> Tensor:
        """P - p_ref per head, zero for invalid actions, shape (N, O)."""
        return super().slope(reference, self._masked(outputs))

    def seeds(self, outputs: Tensor) -> Tensor:
        """As `Categorical.seeds`; the columns of invalid actions are zero."""
        assert self.valid is not None
        return super().seeds(self._masked(outputs)) * self.valid.unsqueeze(1)

    def residual(self, reference: Tensor, outputs: Tensor) -> Tensor:
        """As `Categorical.residual`."""
        return super().residual(reference, self._masked(outputs))

    def agreement(self, reference: Tensor, outputs: Tensor) -> float:
        """Share of states on which every head has the same most likely valid action."""
        return super().agreement(reference, self._masked(outputs))

    def _masked(self, outputs: Tensor) -> Tensor:
        assert self.valid is not None
        return with_masks(outputs, self.valid)
