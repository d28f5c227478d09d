"""The worst of learnt tasks while others are learnt, and that looking at it moves nothing."""

from dataclasses import replace

import numpy as np
import pytest

from nsrl.continual import watching
from nsrl.continual.config import BenchmarkSettings, ContinualConfig, ModelSettings, StrategySettings, TrainingSettings
from nsrl.continual.runner import run_continual

# imported here: it sets environment variables, which no test may do
pytest.importorskip("sklearn")


def small(scenario=None, strategy="naive"):
    return ContinualConfig(
        BenchmarkSettings("split_digits", scenario=scenario, tasks=5),
        ModelSettings(hidden=[16]),
        TrainingSettings(epochs=1, learning_rate=1e-2),
        StrategySettings(strategy),
        seed=1,
    )


@pytest.mark.parametrize("scenario", ["task", "class"])
def test_the_worst_is_no_better_than_any_tasks_end(scenario):
    metrics = run_continual(small(scenario))
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
    config = small(strategy=strategy)
    often = run_continual(config)
    monkeypatch.setattr(watching.Watch, "look", lambda self: None)
    never = run_continual(config)
    assert often["matrix"] == never["matrix"]
    assert never["worst_kl"] is None


def test_a_budget_that_is_enforced_at_every_step_is_kept_at_every_look():
    config = small(strategy="kl_budget")
    options = {"kl_budget": 0.01, "enforce_every": 1, "states_per_task": 20}
    metrics = run_continual(replace(config, strategy=StrategySettings("kl_budget", options)))
    assert 0.0 < metrics["worst_retained_kl"] <= 0.01
