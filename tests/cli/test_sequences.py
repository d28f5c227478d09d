"""`nsrl finetune` and `nsrl bench` on sequences of tasks."""

import json
from pathlib import Path

import pytest

from nsrl.bench.suites import sequences
from nsrl.cli.finetune import names_sequence
from nsrl.cli.main import main

TASKS = """\
tasks:
  - {env: nsrl/CartPole-v0, name: stock}
  - {env: nsrl/CartPoleSwapped-v0, name: swapped, total_timesteps: 256}
ppo: {n_envs: 2}
states: {n_states: 40, n_envs: 2}
evaluation: {every: 256, episodes: 1, final_episodes: 1}
"""


@pytest.fixture
def config(tmp_path) -> Path:
    path = tmp_path / "two.yaml"
    path.write_text(TASKS)
    return path


def test_a_configuration_with_tasks_is_a_sequence(config, pretrained, tmp_path, capsys):
    out = tmp_path / "run"
    words = ["finetune", "--config", str(config), "--agent", str(pretrained), "--out", str(out), "--progress", "false"]
    words += ["--retention.opening", "off"]
    assert main([*words, "--retention.kl_budget", "1e-4"]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert lines[0] == "sequence-swapped: NullSpacePPO, 2 tasks, 256 steps"
    assert max(len(line) for line in lines[:10]) <= 100
    assert any(line.startswith("after swapped") for line in lines)
    metrics = json.loads((out / "metrics.json").read_text())
    assert [task["kl_budget"] for task in metrics["tasks"]] == [1e-4, 1e-4]
    assert 0 < metrics["kl_by_task"]["stock"] <= 1e-4
    # the agent was taken as it is, and the run's own configuration says so again
    assert not (out / "pretrained").exists() and names_sequence(["--config", str(out / "config.yaml")])
    assert main(["finetune", "--resume", str(out)]) == 2
    assert "is finished" in capsys.readouterr().err


def test_what_is_a_sequence_and_what_is_not(config, tmp_path):
    assert names_sequence([f"--config={config}"]) and names_sequence(["--seed", "1", "--config", str(config)])
    assert names_sequence(["--tasks", "[]"])
    for words in ([], ["--config"], ["--config", str(tmp_path)], ["--resume", str(tmp_path)], ["--agent", str(config)]):
        assert not names_sequence(words)
    for text in ("pair: cartpole_swapped", "- tasks: 3", "tasks: {", "3"):
        config.write_text(text)
        assert not names_sequence(["--config", str(config)])


def test_mistakes_get_one_sentence(config, tmp_path, capsys):
    config.write_text(TASKS.replace("total_timesteps: 256", "total_timestep: 256"))
    assert main(["finetune", "--config", str(config), "--out", str(tmp_path / "run")]) == 2
    error = capsys.readouterr().err
    assert "total_timestep in entry 2 of tasks" in error and "did you mean total_timesteps?" in error
    assert error.count("\n") == 1 and not (tmp_path / "run").exists()


def test_help_is_that_of_sequences(config, capsys):
    with pytest.raises(SystemExit) as stop:
        main(["finetune", "--config", str(config), "--help"])
    text = capsys.readouterr().out
    assert stop.value.code == 0 and "--pretraining.total_timesteps" in text and "--pair" not in text


def test_bench_tells_a_suite_of_sequences_from_one_of_pairs(config, tmp_path, monkeypatch, capsys):
    (tmp_path / "bench").mkdir()
    (tmp_path / "bench" / "two.yaml").write_text("sequence: ../two.yaml\nseeds: [0]\nmethods: {a: {}, b: {}}\n")
    asked = []

    def no_runs(suite, out, **_):
        asked.append((suite.name, suite.is_sequence, list(suite.methods), out.name))
        value = {"mean": 0.5, "low": 0.4, "high": 0.6, "minimum": 0.4, "maximum": 0.6}
        means = {key: value for key in ("average_performance", "forgetting", "largest_share")}
        task = {"name": "stock", "start": 0, "end": 0, "low": None, "high": None}
        curve = {"timesteps": [0, 10], "returns": {"stock": [0, 1]}, "share": [0.0, 1.0]}
        entry = {"method": "a", "seeds": 1, **means, "final_returns": {"stock": 7.0}}
        return {
            "suite": "two",
            "tasks": [task],
            "rows": [{"method": "a", "unit": "performance", "curve": curve}],
            "summary": [entry],
        }

    monkeypatch.setattr(sequences, "run_sequence_suite", no_runs)
    words = ["bench", "two", "--configs", str(tmp_path), "--out", str(tmp_path / "o"), "--reference", str(tmp_path)]
    assert main(words) == 0
    assert asked == [("two", True, ["a", "b"], "o")]
    assert {"two.json", "two.png"} <= {path.name for path in tmp_path.iterdir()}
    assert "50 [40, 60]" in capsys.readouterr().out
