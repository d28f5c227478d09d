"""Reinforcement learning inside a KL budget: agents, retention buffers, algorithms and what they train with."""

from nsrl.face import lazily

__all__, __getattr__ = lazily(
    __name__,
    {
        "nsrl.rl.algorithms.ppo": "NullSpacePPO",
        "nsrl.rl.algorithms.protect": "protect",
        "nsrl.rl.algorithms.trpo": "NullSpaceTRPO",
        "nsrl.rl.budget.config": "RetentionConfig",
        "nsrl.rl.retention.buffer": "RetentionBuffer",
    },
)
