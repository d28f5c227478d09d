"""The plans of the studies of cost, and what becomes of their rows."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from nsrl.bench.cost.constraints import BLOCK, cost_table, outside, read_rates
from nsrl.bench.cost.runs import ENVS, STEPS, plan_runs, run_cost_table
from nsrl.rl import agents
from nsrl.runs.cost import forecast_run
from nsrl.runs.folder import RUNS

REFERENCE = Path(__file__).parents[3] / "runs" / "reference"


def content(name: str) -> dict:
    return json.loads((REFERENCE / f"{name}.json").read_text(encoding="utf-8"))


def test_a_forecast_outside_of_the_factor_is_told_of():
    found = content("cost")
    assert outside(found) == []
    found["rows"][0]["ratio"]["gathering_seconds"] = 1.51
    [told] = outside(found)
    assert "gathering_seconds forecast at 1.51 times" in told
    found["rows"][0]["ratio"]["gathering_seconds"] = 0.66
    assert len(outside(found)) == 1


def test_the_committed_study_has_a_hundred_million_parameters():
    rows = content("cost")["rows"]
    block = sum(a * g for a, g in BLOCK)
    assert {row["parameters"] for row in rows if row["kind"] == "features"} == {block, 30 * block}
    assert 30 * block >= 1e8
    assert len(cost_table(content("cost")).rows) == len(rows)
    assert read_rates(content("cost")).decomposed(576) > 0.0


def test_the_committed_runs_are_within_the_factor():
    found = content("run_cost")
    assert all(1.0 / found["within"] <= row["ratio"] <= found["within"] for row in found["rows"])
    assert len(run_cost_table(found).rows) == len(found["rows"]) == 4


def test_a_trial_counts_what_the_run_will_have(tmp_path, monkeypatch):
    [config, _] = plan_runs(REFERENCE / "agents", quick=True)
    monkeypatch.chdir(tmp_path)
    now = iter(range(10**9))
    cost = forecast_run(config, clock=lambda: float(next(now)))
    policy = agents.load(config.agent).model.policy
    assert cost.parameters == sum(p.numel() for p in policy.parameters())
    assert cost.updates == 20 and cost.policy_bytes == 16 * cost.parameters
    assert cost.rollout_bytes == ENVS * STEPS * (20 + 24) and cost.retained_bytes == 512 * 20
    # a clock that ticks at every look: one second for a roll-out, one for an update
    assert (cost.rollout_seconds, cost.update_seconds, cost.seconds) == (1.0, 1.0, 40.0)
    assert "20 updates of 2 s (1 s of it playing" in str(cost)
    assert not (tmp_path / RUNS).exists()


def test_a_run_without_an_agent_is_refused():
    from nsrl.errors import NsrlError
    from nsrl.runs.config import FinetuneConfig

    with pytest.raises(NsrlError, match="no agent"):
        forecast_run(FinetuneConfig(pair="cartpole_swapped"))
