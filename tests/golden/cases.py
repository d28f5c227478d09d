"""Short trajectories through every room of the house, and the digests of where they end.

Each case runs real learning for a few updates and returns named digests: parameters, optimizer state, measured values
and the state of the global random generators (a draw more or less shows there). Only names that users call are
imported, so that a case runs on both sides of a move.
"""

from __future__ import annotations

import hashlib
import json
import tempfile
from collections.abc import Callable, Mapping
from dataclasses import asdict
from functools import partial
from pathlib import Path
from typing import Any

import gymnasium as gym
import numpy as np
import torch
from gymnasium import spaces
from sb3_contrib import TRPO, MaskablePPO
from stable_baselines3 import A2C, PPO
from stable_baselines3.common.env_util import make_vec_env
from stable_baselines3.common.vec_env import DummyVecEnv, VecNormalize
from torch import nn

from nsrl import NullSpacePPO, NullSpaceTRPO, RetentionBuffer, protect
from tests.golden.locations import locate

OLD = {"discrete": "nsrl/CartPole-v0", "box": "nsrl/Pendulum-v0"}
NEW = {"discrete": "nsrl/CartPoleSwapped-v0", "box": "nsrl/PendulumReversed-v0"}
SMALL: dict[str, Any] = {"n_steps": 64, "batch_size": 64, "n_epochs": 3, "learning_rate": 3e-3}
#: Fields of a report that measure time, and those that not every checkout has.
LEFT_OUT = ("overhead_fraction", "seconds", "opening")
Digests = dict[str, str]


def digest(value: Any) -> str:
    """SHA-256 of a tree of tensors, arrays, numbers and strings, to the last bit."""
    state = hashlib.sha256()

    def take(item: Any) -> None:
        if isinstance(item, torch.Tensor):
            item = item.detach().cpu().numpy()
        if isinstance(item, np.ndarray | np.generic):
            array = np.ascontiguousarray(item)
            state.update(f"{array.dtype}{array.shape}".encode() + array.tobytes())
        elif isinstance(item, Mapping):
            for key in sorted(item, key=str):
                state.update(str(key).encode())
                take(item[key])
        elif isinstance(item, list | tuple):
            state.update(f"[{len(item)}]".encode())
            for part in item:
                take(part)
        else:
            state.update(repr(item).encode())

    take(value)
    return state.hexdigest()


def unopened() -> dict[str, Any]:
    """Settings of retention without the stages before the first roll-out, which a checkout may not know yet."""
    return {"opening": "off"} if "opening" in locate("RetentionConfig").__dataclass_fields__ else {}


def generators() -> str:
    """Digest of the global random generators, which a draw more or less changes."""
    return digest([torch.get_rng_state(), np.random.get_state()[1:3]])


def outcome(model: Any) -> Digests:
    """Digests of a model that has learnt."""
    found = {
        "parameters": digest(model.policy.state_dict()),
        "optimizer": digest(model.policy.optimizer.state_dict()["state"]),
        "generators": generators(),
        "observations": digest(model._last_obs),
    }
    if getattr(model, "retention", None) is not None:
        report = asdict(model.retention_report())
        found["report"] = digest({key: value for key, value in report.items() if key not in LEFT_OUT})
    return found


def agent(kind: str = "discrete", algorithm: Any = PPO, **options: Any) -> Any:
    """An agent that has seen a few rollouts of the old task."""
    settings = {**SMALL, **options} if algorithm is not A2C else {"n_steps": 16, "learning_rate": 0.01, **options}
    envs = make_vec_env(OLD[kind], 2, seed=0)
    return algorithm("MlpPolicy", envs, seed=0, device="cpu", **settings).learn(256)


def collected(model: Any, kind: str = "discrete", **options: Any) -> RetentionBuffer:
    return RetentionBuffer.collect(model, OLD[kind], **{"n_states": 160, "n_envs": 2, **options})


def fine_tuned(
    kind: str = "discrete", cls: Any = NullSpacePPO, steps: int = 384, settings: Any = None, **options: Any
) -> Digests:
    source = agent(kind, **(settings or {}))
    buffer = collected(source, kind)
    extra = {} if cls is NullSpaceTRPO else SMALL
    model = cls.from_pretrained(
        source, make_vec_env(NEW[kind], 2, seed=1), retain=buffer, seed=1, **{**extra, **unopened(), **options}
    )
    return {"buffer": buffer.digest(), **outcome(model.learn(steps))}


def trpo(**options: Any) -> Digests:
    return fine_tuned(cls=NullSpaceTRPO, n_steps=64, batch_size=64, **options)


def protected(algorithm: Any, kind: str = "discrete", **options: Any) -> Digests:
    settings = {"n_steps": 64, "batch_size": 64} if algorithm is TRPO else {}
    if algorithm is TRPO:
        envs = make_vec_env(OLD[kind], 2, seed=0)
        model = TRPO("MlpPolicy", envs, seed=0, device="cpu", **settings).learn(128)
    else:
        model = agent(kind, algorithm)
    buffer = collected(model, kind, n_states=100)
    model.set_env(make_vec_env(NEW[kind], 2, seed=0))
    protect(model, retain=buffer, **{"kl_budget": 1e-3, **unopened(), **options})
    return outcome(model.learn(320))


def task_budgets(cls: Any = NullSpacePPO) -> Digests:
    source = agent()
    first = collected(source, n_states=120, task="first")
    second = RetentionBuffer.collect(source, NEW["discrete"], n_states=80, n_envs=2, task="second")
    buffer = RetentionBuffer.merge([first, second])
    extra = SMALL if cls is NullSpacePPO else {"n_steps": 64, "batch_size": 64}
    model = cls.from_pretrained(
        source,
        make_vec_env(NEW["discrete"], 2, seed=0),
        retain=buffer,
        seed=0,
        task_budgets={"first": 0.002, "second": 0.02},
        **extra,
        **unopened(),
    )
    return {"buffer": buffer.digest(), **outcome(model.learn(256))}


def several_agents() -> Digests:
    """A merged Gaussian buffer, whose states differ in reference spread, distilled into one agent."""
    source, other = agent("box"), agent("box", learning_rate=1e-3)
    buffer = RetentionBuffer.from_agents([source, other], OLD["box"], n_states=80, n_envs=2)
    envs = make_vec_env(NEW["box"], 2, seed=0)
    model = NullSpacePPO.from_pretrained(
        source, envs, retain=buffer, seed=0, kl_budget=0.5, trust_buffer=True, **SMALL, **unopened()
    )
    return {"buffer": buffer.digest(), **outcome(model.learn(256))}


class Drawn(gym.Env):
    """Observations and rewards by lot, episodes of nine steps; of the Dict kind, with an image."""

    def __init__(self, kind: str) -> None:
        vector = spaces.Box(-1.0, 1.0, (3,), np.float32)
        image = spaces.Box(0, 255, (36, 36, 1), np.uint8)
        self.observation_space = {
            "vector": vector,
            "binary": vector,
            "image": image,
            "dict": spaces.Dict({"image": image, "vector": vector}),
        }[kind]
        actions = {"dict": spaces.MultiDiscrete([3, 2]), "binary": spaces.MultiBinary(3)}
        self.action_space = actions.get(kind, spaces.Discrete(4))

    def reset(self, *, seed: int | None = None, options: Any = None) -> Any:
        super().reset(seed=seed)
        self._steps = 0
        return self._observe(), {}

    def step(self, action: Any) -> Any:
        self._steps += 1
        return self._observe(), float(self.np_random.standard_normal()), self._steps % 9 == 0, False, {}

    def _observe(self) -> Any:
        vector = self.np_random.uniform(-1, 1, 3).astype(np.float32)
        image = self.np_random.integers(0, 256, (36, 36, 1), dtype=np.uint8)
        self._seen = {"vector": vector, "image": image}
        if isinstance(self.observation_space, spaces.Dict):
            return self._seen
        return image if self.observation_space.dtype == np.uint8 else vector


class Masked(Drawn):
    """What is valid follows from the observation."""

    def action_masks(self) -> np.ndarray:
        a, b, _ = self._seen["vector"] > 0.0
        return np.array([a, not a, b, False])


def masked() -> Digests:
    options: dict[str, Any] = {"n_steps": 32, "batch_size": 32, "n_epochs": 3, "learning_rate": 0.01}
    envs = DummyVecEnv([lambda: Masked("vector")] * 2)
    model = MaskablePPO("MlpPolicy", envs, seed=0, device="cpu", policy_kwargs={"net_arch": [8]}, **options).learn(128)
    buffer = RetentionBuffer.collect(model, envs, n_states=80)
    protect(model, retain=buffer, kl_budget=1e-3, projection="euclidean", gradient="projected", **unopened())
    return {"buffer": buffer.digest(), **outcome(model.learn(192))}


def drawn(kind: str, **options: Any) -> Digests:
    envs = DummyVecEnv([lambda: Drawn(kind)] * 2)
    policy, features = {
        "image": ("CnnPolicy", {"features_dim": 16}),
        "dict": ("MultiInputPolicy", {"cnn_output_dim": 16}),
        "binary": ("MlpPolicy", {}),
    }[kind]
    model = PPO(
        policy,
        envs,
        seed=0,
        device="cpu",
        n_steps=32,
        batch_size=32,
        n_epochs=2,
        policy_kwargs={"features_extractor_kwargs": features, "net_arch": [8]},
    )
    buffer = RetentionBuffer.collect(model, envs, n_states=40)
    protect(model, retain=buffer, **{"kl_budget": 1e-3, **unopened(), **options})
    return {"buffer": buffer.digest(), **outcome(model.learn(128))}


def normalized() -> Digests:
    """A VecNormalize agent from its folder, fine-tuned with frozen statistics, exported, and read and played again."""
    from nsrl.rl import agents

    env = VecNormalize(make_vec_env(OLD["box"], 2, seed=0))
    model = PPO("MlpPolicy", env, seed=0, device="cpu", **SMALL).learn(256)
    with tempfile.TemporaryDirectory() as folder:
        path = agents.export(model, Path(folder) / "old" / "agent")
        loaded = agents.load(path)
        buffer = RetentionBuffer.collect(loaded, OLD["box"], n_states=80, n_envs=2, select="advantage")
        kept = RetentionBuffer.load(buffer.save(Path(folder) / "buffer.npz"))
        tuned = NullSpacePPO.from_pretrained(
            path, NEW["box"], retain=kept, seed=2, n_envs=2, kl_budget=1e-3, **SMALL, **unopened()
        )
        tuned.learn(256)
        again = agents.load(tuned.export(Path(folder) / "new" / "agent"))
        plain = agents.attach_env(Path(folder) / "new" / "agent.zip", NEW["box"], seed=3, n_envs=2)
        played = locate("evaluate")(again.model, OLD["box"], normalizer=again.normalizer, episodes=3, seed=5)
    return {
        "buffer": kept.digest(),
        "fingerprint": agents.fingerprint(again.model.policy),
        "returns": digest([np.asarray(played.returns), np.asarray(played.lengths)]),
        "attached": digest(plain.policy.state_dict()),
        **outcome(tuned),
    }


def surgery() -> Digests:
    source = agent()
    wide = locate("add_context")(source, 2)
    buffer = collected(source)
    more, report = locate("add_actions")(source, 1, buffer=buffer)
    grown = locate("widen_buffer")(buffer, wide)
    return {
        "context": digest(wide.policy.state_dict()),
        "actions": digest([more.policy.state_dict(), asdict(report)]),
        "buffer": grown.digest(),
        "generators": generators(),
    }


def continual(strategy: str, **options: Any) -> Digests:
    """Two small tasks, learnt with one strategy."""
    from nsrl.continual import OptimizerConfig, Task, build_strategy

    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(12, 24), nn.ReLU(), nn.Linear(24, 24), nn.ReLU(), nn.Linear(24, 3))
    learner = build_strategy(strategy, model, OptimizerConfig(lr=5e-3), **options)
    for index in range(3):
        generator = torch.Generator().manual_seed(index)
        inputs = torch.randn(64, 12, generator=generator)
        targets = torch.randint(3, (64,), generator=generator)
        loader = list(zip(inputs.split(32), targets.split(32), strict=True))
        task = Task(f"task {index}", index)
        learner.before_task(task, loader)
        for _ in range(4):
            for batch in loader:
                learner.step((*batch, index))
        learner.after_task(task, loader)
    return {"parameters": digest(model.state_dict()), "generators": generators()}


def network() -> tuple[nn.Module, torch.Tensor]:
    torch.manual_seed(0)
    layers = nn.Conv1d(2, 4, 3), nn.LayerNorm(6), nn.Flatten(), nn.Linear(24, 10), nn.Tanh(), nn.Linear(10, 3)
    return nn.Sequential(*layers).eval(), torch.randn(24, 2, 8)


def core() -> Digests:
    """The projection core: products, solvers, constraint kinds."""
    from nsrl import projection

    model, inputs = network()
    jacobian = projection.jacobian(model, inputs)
    k, p = jacobian.shape
    generator = torch.Generator().manual_seed(1)
    v, u = torch.randn(p, generator=generator), torch.randn(k, generator=generator)
    found = {"products": digest([jacobian.matvec(v), jacobian.rmatvec(u), jacobian.gram(), jacobian.dense()])}
    for method in ("dual", "primal", "nystrom"):
        for damping in (0.0, 1e-2) if method != "nystrom" else (1e-2,):
            solved = projection.null_projection(jacobian, v, damping, method=method)
            certificate = {key: value for key, value in asdict(solved.certificate).items() if "second" not in key}
            found[f"{method} {damping}"] = digest([solved.values, certificate])
    for cls in (projection.SpectralProjection, projection.KrylovProjection):
        projected = cls(jacobian, 0.01 * u.double(), 1e-3).project(v, 1e-2)
        found[cls.__name__] = digest([projected.displacement, projected.kept])
    columns = projection.parameter_columns(model)
    constraints: dict[str, Any] = {
        "low rank": projection.LowRankConstraint(columns, 20),
        "diagonal": projection.DiagonalConstraint(columns),
        "kronecker": projection.KroneckerConstraint(columns),
        "features": projection.FeatureConstraint(model),
    }
    for name, constraint in constraints.items():
        constraint.update(model, inputs[:8]) if name == "features" else constraint.update(jacobian)
    constraints["full"] = projection.JacobianConstraint(jacobian)
    for name, constraint in constraints.items():
        for filter in (projection.Hard(), projection.Tikhonov(1e-2), projection.Budget(1e-2)):
            found[f"{name} {filter}"] = digest(constraint.project(v, filter).displacement)
    return found


def kernels() -> Digests:
    """Tangent kernels, the linearised model and a forecast of forgetting."""
    from nsrl import ntk

    model, inputs = network()
    source = agent()
    learner = NullSpacePPO.from_pretrained(
        source, make_vec_env(NEW["discrete"], 2, seed=1), retain=collected(source), seed=1, **SMALL, **unopened()
    )
    rollout = locate("collect_transitions")(learner)
    told = locate("forecast")(learner.retention.constraint, rollout, learning_rate=3e-3, updates=4, kl_budget=0.01)
    return {
        "kernel": digest(ntk.empirical_ntk(model, inputs)),
        "linear": digest(ntk.linearize(model)(inputs)),
        "rollout": digest(asdict(rollout)),
        "forecast": digest(asdict(told)),
    }


def run_cell() -> Digests:
    """What a benchmark cell does: an agent is pretrained as a run, and fine-tuned as another."""
    quick = locate("EvaluationSettings")(every=128, episodes=1, final_episodes=2)
    before = locate("PretrainConfig")(
        env=OLD["discrete"],
        total_timesteps=256,
        evaluation=quick,
        ppo=locate("PPOSettings")(n_envs=2, n_steps=64, batch_size=64, n_epochs=2),
    )
    with tempfile.TemporaryDirectory() as folder:
        root = Path(folder)
        locate("pretrain")(before, root / "agent")
        config = locate("FinetuneConfig")(
            agent=str(root / "agent"),
            pair="cartpole_swapped",
            total_timesteps=256,
            evaluation=quick,
            ppo=locate("PPOOverrides")(n_envs=2, n_steps=64),
            states=locate("BufferSettings")(n_states=64, n_envs=2),
            retention=locate("RetentionConfig")(**unopened()),
        )
        locate("finetune")(config, root / "run")
        metrics = json.loads((root / "run" / "metrics.json").read_text())
        weights = PPO.load(root / "run" / "agent.zip", device="cpu").policy.state_dict()
        buffer = RetentionBuffer.load(root / "run" / "retention.npz").digest()
    told = {key: metrics[key] for key in ("before", "after", "buffer", "timesteps")}
    return {"parameters": digest(weights), "metrics": digest(told), "buffer": buffer}


CASES: dict[str, Callable[[], Digests]] = {
    "ppo": fine_tuned,
    "ppo gaussian": partial(fine_tuned, "box"),
    "ppo euclidean": partial(fine_tuned, projection="euclidean", gradient="plain"),
    "ppo optimizer": partial(fine_tuned, projection="optimizer", selection="active"),
    "ppo projected": partial(fine_tuned, "box", gradient="projected", projection="euclidean", project_every=2),
    "ppo hard null space": partial(fine_tuned, kl_budget=0.0),
    "ppo tight": partial(fine_tuned, kl_budget=1e-5, learning_rate=0.05, restore_steps=2),
    "ppo mode": partial(fine_tuned, "box", preserve="mode", log_std_init=-1.0),
    "ppo penalty": partial(fine_tuned, method="kl_penalty"),
    "ppo without protection": partial(fine_tuned, method="finetune", critic="keep"),
    "ppo warm-up": partial(fine_tuned, critic_warmup=2),
    "trpo": trpo,
    "trpo gaussian": partial(trpo, kind="box"),
    "trpo tight": partial(trpo, kl_budget=1e-4),
    "trpo hard null space": partial(trpo, kl_budget=0.0),
    "trpo penalty": partial(trpo, method="kl_penalty"),
    "protect a2c": partial(protected, A2C),
    "protect ppo": partial(protected, PPO, "box"),
    "protect trpo": partial(protected, TRPO),
    "protect maskable": masked,
    "task budgets": task_budgets,
    "task budgets trpo": partial(task_budgets, NullSpaceTRPO),
    "several agents": several_agents,
    "cnn": partial(drawn, "image"),
    "dict": partial(drawn, "dict", projection="euclidean"),
    "bernoulli": partial(drawn, "binary", projection="euclidean"),
    "normalized": normalized,
    "surgery": surgery,
    "continual kl_budget": partial(continual, "kl_budget"),
    "continual kl_budget restored": partial(continual, "kl_budget", kl_budget=1e-4, enforce_every=3),
    "continual kl_budget tight": partial(continual, "kl_budget", kl_budget=1e-5, enforce_every=2, restore_steps=1),
    "continual combined": partial(continual, "combined"),
    "continual gpm": partial(continual, "gpm"),
    "continual ogd": partial(continual, "ogd"),
    "continual ewc": partial(continual, "ewc"),
    "continual adam_nscl": partial(continual, "adam_nscl"),
    "projection": core,
    "ntk": kernels,
    "run": run_cell,
}
