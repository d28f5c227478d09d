"""Whether a policy computes one function: the same in every batch, every time, and in updates as when it acts."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

import torch
from stable_baselines3.common.policies import ActorCriticPolicy
from torch import Tensor, nn

from nsrl.errors import NsrlError
from nsrl.rl.policies.actor_critic import CRITIC, Observation, policy_outputs, select

#: States that are asked, and how many of them again, in twos (some normalisations refuse a single one).
ASKED, ALONE = 256, 4

#: Outputs that differ by less of their size differ by rounding: other batch sizes and modes go through other kernels.
ROUNDED = 1e-4


def check_steady(policy: ActorCriticPolicy, observations: Observation, algorithm: str, updates_in_eval: bool) -> None:
    """Raise NsrlError where what the actor computes cannot be held, or is not what acts.

    No KL of a policy holds that is random or depends on the batch or the past. SB3's PPO and A2C update in train mode,
    in which dropout is random and running statistics move the policy where no constraint on its parameters sees it.

    Args:
        policy: the policy; its buffers, modes and torch's generators are left as they are.
        observations: that it is asked on.
        algorithm: name of the one that is to train it.
        updates_in_eval: whether that one updates in eval mode.
    """
    if not updates_in_eval:
        _check_kinds(policy, algorithm)
    batch = select(observations, slice(0, ASKED))
    with _left_alone(policy) as buffers, torch.no_grad():
        policy.set_training_mode(False)
        acting = policy_outputs(policy, batch)
        if moved := _moved(policy, buffers):
            raise NsrlError(f"{moved} changes whenever the policy acts, and the policy with it; take it out")
        if _differ(acting, policy_outputs(policy, batch)):
            raise NsrlError(
                "the policy gives other outputs for the same states when asked again in eval mode: it is random or "
                "remembers what it has seen, and no KL of it can be held; look for dropout that ignores the mode"
            )
        pairs = [slice(start, start + 2) for start in range(0, min(ALONE, len(acting) - 1), 2)]
        if any(_differ(acting[pair], policy_outputs(policy, select(batch, pair))) for pair in pairs):
            raise NsrlError(
                "the policy gives other outputs for a state among few others than for the same state among many, so "
                "its KL on a buffer does not say how it acts; look for a normalisation over the batch"
            )
        if updates_in_eval:
            return
        policy.set_training_mode(True)
        training = policy_outputs(policy, batch)
        moved = _moved(policy, buffers)
        if moved or _differ(acting, training):
            name = moved or _culprit(policy, batch, acting)
            raise NsrlError(
                f"{name} computes something else in train mode, in which {algorithm} updates, than when the policy "
                "acts; replace it (LayerNorm will do), or fine-tune with NullSpaceTRPO, which updates in eval mode"
            )


def _check_kinds(policy: ActorCriticPolicy, algorithm: str) -> None:
    """Refuse by name what would not show in every batch: a dropout may drop nothing."""
    for name, module in policy.named_modules():
        noisy = isinstance(module, nn.modules.dropout._DropoutNd) and module.p > 0.0
        inside = isinstance(module, nn.MultiheadAttention | nn.RNNBase) and module.dropout > 0.0
        still = isinstance(module, nn.modules.batchnorm._NormBase) and module.track_running_stats
        if name.startswith(CRITIC) or not (noisy or inside or still or isinstance(module, nn.RReLU)):
            continue
        raise NsrlError(
            f"{name} is {type(module).__name__}, with which {algorithm} updates another policy than the one that acts; "
            "replace it (LayerNorm will do), or fine-tune with NullSpaceTRPO, which updates in eval mode"
        )


def _culprit(policy: ActorCriticPolicy, batch: Observation, acting: Tensor) -> str:
    """The module that computes something else in train mode all by itself, as far as there is one."""
    for name, module in policy.named_modules():
        policy.set_training_mode(False)
        module.training = True
        if name and _differ(acting, policy_outputs(policy, batch)):
            return f"{name} ({type(module).__name__})"
    return "the policy"


def _differ(one: Tensor, other: Tensor) -> bool:
    size = max(float(one.abs().max()), 1.0)
    return not bool(((one - other).abs() <= ROUNDED * size).all())


def _moved(policy: ActorCriticPolicy, buffers: dict[str, Tensor]) -> str | None:
    """The first of the actor's buffers that is not as it was."""
    for name, buffer in policy.named_buffers():
        if not name.startswith(CRITIC) and not torch.equal(buffer, buffers[name]):
            return name
    return None


@contextmanager
def _left_alone(policy: ActorCriticPolicy) -> Iterator[dict[str, Tensor]]:
    """Put buffers, modes and torch's generators back at the end; yields copies of the buffers."""
    modes = [(module, module.training) for module in policy.modules()]
    buffers = {name: buffer.clone() for name, buffer in policy.named_buffers()}
    with torch.random.fork_rng(devices=[policy.device] if policy.device.type == "cuda" else []):
        try:
            yield buffers
        finally:
            for module, training in modes:
                module.training = training
            with torch.no_grad():
                for name, buffer in policy.named_buffers():
                    buffer.copy_(buffers[name])
