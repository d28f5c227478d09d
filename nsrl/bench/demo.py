"""The demo: one agent, one buffer, two ways of learning the new task, one table and one figure."""

from __future__ import annotations

import hashlib
from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from nsrl.bench.suites.jobs import Job, Status, gather, run_jobs
from nsrl.files import given_path, read_lines, write_text
from nsrl.rl import agents
from nsrl.runs.collecting import collect_buffer
from nsrl.runs.config import DemoConfig, FinetuneConfig, Method, PretrainConfig
from nsrl.runs.figures import curve_from_history, draw_curves, first_returns
from nsrl.runs.folder import RunFolder, choose_folder
from nsrl.runs.pretraining import obtain_agent
from nsrl.runs.report import Table, comparison_table, duration
from nsrl.runs.settings import to_yaml
from nsrl.runs.tasks import Tasks, resolve_tasks
from nsrl.runs.training import Interrupted, Stopwatch, use_one_thread

#: Label, folder and method of the two fine-tunings.
METHODS: tuple[tuple[str, str, Method], ...] = (
    ("plain PPO", "plain", "finetune"),
    ("NullSpacePPO", "nullspace", "null_space"),
)


@dataclass(frozen=True)
class DemoOutcome:
    """What the demo made.

    Attributes:
        table: before, and after with each method.
        figure: learning curves of both methods on both tasks, PNG.
        report: the same as Markdown.
        tensorboard: folder of the events.
        seconds: wall time of everything.
    """

    table: Table
    figure: Path
    report: Path
    tensorboard: Path
    seconds: float


def run_demo(
    config: DemoConfig, *, on_status: Callable[[Status], Any] | None = None, progress: bool = False
) -> DemoOutcome:
    """Pretrain (or take the cached agent), collect a buffer, fine-tune with both methods side by side, and compare.

    Args:
        config: all settings.
        on_status: told how the two fine-tunings come on.
        progress: show the progress of pretraining.

    Raises:
        NsrlError: bad input.
        Interrupted: the pretraining was interrupted; starting the demo again goes on with it.
    """
    use_one_thread()
    watch = Stopwatch()
    finetuning = replace(config.finetuning, pair=config.pair)
    tasks = resolve_tasks(finetuning)
    folder = choose_folder("demo", tasks.name, config.out)
    pretrained = pretrained_agent(replace(config.pretraining, env=tasks.old), given_path(config.cache), progress)
    agent = agents.load(pretrained.path)
    buffer = collect_buffer(finetuning, agent, tasks.old)
    with folder.made():
        buffer.save(folder.buffer)
        folder.write_config(config)
        return _run_both(
            replace(finetuning, agent=str(pretrained.path), buffer=str(folder.buffer)), folder, tasks, watch, on_status
        )


def _run_both(
    finetuning: FinetuneConfig,
    folder: RunFolder,
    tasks: Tasks,
    watch: Stopwatch,
    on_status: Callable[[Status], Any] | None,
) -> DemoOutcome:
    """Both methods side by side, and their comparison."""
    jobs = [
        Job(label, "finetune", replace(finetuning, method=method), folder.path / name)
        for label, name, method in METHODS
    ]
    try:
        run_jobs(jobs, workers=len(jobs), on_status=on_status, poll=0.2)
    except KeyboardInterrupt as error:
        raise Interrupted(folder.path, 130) from error
    return _compare(jobs, folder, tasks, finetuning, watch)


def pretrained_agent(config: PretrainConfig, cache: Path, progress: bool) -> RunFolder:
    """The agent that this configuration makes, from the cache if it is there; an interrupted one is finished."""
    key = hashlib.sha256(to_yaml(replace(config, name=None, out=None)).encode()).hexdigest()[:16]
    return obtain_agent(config, RunFolder(cache / f"pretrain-{key}"), progress=progress)


def _compare(jobs: list[Job], folder: RunFolder, tasks: Tasks, config: FinetuneConfig, watch: Stopwatch) -> DemoOutcome:
    runs = [(job.name, job.run.read_metrics()) for job in jobs]
    budget = config.retention.kl_budget
    curves = [curve_from_history(job.name, read_lines(job.run.history), ("old", "new")) for job in jobs]
    draw_curves(
        curves,
        folder.figure,
        tasks=[("old", f"old task: {tasks.old}"), ("new", f"new task: {tasks.new}")],
        budget=budget,
        references=first_returns(curves[0]),
    )
    steps, spent = f"{config.total_timesteps:,} steps", duration(watch.read())
    title = f"{tasks.old} -> {tasks.new}, {steps}, KL budget {budget:g}, {spent} in all"
    table = comparison_table(runs, title)
    parts = [f"# {title}", table.markdown(), f"![learning curves]({folder.figure.name})"]
    write_text(folder.report, "\n\n".join(parts) + "\n")
    gather(jobs, folder.metrics, wall_seconds=watch.read())
    return DemoOutcome(table, folder.figure, folder.report, folder.path, watch.read())
