"""Checkpoints: nothing lost, nothing half written, nothing foreign accepted; runs that go on as if never stopped."""

import io
import json
import os
import random
import signal
import subprocess
import sys
import threading
import time
import zipfile
from dataclasses import replace
from functools import partial
from pathlib import Path

import gymnasium as gym
import numpy as np
import pytest
import torch
from stable_baselines3 import A2C, PPO
from stable_baselines3.common.env_util import make_vec_env
from stable_baselines3.common.utils import LinearSchedule
from stable_baselines3.common.vec_env import DummyVecEnv, SubprocVecEnv, VecNormalize
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

import nsrl_envs  # noqa: F401  registers the ids
from nsrl.errors import NsrlError
from nsrl.rl.agents.normalization import ObservationNormalizer, RetainingVecNormalize
from nsrl.rl.algorithms.mixin import ProtectedMixin
from nsrl.rl.budget.config import RetentionConfig
from nsrl.rl.playing.evaluation import evaluate
from nsrl.rl.retention.buffer import RetentionBuffer
from nsrl.rl.training.callbacks import TaskEvaluation
from nsrl.rl.training.checkpoint import Checkpoint, read_checkpoint, remaining, restore, save
from nsrl.rl.training.interruption import graceful_interrupts
from nsrl.rl.training.random_state import BIT_GENERATORS, read_generators, write_generators
from nsrl.rl.training.tensorboard import open_logger
from tests.rl import clockwork as clockwork_
from tests.rl.clockwork import (
    N_ENVS,
    N_STEPS,
    NEW,
    OLD,
    ROLLOUT,
    At,
    AtBoundary,
    Clock,
    Clockwork,
    build_buffer,
    build_expert,
    build_model,
)
from tests.rl.oracles import independent_kl, same, within

NORMALIZER = ObservationNormalizer(mean=np.zeros(5), var=np.array([1.0, 2.0, 0.1, 2.0, 1.0]))


@pytest.fixture
def expert() -> PPO:
    return build_expert()


@pytest.fixture
def buffer(expert) -> RetentionBuffer:
    return build_buffer(expert)


def raising(error):
    def action(_):
        raise error

    return action


def state_of(model) -> dict:
    """Everything that a run is made of, gathered without the code under test."""
    normalize = model.get_vec_normalize_env()
    inner = model.env.unwrapped
    return {
        "policy": model.policy.state_dict(),
        "optimizer": model.policy.optimizer.state_dict(),
        "counters": [model.num_timesteps, model._total_timesteps, model._n_updates, model._episode_num],
        "episodes": list(model.ep_info_buffer),
        "progress": model._current_progress_remaining,
        "python": random.getstate(),
        "numpy": np.random.get_state()[1:],
        "torch": torch.get_rng_state(),
        "envs": [env.unwrapped._np_random.bit_generator.state for env in inner.envs],
        "spaces": [env.action_space._np_random.bit_generator.state for env in inner.envs],
        "rewards": None if normalize is None else [getattr(normalize.ret_rms, k) for k in ("mean", "var", "count")],
        "retention": None if model.retention is None else model.retention.state_dict(),
    }


@pytest.mark.parametrize("method", ["null_space", "kl_penalty", None])
def test_round_trip_of_everything(expert, buffer, tmp_path, method):
    def build(seed):
        env = RetainingVecNormalize(make_vec_env(NEW, N_ENVS, seed=seed), NORMALIZER)
        for index in range(N_ENVS):
            env.get_attr("action_space")[index].seed(seed + index)
        options = {} if method is None else {"method": method, "penalty": 0.5}
        return build_model(expert, buffer if method else None, env=env, seed=seed, **options)

    model = build(seed=5)
    # the buffer knows the policy without statistics: only the measure of it would differ, not what is tested
    evaluation = TaskEvaluation((NEW, NORMALIZER), {"old": (OLD, None)}, every=ROLLOUT, episodes=2)
    path = tmp_path / "run" / "checkpoint"
    model.learn(3 * ROLLOUT, callback=[evaluation, Checkpoint(path, every=ROLLOUT, evaluation=evaluation)])
    kl = None if method is None else model.retention.constraint.divergence()
    expected = state_of(model)
    learnt = model.policy.optimizer.state_dict()["state"]
    assert learnt and len(model.ep_info_buffer) > 2  # otherwise equality would mean nothing

    fresh = build(seed=11)
    random.seed(1), np.random.seed(1), torch.manual_seed(1)
    restored = restore(path, fresh)
    found = state_of(fresh)
    for name in expected:
        assert same(found[name], expected[name]), name
    assert restored["timesteps"] == restored["total_timesteps"] == 3 * ROLLOUT
    assert restored["history"] == evaluation.history
    assert restored["kl_mean"] == (None if kl is None else pytest.approx(kl, rel=1e-6))
    assert fresh._last_obs is None and fresh.env.unwrapped._seeds == [None] * N_ENVS
    assert [entry.name for entry in path.parent.iterdir()] == ["checkpoint"]


def test_evaluations_are_no_part_of_the_time_that_learning_took(expert, buffer, tmp_path, monkeypatch):
    """On a clock that runs in steps of the environment, where an evaluation takes a hundred."""
    clock, path = [0.0], tmp_path / "checkpoint"

    def tick(seconds, answer=None):
        clock[0] += seconds
        return answer

    for module in ("training.callbacks", "training.checkpoint", "algorithms.mixin"):
        monkeypatch.setattr(f"nsrl.rl.{module}.perf_counter", lambda: clock[0])
    played = evaluate(expert, OLD, episodes=1)
    monkeypatch.setattr("nsrl.rl.training.callbacks.evaluate", lambda *args, **options: tick(100.0, played))
    model = build_model(expert, buffer)
    evaluation = TaskEvaluation((NEW, None), {"old": (OLD, None)}, every=ROLLOUT, episodes=1)
    ticking = Clock(lambda _: tick(1.0))
    model.learn(3 * ROLLOUT, callback=[evaluation, Checkpoint(path, every=ROLLOUT, evaluation=evaluation), ticking])
    assert len(evaluation.history) == 4 and clock[0] == 4 * 200.0 + 3 * N_STEPS
    assert model._learning_seconds == 3 * N_STEPS
    fresh = build_model(expert, buffer)
    restore(path, fresh)
    assert fresh._learning_seconds == 3 * N_STEPS


class ProtectedA2C(ProtectedMixin, A2C):
    pass


@pytest.fixture
def clockwork() -> tuple[PPO, RetentionBuffer]:
    agent = PPO("MlpPolicy", DummyVecEnv([Clockwork]), n_steps=N_STEPS, batch_size=16, n_epochs=2, device="cpu")
    return agent, RetentionBuffer.collect(agent, DummyVecEnv([Clockwork] * 2), n_states=64, seed=0)


@pytest.mark.parametrize("kind", ["stock", "null_space", "projected", "protected A2C"])
def test_continues_bit_for_bit(clockwork, tmp_path, kind):
    """Where resets are deterministic and all episodes have just ended, a resumed run is the uninterrupted one."""
    agent, kept = clockwork
    total = 6 * ROLLOUT

    def build():
        env = RetainingVecNormalize(DummyVecEnv([Clockwork] * N_ENVS), None)
        if kind == "protected A2C":
            rate = LinearSchedule(7e-3, 1e-4, 1.0)
            model = ProtectedA2C("MlpPolicy", env, n_steps=N_STEPS, learning_rate=rate, device="cpu", seed=1)
            model.policy.load_state_dict(agent.policy.state_dict())
            model.constrain(kept, RetentionConfig(kl_budget=1e-4, critic="keep", opening="off"))
            return model
        options = {"projection": "optimizer", "subset_states": 16} if kind == "projected" else {}
        return build_model(agent, None if kind == "stock" else kept, env=env, **options)

    def outcome(model):
        return {
            "policy": model.policy.state_dict(),
            "optimizer": model.policy.optimizer.state_dict(),
            "counters": [model.num_timesteps, model._total_timesteps, model._n_updates],
            "returns": [episode["r"] for episode in model.ep_info_buffer],
            "observations": model._last_obs,
            "rewards": vars(model.get_vec_normalize_env().ret_rms),
        }

    model = build()
    model.learn(total, callback=AtBoundary(2 * ROLLOUT, partial(save, tmp_path / "middle")))
    resumed = build()
    restored = restore(tmp_path / "middle", resumed)
    assert (restored["timesteps"], restored["total_timesteps"]) == (2 * ROLLOUT, total)
    assert not same(resumed.policy.state_dict(), model.policy.state_dict())
    resumed.learn(remaining(resumed, total), reset_num_timesteps=False)
    expected, found = outcome(model), outcome(resumed)
    assert found["optimizer"]["param_groups"][0]["lr"] == pytest.approx(1e-4)  # the schedule ran to its end
    for name in expected:
        assert same(found[name], expected[name]), name


def test_stock_statistics_come_back_too(expert, tmp_path):
    def build():
        env = VecNormalize(make_vec_env(NEW, N_ENVS))
        return PPO("MlpPolicy", env, n_steps=N_STEPS, batch_size=32, n_epochs=1, device="cpu")

    model, fresh = build(), build()
    model.learn(ROLLOUT)
    save(tmp_path / "c", model)
    restore(tmp_path / "c", fresh)
    for name in ("obs_rms", "ret_rms"):
        expected, found = (vars(getattr(m.get_vec_normalize_env(), name)) for m in (model, fresh))
        assert same(found, expected)
        assert found["count"] > ROLLOUT


# Spawned: a fork would copy locks that torch's threads hold. One kind there, since a process takes seconds to start.
@pytest.mark.parametrize(
    ("venv", "kind"),
    [
        *((DummyVecEnv, kind) for kind in BIT_GENERATORS),
        (partial(SubprocVecEnv, start_method="spawn"), "SFC64"),
    ],
)
def test_generators_of_every_kind(venv, kind):
    def make():
        env = gym.make(f"nsrl_envs:{OLD}")  # a spawned process has imported nothing yet
        env.unwrapped._np_random = np.random.Generator(BIT_GENERATORS[kind](random.randrange(2**32)))
        env.action_space._np_random = np.random.Generator(BIT_GENERATORS[kind](random.randrange(2**32)))
        return env

    class Model:
        env = venv([make, make])

        def get_env(self):
            return self.env

    def draw():
        env = Model.env
        drawn = [random.random(), np.random.rand(), torch.rand(1).item(), env.reset().tolist()]
        return [*drawn, [space._np_random.random() for space in env.get_attr("action_space")]]

    try:
        state = read_generators(Model())
        state = {**json.loads(json.dumps({k: v for k, v in state.items() if k != "torch"})), "torch": state["torch"]}
        first = draw()
        assert draw() != first
        write_generators(Model(), state)
        assert draw() == first
    finally:
        Model.env.close()


def damaged_writers(monkeypatch):
    """Ways in which a write can end in the middle."""

    def half(tensors, stream):
        stream.write(b"PK half a file")
        raise OSError(28, "No space left on device")

    def stop(*_):
        raise KeyboardInterrupt

    yield NsrlError, lambda: monkeypatch.setattr(torch, "save", half)
    yield KeyboardInterrupt, lambda: monkeypatch.setattr(torch, "save", stop)
    yield NsrlError, lambda: monkeypatch.setattr(os, "fsync", raising(OSError(5, "Input/output error")))
    yield KeyboardInterrupt, lambda: monkeypatch.setattr(os, "replace", stop)


def row(timesteps):
    """Of the history, as `TaskEvaluation` writes it."""
    nothing = dict.fromkeys(("new_return", "kl_mean", "kl_heldout", "agreement"))
    return {"timesteps": timesteps, "old_returns": {}, "seconds": 0.0, **nothing}


@pytest.mark.parametrize("way", range(4))
def test_a_crash_while_writing_leaves_the_old_one(expert, buffer, tmp_path, monkeypatch, way):
    path = tmp_path / "checkpoint"
    model = build_model(expert, buffer)
    save(path, model, [row(0)])
    before = path.read_bytes()
    error, damage = list(damaged_writers(monkeypatch))[way]
    damage()
    with pytest.raises(error):
        save(path, model, [row(1)])
    monkeypatch.undo()
    assert path.read_bytes() == before
    assert list(tmp_path.iterdir()) == [path]
    (tmp_path / ".checkpoint.tmp").write_bytes(b"what a killed process leaves")
    save(path, model, [row(2)])
    assert restore(path, build_model(expert, buffer))["history"] == [row(2)]
    assert list(tmp_path.iterdir()) == [path]


def test_a_full_disk_does_not_end_the_run(expert, tmp_path, monkeypatch):
    path = tmp_path / "checkpoint"

    def fill(_):
        monkeypatch.setattr(os, "replace", raising_os_error)

    def raising_os_error(*_):
        raise OSError(28, "No space left on device")

    with pytest.warns(UserWarning, match="No space left on device; the run goes on"):
        callbacks = [
            Checkpoint(path, every=ROLLOUT),
            At(ROLLOUT // 2, fill),
            At(2 * ROLLOUT, lambda _: monkeypatch.undo()),
        ]
        build_model(expert).learn(3 * ROLLOUT, callback=callbacks)
    assert read_checkpoint(path)[0]["counters"]["num_timesteps"] == 3 * ROLLOUT
    monkeypatch.setattr(os, "replace", raising_os_error)
    with pytest.raises(NsrlError, match=r"cannot write .*checkpoint.* No space left"):
        build_model(expert).learn(ROLLOUT, callback=Checkpoint(path))


def test_damaged_files_are_refused(expert, tmp_path):
    model, path = build_model(expert), tmp_path / "checkpoint"
    with pytest.raises(NsrlError, match="no checkpoint at"):
        restore(path, model)
    whole = save(path, model).read_bytes()
    untouched = [p.clone() for p in model.policy.parameters()]
    damages = {length: whole[:length] for length in (0, 10, len(whole) // 2, len(whole) - 1)}
    for position in np.random.default_rng(0).integers(200, len(whole) - 2000, 20):  # within the stored members
        flipped = bytearray(whole)
        flipped[position] ^= 0x55
        damages[f"byte {position}"] = bytes(flipped)
    for damage, content in damages.items():
        path.write_bytes(content)
        with pytest.raises(NsrlError, match="truncated or damaged"):
            restore(path, model)
            pytest.fail(f"accepted: {damage}")
    assert same(untouched, list(model.policy.parameters()))


def rewrite(path, state=None, tensors=None):
    """Replace parts of a checkpoint, checksums and all."""
    old_state, old_tensors = read_checkpoint(path)
    stream = io.BytesIO()
    torch.save(tensors or old_tensors, stream)
    with zipfile.ZipFile(path, "w") as archive:
        archive.writestr("state.json", json.dumps({**old_state, **(state or {})}))
        archive.writestr("tensors.pt", stream.getvalue())


def test_pickled_objects_and_other_formats_are_refused(expert, tmp_path):
    model, path = build_model(expert), tmp_path / "checkpoint"
    save(path, model)
    rewrite(path, state={"format": 2})
    with pytest.raises(NsrlError, match=r"a checkpoint of format 2, written by nsrl .*reads format 1; install nsrl"):
        restore(path, model)

    class Evil:
        def __reduce__(self):
            return os.mkdir, (str(tmp_path / "run by the unpickler"),)

    rewrite(save(path, model), tensors={"modules": Evil()})
    with pytest.raises(NsrlError, match="damaged"):
        restore(path, model)
    assert not (tmp_path / "run by the unpickler").exists()


def test_foreign_checkpoints_are_refused_untouched(expert, buffer, tmp_path):
    path = tmp_path / "checkpoint"
    other_buffer = replace(buffer, weights=buffer.weights * 2.0)

    def wrapped(normalizer):
        return RetainingVecNormalize(make_vec_env(NEW, N_ENVS), normalizer)

    moved = replace(NORMALIZER, mean=np.full(5, 0.1))
    wide = PPO("MlpPolicy", OLD, n_steps=32, batch_size=32, policy_kwargs={"net_arch": [32]}, device="cpu")
    cases = [
        ({"retain": buffer}, {"retain": other_buffer}, "another retention buffer"),
        ({"retain": buffer}, {"retain": buffer, "kl_budget": 0.2}, "kl_budget was 0.0001 in its run and is 0.2 now"),
        ({"retain": buffer}, {"retain": None}, "retention was Retention in its run and is None now"),
        ({"retain": buffer}, {"retain": buffer, "method": "finetune"}, "Retention in its run and is Monitor now"),
        (
            {"retain": buffer, "method": "kl_penalty", "penalty": 2.0},
            {"retain": buffer, "method": "kl_penalty", "penalty": 1.0},
            "penalty was 2.0 in its run and is 1.0 now",
        ),
        ({}, {"agent": wide}, r"shape \(64, 5\).* resume with the architecture of the run"),
        ({}, {"env": make_vec_env(NEW, 3)}, "number of environments was 2"),
        ({}, {"env": wrapped(None)}, r"statistics \[\], the environment has \['rewards'\]"),
        ({"env": wrapped(NORMALIZER)}, {"env": wrapped(moved)}, "frozen observation statistics are others"),
    ]

    def build(agent=expert, retain=None, **options):
        return build_model(agent, retain, **options)

    for ours, theirs, message in cases:
        save(path, build(**ours))
        stranger = build(**theirs)
        before = [p.clone() for p in stranger.policy.parameters()]
        torch_state = torch.get_rng_state()
        with pytest.raises(NsrlError, match=message) as caught:
            restore(path, stranger)
        assert str(path) in str(caught.value) and "\n" not in str(caught.value)
        assert same(before, list(stranger.policy.parameters())) and torch.equal(torch_state, torch.get_rng_state())

    save(path, build())
    stock = PPO("MlpPolicy", make_vec_env(NEW, N_ENVS), n_steps=32, batch_size=32, device="cpu")
    with pytest.raises(NsrlError, match="algorithm was NullSpacePPO in its run and is PPO now"):
        restore(path, stock)
    pendulum = PPO("MlpPolicy", make_vec_env("nsrl/Pendulum-v0", N_ENVS), n_steps=32, batch_size=32, device="cpu")
    with pytest.raises(NsrlError, match="observation space"):
        restore(path, pendulum)


@pytest.mark.parametrize(
    "damage",
    [
        lambda state, tensors: state["generators"]["numpy"]["state"].update(pos=10**6),  # beyond its block of words
        lambda state, tensors: state["generators"]["environments"].pop(),
        lambda state, tensors: tensors["modules"]["policy.optimizer"]["state"][0].update(exp_avg=torch.zeros(3)),
        lambda state, tensors: tensors["modules"].update({"env": {}}),
        lambda state, tensors: tensors["retention"].update(minibatches_queue=torch.tensor([10**6])),
        lambda state, tensors: state["counters"].update(num_timesteps="1"),
    ],
)
def test_a_changed_checkpoint_is_refused_untouched(damage, expert, buffer, tmp_path):
    path, trained = tmp_path / "checkpoint", build_model(expert, buffer)
    trained.learn(ROLLOUT)
    save(path, trained)
    state, tensors = read_checkpoint(path)
    damage(state, tensors)
    rewrite(path, state, tensors)
    model = build_model(expert, buffer)
    before = [p.clone() for p in model.policy.parameters()]
    generators = random.getstate(), np.random.get_state()[1].tolist(), torch.get_rng_state().tolist()
    with pytest.raises(NsrlError, match="truncated or damaged"):
        restore(path, model)
    assert same(before, list(model.policy.parameters())) and model.num_timesteps == 0
    assert not model.policy.optimizer.state
    assert generators == (random.getstate(), np.random.get_state()[1].tolist(), torch.get_rng_state().tolist())


def test_a_policy_that_measures_otherwise_is_refused(expert, buffer, tmp_path):
    model, path = build_model(expert, buffer), tmp_path / "checkpoint"
    model.learn(ROLLOUT)
    save(path, model)
    tensors = read_checkpoint(path)[1]
    tensors["modules"]["policy"]["action_net.bias"][0] += 0.1
    rewrite(path, tensors=tensors)
    with pytest.raises(NsrlError, match="says that the policy's KL is"):
        restore(path, build_model(expert, buffer))


def test_interrupts_stop_at_a_boundary_and_curves_join(expert, buffer, tmp_path, a_second_later):
    """Ctrl-C in the middle of a rollout, then SIGTERM in the resumed run, then to the end."""
    path, total, boundary_states = tmp_path / "checkpoint", 6 * ROLLOUT, {}

    def session(at, number, resume):
        model = build_model(expert, buffer)
        restored = restore(path, model) if resume else {}
        if resume:
            kl = model.retention.constraint.divergence()
            assert kl == pytest.approx(restored["kl_mean"])
            assert independent_kl(model, buffer) <= within(1e-4, buffer)
        model.set_logger(open_logger(tmp_path / "tb", purge_step=restored.get("purge_step")))
        with graceful_interrupts() as interruption:
            evaluation = TaskEvaluation(
                (NEW, None),
                {"old": (OLD, None)},
                every=2 * ROLLOUT,
                episodes=2,
                history=restored.get("history", ()),
                skip_end=interruption.requested,
            )
            callbacks = [evaluation, Checkpoint(path, every=10**9, evaluation=evaluation), interruption]
            if number is not None:
                callbacks.append(At(at, lambda _: os.kill(os.getpid(), number)))
            boundary = AtBoundary(at // ROLLOUT * ROLLOUT, lambda m: boundary_states.update(rng=torch.get_rng_state()))
            model.learn(remaining(model, total), callback=[*callbacks, boundary], reset_num_timesteps=not resume)
        model.logger.close()
        return model, evaluation, interruption.exit_status

    handlers = [signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM)]
    model, _, status = session(2 * ROLLOUT + 10, signal.SIGINT, resume=False)
    assert status == 130 and 2 * ROLLOUT < model.num_timesteps < 3 * ROLLOUT
    state, tensors = read_checkpoint(path)
    # the half rollout is undone, not counted: it will be collected again
    assert state["counters"]["num_timesteps"] == 2 * ROLLOUT
    assert torch.equal(tensors["generators"]["torch"], boundary_states["rng"])
    a_second_later()
    model, _, status = session(4 * ROLLOUT + 10, signal.SIGTERM, resume=True)
    assert status == 143
    assert read_checkpoint(path)[0]["counters"]["num_timesteps"] == 4 * ROLLOUT
    a_second_later()
    model, evaluation, status = session(10**9, None, resume=True)
    assert status == 0 and model.num_timesteps == total
    assert [signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM)] == handlers
    grid = [0, 2 * ROLLOUT, 4 * ROLLOUT, total]
    assert [row["timesteps"] for row in evaluation.history] == grid
    assert all(row["kl_mean"] <= model.retention.config.tolerance for row in evaluation.history)
    accumulator = EventAccumulator(str(tmp_path / "tb"))
    accumulator.Reload()
    steps = {tag: [point.step for point in accumulator.Scalars(tag)] for tag in accumulator.Tags()["scalars"]}
    assert steps["retain/old/return_mean"] == grid
    assert steps["train/loss"] == [ROLLOUT * k for k in range(1, 7)]
    assert steps["rollout/ep_rew_mean"] == [ROLLOUT * k for k in range(1, 7)]


@pytest.mark.parametrize(("number", "error"), [(signal.SIGINT, KeyboardInterrupt), (signal.SIGTERM, SystemExit)])
def test_the_second_signal_aborts_at_once(expert, tmp_path, number, error):
    path = tmp_path / "checkpoint"

    def twice(_):
        # to this thread: a signal to the process may be delivered by another one, some time later
        signal.pthread_kill(threading.get_ident(), number)
        signal.pthread_kill(threading.get_ident(), number)
        pytest.fail("the second signal was not heeded")

    with pytest.raises(error), graceful_interrupts() as interruption:
        build_model(expert).learn(ROLLOUT, callback=[Checkpoint(path), interruption, At(5, twice)])
    assert interruption.exit_status == 128 + number
    assert restore(path, build_model(expert))["timesteps"] == 0


def test_kill_dash_nine_loses_at_most_an_interval(expert, buffer, tmp_path):
    """Both paths at once: killed without warning in mid-run, then resumed to the end here."""
    buffers = {"stock": None, "null_space": buffer}
    root = Path(__file__).parents[3]
    environment = os.environ | {"PYTHONPATH": os.pathsep.join(map(str, (root, root / "envs")))}
    expert.save(tmp_path / "agent.zip")
    files = {"stock": ["agent.zip"], "null_space": ["agent.zip", buffer.save(tmp_path / "retention.npz").name]}
    processes = {
        kind: subprocess.Popen(
            [sys.executable, "-m", clockwork_.__name__, kind, *files[kind]],
            cwd=tmp_path,
            env=environment,
            stderr=subprocess.PIPE,
            text=True,
        )
        for kind in buffers
    }
    try:
        reached = dict.fromkeys(buffers, 0)
        while min(reached.values()) < 3 * ROLLOUT:
            for kind, process in processes.items():
                assert process.poll() is None, process.communicate()[1]
                if (tmp_path / kind).exists():  # readable at any moment, though it is replaced all the time
                    reached[kind] = read_checkpoint(tmp_path / kind)[0]["counters"]["num_timesteps"]
            time.sleep(0.02)
    finally:
        for process in processes.values():
            process.kill()
            process.communicate()
    for kind, process in processes.items():
        assert process.returncode == -signal.SIGKILL
        model = build_model(expert, buffers[kind])
        restored = restore(tmp_path / kind, model)
        assert restored["timesteps"] >= reached[kind]
        if kind == "null_space":
            assert 0.0 < independent_kl(model, buffer) <= within(1e-4, buffer)
        total = restored["timesteps"] + 2 * ROLLOUT
        model.learn(remaining(model, total), reset_num_timesteps=False)
        assert model.num_timesteps == total and remaining(model, total) == 0
        if kind == "null_space":
            assert independent_kl(model, buffer) <= within(1e-4, buffer)
            assert model.retention.updates == total // ROLLOUT
