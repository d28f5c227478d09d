"""What a policy does, measured by torch.distributions on a buffer's own arrays: nothing of nsrl's engine is asked."""

from __future__ import annotations

from typing import Any

import numpy as np
import torch
from stable_baselines3.common.policies import ActorCriticPolicy
from torch import Tensor
from torch.distributions import Bernoulli, Categorical, Normal, kl_divergence

from nsrl.rl.retention.buffer import RetentionBuffer
from tests.tolerances import kl_excess

#: Logits at and below this are those of actions that a mask has ruled out.
RULED_OUT = -1e7
#: Widths of the small policies of these tests, all layers together, at most.
WIDTHS = 256


def raw_outputs(policy: ActorCriticPolicy, buffer: RetentionBuffer) -> Tensor:
    """Logits or means by the policy's own distribution, shape (N, O), in its number format."""
    with torch.no_grad():
        found = policy.get_distribution(buffer.inputs())
    parts = found.distributions if hasattr(found, "distributions") else found.distribution
    if isinstance(parts, list):
        return torch.cat([part.logits for part in parts], -1)
    return parts.mean if isinstance(parts, Normal) else parts.logits


def state_kls(
    policy: ActorCriticPolicy,
    buffer: RetentionBuffer,
    preserve: str = "distribution",
    outputs: Tensor | None = None,
    reference: Tensor | None = None,
) -> Tensor:
    """KL(pi_ref || pi) of the joint action, shape (N,), float64.

    Args:
        policy, buffer: of one action family; masks are those that the buffer's outputs show.
        preserve: "mode" holds a Gaussian's standard deviation at the reference's.
        outputs: in place of the policy's; a gradient may flow through them.
        reference: in place of the buffer's.
    """
    outputs = (raw_outputs(policy, buffer) if outputs is None else outputs).double()
    reference = torch.tensor(np.asarray(buffer.outputs)) if reference is None else reference
    reference = reference.double()
    if buffer.family == "gaussian":
        std = torch.tensor(np.asarray(buffer.log_std)).double().exp()
        now = policy.log_std.double().exp() if preserve == "distribution" else std
        return kl_divergence(Normal(reference, std), Normal(outputs, now)).sum(-1)
    if buffer.family == "bernoulli":
        return kl_divergence(Bernoulli(logits=reference), Bernoulli(logits=outputs)).sum(-1)
    outputs = torch.where(reference > RULED_OUT, outputs, torch.full_like(outputs, -1e8))
    sizes = list(buffer.nvec or [outputs.shape[-1]])
    heads = zip(reference.split(sizes, -1), outputs.split(sizes, -1), strict=True)
    return torch.stack([kl_divergence(Categorical(logits=r), Categorical(logits=o)) for r, o in heads]).sum(0)


def independent_kl(model: Any, buffer: RetentionBuffer, preserve: str = "distribution") -> float:
    """Mean KL(pi_ref || pi) of a model over the whole buffer, states of equal weight."""
    with torch.no_grad():
        return float(state_kls(model.policy, buffer, preserve).mean())


def within(budget: float, buffer: RetentionBuffer, least: float = 1e-6) -> float:
    """What `independent_kl` may be where the engine, which rounds otherwise, has measured at most the budget.

    A budget of zero allows `least` (`RetentionConfig.tolerance`).
    """
    allowed = budget or least
    shown = np.where(np.asarray(buffer.outputs) > RULED_OUT, buffer.outputs, 0.0)
    spread = 1.0 if buffer.log_std is None else float(np.exp(np.min(buffer.log_std)))
    return allowed + kl_excess(allowed, torch.as_tensor(shown, dtype=torch.float32), terms=WIDTHS, spread=spread)


def same_policies(one: Any, other: Any) -> bool:
    """Whether two models have the same weights, to the last bit."""
    ours, theirs = one.policy.state_dict(), other.policy.state_dict()
    return all(torch.equal(value, theirs[name]) for name, value in ours.items())


def same(first: Any, second: Any) -> bool:
    """Deep equality of nested dicts, sequences, arrays and tensors."""
    if isinstance(first, Tensor):
        return torch.equal(first, second)
    if isinstance(first, dict):
        return first.keys() == second.keys() and all(same(first[key], second[key]) for key in first)
    if isinstance(first, list | tuple):
        return len(first) == len(second) and all(map(same, first, second))
    return bool(np.array_equal(first, second))
