"""The opening: a certain policy made to try things on the new task's states, inside the retention budget."""

from nsrl.face import lazily

__all__, __getattr__ = lazily(
    __name__,
    {
        "nsrl.rl.opening.stage": "Opening OpeningRecord",
        "nsrl.rl.opening.spread": "ExplorationSpread",
    },
)
