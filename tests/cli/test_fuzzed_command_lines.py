"""Command lines and configurations with every kind of wrong value for every key: exit code 2 and one sentence.

What the lines name (agent, environment, benchmark) does not exist, so that a value that could be taken ends in that
sentence and trains nothing. With an agent that exists the line may also do its work: a step too far ends it then.
"""

from __future__ import annotations

import contextlib
import io
import random
import re
import warnings
from collections.abc import Iterator
from pathlib import Path

import gymnasium as gym
import pytest
from stable_baselines3 import PPO

from nsrl.cli.main import main
from nsrl.continual.config import ContinualConfig
from nsrl.continual.strategies.base import Strategy
from nsrl.editing.commands.config import EditConfig
from nsrl.runs.config import CollectConfig, DemoConfig, EvaluateConfig, FinetuneConfig, PretrainConfig
from nsrl.runs.settings import key_types

CONFIGS = {
    "pretrain": PretrainConfig,
    "finetune": FinetuneConfig,
    "collect": CollectConfig,
    "evaluate": EvaluateConfig,
    "continual": ContinualConfig,
    "edit": EditConfig,
    "demo": DemoConfig,
}
NOWHERE = {
    "pretrain": ("--env=NoSuch-v0",),
    "finetune": ("--agent=nowhere.zip", "--pair=cartpole_swapped"),
    "collect": ("--agent=nowhere.zip", "--env=CartPole-v1"),
    "evaluate": ("--agent=nowhere.zip", "--env=CartPole-v1"),
    "continual": ("--benchmark.name=nosuch",),
    "edit": ("--model=nowhere",),
    "demo": ("--pair=nosuch",),
}
#: Texts that no number, and no truth value, can be.
NUMBERS = (
    "x",
    "[1, x]",
    "{a: 1}",
    "2020-01-01",
    "2020-13-45",
    "190:20:30",
    "1_",
    "'1 2'",
    "--1",
    "1e",
    "0x",
    "y" * 300,
)
WHOLE = (*NUMBERS, "1.5", "1e-3", ".inf", ".nan", "true", "9" * 60, "9" * 5000)
SWITCHES = ("x", "3", "1.5", "[true, x]", "{a: true}", "maybe", "9" * 60)
WRONG = {int: WHOLE, float: (*NUMBERS, "9" * 60, "-" + "9" * 400), bool: SWITCHES}
#: Texts for every key, whatever it takes.
ANY = (
    *("", "x", "null", "~", "true", "off", "[1, x]", "[]", "[null]", "[[]]", "{a: 1}", "{}", "{a: {b: [1]}}"),
    *("2020-01-01", "190:20:30", "1_", "010", "0x", "--1", "-1", "0", "-0.0", "1.5", "0.5", "2", "1e-3", "1e12"),
    *("1e400", "-1e400", ".inf", ".nan", "9" * 20, "-" + "9" * 20, "9" * 60, "9" * 400, "9" * 5000, "4294967296"),
    *("[" + "9" * 60 + "]", "{a: " + "9" * 60 + "}", "[" + "9" * 5000 + "]", "[-1]", "[0]", "[1000000000000]"),
    *("~nosuchuser", "~nosuchuser/x", "n" * 300, "a/" + "n" * 300, "x\0y", "\x1b[31mred", "'1 2'", "é", "!!int x"),
    *("&a [*a]", "*a", "[" * 200, "{class_path: os.system}", "%", "a: b: c", "- 1", "\n", "/dev/null", "/", "."),
    *("{lr: 1}", "{kl_budget: x}", "{kl_budget: -1}", "{kl_budget: .nan}", "cuda:9", "meta", "tpu"),
)


class Began(Exception):
    """The value was taken and the work has begun."""


def lines(count: int, seed: int, commands: tuple[str, ...], words: dict[str, tuple[str, ...]], file: Path) -> Iterator:
    """Command lines by seed, one key each with a text that is set on the line or in a configuration."""
    keys = [(command, key) for command in commands for key, _ in key_types(CONFIGS[command])]
    draw = random.Random(f"{commands} {seed}")
    for _ in range(count):
        (command, key), text = draw.choice(keys), draw.choice(ANY)
        if draw.random() < 0.5:
            yield [command, *words[command], f"--{key}={text}"]
            continue
        parts = key.split(".")
        nested = "\n".join("  " * depth + f"{part}:" for depth, part in enumerate(parts))
        file.write_text(f"{nested} {text}\n", encoding="utf-8")
        others = (word for word in words[command] if not word.startswith(f"--{key}="))
        yield [command, f"--config={file}", *others]


def run(words: list[str]) -> tuple[int | None, str]:
    """Exit code, None where the work began, and what was said."""
    told = io.StringIO()
    with contextlib.redirect_stderr(told), contextlib.redirect_stdout(told), warnings.catch_warnings():
        warnings.simplefilter("ignore")
        try:
            return main(words), told.getvalue()
        except Began:
            return None, told.getvalue()


def check_refused(words: list[str], text: str) -> None:
    assert text.startswith("nsrl: ") and text.count("\n") == 1 and 20 < len(text) < 1100, (words, text)
    assert text.strip().isprintable(), (words, text)


def wrong(count: int, seed: int, commands: tuple[str, ...]) -> None:
    """Values of the wrong kind are told by the name of their key."""
    known = [(command, key, kind) for command in commands for key, kind in key_types(CONFIGS[command]) if kind in WRONG]
    draw = random.Random(seed)
    for _ in range(count):
        command, key, kind = draw.choice(known)
        words = [command, *NOWHERE[command], f"--{key}={draw.choice(WRONG[kind])}"]
        code, text = run(words)
        assert code == 2, (words, text)
        check_refused(words, text)
        assert re.search(rf"\b{re.escape(key)}\b", text), (words, text)


def anything(count: int, seed: int, commands: tuple[str, ...], file: Path) -> None:
    for words in lines(count, seed, commands, NOWHERE, file):
        code, text = run(words)
        assert code == 2, (words, text)
        check_refused(words, text)


#: All but demo, whose keys are those of two others and take two seconds to read.
MOST = tuple(command for command in CONFIGS if command != "demo")


def test_a_wrong_value_is_told_by_the_name_of_its_key(elsewhere):
    wrong(25, 0, MOST)
    assert list(elsewhere.iterdir()) == []


def test_any_value_ends_in_one_sentence(elsewhere, tmp_path):
    anything(25, 0, MOST, tmp_path / "c.yaml")
    assert list(elsewhere.iterdir()) == []


@pytest.mark.slow
@pytest.mark.timeout(3600)
@pytest.mark.parametrize("command", CONFIGS)
def test_many_values_end_in_one_sentence(command, elsewhere, tmp_path):
    count = 150 if command == "demo" else 600
    wrong(count // 3, 1, (command,))
    anything(count, 1, (command,), tmp_path / "c.yaml")
    assert list(elsewhere.iterdir()) == []


@pytest.fixture
def here(tmp_path, monkeypatch) -> dict[str, tuple[str, ...]]:
    """Lines whose agent, environment and benchmark exist; what goes on and on is stopped by `Began`."""
    steps = [0]
    environment, strategy = gym.wrappers.TimeLimit.step, Strategy.step

    def counted(original, share):
        def step(self, given):
            steps[0] += share
            if steps[0] > 400:
                raise Began
            return original(self, given)

        return step

    monkeypatch.setattr(gym.wrappers.TimeLimit, "step", counted(environment, 1))
    monkeypatch.setattr(Strategy, "step", counted(strategy, 100))
    agent = tmp_path / "agent.zip"
    policy = {"net_arch": [4]}
    PPO("MlpPolicy", "CartPole-v1", n_steps=8, batch_size=8, device="cpu", seed=0, policy_kwargs=policy).save(agent)
    quiet = ("--progress=false", "--evaluation.episodes=1", "--evaluation.final_episodes=1")
    buffer = ("--states.n_states=16", "--states.n_envs=1")
    small = ("--ppo.n_steps=8", "--ppo.n_envs=1")
    both = ("--old_env=CartPole-v1", "--new_env=CartPole-v1")

    def reset(words):
        steps[0] = 0
        return words

    return {
        "reset": reset,
        "pretrain": ("--env=CartPole-v1", *small, *quiet),
        "finetune": (f"--agent={agent}", *both, *buffer, *small, *quiet),
        "collect": (f"--agent={agent}", "--env=CartPole-v1", *buffer, "--progress=false"),
        "evaluate": (f"--agent={agent}", "--env=CartPole-v1", "--episodes=1"),
        "continual": ("--benchmark.name=teacher_student", "--model.hidden=[4]", "--progress=false"),
    }


def worked(count: int, seed: int, commands: tuple[str, ...], here: dict, file: Path, folder: Path) -> list[int | None]:
    """Run lines that may do their work; what a refused one leaves behind fails."""
    codes = []
    for words in lines(count, seed, commands, here, file):
        before = set(folder.iterdir())
        here["reset"](words)
        code, text = run(words)
        codes.append(code)
        assert code in (0, 2, None), (words, text)
        if code == 2:
            check_refused(words, text)
            assert set(folder.iterdir()) == before, words
    return codes


def test_lines_without_a_wrong_value_do_their_work(here, elsewhere):
    for command in ("pretrain", "finetune", "collect", "evaluate", "continual"):
        here["reset"]([])
        code, text = run([command, *here[command]])
        assert code in (0, None), (command, text)


def test_any_value_for_an_agent_that_exists(here, elsewhere, tmp_path):
    worked(15, 0, ("finetune", "collect", "evaluate", "pretrain", "continual"), here, tmp_path / "c.yaml", elsewhere)


@pytest.mark.slow
@pytest.mark.timeout(3600)
@pytest.mark.parametrize("command", ["pretrain", "finetune", "collect", "evaluate", "continual"])
def test_many_values_for_an_agent_that_exists(command, here, elsewhere, tmp_path):
    codes = worked(400, 1, (command,), here, tmp_path / "c.yaml", elsewhere)
    assert codes.count(2) > 0 and len(codes) > codes.count(2), "none was refused, or none was taken"
