"""What the project promises of its speed, and what was reached."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

#: Our method in the precision of the rivals.
SINGLE = "nsrl float32"


@dataclass(frozen=True)
class Target:
    """One promise.

    Attributes:
        claim: in words.
        required: the number promised.
        reached: the number measured; None where the rival was not measured.
        at_most: whether the number is to be at most, instead of at least, the one promised.
    """

    claim: str
    required: float
    reached: float | None
    at_most: bool = False

    @property
    def met(self) -> bool | None:
        """Whether it was kept; None where nothing was measured."""
        if self.reached is None:
            return None
        return self.reached <= self.required if self.at_most else self.reached >= self.required


def check_targets(cases: dict[str, dict[str, Any]]) -> list[Target]:
    """The targets of the cases that were measured, in their order."""
    targets: list[Target] = []
    for key, case in cases.items():
        name = key.removesuffix("_cuda")
        where = f"{name.replace('_', ' ')}, {case['device'].upper()}: "
        if name == "gram_mlp":
            for library in ("torch.func", "TorchJD"):
                rival = fastest(case, library)
                targets.append(Target(f"{where}times faster than {library}", 100.0, time_ratio(case, rival)))
                targets.append(Target(f"{where}memory of {library} over ours", 5.0, memory_ratio(case, rival)))
        elif name in ("gram_cnn", "gram_transformer"):
            targets.append(Target(f"{where}times faster than the best rival", 5.0, time_ratio(case, fastest(case))))
            if SINGLE in case["methods"]:
                ratio = time_ratio(case, fastest(case), SINGLE)
                targets.append(Target(f"{where}the same with our products in float32 too", 5.0, ratio))
        elif name == "projection":
            targets.append(Target(f"{where}times faster than dense Q", 10.0, time_ratio(case, fastest(case))))
        if name.startswith("projection"):
            residual = case["methods"][case["ours"]]["residual"]
            targets.append(Target(f"{where}residual |J d| / (|J| |d|)", 1e-6, residual, at_most=True))
        if name == "projection_wide":
            bound = case.get("bandwidth", {}).get("bound_over_factored")
            targets.append(Target(f"{where}times under the dense bandwidth bound", 10.0, bound))
    return targets


def fastest(case: dict[str, Any], library: str | None = None) -> str | None:
    """The fastest timed method of a library, or of all rivals; None when there is none that is right."""
    timed = {
        name: entry["median"]
        for name, entry in case["methods"].items()
        if entry["status"] == "timed" and entry["library"] == (library or entry["library"]) != "nsrl"
    }
    return min(timed, key=timed.__getitem__) if timed else None


def time_ratio(case: dict[str, Any], rival: str | None, ours: str | None = None) -> float | None:
    """Median time of a rival over ours (default: the case's own method)."""
    if rival is None:
        return None
    return case["methods"][rival]["median"] / case["methods"][ours or case["ours"]]["median"]


def memory_ratio(case: dict[str, Any], rival: str | None) -> float | None:
    """Peak memory of a rival over ours."""
    if rival is None:
        return None
    # Less than a megabyte is below what a page-wise counter can tell.
    return case["methods"][rival]["peak_mb"] / max(case["methods"][case["ours"]]["peak_mb"], 1.0)
