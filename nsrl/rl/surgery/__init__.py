"""Policy surgery."""

from nsrl.rl.surgery.surgery import add_actions, add_context, widen_buffer, widen_observation

__all__ = ["add_actions", "add_context", "widen_buffer", "widen_observation"]
