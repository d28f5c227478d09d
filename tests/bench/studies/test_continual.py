"""The benchmark of continual learning: its plan, its summary, its report."""

from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
import pytest
import torch

from nsrl.bench import engine
from nsrl.bench.studies.continual import BENCHMARKS, Cell, gather, plan_cells, run_cell, run_cells, summarise
from nsrl.bench.studies.continual_report import benchmark_table, draw_benchmarks, size
from nsrl.continual.benchmarks import build_benchmark
from nsrl.continual.config import ContinualConfig
from nsrl.continual.strategies import STRATEGIES, build_strategy
from nsrl.errors import NsrlError
from nsrl.runs.settings import load

# imported here: it sets environment variables, which no test may do
pytest.importorskip("sklearn")

CONFIGS = Path(__file__).parents[3] / "configs"


def row(strategy, seed, acc, seconds, order=0):
    return {
        "benchmark": "split_digits",
        "strategy": strategy,
        "seed": seed,
        "order": order,
        "acc": acc,
        "bwt": -0.1,
        "fwt": 0.0,
        "forgetting": 0.1,
        "learning": acc,
        "preserved_kl": None,
        "kept_share": None,
        "leakage": None,
        "train_seconds": 9.0,
        "train_cpu_seconds": seconds,
        "memory_bytes": 2048,
    }


def test_the_plan_is_the_whole_product_and_fair():
    cells = plan_cells(CONFIGS)
    assert len(cells) == len({cell.name for cell in cells}) == len(STRATEGIES) * len(BENCHMARKS) * 5 * 2
    for name in BENCHMARKS:
        mine = [cell.config for cell in cells if cell.benchmark == name]
        # a strategy may differ from the others in its own options, never in network, training or data
        assert len({str((config.model, config.training, config.benchmark.name)) for config in mine}) == 1
        assert all(config.benchmark.data is None for config in mine)
    assert len(plan_cells(CONFIGS, only=("regression", "gpm"))) == 10
    # what replays labels or outputs keeps as many samples
    for name in BENCHMARKS:
        kept = {
            (options := cell.config.strategy.options).get("samples_per_task", options.get("states_per_task", 200))
            for cell in plan_cells(CONFIGS, only=(name, "er", "agem", "kl_budget", "combined"))
        }
        assert len(kept) == 1
    assert len(plan_cells(CONFIGS, only=("gpm",), quick=True)) == len(BENCHMARKS)


@pytest.mark.parametrize("path", sorted((CONFIGS / "continual").glob("*.yaml")), ids=lambda path: path.stem)
def test_the_committed_configurations_are_readable_and_their_strategies_known(path):
    config = load(ContinualConfig, path)
    build_strategy(config.strategy.name, torch.nn.Linear(2, 2), None, **config.options)
    for name, options in config.presets.items():
        build_strategy(name, torch.nn.Linear(2, 2), None, **options)
    if path.stem in BENCHMARKS:
        assert len(build_benchmark(config.benchmark).tasks) >= 5
    assert f"--config configs/continual/{path.name}" in path.read_text()


def test_ratios_and_differences_are_paired():
    rows = [row("naive", seed, 0.5, 1.0 + seed) for seed in range(3)]
    rows += [row("joint", seed, 0.9 + 0.01 * seed, 5.0) for seed in range(3)]
    rows += [row("kl_budget", seed, 0.88 + 0.01 * seed, 1.5 * (1.0 + seed)) for seed in range(3)]
    found = summarise("split_digits", "kl_budget", rows)
    assert found["runs"] == 3 and found["slowdown"] == pytest.approx(1.5)
    below = found["acc_below_joint"]
    assert [below[key] for key in ("mean", "low", "high")] == pytest.approx([0.02] * 3)
    assert found["acc"]["mean"] == pytest.approx(0.89) and found["acc"]["minimum"] == pytest.approx(0.88)
    assert "preserved_kl" not in found


def test_what_fails_is_reported_and_does_not_stop_the_rest(tmp_path, monkeypatch):
    # threads in place of processes, which take seconds to start; tests/cli/test_continual.py has real ones
    monkeypatch.setattr(engine, "ProcessPoolExecutor", lambda workers, *_: ThreadPoolExecutor(workers))
    cells = plan_cells(CONFIGS, only=("split_digits", "naive"), quick=True)
    bad = [Cell("nowhere", load(ContinualConfig, CONFIGS / "continual" / "permuted_mnist.yaml"))]
    content = run_cells([*bad, *cells], tmp_path, workers=1)
    assert [row["benchmark"] for row in content["rows"]] == ["split_digits"]
    assert list(content["failures"]) == ["nowhere/kl_budget_seed0_order0"]
    assert "train-images-idx3-ubyte" in content["failures"]["nowhere/kl_budget_seed0_order0"]
    with pytest.raises(NsrlError, match="no run came to a result"):
        run_cells(bad, tmp_path, workers=1)


def test_a_result_of_other_settings_is_not_taken(tmp_path):
    cell, *_ = plan_cells(CONFIGS, only=("split_digits", "naive"), quick=True)
    other, *_ = plan_cells(CONFIGS, only=("split_digits", "naive"))
    run_cell(cell, tmp_path)
    assert cell.name == other.name
    assert cell.stored(tmp_path) is not None and other.stored(tmp_path) is None


def test_the_table_sorts_by_accuracy_and_the_figure_has_a_panel_a_benchmark(tmp_path):
    cells = plan_cells(CONFIGS, only=("split_digits", "naive", "joint"))
    rng = np.random.default_rng(0)
    found = {
        cell.name: row(
            cell.config.strategy.name, 0, 0.5 + 0.4 * (cell.config.strategy.name == "joint") + 0.01 * rng.random(), 1.0
        )
        for cell in cells
    }
    content = gather(cells, found, {})
    table = benchmark_table(content, "split_digits")
    assert [line[0] for line in table.rows] == ["joint", "naive"] and table.title == "split digits, 10 runs"
    assert all(len(line) == len(table.head) for line in table.rows)
    assert draw_benchmarks(content, tmp_path / "x.png").stat().st_size > 1000


def test_sizes_have_the_unit_that_fits():
    assert [size(value) for value in (None, 0, 999, 2048, 3.3e6, 7e9)] == [
        "-",
        "0 B",
        "999 B",
        "2.0 kB",
        "3.3 MB",
        "7.0 GB",
    ]
