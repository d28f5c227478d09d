"""Retention buffers as runs: collected into a folder, or found where a configuration says."""

from __future__ import annotations

from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

from nsrl.errors import NsrlError
from nsrl.files import given_path, write_json
from nsrl.rl import agents
from nsrl.rl.agents.agent import Agent
from nsrl.rl.playing.environments import as_vec_env
from nsrl.rl.retention.buffer import RetentionBuffer
from nsrl.rl.retention.collection import CollectionConfig, registered_id, visited_states
from nsrl.rl.surgery.surgery import widen_buffer
from nsrl.runs.config import CollectConfig, FinetuneConfig
from nsrl.runs.folder import choose_folder
from nsrl.runs.machine import describe_environment
from nsrl.runs.memory import check_memory, observation_bytes
from nsrl.runs.tasks import check_fits, fitting_envs
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
        folder.write_config(replace(config, out=str(folder.path)))
        write_json(folder.metrics, metrics)
    return Outcome(folder, metrics)


def obtain_buffer(config: FinetuneConfig, agent: Agent, old_env: str, given: Agent | None = None) -> RetentionBuffer:
    """The buffer that a fine-tuning run names, or a fresh one.

    Args:
        config: of the run.
        agent: that it is for.
        old_env: id of the task that it is good at.
        given: the agent before it had a context; a buffer of this one gets that, too, which says 0.

    Raises:
        NsrlError: missing or damaged file, spaces that are not the agent's, or another agent's buffer.
    """
    if config.buffer is None:
        return collect_buffer(config, agent, old_env)
    check_fits(agent.model, old_env)
    if given is not None and given is not agent:
        narrow: Any = given.model.observation_space
        states = RetentionBuffer.load(buffer_file(config.buffer)).observations
        if not isinstance(states, dict) and states.shape[1:] == narrow.shape:
            return widen_buffer(read_buffer(config.buffer, given, trust_agent=config.trust_buffer), agent)
    return read_buffer(config.buffer, agent, trust_agent=config.trust_buffer)


def read_buffer(path: str, agent: Agent, *, trust_agent: bool) -> RetentionBuffer:
    """Load a buffer from its npz or from the run folder that holds it, and check it against the agent.

    Raises:
        NsrlError: missing, damaged, or of another agent.
    """
    file = buffer_file(path)
    buffer = RetentionBuffer.load(file)
    try:
        buffer.check(agent, trust_agent=trust_agent)
    except NsrlError as error:
        raise NsrlError(f"{file}: {error}") from error
    return buffer


def buffer_file(path: str) -> Path:
    """Where a buffer is: the file itself, or that of a run folder."""
    file = given_path(path)
    return file / "retention.npz" if file.is_dir() else file


def collect_buffer(
    config: CollectConfig | FinetuneConfig, agent: Agent, env: str, progress: Any = None
) -> RetentionBuffer:
    """Roll the agent out as the configuration says.

    Raises:
        NsrlError: the environment cannot be made, has other spaces than the agent, or a setting is out of range.
    """
    wanted = CollectionConfig(**asdict(config.states), seed=config.seed, task=env)
    each = observation_bytes(agent.model.observation_space)
    check_memory(
        f"states.n_states {wanted.n_states} with states.oversample {wanted.oversample:g}",
        wanted.n_states * max(wanted.oversample, 1.0) * each,
    )
    envs = as_vec_env(fitting_envs(agent.model, env, wanted.n_envs, config.seed), wanted.n_envs)
    known = agent.model, agent.normalizer, None if agent.path is None else agent.path.name
    try:
        return RetentionBuffer(**visited_states(known, envs, wanted, registered_id(envs), progress))
    finally:
        envs.close()
