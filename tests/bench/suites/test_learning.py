"""How fast the methods of a suite learn, on the suite that keeps, resets or warms up the critic."""

from __future__ import annotations

from pathlib import Path

import pytest

from nsrl.bench.suites.pairs import read_suite
from nsrl.bench.suites.report import learning_curves, learning_table
from nsrl.errors import NsrlError
from nsrl.files import write_lines

SUITE = Path(__file__).parents[3] / "configs" / "bench" / "cartpole_critics.yaml"


def write_runs(out: Path) -> None:
    """Seed s of method m returns 100 m + 10 s + (evaluation) on the new task."""
    for number, job in enumerate(read_suite(SUITE).finetuning_jobs(out)):
        rows = []
        for evaluation in range(4):
            rows.append({"timesteps": 10_000 * evaluation, "kl_mean": 0.0})
            new = 100.0 * (number % 3) + 10.0 * job.config.seed + evaluation
            rows[-1] |= {"return/new": new, "return/old": 500.0 - evaluation - job.config.seed}
            rows.append({"timesteps": 10_000 * evaluation + 5, "kl_mean": 0.0})
        job.folder.mkdir(parents=True)
        write_lines(job.run.history, rows)


def test_the_suite_has_the_three_settings_and_nothing_else_differs() -> None:
    suite = read_suite(SUITE)
    settings = {name: (c.retention.critic, c.retention.critic_warmup) for name, c in suite.methods.items()}
    assert settings == {"keep": ("keep", 0), "reset": ("reset", 0), "warm up": ("reset", 4)}
    assert suite.seeds == (0, 1, 2)
    shared = {(c.total_timesteps, repr(c.ppo), repr(c.evaluation), repr(c.states)) for c in suite.methods.values()}
    assert len(shared) == 1


def test_the_runs_are_summed_up(tmp_path: Path) -> None:
    write_runs(tmp_path)
    rows = learning_curves(read_suite(SUITE).finetuning_jobs(tmp_path))
    assert len(rows) == 9 and rows[0]["timesteps"] == [0, 10_000, 20_000, 30_000]
    table = learning_table(rows)
    assert table.head == ("method", "10k", "20k", "30k", "whole run", "old, lowest")
    assert [line[0] for line in table.rows] == ["keep", "reset", "warm up"]
    # mean over seeds 0, 1, 2 of 100 m + 10 s + e at e = 1, 2, 3, and the mean of these
    assert [cell.split()[0] for cell in table.rows[1][1:-1]] == ["111", "112", "113", "112"]
    assert table.rows[1][-1] == "495"


def test_runs_of_other_rollout_lengths_are_read_at_their_nearest_evaluations() -> None:
    grids = {
        "long": ([0, 11_000, 22_000, 33_000], [0.0, 1.0, 2.0, 3.0]),
        "short": ([0, 10_000, 24_000], [5.0, 6.0, 7.0]),
    }
    rows = [
        {"method": name, "seed": seed, "timesteps": steps, "new": new, "old": new}
        for name, (steps, new) in grids.items()
        for seed in (0, 1)
    ]
    table = learning_table(rows)
    assert table.head[1:4] == ("11k", "22k", "33k")
    assert [line[1:4] for line in table.rows] == [("1", "2", "3"), ("6", "7", "7")]


def test_a_suite_that_has_not_run_is_told_how_to(tmp_path: Path) -> None:
    with pytest.raises(NsrlError, match="run its suite first"):
        learning_curves(read_suite(SUITE).finetuning_jobs(tmp_path))
