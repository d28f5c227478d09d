"""Sequences of tasks: what a run leaves behind, that budgets are kept task by task, and that it can be interrupted."""

from __future__ import annotations

import json
import shutil
import signal
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from scipy.integrate import trapezoid
from stable_baselines3 import PPO
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator
from torch.distributions import Categorical, kl_divergence

from nsrl.bench.suites import sequences, worker
from nsrl.bench.suites.jobs import Job
from nsrl.bench.suites.pairs import read_suite, write_suite
from nsrl.bench.suites.sequences import draw_sequence_suite, run_sequence_suite, sequence_suite_table
from nsrl.errors import NsrlError
from nsrl.files import read_lines
from nsrl.rl.budget.config import RetentionConfig
from nsrl.rl.playing.evaluation import evaluate
from nsrl.rl.retention.buffer import RetentionBuffer
from nsrl.runs.config import BufferSettings, EvaluationSettings, PretrainConfig
from nsrl.runs.folder import RunFolder
from nsrl.runs.hyperparameters import PPOOverrides, PPOSettings, TRPOOverrides
from nsrl.runs.sequences.config import SequenceConfig, SequenceTask
from nsrl.runs.sequences.learning import learn_sequence, resume_sequence
from nsrl.runs.sequences.results import continual_results
from nsrl.runs.settings import to_yaml
from nsrl.runs.training import Interrupted, RunHistory
from nsrl_envs import SEQUENCES

ENVS = SEQUENCES["cartpole_trio"].tasks
NAMES = ("stock", "swapped", "reversed_angle")
BUDGETS = {"stock": 1e-5, "swapped": 1e-3}
ROLLOUT = 256
TINY = SequenceConfig(
    tasks=[
        SequenceTask(ENVS[0], 512, 1e-5, 0, 500, "stock"),
        SequenceTask(ENVS[1], 512, 1e-3, 0, 500, "swapped"),
        SequenceTask(ENVS[2], 600, None, 0, 500, "reversed_angle"),
    ],
    pretraining=PretrainConfig(ppo=PPOSettings(n_envs=2, n_steps=128, batch_size=64, n_epochs=2)),
    ppo=PPOOverrides(n_envs=2, learning_rate=3e-3),
    retention=RetentionConfig(opening="off"),
    states=BufferSettings(n_states=60, n_envs=2),
    evaluation=EvaluationSettings(every=ROLLOUT, episodes=1, final_episodes=2),
    checkpoint_every=ROLLOUT,
    references=True,
)
FILES = {
    "config.yaml",
    "format.json",
    "agent.zip",
    "retention.npz",
    "metrics.json",
    "history.jsonl",
    "report.md",
    "curves.png",
    "tb",
    "pretrained",
    "tasks",
    "references",
}


@pytest.fixture(scope="module")
def run(tmp_path_factory) -> Path:
    """A tiny sequence, learnt with a budget for each task."""
    return learn_sequence(TINY, tmp_path_factory.mktemp("sequence") / "run").folder.path


def metrics_of(path: Path) -> dict:
    return json.loads((path / "metrics.json").read_text())


def kl_on(buffer: RetentionBuffer, agent: Path, states: np.ndarray) -> float:
    with torch.no_grad():
        now = PPO.load(agent).policy.get_distribution(torch.as_tensor(buffer.observations[states])).distribution
    return float(kl_divergence(Categorical(logits=torch.tensor(buffer.outputs[states])), now).mean())


def test_the_folder_holds_every_task_and_nothing_half_written(run: Path) -> None:
    assert {path.name for path in run.iterdir()} == FILES
    stages = [run / "tasks" / f"{number}-{name}" for number, name in enumerate(NAMES, start=1)]
    assert sorted(stages) == sorted((run / "tasks").iterdir())
    for stage in stages:
        assert {path.name for path in stage.iterdir()} == {"agent.zip", "retention.npz", "metrics.json"}
    assert (run / "agent.zip").read_bytes() == (stages[-1] / "agent.zip").read_bytes()


def test_the_matrix_is_what_the_saved_agents_score(run: Path) -> None:
    matrix = metrics_of(run)["matrix"]
    for row, (number, name) in zip(matrix, enumerate(NAMES, start=1), strict=True):
        model = PPO.load(run / "tasks" / f"{number}-{name}" / "agent.zip")
        assert row == [evaluate(model, env, episodes=2, seed=20_000).mean for env in ENVS]


def test_every_task_is_within_its_own_budget_after_every_update(run: Path) -> None:
    rows = read_lines(run / "history.jsonl")
    # 512 steps on the second task, 600 rounded up to whole rollouts on the third
    assert [row["timesteps"] for row in rows] == list(range(0, 512 + 768 + 1, ROLLOUT))
    shares = [row[f"kl/{name}"] / BUDGETS[name] for row in rows for name in BUDGETS if f"kl/{name}" in row]
    assert len(shares) == len(rows) + 3 and 0.2 < max(shares) <= 1.0 + 1e-6
    assert metrics_of(run)["largest_share"] == pytest.approx(max(shares), rel=1e-6)
    assert all(f"return/{name}" in row for row in rows for name in NAMES)


def test_the_states_of_each_task_join_with_the_policy_that_had_learnt_it(run: Path) -> None:
    buffer, metrics = RetentionBuffer.load(run / "retention.npz"), metrics_of(run)
    assert buffer.tasks == NAMES and len(buffer) == metrics["buffer"]["states"] == 180
    for index, name in enumerate(NAMES):
        states = np.flatnonzero(buffer.source == index)
        then = kl_on(buffer, run / "tasks" / f"{index + 1}-{name}" / "agent.zip", states)
        assert then == pytest.approx(0.0, abs=1e-6)
        if name in BUDGETS:
            now = kl_on(buffer, run / "agent.zip", states)
            assert metrics["kl_by_task"][name] == pytest.approx(now, rel=1e-2, abs=1e-7)
    # context inputs: none on the first task's states, one of two on the others'
    contexts = [buffer.observations[buffer.source == index][:, -2:].max(axis=0).tolist() for index in range(3)]
    assert contexts == [[0, 0], [1, 0], [0, 1]]


def test_metrics_follow_from_matrix_and_curves(run: Path) -> None:
    metrics = metrics_of(run)
    performances = np.clip(np.array(metrics["matrix"]) / 500, 0, 1)
    assert metrics["average_performance"] == pytest.approx(performances[-1].mean())
    lost = [performances[i, i] - performances[-1, i] for i in range(3)]
    assert list(metrics["forgetting_by_task"].values()) == pytest.approx(lost)
    assert metrics["forgetting"] == pytest.approx(np.mean(lost))
    rows = read_lines(run / "history.jsonl")
    for name, (start, end) in {"swapped": (0, 512), "reversed_angle": (512, 1280)}.items():
        alone = read_lines(run / "references" / name / "history.jsonl")
        assert alone[-1]["timesteps"] == end - start
        areas = []
        for curve in (
            [(row["timesteps"] - start, row[f"return/{name}"]) for row in rows if start <= row["timesteps"] <= end],
            [(row["timesteps"], row["return/new"]) for row in alone],
        ):
            steps, returns = zip(*curve, strict=True)
            areas.append(trapezoid(np.clip(np.array(returns) / 500, 0, 1), steps) / (end - start))
        expected = (areas[0] - areas[1]) / (1 - areas[1])
        assert metrics["forward_transfer_by_task"][name] == pytest.approx(expected)
    assert list(metrics["forward_transfer_by_task"]) == ["swapped", "reversed_angle"]


def test_tensorboard_has_one_curve_a_task_over_the_whole_sequence(run: Path) -> None:
    events = EventAccumulator(str(run / "tb"))
    events.Reload()
    for name in NAMES:
        steps = [event.step for event in events.Scalars(f"retain/{name}/return_mean")]
        assert steps == list(range(0, 1281, ROLLOUT))
    assert [event.step for event in events.Scalars("retain/swapped/kl_mean")] == [768, 1024, 1280]
    assert max(event.value for event in events.Scalars("retain/stock/kl_mean")) <= 1e-5 * (1 + 1e-5)


def test_the_report_shows_the_matrix(run: Path) -> None:
    text, metrics = (run / "report.md").read_text(), metrics_of(run)
    row = " | ".join(f"{value:.1f}" for value in metrics["matrix"][1])
    assert f"| after swapped | {row} | " in text and "![returns and KL over the sequence](curves.png)" in text
    assert "forward transfer" in text and "(`nsrl/CartPoleTrio-v0`)" in text
    assert (run / "curves.png").stat().st_size > 20_000


def test_a_run_that_lost_its_last_task_learns_it_again_the_same(run: Path, tmp_path: Path) -> None:
    copy = tmp_path / "run"
    shutil.copytree(run, copy)
    for file in ("metrics.json", "agent.zip", "report.md", "curves.png", "retention.npz"):
        (copy / file).unlink()
    shutil.rmtree(copy / "tasks" / "3-reversed_angle")
    metrics = resume_sequence(copy).metrics
    for key in ("matrix", "kl_by_task", "curve", "forward_transfer_by_task"):
        assert metrics[key] == metrics_of(run)[key], key
    assert read_lines(copy / "history.jsonl") == read_lines(run / "history.jsonl")


def test_an_interrupted_task_goes_on_from_its_checkpoint(run: Path, tmp_path: Path, monkeypatch) -> None:
    append, seen = RunHistory._append, []

    def interrupt(self: RunHistory) -> None:
        append(self)
        seen.append(self.model.num_timesteps)
        # asked as training and as each rollout begins, and at the end; of the second task, 256 steps in
        if seen == [0, 0, 256, 512, 512, 512, 768]:
            signal.raise_signal(signal.SIGINT)

    monkeypatch.setattr(RunHistory, "_append", interrupt)
    folder = tmp_path / "run"
    config = replace(TINY, agent=str(run / "pretrained"), references=False)
    with pytest.raises(Interrupted, match=f"--resume {folder}$"):
        learn_sequence(config, folder)
    assert (folder / "tasks" / "3-reversed_angle" / "checkpoint.zip").is_file()
    seen.clear()
    metrics = resume_sequence(folder).metrics
    assert seen[0] == 768 and metrics["timesteps"] == 1280  # the second task was not learnt again
    rows = read_lines(folder / "history.jsonl")
    assert [row["timesteps"] for row in rows] == list(range(0, 1281, ROLLOUT))
    assert metrics["largest_share"] <= 1.0 + 1e-6 and metrics["forward_transfer"] is None
    # up to the interruption it is the run that was not interrupted
    assert rows[:4] == read_lines(run / "history.jsonl")[:4]
    with pytest.raises(NsrlError, match="is finished"):
        resume_sequence(folder)


@pytest.mark.parametrize("normalize", [False, True])
def test_two_tasks_of_continuous_actions_with_plain_ppo(normalize: bool, tmp_path: Path) -> None:
    tasks = [SequenceTask("nsrl/Pendulum-v0", 256, 1e-4), SequenceTask("nsrl/PendulumReversed-v0", 256)]
    pretraining = replace(TINY.pretraining, normalize=normalize)
    config = replace(TINY, tasks=tasks, pretraining=pretraining, method="finetune", references=False)
    metrics = learn_sequence(config, tmp_path / "run").metrics
    assert metrics["unit"] == "return" and metrics["forward_transfer"] is None
    assert metrics["average_performance"] == metrics["average_return"] == pytest.approx(np.mean(metrics["matrix"][-1]))
    # nothing holds plain PPO back
    assert metrics["largest_share"] == pytest.approx(metrics["kl_by_task"]["Pendulum-v0"] / 1e-4, rel=1e-6)
    assert metrics["largest_share"] > 1.0
    assert (tmp_path / "run" / "vecnormalize.pkl").is_file() == normalize


def test_the_hard_null_space_is_for_all_tasks(tmp_path: Path) -> None:
    config = replace(
        TINY,
        retention=RetentionConfig(kl_budget=0),
        references=False,
        tasks=[replace(task, kl_budget=0.0, total_timesteps=256) for task in TINY.tasks],
    )
    metrics = learn_sequence(config, tmp_path / "run").metrics
    # 1e-6 counts as zero, in the mean over all states
    assert metrics["kl_by_task"].keys() == {"stock", "swapped"}
    assert sum(metrics["kl_by_task"].values()) / 2 <= 1e-6


def test_bad_sequences_are_refused_before_anything_is_written(tmp_path: Path) -> None:
    pendulum = SequenceTask("nsrl/Pendulum-v0")
    for tasks, sentence in (
        (TINY.tasks[:1], "needs two or more tasks, but tasks has 1"),
        ([TINY.tasks[0], pendulum], "nsrl/Pendulum-v0"),
        ([TINY.tasks[0], SequenceTask("nsrl/CartPoleTrioo-v0")], "CartPoleTrioo"),
    ):
        with pytest.raises(NsrlError, match=sentence):
            learn_sequence(replace(TINY, tasks=tasks), tmp_path / "run")
    with pytest.raises(NsrlError, match="no agent at"):
        learn_sequence(replace(TINY, agent=str(tmp_path / "nowhere.zip")), tmp_path / "run")
    assert not (tmp_path / "run").exists()
    with pytest.raises(NsrlError, match="two tasks are called stock"):
        replace(TINY, tasks=[TINY.tasks[0], TINY.tasks[0]])
    with pytest.raises(NsrlError, match="for all or none"):
        replace(TINY, tasks=[replace(TINY.tasks[0], kl_budget=0.0), TINY.tasks[1]])
    with pytest.raises(NsrlError, match="give each its kl_budget"):
        replace(TINY, retention=RetentionConfig(task_budgets={"stock": 0.1}))
    for options in ({"low": 1.0}, {"low": 1.0, "high": 1.0}, {"kl_budget": -1.0}, {"total_timesteps": 0}):
        with pytest.raises(NsrlError, match=r"tasks\."):
            SequenceTask("A-v0", **options)


def test_stages_have_the_budgets_of_what_came_before() -> None:
    config = replace(TINY, retention=RetentionConfig(kl_budget=0.3, critic="keep"))
    first, second = config.stage(1), config.stage(2)
    assert first.retention.task_budgets == {"stock": 1e-5}
    assert second.retention.task_budgets == BUDGETS and second.retention.critic == "keep"
    assert config.budgets == {**BUDGETS, "reversed_angle": 0.3}
    assert config.total_timesteps == 1112 and config.first().total_timesteps == 512
    alone = config.reference(config.tasks[2])
    assert (alone.env, alone.total_timesteps, alone.ppo.learning_rate) == (ENVS[2], 600, 3e-3)
    assert config.first().ppo.learning_rate == PPOSettings().learning_rate and alone.ppo.n_steps == 128
    # what is no setting of a later task by TRPO does not change the references either, n_envs included
    other = replace(config, algorithm="trpo", ppo=PPOOverrides(), trpo=TRPOOverrides(n_envs=4))
    assert other.reference(config.tasks[2]).ppo == config.pretraining.ppo
    assert other.stage(1).algorithm == "trpo" and other.stage(1).trpo.n_envs == 4


def test_a_perfect_reference_leaves_no_transfer() -> None:
    stages = [
        {"start": 0, "end": 0, "returns": {name: {"mean": 500.0} for name in NAMES}},
        {"start": 0, "end": 10, "returns": {name: {"mean": 500.0} for name in NAMES}},
        {"start": 10, "end": 20, "returns": {name: {"mean": 250.0} for name in NAMES}},
    ]
    curve = {"timesteps": [0, 10, 20], "returns": {name: [0.0, 500.0, 500.0] for name in NAMES}}
    references = {"swapped": ([0, 10], [500.0, 500.0]), "reversed_angle": ([0, 10], [0.0, 500.0])}
    found = continual_results(TINY, stages, curve, references)
    assert found["forward_transfer_by_task"] == {"swapped": None, "reversed_angle": 1.0}
    assert found["forward_transfer"] == 1.0 and found["forgetting_by_task"]["swapped"] == 0.5


SUITE = """\
sequence: two.yaml
seeds: [3]
methods: {plain PPO: {method: finetune}, budget: {retention: {kl_budget: 1.0e-4}}}
"""
TWO = f"""\
tasks:
  - {{env: {ENVS[0]}, name: first, total_timesteps: 256, low: 0, high: 500}}
  - {{env: {ENVS[1]}, name: second, total_timesteps: 256, low: 0, high: 500}}
references: true
pretraining: {{ppo: {{n_envs: 2, n_steps: 64, batch_size: 64, n_epochs: 2}}}}
ppo: {{n_envs: 2}}
states: {{n_states: 40, n_envs: 2}}
evaluation: {{every: 128, episodes: 1, final_episodes: 1}}
"""


def run_here(jobs: list[Job], **_) -> None:
    """As `run_jobs`, in this process."""
    for job in jobs:
        job.check()
        if not job.run.finished:
            job.folder.parent.mkdir(parents=True, exist_ok=True)
            file = job.folder.with_suffix(".yaml")
            file.write_text(to_yaml(job.config))
            worker.run(job.command, file, job.folder)


def test_a_suite_shares_first_agents_and_references_among_methods(tmp_path: Path, monkeypatch) -> None:
    monkeypatch.setattr(sequences, "run_jobs", run_here)
    (tmp_path / "two.yaml").write_text(TWO)
    (tmp_path / "small.yaml").write_text(SUITE)
    suite = read_suite(tmp_path / "small.yaml")
    assert suite.is_sequence and suite.references and suite.methods["budget"].budgets["first"] == 1e-4
    content = run_sequence_suite(suite, tmp_path / "out")
    assert [(row["method"], row["seed"]) for row in content["rows"]] == [("plain PPO", 3), ("budget", 3)]
    out = tmp_path / "out"
    assert RunFolder(out / "pretrained" / "seed3").finished
    assert RunFolder(out / "references" / "second" / "seed3").finished
    assert not (out / "budget" / "seed3" / "references").exists()
    # the same agent before the second task, whatever the method
    assert content["rows"][0]["matrix"][0] == content["rows"][1]["matrix"][0]
    assert content["rows"][1]["largest_share"] <= 1.0 + 1e-6
    assert all(row["forward_transfer"] is not None for row in content["rows"])
    write_suite(content, tmp_path / "small.json")
    assert str(tmp_path) not in (tmp_path / "small.json").read_text()
    table = sequence_suite_table(json.loads((tmp_path / "small.json").read_text()))
    final = content["rows"][1]["matrix"][-1]
    assert len(table.rows) == 2 and table.rows[1][4] == f"{final[0]:.0f} / {final[1]:.0f}"
    mean = 100 * content["rows"][1]["average_performance"]
    assert table.rows[1][:2] == ("budget", f"{mean:.0f} [{mean:.0f}, {mean:.0f}]")
    assert draw_sequence_suite(content, tmp_path / "small.png").stat().st_size > 10_000
    stamps = {file: file.stat().st_mtime_ns for file in out.rglob("metrics.json")}
    assert run_sequence_suite(suite, out)["rows"] == content["rows"]
    assert {file: file.stat().st_mtime_ns for file in out.rglob("metrics.json")} == stamps
