"""Where a buffer comes from, as plain JSON: agent, task, versions and date."""

from __future__ import annotations

from datetime import datetime, timezone
from importlib import metadata
from typing import TYPE_CHECKING, Any

import numpy as np
from stable_baselines3.common.on_policy_algorithm import OnPolicyAlgorithm
from stable_baselines3.common.vec_env import VecEnv

from nsrl.rl.agents.agent import fingerprint
from nsrl.rl.agents.spaces import describe_space
from nsrl.rl.playing.rollout import Rollout

if TYPE_CHECKING:
    from nsrl.rl.retention.collection import CollectionConfig


def provenance(
    model: OnPolicyAlgorithm,
    source: str | None,
    env_id: str | None,
    config: CollectionConfig,
    rollout: Rollout,
    reward_scale: float | None,
) -> dict[str, Any]:
    """Where a buffer comes from, as plain JSON."""
    returns = rollout.episode_returns
    return {
        **identity(model, source),
        "env_id": env_id,
        "task": config.task or env_id or "old",
        "seed": int(config.seed),
        "select": config.select,
        "n_states": int(config.n_states),
        "n_transitions": int(rollout.rewards.size),
        "quantile": float(config.quantile) if config.select == "advantage" else None,
        "reward_scale": reward_scale,
        "heldout": float(config.heldout),
        "episodes": len(returns),
        "return_mean": float(np.mean(returns)) if returns else None,
    }


def identity(model: OnPolicyAlgorithm, source: str | None) -> dict[str, Any]:
    """Which agent a buffer's outputs are from, and what it was made with, as plain JSON."""
    return {
        "fingerprint": fingerprint(model.policy),
        "agent": source,
        "algorithm": type(model).__name__,
        "observation_space": describe_space(model.observation_space),
        "action_space": describe_space(model.action_space),
        **circumstances(),
    }


def circumstances() -> dict[str, Any]:
    """Versions and date, as plain JSON."""
    return {
        "versions": {name: version(name) for name in ("nsrl", "torch", "stable-baselines3", "gymnasium", "numpy")},
        "created": datetime.now(timezone.utc).isoformat(timespec="seconds"),
    }


def version(package: str) -> str | None:
    """Installed version of a package, None when it runs from a source tree."""
    try:
        return metadata.version(package)
    except metadata.PackageNotFoundError:
        return None


def registered_id(env: VecEnv) -> str | None:
    """Gymnasium id of the first environment, None when it was not made from the registry."""
    try:
        return env.get_attr("spec", 0)[0].id
    except AttributeError:
        return None
