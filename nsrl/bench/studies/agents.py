"""Agents as their owners saved them: loaded, collected from, fine-tuned, exported, played by stock SB3 and rl_zoo3.

What a folder of public agents holds is taken as it is: zips of any age beside VecNormalize pickles and rl-zoo's
settings, whose environments may have other versions by now. Nothing in the folder is written to, and no code in it is
run.
"""

from __future__ import annotations

import importlib
import time
import warnings
from collections.abc import Callable, Sequence
from concurrent.futures import Future, as_completed
from dataclasses import dataclass
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

from nsrl.bench.engine import open_workers
from nsrl.bench.suites.jobs import Status
from nsrl.errors import NsrlError
from nsrl.files import write_json
from nsrl.reading.documents import read_results
from nsrl.rl.agents.zoo_settings import environment_name, read_settings
from nsrl.rl.playing.zoo_play import play_in_zoo
from nsrl.runs.folder import slug
from nsrl.runs.machine import describe_environment
from nsrl.runs.report import Table, scientific

STEPS, STATES, BUDGET = 2000, 256, 0.01
#: Wrappers that rl-zoo's settings name and that change observations; no other is imported.
WRAPPERS = {"sb3_contrib.common.wrappers.TimeFeatureWrapper"}
STAGES = ("load", "collect", "fine-tune", "export", "stock")


@dataclass(frozen=True)
class Found:
    """An agent in a folder.

    Attributes:
        path: its zip.
        name: its path below the folder without suffix, or its folder's where rl-zoo has named both alike.
    """

    path: Path
    name: str


def find_agents(folder: Path, only: Sequence[str] = ()) -> list[Found]:
    """Every zip below a folder, in order.

    Args:
        folder: of agents.
        only: parts of names; empty for all.

    Raises:
        NsrlError: there is none.
    """
    found = [Found(path, _name(path, folder)) for path in sorted(folder.rglob("*.zip"))]
    found = [agent for agent in found if not only or any(part in agent.name for part in only)]
    if not found:
        raise NsrlError(f"there is no agent in {folder}: no zip below it{' has such a name' if only else ''}")
    return found


def _name(path: Path, folder: Path) -> str:
    alike = path.parent != folder and environment_name(path.parent) == path.stem
    return str((path.parent if alike else path.with_suffix("")).relative_to(folder))


def make_env(path: Path, space: Any, count: int = 1, seed: int = 0, *, reverse: bool = False) -> Any:
    """The environment that an agent's file is named after, in the first version whose observations fit.

    Args:
        path: of the agent's zip, as rl-zoo names it: ENV_N/ENV.zip or ENV_N/best_model.zip.
        space: of the agent's observations.
        count: copies side by side.
        seed: of the copies.
        reverse: with the rewards negated: a task that nothing of the old one helps with.

    Raises:
        NsrlError: no such environment here.
    """
    import gymnasium as gym
    from stable_baselines3.common.env_util import make_vec_env

    wrapper = read_settings(path).get("env_wrapper")
    names = [path.stem, environment_name(path.parent), path.stem.partition("-")[2]]
    reasons = []
    for name in names:
        family, _, version = name.rpartition("-v")
        specs = [spec for spec in gym.registry.values() if spec.name == family and spec.namespace is None]
        known = {spec.version or 0: spec for spec in specs}
        wanted = int(version) if version.isdecimal() else 0
        for number in [*sorted(n for n in known if n >= wanted), *sorted(n for n in known if n < wanted)]:
            spec = known[number]

            def make(spec: Any = spec, **options: Any) -> Any:
                env = gym.make(spec.id, **options)
                if wrapper in WRAPPERS:
                    module, _, kind = wrapper.rpartition(".")
                    env = getattr(importlib.import_module(module), kind)(env)
                return gym.wrappers.TransformReward(env, lambda reward: -float(reward)) if reverse else env

            for options in ({}, {"use_contact_forces": True}, {"exclude_current_positions_from_observation": False}):
                try:
                    envs = make_vec_env(make, count, seed=seed, env_kwargs=options)
                except Exception as error:  # what is not installed here, or knows no such option
                    reasons.append(f"{spec.id}: {' '.join(str(error).split())[:80]}")
                    continue
                if envs.observation_space.shape == space.shape:
                    return envs
                reasons.append(f"{spec.id} has observations of shape {envs.observation_space.shape}")
                envs.close()
    why = f" ({reasons[0]})" if reasons else ""
    raise NsrlError(f"no environment here is the one of {path.name} with observations of shape {space.shape}{why}")


def try_agent(path: Path, out: Path, *, steps: int = STEPS, states: int = STATES) -> dict[str, Any]:
    """Load, collect, fine-tune on the reversed task, export, and play the export with stock SB3.

    Args:
        path: of the agent's zip.
        out: a folder for the export.
        steps: of fine-tuning.
        states: of the buffer.

    Returns:
        Plain JSON: `stage`, how far it came ("stock" is the end); `status`, "ok", "refused" (with a sentence) or
        "failed"; `reason`; `env`, `algorithm`; `kl`, as reported, and `kl_stock`, of the export in stock SB3, nats a
        state; `same_actions`; `enjoy`, "played", or what rl_zoo3's script said, None without rl_zoo3; `seconds`, and
        `warnings`.
    """
    start = time.perf_counter()
    row: dict[str, Any] = {"stage": STAGES[0], "status": "ok", "reason": None, "env": None, "algorithm": None}
    row |= {"kl": None, "kl_stock": None, "same_actions": None, "enjoy": None}
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always", UserWarning)
        try:
            _try(path, out, steps, states, row)
        except NsrlError as error:
            row |= {"status": "refused", "reason": str(error)}
        except Exception as error:  # the row is to tell it, and the other agents go on
            row |= {"status": "failed", "reason": f"{type(error).__name__}: {error}"}
    told = {str(entry.message) for entry in caught if issubclass(entry.category, UserWarning)}
    return {**row, "seconds": time.perf_counter() - start, "warnings": sorted(told)}


def _try(path: Path, out: Path, steps: int, states: int, row: dict[str, Any]) -> None:
    import numpy as np

    from nsrl.rl import agents
    from nsrl.rl.agents.normalization import RetainingVecNormalize
    from nsrl.rl.agents.stock_models import stock_class
    from nsrl.rl.algorithms.ppo import NullSpacePPO
    from nsrl.rl.retention.buffer import RetentionBuffer

    agent = agents.load(path)
    space = agent.model.observation_space
    row["algorithm"] = type(agent.model).__name__
    old, new = make_env(path, space, 2), make_env(path, space, 4, seed=1, reverse=True)
    row |= {"stage": "collect", "env": old.get_attr("spec", 0)[0].id}
    buffer = RetentionBuffer.collect(agent, old, n_states=states, seed=0)
    row["stage"] = "fine-tune"
    if agent.normalizer is not None:
        new = RetainingVecNormalize(new, agent.normalizer)
    model = NullSpacePPO.from_pretrained(
        agent, new, retain=buffer, kl_budget=BUDGET, seed=0, n_steps=125, batch_size=125, n_epochs=4
    )
    model.learn(steps)
    row["kl"] = model.retention_report().kl_mean
    row["stage"] = "export"
    exported = model.export(out / "agent.zip")
    row["stage"] = "stock"
    stock = stock_class(type(model)).load(exported, device="cpu")
    seen = buffer.observations
    seen = agent.normalizer.normalize(seen) if agent.normalizer is not None else seen
    theirs, ours = (policy.predict(seen, deterministic=True)[0] for policy in (stock, model))
    row["same_actions"] = bool(np.array_equal(theirs, ours))
    row["kl_stock"] = _divergence(agent.model, stock, seen)
    row["enjoy"] = play_in_zoo(model, out / "zoo", read_settings(path).get("env_wrapper"))
    for envs in (old, new):
        envs.close()


def _divergence(reference: Any, model: Any, seen: Any) -> float:
    """Mean KL of a model from a reference by torch's own formula and nothing of nsrl's.

    Args:
        reference, model: of stock SB3, with categorical or Gaussian actions.
        seen: observations as the policies see them.
    """
    import torch
    from torch.distributions import Categorical, Distribution, Normal, kl_divergence

    def acting(policy: Any) -> Distribution:
        policy.set_training_mode(False)
        told = policy.get_distribution(policy.obs_to_tensor(seen)[0]).distribution
        if isinstance(told, Categorical):
            return Categorical(logits=told.logits.double())
        return Normal(told.loc.double(), told.scale.double())

    with torch.no_grad():
        kl = kl_divergence(acting(reference.policy), acting(model.policy))
    return float(kl.reshape(len(kl), -1).sum(1).mean())


def try_agents(
    found: Sequence[Found],
    out: Path,
    *,
    workers: int = 2,
    again: bool = False,
    quick: bool = False,
    engine: str = "local",
    on_status: Callable[[Status], Any] | None = None,
) -> dict[str, Any]:
    """Try every agent, each in a process; what is in `out` is not tried again.

    Returns:
        `rows` (see `try_agent`, with `name`), `steps`, `budget` and `environment`.
    """
    start, steps = time.monotonic(), 250 if quick else STEPS
    rows = {} if again else {agent.name: row for agent in found if (row := _stored(out, agent, steps)) is not None}
    waiting = [agent for agent in found if agent.name not in rows]
    with open_workers(engine, min(workers, len(waiting)), out) as pool:
        futures: dict[Future[dict[str, Any]], Found] = {
            pool.submit(_row, agent, out, steps): agent for agent in waiting
        }
        for number, future in enumerate(as_completed(futures), start=1):
            rows[futures[future].name] = future.result()
            if on_status is not None:
                seconds = time.monotonic() - start
                failed = [name for name, row in rows.items() if row["status"] == "failed"]
                remaining = seconds / number * (len(waiting) - number)
                on_status(Status(len(found), list(rows), [], failed, seconds, remaining))
    return {
        "rows": [rows[agent.name] for agent in found],
        "steps": steps,
        "budget": BUDGET,
        "environment": describe_environment(),
    }


def _row(agent: Found, out: Path, steps: int) -> dict[str, Any]:
    with TemporaryDirectory() as folder:
        row = {"name": agent.name, **try_agent(agent.path, Path(folder), steps=steps)}
    row["enjoy"] = row["enjoy"] and row["enjoy"].replace(folder, "FOLDER")
    row["reason"] = row["reason"] and row["reason"].replace(str(agent.path.parent), "FOLDER")
    row["warnings"] = [told.replace(str(agent.path.parent), "FOLDER") for told in row["warnings"]]
    write_json(_file(out, agent), {"steps": steps, "row": row})
    return row


def _file(out: Path, agent: Found) -> Path:
    return out / f"{slug(agent.name.replace('/', '-'))}.json"


def _stored(out: Path, agent: Found, steps: int) -> dict[str, Any] | None:
    if not _file(out, agent).is_file():
        return None
    content = read_results(_file(out, agent))
    return content["row"] if content["steps"] == steps else None


def agents_tables(content: dict[str, Any]) -> list[Table]:
    """A row an agent: how far it came, the KL as reported and in stock SB3, whether that acts the same, and rl_zoo3."""
    rows = tuple(
        (
            row["name"],
            row["env"] or "-",
            row["status"] if row["status"] == "ok" else f"{row['stage']}: {row['status']}",
            "-" if row["kl"] is None else scientific(row["kl"]),
            "-" if row["kl_stock"] is None else scientific(row["kl_stock"]),
            {True: "yes", False: "NO", None: "-"}[row["same_actions"]],
            row["enjoy"] or "-",
        )
        for row in content["rows"]
    )
    title = f"agents: {content['steps']} steps on the reversed task, KL budget {content['budget']:g}"
    return [Table(("agent", "env", "outcome", "KL", "in stock SB3", "same actions", "enjoy"), rows, title)]
