"""Several retention buffers as one: for sequences of tasks, and for states that several agents visited."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
from gymnasium import Env
from stable_baselines3.common.vec_env import VecEnv

from nsrl.errors import NsrlError, check_kind
from nsrl.rl.agents.agent import resolve_agent
from nsrl.rl.agents.normalization import ObservationNormalizer, same_statistics
from nsrl.rl.agents.spaces import same_actions, same_observations
from nsrl.rl.policies.distributions import INVALID, is_maskable
from nsrl.rl.policies.observations import concatenated
from nsrl.rl.retention.arrays import Reference, from_arrays
from nsrl.rl.retention.collection import circumstances
from nsrl.rl.retention.states import RetainedStates


def from_agents(
    kind: Any,
    agents: Sequence[Reference],
    envs: Any,
    n_states: int = 2048,
    *,
    reference: Reference | None = None,
    seed: int = 0,
    trust: bool = False,
    **options: Any,
) -> RetainedStates:
    """The merged buffers of several agents, `n_states` of each, agent i with the seed `seed + i`.

    Args:
        kind: the class of the buffer; `RetentionBuffer.from_agents` passes it.
        agents: of equal spaces.
        envs: the environment of each, or one for all.
        n_states: states of each agent.
        reference: the policy whose outputs all states get, as when weaker agents visit what an expert should not
            forget; None gives each state the outputs of the agent that visited it.
        seed: of the first agent's collection.
        trust: let `agents.load` unpickle, where agents are paths.
        options: as in `RetentionBuffer.collect`.

    Raises:
        NsrlError: as `RetentionBuffer.collect` and `merge`.
    """
    check_kind("agents", agents, (list, tuple), "a list of agents")
    if envs is None or isinstance(envs, str | Env | VecEnv):
        envs = [envs] * len(agents)
    check_kind("envs", envs, (list, tuple), "an environment, or a list of one for each agent")
    if len(envs) != len(agents):
        raise NsrlError(
            f"there are {len(agents)} agents and {len(envs)} environments; give one for each, or one for all"
        )
    buffers = []
    for index, (agent, env) in enumerate(zip(agents, envs, strict=True)):
        buffer = kind.collect(agent, env, n_states, seed=seed + index, trust=trust, **options)
        if reference is not None:
            masked = is_maskable(resolve_agent(reference, trust)[0].policy)
            buffer = from_arrays(
                kind,
                buffer.observations,
                reference,
                heldout=buffer.heldout,
                seed=seed + index,
                trust=trust,
                task=buffer.provenance["task"],
                action_masks=buffer.outputs > 0.5 * INVALID if masked else None,
            )
        buffers.append(buffer)
    return merge(kind, buffers)


def merge(
    kind: type[RetainedStates], buffers: Sequence[RetainedStates], normalizer: ObservationNormalizer | None = None
) -> RetainedStates:
    """One buffer that holds the states of several, as for a sequence of tasks.

    Each state keeps its reference outputs, its relative weight and its source, by which KL is reported per task.

    Args:
        kind: the class of the buffer; `RetentionBuffer.merge` passes it.
        buffers: of equal spaces; the policy to be protected has to be the one that one of them was made with.
        normalizer: what that policy does to raw observations, where the buffers differ in it.

    Raises:
        NsrlError: no buffers, other spaces, or other observation statistics.
    """
    check_kind("buffers", buffers, (list, tuple), "a list of retention buffers")
    for buffer in buffers:
        check_kind("one of the buffers", buffer, RetainedStates, "a retention buffer")
    if not buffers:
        raise NsrlError("there are no buffers to merge; give at least one")
    first = buffers[0]
    for other in buffers[1:]:
        _check_alike(first, other)
        if normalizer is None and not _read_alike(first.normalizer, other.normalizer):
            raise NsrlError(
                f"the buffers of {first.tasks[0]} and {other.tasks[0]} have different observation statistics; pass "
                "normalizer, the statistics of the policy that is to be protected"
            )
    starts = np.cumsum([0, *(len(buffer.origins) for buffer in buffers[:-1])])
    shared: dict[str, Any] = {
        key: first.provenance[key] for key in ("observation_space", "action_space") if key in first.provenance
    }
    return kind(
        observations=concatenated([buffer.observations for buffer in buffers]),
        outputs=np.concatenate([buffer.outputs for buffer in buffers]),
        family=first.family,
        log_std=_joined_spreads(buffers),
        nvec=first.nvec,
        heldout=np.concatenate([buffer.heldout for buffer in buffers]),
        weights=np.concatenate([buffer.weights / buffer.weights.mean() for buffer in buffers]),
        source=np.concatenate([buffer.source + start for buffer, start in zip(buffers, starts, strict=True)]),
        normalizer=normalizer or first.normalizer,
        provenance={
            **shared,
            **circumstances(),
            "task": "+".join(dict.fromkeys(task for buffer in buffers for task in buffer.tasks)),
            "select": "merged",
            "sources": [origin for buffer in buffers for origin in buffer.origins],
        },
    )


def _check_alike(first: RetainedStates, other: RetainedStates) -> None:
    """Raise NsrlError unless both buffers are of policies with equal spaces."""
    for key, same in (("observation_space", same_observations), ("action_space", same_actions)):
        one, two = first.provenance.get(key), other.provenance.get(key)
        if one is None or two is None or not same(one, two):
            texts = ["unknown" if described is None else described["text"] for described in (one, two)]
            raise NsrlError(
                f"the buffers of {first.tasks[0]} and {other.tasks[0]} have different spaces ({key}: {texts[0]} and "
                f"{texts[1]}); widen the older one with nsrl.rl.surgery.widen_buffer, or keep them apart"
            )


def _read_alike(first: ObservationNormalizer | None, second: ObservationNormalizer | None) -> bool:
    if first is None or second is None:
        return first is second
    return same_statistics(first, second)


def _joined_spreads(buffers: Sequence[RetainedStates]) -> np.ndarray | None:
    """Log standard deviations: those that all share, or one row a source."""
    rows = [np.broadcast_to(b.log_std, (len(b.origins), b.outputs.shape[1])) for b in buffers if b.log_std is not None]
    if not rows:
        return None
    stacked = np.concatenate(rows)
    return stacked[0] if (stacked == stacked[0]).all() else stacked
