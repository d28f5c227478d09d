"""The worst of learnt tasks while others are learnt, and that looking at it moves nothing."""

from dataclasses import replace

import numpy as np
import pytest

from nsrl.continual import watching
from nsrl.continual.config import StrategySettings
from nsrl.continual.runner import run_continual
from tests.continual.test_runner import small

# imported here: it sets environment variables, which no test may do
pytest.importorskip("sklearn")


@pytest.mark.parametrize("scenario", ["task", "class"])
def test_the_worst_is_no_better_than_any_tasks_end(scenario):
    metrics = run_continual(small(scenario=scenario, tasks=5, epochs=1))
    matrix = np.array(metrics["matrix"])
    later = np.tril_indices(5, -1)
    # nothing is restored by plain fine-tuning, and all test digits are looked at: the last look is a task's end
    assert metrics["worst_accuracy"] <= matrix[later].min()
    drops = np.diagonal(matrix) - matrix
    assert metrics["worst_drop"] >= drops[later].max()
    assert metrics["worst_kl"] >= max(entry["diagnostics"].get("preserved_kl", 0.0) for entry in metrics["history"])
    assert metrics["worst_retained_kl"] is None
    assert metrics["history"][0]["worst"] == {}


@pytest.mark.parametrize("strategy", ["kl_budget", "er", "trgp"])
def test_looking_moves_nothing(strategy, monkeypatch):
    config = small(strategy=strategy, tasks=5, epochs=1)
    often = run_continual(config)
    monkeypatch.setattr(watching.Watch, "look", lambda self: None)
    never = run_continual(config)
    assert often["matrix"] == never["matrix"]
    assert never["worst_kl"] is None


def test_a_budget_that_is_enforced_at_every_step_is_kept_at_every_look():
    config = small(strategy="kl_budget", tasks=5, epochs=1)
    options = {"kl_budget": 0.01, "enforce_every": 1, "states_per_task": 20}
    metrics = run_continual(replace(config, strategy=StrategySettings("kl_budget", options)))
    assert 0.0 < metrics["worst_retained_kl"] <= 0.01
