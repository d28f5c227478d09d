"""How a method is measured: once in a process of its own for memory, then in turn with the others for time."""

from __future__ import annotations

import signal
import statistics
from collections.abc import Mapping
from time import perf_counter
from typing import Any

import torch
from torch import Tensor
from torch.func import functional_call, jacrev

from nsrl.bench.speed.cases import Case, Problem
from nsrl.bench.speed.device import PeakMemory, synchronize
from nsrl.bench.speed.methods import OURS, Method, Run
from nsrl.bench.speed.projections import relative_residual

#: Samples of the run that loads code, starts threads and fills caches before anything is measured.
WARM_UP_SAMPLES = 2
#: A method with fewer rounds than this is so slow that it is warmed up on `WARM_UP_SAMPLES` only.
FAST_ROUNDS = 5
#: A measurement is at least this long: faster methods are run several times within it.
LEAST_SECONDS = 0.02


def measure_first_run(case: Case, method: Method, *, quick: bool = False, device: str = "cpu",
                      limit: int = 0) -> dict[str, float]:  # fmt: skip
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


def measure_in_turn(case: Case, methods: Mapping[str, Method], rounds: Mapping[str, int], *, quick: bool = False,
                    device: str = "cpu") -> dict[str, dict[str, Any]]:  # fmt: skip
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
