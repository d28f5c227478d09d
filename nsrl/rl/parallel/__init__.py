"""One run in several processes: each steps environments of its own, and all make the same update on all of them."""

from nsrl.rl.parallel.ranks import ProcessLost, Ranks, started_together, together
from nsrl.rl.parallel.shared_envs import SharedEnvs

__all__ = [
    "ProcessLost",
    "Ranks",
    "SharedEnvs",
    "started_together",
    "together",
]
