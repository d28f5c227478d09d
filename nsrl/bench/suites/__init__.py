"""Suites: methods times seeds, each a run in a process of its own, gathered into a table and a figure."""

from nsrl.face import lazily

__all__, __getattr__ = lazily(
    __name__,
    {
        "nsrl.bench.suites.jobs": "Job Status run_jobs",
        "nsrl.bench.suites.pairs": "Suite read_suite run_suite write_suite",
        "nsrl.bench.suites.sequences": "run_sequence_suite",
    },
)
