"""Copies of a constrained model are models of their own, under their own budget; what a run logs at its end."""

from __future__ import annotations

import copy
import csv
import pickle
from pathlib import Path
from typing import Any

import cloudpickle
import pytest
import torch
from stable_baselines3.common.env_util import make_vec_env
from stable_baselines3.common.logger import configure

from nsrl import NullSpacePPO, NullSpaceTRPO, RetentionBuffer, protect
from tests.rl.builders import NEW, SMALL, SpikyReward, trained
from tests.rl.oracles import independent_kl, same_policies, within

BUDGET = 1e-3


def new_task(kind: str = "discrete") -> Any:
    return make_vec_env(NEW[kind], 2, seed=0, wrapper_class=SpikyReward)


def ours(algorithm: Any = NullSpacePPO, **options: Any) -> tuple[Any, RetentionBuffer]:
    agent, buffer = trained()
    settings = SMALL if algorithm is NullSpacePPO else {"n_steps": 64, "target_kl": 0.2}
    return algorithm.from_pretrained(
        agent, new_task(), retain=buffer, kl_budget=BUDGET, **{**settings, "opening": "off", **options}
    ), buffer


def projected() -> tuple[Any, RetentionBuffer]:
    return ours(projection="euclidean", gradient="projected", subset_states=32)


def protected() -> tuple[Any, RetentionBuffer]:
    agent, buffer = trained()
    agent.set_env(new_task())
    return protect(agent, buffer, kl_budget=BUDGET), buffer


WAYS = {
    "pickle": lambda model: pickle.loads(pickle.dumps(model)),
    "cloudpickle": lambda model: pickle.loads(cloudpickle.dumps(model)),
    "deepcopy": copy.deepcopy,
}


@pytest.mark.parametrize("way", WAYS)
@pytest.mark.parametrize("make", [ours, lambda: ours(NullSpaceTRPO), projected, protected])
def test_a_copy_is_held_for_itself(make: Any, way: str) -> None:
    model, buffer = make()
    if way != "deepcopy":  # stock models cannot be copied so once they have learnt either
        model.learn(64)
    twin = WAYS[way](model)
    assert type(twin) is type(model) and same_policies(twin, model)
    assert twin.retention.constraint.policy is twin.policy and twin.retention.model is twin
    before, measured = model.retention.constraint.divergence(), twin.retention.constraint.divergence()
    assert measured == before
    with torch.no_grad():
        for parameter in twin.retention.constraint.parameters.parameters:
            parameter.add_(0.1)
    assert model.retention.constraint.divergence() == before < twin.retention.constraint.divergence()
    twin.policy.load_state_dict(model.policy.state_dict())
    ours_before = [parameter.detach().clone() for parameter in model.policy.parameters()]
    twin.learn(256)
    assert 0.0 < independent_kl(twin, buffer) <= within(BUDGET, buffer)
    assert all(torch.equal(a, b) for a, b in zip(ours_before, model.policy.parameters(), strict=True))


def test_the_last_row_has_its_time_and_nothing_is_logged_without_an_interval(tmp_path: Path) -> None:
    model, _ = ours()
    model.set_logger(configure(str(tmp_path), ["csv"]))
    model.learn(3 * 128)
    assert {"train/loss", "retain/kl_mean", "nullspace/overhead_fraction"} <= model.logger.name_to_value.keys()
    model.logger.close()
    rows = list(csv.DictReader((tmp_path / "progress.csv").open(encoding="utf-8")))
    assert [row["time/total_timesteps"] for row in rows] == ["128", "256", "384", "384"]
    assert rows[-1]["time/iterations"] == "3" and float(rows[-1]["retain/kl_mean"]) == model.retention.last.kl_mean
    silent, _ = ours()
    silent.set_logger(configure(str(tmp_path / "silent"), ["csv"]))
    silent.learn(128, log_interval=None)
    assert silent.logger.name_to_value["retain/kl_mean"] == silent.retention.last.kl_mean
    silent.logger.close()
    assert not (tmp_path / "silent" / "progress.csv").read_text(encoding="utf-8")


def test_the_steps_of_an_opening_are_no_iterations(tmp_path: Path) -> None:
    model, _ = ours(opening=1.0)
    model.set_logger(configure(str(tmp_path), ["csv"]))
    model.learn(3 * 128)
    model.logger.close()
    last = list(csv.DictReader((tmp_path / "progress.csv").open(encoding="utf-8")))[-1]
    assert int(last["time/iterations"]) == model.retention.updates
    assert int(last["time/total_timesteps"]) == model.num_timesteps > 128 * model.retention.updates
