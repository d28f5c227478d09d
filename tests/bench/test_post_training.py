"""The study of post-training: its world, what is chosen from its runs, and a run of a few steps."""

from __future__ import annotations

import json

import pytest
import torch

from nsrl.bench.registry import Options, run_benchmark
from nsrl.bench.studies.post_training import METHODS, plan_cells
from nsrl.bench.studies.post_training_report import summarise, task_table
from nsrl.bench.studies.post_training_tasks import PEOPLE, TASKS, World, reward
from nsrl.errors import NsrlError


def test_the_world_says_every_fact_in_both_wordings() -> None:
    world = World.generated(3)
    assert torch.equal(World.generated(3).answers, world.answers)
    assert len({tuple(pair) for pair in world.people.tolist()}) == len(world.people)
    told = world.sentences(range(PEOPLE))
    prompts, answers = world.prompts(range(PEOPLE), 1)
    half = len(told) // 2
    assert torch.equal(told[half:, :4], prompts) and torch.equal(told[half:, 4], answers)
    assert torch.equal(told[:half, 4], answers) and int(told.max()) < world.vocabulary
    rows, answers = world.styled([0])
    assert torch.equal(rows[:, 5], answers) and torch.equal(rows[:, 6], answers)


def test_the_reward_counts_every_answer_once() -> None:
    world = World.generated(0)
    low, high = world.answer_words
    rows = torch.tensor([[low, low, low, low], [low, low + 1, 5, 6], [low, low + 1, low + 2, high - 1], [0, 1, 2, 3]])
    assert reward(world, rows).tolist() == [0.25, 0.5, 1.0, 0.0]


def row(method: str, coefficient: float, seed: int, new: float, old: float) -> dict:
    return {
        "task": next(iter(TASKS)),
        "method": method,
        "coefficient": coefficient,
        "seed": seed,
        "new": new,
        "old": old,
        "kl_all": 0.1,
        "kl_preserved": None,
        "budget": None,
        "processor_seconds": 1.0,
    }


def test_a_rival_is_shown_at_the_coefficient_that_suits_it() -> None:
    grid = METHODS["KL to reference"].grid
    rows = [row("plain", 1.0, seed, 1.0, 0.2) for seed in (0, 1)]
    for coefficient, new, old in zip(grid, (1.0, 0.99, 0.5), (0.5, 0.8, 1.0), strict=True):
        rows += [row("KL to reference", coefficient, seed, new, old) for seed in (0, 1)]
    rows += [
        row("L2", coefficient, 0, new, 0.9) for coefficient, new in zip(METHODS["L2"].grid, (0.6, 0.3), strict=True)
    ]
    found = summarise(rows)[next(iter(TASKS))]
    chosen = {line["method"]: line for line in found if line["chosen"]}
    assert chosen["KL to reference"]["coefficient"] == grid[1] and chosen["KL to reference"]["learnt"]
    assert chosen["L2"]["coefficient"] == METHODS["L2"].grid[0] and not chosen["L2"]["learnt"]
    table = task_table("new", found)
    assert [line[0] for line in table.rows] == ["plain", "KL to reference", "L2"]


def test_cells_are_balanced_and_unknown_names_refused() -> None:
    cells = plan_cells()
    assert len({cell.name for cell in cells}) == len(cells)
    assert [cell.seed for cell in cells] == sorted(cell.seed for cell in cells)
    assert {cell.method for cell in plan_cells(["L2"], quick=True)} == {"L2"}
    with pytest.raises(NsrlError, match="no task or method"):
        plan_cells(["L3"])


def test_a_short_run_is_written_and_not_made_again(tmp_path) -> None:
    pytest.importorskip("transformers", reason="the study's model is one of transformers: install nsrl[llm]")

    class Console:
        def status(self, name):
            from contextlib import nullcontext

            return nullcontext(lambda status: None)

        def say(self, text: str) -> None:
            pass

        note = say

    options = Options(out=tmp_path, quick=True, only=("new facts (SFT)", "plain", "ours"))
    results = run_benchmark("post_training", options, Console())
    lines = (tmp_path / "results" / "runs.jsonl").read_text().splitlines()
    assert {json.loads(line)["method"] for line in lines} == {"plain", "ours"}
    assert len(results.tables) == 1 and (tmp_path / "results" / "post_training.png").is_file()
    run_benchmark("post_training", options, Console())
    assert (tmp_path / "results" / "runs.jsonl").read_text().splitlines() == lines
