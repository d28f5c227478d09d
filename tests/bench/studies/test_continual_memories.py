"""The study of small memories: its plan is fair, and it says where a strategy breaks."""

from pathlib import Path

import pytest

from nsrl.bench.studies.continual_memories import OFFLINE, SEEDS, SIZES, broken, plan_memories, variants
from nsrl.errors import NsrlError

CONFIGS = Path(__file__).parents[3] / "configs"


def test_all_variants_keep_as_many_samples_and_nothing_is_tuned():
    cells = plan_memories(CONFIGS)
    names = list(variants(1, 1, 1))
    assert len(cells) == len({cell.name for cell in cells}) == len(OFFLINE) * len(SEEDS) * len(SIZES) * len(names)
    for cell in cells:
        size = int(cell.benchmark.rpartition("_")[2])
        options = cell.config.strategy.options
        tasks = 10 if "permuted" in cell.benchmark else 5
        assert options.get("states_per_task", options.get("samples_per_task", size)) == size
        assert options.get("buffer_size", size * tasks) == size * tasks
        assert cell.config.presets == {}
    # the budget has its default on every benchmark
    ours = {tuple(cell.config.strategy.options) for cell in cells if cell.variant == "kl_budget"}
    assert ours == {("states_per_task",)}


def test_names_choose_and_wrong_ones_are_told():
    cells = plan_memories(CONFIGS, only=("split_mnist", "20", "er"))
    assert [cell.name for cell in cells] == [f"split_mnist_20/er_seed{seed}_order0" for seed in SEEDS]
    assert cells[0].config.training.epochs == 1
    with pytest.raises(NsrlError, match="'21'"):
        plan_memories(CONFIGS, only=("21",))


def test_who_breaks_is_said():
    accs = {("b_20", "er"): 0.8, ("b_500", "er"): 0.9, ("b_20", "kl_budget"): 0.88, ("b_500", "kl_budget"): 0.9}
    summary = [{"benchmark": b, "strategy": s, "acc": {"mean": acc}} for (b, s), acc in accs.items()]
    assert broken({"summary": summary}) == ["er on b with 20 samples a task: 10.0 points below"]
