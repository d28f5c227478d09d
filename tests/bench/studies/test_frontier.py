"""The frontier's plan, its lines, and what its report makes of them."""

from __future__ import annotations

import errno
import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from nsrl.bench.studies import frontier, frontier_plan, frontier_report, lines
from nsrl.cli.main import main
from nsrl.errors import NsrlError
from nsrl.files import NoRoom
from nsrl.runs.lock import locked

AGENTS = Path(__file__).parents[3] / "runs" / "reference" / "agents"


def line(method: str = "NullSpacePPO", **entries: Any) -> dict[str, Any]:
    curve = [[0, 500.0, 10.0, 0.0], [100, 500.0, 250.0, 0.001], [200, 495.0, 490.0, 0.002]]
    row = {
        "cell": f"cartpole_swapped/{method}/{len(entries)}",
        "method": method,
        "penalty": frontier_plan.METHODS[method].options.get("penalty"),
        "kind": "zoo",
        "seed": 0,
        "multiple": 3,
        "states": frontier_plan.STATES,
        "scale": 1.0,
        "curve": curve,
        "kl_most": 0.002,
        "updates": 10,
        "held": 10,
        "seconds": 3.0,
    }
    return {**row, **entries}


def test_every_cell_has_a_name_of_its_own_and_the_main_methods_come_first() -> None:
    cells = frontier_plan.plan_cells()
    assert len({cell.name for cell in cells}) == len(cells)
    for pair, task in frontier_plan.PAIRS.items():
        kinds = len(task.published) or len(frontier_plan.KINDS) * len(frontier_plan.MULTIPLES)
        agents = kinds * len(frontier_plan.SEEDS)
        for method in frontier_plan.METHODS:
            own = [
                c for c in cells if (c.pair, c.method, c.penalty, c.states, c.scale) == (pair, method, None, 2048, 1)
            ]
            assert len(own) == agents
    later = [frontier_plan.METHODS[cell.method].later for cell in cells if cell.penalty is None and cell.states == 2048]
    assert later == sorted(later)


@pytest.mark.parametrize(
    "method",
    ["joint training", "hard null space", "A-GEM", "L2", "frozen trunk", "gradients projected", "scratch PPO"],
)
def test_what_is_seldom_run_makes_a_line_too(method: str) -> None:
    cell = frontier_plan.Cell("cartpole_swapped", method, "default", 0, 3)
    row = frontier.run_cell(cell, AGENTS, quick=True)
    assert row["cell"] == cell.name and len(row["curve"]) >= 2 and np.isfinite(row["curve"][-1][:3]).all()
    held = frontier_plan.METHODS[method].method == "null_space"
    assert not held or row["kl_most"] <= 1e-6 * (1.0 + 1e-4)


def test_names_choose_and_unknown_ones_are_refused() -> None:
    cells = frontier_plan.plan_cells(["pendulum_reversed", "NullSpaceTRPO"], quick=True)
    assert [cell.name for cell in cells] == ["pendulum_reversed/NullSpaceTRPO/default_0_x3"]
    with pytest.raises(NsrlError, match="no pair or method 'nosuch'"):
        frontier_plan.plan_cells(["nosuch"])


def test_scores_are_shares_of_the_way_to_a_fresh_policy() -> None:
    fresh = line("scratch PPO", curve=[[0, 20.0, 20.0, None], [200, 20.0, 410.0, None]])
    found = {row["method"]: row for row in frontier_report.scores([line(), fresh])}
    ours = found["NullSpacePPO"]
    assert ours["end"] == pytest.approx((490 - 10) / (410 - 10))
    way = (np.array([10.0, 250.0, 490.0]) - 10.0) / 400.0
    assert ours["area"] == pytest.approx(0.25 * way[0] + 0.5 * way[1] + 0.25 * way[2])
    assert ours["old"] == pytest.approx(495 / 500)  # no worse return than 0 was seen


def test_a_pair_of_fresh_policies_alone_is_left_out(tmp_path: Path) -> None:
    for pair, rows in (("acrobot_swapped", [line("scratch PPO")]), ("cartpole_swapped", [line("scratch PPO"), line()])):
        (tmp_path / f"{pair}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    tables, _ = frontier_report.write_frontier(tmp_path)
    assert len(tables) == 1 and tables[0].title.startswith("cartpole_swapped")


def test_a_report_keeps_what_was_varied_apart(tmp_path: Path) -> None:
    path = tmp_path / "acrobot_swapped.jsonl"
    for row in (
        line("scratch PPO"),
        line(),
        line(states=64, curve=[[0, 500.0, 10.0, 0.0], [200, 400.0, 490.0, 0.002]]),
        line("KL penalty", penalty=10.0),
    ):
        lines.append_run(path, row)
    rows = frontier_report.read_rows(tmp_path, "acrobot_swapped")
    assert [row["method"] for row in rows] == ["scratch PPO", "NullSpacePPO"]
    table = frontier_report.varied_table(tmp_path, "states")
    assert table is not None
    assert [tuple(entry[:5]) for entry in table.rows] == [
        ("NullSpacePPO", "64", "1", "400", "100"),
        ("NullSpacePPO", "2048", "1", "495", "5"),
    ]
    assert frontier_report.varied_table(tmp_path, "scale") is None
    frontier_report.write_frontier(tmp_path)
    assert "NullSpacePPO" in (tmp_path / "report.md").read_text(encoding="utf-8")


def test_a_line_that_a_crash_cut_short_is_made_again(tmp_path: Path) -> None:
    path = tmp_path / "runs.jsonl"
    lines.append_run(path, line())
    with path.open("a", encoding="utf-8") as file:
        file.write('{"cell": "half')
    assert len(lines.read_runs(path)) == 1
    lines.append_run(path, line("KL penalty"))
    assert [row["method"] for row in lines.read_runs(path)] == ["NullSpacePPO", "KL penalty"]


def test_published_agents_are_played_by_several_runs_and_are_there() -> None:
    cells = frontier_plan.plan_cells(["mountaincar_swapped", "NullSpacePPO"])
    assert [cell.name for cell in cells] == [
        f"mountaincar_swapped/NullSpacePPO/{kind}_{seed}" for seed in frontier_plan.SEEDS for kind in ("ppo", "a2c")
    ]
    folder = Path(__file__).parents[3] / "runs" / "reference" / "agents"
    for pair, task in frontier_plan.PAIRS.items():
        assert all(list((folder / (task.agents or pair) / name).glob("*.zip")) for name in task.published)
        assert task.published or not task.test  # nothing was chosen on agents that others have published, but for one


def test_what_counts_as_solved_is_the_least_that_is_asked_for() -> None:
    fresh = line("scratch PPO", curve=[[0, 20.0, 20.0, None], [200, 20.0, 30.0, None]])
    for solved, end in ((None, 480 / 20), (410.0, 480 / 400)):
        found = {row["method"]: row for row in frontier_report.scores([line(), fresh], solved)}
        assert found["NullSpacePPO"]["end"] == pytest.approx(end)


def test_a_folder_that_another_benchmark_writes_to_is_left_alone(tmp_path: Path, capsys: Any) -> None:
    (tmp_path / "out").mkdir()
    with locked(tmp_path / "out"):
        assert main(["bench", "frontier", "--quick", "--out", str(tmp_path / "out")]) == 2
    assert "is in use by process" in capsys.readouterr().err
    assert list((tmp_path / "out").iterdir()) == []


def test_wrong_folders_and_too_many_processes_are_one_sentence(tmp_path: Path, capsys: Any) -> None:
    (tmp_path / "file").touch()
    for words, said in (
        (["--out", str(tmp_path / "file")], "cannot make the output folder"),
        (["--out", str(tmp_path / "out"), "--workers", "9" * 11], "--workers 99999999999 would take"),
    ):
        assert main(["bench", "frontier", "--quick", *words]) == 2
        told = capsys.readouterr().err
        assert said in told and told.count("\n") == 1
    assert [path.name for path in tmp_path.iterdir()] == ["file"]


@pytest.mark.parametrize(
    "error", [NoRoom("cannot write x: No space left on device"), OSError(errno.ENOSPC, "No space left on device", "x")]
)
def test_a_full_disk_ends_a_study_at_once_and_keeps_its_lines(tmp_path: Path, error: Exception) -> None:
    cells = [Planned(name) for name in ("a", "b", "c")]
    asked = []

    def run(waiting: Any) -> Any:
        for cell, result in zip(waiting, ({"cell": "a"}, error, {"cell": "c"}), strict=True):
            asked.append(cell.name)
            yield cell, result

    with pytest.raises(NoRoom, match="cannot write x: No space left"):
        lines.run_missing(cells, [], lambda _: tmp_path / "runs.jsonl", run)
    assert asked == ["a", "b"]
    assert [row["cell"] for row in lines.read_runs(tmp_path / "runs.jsonl")] == ["a"]


def test_what_keeps_one_run_from_a_result_does_not_stop_the_others(tmp_path: Path) -> None:
    cells = [Planned(name) for name in ("a", "b")]
    results = [ValueError("its environment"), {"cell": "b"}]
    failures = lines.run_missing(cells, [], lambda _: tmp_path / "runs.jsonl", lambda w: zip(w, results, strict=True))
    assert failures == {"a": "ValueError('its environment')"}
    assert [row["cell"] for row in lines.read_runs(tmp_path / "runs.jsonl")] == ["b"]


@dataclass(frozen=True)
class Planned:
    name: str
