"""Fine-tuning as a run: from a configuration to a folder with agent, buffer, curves, metrics and report."""

from __future__ import annotations

import shutil
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

from stable_baselines3.common.vec_env import VecEnv
from torch.distributed import is_initialized

from nsrl.errors import NsrlError
from nsrl.files import given_path, read_lines, write_json, written_atomically
from nsrl.rl import agents
from nsrl.rl.agents.agent import Agent
from nsrl.rl.agents.normalization import RetainingVecNormalize
from nsrl.rl.algorithms.ppo import NullSpacePPO
from nsrl.rl.algorithms.trpo import NullSpaceTRPO
from nsrl.rl.budget.baselines import PENALISED
from nsrl.rl.parallel.ranks import Ranks, started_together
from nsrl.rl.parallel.shared_envs import SharedEnvs
from nsrl.rl.playing.evaluation import play
from nsrl.rl.retention.buffer import RetentionBuffer
from nsrl.rl.retention.states import RetainedStates
from nsrl.rl.training.callbacks import TaskEvaluation
from nsrl.rl.training.progress import FineTuningProgress
from nsrl.rl.training.refresh import BufferRefresh
from nsrl.rl.training.selection import Selection
from nsrl.runs.collecting import obtain_buffer
from nsrl.runs.config import FinetuneConfig
from nsrl.runs.figures import curve_from_history, draw_curves, first_returns
from nsrl.runs.folder import RunFolder, choose_folder, slug
from nsrl.runs.hyperparameters import chosen
from nsrl.runs.machine import describe_environment
from nsrl.runs.memory import check_rollout
from nsrl.runs.report import describe_method, write_finetuning_report
from nsrl.runs.tasks import Tasks, check_copies, open_envs, resolve_tasks, with_context
from nsrl.runs.training import (
    FINAL_SEED,
    Interrupted,
    Outcome,
    Stopwatch,
    check_resumable,
    check_trusted,
    describe_returns,
    tell_beginning,
    train,
)

Model = NullSpacePPO | NullSpaceTRPO


def finetune(config: FinetuneConfig, out: str | Path | None = None, *, progress: bool = False) -> Outcome:
    """Fine-tune a pretrained agent; nothing is written before all input has been found to be good.

    Args:
        config: everything about the run.
        out: overrides the configuration's output folder.
        progress: show a progress bar on stderr, or lines where that is no terminal.

    Raises:
        NsrlError: bad input.
        Interrupted: Ctrl-C or SIGTERM; `resume_finetuning` goes on.
    """
    tasks = resolve_tasks(config)
    folder = choose_folder("finetune", tasks.name, config.out if out is None else out)
    if config.agent is None:
        raise NsrlError("no agent: set agent to an SB3 zip or a run folder, as `nsrl pretrain` makes one")
    given = agents.load(config.agent, trust=config.trust)
    envs = open_new_task(config, given, tasks.new)
    agent = with_context(config, given, envs)
    check_copies(agent.model, tasks.new, envs)
    buffer = obtain_buffer(config, agent, tasks.old, given)
    model = build_model(config, agent, buffer, envs)
    with folder.made():
        _save_agent(agent, folder.pretrained)
        buffer.save(folder.buffer)
        folder.write_config(replace(config, out=str(folder.path)))
        return _run(config, tasks, folder, agent, model, progress=progress, resume=False)


def resume_finetuning(path: str | Path, *, trust: bool = False, progress: bool = False) -> Outcome:
    """Go on with an interrupted run from its last checkpoint; everything comes from its folder.

    Args:
        path: the folder.
        trust: unpickle the agent, where the run did; a folder cannot vouch for itself.
        progress: show a progress bar on stderr, or lines where that is no terminal.

    Raises:
        NsrlError: no run there, a finished one, a damaged one, or one that asks for trust.
        Interrupted: as `finetune`.
    """
    folder = RunFolder(given_path(path))
    config = folder.read_config(FinetuneConfig)
    check_resumable(folder)
    check_trusted(folder, config, trust)
    tasks = resolve_tasks(config)
    with folder.continued():
        check_resumable(folder)
        tell_beginning(folder)
        agent = agents.load(folder.pretrained, trust=config.trust)
        envs = new_task(config, agent, tasks.new)
        model = build_model(config, agent, RetentionBuffer.load(folder.buffer), envs)
        return _run(config, tasks, folder, agent, model, progress=progress, resume=True)


def new_task(config: FinetuneConfig, agent: Agent, env: str) -> VecEnv:
    """The copies of the new task that a run learns on; with torchrun, those of all processes (`nsrl.runs.parallel`).

    Raises:
        NsrlError: it cannot be made, or its spaces are not the agent's.
    """
    envs = open_new_task(config, agent, env)
    check_copies(agent.model, env, envs)
    return envs


def open_new_task(config: FinetuneConfig, agent: Agent, env: str) -> VecEnv:
    """The same, whatever their spaces are.

    Raises:
        NsrlError: it cannot be made.
    """
    settings = chosen(config.algorithm, config.ppo, config.trpo)
    n_steps = settings.get("n_steps", agent.hyperparameters.get("n_steps"))
    ranks = Ranks() if started_together() > 1 and is_initialized() else None
    check_rollout(agent.model.observation_space, settings["n_envs"] * (1 if ranks is None else ranks.count), n_steps)
    if ranks is None:
        return open_envs(env, settings["n_envs"], config.seed)
    first = ranks.number * settings["n_envs"]
    return SharedEnvs(open_envs(env, settings["n_envs"], config.seed + first), ranks)


def build_model(config: FinetuneConfig, agent: Agent, buffer: RetentionBuffer, envs: VecEnv) -> Model:
    """The model of a run before its first step.

    Args:
        config: of the run.
        agent: that it begins with.
        buffer: that it is held to.
        envs: as `new_task` makes them; put inside a VecNormalize where the agent has statistics.

    Raises:
        NsrlError: spaces or buffer do not fit the agent, or a setting is out of range.
    """
    overrides = chosen(config.algorithm, config.ppo, config.trpo)
    del overrides["n_envs"]
    if agent.normalizer is not None:
        gamma = overrides.get("gamma", agent.hyperparameters.get("gamma", 0.99))
        envs = RetainingVecNormalize(envs, agent.normalizer, gamma=gamma)
    retention = replace(config.retention, seed=config.seed)
    algorithm = NullSpacePPO if config.algorithm == "ppo" else NullSpaceTRPO
    return algorithm.from_pretrained(
        agent,
        envs,
        retain=buffer,
        config=retention,
        method=config.method,
        penalty=config.penalty,
        trust_buffer=config.trust_buffer,
        seed=config.seed,
        **overrides,
    )


def _run(
    config: FinetuneConfig, tasks: Tasks, folder: RunFolder, agent: Agent, model: Model, *, progress: bool, resume: bool
) -> Outcome:
    """Train and write down what came out."""
    watch = Stopwatch()
    old = slug(tasks.old)
    settings = config.evaluation
    evaluation = TaskEvaluation(
        (tasks.new, agent.normalizer),
        {old: (tasks.old, agent.normalizer)},
        every=settings.every,
        episodes=settings.episodes,
        deterministic=settings.deterministic,
    )
    bar = FineTuningProgress(evaluation) if progress else None
    try:
        before = _measure(config, tasks, agent, model)  # not restored yet
        # baselines are compared as they end: what they would not choose themselves, the floor must not choose for them
        best = settings.choose == "best" and config.method == "null_space"
        selection = Selection(evaluation, folder.best, settings.floor) if best else None
        refresh = None
        if config.refresh_every is not None:
            refresh = BufferRefresh(
                tasks.old, agent, every=config.refresh_every, states=config.refresh_states, seed=config.seed
            )
        seconds = train(
            model, folder, evaluation, config, resume=resume, progress=bar, selection=selection, refresh=refresh
        )
        chosen = int(model.num_timesteps) if selection is None else selection.give_back(model)
        metrics: dict[str, Any] = {
            "command": "finetune",
            "name": tasks.name,
            "old_env": tasks.old,
            "new_env": tasks.new,
            "algorithm": config.algorithm,
            "method": config.method,
            "penalty": config.penalty if config.method in PENALISED else None,
            "kl_budget": config.retention.kl_budget,
            "seed": config.seed,
            "timesteps": int(model.num_timesteps),
            "chosen": chosen,
            "before": before,
            "after": _measure(config, tasks, agent, model),
            "told": _is_told(model_buffer(model)),
            "buffer": {"states": len(model_buffer(model)), "heldout": len(model_buffer(model).heldout_indices)},
            "retention": asdict(model.retention_report()),
            "training_seconds": seconds,
        }
        model.export(folder.agent)
        metrics["wall_seconds"] = watch.read()
        metrics["environment"] = describe_environment()
        draw_finetuning(folder, metrics)
        write_finetuning_report(folder, metrics)
        write_json(folder.metrics, metrics)
    except KeyboardInterrupt as error:
        raise Interrupted(folder.path, 130) from error
    folder.checkpoint.unlink(missing_ok=True)
    return Outcome(folder, metrics)


def _is_told(buffer: RetainedStates) -> bool:
    """Whether an input that never moves on the old task may tell the tasks apart; True for what is no vector."""
    seen = buffer.observations
    return isinstance(seen, dict) or seen.ndim != 2 or bool((seen == seen[:1]).all(0).any())


def model_buffer(model: Model) -> RetainedStates:
    """The buffer that a model is held to."""
    assert model.retention is not None
    return model.retention.constraint.buffer


def draw_finetuning(folder: RunFolder, metrics: dict[str, Any]) -> Path:
    """The learning curves of a run."""
    curve = curve_from_history(describe_method(metrics), read_lines(folder.history), ("old", "new"))
    return draw_curves(
        [curve],
        folder.figure,
        tasks=[("old", f"old task: {metrics['old_env']}"), ("new", f"new task: {metrics['new_env']}")],
        budget=metrics["kl_budget"] if metrics["method"] == "null_space" else None,
        references=first_returns(curve),
    )


def _measure(config: FinetuneConfig, tasks: Tasks, agent: Agent, model: Model) -> dict[str, Any]:
    """What a policy does on both tasks, and how far it is from the reference."""
    settings = config.evaluation
    found: dict[str, Any] = {}
    for key, env in (("old_return", tasks.old), ("new_return", tasks.new)):
        found[key] = describe_returns(
            play(
                model,
                env,
                agent.normalizer,
                episodes=settings.final_episodes,
                seed=FINAL_SEED,
                deterministic=settings.deterministic,
            )
        )
    assert model.retention is not None
    return {**found, **asdict(model.retention.constraint.measure())}


def _save_agent(agent: Agent, path: Path) -> None:
    """Copy the agent's zip, or save the model that was given, with the statistics beside it."""
    if agent.path is not None:
        with written_atomically(path) as temporary:
            shutil.copyfile(agent.path, temporary)
    else:
        agents.save_agent(agent.model, path)
    if agent.normalizer is not None:
        agent.normalizer.save(path.with_name("vecnormalize.npz"))
