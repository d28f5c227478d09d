"""The comparison with stock TRPO: both run on the same thing, and what is written can be read."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from nsrl.bench.studies import trpo
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


def test_updates_of_a_protected_model_are_timed_as_a_user_gets_them() -> None:
    agent = Path("runs/reference/agents/cartpole_swapped/default_0_x1.zip")
    found = trpo.measure_protected_trpo(agent, "nsrl/CartPole-v0", "nsrl/CartPoleSwapped-v0", rounds=1, warmup=0)
    assert found["confined"] and found["states"] == 2048
    assert found["settings"]["n_critic_updates"] == 10
    assert found["ratio"] == pytest.approx(found["seconds"]["stock"][0] / found["seconds"]["null_space"][0])
    assert trpo.trpo_tables({"updates": [found], "returns": []})[0].rows[0][0].endswith("protected")


def test_returns_are_compared_over_seeds_and_what_is_finished_is_kept(tmp_path: Path, monkeypatch: Any) -> None:
    made: list[dict[str, Any]] = []

    def train(order: dict[str, Any]) -> dict[str, Any]:
        made.append(order)
        return trpo._train(**order)

    monkeypatch.setattr(trpo, "_run_apart", train)
    cases = [trpo.Case("Pendulum-v1", 256, TINY, (0, 1))]
    seen: list[int] = []
    runs = trpo.compare_returns(tmp_path, cases, on_status=lambda status: seen.append(len(status.done)))
    assert [(run["algorithm"], run["seed"]) for run in runs] == [
        ("stock", 0),
        ("null_space", 0),
        ("stock", 1),
        ("null_space", 1),
    ]
    assert seen == [0, 1, 2, 3, 4] and len(made) == 4
    (tmp_path / "Pendulum-v1-stock-seed1.json").unlink()
    assert trpo.compare_returns(tmp_path, cases)[0]["final"] == runs[0]["final"]
    assert len(made) == 5 and made[4]["name"] == "stock" and made[4]["seed"] == 1
    with pytest.raises(NsrlError, match="other settings"):
        trpo.compare_returns(tmp_path, [trpo.Case("Pendulum-v1", 128, TINY)])
    rows = trpo.summarise_returns(runs)
    assert rows[0]["final"] == pytest.approx((runs[0]["final"] + runs[2]["final"]) / 2)
    assert rows[1]["lowest"] == min(runs[1]["final"], runs[3]["final"])


def test_a_scaled_region_is_that_of_the_mean_over_dimensions(monkeypatch: Any) -> None:
    import gymnasium as gym
    import numpy as np

    class TwoTorques(gym.ActionWrapper):
        action_space = gym.spaces.Box(-2.0, 2.0, (2,), np.float32)

        def action(self, action: Any) -> Any:
            return action[:1]

    monkeypatch.setattr(gym.envs.registration, "registry", dict(gym.registry))
    gym.register("TwoTorques-v0", lambda: TwoTorques(gym.make("Pendulum-v1").unwrapped), max_episode_steps=50)
    for name, expected in (("stock", 0.01), ("null_space", 0.01), (trpo.SCALED, 0.02)):
        assert trpo._train(name, 0, "TwoTorques-v0", 64, TINY)["target_kl"] == pytest.approx(expected)


def test_after_a_failure_no_other_run_is_begun_and_none_is_lost(tmp_path: Path, monkeypatch: Any) -> None:
    made: list[int] = []

    def train(order: dict[str, Any]) -> dict[str, Any]:
        made.append(order["seed"])
        if order["seed"] == 1:
            raise NsrlError("no more room")
        return {"seed": order["seed"]}

    monkeypatch.setattr(trpo, "_run_apart", train)
    cases = [trpo.Case("Pendulum-v1", 256, TINY, tuple(range(400)))]
    with pytest.raises(NsrlError, match="no more room"):
        trpo.compare_returns(tmp_path, cases)
    assert len(made) < 400 and made[:3] == [0, 0, 1]
    assert len(list(tmp_path.glob("*.json"))) == sum(seed != 1 for seed in made)


def test_a_run_that_fails_is_told_in_a_sentence(tmp_path: Path) -> None:
    with pytest.raises(NsrlError, match="the run of stock on NoSuchTask-v0, seed 0, failed"):
        trpo._run_apart({"name": "stock", "seed": 0, "env": "NoSuchTask-v0", "steps": 64, "settings": {}})
    with pytest.raises(NsrlError, match="at least one"):
        trpo.compare_returns(tmp_path, [trpo.Case("Pendulum-v1", 128, TINY, ())])
