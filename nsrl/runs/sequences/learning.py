"""A sequence of tasks as a run: after each task its states join those on which behaviour is kept.

For every task behind the first: load the agent of the task before, merge the states of all tasks so far, learn inside
their KL budgets, write the agent, play all tasks, collect the new task's states. A task that is complete is never done
again, so an interrupted sequence goes on in the middle of the task that it was at.
"""

from __future__ import annotations

import shutil
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

from nsrl.errors import NsrlError
from nsrl.files import given_path, write_json, written_atomically
from nsrl.rl import agents
from nsrl.rl.algorithms.ppo import NullSpacePPO
from nsrl.rl.budget.baselines import PENALISED
from nsrl.rl.playing.environments import make_envs
from nsrl.rl.playing.evaluation import evaluate
from nsrl.rl.retention.buffer import RetentionBuffer
from nsrl.rl.training.callbacks import TaskEvaluation
from nsrl.runs.config import PretrainConfig
from nsrl.runs.finetuning import build_model, new_task
from nsrl.runs.folder import RunFolder, choose_folder
from nsrl.runs.machine import describe_environment
from nsrl.runs.pretraining import pretrain, resume_pretraining
from nsrl.runs.report import describe_method
from nsrl.runs.sequences.config import SequenceConfig
from nsrl.runs.sequences.report import draw_sequence, write_sequence_report
from nsrl.runs.sequences.results import continual_results
from nsrl.runs.sequences.stages import (
    SequenceProgress,
    StageFolder,
    largest_share,
    read_curve,
    read_reference,
    reference_folder,
    stage_folders,
)
from nsrl.runs.tasks import check_fits
from nsrl.runs.training import (
    FINAL_SEED,
    Interrupted,
    Outcome,
    Stopwatch,
    check_resumable,
    check_trusted,
    describe_returns,
    train,
)


def learn_sequence(config: SequenceConfig, out: str | Path | None = None, *, progress: bool = False) -> Outcome:
    """Learn a sequence of tasks; nothing is written before all input has been found to be good.

    Args:
        config: everything about the run.
        out: overrides the configuration's output folder.
        progress: show a progress bar on stderr, or lines where that is no terminal.

    Raises:
        NsrlError: bad input.
        Interrupted: Ctrl-C or SIGTERM; `resume_sequence` goes on.
    """
    _check(config)
    name = config.name or f"sequence-{config.labels[-1]}"
    folder = choose_folder("finetune", name, config.out if out is None else out)
    with folder.made():
        folder.write_config(replace(config, out=str(folder.path)))
        return _run(config, folder, progress)


def resume_sequence(path: str | Path, *, trust: bool = False, progress: bool = False) -> Outcome:
    """Go on with an interrupted sequence; everything comes from its folder.

    Args:
        path: the folder.
        trust: unpickle the agent, where the run did; a folder cannot vouch for itself.
        progress: show a progress bar on stderr, or lines where that is no terminal.

    Raises:
        NsrlError: no run there, a finished one, a damaged one, or one that asks for trust.
        Interrupted: as `learn_sequence`.
    """
    folder = RunFolder(given_path(path))
    config = folder.read_config(SequenceConfig)
    check_resumable(folder)
    check_trusted(folder, config, trust)
    with folder.continued():
        check_resumable(folder)
        return _run(config, folder, progress)


def _check(config: SequenceConfig) -> None:
    """Raise NsrlError unless there is a sequence, in equal spaces, that its first agent can act in."""
    if len(config.tasks) < 2:
        raise NsrlError(f"a sequence needs two or more tasks, but tasks has {len(config.tasks)}")
    if config.agent is not None:
        learner: Any = agents.load(config.agent, trust=config.trust).model
    else:
        copies = make_envs(config.tasks[0].env, 1, config.seed)
        copies.close()
        learner = (copies.observation_space, copies.action_space)
    for task in config.tasks:
        check_fits(learner, task.env)


def _run(config: SequenceConfig, folder: RunFolder, progress: bool) -> Outcome:
    """Do what is not done yet, and write down what came out."""
    watch = Stopwatch()
    stages = stage_folders(folder, config)
    try:
        for number, stage in enumerate(stages):
            if not stage.finished:
                _learn(config, folder, stages, number, progress) if number else _begin(config, folder, stage, progress)
        if config.references:
            for task in config.tasks[1:]:
                _train_alone(config.reference(task), reference_folder(folder, task.label), progress)
        metrics = _gather(config, folder, stages)
        metrics |= {"wall_seconds": watch.read(), "environment": describe_environment()}
        draw_sequence(metrics, [{**metrics, "method": describe_method(metrics)}], folder.figure)
        write_sequence_report(folder, metrics)
        write_json(folder.metrics, metrics)
    except Interrupted as stop:
        raise Interrupted(folder.path, stop.exit_status) from stop
    except KeyboardInterrupt as error:
        raise Interrupted(folder.path, 130) from error
    return Outcome(folder, metrics)


def _begin(config: SequenceConfig, folder: RunFolder, stage: StageFolder, progress: bool) -> None:
    """The first task: take its agent as it is, or train it."""
    source = config.agent
    if source is None:
        source = str(folder.pretrained.parent)
        _train_alone(config.first(), RunFolder(folder.pretrained.parent), progress)
    agent = agents.load(source, trust=config.trust)
    model = NullSpacePPO.from_pretrained(agent, make_envs(config.tasks[0].env, config.ppo.n_envs, config.seed))
    stage.path.mkdir(parents=True, exist_ok=True)
    model.export(stage.agent)
    _complete(config, stage, 0, {"start": 0, "end": 0, "seconds": 0.0, "last": None, "retention": None})


def _learn(config: SequenceConfig, folder: RunFolder, stages: list[StageFolder], number: int, progress: bool) -> None:
    """A later task, with the states of all tasks before it protected."""
    before, stage, task = stages[number - 1], stages[number], config.tasks[number]
    settings, start = config.stage(number), before.read_metrics()
    agent = agents.load(before.agent, trust=config.trust)
    model = build_model(settings, agent, _merged(stages[:number]), new_task(settings, agent, task.env))
    model.num_timesteps = start["end"]
    evaluation = TaskEvaluation(
        None,
        {other.label: (other.env, agent.normalizer) for other in config.tasks},
        every=config.evaluation.every,
        episodes=config.evaluation.episodes,
        deterministic=config.evaluation.deterministic,
        history=[start["last"]] if start["last"] else (),
    )
    bar = None
    if progress:
        protected = {label: config.budgets[label] for label in config.labels[:number]}
        bar = SequenceProgress(evaluation, config.labels, number, config.total_timesteps, protected)
    settings = replace(settings, total_timesteps=start["end"] + task.total_timesteps)
    # A checkpoint is there only if this very task was interrupted.
    seconds = train(model, stage, evaluation, settings, resume=True, progress=bar)
    model.export(stage.agent)
    _complete(
        config,
        stage,
        number,
        {
            "start": start["end"],
            "end": int(model.num_timesteps),
            "seconds": seconds,
            "last": evaluation.history[-1],
            "retention": asdict(model.retention_report()),
        },
    )
    stage.checkpoint.unlink(missing_ok=True)


def _complete(config: SequenceConfig, stage: StageFolder, number: int, found: dict[str, Any]) -> None:
    """Collect the states of a task that has been learnt, play all tasks, and mark the stage as complete."""
    task = config.tasks[number]
    agent = agents.load(stage.agent, trust=config.trust)
    states = asdict(config.states)
    envs = make_envs(task.env, states.pop("n_envs"), config.seed)
    try:
        RetentionBuffer.collect(agent, envs, seed=config.seed, task=task.label, **states).save(stage.buffer)
    finally:
        envs.close()
    how: dict[str, Any] = {"episodes": config.evaluation.final_episodes, "seed": FINAL_SEED}
    how["deterministic"] = config.evaluation.deterministic
    returns = {other.label: describe_returns(evaluate(agent, other.env, **how)) for other in config.tasks}
    write_json(stage.metrics, {"task": task.label, "env": task.env, **found, "returns": returns})


def _merged(stages: list[StageFolder]) -> RetentionBuffer:
    return RetentionBuffer.merge([RetentionBuffer.load(stage.buffer) for stage in stages])


def _train_alone(config: PretrainConfig, folder: RunFolder, progress: bool) -> None:
    """Train an agent from scratch, or go on with it, unless it is there."""
    if folder.finished:
        return
    if folder.config.is_file():
        resume_pretraining(folder.path, progress=progress)
    else:
        pretrain(config, folder.path, progress=progress)


def _gather(config: SequenceConfig, folder: RunFolder, stages: list[StageFolder]) -> dict[str, Any]:
    """Agent, states and results of the whole sequence, from its stages."""
    for file in (stages[-1].agent, stages[-1].agent.with_name("vecnormalize.pkl")):
        if file.is_file():
            with written_atomically(folder.path / file.name) as temporary:
                shutil.copyfile(file, temporary)
    buffer = _merged(stages)
    buffer.save(folder.buffer)
    found = [stage.read_metrics() for stage in stages]
    curve = read_curve(folder.history, config.budgets)
    references = {}
    if config.references:
        references = {label: read_reference(reference_folder(folder, label)) for label in config.labels[1:]}
    last = found[-1]["retention"]
    return {
        "command": "sequence",
        "name": config.name or f"sequence-{config.labels[-1]}",
        "algorithm": config.algorithm,
        "method": config.method,
        "penalty": config.penalty if config.method in PENALISED else None,
        "seed": config.seed,
        "timesteps": found[-1]["end"],
        "tasks": [
            {
                "name": task.label,
                "env": task.env,
                "kl_budget": config.budgets[task.label],
                "low": task.low,
                "high": task.high,
                "start": stage["start"],
                "end": stage["end"],
            }
            for task, stage in zip(config.tasks, found, strict=True)
        ],
        "returns": [stage["returns"] for stage in found],
        **continual_results(config, found, curve, references),
        # With the hard null space a single task before the last is not named.
        "kl_by_task": last["kl_by_task"] or {config.labels[0]: last["kl_mean"]},
        "largest_share": largest_share(folder.history, config.budgets),
        "rollbacks": sum(stage["retention"]["rollbacks"] for stage in found[1:]),
        "overhead_fraction": last["overhead_fraction"],
        "buffer": {"states": len(buffer), "heldout": len(buffer.heldout_indices)},
        "curve": curve,
        "training_seconds": found[-1]["seconds"],
    }
