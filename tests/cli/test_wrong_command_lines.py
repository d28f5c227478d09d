"""Wrong command lines of every kind: exit code 2 and one sentence that names what is wrong; nothing is written."""

import os
import re

import pytest

from nsrl.cli.main import main
from nsrl.errors import NsrlError
from nsrl.files import given_path, read_lines
from nsrl.runs import memory

QUICK = ("--progress", "false", "--evaluation.episodes", "1", "--evaluation.final_episodes", "1")
LONG = "n" * 300


def finetune(agent: str) -> tuple[str, ...]:
    options = ("--total_timesteps", "128", "--states.n_states", "32", "--ppo.n_envs", "2", "--ppo.n_steps", "64")
    return ("finetune", "--agent", agent, "--pair", "cartpole_swapped", *options, *QUICK)


PRETRAIN = ("pretrain", "--env", "nsrl/CartPole-v0", "--total_timesteps", "64", "--ppo.n_envs", "1", *QUICK)
CONTINUAL = ("continual", "--benchmark.name", "teacher_student", "--model.hidden", "[4]", "--progress", "false")


@pytest.fixture
def refused(elsewhere, capsys):
    """Runs a command that has to be refused; returns the sentence."""

    def attempt(*words: str) -> str:
        capsys.readouterr()
        assert main(list(words)) == 2
        text = capsys.readouterr()
        assert text.out == "" and text.err.startswith("nsrl: ") and text.err.count("\n") == 1
        assert "Traceback" not in text.err and len(text.err) < 1000
        assert list(elsewhere.iterdir()) == []
        return text.err

    return attempt


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ("seed: 2020-01-01", "seed must be a whole number"),
        ("seed: 2020-13-45", "seed must be a whole number"),
        ("seed: 0x", "seed must be a whole number"),
        ("ppo: {n_steps: 1_}", "ppo.n_steps must be a whole number in decimal digits, not '1_'"),
        ("seed: 190:20:30", "seed must be a whole number"),
        ("seed: 1_", "seed must be a whole number"),
        ("seed: 010", "seed must be a whole number"),
        ("ppo: {gamma: 1:30.5}", "ppo.gamma must be"),
        ("name: no", "name must be"),
        (f"seed: {'9' * 5000}", "more than 64 bits"),
        ("seed: !!int x", "does not fit its value"),
        ("seed: null", "seed must be a whole number, not null"),
        ("retention: null", "must hold keys and values"),
        ("ppo: {n_envs: null}", "ppo.n_envs must be a whole number, not null"),
        ("evaluation: {every: null}", "evaluation.every must be a whole number, not null"),
        ("- 1", "must hold keys and values"),
        ("? [a]\n: b", "used as a key"),
    ],
)
def test_yaml(text, said, refused, pretrained, tmp_path):
    (tmp_path / "c.yaml").write_text(text)
    assert said in refused(*finetune(str(pretrained)), "--config", str(tmp_path / "c.yaml"))


@pytest.mark.parametrize("text", ["tasks: null", "tasks: [1]", "tasks: 3", "tasks: []", "tasks: {a: 1}"])
def test_tasks_of_a_sequence(text, refused, tmp_path):
    (tmp_path / "c.yaml").write_text(text)
    assert "tasks" in refused("finetune", "--config", str(tmp_path / "c.yaml"), "--progress", "false")


@pytest.mark.parametrize("text", ["seed: null", "model: {hidden: null}", "presets: null", "strategy: {options: null}"])
def test_null_where_there_has_to_be_a_value(text, refused, tmp_path):
    (tmp_path / "c.yaml").write_text(text)
    assert "not null" in refused(*CONTINUAL, "--config", str(tmp_path / "c.yaml"))


@pytest.mark.parametrize("path", ["~nosuchuser", "~nosuchuser/x", LONG, f"a/{LONG}", "x\0y"])
def test_names_that_no_file_can_have(path, refused, pretrained):
    base = finetune(str(pretrained))
    for words in (
        (*base, "--out", path),
        (*base, "--agent", path),
        (*base, "--buffer", path),
        (*base, "--config", path),
        (*CONTINUAL, "--out", path),
        ("finetune", "--resume", path),
        ("pretrain", "--resume", path),
        ("continual", "--resume", path),
    ):
        sentence = refused(*words)
        assert re.search("no such user|too long|null byte|[Nn]o such file|no run folder|no agent", sentence), sentence


def test_what_may_not_be_looked_at(tmp_path, monkeypatch):
    """As another user, whom the tests cannot be."""

    def forbidden(path, *_, **__):
        raise PermissionError(13, os.strerror(13), path)

    monkeypatch.setattr("nsrl.files.os.stat", forbidden)
    with pytest.raises(NsrlError, match=r"cannot look at .*: Permission denied"):
        given_path(tmp_path)


def test_a_long_name_is_cut(pretrained, elsewhere):
    words = ["collect", "--agent", str(pretrained), "--env", "nsrl/CartPole-v0", "--states.n_states", "16"]
    assert main([*words, "--progress", "false", "--name", LONG]) == 0
    [folder] = (elsewhere / "runs").iterdir()
    assert len(folder.name) < 160


@pytest.mark.parametrize(
    ("words", "said"),
    [
        ("--states.n_envs=0", "states.n_envs must be at least 1"),
        ("--states.oversample=1e12", "states.oversample 1e+12 would take"),
        ("--ppo.n_envs=0", "ppo.n_envs must be at least 1"),
        ("--ppo.n_envs=1000000000000", "GiB of memory"),
        ("--ppo.n_steps=1000000000000", "n_steps 1000000000000 in 2 environments would take"),
        ("--states.n_states=1000000000000", "states.n_states 1000000000000 with"),
        ("--seed=99999999999999999999", "seed must be between 0 and 4294967295"),
        ("--seed=-1", "seed must be at least 0"),
        ("--seed=190:20:30", "seed must be a whole number in decimal digits"),
        ("--seed=1_", "seed must be a whole number in decimal digits"),
        ("--ppo.gamma=1:30.5", "ppo.gamma must be a number in decimal digits"),
        ("--ppo.learning_rate=.inf", "ppo.learning_rate must be finite"),
        ("--ppo.ent_coef=.nan", "ppo.ent_coef must be"),
        ("--penalty=.inf", "penalty must be finite"),
        ("--retention.tempering=-1", "tempering is a share"),
        ("--retention.tempering=2", "tempering is a share"),
        ("--retention.tempering=.nan", "tempering is a share"),
        ("--retention.rate=-1", "rate must be a finite number"),
        ("--retention.rate=.inf", "rate must be a finite number"),
        ("--retention.damping=.nan", "damping must be a finite number"),
    ],
)
def test_numbers_of_finetuning(words, said, refused, pretrained):
    assert said in refused(*finetune(str(pretrained)), words)


@pytest.mark.parametrize(
    ("words", "said"),
    [
        ("--policy.hidden=[-1]", "policy.hidden must be widths"),
        ("--policy.kind=MultiInputPolicy", "PPO with MultiInputPolicy cannot be built"),
        ("--policy.hidden=[1000000,1000000]", "not enough memory"),
        ("--policy.log_std_init=.nan", "policy.log_std_init must be finite"),
        ("--ppo.n_envs=1000000000000", "GiB of memory"),
        ("--ppo.n_steps=1000000000000", "GiB of memory"),
        ("--env=NoSuch-v0", "cannot make the environment 'NoSuch-v0'"),
        ("--env=::", "cannot make the environment"),
        ("--env=a/b/c", "cannot make the environment"),
        ("--env=nosuchmodule:Env-v0", "cannot make the environment"),
    ],
)
def test_numbers_and_environments_of_pretraining(words, said, refused):
    assert said in refused(*PRETRAIN, words)


@pytest.mark.parametrize(
    ("words", "said"),
    [
        ("--training.device=tpu9", "training.device 'tpu9' is no device of this machine"),
        ("--training.device=meta", "is no device of this machine"),
        ("--training.learning_rate=.nan", "training.learning_rate must be positive and finite"),
        ("--training.momentum=.inf", "training.momentum must be finite"),
        ("--seed=99999999999999999999", "seed must lie between 0 and 4294967295"),
        ("--benchmark.order=99999999999999999999", "benchmark.order must be"),
    ],
)
def test_numbers_of_continual_learning(words, said, refused):
    assert said in refused(*CONTINUAL, words)


@pytest.mark.parametrize("words", [("bench",), ("bench", "x", "--workers", "x"), ("ntk",)])
def test_words_that_are_missing_or_too_many(words, refused):
    assert f"see nsrl {words[0]}" in refused(*words)


def test_cuda_where_there_is_none(refused, monkeypatch):
    import torch

    def none(*_, **__):
        raise AssertionError("Torch not compiled with CUDA enabled")

    monkeypatch.setattr(torch, "empty", none)
    assert "training.device 'cuda' is no device of this machine (Torch not compiled" in refused(
        *CONTINUAL, "--training.device", "cuda"
    )


def test_memory_is_asked_for_where_the_system_says_how_much_there_is(monkeypatch, tmp_path):
    monkeypatch.setattr(memory, "free_bytes", lambda: 2.0**30)
    memory.check_memory("a", 2**30)
    with pytest.raises(NsrlError, match=r"^a would take 3 GiB of memory or more, and 1 GiB are free"):
        memory.check_memory("a", 3 * 2**30)


@pytest.mark.parametrize("line", ['{"timesteps": null}', '{"timesteps": "x"}', '{"timesteps": -1}', "[1]", "3", '"x"'])
def test_a_damaged_line_of_the_history(line, tmp_path):
    path = tmp_path / "history.jsonl"
    path.write_text('{"timesteps": 1}\n' + line + "\n")
    with pytest.raises(NsrlError, match=r"line 2 of .* is no measurement"):
        read_lines(path)


def test_events_where_a_file_is_in_the_way(finetuned, tmp_path, capsys):
    import shutil

    folder = tmp_path / "run"
    shutil.copytree(finetuned, folder)
    shutil.rmtree(folder / "tb")
    (folder / "tb").write_text("a file")
    for name in ("metrics.json", "history.jsonl"):
        (folder / name).unlink()
    with pytest.warns(UserWarning, match="no checkpoint yet"):
        assert main(["finetune", "--resume", str(folder), "--progress", "false"]) == 2
    assert f"nsrl: cannot write logs into {folder / 'tb'}" in capsys.readouterr().err
