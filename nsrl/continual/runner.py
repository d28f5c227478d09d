"""One strategy on one benchmark: learns the tasks one after the other and measures all of them after each."""

from __future__ import annotations

import copy
import os
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import asdict
from pathlib import Path
from time import perf_counter, process_time
from typing import Any

import torch
from tqdm import tqdm

from nsrl.continual.benchmarks import Benchmark, build_benchmark
from nsrl.continual.config import ContinualConfig, TrainingSettings
from nsrl.continual.metrics import sequence_metrics
from nsrl.continual.models import build_model, measure_statistics
from nsrl.continual.optimizers import OptimizerConfig
from nsrl.continual.records import Records
from nsrl.continual.scores import evaluate
from nsrl.continual.strategies import build_strategy
from nsrl.continual.strategies.base import Strategy
from nsrl.continual.watching import LOOKS, Watch
from nsrl.errors import NsrlError
from nsrl.reading.limits import Unreadable, shown
from nsrl.reading.values import mapping


def run_continual(
    config: ContinualConfig, folder: Path | None = None, *, progress: bool = False, looks: int | None = LOOKS
) -> dict[str, Any]:
    """Learn the tasks of a benchmark with one strategy.

    After every task its results go to the folder, with the weights and the strategy's progress at the end of its
    training. A run that finds such there goes on behind them: for each finished task the strategy gets both back and
    takes in again what it keeps of the task. It comes to the same end, to the last bit, as without the interruption.

    Args:
        config: what to run.
        folder: of the run; None writes nothing.
        progress: show a bar with the time left.
        looks: at learnt tasks while another is learnt, evenly spread over its steps; None looks behind every step.

    Returns:
        The content of metrics.json. `matrix` is R[trained, evaluated] on the test parts: accuracy, or for regression
        the share of the variance explained (0 where worse than the mean); `acc`, `bwt`, `fwt`, `forgetting`,
        `learning` as in `nsrl.continual.metrics`; `preserved_kl`, `kept_share`, `leakage` and `rank` as the strategy
        measured them at the end of the last task (None where it has none); `worst_kl`, `worst_retained_kl`,
        `worst_drop` and `worst_accuracy` of a learnt task while others were learnt, see `Watch`; `train_seconds`
        without evaluation and, of all threads of this process, `train_cpu_seconds`, which a busy machine stretches
        less;
        `memory_bytes` kept of earlier tasks at the end; `history`, an entry a task.

    Raises:
        NsrlError: a benchmark, network or strategy that does not exist or does not fit, missing data, a damaged folder.
    """
    start = perf_counter()
    check_device(config.training.device)
    benchmark = build_benchmark(config.benchmark, config.seed)
    model = build_model(config.model, benchmark, config.seed).to(config.training.device)
    measure_statistics(model, (batch[0] for batch in benchmark.loader(0, device=config.training.device)))
    strategy = build_strategy(config.strategy.name, model, optimizer_config(config.training), **config.options)
    with Records(folder, config) as records:
        untrained = evaluate(model, benchmark, "test", (), config.training.device)
        history: list[dict[str, Any]] = records.read()
        if len(history) > len(benchmark.tasks):
            raise NsrlError(
                f"{folder} holds {len(history)} finished tasks, but the benchmark has {len(benchmark.tasks)}; "
                "resume with the configuration of the run"
            )
        watch = Watch(strategy, benchmark, config.training.device)
        for index in range(len(history)):
            _recall_task(strategy, benchmark, index, records.state(index), config)
            watch.learnt()
        records.begin([data.task.name for data in benchmark.tasks], len(history))
        with _bar(config, benchmark, len(history), progress) as bar:
            for index in range(len(history), len(benchmark.tasks)):
                entry, state = _learn_task(strategy, benchmark, index, config, records, bar, watch, looks)
                history.append(entry)
                records.write_task(index, history, state)
        metrics = summary(config, benchmark, history, untrained) | {"wall_seconds": perf_counter() - start}
        held = [data.task for data in benchmark.tasks]
        if all(len(data.splits.validation) for data in benchmark.tasks):
            scores = evaluate(model, benchmark, "validation", held, config.training.device, strategy.recalled)
            metrics["acc_validation"] = sum(scores) / len(scores)
        records.finish(metrics, model)
    return metrics


def check_device(name: str) -> None:
    """Raise NsrlError unless torch has this device here."""
    try:
        torch.empty(1, device=name).cpu()
    except (RuntimeError, AssertionError, NotImplementedError, ValueError) as error:
        reason = str(error).strip().partition("\n")[0]
        raise NsrlError(
            f"training.device {shown(name)!r} is no device of this machine ({shown(reason, 120)}); take cpu"
        ) from error


def optimizer_config(training: TrainingSettings) -> OptimizerConfig:
    """The optimizer's part of the training settings."""
    return OptimizerConfig(
        training.optimizer,
        training.learning_rate,
        training.first_learning_rate,
        training.head_learning_rate,
        training.momentum,
        training.weight_decay,
        training.decay_to,
    )


def summary(
    config: ContinualConfig, benchmark: Benchmark, history: Sequence[dict[str, Any]], untrained: Sequence[float]
) -> dict[str, Any]:
    """What a finished run came to, see `run_continual`."""
    matrix = [entry["scores"] for entry in history]
    last = history[-1]
    return {
        "benchmark": benchmark.name,
        "scenario": benchmark.scenario,
        "strategy": config.strategy.name,
        "seed": config.seed,
        "order": config.benchmark.order,
        "score": "variance explained" if benchmark.regression else "accuracy",
        **asdict(sequence_metrics(matrix, untrained)),
        **{key: last["diagnostics"].get(key) for key in ("preserved_kl", "kept_share", "leakage", "rank")},
        **_worst([entry.get("worst", {}) for entry in history]),
        **{key: sum(entry[key] for entry in history) for key in ("train_seconds", "train_cpu_seconds")},
        "memory_bytes": last["memory_bytes"],
        "tasks": [data.task.name for data in benchmark.tasks],
        "matrix": matrix,
        "untrained": list(untrained),
        "history": list(history),
    }


def _worst(entries: Sequence[dict[str, float]]) -> dict[str, float | None]:
    """The worst of all tasks; None for what no task has."""
    found: dict[str, float | None] = {}
    for key in ("kl", "retained_kl", "drop", "accuracy"):
        values = [entry[key] for entry in entries if key in entry]
        worst = min if key == "accuracy" else max
        found[f"worst_{key}"] = worst(values) if values else None
    return found


class TrainingClock:
    """Time of the clock and of the processor, without the pauses; it runs from the beginning."""

    def __init__(self) -> None:
        self.seconds = self.cpu_seconds = 0.0
        self.start()

    def start(self) -> None:
        """Go on."""
        self._since = perf_counter(), process_time()

    def stop(self) -> None:
        """Pause."""
        self.seconds += perf_counter() - self._since[0]
        self.cpu_seconds += process_time() - self._since[1]


def _learn_task(
    strategy: Strategy,
    benchmark: Benchmark,
    index: int,
    config: ContinualConfig,
    records: Records,
    bar: tqdm,
    watch: Watch,
    count: int | None,
) -> tuple[dict[str, Any], dict[str, Any]]:
    """Results of a task, and the state at the end of its training that a resumed run goes on from."""
    training, task = config.training, benchmark.tasks[index].task
    loader = benchmark.loader(
        index,
        batch_size=training.batch_size,
        seed=_task_seed(config, index),
        augment=training.augment,
        device=training.device,
    )
    torch.manual_seed(_task_seed(config, index))
    steps = training.epochs * len(loader)
    looks = _looks(steps, steps if count is None else count)
    watch.begin()
    step = 0
    clock = TrainingClock()
    strategy.before_task(task, _whole(benchmark, index, config))
    losses = []
    for epoch in range(training.epochs):
        total = 0.0
        for batch in loader:
            total += strategy.step(batch) * len(batch[1])
            bar.update()
            step += 1
            if step in looks:
                clock.stop()
                watch.look()
                clock.start()
        if epoch + 1 in training.milestones:
            for group in strategy.optimizer.param_groups:
                group["lr"] *= training.decay
        losses.append(total / len(loader.examples))
        clock.stop()
        records.write_loss(index * training.epochs + epoch + 1, losses[-1])
        bar.set_postfix_str(f"{task.name}, loss {losses[-1]:.3g}", refresh=False)
        clock.start()
    clock.stop()
    worst = watch.worst()
    # before the task at hand joins those that are kept: it has not been forgotten yet
    diagnostics = strategy.diagnostics()
    state = copy.deepcopy({"weights": strategy.model.state_dict(), "progress": strategy.progress()})
    clock.start()
    strategy.after_task(task, _whole(benchmark, index, config))
    clock.stop()
    watch.learnt()
    seen = [data.task for data in benchmark.tasks[: index + 1]]
    entry = {
        "task": task.name,
        "scores": evaluate(strategy.model, benchmark, "test", seen, training.device, strategy.recalled),
        "losses": losses,
        "diagnostics": {key: float(value) for key, value in diagnostics.items()},
        "worst": worst,
        "train_seconds": clock.seconds,
        "train_cpu_seconds": clock.cpu_seconds,
        "memory_bytes": int(strategy.memory_bytes()),
    }
    return entry, state


def _looks(steps: int, count: int) -> set[int]:
    """Steps behind which learnt tasks are looked at, evenly spread; the last is the end."""
    return {-(-steps * number // count) for number in range(1, count + 1)}


def _recall_task(
    strategy: Strategy, benchmark: Benchmark, index: int, state: dict[str, Any], config: ContinualConfig
) -> None:
    """Bring a strategy to where it was after a finished task."""
    task = benchmark.tasks[index].task
    strategy.before_task(task, _whole(benchmark, index, config))
    try:
        strategy.model.load_state_dict(mapping(state["weights"], "weights"))
        strategy.resume(state["progress"])
    except RuntimeError as error:
        raise NsrlError(
            f"the weights of task {index} in the run's folder are of another network; start a new run"
        ) from error
    except Unreadable as error:
        raise NsrlError(
            f"task{index}.pt in the run's folder is damaged ({error}); remove it, and this task is learnt again"
        ) from error
    strategy.after_task(task, _whole(benchmark, index, config))


def _whole(benchmark: Benchmark, index: int, config: ContinualConfig) -> Any:
    """A task's training examples, shuffled the same way whenever they are asked for, never augmented."""
    return benchmark.loader(
        index,
        batch_size=max(config.training.batch_size, 64),
        seed=_task_seed(config, index),
        device=config.training.device,
    )


def _task_seed(config: ContinualConfig, index: int) -> int:
    return 1000 * config.seed + index


@contextmanager
def _bar(config: ContinualConfig, benchmark: Benchmark, done: int, progress: bool) -> Iterator[tqdm]:
    steps = [
        config.training.epochs * len(benchmark.loader(index, batch_size=config.training.batch_size))
        for index in range(len(benchmark.tasks))
    ]
    terminal = os.isatty(2)
    with tqdm(
        total=sum(steps),
        initial=sum(steps[:done]),
        disable=not progress,
        unit="step",
        desc=f"{config.strategy.name} on {benchmark.name}",
        dynamic_ncols=True,
        mininterval=0.2 if terminal else 30.0,
        leave=terminal,
    ) as bar:
        yield bar
