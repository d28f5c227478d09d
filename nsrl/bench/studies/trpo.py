"""NullSpaceTRPO against sb3_contrib.TRPO without a constraint: seconds an update on one rollout, and returns.

nsrl bench trpo
"""

from __future__ import annotations

import copy
import json
import math
import statistics
import subprocess
import sys
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor, as_completed
from dataclasses import dataclass
from pathlib import Path
from time import perf_counter
from typing import Any

from nsrl.bench.lifeline import end_with_starter, lifeline
from nsrl.bench.suites.jobs import Status
from nsrl.errors import NsrlError
from nsrl.files import write_json
from nsrl.reading.documents import read_results
from nsrl.runs.folder import slug
from nsrl.runs.machine import describe_environment
from nsrl.runs.report import Table, number

ALGORITHMS = ("stock", "null_space")
#: Ours with upstream's trust region: KL and Fisher information are means over action dimensions there, those of the
#: joint action here, so that it gets `target_kl` and `cg_damping` times their number.
SCALED = "null_space_scaled"
LABELS = {"stock": "sb3_contrib.TRPO", "null_space": "NullSpaceTRPO", SCALED: "NullSpaceTRPO, scaled"}


def measure_trpo(
    env: str = "CartPole-v1", *, rounds: int = 9, warmup: int = 2, seed: int = 0, **settings: Any
) -> dict[str, Any]:
    """Time one update of both, in turn: same weights, same optimizer state, same rollout, default MlpPolicy.

    The rollout and the optimizer state are those of stock TRPO after two updates. An update is the whole of `train()`,
    critic included.

    Args:
        env: environment id.
        rounds: updates of each that count.
        warmup: updates of each before them.
        seed: of the rollout.
        settings: keyword arguments of both constructors.

    Returns:
        `seconds` of every update by algorithm, their `medians`, and `ratio`, stock over ours.
    """
    models = {name: _build(name, env, seed, settings) for name in ALGORITHMS}
    stock = models["stock"]
    steps = stock.n_steps * stock.n_envs
    stock.learn(3 * steps)  # the last rollout is by the policy before its update, so take one more
    stock.collect_rollouts(stock.env, stock._init_callback(None), stock.rollout_buffer, stock.n_steps)
    ours = models["null_space"]
    ours.learn(1)  # gives it a logger
    ours.rollout_buffer = stock.rollout_buffer
    ours.policy.load_state_dict(stock.policy.state_dict())
    ours.policy.optimizer.load_state_dict(copy.deepcopy(stock.policy.optimizer.state_dict()))
    seconds = _time_updates(models, rounds, warmup)
    return {"env": env, "settings": settings, **_timings(models, seconds, steps)}


def measure_protected_trpo(
    agent: Any, old: str, new: str, *, budget: float = 0.01, rounds: int = 9, warmup: int = 2, seed: int = 0
) -> dict[str, Any]:
    """Time one update of a protected model as a user gets it, opened and confined, and stock TRPO's, in turn.

    Both begin every update with the protected model's weights and roll-out, behind its first two updates.

    Args:
        agent: the pretrained agent, as `nsrl.rl.agents.load` takes it.
        old, new: ids of its task and of the one that it learns.
        budget: nats a state.
        rounds, warmup, seed: as in `measure_trpo`.

    Returns:
        As `measure_trpo`, and whether updates were `confined`.
    """
    from sb3_contrib import TRPO

    from nsrl.rl.agents.agent import load
    from nsrl.rl.algorithms.trpo import NullSpaceTRPO
    from nsrl.rl.playing.environments import make_envs
    from nsrl.rl.retention.buffer import RetentionBuffer

    loaded = load(agent)
    buffer = RetentionBuffer.collect(loaded, old, n_states=2048, seed=seed)
    ours: Any = NullSpaceTRPO.from_pretrained(
        loaded, make_envs(new, ENVS, seed), retain=buffer, kl_budget=budget, seed=seed, n_steps=256
    )
    steps = ours.n_steps * ours.n_envs
    ours.learn(2 * steps)
    ours.collect_rollouts(ours.env, ours._init_callback(None), ours.rollout_buffer, ours.n_steps)
    shared = ("n_steps", "batch_size", "gamma", "gae_lambda", "target_kl", "cg_max_steps", "cg_damping")
    settings = {name: getattr(ours, name) for name in (*shared, "n_critic_updates")}
    stock = TRPO(
        ours.policy_class,
        make_envs(new, ENVS, seed),
        policy_kwargs=ours.policy_kwargs,
        seed=seed,
        device="cpu",
        **settings,
    )
    stock.learn(1)  # gives it a logger, and its optimizer moments
    stock.rollout_buffer = ours.rollout_buffer
    stock.policy.load_state_dict(ours.policy.state_dict())
    models = {"stock": stock, "null_space": ours}
    engine = ours.retention
    assert engine is not None
    # weights that somebody else has put there are measured ahead of an update; those of a run are known
    seconds = _time_updates(models, rounds, warmup, engine.verify)
    confined = engine.opening.block is not None and engine.config.confine != "off"
    return {"env": new, "settings": settings, "confined": confined, **_timings(models, seconds, steps)}


def _time_updates(
    models: Mapping[str, Any], rounds: int, warmup: int, before: Callable[[], Any] | None = None
) -> dict[str, list[float]]:
    """Seconds of every update that counts: of each model in turn, each time from the state that the models have now.

    Args:
        models: with their roll-outs.
        rounds, warmup: as in `measure_trpo`.
        before: called ahead of every update, unclocked.
    """
    kept = {
        name: copy.deepcopy((model.policy.state_dict(), model.policy.optimizer.state_dict()))
        for name, model in models.items()
    }
    seconds: dict[str, list[float]] = {name: [] for name in models}
    for turn in range(warmup + rounds):
        for name, model in models.items():
            weights, moments = kept[name]
            model.policy.load_state_dict(weights)
            model.policy.optimizer.load_state_dict(copy.deepcopy(moments))
            if before is not None:
                before()
            start = perf_counter()
            model.train()
            if turn >= warmup:
                seconds[name].append(perf_counter() - start)
    return seconds


def _timings(models: Mapping[str, Any], seconds: Mapping[str, list[float]], states: int) -> dict[str, Any]:
    medians = {name: statistics.median(values) for name, values in seconds.items()}
    return {
        "states": states,
        "threads": _threads(),
        "seconds": dict(seconds),
        "medians": medians,
        "ratio": medians["stock"] / medians["null_space"],
        "logged": {name: _logged(model) for name, model in models.items()},
        "environment": describe_environment(),
    }


@dataclass(frozen=True)
class Case:
    """A task on which both are trained from scratch.

    Attributes:
        env: environment id.
        steps: environment steps of a run.
        settings: keyword arguments of both constructors, plain JSON, with `ENVS` environments side by side; those of
            rl-zoo3 where it has some.
        seeds: one run of each algorithm a seed.
        algorithms: names, of `LABELS`.
    """

    env: str
    steps: int
    settings: Mapping[str, Any]
    seeds: tuple[int, ...] = (0, 1, 2)
    algorithms: tuple[str, ...] = ALGORITHMS


CASES = (
    Case(
        "CartPole-v1",
        100_000,
        {
            "n_steps": 128,
            "batch_size": 512,
            "gamma": 0.98,
            "gae_lambda": 0.8,
            "cg_damping": 1e-3,
            "n_critic_updates": 20,
        },
        tuple(range(8)),
    ),
    Case("Pendulum-v1", 100_000, {"n_steps": 256, "gamma": 0.9, "n_critic_updates": 15}),
    Case(
        "Hopper-v5",
        300_000,
        {"n_steps": 256, "cg_max_steps": 25, "n_critic_updates": 20},
        algorithms=(*ALGORITHMS, SCALED),
    ),
)
ENVS = 8


def compare_returns(
    out: Path, cases: Sequence[Case] = CASES, *, workers: int = 1, on_status: Callable[[Status], Any] | None = None
) -> list[dict[str, Any]]:
    """Train both from scratch, each run in a process of its own; runs that are finished in `out` are not run again.

    Both get the same hyper-parameters, as somebody would who exchanges the class.

    Args:
        out: folder of the runs, a JSON file each.
        cases: what is learnt.
        workers: processes at a time.
        on_status: called after every run.

    Returns:
        One entry a run: env, steps, algorithm, seed, the mean return over 20 deterministic episodes after training
        (`final`), that of the last 100 training episodes (`training`), the mean of the latter over all updates
        (`curve`), both NaN where no episode ended, and seconds.

    Raises:
        NsrlError: a run that failed, with the last line that it printed; those that wait are not begun then.
    """
    if workers < 1 or not cases or not all(case.seeds for case in cases):
        raise NsrlError(f"cases, their seeds and workers must be at least one, not {list(cases)} and {workers}")
    orders: list[dict[str, Any]] = [
        {"name": name, "seed": seed, "env": case.env, "steps": case.steps, "settings": dict(case.settings)}
        for case in cases
        for seed in case.seeds
        for name in case.algorithms
    ]
    start, done = perf_counter(), 0
    found: list[dict[str, Any] | None] = [_read(out, order) for order in orders]
    total = sum(order["steps"] for order, result in zip(orders, found, strict=True) if result is None)

    def tell() -> None:
        names = [_file(out, order).stem for order, result in zip(orders, found, strict=True) if result is not None]
        seconds = perf_counter() - start
        left = seconds * (total - done) / done if done else None
        if on_status is not None:
            on_status(Status(len(orders), names, [], [], seconds, left))

    tell()
    with ThreadPoolExecutor(workers) as pool:
        pending = {pool.submit(_run, out, order): number for number, order in enumerate(orders) if not found[number]}
        try:
            for future in as_completed(pending):
                number = pending[future]
                found[number] = future.result()
                done += orders[number]["steps"]
                tell()
        except BaseException:  # the pool waits for all that is left otherwise
            pool.shutdown(wait=False, cancel_futures=True)
            raise
    return [result for result in found if result is not None]


def summarise_returns(runs: Sequence[dict[str, Any]]) -> list[dict[str, Any]]:
    """One row a task and algorithm: means over seeds, and the smallest final return."""
    rows = []
    for env in dict.fromkeys(run["env"] for run in runs):
        for name in dict.fromkeys(run["algorithm"] for run in runs if run["env"] == env):
            chosen = [run for run in runs if run["env"] == env and run["algorithm"] == name]
            means = {
                key: statistics.fmean(run[key] for run in chosen) for key in ("final", "training", "curve", "seconds")
            }
            rows.append(
                {
                    "env": env,
                    "steps": chosen[0]["steps"],
                    "algorithm": name,
                    "seeds": len(chosen),
                    **means,
                    "lowest": min(run["final"] for run in chosen),
                }
            )
    return rows


def trpo_tables(content: dict[str, Any]) -> list[Table]:
    """The tables of a benchmark: seconds an update, and returns."""
    updates = tuple(
        (
            f"{row['env']}, protected" if "confined" in row else row["env"],
            f"{row['states']}",
            f"{1e3 * row['medians']['stock']:.0f}",
            f"{1e3 * row['medians']['null_space']:.0f}",
            f"{row['ratio']:.2f}",
        )
        for row in content["updates"]
    )
    returns = tuple(
        (
            f"{row['env']}, {row['steps'] // 1000}k",
            f"{row['seeds']}",
            LABELS[row["algorithm"]],
            number(row["final"]),
            number(row["lowest"]),
            number(row["training"]),
            number(row["curve"]),
        )
        for row in content["returns"]
    )
    return [
        Table(("one update", "states", "upstream, ms", "ours, ms", "ratio"), updates, "TRPO: median time"),
        Table(
            ("task", "seeds", "algorithm", "final", "lowest seed", "training", "whole curve"),
            returns,
            "TRPO from scratch: mean return",
        ),
    ]


def _file(out: Path, order: dict[str, Any]) -> Path:
    return out / f"{slug(order['env'])}-{order['name']}-seed{order['seed']}.json"


def _read(out: Path, order: dict[str, Any]) -> dict[str, Any] | None:
    path = _file(out, order)
    if not path.is_file():
        return None
    content = read_results(path)
    if content["order"] != order:
        raise NsrlError(f"{path} holds a run with other settings; choose another --out, or move it away")
    return content["result"]


def _run(out: Path, order: dict[str, Any]) -> dict[str, Any]:
    result = _run_apart(order)
    write_json(_file(out, order), {"order": order, "result": result})
    return result


def _run_apart(order: dict[str, Any]) -> dict[str, Any]:
    command = [sys.executable, "-m", "nsrl.bench.studies.trpo", json.dumps(order)]
    with lifeline() as stdin:
        done = subprocess.run(command, capture_output=True, text=True, stdin=stdin)
    if done.returncode != 0:
        lines = (done.stderr.strip() or "nothing was printed").splitlines()
        raise NsrlError(f"the run of {order['name']} on {order['env']}, seed {order['seed']}, failed: {lines[-1]}")
    return json.loads(done.stdout.strip().splitlines()[-1])


def _train(name: str, seed: int, env: str, steps: int, settings: dict[str, Any]) -> dict[str, Any]:
    from gymnasium import spaces

    from nsrl.rl.playing.environments import make_envs
    from nsrl.rl.playing.evaluation import evaluate

    model = _build(name, make_envs(env, ENVS, seed), seed, settings)
    if name == SCALED and isinstance(model.action_space, spaces.Box):
        dimensions = math.prod(model.action_space.shape)
        model.target_kl *= dimensions
        model.cg_damping *= dimensions
    curve: list[float] = []
    update = model.train

    def watched() -> None:
        update()
        if model.ep_info_buffer:
            curve.append(statistics.fmean(episode["r"] for episode in model.ep_info_buffer))

    model.train = watched
    start = perf_counter()
    model.learn(steps)
    return {
        "env": env,
        "steps": steps,
        "algorithm": name,
        "seed": seed,
        "target_kl": model.target_kl,
        "final": evaluate(model, env).mean,
        "training": curve[-1] if curve else math.nan,
        "curve": statistics.fmean(curve) if curve else math.nan,
        "seconds": perf_counter() - start,
    }


def _build(name: str, env: Any, seed: int, settings: dict[str, Any]) -> Any:
    from sb3_contrib import TRPO

    import nsrl  # noqa: F401  registers the "nsrl/..." ids
    from nsrl.rl.algorithms.trpo import NullSpaceTRPO

    algorithm = TRPO if name == "stock" else NullSpaceTRPO
    return algorithm("MlpPolicy", env, seed=seed, device="cpu", **settings)


def _logged(model: Any) -> dict[str, float]:
    tags = ("policy_objective", "kl_divergence_loss", "value_loss", "cg_iterations", "cg_residual")
    found = model.logger.name_to_value
    return {tag: float(found[f"train/{tag}"]) for tag in tags if f"train/{tag}" in found}


def _threads() -> int:
    import torch

    return torch.get_num_threads()


def main(arguments: Sequence[str]) -> int:
    """The process of one run: its order as JSON; prints its result as JSON."""
    from nsrl.runs.training import use_one_thread

    use_one_thread()
    print(json.dumps(_train(**json.loads(arguments[0]))))
    return 0


if __name__ == "__main__":
    end_with_starter()
    sys.exit(main(sys.argv[1:]))
