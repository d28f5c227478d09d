"""NullSpaceTRPO against sb3_contrib.TRPO without a constraint: seconds an update on one rollout, and returns."""

from __future__ import annotations

import copy
import json
import math
import statistics
import subprocess
import sys
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from time import perf_counter
from typing import Any

from nsrl.bench.environment import describe_environment
from nsrl.bench.runs import write_json
from nsrl.errors import NsrlError

ALGORITHMS = ("stock", "null_space")


def measure_trpo(env: str = "CartPole-v1", *, rounds: int = 9, warmup: int = 2, seed: int = 0,
                 **settings: Any) -> dict[str, Any]:  # fmt: skip
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
    models["null_space"].learn(1)  # gives it a logger
    models["null_space"].rollout_buffer = stock.rollout_buffer
    weights = copy.deepcopy(stock.policy.state_dict())
    moments = copy.deepcopy(stock.policy.optimizer.state_dict())
    seconds: dict[str, list[float]] = {name: [] for name in ALGORITHMS}
    for number in range(warmup + rounds):
        for name, model in models.items():
            model.policy.load_state_dict(weights)
            model.policy.optimizer.load_state_dict(copy.deepcopy(moments))
            start = perf_counter()
            model.train()
            if number >= warmup:
                seconds[name].append(perf_counter() - start)
    medians = {name: statistics.median(values) for name, values in seconds.items()}
    return {
        "env": env,
        "states": steps,
        "settings": settings,
        "threads": _threads(),
        "seconds": seconds,
        "medians": medians,
        "ratio": medians["stock"] / medians["null_space"],
        "logged": {name: _logged(model) for name, model in models.items()},
        "environment": describe_environment(),
    }


def compare_returns(env: str, steps: int, seeds: Sequence[int] = (0, 1, 2), *, out: str | Path, jobs: int = 1,
                    same_region: bool = True, on_run: Callable[[dict[str, Any]], Any] | None = None,
                    **settings: Any) -> dict[str, Any]:  # fmt: skip
    """Train both from scratch, each run in a process of its own, and write the returns as JSON.

    Args:
        env: environment id.
        steps: of each run.
        seeds: one run of each algorithm a seed.
        out: the JSON file.
        jobs: processes at a time.
        same_region: give both the same trust region. Upstream's KL and Fisher information are means over action
            dimensions, ours those of the joint action; so ours gets upstream's `target_kl` and `cg_damping` times their
            number. False gives both the same numbers.
        on_run: called with the result of every run.
        settings: keyword arguments of both constructors, plain JSON.

    Returns:
        `runs`: algorithm, seed, the mean return over 20 deterministic episodes after training (`final`), that of the
        last 100 training episodes (`training`), the mean of the latter over all updates (`curve`), both NaN where no
        episode ended, and seconds; and `means` of these by algorithm.

    Raises:
        NsrlError: a run that failed, with the last line that it printed.
    """
    if not seeds or steps < 1 or jobs < 1:
        raise NsrlError(f"seeds, steps and jobs must be at least one, not {list(seeds)}, {steps} and {jobs}")
    given = [(name, seed) for seed in seeds for name in ALGORITHMS]

    def run(job: tuple[str, int]) -> dict[str, Any]:
        result = _run_apart(*job, env, steps, same_region, settings)
        if on_run is not None:
            on_run(result)
        return result

    with ThreadPoolExecutor(jobs) as pool:
        runs = list(pool.map(run, given))
    means = {
        name: {key: statistics.fmean(run[key] for run in runs if run["algorithm"] == name)
               for key in ("final", "training", "curve", "seconds")}
        for name in ALGORITHMS
    }  # fmt: skip
    result = {
        "env": env, "steps": steps, "seeds": list(seeds), "same_region": same_region, "settings": settings,
        "means": means, "runs": runs, "environment": describe_environment(),
    }  # fmt: skip
    write_json(Path(out), result)
    return result


def _run_apart(name: str, seed: int, env: str, steps: int, same_region: bool, settings: dict[str, Any]) -> Any:
    order = {"name": name, "seed": seed, "env": env, "steps": steps, "same_region": same_region, "settings": settings}
    command = [sys.executable, "-m", "nsrl.bench.trpo", json.dumps(order)]
    done = subprocess.run(command, capture_output=True, text=True, stdin=subprocess.DEVNULL)
    if done.returncode != 0:
        lines = (done.stderr.strip() or "nothing was printed").splitlines()
        raise NsrlError(f"the run of {name} on {env}, seed {seed}, failed: {lines[-1]}")
    return json.loads(done.stdout.strip().splitlines()[-1])


def _train(name: str, seed: int, env: str, steps: int, same_region: bool, settings: dict[str, Any]) -> dict[str, Any]:
    from gymnasium import spaces

    from nsrl.rl.evaluation import evaluate

    model = _build(name, env, seed, settings)
    if same_region and name == "null_space" and isinstance(model.action_space, spaces.Box):
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
        "algorithm": name, "seed": seed, "target_kl": model.target_kl, "final": evaluate(model, env).mean,
        "training": curve[-1] if curve else math.nan, "curve": statistics.fmean(curve) if curve else math.nan,
        "seconds": perf_counter() - start,
    }  # fmt: skip


def _build(name: str, env: str, seed: int, settings: dict[str, Any]) -> Any:
    from sb3_contrib import TRPO

    import nsrl  # noqa: F401  registers the "nsrl/..." ids
    from nsrl.rl.trpo import NullSpaceTRPO

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
    from nsrl.bench.training import use_one_thread

    use_one_thread()
    print(json.dumps(_train(**json.loads(arguments[0]))))
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
