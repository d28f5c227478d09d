"""How the KL budget is kept around and inside a policy update."""

from nsrl.face import lazily

__all__, __getattr__ = lazily(
    __name__,
    {
        "nsrl.rl.budget.baselines": "METHODS",
        "nsrl.rl.budget.config": "RetentionConfig",
        "nsrl.rl.budget.engine": "Retention",
        "nsrl.rl.budget.trust_region": "RetentionRegion",
    },
)
