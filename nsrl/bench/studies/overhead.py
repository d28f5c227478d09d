"""What the budget costs: time of a whole fine-tuning run against stock PPO's, interleaved, and peak memory."""

from __future__ import annotations

import importlib.util
import inspect
import json
import resource
import statistics
import subprocess
import sys
from collections.abc import Callable
from dataclasses import asdict
from pathlib import Path
from tempfile import TemporaryDirectory
from time import perf_counter, process_time
from typing import Any

from nsrl.bench.lifeline import end_with_starter, lifeline
from nsrl.runs.config import FinetuneConfig
from nsrl.runs.machine import describe_environment


def measure_overhead(
    config: FinetuneConfig,
    agent: Path,
    *,
    repeats: int = 3,
    steps: int | None = None,
    on_run: Callable[[str, float], Any] | None = None,
) -> dict[str, Any]:
    """Fine-tune with stock PPO and with NullSpacePPO in turn, in this process, same tasks and settings.

    A run is loading the agent, building the model and learning; neither evaluates nor writes anything. NullSpacePPO is
    as it comes: opened, confined and fused, where the configuration does not say otherwise. Stock PPO has the
    environments that Stable-Baselines3 makes of an id, NullSpacePPO those that nsrl makes: the same steps, bit for bit,
    but as arrays where the task is known.

    PPO of sbx-rl (JAX; the extra `sbx`) takes its turn too where it is installed: on stock's environments, with the
    settings that it has in common with stock's, from fresh weights of the same sizes. Compiling is part of its runs.

    Args:
        config: of the fine-tuning run.
        agent: the pretrained agent.
        repeats: runs of each; the ratio is that of the medians.
        steps: instead of the configuration's.
        on_run: called with the name and the seconds of every run.

    Returns:
        Of each run, by name, its wall time in `seconds` and the processor's in `processor_seconds`; the ratio of their
        medians, ours over stock's, `ratio` and `processor_ratio`, the latter for machines that others use, too; of the
        last run of ours `share_of_run`, what each stage of the constraint took of its wall time, the opening with the
        steps that it makes, and `constraint_share`, all of them together; and `sbx`, the same times of sbx-rl's runs
        and ratios of ours over them, None where it is not installed.
    """
    from nsrl.rl import agents
    from nsrl.runs.collecting import obtain_buffer
    from nsrl.runs.tasks import resolve_tasks

    tasks = resolve_tasks(config)
    loaded = agents.load(agent)
    buffer = obtain_buffer(config, loaded, tasks.old)
    seconds: dict[str, list[float]] = {"stock": [], "null_space": [], **({"sbx": []} if has_sbx() else {})}
    processor: dict[str, list[float]] = {name: [] for name in seconds}
    split: dict[str, float] = {}
    for _ in range(repeats):
        for name in seconds:
            start, busy = perf_counter(), process_time()
            model = _run(name, config, agent, buffer, tasks.new, steps or config.total_timesteps)
            seconds[name].append(perf_counter() - start)
            processor[name].append(process_time() - busy)
            if name == "null_space":
                split = {stage: spent / seconds[name][-1] for stage, spent in _stages(model).items()}
            if on_run is not None:
                on_run(name, seconds[name][-1])
    theirs = {"seconds": seconds.pop("sbx", []), "processor_seconds": processor.pop("sbx", [])}
    rival = None
    if theirs["seconds"]:
        rival = {
            **theirs,
            "ratio": _over(seconds["null_space"], theirs["seconds"]),
            "processor_ratio": _over(processor["null_space"], theirs["processor_seconds"]),
        }
    return {
        "pair": tasks.name,
        "steps": steps or config.total_timesteps,
        "seconds": seconds,
        "processor_seconds": processor,
        "ratio": _over(seconds["null_space"], seconds["stock"]),
        "processor_ratio": _over(processor["null_space"], processor["stock"]),
        "sbx": rival,
        "share_of_run": split,
        "constraint_share": sum(split.values()),
        "environment": describe_environment(),
    }


def has_sbx() -> bool:
    """Whether sbx-rl is installed."""
    return importlib.util.find_spec("sbx") is not None


def _over(ours: list[float], theirs: list[float]) -> float:
    """Ratio of their medians."""
    return statistics.median(ours) / statistics.median(theirs)


def _stages(model: Any) -> dict[str, float]:
    """Seconds that a protected model has spent on its constraint, by stage."""
    opening = model.retention.opening.record
    return {**model.retention.seconds, "opening": 0.0 if opening is None else opening.seconds}


def measure_memory(config_path: Path, agent: Path, steps: int) -> dict[str, Any]:
    """Peak resident memory of both, each in a process of its own, in MB, over the same short run.

    The buffer is collected beforehand; the process of NullSpacePPO loads it, that of stock PPO does without.
    """
    from nsrl.rl import agents
    from nsrl.runs.collecting import obtain_buffer
    from nsrl.runs.settings import load
    from nsrl.runs.tasks import resolve_tasks

    peaks = {}
    config = load(FinetuneConfig, config_path)
    with TemporaryDirectory() as folder:
        buffer = Path(folder) / "retention.npz"
        obtain_buffer(config, agents.load(agent), resolve_tasks(config).old).save(buffer)
        for name in ("stock", "null_space"):
            command = [
                sys.executable,
                "-m",
                "nsrl.bench.studies.overhead",
                name,
                str(config_path),
                str(agent),
                str(buffer),
                str(steps),
            ]
            with lifeline() as stdin:
                done = subprocess.run(command, check=True, capture_output=True, text=True, stdin=stdin)
            peaks[name] = json.loads(done.stdout.strip().splitlines()[-1])["peak_mb"]
    return {"peak_mb": peaks, "constraint_mb": peaks["null_space"] - peaks["stock"], "steps": steps}


def _run(name: str, config: FinetuneConfig, agent: Path, buffer: Any, new_env: str, steps: int) -> Any:
    """The model behind its run."""
    from nsrl.rl import agents
    from nsrl.runs.finetuning import build_model, new_task

    loaded = agents.load(agent)
    if name == "null_space":
        model = build_model(config, loaded, buffer, new_task(config, loaded, new_env))
        return model.learn(steps)
    build = _sbx_model if name == "sbx" else _stock_model
    return build(config, loaded, new_env).learn(steps)


def _stock_model(config: FinetuneConfig, loaded: Any, new_env: str) -> Any:
    """Stock PPO with the agent's weights, on the same task and with the same settings."""
    from stable_baselines3 import PPO

    envs, settings = _stock_task(config, loaded, new_env)
    policy_kwargs = settings.pop("policy_kwargs", loaded.model.policy_kwargs)
    stock = PPO(
        loaded.model.policy_class, envs, policy_kwargs=policy_kwargs, seed=config.seed, device="cpu", **settings
    )
    stock.policy.load_state_dict(loaded.model.policy.state_dict())
    return stock


def _sbx_model(config: FinetuneConfig, loaded: Any, new_env: str) -> Any:
    """PPO of sbx-rl on the same task, with hidden layers of the agent's sizes and the settings that it knows."""
    from sbx import PPO
    from torch import nn

    envs, settings = _stock_task(config, loaded, new_env)
    known = inspect.signature(PPO.__init__).parameters
    hidden = [layer.out_features for layer in loaded.model.policy.mlp_extractor.policy_net if type(layer) is nn.Linear]
    given = {key: value for key, value in settings.items() if key in known and key != "policy_kwargs"}
    return PPO("MlpPolicy", envs, policy_kwargs={"net_arch": hidden}, seed=config.seed, **given)


def _stock_task(config: FinetuneConfig, loaded: Any, new_env: str) -> tuple[Any, dict[str, Any]]:
    """Environments as Stable-Baselines3 makes them of an id, stepped one by one; the agent's settings and the run's."""
    from stable_baselines3.common.env_util import make_vec_env

    from nsrl.rl.agents.normalization import RetainingVecNormalize

    overrides = {key: value for key, value in asdict(config.ppo).items() if value is not None}
    envs: Any = make_vec_env(new_env, overrides.pop("n_envs"), seed=config.seed)
    settings = {**loaded.hyperparameters, **overrides}
    if loaded.normalizer is not None:
        envs = RetainingVecNormalize(envs, loaded.normalizer, gamma=settings["gamma"])
    return envs, settings


def main(arguments: list[str]) -> int:
    """The process of one memory measurement: NAME CONFIG AGENT BUFFER STEPS."""
    from nsrl.rl.retention.buffer import RetentionBuffer
    from nsrl.runs.settings import load
    from nsrl.runs.tasks import resolve_tasks
    from nsrl.runs.training import use_one_thread

    name, config_path, agent, buffer_path, steps = arguments
    use_one_thread()
    config = load(FinetuneConfig, config_path)
    buffer = RetentionBuffer.load(buffer_path) if name == "null_space" else None
    _run(name, config, Path(agent), buffer, resolve_tasks(config).new, int(steps))
    print(json.dumps({"peak_mb": _peak_mb()}))
    return 0


def _peak_mb() -> float:
    """Peak resident memory of this process in MB."""
    status = Path("/proc/self/status")
    if status.is_file():
        # Not ru_maxrss: on Linux a child starts with its parent's.
        line = next(line for line in status.read_text().splitlines() if line.startswith("VmHWM"))
        return int(line.split()[1]) / 1024
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**20


if __name__ == "__main__":
    end_with_starter()
    sys.exit(main(sys.argv[1:]))
