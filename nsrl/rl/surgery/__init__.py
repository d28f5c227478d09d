"""Policy surgery: an agent with more inputs or more actions that is still the old one on what the old one knew."""

from nsrl.rl.surgery.surgery import (
    ActionReport,
    add_actions,
    add_context,
    add_units,
    widen_buffer,
    widen_observation,
)

__all__ = [
    "ActionReport",
    "add_actions",
    "add_context",
    "add_units",
    "widen_buffer",
    "widen_observation",
]
