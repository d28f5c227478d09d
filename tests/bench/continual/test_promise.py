"""The study of the promise: the default against the same without an alarm, looked at behind every step."""

from pathlib import Path

import pytest

from nsrl.bench.continual.promise import SEEDS, VARIANTS, draw_promise, kept_lines, plan_promise
from nsrl.bench.studies.continual import BENCHMARKS, run_cell
from nsrl.errors import NsrlError

# imported here: it sets environment variables, which no test may do
pytest.importorskip("sklearn")

CONFIGS = Path(__file__).parents[3] / "configs"


def test_the_default_runs_everywhere_and_is_looked_at_behind_every_step():
    cells = plan_promise(CONFIGS)
    assert len({cell.name for cell in cells}) == len(cells) == len(BENCHMARKS) * len(SEEDS) * len(VARIANTS)
    for cell in cells:
        assert cell.watched == (cell.variant != "naive")
        if cell.variant == "kl_budget":
            assert set(cell.config.strategy.options) == {"states_per_task"}
    with pytest.raises(NsrlError, match="'ewc'"):
        plan_promise(CONFIGS, only=("ewc",))


def test_the_worst_of_all_steps_is_no_less_than_that_of_ten_looks(tmp_path):
    (cell,) = plan_promise(CONFIGS, only=("split_digits_class", "kl_budget_enforced_at_ends", "seed0"), quick=True)
    often = run_cell(cell, tmp_path)
    rarely = run_cell(type(cell)(cell.benchmark, cell.config, "rarely"), tmp_path)
    assert often["matrix"] == rarely["matrix"]
    assert often["worst_retained_kl"] >= rarely["worst_retained_kl"] > 0.0
    assert often["worst_drop"] >= rarely["worst_drop"]
    rows = [{"benchmark": "b", "strategy": "kl_budget", "worst_retained_kl": kl} for kl in (0.05, 0.11)]
    assert kept_lines({"rows": rows}) == ["kl_budget: at most 1.10 times the budget behind any step of 2 runs"]
    assert draw_promise({"rows": rows}, tmp_path / "promise.png").stat().st_size > 5000
