"""What is told of the overhead: of the model as a user gets it, and all of what the constraint takes."""

from __future__ import annotations

from pathlib import Path

import pytest

from nsrl.bench.studies import overhead
from nsrl.bench.studies.overhead import has_sbx, measure_overhead
from nsrl.rl.algorithms.fused_update import FusedUpdate
from nsrl.rl.budget.confinement import Confinement
from nsrl.runs.config import BufferSettings, FinetuneConfig
from nsrl.runs.hyperparameters import PPOOverrides
from tests.rl.builders import trained, zipped


def test_the_default_is_measured_and_its_shares_add_up(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(overhead, "has_sbx", lambda: False)  # compiling takes a minute
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
    assert found["sbx"] is None


@pytest.mark.skipif(not has_sbx(), reason="needs the extra sbx")
def test_sbx_learns_the_same_task_with_the_settings_that_it_knows(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("TF_CPP_MIN_LOG_LEVEL", "TPU_SKIP_MDS_QUERY"):  # JAX sets them for good where nobody has
        monkeypatch.setenv(name, "1")
    agent = Path("runs/reference/agents/cartpole_swapped/default_0_x1.zip")
    config = FinetuneConfig(pair="cartpole_swapped", ppo=PPOOverrides(n_envs=2, n_steps=32, batch_size=32, n_epochs=2))
    model = overhead._run("sbx", config, agent, None, "nsrl/CartPoleSwapped-v0", 64)
    assert type(model).__module__.startswith("sbx.")
    assert (model.n_steps, model.batch_size, model.n_epochs, model.num_timesteps) == (32, 32, 2, 64)
    assert model.observation_space.shape == (5,)
