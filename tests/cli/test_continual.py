"""`nsrl continual` and `nsrl bench continual`."""

import json
from pathlib import Path

import pytest

from nsrl.cli.main import main
from nsrl.continual.records import Records

# imported here, as it sets environment variables, which no test may do: the digits are its
pytest.importorskip("sklearn")

CONFIGS = Path(__file__).parents[2] / "configs"
QUICK = ("--training.epochs", "1", "--benchmark.tasks", "2", "--strategy.name", "naive", "--progress", "false")


def words(*more: str) -> list[str]:
    return ["continual", "--config", str(CONFIGS / "continual" / "permuted_digits.yaml"), *QUICK, *more]


def test_a_run_prints_its_table_and_says_where_everything_lies(tmp_path, capsys):
    out = tmp_path / "run"
    assert main(words("--out", str(out), "--seed", "3")) == 0
    text = capsys.readouterr().out
    assert "naive on permuted_digits, 2 tasks, domain" in text and "backward transfer (BWT)" in text
    metrics = json.loads((out / "metrics.json").read_text())
    assert metrics["seed"] == 3 and f"{100 * metrics['acc']:.1f}" in text
    for line in text.splitlines():
        if line.startswith(("results", "figure")):
            assert Path(line.split()[1]).is_file()
    # a folder that is in use is not written to
    assert main(words("--out", str(out))) == 2
    assert "is in use" in capsys.readouterr().err
    # and what is finished is shown, not run again
    assert main(["continual", "--resume", str(out)]) == 0
    assert "naive on permuted_digits" in capsys.readouterr().out


def test_an_interrupted_run_says_how_to_go_on_and_does(tmp_path, capsys, monkeypatch):
    def interrupted(*_):
        raise KeyboardInterrupt

    out = tmp_path / "run"
    with monkeypatch.context() as patch:
        patch.setattr(Records, "finish", interrupted)
        assert main(words("--out", str(out))) == 130
    assert f"go on with: nsrl continual --resume {out}" in capsys.readouterr().err
    assert main(["continual", "--resume", str(out), "--seed", "4"]) == 2
    assert "leave the other options out" in capsys.readouterr().err
    assert main(["continual", "--resume", str(out), "--progress", "false"]) == 0
    assert (out / "metrics.json").is_file()


@pytest.mark.parametrize(
    ("more", "said"),
    [
        (("--strategy.nme", "x"), "did you mean --strategy.name?"),
        (("--strategy.name", "gmp"), "gmp"),
        (("--training.epochs", "0"), "training.epochs must be positive, not 0"),
        (("--benchmark.name", "split_cifar100", "--benchmark.data", "nowhere"), "cifar-100-binary.tar.gz"),
        (("--benchmark.order", "-1"), "benchmark.order"),
    ],
)
def test_bad_input_is_one_sentence_and_writes_nothing(more, said, elsewhere, capsys):
    assert main(words(*more)) == 2
    err = capsys.readouterr().err
    assert said in err and err.count("\n") == 1
    assert not list(elsewhere.iterdir())


@pytest.mark.slow
def test_the_benchmark_runs_resumes_and_reports(tmp_path, capsys):
    arguments = [
        "bench",
        "continual",
        "--only",
        "split_digits,naive,joint",
        "--quick",
        "--workers",
        "1",
        "--configs",
        str(CONFIGS),
        "--out",
        str(tmp_path / "runs"),
        "--reference",
        str(tmp_path),
    ]
    assert main(arguments) == 0
    text = capsys.readouterr().out
    assert "split digits, 1 runs" in text and "joint" in text
    results = tmp_path / "continual"
    content = json.loads((results / "continual.json").read_text())
    assert [row["strategy"] for row in content["rows"]] == ["naive", "joint"] and content["failures"] == {}
    assert (results / "continual.png").stat().st_size > 1000
    page = (results / "continual.md").read_text()
    assert "| joint |" in page and str(tmp_path) not in page
    stored = sorted((tmp_path / "runs" / "split_digits").glob("*.json"))
    times = [path.stat().st_mtime_ns for path in stored]
    assert len(stored) == 2 and main(arguments) == 0
    assert [path.stat().st_mtime_ns for path in stored] == times


def test_unknown_parts_of_the_benchmark_are_told(capsys, tmp_path):
    assert main(["bench", "continual", "--only", "nothing", "--configs", str(CONFIGS), "--out", str(tmp_path)]) == 2
    assert "there is no benchmark or strategy 'nothing'" in capsys.readouterr().err
