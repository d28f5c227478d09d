import json
import os
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace

import pytest

from nsrl.bench.suites import worker
from nsrl.bench.suites.jobs import Job, Status, _status, gather, run_jobs
from nsrl.errors import NsrlError
from nsrl.runs.config import FinetuneConfig
from tests.bench.suites.builders import TINY, jobs, long


@pytest.fixture(scope="module")
def done(tmp_path_factory) -> tuple[Path, list, list[Status]]:
    """Two jobs, run for real."""
    root, seen = tmp_path_factory.mktemp("jobs"), []
    metrics = run_jobs(jobs(root, 0, 1), on_status=seen.append, poll=0.1)
    return root, metrics, seen


def test_jobs_run_as_processes_and_give_their_metrics(done):
    root, metrics, seen = done
    assert [entry["seed"] for entry in metrics] == [0, 1]
    assert sorted(path.name for path in root.iterdir()) == ["0", "1"]
    assert seen[-1].done and len(seen[-1].done) == 2 and not seen[-1].running and seen[-1].remaining in (None, 0.0)
    assert max(len(status.running) for status in seen) == 2


def test_finished_jobs_are_not_run_again(done):
    root, metrics, _ = done
    stamp = (root / "0" / "metrics.json").stat().st_mtime_ns
    assert run_jobs(jobs(root, 0, 1)) == metrics
    assert (root / "0" / "metrics.json").stat().st_mtime_ns == stamp


def test_a_folder_with_another_configuration_is_refused(done):
    root, _, _ = done
    [job] = jobs(root, 0)
    for changes, sentence in (
        ({"total_timesteps": 64}, "whose total_timesteps is 128, not 64"),
        ({"ppo": replace(TINY.ppo, n_epochs=2)}, r"whose ppo\.n_epochs is 1, not 2"),
    ):
        with pytest.raises(NsrlError, match=sentence):
            run_jobs([replace(job, config=replace(job.config, **changes))])


def test_results_are_gathered_with_their_environment_and_without_paths(done, tmp_path):
    root, metrics, _ = done
    content = gather(jobs(root, 0, 1), tmp_path / "all.json", command="nsrl bench tiny")
    assert json.loads((tmp_path / "all.json").read_text()) == content
    assert [entry["metrics"] for entry in content["results"]] == metrics
    assert {"python", "cpu", "cpus", "packages"} <= content["environment"].keys()
    assert "torch" in content["environment"]["packages"]
    text = json.dumps({**content, "results": [entry["config"] for entry in content["results"]]})
    assert str(root) not in text and os.uname().nodename not in content["environment"].values()


def test_a_failing_job_is_told_after_the_others_have_run(done, tmp_path):
    root, _, _ = done
    config = FinetuneConfig(agent=str(tmp_path / "nowhere.zip"), pair="cartpole_swapped")
    bad = Job("bad", "finetune", config, tmp_path / "bad")
    with pytest.raises(NsrlError, match=r"1 of 2 runs failed \(bad: no agent at .*nowhere\.zip.* \[.*bad\.log\]\)"):
        run_jobs([bad, *jobs(root, 0)])
    assert not (tmp_path / "bad").exists() and (tmp_path / "bad.log").is_file()


def test_two_jobs_cannot_share_a_folder(tmp_path):
    with pytest.raises(NsrlError, match="same name or folder"):
        run_jobs([*jobs(tmp_path, 0), *jobs(tmp_path, 0)])


@pytest.mark.slow
def test_an_interruption_stops_the_runs_and_a_second_call_goes_on(tmp_path):
    [job] = jobs(tmp_path, 3)

    def interrupt(status: Status) -> None:
        if status.running and status.running[0][1] > 0.01:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        run_jobs([long(job)], on_status=interrupt, poll=0.05)
    assert (tmp_path / "3" / "checkpoint.zip").is_file() and not (tmp_path / "3" / "metrics.json").exists()
    assert not (tmp_path / "3.yaml").exists()
    assert run_jobs([long(job)])[0]["timesteps"] == 3200


def test_the_time_left_follows_from_the_work_done(tmp_path, monkeypatch):
    monkeypatch.setattr("nsrl.bench.suites.jobs.time", SimpleNamespace(monotonic=lambda: 160.0))

    class Running:
        def __init__(self, job, share):
            self.job, self.share, self.initial = job, share, 0.0

        def progress(self):
            return self.share, {}

    todo = jobs(tmp_path, 0, 1, 2, 3)
    # one done, two half way, one waiting: half of the work in 60 s leaves 60 s
    running = [Running(todo[1], 0.5), Running(todo[2], 0.5)]
    status = _status(todo, ["seed 0"], running, {}, 4.0, 1, 100.0)
    assert (status.seconds, status.remaining) == (60.0, 60.0)


def test_the_worker_refuses_in_one_sentence(tmp_path, capsys):
    (tmp_path / "c.yaml").write_text("total_timestep: 1\n")
    assert worker.main(["pretrain", str(tmp_path / "c.yaml"), str(tmp_path / "out")]) == 2
    error = capsys.readouterr().err
    assert "did you mean total_timesteps?" in error and error.count("\n") == 1
    assert not (tmp_path / "out").exists()
