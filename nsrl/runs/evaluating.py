"""Playing a finished agent: its returns, and its KL on a retention buffer."""

from __future__ import annotations

from dataclasses import asdict
from typing import Any

from nsrl.errors import NsrlError
from nsrl.files import write_json
from nsrl.rl import agents
from nsrl.rl.playing.evaluation import evaluate
from nsrl.rl.retention.constraint import RetentionConstraint
from nsrl.runs.collecting import read_buffer
from nsrl.runs.config import EvaluateConfig
from nsrl.runs.folder import choose_folder
from nsrl.runs.machine import describe_environment
from nsrl.runs.tasks import check_fits, resolve_tasks
from nsrl.runs.training import FINAL_SEED, describe_returns


def play(config: EvaluateConfig) -> dict[str, Any]:
    """Play an agent on one task or on a pair; writes a folder only if the configuration names one.

    Returns:
        Plain JSON: `returns` by environment id, and with a buffer `retention`.

    Raises:
        NsrlError: bad input.
    """
    if config.agent is None:
        raise NsrlError("no agent: set agent to an SB3 zip or a run folder")
    envs = task_ids(config)
    folder = None if config.out is None else choose_folder("evaluate", "agent", config.out)
    agent = agents.load(config.agent, trust=config.trust)
    for env in envs:
        check_fits(agent.model, env)
    metrics: dict[str, Any] = {"command": "evaluate", "deterministic": config.deterministic, "seed": config.seed}
    if config.buffer is not None:
        # Comparing with another agent's buffer is what this is for: a fine-tuned agent against the pretrained one.
        buffer = read_buffer(config.buffer, agent, trust_agent=True)
        measured = RetentionConstraint(agent.model.policy, buffer).measure()  # type: ignore[arg-type]
        metrics["retention"] = {**asdict(measured), "states": len(buffer)}
    how: dict[str, Any] = {"episodes": config.episodes, "seed": FINAL_SEED + config.seed}
    how["deterministic"] = config.deterministic
    metrics["returns"] = {env: describe_returns(evaluate(agent, env, **how)) for env in envs}
    metrics["environment"] = describe_environment()
    if folder is not None:
        with folder.made(folder.metrics):
            folder.write_config(config)
            write_json(folder.metrics, metrics)
    return metrics


def task_ids(config: EvaluateConfig) -> list[str]:
    """The environments that a configuration names.

    Raises:
        NsrlError: none, or both an environment and a pair.
    """
    if config.env is not None and config.pair is not None:
        raise NsrlError("env and pair are both set; use one or the other")
    if config.env is not None:
        return [config.env]
    if config.pair is None:
        raise NsrlError("no task: set env (as in --env nsrl/CartPole-v0) or pair (as in --pair cartpole_swapped)")
    tasks = resolve_tasks(config)
    return [tasks.old, tasks.new]
