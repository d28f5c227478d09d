"""The speed benchmark as tables and as the figure of its scaling curves."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from math import exp, log
from pathlib import Path
from typing import Any

from nsrl.files import written_atomically
from nsrl.runs.figures import COLOURS
from nsrl.runs.report import Table, scientific


def speed_tables(content: dict[str, Any]) -> list[Table]:
    """A table a case, and the targets."""
    tables = [case_table(case) for case in content["cases"].values()]
    targets = [Target(**target) for target in content["targets"]]
    return [*tables, targets_table(targets)] if targets else tables


def case_table(case: dict[str, Any]) -> Table:
    """One row a method: time and memory with their ratios to ours, and the difference of the results.

    An asterisk marks a variant that was not timed again because its library has a clearly faster one.
    """
    rows = []
    for name, entry in case["methods"].items():
        timed = "median" in entry
        first = entry.get("first_seconds")
        rows.append(
            (
                name,
                seconds(entry["median"]) if timed else "-" if first is None else f"{seconds(first)} *",
                ratio(time_ratio(case, name)) if timed else "",
                "-" if "peak_mb" not in entry else f"{entry['peak_mb']:.0f} MB",
                ratio(memory_ratio(case, name)) if "peak_mb" in entry else "",
                scientific(entry.get("residual", entry.get("error"))),
                "" if entry["status"] in ("timed", "first run only") else entry["status"],
            )
        )
    accuracy = "residual" if "residual" in case["methods"][case["ours"]] else "difference"
    where = "" if case["device"] == "cpu" else f", {case['device'].upper()}"
    return Table(("", "median", "/ ours", "peak", "/ ours", accuracy, ""), tuple(rows), f"{case['title']}{where}")


def targets_table(targets: Sequence[Target]) -> Table:
    """What was promised, what was reached."""
    rows = []
    for target in targets:
        bound = f"{'<=' if target.at_most else '>='} {target.required:g}"
        if target.reached is None:
            reached = "not measured"
        else:
            reached = f"{target.reached:.2g}" if target.at_most else ratio(target.reached)
        verdict = {True: "met", False: "missed", None: ""}[target.met]
        rows.append((target.claim, bound, reached, verdict))
    return Table(("target", "required", "reached", ""), tuple(rows), "Targets")


def draw_scaling(sweeps: Sequence[dict[str, Any]], path: Path) -> Path:
    """One log-log panel a sweep: measured points, the fitted line, dotted the predicted slope."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(10.5, 8.0), layout="constrained")
    for axis, sweep in zip(figure.subplots(2, 2).flat, sweeps, strict=True):
        for (method, curve), colour, marker in zip(sweep["methods"].items(), COLOURS, "os", strict=False):
            _draw_curve(axis, method, curve, colour, marker)
        axis.set_xscale("log", base=2 if sweep["symbol"] != "P" else 10)
        axis.set_yscale("log")
        axis.set_xlabel(sweep["title"])
        axis.set_ylabel("seconds for the Gram matrix")
        axis.set_title(_held(sweep), fontsize=10)
        axis.grid(alpha=0.25)
        axis.spines[["top", "right"]].set_visible(False)
        axis.legend(fontsize=8, frameon=False, loc="upper left")
        low, high = axis.get_ylim()
        axis.set_ylim(low, high * (high / low) ** 0.25)  # room for the legend
    figure.suptitle(
        "Gram matrix of a three-layer MLP: exponents fitted over the upper half (predicted ones)", fontsize=12
    )
    with written_atomically(path) as temporary:
        figure.savefig(temporary, dpi=150)
    return path


def seconds(value: float) -> str:
    """A time with its unit."""
    return f"{1e3 * value:.3g} ms" if value < 1.0 else f"{value:.3g} s"


def ratio(value: float | None) -> str:
    """A ratio, with a decimal while it is small."""
    return "" if value is None else f"{value:.1f}x" if value < 20 else f"{value:.0f}x"


def _draw_curve(axis: Any, method: str, curve: dict[str, Any], colour: str, marker: str) -> None:
    points = [(point["at"], point["seconds"]) for point in curve["points"]]
    axis.plot(*zip(*points, strict=True), color=colour, marker=marker, markersize=5, linestyle="none")
    fitted = [(log(at), log(time)) for at, time in points if at >= curve["fitted_from"]]
    centre = [sum(values) / len(fitted) for values in zip(*fitted, strict=True)]
    for key, style, label in (
        ("exponent", "-", f"{method}: {curve['exponent']:.2f} ({curve['predicted']:.2f})"),
        ("predicted", ":", "_predicted"),
    ):
        line = [exp(centre[1] + curve[key] * (at - centre[0])) for at, _ in fitted]
        axis.plot([exp(at) for at, _ in fitted], line, color=colour, linestyle=style, linewidth=1.4, label=label)


def _held(sweep: dict[str, Any]) -> str:
    """The sizes that do not vary."""
    fields = {"N": ("samples", "N"), "O": ("outputs", "O"), "P": ("width", "width"), "T": ("positions", "T")}
    first = sweep["methods"]["nsrl"]["points"][0]["sizes"]
    held = (f"{name} = {first[field]}" for symbol, (field, name) in fields.items() if symbol != sweep["symbol"])
    return f"{sweep['symbol']} varied; {', '.join(held)}"


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
