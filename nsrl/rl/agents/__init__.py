"""Pretrained Stable-Baselines3 agents: loaded safely, with their observation statistics, and saved."""

from nsrl.rl.agents.agent import (
    Agent,
    agent_in_memory,
    attach_env,
    check_spaces,
    export,
    export_weights,
    fingerprint,
    load,
    save_agent,
    training_env,
)

__all__ = [
    "Agent",
    "agent_in_memory",
    "attach_env",
    "check_spaces",
    "export",
    "export_weights",
    "fingerprint",
    "load",
    "save_agent",
    "training_env",
]
