"""How a method is measured: once in a process of its own for memory, then in turn with the others for time."""

from __future__ import annotations

import resource
import signal
import statistics
import sys
from collections.abc import Mapping
from pathlib import Path
from time import perf_counter
from typing import Any

import torch
from torch import Tensor
from torch.func import functional_call, jacrev

from nsrl.bench.speed.cases import Case, Problem
from nsrl.bench.speed.methods import OURS, Method, Run, relative_residual

#: Samples of the run that loads code, starts threads and fills caches before anything is measured.
WARM_UP_SAMPLES = 2

#: A method with fewer rounds than this is so slow that it is warmed up on `WARM_UP_SAMPLES` only.
FAST_ROUNDS = 5

#: A measurement is at least this long: faster methods are run several times within it.
LEAST_SECONDS = 0.02


def measure_first_run(
    case: Case, method: Method, *, quick: bool = False, device: str = "cpu", limit: int = 0
) -> dict[str, float]:
    """Peak memory of preparing and running a method, and both times; this process should do nothing else.

    Args:
        case: what to compute.
        method: how.
        quick: the small sizes.
        device: "cpu" or "cuda".
        limit: seconds after which SIGALRM ends the process; 0 for none.

    Returns:
        `peak_mb` above model and inputs, `prepare_seconds`, `first_seconds`.
    """
    problem = case.problem(quick=quick, device=device)
    method.prepare(problem.first(WARM_UP_SAMPLES))()
    if limit:
        signal.alarm(limit)
    peak = PeakMemory(device)
    start = perf_counter()
    run = method.prepare(problem)
    synchronize(device)
    prepared = perf_counter()
    result = run()
    synchronize(device)
    seconds = perf_counter() - prepared
    signal.alarm(0)
    del result
    return {"peak_mb": peak.megabytes(), "prepare_seconds": prepared - start, "first_seconds": seconds}


def measure_in_turn(
    case: Case, methods: Mapping[str, Method], rounds: Mapping[str, int], *, quick: bool = False, device: str = "cpu"
) -> dict[str, dict[str, Any]]:
    """Time methods in rounds, all in this process, and compare their results with ours.

    Args:
        case: what to compute.
        methods: by name, ours among them.
        rounds: how many of each; in a round the methods follow each other.
        quick: the small sizes.
        device: "cpu" or "cuda".

    Returns:
        By name: `seconds` of every round, `median`, `minimum`, `maximum`, `error` (largest difference to ours over
        our largest entry), and for projections `residual`.
    """
    problem = case.problem(quick=quick, device=device)
    ours = OURS[case.goal]
    reference = methods[ours].prepare(problem)()
    runs: dict[str, Run] = {}
    repeats: dict[str, int] = {}
    found: dict[str, dict[str, Any]] = {}
    for name, method in methods.items():
        runs[name], repeats[name], found[name] = method.prepare(problem), 1, {"seconds": []}
        if rounds[name] < FAST_ROUNDS:
            method.prepare(problem.first(WARM_UP_SAMPLES))()
        else:
            runs[name]()
            _, seconds = _timed(runs[name], 1, device)
            repeats[name] = max(1, round(LEAST_SECONDS / seconds))
    for turn in range(max(rounds.values())):
        for name, run in runs.items():
            if turn >= rounds[name]:
                continue
            result, seconds = _timed(run, repeats[name], device)
            found[name]["seconds"].append(seconds)
            if turn == 0:
                found[name]["error"] = relative_error(result, reference)
                if case.goal == "projection":
                    found[name]["residual"] = relative_residual(problem, result)
            del result
    for entry in found.values():
        entry["median"] = statistics.median(entry["seconds"])
        entry["minimum"], entry["maximum"] = min(entry["seconds"]), max(entry["seconds"])
    if case.goal == "gram":
        found[ours]["error_to_float64"] = error_to_float64(problem, reference)
    return found


def relative_error(result: Tensor, reference: Tensor) -> float:
    """Largest difference over the reference's largest entry."""
    if result.shape != reference.shape:
        return float("inf")
    return float((result.double() - reference.double()).abs().max() / reference.double().abs().max())


def error_to_float64(problem: Problem, gram: Tensor, samples: int = 2) -> float:
    """Error of the first samples' block of our Gram matrix against `jacrev` of the model in float64."""
    values = {name: parameter.detach().double() for name, parameter in problem.model.named_parameters()}
    inputs = problem.inputs[:samples].double()
    parts = jacrev(lambda parameters: functional_call(problem.model, parameters, (inputs,)))(values)
    dense = torch.cat([part.flatten(2) for part in parts.values()], 2).flatten(0, 1)
    block = gram[: len(dense), : len(dense)]
    return relative_error(block, dense @ dense.T)


def _timed(run: Run, repeats: int, device: str) -> tuple[Tensor, float]:
    """The last result, and the seconds of one run."""
    synchronize(device)
    start = perf_counter()
    for _ in range(repeats):
        result = run()
    synchronize(device)
    return result, (perf_counter() - start) / repeats


STATUS = Path("/proc/self/status")

MEGABYTE = 2**20


class PeakMemory:
    """Peak memory since its making, above what was held then: of the process, or of the CUDA device.

    Args:
        device: "cpu" or "cuda".
    """

    def __init__(self, device: str):
        self._device = device
        if device == "cuda":
            torch.cuda.reset_peak_memory_stats()
            self._before = float(torch.cuda.memory_allocated())
            return
        try:
            # Sets VmHWM to what is resident now (Linux, proc(5)); where that is not allowed the peak of the imports
            # counts as held, and a computation below it as free.
            Path("/proc/self/clear_refs").write_text("5")
        except OSError:
            pass
        self._before = _process_peak()

    def megabytes(self) -> float:
        """The peak so far."""
        now = float(torch.cuda.max_memory_allocated()) if self._device == "cuda" else _process_peak()
        return (now - self._before) / MEGABYTE


def free_bytes(device: str) -> float:
    """Memory that can be taken without swapping; infinity where the system does not say."""
    if device == "cuda":
        return float(torch.cuda.mem_get_info()[0])
    return _kilobytes(Path("/proc/meminfo"), "MemAvailable", float("inf"))


def copy_bandwidth(device: str, megabytes: int = 512, repeats: int = 5) -> float:
    """Bytes a second that copying reads and writes, the best of some repeats."""
    source = torch.ones(megabytes << 18, device=device)
    target = torch.empty_like(source)
    best = float("inf")
    for _ in range(repeats + 1):
        synchronize(device)
        start = perf_counter()
        target.copy_(source)
        synchronize(device)
        best = min(best, perf_counter() - start)
    return 2 * source.numel() * source.element_size() / best


def synchronize(device: str) -> None:
    """Wait until a device has done what was asked of it."""
    if device == "cuda":
        torch.cuda.synchronize()


def _process_peak() -> float:
    if STATUS.is_file():
        # Not ru_maxrss: on Linux a child starts with its parent's.
        return _kilobytes(STATUS, "VmHWM", 0.0)
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return float(peak if sys.platform == "darwin" else peak * 1024)


def _kilobytes(path: Path, key: str, default: float) -> float:
    """A `key: N kB` line of a proc file, in bytes."""
    try:
        lines = path.read_text().splitlines()
    except OSError:
        return default
    return next((float(line.split()[1]) * 1024 for line in lines if line.startswith(f"{key}:")), default)
