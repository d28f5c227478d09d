"""Tuning by one rule: as many trials for all, none on what is reported, the best on validation examples chosen."""

import math
from concurrent.futures import Future
from pathlib import Path

import pytest

from nsrl.bench import engine
from nsrl.bench.continual.tuning import (
    COEFFICIENTS,
    KEEPERS,
    OPTIMIZERS,
    OURS,
    SEEDS,
    TRIALS,
    choose,
    plan_tuning,
    run_tuning,
    trials,
)
from nsrl.bench.studies.continual import BENCHMARKS
from nsrl.continual.strategies import STRATEGIES
from nsrl.errors import NsrlError

# imported here: it sets environment variables, which no test may do
pytest.importorskip("sklearn")

CONFIGS = Path(__file__).parents[3] / "configs"


def test_every_rival_gets_as_many_different_trials_over_all_optimizers():
    assert set(COEFFICIENTS) <= set(STRATEGIES) and not COEFFICIENTS[OURS]
    for rival in COEFFICIENTS:
        found = trials(rival, TRIALS)
        assert len(found) == TRIALS == len({repr(trial) for trial in found})
        assert {(training["optimizer"], training["learning_rate"]) for training, _ in found} == set(OPTIMIZERS)
        assert found == trials(rival, TRIALS)


def test_the_plan_tunes_on_other_seeds_and_keeps_as_many_samples():
    plan = plan_tuning(CONFIGS)
    tuning = plan.tuning_cells()
    assert len({cell.name for cell in tuning}) == len(tuning) == len(BENCHMARKS) * len(COEFFICIENTS) * TRIALS
    assert not {cell.config.seed for cell in tuning} & set(SEEDS)
    final = plan.final_cells(choose(tuning, {cell.name: 0.5 for cell in tuning}))
    assert {cell.config.seed for cell in final} == set(SEEDS)
    tasks = {"permuted_digits": 10, "rotated_digits": 6}
    for cell in (*tuning, *final):
        options, name = cell.config.strategy.options, cell.config.strategy.name
        samples = 200 if "split" in cell.benchmark else 400
        if name in KEEPERS:
            whole = samples * tasks.get(cell.benchmark, 5) if KEEPERS[name] == "buffer_size" else samples
            assert options[KEEPERS[name]] == whole
        if name == OURS:  # the same default everywhere, but for how many samples there are room for
            assert options == {"states_per_task": samples}


def test_the_best_on_validation_examples_is_chosen():
    cells = plan_tuning(CONFIGS, only=("split_digits", "er", "gpm")).tuning_cells()
    scores = {cell.name: 0.5 for cell in cells}
    wanted = {"er": cells[-2], "gpm": cells[3]}
    assert [cell.config.strategy.name for cell in wanted.values()] == ["er", "gpm"]
    scores.update({wanted["er"].name: 0.9, wanted["gpm"].name: 0.8})
    others = [cell for cell in cells if cell not in wanted.values()]
    scores[others[0].name] = math.nan
    del scores[others[1].name]
    assert choose(cells, scores) == {("split_digits", name): cell for name, cell in wanted.items()}


def test_wrong_names_are_told():
    with pytest.raises(NsrlError, match="'seed7'"):
        plan_tuning(CONFIGS, only=("seed7",))


def test_a_small_study_is_run_and_taken_up_again(tmp_path, monkeypatch):
    plan = plan_tuning(CONFIGS, only=("split_digits", "naive"), quick=True)
    made = []

    class Here:
        """A pool that works in this process."""

        def __init__(self, *_):
            pass

        def submit(self, act, cell, out):
            made.append(cell.name)
            future: Future = Future()
            future.set_result(act(cell, out))
            return future

        def shutdown(self, **_):
            pass

    monkeypatch.setattr(engine, "ProcessPoolExecutor", Here)
    content = run_tuning(plan, tmp_path)
    assert [trial["chosen"] for trial in content["trials"]].count(True) == 1
    best = max(content["trials"], key=lambda trial: trial["acc_validation"])
    assert best["chosen"]
    assert {row["strategy"] for row in content["rows"]} == {OURS, "naive"}
    assert len(made) == 2 + 2
    assert run_tuning(plan, tmp_path)["rows"] == content["rows"]
    assert len(made) == 2 + 2
