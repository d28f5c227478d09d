"""Retention buffers as runs: collected into a folder, or found where a configuration says."""

from __future__ import annotations

from dataclasses import asdict, replace
from typing import Any

from nsrl.errors import NsrlError
from nsrl.files import given_path, write_json, write_text
from nsrl.rl import agents
from nsrl.rl.agents.agent import Agent
from nsrl.rl.retention.buffer import RetentionBuffer
from nsrl.runs.config import CollectConfig, FinetuneConfig
from nsrl.runs.folder import choose_folder
from nsrl.runs.machine import describe_environment
from nsrl.runs.memory import check_memory, observation_bytes
from nsrl.runs.settings import to_yaml
from nsrl.runs.tasks import make_envs
from nsrl.runs.training import Outcome, Stopwatch


def collect(config: CollectConfig, *, progress: Any = None) -> Outcome:
    """Collect a buffer into a fresh folder; nothing is written before it is complete.

    Args:
        config: everything about the run.
        progress: called with (transitions so far, total).

    Raises:
        NsrlError: bad input.
    """
    watch = Stopwatch()
    if config.agent is None or config.env is None:
        missing = "agent" if config.agent is None else "env"
        raise NsrlError(f"no {missing}: give the agent and the environment that it is good at")
    folder = choose_folder("collect", config.name or config.env, config.out)
    agent = agents.load(config.agent, trust=config.trust)
    buffer = collect_buffer(config, agent, config.env, progress)
    metrics = {
        "command": "collect",
        "states": len(buffer),
        "heldout": len(buffer.heldout_indices),
        "family": buffer.family,
        "digest": buffer.digest(),
        "provenance": buffer.provenance,
        "wall_seconds": watch.read(),
        "environment": describe_environment(),
    }
    with folder.made(folder.metrics):
        buffer.save(folder.buffer)
        write_text(folder.config, to_yaml(replace(config, out=str(folder.path))))
        write_json(folder.metrics, metrics)
    return Outcome(folder, metrics)


def obtain_buffer(config: FinetuneConfig, agent: Agent, old_env: str) -> RetentionBuffer:
    """The buffer that a fine-tuning run names, or a fresh one.

    Raises:
        NsrlError: missing or damaged file, other spaces, or another agent's buffer.
    """
    if config.buffer is None:
        return collect_buffer(config, agent, old_env)
    return read_buffer(config.buffer, agent, trust_agent=config.trust_buffer)


def read_buffer(path: str, agent: Agent, *, trust_agent: bool) -> RetentionBuffer:
    """Load a buffer from its npz or from the run folder that holds it, and check it against the agent."""
    file = given_path(path)
    file = file / "retention.npz" if file.is_dir() else file
    buffer = RetentionBuffer.load(file)
    try:
        buffer.check(agent, trust_agent=trust_agent)
    except NsrlError as error:
        raise NsrlError(f"{file}: {error}") from error
    return buffer


def collect_buffer(
    config: CollectConfig | FinetuneConfig, agent: Agent, env: str, progress: Any = None
) -> RetentionBuffer:
    """Roll the agent out as the configuration says."""
    settings = asdict(config.states)
    each = observation_bytes(agent.model.observation_space)
    check_memory(
        f"states.n_states {config.states.n_states} with states.oversample {config.states.oversample:g}",
        config.states.n_states * max(config.states.oversample, 1.0) * each,
    )
    envs = make_envs(env, settings.pop("n_envs"), config.seed)
    try:
        return RetentionBuffer.collect(agent, envs, seed=config.seed, task=env, progress=progress, **settings)
    finally:
        envs.close()
