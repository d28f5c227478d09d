"""Valid files of every kind, from which hostile ones are made, and the readers that meet them."""

from __future__ import annotations

import io
import json
import pickle
import struct
import tarfile
import zipfile
from collections.abc import Callable
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import gymnasium as gym
import numpy as np
import torch
from safetensors.torch import save
from stable_baselines3 import PPO
from stable_baselines3.common.env_util import make_vec_env
from stable_baselines3.common.vec_env import DummyVecEnv, VecNormalize

import nsrl_envs  # noqa: F401  registers the ids
from nsrl.bench.studies.lines import read_runs
from nsrl.bench.suites.pairs import read_suite
from nsrl.continual.benchmarks import build_benchmark
from nsrl.continual.benchmarks.installation import install
from nsrl.continual.benchmarks.mnist import MNIST, read_idx
from nsrl.continual.config import BenchmarkSettings, ContinualConfig, StrategySettings, TrainingSettings
from nsrl.continual.runner import run_continual
from nsrl.editing.preserved import _read as read_moments
from nsrl.editing.retention_file import RetentionFile
from nsrl.files import read_lines
from nsrl.reading.documents import read_results
from nsrl.rl import agents
from nsrl.rl.agents.normalization import ObservationNormalizer
from nsrl.rl.algorithms.ppo import NullSpacePPO
from nsrl.rl.algorithms.saved_constraint import SavedConstraint
from nsrl.rl.retention.buffer import RetentionBuffer
from nsrl.rl.training import checkpoint
from nsrl.rl.training.checkpoint import read_checkpoint
from nsrl.runs.config import FinetuneConfig
from nsrl.runs.hyperparameters import PPOOverrides
from nsrl.runs.settings import load, to_yaml
from tests.editing.tiny_lm import TinyLM

OLD, NEW = "nsrl/CartPole-v0", "nsrl/CartPoleSwapped-v0"


@dataclass(frozen=True)
class Case:
    """A file that means harm.

    Attributes:
        kind: of file, a key of `Workbench.readers`.
        make: writes it to the path that it is given.
        harmless: it is read, since what means harm in it is never looked at; the others are refused.
    """

    kind: str
    make: Callable[[Workbench, Path], Any]
    harmless: bool = False


def content(kind: str, make: Callable[[Workbench], bytes | str], harmless: bool = False) -> Case:
    """A case whose file is these bytes."""

    def write(bench: Workbench, path: Path) -> None:
        made = make(bench)
        path.write_bytes(made.encode() if isinstance(made, str) else made)

    return Case(kind, write, harmless)


class Workbench:
    """Small valid files, each made when it is first asked for."""

    #: What a file of each kind is called.
    names = {
        "statistics": "vecnormalize.pkl",
        "agent": "agent.zip",
        "buffer": "retention.npz",
        "checkpoint": "checkpoint.zip",
        "task": "task0.pt",
        "configuration": "c.yaml",
        "suite": "suite.yaml",
        "results": "metrics.json",
        "history": "history.jsonl",
        "digits": "train-images-idx3-ubyte.gz",
        "pictures": "tiny",
        "saved": "saved.zip",
        "terms": "terms.json",
        "runs": "runs.jsonl",
        "labels": "train-labels-idx1-ubyte",
        "retention_file": "old.safetensors",
        "moments": "moments.safetensors",
        "archive": "mnist.tar",
    }

    @property
    def readers(self) -> dict[str, Callable[[Path], Any]]:
        """How nsrl reads each kind of file."""
        return {
            "statistics": ObservationNormalizer.load,
            "agent": agents.load,
            "buffer": RetentionBuffer.load,
            "checkpoint": lambda path: checkpoint.restore(path, self.model),
            "task": lambda path: run_continual(self.continual, path.parent),
            "configuration": lambda path: load(FinetuneConfig, path),
            "suite": read_suite,
            "results": read_results,
            "history": read_lines,
            "digits": lambda path: read_idx(path.with_suffix(""), 3),
            "saved": lambda path: agents.load(path),
            "terms": lambda path: SavedConstraint.read(path.read_bytes().decode("utf-8", "replace")).missing("PPO"),
            "runs": read_runs,
            "labels": lambda path: read_idx(path, 1),
            "retention_file": RetentionFile.load,
            "moments": read_moments,
            "archive": lambda path: install(MNIST, path, path.parent / "installed"),
            "pictures": lambda path: build_benchmark(BenchmarkSettings("split_tinyimagenet", data=str(path))),
        }

    @cached_property
    def stock(self) -> PPO:
        """An agent of CartPole with a context bit."""
        return PPO("MlpPolicy", OLD, n_steps=8, batch_size=8, device="cpu", seed=0)

    @cached_property
    def agent(self) -> bytes:
        """Its zip."""
        stream = io.BytesIO()
        self.stock.save(stream)
        return stream.getvalue()

    @cached_property
    def statistics(self) -> bytes:
        """The pickle of a VecNormalize."""
        env = VecNormalize(DummyVecEnv([lambda: gym.make(OLD)]))
        env.reset()
        for _ in range(5):
            env.step(np.zeros(1, dtype=int))
        env.reset_infos = []
        return pickle.dumps(env)

    @cached_property
    def retained(self) -> RetentionBuffer:
        """A buffer of the agent's states."""
        return RetentionBuffer.collect(self.stock, OLD, n_states=16, n_envs=1, seed=0)

    @cached_property
    def arrays(self) -> dict[str, np.ndarray]:
        """What its npz holds."""
        with np.load(io.BytesIO(self.buffer)) as file:
            return dict(file)

    @cached_property
    def buffer(self) -> bytes:
        """Its npz."""
        return self.retained.save(self._folder / "buffer.npz").read_bytes()

    @cached_property
    def model(self) -> NullSpacePPO:
        """A run of fine-tuning before its first step."""
        return NullSpacePPO.from_pretrained(
            self.stock, make_vec_env(NEW, 2), retain=self.retained, trust_buffer=True, n_steps=8
        )

    @cached_property
    def checkpoint(self) -> bytes:
        """Its checkpoint after an update, so that the optimizer has a state."""
        self.model.learn(16)
        return checkpoint.save(self._folder / "checkpoint", self.model).read_bytes()

    @cached_property
    def saved_model(self) -> bytes:
        """The model's own zip, with the constraint that it is under."""
        self.model.save(self._folder / "saved.zip")
        return (self._folder / "saved.zip").read_bytes()

    @property
    def terms(self) -> bytes:
        """The record of that constraint."""
        with zipfile.ZipFile(io.BytesIO(self.saved_model)) as archive:
            return json.loads(archive.read("data"))["_saved_constraint"].encode()

    @cached_property
    def retention_file(self) -> bytes:
        """What a language model answered to a few sequences."""
        made = RetentionFile.make(TinyLM(), [[3, 1, 4, 1, 5], [9, 2, 6], [3, 2]], top_k=6, name="tiny")
        return made.save(self._folder / "old.safetensors").read_bytes()

    @property
    def archive(self) -> bytes:
        """A tar of four files of two images."""
        stream = io.BytesIO()
        with tarfile.open(fileobj=stream, mode="w") as archive:
            for part in ("train", "t10k"):
                for name, content in (
                    (f"{part}-images-idx3-ubyte", blank_idx(2, 28, 28)),
                    (f"{part}-labels-idx1-ubyte", blank_idx(2)),
                ):
                    member = tarfile.TarInfo(name)
                    member.size = len(content)
                    archive.addfile(member, io.BytesIO(content))
        return stream.getvalue()

    @cached_property
    def continual(self) -> ContinualConfig:
        """Two small tasks, learnt with a replay memory and a budget."""
        return ContinualConfig(
            BenchmarkSettings("permuted_digits", tasks=2),
            training=TrainingSettings(epochs=1, batch_size=512),
            strategy=StrategySettings("kl_budget", {"states_per_task": 10, "enforce_every": 100}),
        )

    @cached_property
    def task(self) -> dict[str, Any]:
        """What its first task leaves behind, as `torch.save` gets it."""
        kept: dict[str, Any] = {}
        from nsrl.continual import records

        original = records.Records.write_task

        def keep(self: Any, index: int, history: Any, state: Any) -> None:
            kept.setdefault("entry", history[index]), kept.setdefault("state", state)
            original(self, index, history, state)

        records.Records.write_task = keep  # type: ignore[method-assign]
        try:
            run_continual(self.continual)
        finally:
            records.Records.write_task = original  # type: ignore[method-assign]
        return kept

    def __init__(self, folder: Path):
        self._folder = folder

    def command(self, kind: str, path: Path) -> list[str]:
        """The command line that meets a file of a kind; what else it needs is laid beside the file."""
        if kind in ("statistics", "agent", "buffer"):
            agent = path if kind == "agent" else path.with_name("agent.zip")
            if kind != "agent":
                agent.write_bytes(self.agent)
            words = ["evaluate", "--agent", str(agent), "--env", OLD, "--episodes", "1"]
            return [*words, "--buffer", str(path)] if kind == "buffer" else words
        if kind in ("checkpoint", "history"):
            run = FinetuneConfig(
                pair="cartpole_swapped", total_timesteps=16, trust_buffer=True, ppo=PPOOverrides(n_envs=2, n_steps=8)
            )
            (path.parent / "pretrained").mkdir()
            (path.parent / "pretrained" / "agent.zip").write_bytes(self.agent)
            (path.parent / "retention.npz").write_bytes(self.buffer)
            path.with_name("config.yaml").write_text(to_yaml(run))
            return ["finetune", "--resume", str(path.parent)]
        if kind in ("task", "results"):
            path.with_name("config.yaml").write_text(to_yaml(self.continual))
            return ["continual", "--resume", str(path.parent)]
        if kind in ("digits", "pictures"):
            name, folder = ("permuted_mnist", path.parent) if kind == "digits" else ("split_tinyimagenet", path)
            out = str(path.with_name("out"))
            return ["continual", "--benchmark.name", name, "--benchmark.data", str(folder), "--out", out]
        return ["finetune", "--config", str(path)] if kind == "configuration" else ["bench", str(path)]

    # -- files with a part changed

    def agent_with(self, weights: Any = None, members: dict[str, Any] | None = None, **data: Any) -> bytes:
        """The agent's zip with other metadata, members or weights (a value for `torch.save`, or bytes)."""
        with zipfile.ZipFile(io.BytesIO(self.agent)) as old:
            parts: dict[str, Any] = {name: old.read(name) for name in old.namelist()}
        parts["data"] = json.dumps({**json.loads(parts["data"]), **data})
        if weights is not None:
            parts["policy.pth"] = weights if isinstance(weights, bytes) else saved(weights)
        return zipped({**parts, **(members or {})})

    def weights(self, **changes: Any) -> dict[str, Any]:
        """The agent's weights with some changed, by names in which __ stands for a dot."""
        return {**self.stock.policy.state_dict(), **{name.replace("__", "."): new for name, new in changes.items()}}

    def buffer_with(self, **changes: Any) -> bytes:
        """The buffer's npz with other arrays, or other bytes in their place."""
        parts: dict[str, Any] = {**self.arrays, **changes}
        return zipped({f"{name}.npy": part if isinstance(part, bytes) else array(part) for name, part in parts.items()})

    def checkpoint_with(self, change: Callable[[dict[str, Any], dict[str, Any]], Any]) -> bytes:
        """The checkpoint after `change` has been at its state and tensors."""
        path = self._folder / "changed"
        path.write_bytes(self.checkpoint)
        state, tensors = read_checkpoint(path)
        change(state, tensors)
        return zipped({"state.json": json.dumps(state), "tensors.pt": saved(tensors)})

    def task_with(self, change: Callable[[dict[str, Any]], Any]) -> bytes:
        """The task's file after `change` has been at its content."""
        copy = torch.load(io.BytesIO(saved(self.task)), weights_only=True)
        return saved(change(copy) or copy)


def blank_idx(*sizes: int) -> bytes:
    """An idx file of zeros."""
    return bytes((0, 0, 8, len(sizes))) + struct.pack(f">{len(sizes)}I", *sizes) + bytes(int(np.prod(sizes)))


def moments() -> bytes:
    """Second moments as `PreservedKeys.save` writes them."""
    header = {"format": "1", "nsrl": "0", "model": "0" * 64, "tokens": '{"a": 9, "b": 9}', "texts": "3"}
    return save({f"moment.{name}": torch.eye(8, dtype=torch.float64) for name in "ab"}, header)


def saved(value: Any, **options: Any) -> bytes:
    """What `torch.save` writes."""
    stream = io.BytesIO()
    torch.save(value, stream, **options)
    return stream.getvalue()


def array(value: Any) -> bytes:
    """What `numpy.save` writes."""
    stream = io.BytesIO()
    np.save(stream, value)
    return stream.getvalue()


def zipped(members: dict[str, Any], method: int = zipfile.ZIP_STORED) -> bytes:
    """A zip; members that are None are left out."""
    stream = io.BytesIO()
    with zipfile.ZipFile(stream, "w", method) as archive:
        for name, part in members.items():
            if part is not None:
                archive.writestr(name, part)
    return stream.getvalue()
