"""Pretrained Stable-Baselines3 agents: loaded safely, with their observation statistics, and saved."""

from typing import Any

from nsrl.face import lazily
from nsrl.rl.agents.agent import Agent, export, export_weights, fingerprint, load, save_agent
from nsrl.rl.agents.normalization import ObservationNormalizer, RetainingVecNormalize
from nsrl.rl.agents.spaces import check_spaces

# By name and on first use: an agent plays and learns on higher floors.
_above, _load = lazily(
    __name__,
    {"nsrl.rl.algorithms.protect": "attach_env", "nsrl.rl.playing.evaluation": "evaluate"},
)

__all__ = [
    "Agent",
    "ObservationNormalizer",
    "RetainingVecNormalize",
    "attach_env",
    "check_spaces",
    "evaluate",
    "export",
    "export_weights",
    "fingerprint",
    "load",
    "save_agent",
]


def __getattr__(name: str) -> Any:
    return _load(name)
