from types import SimpleNamespace

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from nsrl.errors import NsrlError
from nsrl.rl.training.selection import Selection, best_row

RETURNS = st.integers(-100, 100).map(float)


def rows(*returns):
    return [{"timesteps": 10 * i, "old_returns": {"a": old}, "new_return": new} for i, (old, new) in enumerate(returns)]


@given(st.lists(st.tuples(RETURNS, RETURNS), min_size=1, max_size=9), st.floats(0.0, 1.0))
def test_the_best_has_kept_the_old_task_and_none_that_has_is_better(returns, floor):
    history = rows(*returns)
    chosen = best_row(history, floor)
    least = returns[0][0] - floor * abs(returns[0][0])
    kept = [number for number, (old, _) in enumerate(returns) if old >= least]
    assert chosen in kept, "the first row has kept everything"
    assert all(returns[number][1] < returns[chosen][1] for number in kept if number > chosen)
    assert all(returns[number][1] <= returns[chosen][1] for number in kept)


def test_every_old_task_counts_and_without_any_the_new_return_alone():
    history = rows((10.0, 0.0), (10.0, 5.0), (10.0, 4.0))
    history[0]["old_returns"]["b"] = history[2]["old_returns"]["b"] = -10.0
    history[1]["old_returns"]["b"] = -10.2
    assert best_row(history, 0.01) == 2 and best_row(history, 0.03) == 1
    alone = [row | {"old_returns": {}} for row in history]
    assert best_row(alone, 0.0) == 1
    assert best_row([row | {"new_return": None} for row in history], 0.01) == 2


@pytest.fixture
def run(tmp_path):
    """A selection over a policy of one weight, and a function that evaluates it."""
    policy = torch.nn.Linear(1, 1)
    model = SimpleNamespace(policy=policy, num_timesteps=0)
    evaluation = SimpleNamespace(history=[], skip_end=lambda: False)
    selection = Selection(evaluation, tmp_path / "best.pt")
    selection.model = model

    def evaluate(old, new):
        model.num_timesteps = 10 * len(evaluation.history)
        policy.weight.data.fill_(float(model.num_timesteps))
        evaluation.history.append({"timesteps": model.num_timesteps, "old_returns": {"a": old}, "new_return": new})
        selection._on_rollout_start()

    return SimpleNamespace(selection=selection, model=model, evaluation=evaluation, evaluate=evaluate)


def test_the_weights_of_the_best_come_back(run):
    for old, new in ((100.0, 0.0), (100.0, 9.0), (50.0, 99.0), (100.0, 3.0)):
        run.evaluate(old, new)
    assert run.selection.give_back(run.model) == 10
    assert float(run.model.policy.weight.detach()) == 10.0 and not run.selection.path.exists()


def test_the_last_stays_where_it_is_the_best(run):
    for old, new in ((100.0, 0.0), (100.0, 9.0)):
        run.evaluate(old, new)
    assert run.selection.give_back(run.model) == 10 and float(run.model.policy.weight.detach()) == 10.0


def test_a_resumed_run_finds_the_best_of_before(run):
    for old, new in ((100.0, 0.0), (100.0, 9.0)):
        run.evaluate(old, new)
    resumed = Selection(run.evaluation, run.selection.path)
    resumed.model = run.model
    resumed._on_training_start()
    run.selection = resumed
    run.model.policy.weight.data.fill_(-1.0)
    run.evaluation.history.append({"timesteps": 20, "old_returns": {"a": 100.0}, "new_return": 1.0})
    run.model.num_timesteps = 20
    resumed._on_training_end()
    assert resumed.give_back(run.model) == 10 and float(run.model.policy.weight.detach()) == 10.0


def test_a_damaged_file_is_told(run):
    for old, new in ((100.0, 9.0), (100.0, 0.0)):
        run.evaluate(old, new)
    run.selection.path.write_bytes(b"nothing")
    with pytest.raises(NsrlError, match=r"best\.pt"):
        run.selection.give_back(run.model)
