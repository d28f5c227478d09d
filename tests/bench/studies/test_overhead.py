"""What is told of the overhead: of the model as a user gets it, and all of what the constraint takes."""

from __future__ import annotations

from pathlib import Path

import pytest

from nsrl.bench.studies.overhead import measure_overhead
from nsrl.rl.algorithms.fused_update import FusedUpdate
from nsrl.rl.budget.confinement import Confinement
from nsrl.runs.config import BufferSettings, FinetuneConfig
from nsrl.runs.hyperparameters import PPOOverrides
from tests.rl.builders import trained, zipped


def test_the_default_is_measured_and_its_shares_add_up(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    agent, made = trained()[0], []
    (tmp_path / "agent.zip").write_bytes(zipped(agent))
    for kind, name in ((FusedUpdate, "run"), (Confinement, "project")):
        inner = getattr(kind, name)
        monkeypatch.setattr(kind, name, lambda *args, inner=inner: (made.append(inner.__name__), inner(*args))[1])
    config = FinetuneConfig(
        pair="cartpole_swapped",
        states=BufferSettings(n_states=64, n_envs=2),
        ppo=PPOOverrides(n_envs=2, n_steps=32, batch_size=32),
    )
    found = measure_overhead(config, tmp_path / "agent.zip", repeats=2, steps=256)
    assert set(made) == {"run", "project"} and made.count("run") == made.count("project")
    for name in ("seconds", "processor_seconds"):
        assert {key: len(values) for key, values in found[name].items()} == {"stock": 2, "null_space": 2}
    assert found["constraint_share"] == pytest.approx(sum(found["share_of_run"].values()))
    assert 0.0 < found["constraint_share"] < 1.0 and found["share_of_run"]["confine"] > 0.0
    assert found["share_of_run"]["opening"] > 0.0 and found["ratio"] > 0.0
