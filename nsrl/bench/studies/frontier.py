"""The frontier: every method on a population of pretrained agents, old task kept against new task learnt.

    nsrl bench frontier --workers 2

The agents are trained once and committed (runs/reference/agents), so that every machine starts alike: several seeds,
just solved and three times over-trained, with SB3's default settings and with rl-zoo's. On the test pairs they are
agents that others have published. Every method gets the same agents, buffers, opening, environments and timesteps. A
run is a line of JSON in runs/reference/frontier/PAIR.jsonl: what is there is not run again.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import as_completed
from pathlib import Path
from typing import Any

from nsrl.bench.engine import open_workers
from nsrl.bench.studies.frontier_plan import BUDGET, METHODS, PAIRS, REFRESHED, Cell, Pair
from nsrl.bench.studies.lines import run_missing
from nsrl.bench.suites.jobs import Status
from nsrl.rl.playing.joined import JoinedEnvs
from nsrl.runs.machine import describe_environment

#: Evaluations along a run, and episodes of each.
POINTS, EPISODES = 10, 10
#: Environments and steps of a roll-out of each.
ENVS, STEPS = 16, 128


def train_agent(pair: str, kind: str, seed: int, multiple: int, path: Path, share: float = 1.0) -> None:
    """Train an agent of the population, if its zip is not there, and write it."""
    from stable_baselines3 import PPO

    from nsrl.rl import agents
    from nsrl.rl.playing.environments import training_env

    if path.is_file():
        return
    task = PAIRS[pair]
    settings: dict[str, Any] = task.settings if kind == "zoo" else {"n_steps": 256}
    env = training_env(task.old, None, seed=seed, n_envs=8)
    model = PPO("MlpPolicy", env, seed=seed, device="cpu", **settings)
    model.learn(int(share * multiple * task.pretraining))
    path.parent.mkdir(parents=True, exist_ok=True)
    agents.save_agent(model, path)


def run_cell(cell: Cell, folder: Path, quick: bool = False) -> dict[str, Any]:
    """One run, in this process: train or take the agent, collect its buffer, learn the new task, and say how it went.

    Args:
        cell: the run.
        folder: of the agents.
        quick: few timesteps, whose numbers mean nothing.
    """
    from nsrl.rl import agents, surgery
    from nsrl.rl.algorithms.ppo import NullSpacePPO
    from nsrl.rl.algorithms.trpo import NullSpaceTRPO
    from nsrl.rl.playing.environments import training_env
    from nsrl.rl.retention.buffer import RetentionBuffer
    from nsrl.rl.training.refresh import BufferRefresh

    pair, method = PAIRS[cell.pair], METHODS[cell.method]
    share = 0.05 if quick else 1.0
    if cell.multiple:
        path = folder / cell.pair / f"{cell.agent}.zip"
        train_agent(cell.pair, cell.kind, cell.seed, cell.multiple, path, share)
        agent = agents.load(path)
    else:
        agent = surgery.add_context(agents.load(folder / (pair.agents or cell.pair) / cell.agent), 1)
    buffer = RetentionBuffer.collect(agent, pair.old, n_states=cell.states, seed=0)
    algorithm = NullSpacePPO if method.algorithm == "ppo" else NullSpaceTRPO
    fresh = method.method == "scratch"
    steps = int(share * (pair.scratch if fresh else 1.25 * pair.scratch))
    options: dict[str, Any] = {"n_steps": STEPS, **FIXED[method.algorithm], **method.options}
    if cell.penalty is not None:
        options["penalty"] = cell.penalty
    if not fresh:
        options |= {"retain": buffer, "method": method.method, "kl_budget": options.get("kl_budget", BUDGET)}
        if method.method != "null_space":
            options.setdefault("opening", 0.9)  # everybody is opened
    start = time.monotonic()
    env = training_env(pair.new, None, seed=cell.seed, n_envs=ENVS)
    if method.method == "joint":
        half = ENVS // 2
        tasks = ((pair.old, cell.seed), (pair.new, cell.seed + half))
        env = JoinedEnvs([training_env(task, None, seed=seed, n_envs=half) for task, seed in tasks])
        options["method"] = "finetune"
    if cell.scale != 1.0:
        env = _scaled(env, cell.scale)
    model: Any = algorithm.from_pretrained(agent, env, seed=cell.seed, **options)
    if fresh:
        model._setup_model()  # another policy of the same kind, from the seed
    watch = _watch(pair, max(steps // POINTS, 1))
    callbacks = [watch]
    if method.refresh:
        every = max(steps // POINTS, 1)
        callbacks.insert(0, BufferRefresh(pair.old, agent, every=every, states=REFRESHED, seed=cell.seed))
    model.learn(steps, callback=callbacks)
    report = None if model.retention is None else model.retention
    return {
        "cell": cell.name,
        "pair": cell.pair,
        "method": cell.method,
        "penalty": options.get("penalty"),
        "kind": cell.kind,
        "seed": cell.seed,
        "multiple": cell.multiple,
        "states": cell.states,
        "scale": cell.scale,
        "timesteps": int(model.num_timesteps),
        "curve": watch.rows,
        "kl_most": None if report is None else report.kl_most,
        "updates": None if report is None else report.updates,
        "held": None if report is None else report.held,
        "opening": None if report is None or report.opening.record is None else report.opening.record.__dict__,
        "seconds": time.monotonic() - start - watch.seconds,
        "machine": describe_environment(),
    }


#: Settings of each algorithm, the same for all pairs and methods; TRPO's are its defaults.
FIXED: dict[str, dict[str, Any]] = {
    "ppo": {"batch_size": 256, "n_epochs": 10, "learning_rate": 1e-3},
    "trpo": {},
}


def _scaled(env: Any, scale: float) -> Any:
    from stable_baselines3.common.vec_env import VecEnvWrapper

    class Scaled(VecEnvWrapper):
        """Rewards in another unit."""

        def reset(self) -> Any:
            return self.venv.reset()

        def step_wait(self) -> Any:
            observations, rewards, dones, infos = self.venv.step_wait()
            return observations, scale * rewards, dones, infos

    return Scaled(env)


def _watch(pair: Pair, every: int) -> Any:
    from stable_baselines3.common.callbacks import BaseCallback

    from nsrl.rl.playing.environments import open_copies
    from nsrl.rl.playing.evaluation import evaluate

    class Watch(BaseCallback):
        """Plays both tasks along the run; its time is not the run's."""

        def __init__(self) -> None:
            super().__init__()
            self.rows: list[list[float | None]] = []
            self.seconds = 0.0
            self._copies = [open_copies(env, EPISODES) for env in (pair.old, pair.new)]

        def _measure(self) -> None:
            start = time.monotonic()
            policy: Any = self.model
            old, new = (evaluate(policy, copies, episodes=EPISODES, seed=1000).mean for copies in self._copies)
            engine = getattr(self.model, "retention", None)
            kl = None if engine is None else engine.constraint.divergence()
            self.rows.append([int(self.model.num_timesteps), old, new, kl])
            self.seconds += time.monotonic() - start

        def _on_training_start(self) -> None:
            self._measure()

        def _on_rollout_start(self) -> None:
            if self.model.num_timesteps >= len(self.rows) * every:
                self._measure()

        def _on_step(self) -> bool:
            return True

        def _on_training_end(self) -> None:
            self._measure()

    return Watch()


def run_cells(
    cells: Sequence[Cell],
    reference: Path,
    agents: Path,
    *,
    workers: int = 2,
    quick: bool = False,
    engine: str = "local",
    on_status: Callable[[Status], Any] | None = None,
) -> dict[str, str]:
    """Run whatever has no line yet.

    Args:
        cells: what to run.
        reference: folder of the lines, a file a pair.
        agents: folder of the population.
        workers: processes at a time, one thread each.
        quick: as in `run_cell`.
        engine: where they run (`nsrl.bench.engine`).
        on_status: called after every run.

    Returns:
        Why runs came to no result, by name.
    """
    return run_missing(
        cells,
        reference.glob("*.jsonl"),
        lambda cell: reference / f"{cell.pair}.jsonl",
        lambda waiting: _beside(waiting, reference, agents, workers, quick, engine),
        on_status,
    )


def _beside(
    cells: Sequence[Cell], reference: Path, agents: Path, workers: int, quick: bool, engine: str
) -> Iterator[tuple[Cell, dict[str, Any] | BaseException]]:
    """Runs as they end, several at a time."""
    with open_workers(engine, min(workers, len(cells)), reference) as pool:
        futures = {pool.submit(run_cell, cell, agents, quick): cell for cell in cells}
        for future in as_completed(futures):
            yield futures[future], future.exception() or future.result()
