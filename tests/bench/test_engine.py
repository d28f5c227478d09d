"""Cells give the same lines whatever engine carries them out, also where a process of it is killed on the way."""

import os
import signal
from concurrent.futures import ThreadPoolExecutor, as_completed
from dataclasses import dataclass
from importlib.util import find_spec
from pathlib import Path

import pytest
import torch

from nsrl.bench import ray_pool
from nsrl.bench.engine import ENGINES, check_engine, open_workers
from nsrl.bench.registry import BENCHMARKS, Options, run_benchmark
from nsrl.bench.studies.lines import read_runs, run_missing
from nsrl.bench.suites import jobs as job_file
from nsrl.bench.suites.jobs import Status
from nsrl.errors import NsrlError
from nsrl.files import read_lines
from nsrl.runs.lock import LOCK
from tests.bench.suites.builders import jobs, long

needs_ray = pytest.mark.skipif(find_spec("ray") is None, reason="Ray is not installed: nsrl[cluster]")


@dataclass(frozen=True)
class Cell:
    """A run whose process is killed while it is made for the first time, where that is asked for."""

    name: str
    number: int
    deadly: bool = False


def run_cell(cell: Cell, folder: Path) -> dict[str, object]:
    if cell.number < 0:
        raise NsrlError(f"{cell.name} is below zero")
    if cell.deadly and not (folder / cell.name).exists():
        (folder / cell.name).touch()
        os.kill(os.getpid(), signal.SIGKILL)
    values = torch.arange(4.0).double() + cell.number
    return {"cell": cell.name, "norm": float(values.norm()), "threads": torch.get_num_threads(), "here": os.getcwd()}


def run(engine: str, cells: list[Cell], folder: Path) -> dict[str, str]:
    def beside(waiting):
        with open_workers(engine, min(2, len(waiting)), folder) as pool:
            futures = {pool.submit(run_cell, cell, folder): cell for cell in waiting}
            for future in as_completed(futures):
                yield futures[future], future.exception() or future.result()

    return run_missing(cells, folder.glob("*.jsonl"), lambda _: folder / "runs.jsonl", beside)


def lines(folder: Path) -> list[dict[str, object]]:
    return sorted(read_runs(folder / "runs.jsonl"), key=lambda row: row["cell"])


@needs_ray
def test_ray_gives_the_lines_of_processes_though_a_worker_is_killed(tmp_path, monkeypatch):
    monkeypatch.setenv("RAY_ADDRESS", "local")
    local, cluster = tmp_path / "local", tmp_path / "cluster"
    local.mkdir(), cluster.mkdir()
    cells = [Cell(f"cell {number}", number) for number in range(-1, 4)]
    failures = run("local", cells, local)
    deadly = [Cell(cell.name, cell.number, deadly=cell.number == 2) for cell in cells]
    try:
        failed = run("ray", deadly, cluster)
    except NsrlError as error:
        if "Ray cannot be started on this machine" in str(error):
            pytest.skip(str(error))
        raise
    assert failed == failures == {"cell -1": "cell -1 is below zero"}
    assert (cluster / "cell 2").exists()  # it was killed, and made again
    assert lines(cluster) == lines(local)
    assert len(lines(cluster)) == 4
    # what is there is not run again: no cluster is started for what is left, which is nothing
    monkeypatch.setattr(ray_pool, "_connect", lambda _: pytest.fail("nothing is left to be run"))
    assert run("ray", [cell for cell in deadly if cell.number >= 0], cluster) == {}
    assert len(lines(cluster)) == 4
    assert not list(cluster.glob(".cluster-*"))


@needs_ray
def test_a_cluster_that_is_not_there_is_told_of(tmp_path, monkeypatch):
    monkeypatch.setenv("RAY_ADDRESS", "no address")
    with (
        pytest.raises(NsrlError, match="there is no Ray cluster at RAY_ADDRESS=no address"),
        open_workers("ray", 1, tmp_path),
    ):
        pass


def test_without_ray_one_sentence_says_what_to_install(monkeypatch, tmp_path):
    monkeypatch.setattr(ray_pool, "find_spec", lambda _: None)
    with pytest.raises(NsrlError, match=r"^--engine ray needs the package ray; install .* nsrl\[cluster\]$"):
        run_benchmark("frontier", Options(out=tmp_path, quick=True, engine="ray"), None)
    assert not list(tmp_path.iterdir())


def test_only_known_engines_are_taken():
    assert ENGINES == ("local", "ray")
    with pytest.raises(NsrlError, match="--engine must be one of local, ray, not 'slurm'"):
        check_engine("slurm")


@pytest.mark.parametrize("name", ["speed", "overhead", "trpo"])
def test_what_measures_time_stays_on_this_machine(name):
    assert name in BENCHMARKS
    with pytest.raises(NsrlError, match=f"--engine is for .* not for {name}"):
        run_benchmark(name, Options(engine="ray"), None)


class TestSurroundings:
    """What a task finds on a machine of the cluster."""

    def test_relative_paths_begin_where_the_driver_is(self, tmp_path, monkeypatch):
        monkeypatch.chdir(tmp_path)
        (tmp_path / "marker").touch()
        inside = tmp_path / "inside"
        inside.mkdir()
        monkeypatch.setenv("TOLD", "here")
        version = ray_pool.version("nsrl")
        ray_pool.Surroundings(str(inside), str(tmp_path / "marker"), {"TOLD": "driver"}, version).enter()
        assert Path.cwd() == inside and os.environ["TOLD"] == "driver"

    def test_files_that_a_machine_does_not_see_are_told_of(self, tmp_path):
        nowhere = ray_pool.Surroundings(str(tmp_path), str(tmp_path / "marker"), {}, ray_pool.version("nsrl"))
        with pytest.raises(NsrlError, match=r"does not see .*; start it in, and give it as --out, a folder that all"):
            nowhere.enter()

    def test_another_version_is_told_of(self, tmp_path):
        with pytest.raises(NsrlError, match=r"but the benchmark is nsrl 9\.9's"):
            ray_pool.Surroundings(str(tmp_path), str(tmp_path), {}, "9.9").enter()

    def test_what_a_task_raises_comes_back_as_it_is(self, tmp_path, monkeypatch):
        monkeypatch.chdir(tmp_path)
        (tmp_path / "marker").touch()
        here = ray_pool.Surroundings(str(tmp_path), str(tmp_path / "marker"), {}, ray_pool.version("nsrl"))
        call = ray_pool.pickle.dumps((run_cell, (Cell("a", -1), tmp_path), {}))
        threads = torch.get_num_threads()
        answer, error = ray_pool.pickle.loads(ray_pool.carry_out(here, call))
        torch.set_num_threads(threads)
        assert answer is None and isinstance(error, NsrlError) and str(error) == "a is below zero"


class Interruptible(ThreadPoolExecutor):
    """A pool that remembers that it was interrupted."""

    interrupted = False

    def interrupt(self) -> None:
        self.interrupted = True


class TestJobsElsewhere:
    """A job that a pool carries out is asked what a process is asked."""

    def test_it_has_the_return_code_of_its_process(self, monkeypatch):
        monkeypatch.setattr(job_file, "carry_out", lambda job: 3)
        with Interruptible(1) as pool:
            job = job_file.Elsewhere(pool, None)
            job.wait(10.0)
            assert job.poll() == job.returncode == 3 and job.reason is None
            job.send_signal(signal.SIGINT)
            assert pool.interrupted

    def test_what_kept_it_from_running_is_its_reason(self, monkeypatch):
        def lost(job):
            raise NsrlError("the machine is gone")

        monkeypatch.setattr(job_file, "carry_out", lost)
        with Interruptible(1) as pool:
            job = job_file.Elsewhere(pool, None)
            job.wait(10.0)
            assert job.poll() == 1 and job.reason == "the machine is gone"


def parent_of(number: int) -> int:
    with open(f"/proc/{number}/stat") as file:
        return int(file.read().rpartition(")")[2].split()[1])


@needs_ray
@pytest.mark.slow
@pytest.mark.skipif(not Path("/proc/self/stat").exists(), reason="looks processes up in /proc")
def test_a_job_whose_worker_is_killed_goes_on_from_its_checkpoint(tmp_path, monkeypatch):
    monkeypatch.setenv("RAY_ADDRESS", "local")
    [job] = [long(job) for job in jobs(tmp_path, 3)]
    killed = []

    def kill(status: Status) -> None:
        if not killed and status.running and status.running[0][1] > 0.01:
            run = int((job.folder / LOCK).read_text())  # the lock names the job's own process
            killed.append(parent_of(run))
            os.kill(killed[0], signal.SIGKILL)

    [metrics] = job_file.run_jobs([job], engine="ray", on_status=kill, poll=0.05)
    assert killed and metrics["timesteps"] == 3200
    steps = [row["timesteps"] for row in read_lines(job.run.history)]
    assert steps == sorted(set(steps))  # nothing was written twice
    assert not (tmp_path / "3.yaml").exists() and not (tmp_path / "3.log").exists()
