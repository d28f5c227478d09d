"""The runner: what it measures, what it leaves behind, and that an interrupted run comes to the same end."""

import copy
import json
import math
import subprocess
import sys
from dataclasses import replace

import numpy as np
import pytest
import torch
import yaml
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

from nsrl.continual import runner
from nsrl.continual.benchmarks import build_benchmark
from nsrl.continual.config import (
    BenchmarkSettings,
    ContinualConfig,
    ModelSettings,
    StrategySettings,
    TrainingSettings,
)
from nsrl.continual.models import ResNet18, build_model, measure_statistics
from nsrl.continual.records import Records
from nsrl.continual.runner import run_continual
from nsrl.continual.scores import evaluate
from nsrl.errors import NsrlError


def small(name="split_digits", strategy="naive", *, scenario=None, tasks=None, epochs=2, **training):
    return ContinualConfig(
        BenchmarkSettings(name, scenario=scenario, tasks=tasks),
        ModelSettings(hidden=[16]),
        TrainingSettings(epochs=epochs, learning_rate=1e-2, **training),
        StrategySettings(strategy),
        seed=1,
    )


@pytest.fixture(scope="module")
def finished(tmp_path_factory):
    folder = tmp_path_factory.mktemp("runs") / "split"
    config = small()
    return config, folder, run_continual(config, folder)


def test_the_matrix_and_its_metrics(finished):
    config, _, metrics = finished
    matrix = np.array(metrics["matrix"])
    assert matrix.shape == (5, 5) and metrics["scenario"] == "task"
    assert metrics["acc"] == pytest.approx(matrix[-1].mean())
    assert metrics["learning"] == pytest.approx(np.diagonal(matrix).mean()) and metrics["learning"] > 0.9
    assert metrics["bwt"] == pytest.approx((matrix[-1] - np.diagonal(matrix))[:-1].mean())
    assert metrics["train_seconds"] > 0.0 and metrics["memory_bytes"] == 0 and metrics["preserved_kl"] > 0.0
    assert len(metrics["history"]) == 5 and 0.0 <= metrics["acc_validation"] <= 1.0
    # before training, counted by hand
    benchmark = build_benchmark(config.benchmark, config.seed)
    model = build_model(config.model, benchmark, config.seed)
    for index, data in enumerate(benchmark.tasks):
        with torch.no_grad():
            right = model(data.splits.test.inputs, index).argmax(1) == data.splits.test.targets
        assert metrics["untrained"][index] == pytest.approx(float(right.float().mean()))


def test_the_folder_holds_everything_and_nothing_that_only_a_resumed_run_needs(finished):
    config, folder, metrics = finished
    assert {path.name for path in folder.iterdir()} == {
        "accuracy_matrix.png",
        "config.yaml",
        "format.json",
        "metrics.json",
        "model.pt",
        "tb",
    }
    assert json.loads((folder / "metrics.json").read_text())["matrix"] == metrics["matrix"]
    assert yaml.safe_load((folder / "config.yaml").read_text())["training"]["epochs"] == config.training.epochs
    benchmark = build_benchmark(config.benchmark, config.seed)
    model = build_model(config.model, benchmark)
    model.load_state_dict(torch.load(folder / "model.pt", weights_only=True))
    learnt = [data.task for data in benchmark.tasks]
    assert evaluate(model, benchmark, "test", learnt) == metrics["matrix"][-1]


def test_tensorboard_has_the_scalars_and_the_matrix(finished):
    config, folder, metrics = finished
    events = EventAccumulator(str(folder / "tb"), size_guidance={"images": 0})
    events.Reload()
    steps = [config.training.epochs * (index + 1) for index in range(5)]
    for index, name in enumerate(metrics["tasks"]):
        points = events.Scalars(f"accuracy/{name.replace(' ', '_')}")
        assert [point.step for point in points] == steps
        assert [point.value for point in points] == pytest.approx([row[index] for row in metrics["matrix"]])
    assert len(events.Scalars("train/loss")) == 5 * config.training.epochs
    tags = set(events.Tags()["scalars"])
    assert {"continual/acc", "continual/train_seconds", "continual/memory_bytes", "continual/preserved_kl"} <= tags
    assert len(events.Images("continual/accuracy_matrix")) == 5


@pytest.mark.parametrize(
    "strategy", ["naive", "ewc", "gpm", "trgp", "er", "derpp", "kl_budget", "combined", "features", "joint"]
)
def test_an_interrupted_run_comes_to_the_same_end(strategy, tmp_path, monkeypatch, a_second_later):
    config = small("permuted_digits", strategy, tasks=3, epochs=1)
    if strategy in ("kl_budget", "combined"):
        # tight, so that there is something to restore, in the middle of a task too
        config = replace(config, strategy=StrategySettings(strategy, {"kl_budget": 1e-4, "enforce_every": 30}))
    whole = run_continual(config)
    write_task = Records.write_task

    def interrupted(self, index, history, state):
        write_task(self, index, history, state)
        if index == 1:
            raise KeyboardInterrupt

    monkeypatch.setattr(Records, "write_task", interrupted)
    with pytest.raises(KeyboardInterrupt):
        run_continual(config, tmp_path)
    assert (tmp_path / "task1.pt").is_file() and not (tmp_path / "metrics.json").exists()
    monkeypatch.undo()
    if strategy == "naive":
        a_second_later()
    learnt = []
    learn = runner._learn_task
    monkeypatch.setattr(runner, "_learn_task", lambda *args: learnt.append(args[2]) or learn(*args))
    resumed = run_continual(config, tmp_path)
    assert learnt == [2]
    assert resumed["matrix"] == whole["matrix"]
    # losses and diagnostics are of the last bit
    for mine, other in zip(resumed["history"], whole["history"], strict=True):
        assert mine["losses"] == other["losses"] and mine["diagnostics"] == other["diagnostics"]
    if strategy == "naive":
        events = EventAccumulator(str(tmp_path / "tb"))
        events.Reload()
        assert [point.step for point in events.Scalars("train/loss")] == [1, 2, 3]


def test_without_a_folder_nothing_is_written(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    run_continual(small(tasks=1, epochs=1))
    assert not list(tmp_path.iterdir())


def test_a_damaged_task_file_is_told_and_no_code_in_it_runs(tmp_path):
    (tmp_path / "task0.pt").write_bytes(b"no tensors")
    with pytest.raises(NsrlError, match=r"task0\.pt is damaged"):
        run_continual(small(), tmp_path)

    class Bomb:
        def __reduce__(self):
            return (tmp_path.joinpath("ran").touch, ())

    torch.save({"entry": {}, "state": Bomb()}, tmp_path / "task0.pt")
    with pytest.raises(NsrlError, match=r"task0\.pt is damaged"):
        run_continual(small(), tmp_path)
    assert not (tmp_path / "ran").exists()


def test_weights_of_another_network_are_refused(tmp_path):
    state = {"weights": {"x": torch.zeros(1)}, "progress": {}}
    entry = {"task": "first", "scores": [1.0] * 5, "losses": [0.1], "diagnostics": {}, "memory_bytes": 0}
    entry |= {"train_seconds": 1.0, "train_cpu_seconds": 1.0}
    torch.save({"entry": entry, "state": state}, tmp_path / "task0.pt")
    with pytest.raises(NsrlError, match="of another network"):
        run_continual(small(), tmp_path)


def stopped_after(tasks, folder, monkeypatch):
    """A run of three tasks that is interrupted behind some of them."""
    config = small("permuted_digits", "naive", tasks=3, epochs=1)
    write_task = Records.write_task

    def interrupted(self, index, history, state):
        write_task(self, index, history, state)
        if index + 1 == tasks:
            raise KeyboardInterrupt

    with monkeypatch.context() as patched, pytest.raises(KeyboardInterrupt):
        patched.setattr(Records, "write_task", interrupted)
        run_continual(config, folder)
    return config


def test_weights_that_were_written_anew_are_no_resumed_run(tmp_path, monkeypatch):
    """torch.save's own checksums are right again: they are of the file, not of the run."""
    config = stopped_after(2, tmp_path, monkeypatch)
    path = tmp_path / "task1.pt"
    whole = torch.load(path, weights_only=True)

    def flip(content):
        weights = next(iter(content["state"]["weights"].values()))
        weights.view(-1)[:1000] *= -1.0

    for change in (flip, lambda content: content["entry"]["scores"].__setitem__(0, 1.0)):
        content = copy.deepcopy(whole)
        change(content)
        torch.save(content, path)
        with pytest.raises(NsrlError, match=r"task1\.pt is damaged \(.*checksum") as told:
            run_continual(config, tmp_path)
        assert "this task is learnt again" in str(told.value)
    torch.save(whole, path)
    assert len(run_continual(config, tmp_path)["matrix"]) == 3


def test_a_task_that_is_missing_before_others_is_told(tmp_path, monkeypatch):
    config = stopped_after(2, tmp_path, monkeypatch)
    (tmp_path / "task0.pt").rename(tmp_path / "elsewhere.pt")
    with pytest.raises(NsrlError, match=r"task0\.pt is missing.*remove all from task1\.pt on"):
        run_continual(config, tmp_path)
    (tmp_path / "elsewhere.pt").rename(tmp_path / "task0.pt")
    fewer = replace(config, benchmark=replace(config.benchmark, tasks=1))
    with pytest.raises(NsrlError, match="holds 2 finished tasks, but the benchmark has 1"):
        run_continual(fewer, tmp_path)


def test_learning_rates_fall_at_the_milestones(monkeypatch):
    rates = []
    build = runner.build_strategy

    def watched(*args, **options):
        strategy = build(*args, **options)
        step = strategy.step
        strategy.step = lambda batch: rates.append([g["lr"] for g in strategy.optimizer.param_groups]) or step(batch)
        return strategy

    monkeypatch.setattr(runner, "build_strategy", watched)
    config = small(tasks=1, epochs=3, batch_size=10_000, milestones=[1, 2], decay=0.1, head_learning_rate=1.0)
    run_continual(config)
    np.testing.assert_allclose(rates, [[1e-2, 1.0], [1e-3, 0.1], [1e-4, 0.01]])


def test_classes_of_later_tasks_are_never_predicted_without_task_identity():
    config = replace(small(scenario="class"), model=ModelSettings(), training=TrainingSettings(10, learning_rate=3e-3))
    matrix = np.array(run_continual(config)["matrix"])
    assert (matrix[np.triu_indices(5, 1)] == 0.0).all()
    # plain fine-tuning forgets all but the last task
    assert matrix[-1, -1] > 0.8 and matrix[-1, :3].max() < 0.3


def test_regression_is_scored_by_the_variance_explained():
    benchmark = build_benchmark(BenchmarkSettings("regression", tasks=2))

    class Constant(torch.nn.Module):
        def __init__(self, value):
            super().__init__()
            self.value = value

        def forward(self, inputs):
            return torch.full((len(inputs), 1), self.value)

    targets = benchmark.tasks[0].splits.test.targets
    assert evaluate(Constant(float(targets.mean())), benchmark, "test", ())[0] == pytest.approx(0.0, abs=1e-6)
    assert evaluate(Constant(100.0), benchmark, "test", ()) == [0.0, 0.0]
    metrics = run_continual(small("regression", tasks=2, epochs=5))
    assert metrics["learning"] > 0.9 and metrics["score"] == "variance explained"


@pytest.mark.parametrize("strategy", sorted(runner.build_strategy.__globals__["STRATEGIES"]))
@pytest.mark.parametrize("scenario", ["task", "class"])
def test_every_strategy_runs_in_every_scenario(strategy, scenario):
    metrics = run_continual(small(strategy=strategy, scenario=scenario, tasks=2, epochs=1))
    assert math.isfinite(metrics["acc"]) and metrics["memory_bytes"] >= 0
    assert metrics["strategy"] == strategy and metrics["history"][0]["diagnostics"].keys() <= {
        "kept_share",
        "leakage",
        "rank",
    }


@pytest.mark.parametrize(
    ("config", "said"),
    [
        (small(strategy="nothing"), "nothing"),
        (ContinualConfig(model=ModelSettings("resnet18")), "takes images"),
        (ContinualConfig(strategy=StrategySettings("naive", {"x": 1})), "x"),
    ],
)
def test_what_does_not_fit_is_told_before_anything_is_written(config, said, tmp_path):
    with pytest.raises(NsrlError, match=said):
        run_continual(config, tmp_path / "run")
    assert not (tmp_path / "run").exists()


def test_the_resnet_is_the_papers():
    # PreActResNet-18 has 11 171 146 parameters with its 5130 of the last layer; Adam-NSCL adds a last normalisation
    trunk = ResNet18(batch_norm="affine")
    assert sum(parameter.numel() for parameter in trunk.parameters()) == 11_171_146 - 5130 + 1024
    assert ResNet18(width=4)(torch.randn(2, 3, 32, 32)).shape == (2, 32)
    assert trunk.blocks(trunk.first(torch.zeros(1, 3, 32, 32))).shape == (1, 512, 4, 4)


@pytest.mark.parametrize("kind", ["frozen", "affine"])
def test_batch_statistics_are_measured_once_and_never_move(kind):
    trunk = ResNet18(width=2, batch_norm=kind)
    images = 3.0 + 2.0 * torch.randn(64, 3, 8, 8)
    measure_statistics(trunk, [images[:32], images[32:]])
    first = trunk.blocks[0].norm1
    entering = trunk.first(images)
    torch.testing.assert_close(first.running_mean, entering.mean((0, 2, 3)), rtol=1e-4, atol=1e-4)
    before = {name: value.clone() for name, value in trunk.state_dict().items() if "norm" in name}
    trunk.train()
    assert not any(module.training for module in trunk.modules() if isinstance(module, torch.nn.BatchNorm2d))
    optimizer = torch.optim.SGD([p for p in trunk.parameters() if p.requires_grad], lr=0.1)
    trunk(images).square().mean().backward()
    optimizer.step()
    after = trunk.state_dict()
    moved = [name for name, value in before.items() if not torch.equal(after[name], value)]
    assert all(name.endswith(("weight", "bias")) for name in moved) and bool(moved) == (kind == "affine")


def test_presets_lie_beneath_the_options_of_the_strategy():
    presets = {"er": {"samples_per_task": 7, "batch_samples": 8}, "ewc": {"strength": 1.0}}
    config = ContinualConfig(strategy=StrategySettings("er", {"batch_samples": 9}), presets=presets)
    assert config.options == {"samples_per_task": 7, "batch_samples": 9}
    metrics = run_continual(replace(config, benchmark=BenchmarkSettings(tasks=2), training=TrainingSettings(epochs=1)))
    assert metrics["memory_bytes"] == 2 * 7 * (64 + 8) + 17 * 4  # 17 shades of grey, held as bytes
    with pytest.raises(NsrlError, match=r"presets\.er must hold options by name"):
        ContinualConfig(presets={"er": 3})


def test_settings_and_help_need_no_torch():
    script = "import sys, nsrl.cli.continual, nsrl.continual.config; assert 'torch' not in sys.modules"
    subprocess.run([sys.executable, "-c", script], check=True)
