"""Whether all processes of a run still compute the same."""

from __future__ import annotations

from hashlib import blake2b

import numpy as np
from stable_baselines3.common.base_class import BaseAlgorithm
from torch import nn

from nsrl.errors import NsrlError
from nsrl.rl.parallel.shared_envs import SharedEnvs


def shared_by(model: BaseAlgorithm) -> SharedEnvs | None:
    """The environments that a model shares with those of other processes; None where it is alone."""
    env = None if model.env is None else model.env.unwrapped
    return env if isinstance(env, SharedEnvs) else None


def digest(module: nn.Module) -> bytes:
    """16 bytes that stand for all parameters, bit for bit."""
    found = blake2b(digest_size=16)
    for parameter in module.parameters():
        found.update(np.ascontiguousarray(parameter.detach().cpu().numpy()).tobytes())
    return found.digest()


def check_agreement(model: BaseAlgorithm) -> None:
    """Raise NsrlError unless the policy is the same in all processes; a model that is alone always agrees.

    Raises:
        NsrlError: some other process has other parameters.
        ProcessLost: one of them has ended.
    """
    shared = shared_by(model)
    if shared is None:
        return
    found = shared.ranks.gather_bytes(digest(model.policy))
    others = [number for number, other in enumerate(found) if other != found[0]]
    if others:
        raise NsrlError(
            f"the policies of this run's processes differ (process {others[0]} from process 0) behind update "
            f"{model._n_updates}: they began with different agents, seeds or buffers, or their processors round "
            "differently; give all the same, on machines of one kind"
        )
