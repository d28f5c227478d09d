import json
import math

import numpy as np
import pytest
from matplotlib.image import imread

from nsrl.cli.command import print_table
from nsrl.errors import NsrlError
from nsrl.files import append_line, read_lines, write_json, write_lines, write_text
from nsrl.runs.figures import Curve, curve_from_history, draw_curves, first_returns
from nsrl.runs.folder import choose_folder, slug
from nsrl.runs.machine import describe_environment
from nsrl.runs.report import Table, comparison_table, duration, percent, returns, scientific

ROWS = [
    {"timesteps": 0, "kl_mean": 0.0, "kl_heldout": 0.0, "return/old": 500.0, "return/new": 9.0},
    {"timesteps": 100, "kl_mean": 0.005, "kl_heldout": 0.006},
    {"timesteps": 200, "kl_mean": 0.009, "kl_heldout": None, "return/old": 480.0, "return/new": 300.0},
]


def metrics(old=500.0, new=400.0):
    state = {"kl_mean": 0.0091, "kl_heldout": 3.2e-5, "agreement": 0.987}
    state |= {"old_return": {"mean": old, "std": 1.0}, "new_return": {"mean": new, "std": 123.4}}
    return {"before": state, "after": state, "training_seconds": 61.0}


def test_a_curve_takes_the_rows_that_have_its_values():
    curve = curve_from_history("run", ROWS, ("old", "new"))
    assert curve.returns == {"old": ([0, 200], [500.0, 480.0]), "new": ([0, 200], [9.0, 300.0])}
    assert curve.kl == ([0, 100, 200], [0.0, 0.005, 0.009]) and curve.kl_heldout == ([0, 100], [0.0, 0.006])
    assert first_returns(curve) == {"old": 500.0}


@pytest.mark.parametrize("budget", [0.01, 0.0, None])
def test_a_figure_shows_lines_budget_and_every_panel(budget, tmp_path):
    curves = [curve_from_history(name, ROWS, ("old", "new")) for name in ("plain PPO", "NullSpacePPO")]
    tasks = [("old", "old task"), ("new", "new task")]
    path = draw_curves(curves, tmp_path / "c.png", tasks=tasks, budget=budget, references={"old": 500.0}, title="title")
    image = imread(path)
    assert image.shape[1] > 1500 and image.shape[0] > 400
    thirds = np.array_split(image[..., :3], 3, axis=1)
    assert all((part < 0.5).any() for part in thirds)
    assert list(tmp_path.iterdir()) == [path]


def test_a_figure_of_nothing_is_still_a_figure(tmp_path):
    path = draw_curves([Curve("empty", {"new": ([], [])})], tmp_path / "c.png", tasks=[("new", "task")])
    assert imread(path).size > 0


def test_numbers_are_short_and_keep_their_meaning():
    assert [scientific(value) for value in (0.0, 0.0091234, 1.5, 12.34, 3.21e-7, None, math.nan)] == [
        "0",
        "0.0091",
        "1.5",
        "12",
        "3.2e-07",
        "-",
        "-",
    ]
    assert percent(0.98765) == "98.8 %" and percent(None) == "-"
    assert returns({"mean": 499.96, "std": 0.0}) == "500.0 ± 0.0" and returns(None) == "-"
    assert [duration(value) for value in (5.2, 89.0, 100.0, 5400.0)] == ["5 s", "89 s", "2 min", "1 h 30 min"]


def test_the_comparison_fits_in_a_hundred_columns_at_its_widest(capsys):
    table = comparison_table([("plain PPO", metrics(-12345.6, -9876.5)), ("NullSpacePPO", metrics())], "x" * 90)
    print_table(table)
    lines = capsys.readouterr().out.splitlines()
    assert max(map(len, lines)) <= 100
    # title, head, rule, three rows: nothing is broken over lines
    assert len(lines) == 6
    assert "-12345.6 ± 1.0" in lines[4] and "61 s" in lines[5]


def test_a_table_as_markdown():
    assert Table(("", "a"), (("x", "1"), ("y", "2"))).markdown() == "|  | a |\n| --- | ---: |\n| x | 1 |\n| y | 2 |"


def test_json_has_no_nan(tmp_path):
    write_json(tmp_path / "m.json", {"a": [math.nan, 1.0], "b": {"c": np.float32(2.0)}, "e": (math.inf, None)})
    assert json.loads((tmp_path / "m.json").read_text()) == {"a": [None, 1.0], "b": {"c": 2.0}, "e": [None, None]}


def test_a_line_that_a_crash_cut_short_is_left_out(tmp_path):
    path = tmp_path / "h.jsonl"
    write_lines(path, ROWS[:1])
    append_line(path, ROWS[1])
    whole = read_lines(path)
    assert whole == ROWS[:2]
    with path.open("a") as file:
        file.write('{"timesteps": 200, "kl_m')
    assert read_lines(path) == whole
    assert read_lines(tmp_path / "missing") == []


def test_a_text_is_replaced_whole(tmp_path, monkeypatch):
    path = tmp_path / "a.txt"
    write_text(path, "old")
    monkeypatch.setattr("os.replace", lambda *_: (_ for _ in ()).throw(OSError(28, "No space left on device")))
    with pytest.raises(NsrlError, match=r"cannot write .*a\.txt: No space left on device"):
        write_text(path, "new")
    assert path.read_text() == "old" and list(tmp_path.iterdir()) == [path]


def test_folders_are_named_by_command_task_and_time(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    first = choose_folder("finetune", "nsrl/CartPole-v0", None)
    assert first.path.parts[0] == "runs" and first.path.name.startswith("finetune-CartPole-v0-2")
    first.path.mkdir(parents=True)
    assert choose_folder("finetune", "nsrl/CartPole-v0", None).path != first.path
    assert slug("../../etc/passwd") == "passwd" and slug("") == "run" and slug("a b/c d") == "c-d"


def test_the_environment_names_no_machine():
    import getpass
    import platform

    found = describe_environment()
    assert found["packages"]["torch"] and found["cpus"] >= 1 and found["python"] == platform.python_version()
    text = json.dumps(found)
    assert platform.node() not in text.split() and f"/{getpass.getuser()}" not in text
