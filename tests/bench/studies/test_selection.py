"""The study of the linearised subset: what the suite asks for, and how its runs are summed up."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from nsrl.bench.studies.selection import main, subset_rows, subset_table
from nsrl.bench.suites.pairs import read_suite
from nsrl.errors import NsrlError
from nsrl.files import write_json, write_lines

SUITE = Path(__file__).parents[3] / "configs" / "bench" / "cartpole_selection.yaml"


def write_runs(out: Path) -> None:
    """Ten updates a run; restored as often as half its states, with active selection once more, and once a seed."""
    for job in read_suite(SUITE).finetuning_jobs(out):
        states, active = job.config.retention.subset_states, job.config.retention.selection == "active"
        retention = {"updates": 10, "restored": states // 2 + active + job.config.seed, "rollbacks": 1}
        job.folder.mkdir(parents=True)
        write_json(job.run.metrics, {"retention": retention})
        returns = [{"timesteps": 10 * i, "return/new": 100.0 * i, "return/old": 500.0 - i} for i in range(3)]
        write_lines(job.run.history, returns)


def test_only_the_subset_differs_between_the_methods() -> None:
    suite = read_suite(SUITE)
    settings = {(c.retention.selection, c.retention.subset_states) for c in suite.methods.values()}
    assert settings == {(selection, size) for selection in ("random", "active") for size in (16, 32, 64, 128)}
    for name, config in suite.methods.items():
        assert name == f"{config.retention.selection} {config.retention.subset_states}" and config.retention.projects
    shared = {
        (c.total_timesteps, repr(c.ppo), c.retention.kl_budget, c.retention.gradient, c.retention.projection)
        for c in suite.methods.values()
    }
    assert len(shared) == 1


def test_the_runs_are_summed_up_and_drawn(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    write_runs(tmp_path / "runs")
    rows = subset_rows(read_suite(SUITE), tmp_path / "runs")
    assert len(rows) == 24 and all(row["new_while_learning"] == 150.0 for row in rows)
    lines = {line[0]: line[1:] for line in subset_table(rows).rows}
    assert lines["16, random"][0].split()[0] == "0.90" and lines["128, active"][0].split()[0] == "6.60"
    assert lines["16, random"][1] == "150 [150, 150]" and lines["16, random"][2:] == ("498", "3")
    write_json(tmp_path / "cartpole_selection.json", {"suite": "kept"})
    main(str(SUITE), str(tmp_path / "runs"), str(tmp_path))
    found = json.loads((tmp_path / "cartpole_selection.json").read_text())
    assert found == {"suite": "kept", "subsets": rows} and "| 16, random |" in capsys.readouterr().out
    assert (tmp_path / "cartpole_selection.png").stat().st_size > 10_000


def test_what_has_not_run_is_told_how_to(tmp_path: Path) -> None:
    with pytest.raises(NsrlError, match="run its suite first"):
        subset_rows(read_suite(SUITE), tmp_path)
    write_runs(tmp_path)
    with pytest.raises(NsrlError, match="nsrl bench cartpole_selection"):
        main(str(SUITE), str(tmp_path), str(tmp_path))
    job = read_suite(SUITE).finetuning_jobs(tmp_path)[0]
    write_json(job.run.metrics, {"retention": {"updates": 1, "rollbacks": 0}})
    with pytest.raises(NsrlError, match="does not say how often"):
        subset_rows(read_suite(SUITE), tmp_path)
