"""Runs of several tasks, one after the other, with a budget for each."""

from nsrl.face import lazily

__all__, __getattr__ = lazily(
    __name__,
    {
        "nsrl.runs.sequences.config": "SequenceConfig SequenceTask",
        "nsrl.runs.sequences.learning": "learn_sequence resume_sequence",
    },
)
