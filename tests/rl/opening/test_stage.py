"""The opening as part of a run: when it happens, what it costs, what is told of it, and that it happens once."""

from __future__ import annotations

from functools import partial
from pathlib import Path
from typing import Any

import gymnasium as gym
import numpy as np
import pytest
import torch
from gymnasium.envs.classic_control.cartpole import CartPoleEnv
from gymnasium.wrappers import TimeLimit
from stable_baselines3 import A2C, PPO
from stable_baselines3.common.callbacks import BaseCallback
from stable_baselines3.common.env_util import make_vec_env
from stable_baselines3.common.vec_env import DummyVecEnv
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

from nsrl import NullSpacePPO, NullSpaceTRPO, RetentionBuffer, protect
from nsrl.errors import NsrlError
from nsrl.rl import agents
from nsrl.rl.opening.stage import MOST_STEPS, Opening, OpeningRecord
from nsrl.rl.playing.environments import training_env
from nsrl.rl.playing.evaluation import evaluate
from nsrl.rl.surgery import add_context
from nsrl.rl.training import checkpoint
from nsrl.rl.training.tensorboard import open_logger
from nsrl_envs import SwapActions, TaskContext
from tests.rl.builders import NEW, OLD, SMALL, certain, generators_left_alone, trained
from tests.rl.clockwork import AtBoundary, Clockwork
from tests.rl.oracles import independent_kl, same, same_policies, within

BUDGET = 0.01
AGENTS = Path(__file__).parents[3] / "runs" / "reference" / "agents"
SETTINGS: dict[type, dict[str, Any]] = {
    NullSpacePPO: SMALL,
    NullSpaceTRPO: {"n_steps": 64, "batch_size": 64, "n_critic_updates": 2},
}
ENVS = 2


@pytest.fixture
def tight(monkeypatch: pytest.MonkeyPatch) -> None:
    """No units can be freed, as in a network that the old task needs whole."""
    monkeypatch.setattr("nsrl.rl.opening.units.KEPT", ())


class Boundaries(BaseCallback):
    """What is there before the first step of every roll-out."""

    def __init__(self, buffer: RetentionBuffer):
        super().__init__()
        self.buffer = buffer
        self.timesteps: list[int] = []
        self.kls: list[float] = []
        self.entropies: list[float] = []

    def _on_step(self) -> bool:
        return True

    def _on_rollout_start(self) -> None:
        self.timesteps.append(self.model.num_timesteps)
        self.kls.append(independent_kl(self.model, self.buffer))

    def _on_rollout_end(self) -> None:
        observations = torch.as_tensor(self.model.rollout_buffer.observations).flatten(0, 1)
        with torch.no_grad():
            self.entropies.append(float(self.model.policy.get_distribution(observations).entropy().mean()))


def learner(agent: PPO, buffer: RetentionBuffer, algorithm: type = NullSpacePPO, **options: Any) -> Any:
    envs = make_vec_env(NEW["discrete"], ENVS, seed=1)
    return algorithm.from_pretrained(
        agent, envs, retain=buffer, seed=1, **{"kl_budget": BUDGET, **SETTINGS[algorithm], **options}
    )


@pytest.mark.usefixtures("tight")
@pytest.mark.parametrize("algorithm", SETTINGS)
def test_a_certain_policy_is_opened_before_its_first_roll_out(algorithm: type, tmp_path: Path) -> None:
    agent, buffer = certain()
    with torch.no_grad():
        states = buffer.inputs().clone()
        states[:, -1] = 1.0
        start = float(agent.policy.get_distribution(states).entropy().mean())
    model, seen = learner(agent, buffer, algorithm), Boundaries(buffer)
    assert model.retention_report().opening is None
    model.set_logger(open_logger(tmp_path))
    model.learn(2000, callback=seen)
    record = model.retention_report().opening
    assert record is not None and record.skipped == "" and record.steps > 0 and record.columns == 1
    assert record.before < 0.3 < record.after
    assert seen.timesteps[0] == record.states > 0  # the steps count
    assert record.states <= MOST_STEPS * 2000 + 10 * ENVS  # and are whole ones of all environments
    assert seen.timesteps[1] == record.states + 64 * ENVS and seen.timesteps[-1] < 2000
    assert max(seen.kls) <= within(BUDGET, buffer)
    spend = model.retention.config.opening_budget * BUDGET
    assert record.kl <= spend and seen.kls[0] == pytest.approx(record.kl, abs=within(spend, buffer) - spend)
    assert seen.entropies[0] > max(2.0 * start, 0.1)  # it tries things where it goes
    events = EventAccumulator(str(tmp_path)).Reload()
    tags = [tag for tag in events.Tags()["scalars"] if tag.startswith("opening/")]
    assert {"opening/kl", "opening/before", "opening/after"} <= set(tags)
    assert all(len(events.Scalars(tag)) == 1 for tag in tags)
    assert events.Scalars("opening/kl")[0].value == pytest.approx(record.kl, rel=1e-6)  # float32 in the file


def test_a_run_of_one_seed_opens_alike_and_the_callers_generators_stay() -> None:
    runs = []
    for _ in range(2):
        agent, buffer = certain(gap=8.0)
        model = learner(agent, buffer)
        model._setup_learn(600, None)
        before = torch.get_rng_state(), np.random.get_state()[1].tolist()
        model.retention.opening.run(model)
        assert torch.equal(before[0], torch.get_rng_state()) and before[1] == np.random.get_state()[1].tolist()
        runs.append(model)
    assert same_policies(*runs)


def test_an_open_policy_is_left_as_it_is_and_the_record_says_so() -> None:
    agent, buffer = certain(gap=0.1)
    with torch.no_grad():  # nothing is free: the column would be drawn even so
        buffer = moved_context(agent, buffer)
    model, seen = learner(agent, buffer), Boundaries(buffer)
    model._setup_learn(1000, None)
    record = model.retention.opening.run(model)
    assert "open" in record.skipped and record.steps == 0 and record.before == record.after > 0.7
    assert record.columns == 0 and record.states == model.num_timesteps and not model.retention.opening.pending
    actor = [name for name in model.policy.state_dict() if "policy" in name or "action" in name]
    assert all(torch.equal(model.policy.state_dict()[name], agent.policy.state_dict()[name]) for name in actor)
    model.learn(256, callback=seen, reset_num_timesteps=False)
    assert seen.timesteps[0] == record.states and model.retention_report().opening == record


def moved_context(agent: PPO, buffer: RetentionBuffer) -> RetentionBuffer:
    """The same buffer with two values of the context, so that no input stands still."""
    observations = np.array(buffer.observations)
    observations[::2, -1] = 0.5
    with torch.no_grad():
        outputs = agent.policy.get_distribution(torch.tensor(observations)).distribution.logits
    return RetentionBuffer.from_arrays(observations, outputs=outputs.numpy(), action_space=agent.action_space)


@pytest.mark.usefixtures("tight")
def test_off_is_off_and_a_share_is_what_is_opened_to() -> None:
    agent, buffer = trained()
    off, seen = learner(agent, buffer, opening="off"), Boundaries(buffer)
    off.learn(128, callback=seen)
    assert seen.timesteps[0] == 0 and off.retention_report().opening is None
    found = {}
    for share in (0.3, 0.9):
        agent, buffer = certain(gap=8.0)
        model = learner(agent, buffer, opening=share)
        model._setup_learn(4000, None)
        found[share] = model.retention.opening.run(model)
    assert found[0.3].before == found[0.9].before < 0.3
    assert found[0.3].after < found[0.9].after


@pytest.mark.parametrize("method", ["finetune", "kl_penalty"])
@pytest.mark.parametrize("algorithm", SETTINGS)
def test_baselines_are_opened_by_a_number_only(algorithm: type, method: str) -> None:
    agent, buffer = certain(gap=8.0)
    for opening, opened in (("auto", False), (0.5, True)):
        model, seen = learner(agent, buffer, algorithm, method=method, opening=opening), Boundaries(buffer)
        model.learn(2 * 64, callback=seen)
        assert (model.retention_report().opening is not None) is opened
        assert (seen.timesteps[0] > 0) is opened


@pytest.mark.usefixtures("tight")
@pytest.mark.parametrize("algorithm", [PPO, A2C])
def test_in_place(algorithm: type) -> None:
    agent, buffer = certain(gap=8.0)
    settings = SMALL if algorithm is PPO else {"n_steps": 64}
    model = algorithm("MlpPolicy", make_vec_env(NEW["discrete"], ENVS, seed=0), seed=0, device="cpu", **settings)
    model.policy.load_state_dict(agent.policy.state_dict())
    protect(model, buffer, kl_budget=BUDGET, opening=0.8)
    seen = Boundaries(buffer)
    model.learn(700, callback=seen)
    record = model.retention_report().opening
    assert record.steps > 0 and record.after > record.before and max(seen.kls) <= within(BUDGET, buffer)
    steps = model.num_timesteps
    model.learn(128, reset_num_timesteps=False)  # once is enough
    assert model.retention_report().opening == record and model.num_timesteps == steps + 128


class Loud(gym.ObservationWrapper):
    """A constant far from zero, beside which the new task's difference drowns in single precision."""

    def __init__(self, env: gym.Env, size: float):
        super().__init__(env)
        low, high = (
            np.append(bound, np.float32(s))
            for bound, s in zip((env.observation_space.low, env.observation_space.high), (-1e9, 1e9), strict=True)
        )
        self.observation_space = gym.spaces.Box(low, high, dtype=np.float32)
        self.size = size

    def observation(self, observation: np.ndarray) -> np.ndarray:
        return np.append(observation, np.float32(self.size))


def test_columns_that_rounding_would_make_expensive_are_not_drawn() -> None:
    old, new = (
        partial(make_vec_env, NEW["discrete"], ENVS, seed=0, wrapper_class=Loud, wrapper_kwargs={"size": size})
        for size in (1e7, 1.0001e7)
    )
    agent = PPO("MlpPolicy", old(), seed=0, device="cpu", **SMALL)
    with torch.no_grad():
        agent.policy.mlp_extractor.policy_net[0].weight[:, -1] = 0.0
        agent.policy.action_net.weight.mul_(1000.0)
    buffer = RetentionBuffer.collect(agent, old(), n_states=60)
    model, seen = NullSpacePPO.from_pretrained(agent, new(), retain=buffer, kl_budget=1e-4, **SMALL), Boundaries(buffer)
    model.learn(256, callback=seen)
    assert max(seen.kls) <= within(1e-4, buffer)


# -- going on ----------------------------------------------------------------------------------------------------------


def clockwork() -> tuple[PPO, RetentionBuffer]:
    """A certain agent on a task whose resets are deterministic and whose episodes end with the roll-outs."""
    with generators_left_alone():
        agent = PPO("MlpPolicy", DummyVecEnv([Clockwork]), n_steps=32, batch_size=32, seed=0, device="cpu")
        with torch.no_grad():
            agent.policy.action_net.weight.mul_(3000.0)
        return agent, RetentionBuffer.collect(agent, DummyVecEnv([Clockwork] * 2), n_states=64, seed=0)


@pytest.mark.parametrize("algorithm", SETTINGS)
def test_a_resumed_run_does_not_open_again_and_is_the_uninterrupted_one_bit_for_bit(
    algorithm: type, tmp_path: Path
) -> None:
    agent, buffer = clockwork()
    total, times = 640, []

    def build() -> Any:
        return algorithm.from_pretrained(
            agent,
            DummyVecEnv([Clockwork] * 2),
            retain=buffer,
            kl_budget=BUDGET,
            seed=1,
            **{**SETTINGS[algorithm], "n_steps": 32},
        )

    def save(model: Any) -> None:
        times.append(model.num_timesteps)
        checkpoint.save(tmp_path / "middle", model)

    model = build()
    model.learn(total, callback=AtBoundary(256, save))
    record = model.retention_report().opening
    assert record.steps > 0
    resumed, seen = build(), Boundaries(buffer)
    checkpoint.restore(tmp_path / "middle", resumed)
    assert resumed.retention_report().opening == record
    assert same(resumed.retention.opening.states, model.retention.opening.states)
    resumed.learn(checkpoint.remaining(resumed, total), callback=seen, reset_num_timesteps=False)
    assert seen.timesteps[0] == times[0] >= 256 and resumed.num_timesteps == model.num_timesteps
    assert same(resumed.policy.state_dict(), model.policy.state_dict())
    assert same(resumed.policy.optimizer.state_dict(), model.policy.optimizer.state_dict())


def opened_by_hand(model: Any) -> Opening:
    opening = model.retention.opening
    opening.record = OpeningRecord(20, 1, 0.1, 0.9, 1e-3, 7, 0.5)
    opening.states = opening._constraint.inputs[:9].clone()
    return opening


def test_a_damaged_entry_is_refused() -> None:
    agent, buffer = certain()
    opening = opened_by_hand(learner(agent, buffer))
    whole = opening.state_dict()
    opening.check_state(whole)
    opening.check_state({"record": None, "states": None})
    record, states = whole["record"], whole["states"]
    for damaged in (
        None,
        {},
        {"record": record},
        {**whole, "more": 1},
        {**whole, "record": {}},
        {**whole, "record": {**record, "kl": "0"}},
        {**whole, "record": {**record, "kl": float("nan")}},
        {**whole, "record": {**record, "columns": -1}},
        {**whole, "record": {**record, "states": True}},
        {**whole, "record": {**record, "skipped": 3}},
        {**whole, "states": 3},
        {**whole, "states": states.double()},
        {**whole, "states": states[:, :2]},
        {**whole, "states": states[:0]},
        {**whole, "states": torch.tensor(1.0)},
        {**whole, "states": states * float("nan")},
        {**whole, "states": {"a": states}},
    ):
        with pytest.raises(NsrlError):
            opening.check_state(damaged)


def test_a_checkpoint_with_a_damaged_opening_changes_nothing(tmp_path: Path) -> None:
    agent, buffer = certain()
    model = learner(agent, buffer)
    opening = opened_by_hand(model)
    opening.states = opening.states[:, :3]
    checkpoint.save(tmp_path / "c", model)
    fresh = learner(agent, buffer)
    before = {name: value.clone() for name, value in fresh.policy.state_dict().items()}
    with pytest.raises(NsrlError, match=r"damaged.*opening"):
        checkpoint.restore(tmp_path / "c", fresh)
    assert fresh.retention.opening.pending
    assert all(torch.equal(value, before[name]) for name, value in fresh.policy.state_dict().items())


def test_no_unit_is_fitted_to_held_out_states(monkeypatch: pytest.MonkeyPatch) -> None:
    agent, buffer = certain(gap=8.0)
    model = learner(agent, buffer)
    constraint, given = model.retention.constraint, []
    monkeypatch.setattr("nsrl.rl.opening.stage.free_units", lambda policy, old, *_, **__: given.append(old))
    model._setup_learn(600, None)
    model.retention.opening.run(model)
    assert torch.equal(given[0], constraint.inputs[constraint.train]) and len(constraint.heldout) > 0


def test_the_line_of_a_gaussian_says_nothing_of_openness() -> None:
    record = OpeningRecord(96, 0, 1.0, 1.0, 1e-4, 0, 0.5, units=96)
    assert record.text() == "opening: 96 free units; KL 0.0001 on the buffer, 96 timesteps, 0.5 s"
    assert OpeningRecord(96, 0, 0.1, 0.9, 1e-4, 0, 0.5).text().startswith("opening: 10% -> 90% open on new states; KL")


@pytest.mark.parametrize("algorithm", SETTINGS)
def test_where_units_are_free_a_small_share_of_the_budget_is_aimed_at(algorithm: type, tmp_path: Path) -> None:
    agent, buffer = certain(gap=8.0)
    model = learner(agent, buffer, algorithm, confine="off")
    model.learn(2000)
    engine, record = model.retention, model.retention_report().opening
    aim = engine.config.free_target * BUDGET
    assert record.units > 0 and aim < 0.5 * BUDGET
    assert engine.enforcement.aim == aim and engine.multiplier.target <= aim
    # a model that is loaded goes on as thriftily, though its opening is behind it
    model.save(tmp_path / "model.zip")
    loaded = algorithm.load(tmp_path / "model.zip", env=model.get_env(), retain=buffer)
    loaded.learn(64 * ENVS, reset_num_timesteps=False)
    assert not loaded.retention.opening.pending and loaded.retention.enforcement.aim == aim


@pytest.mark.usefixtures("tight")
def test_where_no_units_are_free_the_target_is_aimed_at() -> None:
    agent, buffer = certain(gap=8.0)
    model = learner(agent, buffer)
    model.learn(2000)
    assert model.retention_report().opening.units == 0
    assert model.retention.enforcement.aim == model.retention.config.target * BUDGET


def test_the_smaller_of_both_targets_counts() -> None:
    agent, buffer = certain(gap=8.0)
    model = learner(agent, buffer, target=0.05)
    model.learn(2000)
    assert model.retention_report().opening.units > 0 and model.retention.enforcement.aim == 0.05 * BUDGET
    for wrong in (0.0, 1.5):
        with pytest.raises(NsrlError, match="free_target"):
            learner(agent, buffer, free_target=wrong)


@pytest.mark.usefixtures("tight")
@pytest.mark.parametrize("algorithm", SETTINGS)
def test_means_beyond_the_action_space_come_back_where_the_new_task_is(algorithm: type) -> None:
    """A free column may carry them there: all that is tried is the bound then, and nothing can be learnt."""
    agent, _ = trained("box")
    with torch.no_grad():
        agent.policy.action_net.weight.mul_(300.0)
    buffer = RetentionBuffer.collect(agent, OLD["box"], n_states=160, n_envs=2)
    envs = make_vec_env(NEW["box"], ENVS, seed=1)
    model = algorithm.from_pretrained(agent, envs, retain=buffer, seed=1, kl_budget=BUDGET, **SETTINGS[algorithm])
    model.learn(2000)
    record = model.retention_report().opening
    assert record.units == 0 and record.before < 0.5 and record.after > 2.0 * record.before + 0.1
    assert independent_kl(model, buffer) <= within(BUDGET, buffer)


@pytest.mark.parametrize("algorithm", SETTINGS)
def test_what_pays_in_the_new_task_is_as_it_was_behind_the_opening(algorithm: type) -> None:
    """As when an agent that has learnt the new task by half is fine-tuned again."""
    agent = PPO.load(AGENTS / "cartpole_swapped" / "default_0_x1.zip", device="cpu")
    with torch.no_grad():  # it does in the new task what it does in the old one
        agent.policy.mlp_extractor.policy_net[0].weight[:, -1] = 0.0
    buffer = RetentionBuffer.collect(agent, OLD["discrete"], n_states=512, n_envs=2)
    envs = DummyVecEnv([lambda: TimeLimit(TaskContext(CartPoleEnv(), value=1.0), 500)] * 8)
    model = algorithm.from_pretrained(agent, envs, retain=buffer, seed=1, kl_budget=BUDGET, **SETTINGS[algorithm])
    before = evaluate(model, envs, episodes=8, seed=5).mean
    model._setup_learn(20_000, None)
    record = model.retention.opening.run(model)
    assert before > 400.0 and record.pays and record.units > 0
    assert evaluate(model, envs, episodes=8, seed=5).mean > 400.0
    assert independent_kl(model, buffer) <= within(BUDGET, buffer)


class PaysAtFirst(gym.Wrapper):
    """Earns for a while, and costs more than that from then on."""

    def reset(self, **options: Any) -> Any:
        self.steps = 0
        return self.env.reset(**options)

    def step(self, action: Any) -> Any:
        self.steps += 1
        seen, _, *ends = self.env.step(action)
        return seen, 1.0 if self.steps <= 40 else -3.0, *ends


@pytest.mark.parametrize(("longer", "pays"), [(256, False), (0, True)])
def test_what_pays_for_a_while_only_does_not_pay(longer: int, pays: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    """Within the first stretches, of 32 steps, it does: a random policy has dropped the pole by then."""
    monkeypatch.setattr("nsrl.rl.opening.stage.LONGER", longer)
    agent = PPO.load(AGENTS / "cartpole_swapped" / "default_0_x1.zip", device="cpu")
    with torch.no_grad():
        agent.policy.mlp_extractor.policy_net[0].weight[:, -1] = 0.0
    buffer = RetentionBuffer.collect(agent, OLD["discrete"], n_states=512, n_envs=2)
    envs = DummyVecEnv([lambda: PaysAtFirst(TimeLimit(TaskContext(CartPoleEnv(), value=1.0), 500))] * 8)
    model = NullSpacePPO.from_pretrained(agent, envs, retain=buffer, seed=1, kl_budget=BUDGET, **SMALL)
    model._setup_learn(20_000, None)
    record = model.retention.opening.run(model)
    assert record.pays is pays
    # a roll-out's share more, since environments step together
    assert record.states <= MOST_STEPS * 20_000 + 8


class PaysLater(PaysAtFirst):
    """Earns nothing for a while, as on the way to a goal."""

    def step(self, action: Any) -> Any:
        seen, _, *ends = super().step(action)
        return seen, float(self.steps > 100), *ends


@pytest.mark.parametrize("good", [True, False])
def test_who_reaches_a_goal_far_away_is_found_out(good: bool) -> None:
    """A random policy has dropped the pole by then, and so has one that pushes the wrong way: nobody looks again."""
    agent = PPO.load(AGENTS / "cartpole_swapped" / "default_0_x1.zip", device="cpu")
    with torch.no_grad():
        agent.policy.mlp_extractor.policy_net[0].weight[:, -1] = 0.0

    def pole() -> gym.Env:
        env: gym.Env = TimeLimit(CartPoleEnv(), 500)
        return PaysLater(TaskContext(env if good else SwapActions(env), value=1.0))

    buffer = RetentionBuffer.collect(agent, OLD["discrete"], n_states=512, n_envs=2)
    envs = DummyVecEnv([pole] * 8)
    model = NullSpacePPO.from_pretrained(agent, envs, retain=buffer, seed=1, kl_budget=BUDGET, **SMALL)
    model._setup_learn(80_000, None)
    record = model.retention.opening.run(model)
    assert record.pays is good and record.units > 0
    first, longer = 1536, 8 * 256
    assert record.states == first + (2 * longer if good else longer)
    if good:
        assert evaluate(model, DummyVecEnv([pole] * 8), episodes=8, seed=5).mean > 200.0


class Effort(gym.Wrapper):
    """Actions cost what they are large, and nothing else counts."""

    def step(self, action: Any) -> Any:
        seen, _, *ends = self.env.step(action)
        return seen, -float(np.abs(action).sum()), *ends


@pytest.mark.parametrize("resting", [True, False])
def test_what_pays_less_than_doing_nothing_does_not_pay(resting: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    if not resting:
        monkeypatch.setattr("nsrl.rl.opening.stage.resting_action", lambda _: None)
    agent = PPO("MlpPolicy", OLD["box"], seed=0, device="cpu")
    with torch.no_grad():
        agent.policy.log_std.fill_(-2.0)  # calm beside random actions
    buffer = RetentionBuffer.collect(agent, OLD["box"], n_states=512, n_envs=2)
    envs = make_vec_env(NEW["box"], 8, seed=1, wrapper_class=Effort)
    model = NullSpacePPO.from_pretrained(agent, envs, retain=buffer, seed=1, kl_budget=BUDGET, **SMALL)
    model._setup_learn(60_000, None)
    assert model.retention.opening.run(model).pays is not resting


def pendulum(value: float) -> gym.Env:
    """The same task whatever the context says."""
    return TaskContext(gym.make("Pendulum-v1"), value=value)


def test_units_are_freed_where_an_agent_of_gsde_goes_on_with_what_it_does() -> None:
    """It gets a spread of its own in the new task, which is not what has to be as it was."""
    agent = add_context(agents.load(AGENTS / "pendulum_gsde" / "ppo"), 1)
    with torch.no_grad():
        agent.model.policy.log_std.sub_(3.0)  # certain, as agents are that were trained for long
    old, new = ([partial(pendulum, value)] * 8 for value in (0.0, 1.0))
    buffer = RetentionBuffer.collect(agent, DummyVecEnv(old), n_states=512)
    envs = training_env(DummyVecEnv(new), agent.normalizer, seed=1)
    model = NullSpacePPO.from_pretrained(agent, envs, retain=buffer, seed=1, kl_budget=BUDGET, **SMALL)
    model._setup_learn(60_000, None)
    before = evaluate(model, envs, episodes=16, seed=5).mean
    record = model.retention.opening.run(model)
    assert record.pays and record.units > 0
    assert independent_kl(model, buffer) <= within(BUDGET, buffer)
    # a random policy has -1,200
    assert before > -250.0
    assert evaluate(model, envs, episodes=16, seed=5).mean > before - 50.0


class Stopped(Exception):
    """Of an environment, or of whoever sits at the keyboard."""


@pytest.mark.parametrize("error", [Stopped, KeyboardInterrupt])
@pytest.mark.parametrize(
    "where",
    [
        "nsrl.rl.opening.units.FreshNetwork._inner",  # the old task is condensed, and nothing is planted yet
        "nsrl.rl.opening.units.FreshNetwork._head",
        "nsrl.rl.opening.stage.open_outputs",
    ],
)
def test_an_exception_in_the_middle_leaves_the_policy_as_it_was(
    where: str, error: type[BaseException], monkeypatch: pytest.MonkeyPatch
) -> None:
    agent, buffer = certain()
    if where.endswith("open_outputs"):
        monkeypatch.setattr("nsrl.rl.opening.units.KEPT", ())
    else:
        monkeypatch.setattr("nsrl.rl.opening.units.KEPT", (0.05, 0.5))  # too few units for the old task, to begin with
    model = learner(agent, buffer)
    before = {name: value.clone() for name, value in model.policy.state_dict().items()}
    with monkeypatch.context() as broken:

        def stop(*_: Any, **__: Any) -> None:
            raise error

        broken.setattr(where, stop)
        with pytest.raises(error):
            model.learn(600)
    assert all(torch.equal(value, before[name]) for name, value in model.policy.state_dict().items())
    assert model.retention.opening.pending and not model.policy.training
    model.learn(600)
    assert model.retention_report().opening is not None
    assert independent_kl(model, buffer) <= within(BUDGET, buffer)
