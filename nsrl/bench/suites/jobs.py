"""Many runs as separate processes, a few at a time: seeds x methods x tasks, resumable, gathered into one JSON."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import Executor, Future
from concurrent.futures import wait as futures_done
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

from nsrl.bench.engine import open_workers
from nsrl.bench.lifeline import GRACE
from nsrl.errors import NsrlError
from nsrl.files import ELSEWHERE, read_lines, unwritable, write_json, write_text
from nsrl.runs.config import FinetuneConfig, PretrainConfig
from nsrl.runs.folder import RunFolder
from nsrl.runs.machine import describe_environment
from nsrl.runs.sequences.config import SequenceConfig
from nsrl.runs.settings import flat, plain, to_yaml

TERMINATION = tuple(getattr(signal, name) for name in ("SIGTERM", "SIGHUP") if hasattr(signal, name))
CONFIGS: dict[str, type] = {"pretrain": PretrainConfig, "finetune": FinetuneConfig, "sequence": SequenceConfig}


@dataclass(frozen=True)
class Job:
    """One run of a command in its own folder.

    Attributes:
        name: unique among the jobs; names the row in tables.
        command: "pretrain", "finetune" or "sequence".
        config: its configuration; `out` is overridden by `folder`.
        folder: where it goes; a finished run there is taken as it is, an unfinished one is continued.
    """

    name: str
    command: Literal["pretrain", "finetune", "sequence"]
    config: PretrainConfig | FinetuneConfig | SequenceConfig
    folder: Path

    @property
    def run(self) -> RunFolder:
        """The job's folder."""
        return RunFolder(self.folder)

    def check(self) -> None:
        """Raise NsrlError if the folder holds a run with another configuration, which would pass for this one."""
        if self.run.config.is_file():
            wanted, found = flat(self.config), flat(self.run.read_config(CONFIGS[self.command]))
            for key in wanted:
                if key != "out" and wanted[key] != found[key]:
                    raise NsrlError(
                        f"{self.folder} holds a run whose {key} is {found[key]}, not {wanted[key]}; "
                        "remove that folder or choose another output folder"
                    )


@dataclass(frozen=True)
class Status:
    """How far the jobs are.

    Attributes:
        total: jobs altogether.
        done: names of the finished ones.
        running: for each running job its name, the share of its steps that is done, and its latest measurements.
        failed: names of those that ended with an error.
        seconds: since the start.
        remaining: seconds expected until the end, None while nothing is known.
    """

    total: int
    done: list[str]
    running: list[tuple[str, float, dict[str, Any]]]
    failed: list[str]
    seconds: float
    remaining: float | None


class Elsewhere:
    """A job that a pool carries out, with what is asked of a process here.

    Attributes:
        returncode: as a process's; None while it runs.
        reason: what kept it from running at all, None where nothing did.
    """

    stdin = None

    def __init__(self, pool: Executor, job: Job):
        self.returncode: int | None = None
        self.reason: str | None = None
        self._pool = pool
        self._future: Future[int] = pool.submit(carry_out, job)

    def poll(self) -> int | None:
        """The return code where it has ended."""
        if self.returncode is None and self._future.done():
            error = self._future.exception()
            self.reason = None if error is None else str(error)
            self.returncode = 1 if error is not None else self._future.result()
        return self.returncode

    def send_signal(self, _: int) -> None:
        """Have it write its checkpoint and end; the other jobs of its pool do so, too."""
        interrupt = getattr(self._pool, "interrupt", None)
        if interrupt is not None:
            interrupt()

    def wait(self, timeout: float | None = None) -> None:
        """Until it has ended.

        Raises:
            TimeoutExpired: it has not.
        """
        done, _ = futures_done([self._future], timeout)
        if not done:
            raise subprocess.TimeoutExpired("a job elsewhere", timeout or 0.0)

    def kill(self) -> None:
        """Nothing: it ends with its pool."""


@dataclass
class _Process:
    job: Job
    popen: subprocess.Popen[bytes] | Elsewhere
    log: Path
    config: Path
    start: float = field(default_factory=time.monotonic)
    initial: float | None = None

    def close(self) -> None:
        """Let go of what belongs to a process that has ended."""
        if self.popen.stdin is not None:
            self.popen.stdin.close()
        self.config.unlink(missing_ok=True)

    def progress(self) -> tuple[float, dict[str, Any]]:
        rows = read_lines(self.job.run.history)
        latest: dict[str, Any] = {}
        for row in rows:
            latest |= row
        share = min(latest.get("timesteps", 0) / self.job.config.total_timesteps, 1.0)
        self.initial = share if self.initial is None else self.initial
        return share, latest


def run_jobs(
    jobs: Sequence[Job],
    *,
    workers: int = 2,
    engine: str = "local",
    on_status: Callable[[Status], Any] | None = None,
    poll: float = 0.5,
) -> list[dict[str, Any]]:
    """Run jobs as separate processes, one torch thread each.

    A job whose metrics.json exists is skipped, one that was interrupted is resumed; so calling this again after an
    interruption goes on where it stopped. Ctrl-C lets the running jobs write their checkpoints first, and so does
    whatever else ends this process: its jobs end with it.

    Args:
        jobs: what to run; names and folders are unique.
        workers: processes at a time.
        engine: where they run (`nsrl.bench.engine`); a process elsewhere that is lost is begun again, and goes on.
        on_status: called about every `poll` seconds.
        poll: seconds between looks.

    Returns:
        The content of each job's metrics.json, in the order of `jobs`.

    Raises:
        NsrlError: a folder holds another run; or jobs failed, after all others have run (names their logs).
    """
    if len({job.name for job in jobs}) < len(jobs) or len({job.folder for job in jobs}) < len(jobs):
        raise NsrlError("two jobs have the same name or folder; give each its own")
    for job in jobs:
        job.check()
    start = time.monotonic()
    done = [job.name for job in jobs if job.run.finished]
    waiting = [job for job in jobs if not job.run.finished]
    running: list[_Process] = []
    failed: dict[str, str] = {}
    work = float(len(waiting))
    try:
        # The children are in sessions of their own: unless told, they would outlive us.
        with _termination_raised(), _elsewhere(engine, workers, waiting) as pool:
            while waiting or running:
                while waiting and len(running) < workers:
                    running.append(_start(waiting.pop(0)) if pool is None else _submit(waiting.pop(0), pool))
                time.sleep(poll)
                for process in [process for process in running if process.popen.poll() is not None]:
                    running.remove(process)
                    _finish(process, done, failed)
                if on_status is not None:
                    on_status(_status(jobs, done, running, failed, work, len(waiting), start))
    except BaseException:
        _stop(running)
        raise
    if failed:
        told = "; ".join(f"{name}: {reason}" for name, reason in failed.items())
        raise NsrlError(f"{len(failed)} of {len(jobs)} runs failed ({told})")
    return [job.run.read_metrics() for job in jobs]


def _elsewhere(engine: str, workers: int, waiting: Sequence[Job]) -> AbstractContextManager[Executor | None]:
    if engine == "local":
        return nullcontext()
    shared = Path(os.path.commonpath([job.folder.absolute().parent for job in waiting])) if waiting else Path()
    return open_workers(engine, min(workers, len(waiting)), shared)


@contextmanager
def _termination_raised() -> Iterator[None]:
    """Within the block SIGTERM, and the end of the terminal, end this process through an exception, as Ctrl-C does."""

    def terminate(number: int, _: Any) -> None:
        raise SystemExit(128 + number)

    if threading.current_thread() is not threading.main_thread():
        yield
        return
    numbers = [number for number in TERMINATION if signal.getsignal(number) != signal.SIG_IGN]  # as nohup sets it
    previous = {number: signal.signal(number, terminate) for number in numbers}
    try:
        yield
    finally:
        for number, handler in previous.items():
            signal.signal(number, signal.SIG_DFL if handler is None else handler)


def gather(jobs: Sequence[Job], path: Path, **extra: Any) -> dict[str, Any]:
    """Write the results of finished jobs to one JSON file, with the environment that they were measured in.

    Args:
        jobs: finished jobs.
        path: the file.
        extra: further entries, as a summary or the command that made it.
    """
    results = []
    for job in jobs:
        metrics = job.run.read_metrics()
        results.append({"name": job.name, "config": _portable(plain(job.config)), "metrics": metrics})
    content = {"environment": describe_environment(), **extra, "results": results}
    write_json(path, content)
    return content


def _portable(config: dict[str, Any]) -> dict[str, Any]:
    """Without the paths, which mean nothing on another machine."""
    return {key: value for key, value in config.items() if key not in ("agent", "buffer", "out", "cache")}


def carry_out(job: Job) -> int:
    """In a process of a pool: start the job's own, and wait for it; that one ends with this one.

    Returns:
        Its return code.
    """
    process = _start(job)
    try:
        while (code := process.popen.poll()) is None:
            time.sleep(0.1)
        return code
    except BaseException:
        _stop([process])
        raise
    finally:
        process.close()


def _files(job: Job) -> tuple[Path, Path]:
    return job.folder.with_name(f"{job.folder.name}.log"), job.folder.with_name(f"{job.folder.name}.yaml")


def _submit(job: Job, pool: Executor) -> _Process:
    log, config = _files(job)
    return _Process(job, Elsewhere(pool, job), log, config)


def _start(job: Job) -> _Process:
    log, config = _files(job)
    write_text(config, to_yaml(job.config))
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "MPLBACKEND": "Agg"}
    command = [sys.executable, "-m", "nsrl.bench.suites.worker", job.command, str(config), str(job.folder)]
    try:
        with log.open("wb") as file:
            # An own session: Ctrl-C reaches a child once, from us, and not a second time from the terminal.
            # The pipe is its lifeline.
            popen = subprocess.Popen(
                command, stdin=subprocess.PIPE, stdout=file, stderr=file, env=environment, start_new_session=True
            )
    except OSError as error:
        raise unwritable(log, error, ELSEWHERE) from error
    return _Process(job, popen, log, config)


def _finish(process: _Process, done: list[str], failed: dict[str, str]) -> None:
    process.close()
    if process.popen.returncode == 0 and process.job.run.finished:
        process.log.unlink(missing_ok=True)
        done.append(process.job.name)
        return
    if isinstance(process.popen, Elsewhere) and process.popen.reason is not None:
        failed[process.job.name] = process.popen.reason
        return
    lines = process.log.read_text(encoding="utf-8", errors="replace").strip().splitlines()
    said = lines[-1].removeprefix("nsrl: ") if lines else f"exit code {process.popen.returncode}"
    failed[process.job.name] = f"{said} [{process.log}]"


def _stop(running: Sequence[_Process]) -> None:
    for process in running:
        if process.popen.poll() is None:
            process.popen.send_signal(signal.SIGINT)
    deadline = time.monotonic() + GRACE
    for process in running:
        try:
            process.popen.wait(max(0.1, deadline - time.monotonic()))
        except subprocess.TimeoutExpired:
            process.popen.kill()
            process.popen.wait()
        process.close()


def _status(
    jobs: Sequence[Job],
    done: list[str],
    running: Sequence[_Process],
    failed: dict[str, str],
    work: float,
    waiting: int,
    start: float,
) -> Status:
    progress = [(process.job.name, *process.progress()) for process in running]
    seconds = time.monotonic() - start
    left = waiting + sum(1.0 - share for _, share, _ in progress)
    resumed = sum(process.initial or 0.0 for process in running)
    made = work - left - resumed
    remaining = seconds * left / made if made > 0.02 else None
    return Status(len(jobs), list(done), progress, list(failed), seconds, remaining)
