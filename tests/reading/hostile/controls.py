"""The valid files from which the hostile ones are made: were they refused too, nothing would be proved."""

from __future__ import annotations

import json

from tests.reading.hostile.arrays import statistics
from tests.reading.hostile.documents import digits, idx
from tests.reading.hostile.pickled import array, whole
from tests.reading.hostile.workbench import Case, blank_idx, content, moments, saved

CONFIGURATION = b"""\
new_env: nsrl/CartPole-v0
seed: 3
ppo: &p {n_steps: 64, gamma: 0.9}
retention:
  kl_budget: 1.0e-2
  task_budgets: {a: 0.1}
states: {n_states: 10, select: expert}
"""
RESULTS = {"a": [1, 2.5, None], "b": {"c": "text", "d": True}}
HISTORY = b'{"timesteps": 1, "kl_mean": 0.5}\n{"timesteps": 2, "kl_mean": null}\n'

CASES: dict[str, Case] = {
    "statistics": content("statistics", lambda bench: bench.statistics, True),
    "statistics opcode by opcode": content("statistics", lambda bench: whole(mean=array()), True),
    "statistics as npz": Case("statistics", statistics().make, True),
    "agent": content("agent", lambda bench: bench.agent, True),
    "agent put together anew": content("agent", lambda bench: bench.agent_with(), True),
    "agent in the old form of torch": content(
        "agent",
        lambda bench: bench.agent_with(weights=saved(bench.weights(), _use_new_zipfile_serialization=False)),
        True,
    ),
    "buffer": content("buffer", lambda bench: bench.buffer, True),
    "buffer put together anew": content("buffer", lambda bench: bench.buffer_with(), True),
    "checkpoint": content("checkpoint", lambda bench: bench.checkpoint, True),
    "checkpoint put together anew": content("checkpoint", lambda bench: bench.checkpoint_with(lambda s, t: None), True),
    "task": content("task", lambda bench: saved(bench.task), True),
    "configuration": content("configuration", lambda bench: CONFIGURATION, True),
    "results": content("results", lambda bench: json.dumps(RESULTS), True),
    "history": content("history", lambda bench: HISTORY, True),
    "saved": content("saved", lambda bench: bench.saved_model, True),
    "terms": content("terms", lambda bench: bench.terms, True),
    "runs": content("runs", lambda bench: json.dumps({**RESULTS, "seed": 1}) + "\n" + json.dumps(RESULTS) + "\n", True),
    "labels": content("labels", lambda bench: blank_idx(40), True),
    "retention_file": content("retention_file", lambda bench: bench.retention_file, True),
    "moments": content("moments", lambda bench: moments(), True),
    "archive": content("archive", lambda bench: bench.archive, True),
    "digits": Case("digits", digits(lambda: idx(2, 28, 28, data=bytes(1568))).make, True),
}
