"""Task evaluation during learning, TensorBoard read back, and the progress line."""

import io
import math
import random
import re

import numpy as np
import pytest
import torch
from rich.console import Console
from stable_baselines3 import PPO
from stable_baselines3.common.callbacks import BaseCallback
from stable_baselines3.common.env_util import make_vec_env
from stable_baselines3.common.vec_env import VecNormalize
from tensorboard.backend.event_processing import plugin_event_accumulator
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator
from tensorboard.plugins.custom_scalar import layout_pb2

import nsrl_envs  # noqa: F401  registers the ids
from nsrl import errors
from nsrl.rl.algorithms.ppo import NullSpacePPO
from nsrl.rl.playing.evaluation import evaluate
from nsrl.rl.retention.buffer import RetentionBuffer
from nsrl.rl.training.callbacks import TaskEvaluation
from nsrl.rl.training.progress import FineTuningProgress
from nsrl.rl.training.tensorboard import LAYOUT, open_logger, write_points
from tests.rl.oracles import independent_kl, within

OLD, NEW = "nsrl/CartPole-v0", "nsrl/CartPoleSwapped-v0"
N_STEPS, N_ENVS = 32, 2
ROLLOUT = N_STEPS * N_ENVS
BUDGET = 2e-5


@pytest.fixture
def expert() -> PPO:
    return PPO("MlpPolicy", OLD, n_steps=32, batch_size=32, n_epochs=4, device="cpu", seed=2)


@pytest.fixture
def buffer(expert) -> RetentionBuffer:
    return RetentionBuffer.collect(expert, OLD, n_states=96, n_envs=2, seed=3)


def build_model(expert, buffer=None, **options):
    env = make_vec_env(NEW, N_ENVS)
    # unopened, so that roll-outs begin at multiples of their length
    options = {"kl_budget": BUDGET, "n_steps": N_STEPS, "seed": 5, "learning_rate": 1e-3, "opening": "off", **options}
    return NullSpacePPO.from_pretrained(expert, env, retain=buffer, **options)


def build_evaluation(**options):
    return TaskEvaluation((NEW, None), {"balance": (OLD, None)}, **{"every": ROLLOUT, "episodes": 3, **options})


def scalars(folder) -> dict[str, dict[int, float]]:
    """Every scalar curve in a folder, as TensorBoard shows it."""
    accumulator = EventAccumulator(str(folder), size_guidance={"scalars": 0})
    accumulator.Reload()
    curves = {}
    for tag in accumulator.Tags()["scalars"]:
        points = accumulator.Scalars(tag)
        curves[tag] = {point.step: point.value for point in points}
        assert len(curves[tag]) == len(points), f"two points of {tag} at one step"
    return curves


class Witness(BaseCallback):
    """Notes at every rollout boundary, and at the end, where the update has led."""

    def __init__(self, buffer):
        super().__init__()
        self.buffer, self.kl = buffer, {}

    def _on_step(self):
        return True

    def _on_rollout_start(self):
        self.kl[self.model.num_timesteps] = independent_kl(self.model, self.buffer)

    _on_training_end = _on_rollout_start


def test_every_tag_is_written_at_its_own_step(expert, buffer, tmp_path):
    model = build_model(expert, buffer)
    evaluation, witness = build_evaluation(), Witness(buffer)
    model.set_logger(open_logger(tmp_path))
    model.learn(6 * ROLLOUT, callback=[evaluation, witness])
    curves = scalars(tmp_path)
    expected = {
        "retain/balance/return_mean",
        "retain/kl_mean",
        "retain/kl_max",
        "retain/kl_heldout",
        "retain/agreement",
        "nullspace/rank",
        "nullspace/rank_fraction",
        "nullspace/effective_dim",
        "nullspace/lambda",
        "nullspace/update_kept",
        "nullspace/kl_predicted",
        "nullspace/restore_steps",
        "nullspace/rollbacks",
        "nullspace/overhead_fraction",
        "eval/mean_reward",
        "train/loss",
        "rollout/ep_rew_mean",
    }
    assert expected <= curves.keys()
    steps = [ROLLOUT * k for k in range(7)]
    for tag in ("retain/balance/return_mean", "eval/mean_reward", "retain/kl_mean", "nullspace/rank"):
        assert list(curves[tag]) == steps, tag
    assert list(curves["train/loss"]) == steps[1:]
    rounding = within(BUDGET, buffer) - BUDGET
    # the engine's values are those of the update that ended at their step, not one rollout late
    assert curves["retain/kl_mean"] == pytest.approx(witness.kl, abs=rounding)
    assert 0.0 < curves["nullspace/rank_fraction"][0] <= 1.0
    assert all(0.0 < share < 1.0 for share in curves["nullspace/overhead_fraction"].values())
    # rows and curves agree, and are plain JSON within the budget
    for row in evaluation.history:
        step = row["timesteps"]
        assert curves["retain/balance/return_mean"][step] == pytest.approx(row["old_returns"]["balance"])
        assert curves["eval/mean_reward"][step] == pytest.approx(row["new_return"])
        assert row["kl_mean"] == pytest.approx(witness.kl[step], abs=rounding)
        assert witness.kl[step] <= within(BUDGET, buffer)
    assert [row["timesteps"] for row in evaluation.history] == steps
    final = evaluate(model, OLD, episodes=3)
    assert evaluation.history[-1]["old_returns"]["balance"] == final.mean
    assert evaluation.latest["balance"] == final


@pytest.mark.parametrize("protected", [False, True])
def test_learning_is_the_same_with_and_without(expert, buffer, tmp_path, protected):
    results = []
    for watched in (False, True):
        random.seed(0), np.random.seed(0), torch.manual_seed(0)
        model = build_model(expert, buffer if protected else None)
        model.set_logger(open_logger(tmp_path / str(watched)))
        model.learn(4 * ROLLOUT, callback=[build_evaluation()] if watched else None)
        generators = (random.getstate(), np.random.get_state()[1].tolist(), torch.get_rng_state().tolist())
        results.append((model.policy.state_dict(), generators, model._last_obs.tolist()))
    (plain, *rest), (observed, *observed_rest) = results
    assert all(torch.equal(plain[name], observed[name]) for name in plain)
    assert rest == observed_rest


def test_an_engine_that_logs_its_rank_is_not_contradicted(expert, buffer, tmp_path):
    model = build_model(expert, buffer, kl_budget=1e-3, projection="euclidean", gradient="plain", subset_states=8)
    model.set_logger(open_logger(tmp_path))
    ranks = {}
    record = model.logger.record
    model.logger.record = lambda key, value, exclude=None: (
        ranks.setdefault(model.num_timesteps, value) if key == "nullspace/rank" else None,
        record(key, value, exclude),
    )
    model.learn(3 * ROLLOUT, callback=build_evaluation())
    assert scalars(tmp_path)["nullspace/rank"] == {step: float(rank) for step, rank in ranks.items()}
    assert set(ranks) == {0, ROLLOUT, 2 * ROLLOUT, 3 * ROLLOUT}


def test_prediction_is_the_second_order_model(expert, buffer):
    """At the reference the Gauss-Newton model is the Taylor expansion: 1/2 d^T H d by autograd of autograd."""
    model = build_model(expert, buffer, tempering=0.0)
    constraint = model.retention.constraint
    weights = constraint.parameters.parameters
    distribution = model.policy.get_distribution(constraint.inputs[constraint.train]).distribution
    reference = torch.log_softmax(constraint.reference[constraint.train], 1)
    kl = (reference.exp() * (reference - distribution.logits)).sum(1).mean()
    gradient = torch.cat([g.flatten() for g in torch.autograd.grad(kl, weights, create_graph=True)])
    direction = torch.randn_like(gradient)
    product = torch.autograd.grad(gradient @ direction, weights)
    curvature = float(torch.cat([p.flatten() for p in product]) @ direction)
    linear = constraint.linearise(constraint.train)
    for length in (0.1, 1.0):
        assert linear.predict(length * direction) == pytest.approx(0.5 * length**2 * curvature, rel=1e-3)


def test_schedule_keeps_to_the_grid(expert):
    model = build_model(expert)
    evaluation = build_evaluation(every=100)
    model.learn(640, callback=evaluation)
    assert [row["timesteps"] for row in evaluation.history] == [0, 128, 256, 320, 448, 512, 640]
    assert {row["kl_mean"] for row in evaluation.history} == {None}
    assert [row["seconds"] for row in evaluation.history] == sorted(row["seconds"] for row in evaluation.history)


def test_end_can_be_left_out_and_history_continues(expert):
    model = build_model(expert)
    first = build_evaluation(every=10 * ROLLOUT, skip_end=lambda: True)
    model.learn(2 * ROLLOUT, callback=first)
    assert [row["timesteps"] for row in first.history] == [0]
    second = build_evaluation(every=10 * ROLLOUT, history=first.history)
    model.learn(2 * ROLLOUT, callback=second, reset_num_timesteps=False)
    assert [row["timesteps"] for row in second.history] == [0, 4 * ROLLOUT]
    with pytest.raises(errors.NsrlError, match="every"):
        build_evaluation(every=0)


def test_stock_ppo_with_live_statistics_and_long_names(expert, tmp_path, capsys):
    """No retention, SB3's own logger with its printed table, moving VecNormalize: nothing of it disturbs."""
    env = VecNormalize(make_vec_env(NEW, N_ENVS))
    model = PPO(
        "MlpPolicy",
        env,
        n_steps=N_STEPS,
        batch_size=32,
        n_epochs=1,
        device="cpu",
        verbose=1,
        tensorboard_log=str(tmp_path),
    )
    names = [f"a task with a name that is too long for the table {k}" for k in range(2)]
    evaluation = TaskEvaluation(None, {name: (OLD, None) for name in names}, every=ROLLOUT, episodes=2)
    model.learn(2 * ROLLOUT, callback=evaluation, tb_log_name="run")
    curves = scalars(tmp_path / "run_1")
    assert all(len(curves[f"retain/{name}/return_mean"]) == 3 for name in names)
    assert set(curves["train/loss"]) == {ROLLOUT, 2 * ROLLOUT}  # SB3 alone would drop the last
    assert not any(tag.startswith("eval/") for tag in curves)
    assert evaluation.history[-1]["new_return"] is None
    assert "total_timesteps" in capsys.readouterr().out


def test_charts_lay_old_and_new_return_on_one(expert, tmp_path):
    model = build_model(expert, tensorboard_log=str(tmp_path))
    model.learn(ROLLOUT, callback=build_evaluation(), tb_log_name="stock")
    model.set_logger(open_logger(tmp_path / "ours"))
    model.learn(ROLLOUT, callback=build_evaluation())
    for folder in (tmp_path / "stock_1", tmp_path / "ours"):
        accumulator = EventAccumulator(str(folder))
        accumulator.Reload()
        (event,) = accumulator.Tensors("custom_scalars__config__")
        layout = layout_pb2.Layout.FromString(event.tensor_proto.string_val[0])
        charts = {chart.title: list(chart.multiline.tag) for category in layout.category for chart in category.chart}
        assert charts == {title: chart[1] for part in LAYOUT.values() for title, chart in part.items()}
        tags = accumulator.Tags()["scalars"]
        drawn = {
            title: {t for t in tags if any(re.match(p, t) for p in patterns)} for title, patterns in charts.items()
        }
        assert {"retain/balance/return_mean", "eval/mean_reward"} in drawn.values()


def test_curves_join_after_a_purge(tmp_path, a_second_later):
    def write(steps, value, purge_step=None):
        logger = open_logger(tmp_path, ["tensorboard", "csv", "json"], purge_step)
        for step in steps:
            logger.record("retain/kl_mean", value)
            logger.dump(step)
        logger.close()

    write(range(0, 100, 10), 1.0)
    a_second_later()
    write(range(55, 120, 10), 2.0, purge_step=51)
    expected = {**{step: 1.0 for step in range(0, 60, 10)}, **{step: 2.0 for step in range(55, 120, 10)}}
    assert scalars(tmp_path)["retain/kl_mean"] == expected
    accumulator = plugin_event_accumulator.EventAccumulator(str(tmp_path))  # what TensorBoard itself reads with
    accumulator.Reload()
    assert [event.step for event in accumulator.Tensors("retain/kl_mean")] == list(expected)
    assert (tmp_path / "progress.csv").read_text().splitlines() == ["retain/kl_mean"] + ["1.0"] * 10
    assert (tmp_path / "progress_from_51.csv").read_text().splitlines() == ["retain/kl_mean"] + ["2.0"] * 7
    with pytest.raises(errors.NsrlError, match="unknown log format 'tensorbord'"):
        open_logger(tmp_path, ["tensorbord"])


def test_pending_points_are_written_once(tmp_path):
    logger = open_logger(tmp_path, ["tensorboard", "csv"])
    logger.record("a", 1.0)
    write_points(logger, 10)
    write_points(logger, 11)
    logger.record("b", 2.0)
    logger.record("hidden", 3.0, exclude="tensorboard")
    logger.dump(20)
    logger.record("a", 4.0)
    logger.dump(30)
    logger.close()
    assert scalars(tmp_path) == {"a": {10: 1.0, 30: 4.0}, "b": {20: 2.0}}
    header, first, _ = (tmp_path / "progress.csv").read_text().splitlines()
    assert dict(zip(header.split(","), first.split(","), strict=True)) == {"a": "1.0", "b": "2.0", "hidden": "3.0"}


def test_progress_prints_lines_where_there_is_no_terminal(expert, buffer, capsys):
    model = build_model(expert, buffer)
    evaluation = build_evaluation()
    with FineTuningProgress(evaluation) as progress:
        model.learn(10 * ROLLOUT, callback=[evaluation, progress])
    captured = capsys.readouterr()
    assert captured.out == ""
    lines = captured.err.splitlines()
    assert 10 <= len(lines) <= 13
    assert lines[0].startswith("fine-tuning   0%  0/640 steps")
    assert lines[-1].startswith("fine-tuning 100%  640/640 steps")
    row = evaluation.history[-1]
    assert f"old {row['old_returns']['balance']:.1f}  new {row['new_return']:.1f}  KL " in lines[-1]
    assert lines[-1].endswith("/2e-05")
    assert " left" in lines[5] and "\x1b" not in captured.err


@pytest.mark.parametrize("error", [None, RuntimeError, KeyboardInterrupt])
def test_progress_gives_the_terminal_back(expert, buffer, error):
    class Failing(BaseCallback):
        def _on_step(self):
            if error is not None and self.num_timesteps > ROLLOUT:
                raise error
            return True

    stream = io.StringIO()
    console = Console(file=stream, force_terminal=True, width=160)
    model = build_model(expert, buffer)
    evaluation = build_evaluation()
    try:
        with FineTuningProgress(evaluation, console=console) as progress:
            model.learn(2 * ROLLOUT, callback=[evaluation, progress, Failing()])
        assert error is None
    except (RuntimeError, KeyboardInterrupt) as raised:
        assert type(raised) is error
    text = stream.getvalue()
    hidden, shown = text.rfind("\x1b[?25l"), text.rfind("\x1b[?25h")
    assert 0 <= hidden < shown
    assert "fine-tuning" in text and "/128" in text and "KL" in text and "new" in text
    assert console._live_stack == []
    assert math.isfinite(model.retention.last.kl_mean)
