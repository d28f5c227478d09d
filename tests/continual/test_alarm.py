"""The budget between two enforcements: measured independently behind every single step."""

import math

import pytest
import torch
import torch.nn.functional as F
from torch.func import functional_call, jacrev

from nsrl.continual import OptimizerConfig, Task, protect
from nsrl.continual.retention import RetainedBehaviour
from nsrl.continual.steering.alarm import Alarm
from nsrl.continual.steering.correction import shortest_correction
from tests.continual.learning import Batches, accuracy, blobs, build, learn, multi_head, network

#: What is promised of any step, next to the budget.
ANY_STEP = 1.1


def _worst_on_the_way(strategy, regression=False, heads=False, tasks=4, epochs=10) -> tuple[float, float]:
    """Largest mean KL of a task on its retained inputs behind a step, in float64, and the last task's accuracy."""
    worst, references = 0.0, []
    for index in range(tasks):
        loader = blobs(index)
        if regression:
            loader = Batches(loader.inputs, torch.stack([loader.inputs[:, index], loader.inputs[:, 0].abs()], 1))
        task = Task(f"task {index}", index, head=index if heads else None)
        strategy.before_task(task, loader)
        for _ in range(epochs):
            for inputs, targets in loader:
                strategy.step((inputs, targets, index))
                for kept, head, then in references:
                    worst = max(worst, _kl(strategy.model, kept, head, then, regression))
        strategy.after_task(task, loader)
        memory = strategy.budget.retained.memory
        kept = memory.inputs[memory.owner == index]
        references.append((kept, task.head, _outputs(strategy.model, kept, task.head)))
    return worst, 0.0 if regression or heads else accuracy(strategy.model, loader)


def _outputs(model, inputs, head):
    with torch.no_grad():
        return (model(inputs) if head is None else model(inputs, head)).double()


def _kl(model, inputs, head, then, regression) -> float:
    now = _outputs(model, inputs, head)
    if regression:
        return float(0.5 * (now - then).square().sum(1).mean())
    return float(F.kl_div(now.log_softmax(1), then.log_softmax(1), log_target=True, reduction="batchmean"))


CASES = {
    "adam": ({}, {}),
    "large steps": ({"optimizer": OptimizerConfig(lr=2e-2)}, {}),
    "momentum": ({"optimizer": OptimizerConfig("sgd", lr=0.05, momentum=0.9)}, {}),
    "plain sgd": ({"optimizer": OptimizerConfig("sgd", lr=0.1)}, {}),
    "no labels": ({"replay": 0.0}, {}),
    "rare draws": ({"replay": 0.0, "multiplier": 1e-3, "draw_every": 20}, {}),
    "few drawn": ({"batch_states": 4}, {}),
    "narrow": ({"kl_budget": 1e-3}, {}),
    "regression": ({"kl_budget": 0.02}, {"regression": True}),
    "heads": ({}, {"heads": True}),
}


@pytest.mark.parametrize("case", CASES)
@pytest.mark.parametrize("name", ["kl_budget", "combined"])
def test_no_step_leaves_the_budget_by_more_than_a_tenth(case, name):
    options, way = CASES[case]
    torch.manual_seed(1)
    model = multi_head(4) if "heads" in way else network()
    if "regression" in way:
        model[-1] = torch.nn.Linear(24, 2)
    options = {"kl_budget": 0.02, "states_per_task": 40, **options}
    strategy = build(name, model, **options)
    worst, learnt = _worst_on_the_way(strategy, **way)
    assert worst <= ANY_STEP * options["kl_budget"]
    # not by standing still
    assert worst >= 0.3 * options["kl_budget"] and (learnt == 0.0 or learnt > 0.8)


def test_without_the_alarm_steps_leave_the_budget_far_behind():
    worst = []
    for alarm in (False, True):
        torch.manual_seed(1)
        strategy = build(
            "kl_budget", kl_budget=2e-3, states_per_task=40, optimizer=OptimizerConfig(lr=2e-2), alarm=alarm
        )
        worst.append(_worst_on_the_way(strategy)[0])
    assert worst[0] > 2 * 2e-3
    assert worst[1] <= ANY_STEP * 2e-3


@pytest.mark.parametrize("method", ["kl_budget", "combined"])
@pytest.mark.parametrize("build_optimizer", [torch.optim.Adam, torch.optim.RMSprop])
def test_a_plain_loop_stays_inside_behind_every_step(method, build_optimizer):
    model = network()
    optimizer = build_optimizer(model.parameters(), lr=5e-3)
    guard = protect(model, optimizer, method=method, kl_budget=0.02)
    references, worst = [], 0.0
    for index in range(3):
        loader = blobs(index)
        for _ in range(20):
            for inputs, targets in loader:
                optimizer.zero_grad()
                F.cross_entropy(model(inputs), targets).backward()
                optimizer.step()
                worst = max([worst, *(_kl(model, kept, None, then, False) for kept, then in references)])
        guard.after_task(loader)
        memory = guard.budget.retained.memory
        kept = memory.inputs[memory.owner == index]
        references.append((kept, _outputs(model, kept, None)))
    assert 0.3 * 0.02 <= worst <= ANY_STEP * 0.02
    assert accuracy(model, loader) > 0.9


def test_a_correction_is_the_shortest_step_to_the_aim():
    torch.manual_seed(0)
    model = network(8).double()
    retained = RetainedBehaviour(20)
    for index in range(3):
        loader = blobs(index)
        retained.add(model, Task(f"task {index}", index), Batches(loader.inputs.double(), loader.targets))
    for parameter in model.parameters():
        parameter.data += 0.1 * torch.randn_like(parameter)
    named = {name: p.detach().clone() for name, p in model.named_parameters()}
    owner, then = retained.memory.owner, retained.reference

    def roots(parameters):
        now = functional_call(model, parameters, (retained.memory.inputs,))
        kl = F.kl_div(now.log_softmax(1), then.log_softmax(1), log_target=True, reduction="none").sum(1)
        return torch.stack([kl[owner == task].mean().sqrt() for task in (0, 2)])

    J = torch.cat([piece.flatten(1) for piece in jacrev(roots)(named).values()], 1)
    aim = 0.5 * float(roots(named).min()) ** 2
    wanted = torch.linalg.lstsq(J, aim**0.5 - roots(named), driver="gelsd").solution
    found = shortest_correction(model, retained, torch.tensor([0, 2]), aim)
    torch.testing.assert_close(found, wanted, rtol=1e-6, atol=1e-9)
    assert all(p.grad is None for p in model.parameters())
    # two rows of one task's direction: still the shortest, and finite
    twice = shortest_correction(model, retained, torch.tensor([2, 2]), aim)
    torch.testing.assert_close(
        twice, shortest_correction(model, retained, torch.tensor([2]), aim), rtol=1e-5, atol=1e-9
    )


def _alarm(now: float = 0.25, speed: float = 0.01) -> Alarm:
    """One task of 100 inputs, whose root has grown by `speed` in the step since it was measured first."""
    alarm = Alarm(limit=1.0)
    owner = torch.zeros(100, dtype=torch.long)
    alarm.begin(torch.full((100,), (math.sqrt(now) - speed) ** 2), owner)
    assert alarm.near().tolist() == [0]  # nothing is known of the steps' length
    alarm._speeds.fill_(0.0)
    alarm.take(torch.tensor([0]), torch.full((100,), now), torch.arange(100), owner)
    return alarm


def test_a_task_is_measured_before_it_can_have_left():
    """Two of the longest steps seen have to fit: half of the room, in steps."""
    alarm = _alarm(speed=0.01)
    quiet = 0
    while not len(alarm.near()):
        quiet += 1
    assert quiet == pytest.approx((1.0 - 0.5) / (2 * 0.01), abs=1)


def test_a_draw_that_tells_of_growth_brings_the_measurement_forward():
    alarm = _alarm(speed=0.01)
    some = torch.arange(0, 100, 5)
    owner = torch.zeros(20, dtype=torch.long)
    assert not len(alarm.near())
    alarm.drawn(torch.full((20,), 0.98), some, owner)
    assert alarm.near().tolist() == [0]
    calm = _alarm(speed=0.01)
    assert not len(calm.near())
    calm.drawn(torch.full((20,), 0.25), some, owner)
    assert not len(calm.near())


@pytest.mark.parametrize("value", [math.nan, math.inf])
def test_what_has_diverged_is_near(value):
    alarm = _alarm()
    alarm.drawn(torch.full((20,), value), torch.arange(20), torch.zeros(20, dtype=torch.long))
    assert alarm.near().tolist() == [0]


def test_a_guess_is_what_was_measured_plus_the_mean_change_and_its_standard_error():
    torch.manual_seed(0)
    then, now = torch.rand(60, dtype=torch.float64), torch.rand(60, dtype=torch.float64) + 0.3
    owner = torch.arange(60) // 20
    alarm = Alarm(limit=10.0)
    alarm.begin(then, owner)
    some = torch.tensor([1, 5, 9, 12, 22, 30, 31])
    alarm.drawn(now[some], some, owner[some])
    for task in (0, 1):
        mine = some[owner[some] == task]
        change = (now - then)[mine]
        wanted = then[owner == task].mean() + change.mean() + change.std() / math.sqrt(len(mine))
        assert float(alarm._guesses[task]) == pytest.approx(float(wanted), rel=1e-9)
    assert float(alarm._guesses[2]) == pytest.approx(float(then[40:].mean()), rel=1e-12)


def test_a_diverged_step_ends_at_feasible_weights():
    strategy = build("kl_budget", kl_budget=0.02, states_per_task=40)
    learn(strategy, Task("first", 0), blobs(0), epochs=3)
    second = blobs(1)
    strategy.before_task(Task("second", 1), second)
    with torch.no_grad():
        next(strategy.model.parameters()).fill_(math.nan)
    strategy.budget.tick(strategy.optimizer)
    assert strategy.budget.largest_divergence() <= 0.02
    assert all(bool(torch.isfinite(p).all()) for p in strategy.model.parameters())
