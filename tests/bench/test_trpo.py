"""The comparison with stock TRPO: both run on the same thing, and what is written can be read."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from nsrl.bench import trpo
from nsrl.errors import NsrlError

TINY: dict[str, Any] = {"n_steps": 64, "batch_size": 32, "n_critic_updates": 1}


def test_updates_are_timed_in_turn_on_one_rollout() -> None:
    found = trpo.measure_trpo("CartPole-v1", rounds=3, warmup=1, **TINY)
    assert [len(seconds) for seconds in found["seconds"].values()] == [3, 3]
    medians = {name: sorted(seconds)[1] for name, seconds in found["seconds"].items()}
    assert found["medians"] == medians and found["states"] == 64
    assert found["ratio"] == pytest.approx(medians["stock"] / medians["null_space"])
    logged = found["logged"]
    # The first critic minibatch is drawn anew, the rollout and the weights are the same.
    assert logged["null_space"]["value_loss"] == pytest.approx(logged["stock"]["value_loss"], rel=0.2)
    json.dumps(found)


def test_returns_are_compared_over_seeds_and_written(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(trpo, "_run_apart", trpo._train)
    seen: list[dict[str, Any]] = []
    found = trpo.compare_returns("Pendulum-v1", 256, (0, 1), out=tmp_path / "returns.json", on_run=seen.append, **TINY)
    assert [(run["algorithm"], run["seed"]) for run in found["runs"]] == [
        ("stock", 0), ("null_space", 0), ("stock", 1), ("null_space", 1),
    ]  # fmt: skip
    assert len(seen) == 4 and json.loads((tmp_path / "returns.json").read_text())["runs"] == found["runs"]
    finals = [run["final"] for run in found["runs"] if run["algorithm"] == "stock"]
    assert found["means"]["stock"]["final"] == pytest.approx(sum(finals) / 2)


@pytest.mark.parametrize(("env", "same_region", "expected"), [
    ("nsrl/Pendulum-v0", True, 0.01), ("CartPole-v1", True, 0.01), ("_TwoTorques", True, 0.02),
    ("_TwoTorques", False, 0.01),
])  # fmt: skip
def test_both_get_the_same_trust_region(env: str, same_region: bool, expected: float, monkeypatch: Any) -> None:
    if env == "_TwoTorques":
        import gymnasium as gym
        import numpy as np

        class TwoTorques(gym.ActionWrapper):
            action_space = gym.spaces.Box(-2.0, 2.0, (2,), np.float32)

            def action(self, action: Any) -> Any:
                return action[:1]

        env = f"TwoTorques{same_region}-v0"
        gym.register(env, lambda: TwoTorques(gym.make("Pendulum-v1").unwrapped), max_episode_steps=50)
    run = trpo._train("null_space", 0, env, 64, same_region, TINY)
    assert run["target_kl"] == pytest.approx(expected)
    assert trpo._train("stock", 0, env, 64, same_region, TINY)["target_kl"] == 0.01


def test_a_run_that_fails_is_told_in_a_sentence(tmp_path: Path) -> None:
    with pytest.raises(NsrlError, match="the run of stock on NoSuchTask-v0, seed 0, failed"):
        trpo._run_apart("stock", 0, "NoSuchTask-v0", 64, True, {})
    with pytest.raises(NsrlError, match="at least one"):
        trpo.compare_returns("CartPole-v1", 64, (), out=tmp_path / "returns.json")
