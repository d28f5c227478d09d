"""Which way to solve: an explicit choice between methods, with what each would cost.

    dual      k x k: the Gram matrix K = J J^T and a factorisation of it
    primal    P x P: J^T J and its eigenbasis, for fewer parameters than rows
    nystrom   neither: conjugate gradients behind a randomised preconditioner, for k and P beyond memory

The model is coarse on purpose: it has to tell seconds from hours. A Gram matrix is charged as if J were dense, an upper
bound that factors stay far below.
"""

from __future__ import annotations

import logging
import math
import os
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import torch

from nsrl.projection.jacobians.factored import CHUNK

METHODS = ("dual", "primal", "nystrom")

#: Share of the free memory that a solve may take by default.
SHARE = 0.5

#: Conjugate-gradient iterations that a good preconditioner leaves to do, for the cost model.
ITERATIONS = 30

#: Matrices of the size of a sketch: test matrix and image, both once more while they grow, root, basis, temporaries.
SKETCHES = 8.0

_logger = logging.getLogger("nsrl.projection")

_logged: set[tuple[tuple[int, int], str]] = set()


@dataclass(frozen=True)
class Rates:
    """Float64 operations a second. `eigh` counts 9 n^3 for a matrix of size n, as LAPACK's divide and conquer does."""

    gemm: float
    cholesky: float
    eigh: float


#: One core of a server CPU, measured at n = 768 to 1536 (4.8e10, 2.0e10, 4.2e10) and rounded down.
CPU_CORE = Rates(gemm=4e10, cholesky=1.5e10, eigh=3e10)

#: An H100-class GPU, whose float64 tensor cores do 6.7e13; consumer GPUs are 30 times slower in float64.
GPU = Rates(gemm=3e13, cholesky=5e12, eigh=5e11)


@dataclass(frozen=True)
class Cost:
    """What a method would need: floating-point operations, bytes at its peak, seconds at the documented rates."""

    flops: float
    bytes: float
    seconds: float


@dataclass(frozen=True)
class Plan:
    """A chosen method.

    Attributes:
        method: "dual", "primal" or "nystrom".
        reason: why this one, in words.
        costs: of all methods that were considered.
    """

    method: str
    reason: str
    costs: dict[str, Cost]

    def __str__(self) -> str:
        costs = ", ".join(f"{name} {_gib(cost.bytes)} {cost.seconds:.2g} s" for name, cost in self.costs.items())
        return f"{self.method}: {self.reason} ({costs})"


def plan(
    shape: tuple[int, int],
    *,
    spectral: bool = True,
    method: str | None = None,
    methods: Sequence[str] = METHODS,
    memory: float | None = None,
    effective_dimension: float | None = None,
    device: torch.device | str = "cpu",
) -> Plan:
    """Choose the cheapest exact method that fits into memory, and nystrom when none does.

    The choice goes to the logger "nsrl.projection", at INFO for the first time of a shape and at DEBUG afterwards.

    Args:
        shape: (k, P) of the Jacobian.
        spectral: whether all eigenvalues are wanted (or K may be singular), so that a Cholesky factor is not enough.
        method: take this one, whatever it costs.
        methods: those that are possible here; a single one is taken whatever it costs.
        memory: bytes that may be used; default half of what is free on the device.
        effective_dimension: sum s / (s + lambda), if known; decides what nystrom costs.
        device: where the factors are.

    Raises:
        ValueError: an unknown method, or none that fits.
    """
    unknown = sorted({*methods, *([method] if method else [])} - set(METHODS))
    if unknown or not methods:
        raise ValueError(f"{', '.join(unknown) or 'no method'} given: the methods are {', '.join(METHODS)}")
    limit = SHARE * free_memory(device) if memory is None else memory
    offered = tuple(dict.fromkeys([*methods, *([method] if method else [])]))
    costs = {name: _cost(name, shape, spectral, effective_dimension, device) for name in offered}
    if method is not None:
        chosen = Plan(method, "as asked for", costs)
    elif len(offered) == 1:
        chosen = Plan(offered[0], "the only method for this Jacobian", costs)
    else:
        chosen = _cheapest(shape, costs, limit, effective_dimension)
    key = (shape, chosen.method)
    _logger.log(logging.DEBUG if key in _logged else logging.INFO, "%d x %d Jacobian, %s", *shape, chosen)
    _logged.add(key)
    return chosen


def free_memory(device: torch.device | str = "cpu") -> float:
    """Bytes that can be allocated on the device now."""
    device = torch.device(device)
    if device.type == "cuda":
        return float(torch.cuda.mem_get_info(device)[0])
    try:
        with open("/proc/meminfo") as lines:
            return next(1024.0 * int(line.split()[1]) for line in lines if line.startswith("MemAvailable"))
    except (OSError, StopIteration):
        if not hasattr(os, "sysconf"):
            return math.inf  # Windows: nothing in the standard library tells
        pages = "SC_AVPHYS_PAGES" if "SC_AVPHYS_PAGES" in os.sysconf_names else "SC_PHYS_PAGES"
        return float(os.sysconf(pages)) * os.sysconf("SC_PAGE_SIZE")


def largest_sketch(rows: int, memory: float) -> int:
    """Columns that a sketch of "nystrom" may have; at least 16."""
    return int(min(max(16.0, memory / (8.0 * SKETCHES * max(rows, 1))), rows))


def _cheapest(shape: tuple[int, int], costs: dict[str, Cost], limit: float, effective_dimension: float | None) -> Plan:
    exact = [name for name in costs if name != "nystrom" and costs[name].bytes <= limit]
    if exact:
        best = min(exact, key=lambda name: costs[name].seconds)
        return Plan(best, f"the cheapest exact method within {_gib(limit)}", costs)
    if "nystrom" not in costs:
        least = min(costs, key=lambda name: costs[name].bytes)
        raise ValueError(
            f"a {shape[0]} x {shape[1]} Jacobian needs {_gib(costs[least].bytes)} to be decomposed ({least}), but the "
            f"limit is {_gib(limit)}: linearise fewer states, or solve by KrylovProjection, or raise `memory`"
        )
    reason = f"neither K nor J^T J fits into {_gib(limit)}"
    if effective_dimension is not None and effective_dimension > 0.1 * min(shape):
        reason += f"; the effective dimension {effective_dimension:.0f} is not small, so expect many iterations"
    return Plan("nystrom", reason, costs)


def _cost(
    method: str, shape: tuple[int, int], spectral: bool, effective_dimension: float | None, device: torch.device | str
) -> Cost:
    rows, columns = float(shape[0]), float(shape[1])
    rates, cores = (GPU, 1) if torch.device(device).type == "cuda" else (CPU_CORE, torch.get_num_threads())
    if method == "nystrom":
        guess = 0.1 * min(shape) if effective_dimension is None else effective_dimension
        sketch = min(rows, 3.0 * guess + 16.0)
        # A product with K is 4 k P; the sketch takes one a column, orthonormalised and decomposed in about 6 k l^2.
        flops = 4.0 * rows * columns * (sketch + ITERATIONS) + 6.0 * rows * sketch**2
        return Cost(flops, 8.0 * (SKETCHES * rows * sketch + 2.0 * columns), flops / (rates.gemm * cores))
    size, other = (rows, columns) if method == "dual" else (columns, rows)
    products = 2.0 * size**2 * other
    if spectral or method == "primal":
        # LAPACK's syevd: the matrix, the vectors, and twice their size as workspace.
        factorisation, rate, matrices = 9.0 * size**3, rates.eigh, 4.0
    else:
        # The factor and the inverse that the effective dimension is read from.
        factorisation, rate, matrices = 2.0 * size**3 / 3.0, rates.cholesky, 3.0
    # Rows of J on their way into J^T J.
    chunk = 16.0 * min(CHUNK, rows * columns) if method == "primal" else 0.0
    seconds = products / (rates.gemm * cores) + factorisation / (rate * cores)
    return Cost(products + factorisation, 8.0 * matrices * size**2 + chunk, seconds)


def _gib(count: float) -> str:
    return f"{count / 2**30:.3g} GiB"


def available_bytes(device: torch.device) -> int | None:
    """Bytes that a new tensor on the device may take; None where the system does not tell."""
    if device.type == "cuda":
        return int(torch.cuda.mem_get_info(device)[0])
    if device.type != "cpu":
        return None
    # Linux counts what its caches would give back; elsewhere the machine's whole memory has to do.
    meminfo = Path("/proc/meminfo")
    if meminfo.exists():
        for line in meminfo.read_text().splitlines():
            if line.startswith("MemAvailable:"):
                return int(line.split()[1]) * 1024
    try:
        return os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")
    except (AttributeError, ValueError, OSError):
        return None


def readable_bytes(count: float) -> str:
    """A number of bytes with a binary unit: 1536 -> "1.5 KiB"."""
    for unit in ("bytes", "KiB", "MiB", "GiB", "TiB"):
        if count < 1024 or unit == "TiB":
            break
        count /= 1024
    return f"{count:.0f} bytes" if unit == "bytes" else f"{count:.1f} {unit}"
