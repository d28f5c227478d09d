"""The recorder of golden trajectories: the same code gives the same digests, other code does not."""

from __future__ import annotations

import pytest
from stable_baselines3 import PPO

from tests.golden import record
from tests.golden.cases import CASES
from tests.golden.locations import HOMES, locate

#: One of each kind: null-space projections inside PPO, trust regions, supervised learning, the core alone.
SOME = ("ppo projected", "trpo", "continual combined", "projection")


def test_two_recordings_are_equal_in_one_process_and_in_another() -> None:
    first = record.record(SOME)
    assert record.differences(first, record.record(SOME)) == []
    assert record.differences(first, record.record_checkout(record.CHECKOUT, SOME)) == []
    assert set(first) == set(SOME) and all(first.values())


def test_a_change_of_one_update_shows(monkeypatch: pytest.MonkeyPatch) -> None:
    before = record.record(("ppo",))
    train = PPO.train

    def nudged(model: PPO) -> None:
        train(model)
        model.policy.action_net.bias.data.mul_(1.0 + 2.0**-20)

    monkeypatch.setattr(PPO, "train", nudged)
    changed = record.differences(before, record.record(("ppo",)))
    assert "ppo: parameters" in changed and "ppo: report" in changed


def test_differences_name_case_and_part() -> None:
    assert record.differences({"a": {"x": "1", "y": "2"}}, {"a": {"x": "1", "y": "3"}, "b": {"z": "4"}}) == [
        "a: y",
        "b: z",
    ]


@pytest.mark.parametrize("name", sorted(HOMES))
def test_every_name_has_a_home(name: str) -> None:
    assert callable(locate(name))


def test_every_case_has_a_name_that_the_command_takes() -> None:
    assert set(SOME) <= CASES.keys()
