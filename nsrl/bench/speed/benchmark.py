"""The whole benchmark: every case on every device, then the scaling curves; what is done is not done again."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from functools import partial
from importlib import metadata
from math import ceil
from pathlib import Path
from typing import Any

from nsrl.bench.speed.cases import CASES, ON_DEVICE, Case, Problem
from nsrl.bench.speed.clock import free_bytes
from nsrl.bench.speed.methods import METHODS, OURS, Method
from nsrl.bench.speed.report import check_targets
from nsrl.bench.speed.worker import Failure, ask_worker
from nsrl.errors import NsrlError
from nsrl.files import write_json
from nsrl.reading.documents import read_results
from nsrl.runs.machine import describe_environment

#: Distributions of the rivals, for the record.
RIVALS = ("torchjd", "nngeometry", "curvlinops-for-pytorch")
SCALING = "scaling"
#: A result further from ours than this is not the same matrix, and its method no rival. Float32 products of millions
#: of terms stay a hundred times below it.
TOLERANCE = 1e-4
#: Seconds that a first run may take; the first runs of further variants of a library less, see `variant_limit`.
LIMIT = 120
#: A library's slower variants are not timed again when their first run took this many times its fastest one's.
SLOWER_VARIANT = 2.0

OnProgress = Callable[[str], Any]


@dataclass(frozen=True)
class Settings:
    """What results may be reused under.

    Attributes:
        quick: small sizes, for trying the benchmark out; its numbers mean nothing.
        threads: of torch and MKL in every measurement.
    """

    quick: bool
    threads: int


def measure_speed(
    out: Path,
    settings: Settings,
    *,
    only: Sequence[str] = (),
    again: bool = False,
    on_progress: OnProgress = lambda text: None,
) -> dict[str, Any]:
    """Measure whatever is not in `out` yet.

    Args:
        out: folder of the finished cases, one JSON each.
        settings: of the measurement.
        only: names of cases, or "scaling"; all by default.
        again: measure also what is there.
        on_progress: called with what runs next.

    Returns:
        `environment`, `settings`, `cases` by name (with _cuda appended on that device), `targets`, `scaling`; also what
        earlier calls left in `out` under the same conditions.

    Raises:
        NsrlError: an unknown case.
    """
    wanted = _wanted(only)
    environment = describe_environment()
    environment["packages"] |= {name: version for name in RIVALS if (version := _version(name)) is not None}
    conditions = {"environment": environment, "settings": asdict(settings)}
    tasks: dict[str, Callable[[], dict[str, Any]]] = {
        name if device == "cpu" else f"{name}_{device}": partial(
            measure_case, CASES[name], settings, device, on_progress
        )
        for device in _devices()
        for name in ON_DEVICE[device]
    }
    tasks[SCALING] = partial(measure_curves, settings, on_progress)
    results = {}
    for key, measure in tasks.items():
        path = out / f"{key}.json"
        asked = key.removesuffix("_cuda") in wanted
        result = None if asked and again else _stored(path, conditions)
        if result is None and asked:
            result = measure()
            write_json(path, {"conditions": conditions, "result": result})
        if result is not None:
            results[key] = result
    curves = results.pop(SCALING, None)
    # Small sizes keep no promises.
    targets = [] if settings.quick else check_targets(results)
    content = conditions | {"cases": results, "targets": [asdict(target) for target in targets]}
    return content if curves is None else content | {SCALING: curves["sweeps"]}


def measure_case(case: Case, settings: Settings, device: str, on_progress: OnProgress) -> dict[str, Any]:
    """First runs, one process each, for memory; then the survivors in turn, in one process, for time.

    Raises:
        NsrlError: the process that times all methods came to no result.
    """
    problem = case.problem(quick=settings.quick, device=device)
    methods = {name: method for name, method in METHODS.items() if method.goal == case.goal}
    found: dict[str, dict[str, Any]] = {}
    for name, method in methods.items():
        on_progress(f"{case.name} on {device}: first run of {name}")
        limit = variant_limit(found, method.library)
        found[name] = {"library": method.library} | _first_run(case, method, problem, settings, device, limit)
    rounds = plan_rounds(found)
    on_progress(f"{case.name} on {device}: {', '.join(rounds)} in turn")
    task = {"kind": "in turn", "case": case.name, "rounds": rounds, "quick": settings.quick, "device": device}
    answer = ask_worker(task, settings.threads)
    if isinstance(answer, Failure):
        raise NsrlError(f"{case.name}: the methods could not be timed together: {answer.note}")
    for name, times in answer["methods"].items():
        right = times["error"] <= TOLERANCE
        found[name] |= times | {"status": "timed" if right else "wrong"}
    result = {
        "title": f"{case.title} (small sizes)" if settings.quick else case.title,
        "device": device,
        "rows": problem.rows,
        "parameters": problem.parameters,
        "ours": OURS[case.goal],
        "methods": found,
    }
    if case.goal == "projection":
        bandwidth = ask_worker({"kind": "bandwidth", "device": device}, settings.threads)
        if not isinstance(bandwidth, Failure):
            result["bandwidth"] = dense_bound(result, bandwidth["bytes_per_second"])
    return result


def measure_curves(settings: Settings, on_progress: OnProgress) -> dict[str, Any]:
    """The scaling curves, in a process of their own.

    Raises:
        NsrlError: their process came to no result.
    """
    on_progress("scaling curves")
    answer = ask_worker({"kind": "scaling", "quick": settings.quick}, settings.threads)
    if isinstance(answer, Failure):
        raise NsrlError(f"the scaling curves came to no result: {answer.note}")
    return answer


def plan_rounds(found: dict[str, dict[str, Any]]) -> dict[str, int]:
    """How often to time each method whose first run came to its end: less often the slower it is.

    A library's variants that are clearly slower than its fastest one are left at their first run.
    """
    finished = {name: entry for name, entry in found.items() if entry["status"] == "first run only"}
    rounds = {}
    for name, entry in finished.items():
        seconds = entry["first_seconds"]
        fastest = min(other["first_seconds"] for other in finished.values() if other["library"] == entry["library"])
        if entry["library"] == "nsrl" or seconds <= SLOWER_VARIANT * fastest:
            rounds[name] = 9 if seconds < 1.0 else 5 if seconds < 5.0 else 3 if seconds < 10.0 else 2
    return rounds


def variant_limit(found: dict[str, dict[str, Any]], library: str) -> int:
    """Seconds for the first run of a library's next variant: what `plan_rounds` would drop need not be waited for."""
    earlier = [
        entry["first_seconds"] for entry in found.values() if entry["library"] == library and "first_seconds" in entry
    ]
    return min(LIMIT, max(10, ceil(SLOWER_VARIANT * min(earlier)))) if earlier else LIMIT


def dense_bound(result: dict[str, Any], bandwidth: float) -> dict[str, float]:
    """What memory bandwidth allows a dense projection, which must read Q twice.

    Args:
        result: of a projection.
        bandwidth: bytes a second, as copying reaches it.

    Returns:
        `bytes_per_second`; `bound_seconds` of a dense projection; `bound_over_factored`, how many times faster than
        that bound the factored one is; `dense_share` of the bandwidth that the dense one uses.
    """
    bound = 2 * 4 * result["rows"] * result["parameters"] / bandwidth
    medians = {name: entry["median"] for name, entry in result["methods"].items() if "median" in entry}
    limits = {
        "bytes_per_second": bandwidth,
        "bound_seconds": bound,
        "bound_over_factored": bound / medians[result["ours"]],
    }
    return limits | ({"dense_share": bound / medians["dense Q"]} if "dense Q" in medians else {})


def _first_run(
    case: Case, method: Method, problem: Problem, settings: Settings, device: str, limit: int
) -> dict[str, Any]:
    if not method.installed:
        return {"status": "not installed", "note": f"pip install nsrl[rivals] brings {method.library}"}
    needed = method.copies * 4 * problem.rows * problem.parameters
    if needed > free_bytes(device):
        return {"status": "too big", "note": f"needs about {needed / 2**30:.0f} GiB"}
    task = {
        "kind": "first run",
        "case": case.name,
        "method": method.name,
        "quick": settings.quick,
        "device": device,
        "limit": limit,
    }
    answer = ask_worker(task, settings.threads)
    if isinstance(answer, Failure):
        if method.library == "nsrl":
            raise NsrlError(f"{case.name}: {method.name} came to no result: {answer.note}")
        return {"status": answer.status, "note": answer.note}
    return {"status": "first run only"} | answer


def _stored(path: Path, conditions: dict[str, Any]) -> dict[str, Any] | None:
    """The result at `path` if it was measured under the same conditions."""
    try:
        stored = read_results(path)
    except (OSError, ValueError):
        return None
    return stored["result"] if stored.get("conditions") == conditions else None


def _wanted(only: Sequence[str]) -> tuple[str, ...]:
    known = (*CASES, SCALING)
    unknown = [name for name in only if name not in known]
    if unknown:
        raise NsrlError(f"there is no case {unknown[0]!r} in the speed benchmark; known: {', '.join(known)}")
    return tuple(only) or known


def _devices() -> tuple[str, ...]:
    import torch

    return ("cpu", "cuda") if torch.cuda.is_available() else ("cpu",)


def _version(package: str) -> str | None:
    try:
        return metadata.version(package)
    except metadata.PackageNotFoundError:
        return None
