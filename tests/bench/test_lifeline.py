"""Workers end with the process that started them, also where that one is killed and can tell nobody."""

import ast
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

import nsrl.bench
from nsrl.bench.suites.jobs import run_jobs
from nsrl.files import read_lines
from tests.bench.suites.builders import jobs, long

POOL = """
import multiprocessing, os, time
from concurrent.futures import ProcessPoolExecutor
from nsrl.bench.lifeline import end_with_parent
def work():
    print(os.getpid(), flush=True)
    while True:
        time.sleep(0.05)
if __name__ == "__main__":
    with ProcessPoolExecutor(1, multiprocessing.get_context("spawn"), end_with_parent) as pool:
        pool.submit(work).result()
"""
PIPE = """
import subprocess, sys
from nsrl.bench.lifeline import lifeline
worker = '''
import os, time
from nsrl.bench.lifeline import end_with_starter
end_with_starter()
print(os.getpid(), flush=True)
while True:
    time.sleep(0.05)
'''
with lifeline() as stdin:
    subprocess.run([sys.executable, "-c", worker], stdin=stdin)
"""
BENCH = """
import sys
from pathlib import Path
from nsrl.bench.suites.jobs import run_jobs
from tests.bench.suites.builders import jobs, long
if __name__ == "__main__":
    run_jobs([long(job) for job in jobs(Path(sys.argv[1]), 0)], poll=0.05)
"""


def is_running(number: int) -> bool:
    """Whether a process is there and no zombie, which nobody may have waited for."""
    try:
        with open(f"/proc/{number}/stat") as file:
            return file.read().rpartition(")")[2].split()[0] not in "ZX"
    except OSError:
        return False


@pytest.mark.skipif(not os.path.isdir("/proc"), reason="looks processes up in /proc")
@pytest.mark.parametrize("script", [POOL, PIPE], ids=["pool", "pipe"])
def test_a_worker_ends_with_its_killed_starter(script, tmp_path):
    (tmp_path / "starter.py").write_text(script)
    starter = subprocess.Popen([sys.executable, str(tmp_path / "starter.py")], stdout=subprocess.PIPE, text=True)
    worker = int(starter.stdout.readline())
    assert is_running(worker)
    starter.kill()
    starter.wait()
    while is_running(worker):  # pytest-timeout ends a test whose worker stays
        time.sleep(0.05)
    starter.stdout.close()


@pytest.mark.slow
@pytest.mark.parametrize("number", [signal.SIGKILL, signal.SIGHUP])
def test_a_benchmark_that_is_killed_goes_on_without_a_row_twice(number, tmp_path):
    out = tmp_path / "out"
    bench = subprocess.Popen([sys.executable, "-c", BENCH, str(out)], stderr=subprocess.DEVNULL)
    while len(read_lines(out / "0" / "history.jsonl")) < 3:
        assert bench.poll() is None
        time.sleep(0.02)
    bench.send_signal(number)
    bench.wait()
    # at once: the worker that was left alone may still be writing its checkpoint
    [metrics] = run_jobs([long(job) for job in jobs(out, 0)])
    steps = [row["timesteps"] for row in read_lines(out / "0" / "history.jsonl")]
    assert metrics["timesteps"] == steps[-1] == long(jobs(out, 0)[0]).config.total_timesteps
    assert steps == sorted(set(steps))


def test_all_pools_of_the_benchmarks_are_made_in_one_place_and_begin_their_workers_so() -> None:
    pools = []
    for path in (Path(nsrl.bench.__file__).parent).rglob("*.py"):
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
            if isinstance(node, ast.Call) and ast.unparse(node.func).endswith("ProcessPoolExecutor"):
                given = [*node.args, *(keyword.value for keyword in node.keywords)]
                pools.append((path.name, "begin_worker" in {ast.unparse(value) for value in given}))
    assert pools == [("engine.py", True)], pools
