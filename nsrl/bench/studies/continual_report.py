"""Continual learning as tables, as the figure of all strategies on all benchmarks, and as Markdown."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from nsrl.files import write_text, written_atomically
from nsrl.runs.report import Table, duration, number, scientific

#: Strategies of nsrl's own.
OURS = ("kl_budget", "kl_budget_optimizer_tuned", "features", "combined")
OURS_COLOUR, OTHERS_COLOUR, BOUND_COLOUR = "#D55E00", "0.45", "#0072B2"


def run_table(metrics: dict[str, Any]) -> Table:
    """The final table of one run."""
    rows = [
        ("average at the end (ACC)", points(metrics["acc"])),
        ("right after each task (learning)", points(metrics["learning"])),
        ("backward transfer (BWT)", points(metrics["bwt"], sign=True)),
        ("forward transfer (FWT)", points(metrics["fwt"], sign=True)),
        ("forgetting", points(metrics["forgetting"])),
        ("KL on learnt tasks", scientific(metrics["preserved_kl"])),
        ("worst KL of a learnt task on the way", scientific(metrics.get("worst_kl"))),
        ("worst drop of a learnt task on the way", points(metrics.get("worst_drop"))),
        ("training time", duration(metrics["train_seconds"])),
        ("kept of earlier tasks", size(metrics["memory_bytes"])),
    ]
    unit = f"{metrics['score']} in %"
    title = f"{metrics['strategy']} on {metrics['benchmark']}, {len(metrics['tasks'])} tasks, {metrics['scenario']}"
    return Table((unit, ""), tuple(rows), title)


def benchmark_tables(content: dict[str, Any]) -> list[Table]:
    """A table a benchmark, best ACC first."""
    return [benchmark_table(content, name) for name in dict.fromkeys(row["benchmark"] for row in content["summary"])]


def benchmark_table(content: dict[str, Any], benchmark: str) -> Table:
    """One row a strategy: means, with the 95 % interval of ACC; `time` is the median ratio to naive's."""
    entries = [entry for entry in content["summary"] if entry["benchmark"] == benchmark]
    entries.sort(key=lambda entry: -entry["acc"]["mean"])
    rows = []
    for entry in entries:
        acc = entry["acc"]
        rows.append(
            (
                f"**{entry['strategy']}**" if entry["strategy"] in OURS else entry["strategy"],
                f"{points(acc['mean'])} [{points(acc['low'])}, {points(acc['high'])}]",
                *(points(_mean(entry, key), sign=True) for key in ("bwt", "fwt")),
                *(points(_mean(entry, key)) for key in ("forgetting", "learning")),
                scientific(_mean(entry, "preserved_kl")),
                scientific(_mean(entry, "worst_kl")),
                scientific(_mean(entry, "worst_retained_kl")),
                points(_mean(entry, "worst_drop")),
                number(_mean(entry, "kept_share"), 2),
                scientific(_mean(entry, "leakage")),
                "-" if "slowdown" not in entry else f"{entry['slowdown']:.2f}",
                size(_mean(entry, "memory_bytes")),
            )
        )
    runs = max(entry["runs"] for entry in entries)
    scores = ("strategy", "ACC", "BWT", "FWT", "forgetting", "learning", "KL", "worst KL", "of retained", "worst drop")
    head = (*scores, "kept", "leakage", "time", "memory")
    return Table(head, tuple(rows), f"{benchmark.replace('_', ' ')}, {runs} runs")


def write_markdown(
    content: dict[str, Any],
    path: Path,
    title: str = "Continual learning: all strategies on the offline benchmarks",
    command: str = "nsrl bench continual",
    figure: str = "ACC of all strategies",
) -> Path:
    """All tables, what failed, and how they were made."""
    environment = content["environment"]
    parts = [
        f"# {title}",
        f"`{command}` makes this page, `{path.stem}.json` and `{path.stem}.png`. Mean over seeds and task orders"
        " on test data; ACC with its 95 % bootstrap interval; BWT and the others in points of 100."
        " `KL` is the divergence on inputs of learnt tasks at the end, `worst KL` the largest of a task on the way, by"
        " ten looks a task or as many as the title says, `of retained` the same on what a budget is held on,"
        " `worst drop` the largest fall of a learnt"
        " task's score below that right after it was learnt; `kept` the least share of a step over the layers,"
        " `time` the median ratio of processor time in training to naive's, `memory` what is kept of earlier tasks."
        " nsrl's own strategies are in bold.",
        f"![{figure}]({path.stem}.png)",
    ]
    for table in benchmark_tables(content):
        parts += [f"## {table.title}", table.markdown()]
    if content["failures"]:
        told = [f"* `{name}`: {' '.join(why.split())}" for name, why in content["failures"].items()]
        parts += ["## Without a result", "\n".join(told)]
    versions = ", ".join(
        f"{name} {version}" for name, version in environment["packages"].items() if name in ("nsrl", "torch", "numpy")
    )
    parts.append(
        f"Measured with Python {environment['python']}, {versions}, on {environment['cpu']}, "
        f"{environment['cpus']} cores, one thread a run."
    )
    write_text(path, "\n\n".join(parts) + "\n")
    return path


def draw_benchmarks(content: dict[str, Any], path: Path) -> Path:
    """One panel a benchmark: ACC and its interval, best on top; joint's ACC as a dotted line."""
    from matplotlib.figure import Figure

    names = list(dict.fromkeys(entry["benchmark"] for entry in content["summary"]))
    columns = min(3, len(names))
    lines = -(-len(names) // columns)
    figure = Figure(figsize=(4.3 * columns, 3.6 * lines), layout="constrained")
    axes = figure.subplots(lines, columns, squeeze=False).flatten()
    for axis, name in zip(axes, names, strict=False):
        entries = [entry for entry in content["summary"] if entry["benchmark"] == name]
        _draw_panel(axis, sorted(entries, key=lambda entry: entry["acc"]["mean"]))
        axis.set_title(name.replace("_", " "), fontsize=10)
    for axis in axes[len(names) :]:
        axis.set_visible(False)
    with written_atomically(path) as temporary:
        figure.savefig(temporary, dpi=140)
    return path


def _draw_panel(axis: Any, entries: Sequence[dict[str, Any]]) -> None:
    for position, entry in enumerate(entries):
        acc = {key: 100.0 * value for key, value in entry["acc"].items()}
        strategy = entry["strategy"]
        colour = OURS_COLOUR if strategy in OURS else BOUND_COLOUR if strategy == "joint" else OTHERS_COLOUR
        axis.plot([acc["low"], acc["high"]], [position, position], color=colour, linewidth=2)
        axis.plot(acc["mean"], position, "o", color=colour, markersize=5)
        if strategy == "joint":
            axis.axvline(acc["mean"], color=colour, linestyle=":", linewidth=1)
    axis.set_yticks(range(len(entries)), [entry["strategy"] for entry in entries], fontsize=8)
    axis.set_xlabel("average score at the end (ACC, %)", fontsize=8)
    axis.grid(axis="x", alpha=0.25)
    axis.spines[["top", "right"]].set_visible(False)


def points(value: float | None, *, sign: bool = False) -> str:
    """A share as points of 100."""
    return "-" if value is None or value != value else f"{100 * value:+.1f}" if sign else f"{100 * value:.1f}"


def size(count: float | None) -> str:
    """Bytes in the unit that fits."""
    if count is None:
        return "-"
    for unit in ("B", "kB", "MB"):
        if count < 1000:
            return f"{count:.0f} {unit}" if unit == "B" else f"{count:.1f} {unit}"
        count /= 1000
    return f"{count:.1f} GB"


def _mean(entry: dict[str, Any], key: str) -> float | None:
    return entry[key]["mean"] if key in entry else None
