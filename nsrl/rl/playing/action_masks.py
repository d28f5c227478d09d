"""Invalid-action masks (MaskablePPO): asked of the environment, kept in a buffer's outputs, and left out of the KL.

What is protected is the masked distribution, the one that the agent acts by. The unmasked one would be simpler and
wrong: KL(masked) <= KL(all actions) / P(valid) is all that is known, and nothing trains P(valid), so a small KL over
all actions says little about what the agent does. A buffer needs no extra array for masks: an invalid action's
reference logit is -1e8, the value that sb3-contrib itself puts there.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import gymnasium as gym
import numpy as np
import torch
from sb3_contrib.common.maskable.utils import get_action_masks, is_masking_supported
from stable_baselines3.common.policies import BasePolicy
from stable_baselines3.common.vec_env import VecEnv
from torch import Tensor, nn

from nsrl.errors import NsrlError
from nsrl.rl.policies.distributions import is_maskable, with_masks


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
