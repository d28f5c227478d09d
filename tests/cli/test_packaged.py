"""Configurations by name, from a folder that has none: what comes with nsrl is found wherever one is."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest
import yaml

from nsrl.cli import finetune
from nsrl.cli.main import main
from nsrl.errors import NsrlError
from nsrl.runs.config import EvaluationSettings, PretrainConfig
from nsrl.runs.packaged import CONFIGS, find_config, packaged_names
from nsrl.runs.training import Interrupted

REPOSITORY = Path(__file__).parents[2]


KINDS = ("", "bench", "continual", "edit", "post_training")


def test_every_committed_configuration_has_a_name() -> None:
    found = {find_config(name, kind) for kind in KINDS for name in packaged_names(kind)}
    assert found == {path for path in CONFIGS.rglob("*.yaml")} and len(found) > 20
    assert {path.relative_to(CONFIGS) for path in found} == {
        path.relative_to(REPOSITORY / "configs") for path in (REPOSITORY / "configs").rglob("*.yaml")
    }


def test_a_file_goes_before_a_name(elsewhere: Path) -> None:
    Path("cartpole_swapped").mkdir()  # a run's folder, say, does not
    assert find_config("cartpole_swapped") == CONFIGS / "cartpole_swapped.yaml"
    Path("demo").write_text("pair: cartpole_swapped")
    assert find_config("demo") == Path("demo")


@pytest.mark.parametrize(
    ("words", "hint"),
    [
        (["finetune", "--config", "cartpole_swaped"], "did you mean cartpole_swapped"),
        (["finetune", "--config=configs/cartpole_swaped.yaml"], "did you mean cartpole_swapped"),
        (["pretrain", "--config", "pretrain_cheetah"], "did you mean pretrain_halfcheetah, pretrain_halfcheetah_plain"),
        (["continual", "--config", "permuted_digit"], "did you mean permuted_digits"),
        (["continual", "--config", "xyzzy"], "those that come with nsrl are permuted_digits, "),
        (["demo", "--config", "."], "is no file"),
        (["bench", "cartpole_swaped"], "did you mean cartpole_swapped"),
        (["bench", "xyzzy"], "known: cartpole_critics, "),
    ],
)
def test_a_name_that_is_none_gets_those_most_like_it(
    words: list[str], hint: str, elsewhere: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(words) == 2
    error = capsys.readouterr().err
    assert hint in error and error.count("\n") == 1
    assert not any(elsewhere.iterdir())


def test_names_and_overrides_on_a_command_line(elsewhere: Path, capsys: pytest.CaptureFixture[str]) -> None:
    for words in (["--config", "cartpole_swapped"], ["--config=cartpole_swapped"]):
        with pytest.raises(SystemExit):
            main(["finetune", *words, "--seed", "7", "--print_config"])
        values = yaml.safe_load(capsys.readouterr().out)
        committed = yaml.safe_load((REPOSITORY / "configs" / "cartpole_swapped.yaml").read_text())
        assert values["seed"] == 7 and values["total_timesteps"] == committed["total_timesteps"]
    assert finetune.names_sequence(["--config", "sequence_cartpole"])
    assert not finetune.names_sequence(["--config", "cartpole_swapped"])


@pytest.fixture
def small(monkeypatch: pytest.MonkeyPatch) -> None:
    """The packaged pretraining takes a second."""

    def load(config: type[PretrainConfig], path: Path) -> PretrainConfig:
        found = read(config, path)
        ppo = replace(found.ppo, n_envs=2, n_steps=64, batch_size=64)
        return replace(found, total_timesteps=256, ppo=ppo, evaluation=EvaluationSettings(10**6, 1, 1))

    from nsrl.runs import pretraining

    read = pretraining.load
    monkeypatch.setattr(pretraining, "load", load)


def test_the_agent_of_a_packaged_configuration_is_trained_where_it_is_missing(
    small: None, elsewhere: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    words = ["finetune", "--config", "cartpole_swapped", "--total_timesteps", "256", "--states.n_states", "64"]
    words += ["--evaluation.episodes", "1", "--evaluation.final_episodes", "1", "--ppo.n_envs", "2"]
    words += ["--progress", "false", "--ppo.n_steps", "64"]
    assert main([*words, "--pair", "none"]) == 2  # told before anything is trained
    assert not any(elsewhere.iterdir())
    capsys.readouterr()
    assert main([*words, "--out", "first"]) == 0
    assert capsys.readouterr().err.count("pretraining on nsrl/CartPole-v0 first") == 1
    assert Path("runs/pretrained/cartpole/agent.zip").is_file() and Path("first/agent.zip").is_file()
    assert main([*words, "--out", "second"]) == 0
    assert "pretraining" not in capsys.readouterr().err
    assert main([*words, "--agent", "missing", "--out", "third"]) == 2  # no configuration makes this one


def test_an_interrupted_pretraining_is_gone_on_with_by_the_same_command(
    elsewhere: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def stop(*_: object, **__: object) -> None:
        raise Interrupted(Path("runs/pretrained/cartpole"), 143)

    monkeypatch.setattr("nsrl.runs.pretraining.obtain_agent", stop)
    assert main(["finetune", "--config", "cartpole_swapped"]) == 143
    assert "the same command goes on" in capsys.readouterr().err


def test_a_folder_that_is_no_run_is_left_alone(elsewhere: Path) -> None:
    Path("runs/pretrained/cartpole").mkdir(parents=True)
    assert main(["finetune", "--config", "cartpole_swapped"]) == 2


def test_an_unknown_name_is_bad_input() -> None:
    with pytest.raises(NsrlError, match="cannot read the configuration"):
        find_config("")
