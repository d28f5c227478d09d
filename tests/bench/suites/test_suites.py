"""Suites: read from YAML, run as jobs, gathered into one table and one figure."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from nsrl.bench.suites.pairs import Suite, read_suite, run_suite, write_suite
from nsrl.bench.suites.report import draw_tradeoff, suite_table
from nsrl.errors import NsrlError

REPOSITORY = Path(__file__).parents[3]
SMALL = "{every: 100000, episodes: 1, final_episodes: 2}"


def write_small_suite(folder: Path, methods: str) -> Path:
    (folder / "agent.yaml").write_text(
        "env: nsrl/CartPole-v0\ntotal_timesteps: 256\n"
        f"ppo: {{n_envs: 2, n_steps: 64, batch_size: 64, n_epochs: 2}}\nevaluation: {SMALL}\n"
    )
    (folder / "tune.yaml").write_text(
        f"pair: cartpole_swapped\ntotal_timesteps: 256\nppo: {{n_envs: 2}}\n"
        f"evaluation: {SMALL}\nstates: {{n_states: 100}}\n"
    )
    path = folder / "small.yaml"
    path.write_text(f"pretraining: agent.yaml\nfinetuning: tune.yaml\nseeds: [0, 1]\nmethods:\n{methods}")
    return path


@pytest.mark.parametrize("path", sorted((REPOSITORY / "configs" / "bench").glob("*.yaml")), ids=lambda path: path.stem)
def test_the_committed_suites_are_readable_and_fair(path: Path) -> None:
    suite = read_suite(path)
    assert len(suite.seeds) >= 3
    # a method may differ from the others in how it protects, never in how PPO learns or is evaluated
    shared = {
        (config.total_timesteps, config.ppo, config.evaluation, config.states)
        for config in (hashable(config) for config in suite.methods.values())
    }
    assert len(shared) == 1
    # but for the suite that compares just that
    assert path.stem == "cartpole_critics" or len({config.retention.critic for config in suite.methods.values()}) == 1


class hashable:
    def __init__(self, config: object):
        self.total_timesteps = config.total_timesteps
        self.ppo, self.evaluation, self.states = repr(config.ppo), repr(config.evaluation), repr(config.states)


@pytest.mark.slow
def test_a_suite_runs_is_gathered_and_is_not_run_twice(tmp_path: Path) -> None:
    path = write_small_suite(tmp_path, "  plain PPO: {method: finetune}\n  budget: {retention: {kl_budget: 0.001}}\n")
    suite = read_suite(path)
    assert isinstance(suite, Suite) and suite.methods["budget"].retention.kl_budget == 0.001
    content = run_suite(suite, tmp_path / "out")
    assert [(row["method"], row["seed"]) for row in content["rows"]] == [
        ("plain PPO", 0),
        ("budget", 0),
        ("plain PPO", 1),
        ("budget", 1),
    ]
    assert all(row["largest_kl_mean"] <= 0.001 for row in content["rows"] if row["method"] == "budget")
    stamps = {file: file.stat().st_mtime_ns for file in (tmp_path / "out").rglob("metrics.json")}
    again = run_suite(suite, tmp_path / "out")
    assert {file: file.stat().st_mtime_ns for file in (tmp_path / "out").rglob("metrics.json")} == stamps
    assert again["rows"] == content["rows"]
    write_suite(content, tmp_path / "small.json")
    assert str(tmp_path) not in (tmp_path / "small.json").read_text()
    assert json.loads((tmp_path / "small.json").read_text())["suite"] == "small"
    assert len(suite_table(content).rows) == 3
    assert draw_tradeoff(content, tmp_path / "small.png").stat().st_size > 10_000


def test_mistakes_in_a_suite_are_named(tmp_path: Path) -> None:
    with pytest.raises(NsrlError, match=r"retention\.kl_budge\b.*did you mean retention\.kl_budget"):
        read_suite(write_small_suite(tmp_path, "  budget: {retention: {kl_budge: 0.001}}\n"))
    path = write_small_suite(tmp_path, "  budget: {}\n")
    path.write_text(path.read_text() + "repeats: 3\n")
    with pytest.raises(NsrlError, match="repeats is unknown"):
        read_suite(path)
