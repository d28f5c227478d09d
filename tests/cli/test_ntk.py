import json

import pytest

from nsrl.cli.main import main
from nsrl.rl.retention.buffer import RetentionBuffer


@pytest.fixture(scope="module")
def buffer(pretrained, tmp_path_factory):
    path = tmp_path_factory.mktemp("buffers") / "retention.npz"
    RetentionBuffer.collect(pretrained, "nsrl_envs:nsrl/CartPole-v0", n_states=48).save(path)
    return path


def test_spectrum_prints_a_table_and_writes_on_request(pretrained, buffer, tmp_path, capsys):
    out = tmp_path / "spectrum"
    words = ["ntk", "spectrum", "--agent", str(pretrained), "--buffer", str(buffer), "--states", "16"]
    assert main([*words, "--out", str(out)]) == 0
    text = capsys.readouterr().out
    assert "protected parameters" in text and "effective dimension" in text
    content = json.loads((out / "spectrum.json").read_text())
    assert 0 < content["rank"] == len(content["eigenvalues"]) <= 16  # two actions, one row a state
    assert (out / "spectrum.png").is_file()


def test_spectrum_refuses_another_agents_buffer(buffer, tmp_path, capsys):
    from tests.rl.builders import build_agent

    build_agent(seed=5).save(tmp_path / "other.zip")
    words = ["ntk", "spectrum", "--agent", str(tmp_path / "other.zip"), "--buffer", str(buffer)]
    assert main(words) == 2
    assert capsys.readouterr().err.startswith("nsrl: ")
    assert main([*words, "--trust_buffer"]) == 0


def test_gallery_draws_what_is_asked_for(tmp_path, capsys):
    words = ["ntk", "gallery", "--out", str(tmp_path), "--only", "nadaraya_watson", "--quick", "--workers", "1"]
    assert main(words) == 0
    assert (tmp_path / "nadaraya_watson.png").is_file() and (tmp_path / "README.md").is_file()
    assert "figures  1" in capsys.readouterr().out


def test_forecast_writes_a_study(pretrained, buffer, tmp_path, capsys):
    out = tmp_path / "forecast.json"
    words = ["ntk", "forecast", "--agent", str(pretrained), "--buffer", str(buffer), "--out", str(out)]
    words += ["--tasks", "swapped", "--learning_rates", "1e-4,1e-3,3e-3", "--timesteps", "512", "--seeds", "0"]
    assert main(words) == 0
    assert len(json.loads(out.read_text())["rows"]) == 3
    assert "rank correlation" in capsys.readouterr().out
    assert out.with_suffix(".png").is_file()


@pytest.mark.parametrize(
    ("words", "told"),
    [
        ([], "required"),
        (["spectrum"], "--agent"),
        (["spectrum", "--agent", "nothing.zip", "--buffer", "nothing.npz"], "nothing"),
        (["spectrum", "--agent", "a", "--buffer", "b", "--states", "0"], "from 1 on, not '0'"),
        (["gallery", "--only", "sunflowers"], "sunflowers"),
        (["kernel"], "invalid choice"),
        (["spectrum", "--agent", "a", "--buffer", "b", "--states", "many"], "whole number from 1 on, not 'many'"),
        (["spectrum", "--agent", "a", "--buffer", "b", "--kl_budget", "low"], "--kl_budget"),
        (["gallery", "--only", ","], "names no figure"),
        (["gallery", "--workers", "0"], "whole number from 1 on"),
        (["forecast", "--buffer", "retention.npz"], "--buffer needs --agent"),
        (["forecast", "--agent", "nothing.zip"], "nothing.zip"),
        (["forecast", "--learning_rates", "fast"], "numbers separated by commas, not 'fast'"),
        (["forecast", "--seeds", "0.5"], "whole numbers separated by commas"),
        (["forecast", "--tasks", "sideways"], "sideways"),
        (["forecast", "--tasks", "same", "--learning_rates", "1e-3"], "three or more runs"),
    ],
)
def test_bad_input_is_a_sentence(words, told, elsewhere, capsys):
    assert main(["ntk", *words]) == 2
    error = capsys.readouterr().err
    assert error.startswith("nsrl: ") and told in error and error.count("\n") == 1
    assert not list(elsewhere.iterdir())
