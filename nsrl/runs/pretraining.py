"""Pretraining as a run: stock PPO from scratch, into a folder that fine-tuning takes as its agent."""

from __future__ import annotations

from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

from stable_baselines3 import PPO
from stable_baselines3.common.vec_env import VecNormalize

from nsrl.errors import NsrlError
from nsrl.files import given_path, read_lines, write_json
from nsrl.rl import agents
from nsrl.rl.agents.normalization import ObservationNormalizer
from nsrl.rl.playing.environments import make_envs
from nsrl.rl.playing.evaluation import evaluate
from nsrl.rl.training.callbacks import TaskEvaluation
from nsrl.rl.training.progress import FineTuningProgress
from nsrl.rl.training.selection import Selection
from nsrl.runs.config import PretrainConfig
from nsrl.runs.figures import curve_from_history, draw_curves
from nsrl.runs.folder import RunFolder, choose_folder, slug
from nsrl.runs.machine import describe_environment
from nsrl.runs.memory import ENVIRONMENT, check_memory, check_rollout
from nsrl.runs.packaged import CONFIGS, packaged_names
from nsrl.runs.report import write_pretraining_report
from nsrl.runs.settings import load, read_yaml
from nsrl.runs.training import (
    FINAL_SEED,
    Interrupted,
    Outcome,
    Stopwatch,
    check_resumable,
    describe_returns,
    tell_beginning,
    train,
)


class MovingNormalizer:
    """The statistics of a VecNormalize as they are at the moment; they move while an agent is trained from scratch.

    Args:
        around: the VecNormalize of the training environment.
    """

    def __init__(self, around: VecNormalize):
        self.around = around

    def freeze(self) -> ObservationNormalizer:
        """A copy of the statistics of this moment."""
        frozen = ObservationNormalizer.from_vec_normalize(self.around)
        assert frozen is not None
        return frozen

    def normalize(self, obs: Any) -> Any:
        """As `ObservationNormalizer.normalize`."""
        return self.freeze().normalize(obs)

    def check(self, space: Any) -> None:
        """As `ObservationNormalizer.check`."""
        self.freeze().check(space)


class LearningProgress(FineTuningProgress):
    """The progress line of a run with one task."""

    def state(self) -> str:
        """The return as it was last measured."""
        history = self.evaluation.history if self.evaluation is not None else []
        return f"return {history[-1]['new_return']:.1f}" if history else ""


def pretrain(config: PretrainConfig, out: str | Path | None = None, *, progress: bool = False) -> Outcome:
    """Train an agent from scratch; nothing is written before all input has been found to be good.

    Args:
        config: everything about the run.
        out: overrides the configuration's output folder.
        progress: show a progress bar on stderr, or lines where that is no terminal.

    Raises:
        NsrlError: bad input.
        Interrupted: Ctrl-C or SIGTERM; `resume_pretraining` goes on.
    """
    if config.env is None:
        raise NsrlError("no environment: set env, as in --env nsrl/CartPole-v0")
    folder = choose_folder("pretrain", config.name or slug(config.env), config.out if out is None else out)
    model = build_learner(config)
    with folder.made():
        folder.write_config(replace(config, out=str(folder.path)))
        return _run(config, folder, model, progress=progress, resume=False)


def resume_pretraining(path: str | Path, *, progress: bool = False) -> Outcome:
    """Go on with an interrupted run from its last checkpoint; everything comes from its folder.

    Raises:
        NsrlError: no run there, a finished one, or a damaged one.
        Interrupted: as `pretrain`.
    """
    folder = RunFolder(given_path(path))
    config = folder.read_config(PretrainConfig)
    check_resumable(folder)
    with folder.continued():
        check_resumable(folder)
        tell_beginning(folder)
        return _run(config, folder, build_learner(config), progress=progress, resume=True)


def obtain_agent(config: PretrainConfig, folder: RunFolder, *, progress: bool = False) -> RunFolder:
    """The folder, once its run is finished: a run that is missing is made, one that was interrupted is gone on with.

    Raises:
        NsrlError: as `pretrain` and `resume_pretraining`.
        Interrupted: asking again goes on with it.
    """
    if not folder.finished:
        if folder.config.is_file():
            resume_pretraining(folder.path, progress=progress)
        else:
            pretrain(config, folder.path, progress=progress)
    return folder


def packaged_maker(agent: str) -> PretrainConfig | None:
    """The packaged configuration whose run makes the agent in a folder, None where none does or the folder has it.

    Args:
        agent: the folder, as a fine-tuning configuration names it.
    """
    folder = RunFolder(given_path(agent))
    if folder.path.exists() and (folder.agent.is_file() or not folder.config.is_file()):
        return None
    paths = (CONFIGS / f"{name}.yaml" for name in packaged_names())
    return next((load(PretrainConfig, path) for path in paths if read_yaml(path).get("out") == agent), None)


def build_learner(config: PretrainConfig) -> PPO:
    """The model of a run before its first step.

    Raises:
        NsrlError: unknown environment, or a policy that does not fit it.
    """
    assert config.env is not None
    settings = asdict(config.ppo)
    n_envs = settings.pop("n_envs")
    check_memory(f"ppo.n_envs {n_envs}", n_envs * ENVIRONMENT)
    envs: Any = make_envs(config.env, n_envs, config.seed)
    check_rollout(envs.observation_space, n_envs, config.ppo.n_steps)
    if config.normalize:
        envs = VecNormalize(envs, gamma=config.ppo.gamma)
    kwargs = {"net_arch": list(config.policy.hidden), "log_std_init": config.policy.log_std_init}
    try:
        return PPO(config.policy.kind, envs, policy_kwargs=kwargs, seed=config.seed, device="cpu", **settings)
    except (AssertionError, AttributeError, ValueError) as error:
        raise NsrlError(f"PPO with {config.policy.kind} cannot be built for {config.env}: {error}") from error


def moving_normalizer(model: PPO) -> Any:
    """The observation statistics around a model's environment, None where there are none."""
    around = model.get_vec_normalize_env()
    return None if around is None else MovingNormalizer(around)


def _run(config: PretrainConfig, folder: RunFolder, model: PPO, *, progress: bool, resume: bool) -> Outcome:
    """Train and write down what came out."""
    assert config.env is not None
    watch = Stopwatch()
    settings = config.evaluation
    task = (config.env, moving_normalizer(model))
    evaluation = TaskEvaluation(
        task, every=settings.every, episodes=settings.episodes, deterministic=settings.deterministic
    )
    bar = LearningProgress(evaluation, "pretraining") if progress else None
    try:
        before = _measure(config, model)
        best = settings.choose == "best" and not config.normalize  # the statistics of then are not kept
        selection = Selection(evaluation, folder.best) if best else None
        seconds = train(model, folder, evaluation, config, resume=resume, progress=bar, selection=selection)
        chosen = int(model.num_timesteps) if selection is None else selection.give_back(model)
        metrics = {
            "command": "pretrain",
            "name": config.name or config.env,
            "env": config.env,
            "seed": config.seed,
            "timesteps": int(model.num_timesteps),
            "chosen": chosen,
            "before": before,
            "after": _measure(config, model),
            "training_seconds": seconds,
        }
        agents.export(model, folder.agent)
        metrics |= {"wall_seconds": watch.read(), "environment": describe_environment()}
        curve = curve_from_history("PPO", read_lines(folder.history), ("new",))
        draw_curves([curve], folder.figure, tasks=[("new", config.env)])
        write_pretraining_report(folder, metrics)
        write_json(folder.metrics, metrics)
    except KeyboardInterrupt as error:
        raise Interrupted(folder.path, 130) from error
    folder.checkpoint.unlink(missing_ok=True)
    return Outcome(folder, metrics)


def _measure(config: PretrainConfig, model: PPO) -> dict[str, Any]:
    settings = config.evaluation
    assert config.env is not None
    found = evaluate(
        model,
        config.env,
        normalizer=moving_normalizer(model),
        episodes=settings.final_episodes,
        seed=FINAL_SEED,
        deterministic=settings.deterministic,
    )
    return {"return": describe_returns(found)}
