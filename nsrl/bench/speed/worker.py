"""The processes of the benchmark, each with its own number of threads: one measurement, one JSON line on stdout."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
from dataclasses import dataclass
from typing import Any

from nsrl.bench.lifeline import end_with_starter, lifeline


@dataclass(frozen=True)
class Failure:
    """Why a process brought no result.

    Attributes:
        status: "too slow", "out of memory" or "failed".
        note: one sentence.
    """

    status: str
    note: str


def ask_worker(task: dict[str, Any], threads: int) -> dict[str, Any] | Failure:
    """Run a task in a fresh process.

    Args:
        task: `kind` ("first run", "in turn", "bandwidth" or "scaling") and the arguments of the function behind it.
        threads: of torch and MKL.
    """
    environment = os.environ | {"OMP_NUM_THREADS": str(threads), "MKL_NUM_THREADS": str(threads)}
    command = [sys.executable, "-m", "nsrl.bench.speed.worker", json.dumps(task)]
    with lifeline() as stdin:
        done = subprocess.run(command, capture_output=True, text=True, env=environment, stdin=stdin)
    if done.returncode == -signal.SIGALRM:
        return Failure("too slow", f"over {task['limit']} s")
    if done.returncode == -signal.SIGKILL:
        return Failure("out of memory", "the system ended it, most likely for its memory")
    if done.returncode != 0:
        last = next((line for line in reversed(done.stderr.splitlines()) if line.strip()), "no message")
        return Failure("failed", last.strip()[:200])
    return json.loads(done.stdout.splitlines()[-1])


def main(arguments: list[str]) -> int:
    """Do one task."""
    import torch

    # Exact float32 on both sides: TF32 would make a rival faster and wrong. Set here, in a process of its own.
    torch.backends.cuda.matmul.allow_tf32 = torch.backends.cudnn.allow_tf32 = False
    print(json.dumps(do_task(json.loads(arguments[0]))))
    return 0


def do_task(task: dict[str, Any]) -> dict[str, Any]:
    """The task itself, in this process."""
    from nsrl.bench.speed.cases import CASES
    from nsrl.bench.speed.clock import copy_bandwidth, measure_first_run, measure_in_turn
    from nsrl.bench.speed.methods import METHODS
    from nsrl.bench.speed.scaling import measure_scaling

    kind = task["kind"]
    if kind == "bandwidth":
        return {"bytes_per_second": copy_bandwidth(task["device"])}
    if kind == "scaling":
        return {"sweeps": measure_scaling(quick=task["quick"])}
    case = CASES[task["case"]]
    options = {"quick": task["quick"], "device": task["device"]}
    if kind == "first run":
        return dict(measure_first_run(case, METHODS[task["method"]], limit=task["limit"], **options))
    rounds = task["rounds"]
    return {"methods": measure_in_turn(case, {name: METHODS[name] for name in rounds}, rounds, **options)}


if __name__ == "__main__":
    end_with_starter()
    sys.exit(main(sys.argv[1:]))
