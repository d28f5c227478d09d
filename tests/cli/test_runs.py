import json
import shutil

import numpy as np
import pytest
import yaml
from sb3_contrib import TRPO
from stable_baselines3 import PPO
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

from nsrl.cli.main import main
from nsrl.rl.playing.evaluation import evaluate
from nsrl.rl.retention.buffer import RetentionBuffer
from nsrl.runs.config import FinetuneConfig
from nsrl.runs.settings import load

FILES = {
    "config.yaml",
    "format.json",
    "agent.zip",
    "retention.npz",
    "metrics.json",
    "history.jsonl",
    "report.md",
    "curves.png",
    "tb",
    "pretrained",
}


def test_a_finetuning_folder_holds_all_and_nothing_half_written(finetuned):
    assert {path.name for path in finetuned.iterdir()} == FILES
    assert (finetuned / "curves.png").read_bytes().startswith(b"\x89PNG")


def test_the_configuration_is_fully_resolved_and_makes_the_same_run(finetuned, tmp_path, capsys):
    config = load(FinetuneConfig, finetuned / "config.yaml")
    assert config.total_timesteps == 512 and config.ppo.n_envs == 2 and config.out == str(finetuned)
    written = yaml.safe_load((finetuned / "config.yaml").read_text())
    assert written["retention"]["kl_budget"] == 0.01 and written["evaluation"]["deterministic"] is True
    again = tmp_path / "again"
    words = ["finetune", "--config", str(finetuned / "config.yaml"), "--progress", "false"]
    assert main([*words, "--out", str(again)]) == 0
    first, second = (json.loads((folder / "metrics.json").read_text()) for folder in (finetuned, again))
    assert first["after"] == second["after"]
    assert "old-task return" in capsys.readouterr().out


def test_the_agent_is_a_stock_zip_that_scores_what_the_metrics_say(finetuned):
    metrics = json.loads((finetuned / "metrics.json").read_text())
    model = PPO.load(finetuned / "agent.zip")
    for key, env in (("old_return", "nsrl/CartPole-v0"), ("new_return", "nsrl/CartPoleSwapped-v0")):
        assert evaluate(model, env, episodes=2, seed=20_000).mean == metrics["after"][key]["mean"]


def test_the_metrics_are_measured_on_the_saved_buffer(finetuned):
    metrics = json.loads((finetuned / "metrics.json").read_text())
    buffer = RetentionBuffer.load(finetuned / "retention.npz")
    policy = PPO.load(finetuned / "agent.zip").policy
    with np.errstate(all="ignore"):
        logits = policy.get_distribution(buffer.inputs()).distribution.logits.detach().numpy().astype(float)
    reference = buffer.outputs.astype(float)
    reference = reference - np.log(np.exp(reference).sum(1, keepdims=True))
    kl = (np.exp(reference) * (reference - logits)).sum(1)
    after = metrics["after"]
    assert after["kl_mean"] == pytest.approx(kl.mean(), rel=1e-3, abs=1e-7) and after["kl_mean"] <= 0.01
    assert after["kl_heldout"] == pytest.approx(kl[buffer.heldout].mean(), rel=1e-3, abs=1e-7)
    assert metrics["before"]["kl_mean"] == pytest.approx(0.0, abs=1e-9)
    assert after["agreement"] == pytest.approx((reference.argmax(1) == logits.argmax(1)).mean())


def test_the_event_file_holds_the_curves_of_both_tasks(finetuned):
    events = EventAccumulator(str(finetuned / "tb"))
    events.Reload()
    tags = set(events.Tags()["scalars"])
    assert {"retain/CartPole-v0/return_mean", "eval/mean_reward", "retain/kl_mean", "retain/kl_heldout"} <= tags
    assert [event.step for event in events.Scalars("eval/mean_reward")] == [0, 256, 512]


def test_the_report_says_what_the_table_says(finetuned):
    text = (finetuned / "report.md").read_text()
    metrics = json.loads((finetuned / "metrics.json").read_text())
    assert "![learning curves](curves.png)" in text
    assert f"| {metrics['after']['old_return']['mean']:.1f} ± " in text.replace("| ", "| ")
    for name in FILES - {"report.md", "curves.png", "pretrained"}:
        assert f"`{name}`" in text


def test_the_table_fits_in_a_hundred_columns(finetuned, pretrained, tmp_path, capsys):
    words = ["evaluate", "--agent", str(finetuned), "--pair", "cartpole_swapped", "--buffer", str(finetuned)]
    assert main([*words, "--episodes", "2", "--out", str(tmp_path / "e")]) == 0
    text = capsys.readouterr().out
    metrics = json.loads((tmp_path / "e" / "metrics.json").read_text())
    assert metrics["retention"]["kl_mean"] == pytest.approx(
        json.loads((finetuned / "metrics.json").read_text())["after"]["kl_mean"], rel=1e-6
    )
    assert "return on nsrl/CartPoleSwapped-v0" in text and max(map(len, text.splitlines())) <= 100


def test_collecting_and_finetuning_on_the_buffer_is_finetuning_at_once(pretrained, finetuned, tmp_path):
    out = tmp_path / "buffer"
    words = ["collect", "--agent", str(pretrained), "--env", "nsrl/CartPole-v0", "--progress", "false"]
    assert main([*words, "--states.n_states", "64", "--out", str(out)]) == 0
    assert {path.name for path in out.iterdir()} == {"config.yaml", "format.json", "metrics.json", "retention.npz"}
    digests = {RetentionBuffer.load(folder / "retention.npz").digest() for folder in (out, finetuned)}
    assert len(digests) == 1


@pytest.mark.parametrize(("method", "words"), [("finetune", ()), ("kl_penalty", ("--penalty", "2.0"))])
def test_the_baselines_go_through_the_same_loop(method, words, finetuning, finetuned, tmp_path):
    out = tmp_path / method
    assert main(finetuning("--method", method, *words, "--buffer", str(finetuned), "--out", str(out))) == 0
    metrics = json.loads((out / "metrics.json").read_text())
    assert metrics["method"] == method and metrics["penalty"] == (2.0 if words else None)
    assert metrics["after"]["kl_mean"] > 0.0


@pytest.mark.parametrize("method", ["null_space", "finetune"])
def test_trpo_goes_through_the_same_command(method, finetuning, finetuned, tmp_path):
    out = tmp_path / method
    words = ["--algorithm", "trpo", "--ppo.n_envs", "8", "--trpo.n_envs", "2", "--trpo.n_steps", "128"]
    words += ["--trpo.target_kl", "0.02", "--method", method, "--buffer", str(finetuned), "--out", str(out)]
    assert main(finetuning(*words)) == 0
    metrics = json.loads((out / "metrics.json").read_text())
    assert metrics["algorithm"] == "trpo" and metrics["timesteps"] == 512
    assert metrics["after"]["kl_mean"] > 0.0
    if method == "null_space":
        assert metrics["after"]["kl_mean"] <= 0.01
    named = {"null_space": "NullSpaceTRPO", "finetune": "plain TRPO"}[method]
    assert named in (out / "report.md").read_text()
    model = TRPO.load(out / "agent.zip")
    assert model.target_kl == 0.02
    assert evaluate(model, "nsrl/CartPole-v0", episodes=2, seed=20_000).mean == metrics["after"]["old_return"]["mean"]


def test_without_out_the_folder_is_fresh_under_runs(pretrained, elsewhere, capsys):
    words = ["collect", "--agent", str(pretrained), "--env", "nsrl/CartPole-v0", "--progress", "false"]
    words += ["--states.n_states", "16"]
    assert main(words) == main(words) == 0
    folders = sorted((elsewhere / "runs").iterdir())
    assert len(folders) == 2 and all(folder.name.startswith("collect-CartPole-v0-") for folder in folders)


def test_a_normalised_agent_keeps_its_statistics(tmp_path):
    agent, out = tmp_path / "agent", tmp_path / "run"
    quick = ["--progress", "false", "--evaluation.final_episodes", "2", "--evaluation.episodes", "1"]
    quick += ["--ppo.n_envs", "2"]
    words = ["--total_timesteps", "256", "--ppo.n_steps", "64", "--ppo.batch_size", "64", *quick]
    pretrain = ["pretrain", "--env", "nsrl/Pendulum-v0", "--normalize", "true", *words]
    assert main([*pretrain, "--out", str(agent)]) == 0
    assert (agent / "vecnormalize.pkl").is_file()
    finetune = ["finetune", "--agent", str(agent), "--pair", "pendulum_reversed", "--total_timesteps", "256"]
    assert main([*finetune, "--states.n_states", "32", *quick, "--out", str(out)]) == 0
    metrics = json.loads((out / "metrics.json").read_text())
    assert metrics["before"]["kl_mean"] == pytest.approx(0.0, abs=1e-9) and metrics["after"]["kl_mean"] <= 0.01
    pretraining = json.loads((agent / "metrics.json").read_text())
    assert metrics["before"]["old_return"]["mean"] == pytest.approx(pretraining["after"]["return"]["mean"], rel=1e-5)
    shutil.rmtree(out)
