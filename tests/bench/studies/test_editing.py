"""The editing study: its plan, its batches, what is made of its lines, and a run of it, small."""

from __future__ import annotations

import json
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest

from nsrl.bench.registry import Options, run_benchmark
from nsrl.bench.studies import editing
from nsrl.bench.studies.editing_report import best_strengths, mode_table, summarise
from nsrl.bench.studies.lines import read_runs
from nsrl.editing.methods import METHODS
from nsrl.errors import NsrlError
from tests.editing.builders import needs_transformers


class Quiet:
    @contextmanager
    def status(self, name: str):
        yield lambda status: None

    def say(self, text: str) -> None: ...

    def note(self, text: str) -> None: ...


def test_every_editor_is_in_the_study_and_every_cell_has_a_name_of_its_own() -> None:
    cells = editing.plan_cells()
    assert len({cell.name for cell in cells}) == len(cells)
    assert {editing.EDITORS[cell.editor].method for cell in cells} == set(METHODS)
    tiny = [cell for cell in cells if cell.model == "tiny" and cell.editor == "ours" and cell.mode == "sequential"]
    assert {(cell.seed, cell.order) for cell in tiny} == {(seed, order) for seed in range(5) for order in (0, 1)}
    with pytest.raises(NsrlError, match="no model, mode or editor 'nosuch'"):
        editing.plan_cells(["nosuch"])


def test_all_rivals_are_tried_at_all_strengths_on_development_seeds_alone() -> None:
    cells = editing.plan_cells(["tiny", "development"])
    assert {(cell.mode, cell.order) for cell in cells} == {("sequential", 0)}
    assert {cell.seed for cell in cells} == set(editing.DEVELOPED) and min(editing.DEVELOPED) >= editing.DEVELOPMENT
    tried: dict[str, int] = {}
    for cell in cells:
        method = editing.EDITORS[cell.editor].method
        tried[method] = tried.get(method, 0) + 1
    assert set(tried) == set(METHODS) - {"nsrl"}
    # its own, and a tenth to a ten-thousandth of it
    assert set(tried.values()) == {1 + len(editing.SHARES)}
    assert not any(cell.seed >= editing.DEVELOPMENT for cell in editing.plan_cells())


def test_the_strength_of_a_rival_is_that_of_its_largest_product() -> None:
    rows = [
        line("memit", 100, 0.5, 0.5),
        line("memit, penalty 1500", 100, 0.9, 0.5),
        line("memit, penalty 150", 100, 1.0, 0.4),
        line("memit, penalty 15", 0, 1.0, 1.0),  # no development seed
        line("alphaedit", 100, 0.1, 1.0),
        line("ours", 100, 1.0, 1.0),
    ]
    assert best_strengths(rows) == {"memit": "memit, penalty 1500", "alphaedit": "alphaedit"}


def test_the_strengths_of_the_study_are_those_that_the_committed_runs_choose() -> None:
    rows = read_runs(Path(__file__).parents[3] / "runs/reference/editing/tiny_100.jsonl")
    assert set(editing.TUNED) == set(best_strengths(rows).values())


@pytest.mark.parametrize("count", [1, 9, 10, 11, 1000])
def test_a_sequence_makes_every_edit_once_and_a_batch_begins_anew(count: int) -> None:
    parts = list(editing.batches_of("sequential", count))
    assert [index for start, stop in parts for index in range(start, stop)] == list(range(count))
    batched = list(editing.batches_of("batched", count))
    assert {start for start, _ in batched} == {0} and batched[-1][1] == count


def line(editor: str, seed: int, efficacy: float, specificity: float, **entries: Any) -> dict[str, Any]:
    point = {name: 0.5 for name in ("efficacy_exact", "generalisation", "locality", "kl")}
    point |= {"edits": 1000, "efficacy": efficacy, "specificity": specificity, "perplexity": 1.5, "knowledge": None}
    return {
        "cell": f"tiny/{editor}/sequential/{seed}/0",
        "model": "tiny",
        "editor": editor,
        "mode": "sequential",
        "seed": seed,
        "points": [point],
        "stopped": None,
        "batches": 101,
        "budget": None,
        "kl_most": None,
        "held": None,
        "undone": True,
        "processor_seconds": 1.0,
        **entries,
    }


def test_a_product_is_a_mean_of_products_and_held_batches_are_counted() -> None:
    rows = [
        line("ours", 0, 1.0, 0.5, kl_most=0.009, held=101),
        line("ours", 1, 0.0, 1.0, kl_most=0.010, held=100),
        line("memit", 0, 0.25, 1.0),
    ]
    summary = summarise(rows)
    assert [(entry["editor"], entry["product"]) for entry in summary] == [("ours", 0.25), ("memit", 0.25)]
    table = mode_table(summary, "tiny", "sequential")
    assert table is not None and table.rows[0][-1] == "201/202" and table.rows[1][-1] == "-"
    assert mode_table(summary, "tiny", "batched") is None


def test_a_small_study_runs_and_what_is_there_is_not_run_again(tmp_path: Path) -> None:
    needs_transformers()
    options = Options(out=tmp_path, quick=True, workers=1, only=("tiny", "sequential", "ours", "alphaedit_energy"))
    results = run_benchmark("edit", options, Quiet())
    assert len(results.tables) == 1
    rows = read_runs(tmp_path / "results" / "tiny_0.jsonl")
    assert [row["cell"] for row in rows] == ["tiny/ours/sequential/0/0", "tiny/alphaedit_energy/sequential/0/0"]
    assert all(row["undone"] and row["stopped"] is None for row in rows)
    assert [row["held"] for row in rows] == [rows[0]["batches"], None]
    assert all([point["edits"] for point in row["points"]] == [1, 10, 20] for row in rows)
    run_benchmark("edit", options, Quiet())
    assert read_runs(tmp_path / "results" / "tiny_0.jsonl") == rows
    assert json.loads((tmp_path / "results" / "editing.json").read_text())["summary"]
    assert (tmp_path / "results" / "editing.png").is_file()
