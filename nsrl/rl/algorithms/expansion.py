"""An actor that the old task needs whole is given more units before it is fine-tuned."""

from __future__ import annotations

import math
from typing import Any

from nsrl.errors import NsrlError
from nsrl.rl.agents.agent import Agent
from nsrl.rl.budget.config import RetentionConfig
from nsrl.rl.opening.condensing import ActorLayers
from nsrl.rl.opening.room import missing_units
from nsrl.rl.opening.stage import CONDENSING
from nsrl.rl.playing.rollout import evaluation_mode
from nsrl.rl.retention.buffer import RetentionBuffer
from nsrl.rl.retention.constraint import RetentionConstraint
from nsrl.rl.retention.promises import Promises
from nsrl.rl.surgery import add_units


def with_room(source: Agent, retain: Any, config: RetentionConfig, opened: bool) -> tuple[Agent, int]:
    """An agent whose actor has units to spare for the new task, and how many were added to every hidden layer.

    Args:
        source: the agent; it stays as it is.
        retain: buffer of old-task states.
        config: retention settings; `room` says whether.
        opened: whether the policy will be opened.

    Returns:
        The agent itself and 0 where it has room, where nobody asks for any, or where its actor cannot be widened.
    """
    if config.room == "off" or not opened or not isinstance(retain, RetentionBuffer):
        return source, 0
    policy: Any = source.model.policy
    if ActorLayers.of(policy) is None:
        return source, 0
    try:
        config = config.with_overall_budget()
        promises = Promises(config.tolerance, config.worst_budget, config.worst_share, config.agreement)
        with evaluation_mode(policy):
            constraint = RetentionConstraint(
                policy, retain, config.preserve, config.tempering, config.task_budgets, promises=promises
            )
            before = constraint.binding_divergence()
            if not math.isfinite(before):
                return source, 0
            count = missing_units(constraint, before + CONDENSING * config.opening_budget * config.tolerance)
        return (add_units(source, count, seed=config.seed), count) if count else (source, 0)
    except NsrlError:  # of a buffer or an agent that do not fit: whoever holds one to the other says so
        return source, 0
