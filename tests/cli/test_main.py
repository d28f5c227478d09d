import re
import subprocess
import sys
from pathlib import Path

import pytest

import nsrl
from nsrl.cli.main import COMMANDS, main
from nsrl.errors import NsrlError


def test_the_help_names_every_command(capsys):
    assert main([]) == main(["--help"]) == main(["-h"]) == 0
    text = capsys.readouterr().out
    for command in COMMANDS:
        assert f"\n  {command} " in text


@pytest.mark.parametrize("command", COMMANDS)
def test_every_command_explains_itself_with_examples(command, capsys):
    with pytest.raises(SystemExit) as stop:
        main([command, "--help"])
    assert stop.value.code == 0
    text = capsys.readouterr().out
    assert f"usage: nsrl {command} [" in text
    # at least one example that can be typed as it stands
    assert f"\n  nsrl {command} " in text or f"\n  nsrl {command}\n" in text
    assert max(map(len, text.splitlines())) <= 120


def test_the_version(capsys):
    assert main(["--version"]) == 0
    assert capsys.readouterr().out == f"nsrl {nsrl.__version__}\n"


def test_a_mistyped_command_is_suggested(capsys):
    assert main(["finetun"]) == 2
    assert capsys.readouterr().err == "nsrl: there is no command 'finetun'; did you mean finetune?\n"
    assert main(["xyzzy"]) == 2
    assert "the commands are pretrain," in capsys.readouterr().err


@pytest.mark.parametrize("words", [["--help"], ["finetune", "--help"], ["finetune", "--sed", "1"]])
def test_help_and_typos_are_answered_without_importing_torch(words):
    code = f"import sys\nfrom nsrl.cli.main import main\ntry:\n    main({words})\nexcept SystemExit: pass\n"
    code += "sys.exit(bool({'torch', 'stable_baselines3', 'matplotlib', 'tensorboard'} & set(sys.modules)))"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert done.returncode == 0, done.stdout + done.stderr


def test_only_bad_input_is_turned_into_a_sentence(monkeypatch, capsys):
    def command(error):
        def run(_):
            raise error

        return lambda _: run

    monkeypatch.setattr("nsrl.cli.main.find_command", command(NsrlError("two\n lines")))
    assert main(["x"]) == 2
    assert capsys.readouterr().err == "nsrl: two lines\n"
    monkeypatch.setattr("nsrl.cli.main.find_command", command(KeyboardInterrupt()))
    assert main(["x"]) == 130
    monkeypatch.setattr("nsrl.cli.main.find_command", command(ValueError("a bug")))
    with pytest.raises(ValueError, match="a bug"):
        main(["x"])


@pytest.mark.parametrize(
    ("error", "said"),
    [
        (NsrlError("two\nlines of \x1b[2Ja file\u202e"), "nsrl: two lines of ?[2Ja file?\n"),
        (MemoryError(), "nsrl: there is not enough memory; ask for less, or use a larger machine\n"),
    ],
)
def test_a_sentence_is_one_line_that_a_terminal_does_not_obey(error, said, monkeypatch, capsys):
    def fail(_):
        raise error

    monkeypatch.setattr("nsrl.cli.main.find_command", lambda _: fail)
    assert main(["pretrain"]) == 2
    assert capsys.readouterr().err == said


def test_the_demo_takes_three_minutes_wherever_it_is_said(capsys):
    readme = (Path(__file__).parents[2] / "README.md").read_text()
    with pytest.raises(SystemExit):
        main(["demo", "--help"])
    texts = [capsys.readouterr().out, COMMANDS["demo"], *re.findall(r"make demo .*", readme)]
    said = [re.findall(r"(\w+) minutes?\b|\b(\d+ s)\b", text) for text in texts]
    assert said == [[("three", "")]] * 3
