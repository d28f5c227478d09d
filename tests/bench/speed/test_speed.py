"""The speed benchmark: every method computes the same thing, what is missing is said, and results are kept."""

from __future__ import annotations

import json
import subprocess
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from torch.func import functional_call, jacrev

from nsrl.bench.speed import benchmark, worker
from nsrl.bench.speed import clock as device
from nsrl.bench.speed.benchmark import Settings, measure_speed, plan_rounds, variant_limit
from nsrl.bench.speed.cases import CASES, Problem
from nsrl.bench.speed.clock import PeakMemory, copy_bandwidth, error_to_float64, relative_error
from nsrl.bench.speed.methods import METHODS, orthonormal_rows, relative_residual
from nsrl.bench.speed.report import check_targets, fastest, speed_tables
from nsrl.cli.main import main
from nsrl.errors import NsrlError

GRAMS = [name for name, case in CASES.items() if case.goal == "gram"]
QUICK = Settings(quick=True, threads=1)


def dense_jacobian(problem: Problem) -> torch.Tensor:
    """(k, P) in float64, by torch.func."""
    values = {name: parameter.detach().double() for name, parameter in problem.model.named_parameters()}
    inputs = problem.inputs.double()
    parts = jacrev(lambda parameters: functional_call(problem.model, parameters, (inputs,)))(values)
    return torch.cat([part.flatten(2) for part in parts.values()], 2).flatten(0, 1)


@pytest.fixture(scope="module", params=GRAMS)
def gram_case(request) -> tuple[str, Problem, torch.Tensor]:
    problem = CASES[request.param].problem(quick=True)
    dense = dense_jacobian(problem)
    return request.param, problem, dense @ dense.T


@pytest.mark.parametrize("name", [name for name, method in METHODS.items() if method.goal == "gram"])
def test_every_method_computes_the_same_gram_matrix(gram_case, name: str) -> None:
    case, problem, expected = gram_case
    method = METHODS[name]
    if not method.installed:
        pytest.skip(f"{method.library} is not installed")
    if method.library == "nngeometry" and case == "gram_transformer":
        pytest.skip("nngeometry has no rule for linear layers and norms at several positions")
    run = method.prepare(problem)
    before = {key: value.clone() for key, value in problem.model.state_dict().items()}
    assert relative_error(run(), expected) < 1e-5
    assert relative_error(run(), expected) < 1e-5  # the second run is no different from the first
    assert all(torch.equal(value, before[key]) for key, value in problem.model.state_dict().items())
    assert not any(module._forward_hooks for module in problem.model.modules())


def test_an_error_of_ours_would_be_seen() -> None:
    problem = CASES["gram_mlp"].problem(quick=True)
    gram = METHODS["nsrl"].prepare(problem)()
    assert error_to_float64(problem, gram) < 1e-6
    gram[0, 3] += 1e-3 * gram.abs().max()
    assert 9e-4 < error_to_float64(problem, gram) < 2e-3
    assert relative_error(gram, gram[:3, :3]) == float("inf")


@pytest.mark.parametrize("name", [name for name, method in METHODS.items() if method.goal == "projection"])
@pytest.mark.parametrize("case", ["projection", "projection_wide"])
def test_every_projection_is_the_null_space_of_the_jacobian(case: str, name: str) -> None:
    problem = CASES[case].problem(quick=True)
    dense = dense_jacobian(problem)
    proposal = problem.proposal.double()
    expected = proposal - torch.linalg.pinv(dense) @ (dense @ proposal)
    found = METHODS[name].prepare(problem)()
    assert relative_error(found, expected) < 1e-4
    norm = torch.linalg.matrix_norm(dense, 2) * found.double().norm()
    residual = relative_residual(problem, found)
    assert residual == pytest.approx(float((dense @ found.double()).norm() / norm), rel=1e-3)
    assert residual < 1e-6 < 1e-3 < relative_residual(problem, problem.proposal)


def test_the_dense_basis_is_orthonormal_and_spans_the_rows() -> None:
    matrix = torch.randn(12, 50) * torch.logspace(0, -3, 12).unsqueeze(1)
    basis = orthonormal_rows(matrix.clone(), chunk=7)
    torch.testing.assert_close(basis @ basis.T, torch.eye(12), atol=1e-6, rtol=0)
    torch.testing.assert_close(matrix @ basis.T @ basis, matrix, atol=1e-5, rtol=1e-4)


def test_peak_memory_counts_what_comes_after_it_and_is_freed_again() -> None:
    torch.ones(64 << 18)  # 64 MB, before
    peak = PeakMemory("cpu")
    assert peak.megabytes() < 32
    torch.ones(96 << 18)
    assert 80 < peak.megabytes() < 128


def test_the_bandwidth_counts_reading_and_writing(monkeypatch) -> None:
    """On a clock that shows 3, 1 and 2 seconds for the three copies; the best one counts."""
    clock = iter([0.0, 3.0, 10.0, 11.0, 20.0, 22.0])
    monkeypatch.setattr(device, "perf_counter", lambda: next(clock))
    assert copy_bandwidth("cpu", megabytes=8, repeats=2) == 2 * 8 * 2**20


def test_slow_methods_run_less_often_and_slow_variants_not_again() -> None:
    def entry(library: str, seconds: float | None) -> dict:
        return {"library": library, "status": "first run only" if seconds else "failed"} | (
            {"first_seconds": seconds} if seconds else {}
        )

    found = {
        "nsrl": entry("nsrl", 0.01),
        "a": entry("A", 3.0),
        "a slower": entry("A", 6.1),
        "b": entry("B", 12.0),
        "b alike": entry("B", 20.0),
        "c": entry("C", None),
    }
    rounds = plan_rounds(found)
    assert list(rounds) == ["nsrl", "a", "b", "b alike"]
    assert rounds["nsrl"] > rounds["a"] >= 5 > rounds["b"] == rounds["b alike"] >= 2
    assert variant_limit(found, "B") == 24 and variant_limit(found, "A") == 10
    assert variant_limit(found, "C") == variant_limit({}, "A") == benchmark.LIMIT


@pytest.fixture
def tasks(monkeypatch) -> list[dict]:
    """Workers answer from within this process; the tasks that they were given."""
    given: list[dict] = []

    def answer(task: dict, threads: int) -> dict | worker.Failure:
        given.append(task)
        if task["kind"] == "bandwidth":
            return {"bytes_per_second": 1e10}
        try:
            # No limit: SIGALRM would end the tests.
            return json.loads(json.dumps(worker.do_task(task | ({"limit": 0} if "limit" in task else {}))))
        except RuntimeError as error:
            return worker.Failure("failed", str(error))

    monkeypatch.setattr(benchmark, "ask_worker", answer)
    monkeypatch.setattr(benchmark, "_devices", lambda: ("cpu",))
    return given


def without(monkeypatch, *modules: str) -> None:
    """As if these were not installed."""
    from importlib.util import find_spec

    monkeypatch.setattr("nsrl.bench.speed.methods.find_spec", lambda name: None if name in modules else find_spec(name))


@pytest.mark.slow
def test_results_say_what_was_measured_with_what_and_are_measured_once(tmp_path: Path, tasks, monkeypatch) -> None:
    without(monkeypatch, "torchjd", "nngeometry", "curvlinops")
    said: list[str] = []
    first = measure_speed(tmp_path, QUICK, only=["gram_mlp"], on_progress=said.append)
    case = first["cases"]["gram_mlp"]
    assert (case["rows"], case["parameters"]) == (80, 784 * 32 + 32 + 32 * 32 + 32 + 32 * 10 + 10)
    assert first["settings"] == {"quick": True, "threads": 1}
    assert {"cpu", "cpus", "packages"} <= set(first["environment"]) and "torch" in first["environment"]["packages"]
    ours, contraction = case["methods"]["nsrl"], case["methods"]["torch.func contraction"]
    for entry in (ours, contraction):
        assert entry["status"] == "timed" and len(entry["seconds"]) >= 5 and entry["peak_mb"] >= 0.0
        assert entry["minimum"] <= entry["median"] <= entry["maximum"] and entry["error"] < 1e-5
    assert ours["error_to_float64"] < 1e-6
    assert case["methods"]["TorchJD autogram"]["status"] == "not installed"
    assert "pip install nsrl[rivals]" in case["methods"]["TorchJD autogram"]["note"]
    assert len(tasks) == 5 and tasks[-1]["kind"] == "in turn" and "TorchJD autogram" not in tasks[-1]["rounds"]
    assert "gram_mlp on cpu: first run of nsrl" in said and not any("TorchJD" in text for text in said[-1:])

    # the second call adds a case and keeps the first
    second = measure_speed(tmp_path, QUICK, only=["projection"])
    assert (
        second["cases"]["gram_mlp"] == case and second["cases"]["projection"]["methods"]["dense Q"]["residual"] < 1e-6
    )
    bound = second["cases"]["projection"]["bandwidth"]
    size = second["cases"]["projection"]["rows"] * second["cases"]["projection"]["parameters"]
    assert bound["bound_seconds"] == pytest.approx(8 * size / 1e10)
    done = len(tasks)
    assert measure_speed(tmp_path, QUICK, only=["gram_mlp", "projection"])["cases"] == second["cases"]
    assert len(tasks) == done
    measure_speed(tmp_path, QUICK, only=["projection"], again=True)
    assert len(tasks) == done + 5
    # other conditions, other results
    assert measure_speed(tmp_path, replace(QUICK, threads=2), only=["projection"])["cases"].keys() == {"projection"}
    assert len(tasks) == done + 10


def test_what_does_not_fit_is_not_run(tmp_path: Path, tasks, monkeypatch) -> None:
    without(monkeypatch, "torchjd", "nngeometry", "curvlinops")
    monkeypatch.setattr(benchmark, "free_bytes", lambda device: 1e5)
    case = measure_speed(tmp_path, QUICK, only=["gram_mlp"])["cases"]["gram_mlp"]
    assert case["methods"]["torch.func contraction"]["status"] == "too big"
    assert [task.get("method") for task in tasks] == ["nsrl", "nsrl float32", None]
    assert speed_tables({"cases": {"gram_mlp": case}, "targets": []})[0].rows[2][-1] == "too big"


def test_a_case_that_ours_does_not_finish_is_an_error(tmp_path: Path, monkeypatch) -> None:
    monkeypatch.setattr(benchmark, "ask_worker", lambda *_: worker.Failure("failed", "broken"))
    with pytest.raises(NsrlError, match="gram_mlp: nsrl came to no result: broken"):
        measure_speed(tmp_path, QUICK, only=["gram_mlp"])
    with pytest.raises(NsrlError, match=r"'gram_mpl'.*known: gram_mlp, .*scaling"):
        measure_speed(tmp_path, QUICK, only=["gram_mpl"])


@pytest.mark.parametrize(
    ("code", "status", "note"),
    [(-14, "too slow", "over 7 s"), (-9, "out of memory", "memory"), (1, "failed", "ValueError: no")],
)
def test_a_worker_that_fails_says_why(monkeypatch, code: int, status: str, note: str) -> None:
    done = subprocess.CompletedProcess([], code, stdout="", stderr="Traceback\nValueError: no\n\n")
    monkeypatch.setattr(subprocess, "run", lambda *_, **__: done)
    failure = worker.ask_worker({"kind": "first run", "limit": 7}, 1)
    assert isinstance(failure, worker.Failure) and failure.status == status and note in failure.note


def test_a_worker_is_a_process_with_its_own_threads_and_limit() -> None:
    task = {"kind": "first run", "case": "gram_mlp", "method": "nsrl", "quick": True, "device": "cpu", "limit": 60}
    answer = worker.ask_worker(task, 1)
    assert isinstance(answer, dict) and answer["first_seconds"] > 0 and answer["peak_mb"] < 50


def timed(library: str, median: float, peak: float, status: str = "timed", **more: float) -> dict:
    return {"library": library, "status": status, "median": median, "peak_mb": peak} | more


def test_targets_take_the_best_of_a_library_and_no_wrong_rival() -> None:
    mlp = {
        "device": "cpu",
        "ours": "nsrl",
        "methods": {
            "nsrl": timed("nsrl", 0.01, 20.0),
            "slow variant": timed("torch.func", 5.0, 900.0),
            "fast variant": timed("torch.func", 1.5, 80.0),
            "wrong": timed("X", 1e-9, 1.0, "wrong"),
            "TorchJD autogram": {"library": "TorchJD", "status": "not installed", "note": "-"},
        },
    }
    projection = {
        "device": "cuda",
        "ours": "nsrl null",
        "bandwidth": {"bound_over_factored": 12.0},
        "methods": {
            "nsrl null": timed("nsrl", 0.01, 20.0, residual=2e-6),
            "nsrl project": timed("nsrl", 0.005, 20.0, residual=2e-9),
            "dense Q": timed("dense", 0.2, 800.0, residual=1e-8),
        },
    }
    cases = {"gram_mlp": mlp, "gram_cnn": mlp, "projection_cuda": projection, "projection_wide_cuda": projection}
    targets = check_targets(cases)
    assert fastest(mlp) == "fast variant" and fastest(mlp, "TorchJD") is None
    assert [target.reached for target in targets] == [
        pytest.approx(150.0),
        pytest.approx(4.0),
        None,
        None,
        pytest.approx(150.0),
        pytest.approx(20.0),
        2e-6,
        2e-6,
        12.0,
    ]
    assert [target.met for target in targets] == [True, False, None, None, True, True, False, False, True]
    assert "CUDA" in targets[-1].claim


def test_the_command_prints_tables_and_keeps_the_reference_clean(tmp_path: Path, tasks, monkeypatch, capsys) -> None:
    without(monkeypatch, "torchjd", "nngeometry", "curvlinops")
    monkeypatch.chdir(tmp_path)
    assert main(["bench", "speed", "--quick", "--only", "projection", "--threads", "1", "--out", "here"]) == 0
    printed = capsys.readouterr()
    assert "dense Q" in printed.out and "residual" in printed.out and "small sizes" in printed.out
    assert "Targets" not in printed.out and "first run of dense Q" in printed.err
    assert [path.name for path in tmp_path.iterdir()] == ["here"]
    written = (tmp_path / "here" / "results" / "speed.json").read_text()
    assert json.loads(written)["cases"].keys() == {"projection"} and str(tmp_path) not in written


def test_bad_options_are_refused(capsys) -> None:
    assert main(["bench", "speed", "--threads", "0"]) == 2
    assert "--threads must be at least 1" in capsys.readouterr().err
    assert main(["bench", "cartpole_swapped", "--again"]) == 2
    assert "for nsrl bench speed" in capsys.readouterr().err
