"""Writes docs/leaderboard.md from the results under runs/reference: `make leaderboard`.

Every number of the page is one of a committed JSON; a suite whose JSON is added there is on the page the next time.
"""

from __future__ import annotations

import json
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from nsrl.runs.report import Table, scientific

ROOT = Path(__file__).parents[1]
#: Share of the old task's return that has to be kept, on average over seeds, to be ranked.
KEPT = 0.95
HEAD = """\
# Leaderboard

Made by `make leaderboard` from the JSON under `runs/reference/`; no number here is typed by hand. Means over seeds with
95 % bootstrap intervals in brackets; ranks are those of the means, and where intervals overlap, they say little. What
the tables mean and what else was found: [results](results.md).

To add an entry: add a method to the suite's configuration (or a suite of your own beside it), run `nsrl bench NAME`,
which measures what is missing and writes `runs/reference/NAME.json`, then `make leaderboard`, and commit the three
together. An entry of another machine belongs into a suite of its own: rounding differs from processor to processor, and
one seed's training with it.
"""


def page(reference: Path) -> str:
    """The page, as Markdown."""
    return "\n".join([HEAD, *sections(reference)])


def sections(reference: Path) -> Iterator[str]:
    """One section a file of results."""
    read = {path: json.loads(path.read_text(encoding="utf-8")) for path in sorted(reference.glob("*.json"))}
    suites = {path: content for path, content in read.items() if "suite" in content}
    for path, content in sorted(suites.items(), key=lambda item: "tasks" in item[1]):
        table = sequence_table(content) if "tasks" in content else pair_table(content)
        yield section(f"{path.stem}", f"nsrl bench {path.stem}", path, content, table)
    if any((reference / "frontier").glob("*.jsonl")):
        yield "\n".join(frontier_lines(reference / "frontier"))
    continual = reference / "continual" / "continual.json"
    if continual.is_file():
        content = json.loads(continual.read_text(encoding="utf-8"))
        yield section(
            "Supervised continual learning", "nsrl bench continual", continual, content, accuracy_table(content)
        )
    for name, title, table in (
        ("trpo", "TRPO without a constraint", trpo_table),
        ("speed", "Speed of the core", speed_table),
    ):
        path = reference / f"{name}.json"
        if path in read:
            yield section(title, f"nsrl bench {name}", path, read[path], table(read[path]))


def frontier_lines(folder: Path) -> Iterator[str]:
    """The frontier's tables, a pair each, of methods that were run on all agents."""
    from nsrl.bench.studies.frontier_plan import KINDS, MULTIPLES, PAIRS, SEEDS
    from nsrl.bench.studies.frontier_report import pair_table, read_rows, scores

    yield "## The frontier\n"
    yield "`nsrl bench frontier`; how to read it: [report](../runs/reference/frontier/report.md).\n"
    whole = len(KINDS) * len(MULTIPLES) * len(SEEDS)
    for pair in PAIRS:
        rows = read_rows(folder, pair)
        counts = {name: sum(row["method"] == name for row in rows) for name in {row["method"] for row in rows}}
        rows = [row for row in rows if counts[row["method"]] == whole]
        if rows:
            table = pair_table(scores(rows), pair)
            yield f"### {table.title}\n\n{table.markdown()}\n"


def section(title: str, command: str, path: Path, content: dict[str, Any], table: Table) -> str:
    """A heading, the command and the machine, and the table."""
    made = content["environment"]
    versions = ", ".join(f"{name} {made['packages'][name]}" for name in ("nsrl", "torch") if name in made["packages"])
    link = f"../runs/reference/{path.relative_to(path.parents[1] if path.stem == 'continual' else path.parent)}"
    about = f"`{command}`; [numbers]({link}); {versions}, {made['cpus']} cores ({made['cpu']}). {table.title}"
    return f"## {title}\n\n{about}\n\n{table.markdown()}\n"


def pair_table(content: dict[str, Any]) -> Table:
    """Methods of a task pair: those that keep the old task first, by what they learn."""

    def learnt(entry: dict[str, Any]) -> float:
        return entry["after/new_return"]["mean"]

    ranked, others = [], []
    for entry in sorted(content["summary"], key=learnt, reverse=True):
        (ranked if entry["old_return_kept"]["mean"] >= KEPT else others).append(entry)
    rows = [
        (
            entry["method"],
            str(number + 1) if entry in ranked else "-",
            f"{100 * entry['old_return_kept']['mean']:.0f} %",
            interval(entry["after/old_return"]),
            interval(entry["after/new_return"]),
            nats(entry["after/kl_mean"]["mean"]),
            nats(entry["after/kl_heldout"]["mean"]),
        )
        for number, entry in enumerate([*ranked, *others])
    ]
    seeds = content["summary"][0]["seeds"]
    title = f"{seeds} seeds; ranked by the new task's return among those that keep {100 * KEPT:.0f} % of the old."
    head = ("method", "rank", "kept", "old task", "new task", "KL on buffer", "held out")
    return Table(head, tuple(rows), title)


def sequence_table(content: dict[str, Any]) -> Table:
    """Methods of a sequence of tasks, by their average performance at its end."""
    rows = [
        (
            entry["method"],
            percent(entry["average_performance"]),
            percent(entry["forgetting"]),
            nats(entry["largest_share"]["mean"]),
        )
        for entry in sorted(content["summary"], key=lambda entry: -entry["average_performance"]["mean"])
    ]
    title = f"{content['summary'][0]['seeds']} seeds; ranked by average performance on all tasks at the end."
    return Table(("method", "average performance", "forgetting", "largest KL / budget"), tuple(rows), title)


def accuracy_table(content: dict[str, Any]) -> Table:
    """Strategies by benchmark: average accuracy at the end and backward transfer, in points."""
    found = {(entry["benchmark"], entry["strategy"]): entry for entry in content["summary"]}
    benchmarks = list(dict.fromkeys(name for name, _ in found))

    def overall(strategy: str) -> float:
        return sum(found[name, strategy]["acc"]["mean"] for name in benchmarks) / len(benchmarks)

    strategies = [
        name for name in dict.fromkeys(name for _, name in found) if all((b, name) in found for b in benchmarks)
    ]
    rows = [
        (
            name,
            *(
                f"{100 * found[b, name]['acc']['mean']:.1f} / {100 * found[b, name]['bwt']['mean']:+.1f}"
                for b in benchmarks
            ),
        )
        for name in sorted(strategies, key=overall, reverse=True)
    ]
    head = ("strategy", *(name.replace("_", " ") for name in benchmarks))
    runs = content["summary"][0]["runs"]
    return Table(
        head, tuple(rows), f"{runs} runs each; ACC / BWT, ranked by the mean ACC; `joint` sees all data at once."
    )


def trpo_table(content: dict[str, Any]) -> Table:
    """Returns at the end, and the time of one update."""
    names = {"stock": "sb3_contrib.TRPO", "null_space": "NullSpaceTRPO"}
    seconds = {entry["env"]: entry["medians"] for entry in content["updates"]}
    rows = [
        (
            entry["env"],
            names[entry["algorithm"]],
            f"{entry['final']:.1f}",
            f"{entry['lowest']:.1f}",
            str(entry["seeds"]),
            f"{1000 * seconds[entry['env']][entry['algorithm']]:.0f} ms",
        )
        for entry in content["returns"]
        if entry["algorithm"] in names
    ]
    head = ("task", "algorithm", "return at the end", "lowest seed", "seeds", "one update")
    return Table(head, tuple(rows), "The same hyper-parameters, from scratch.")


def speed_table(content: dict[str, Any]) -> Table:
    """Median seconds of every method that was timed, fastest first."""
    rows = [
        (case["title"], name, duration(method["median"]))
        for case in content["cases"].values()
        for name, method in sorted(case["methods"].items(), key=lambda item: item[1].get("median") or 0.0)
        if method.get("median") is not None
    ]
    return Table(("case", "method", "median"), tuple(rows), f"{content['settings']['threads']} threads.")


def interval(value: dict[str, float]) -> str:
    """A mean return and its interval."""
    return f"{value['mean']:.0f} [{value['low']:.0f}, {value['high']:.0f}]"


def nats(value: float) -> str:
    """A KL in two digits, written out where it is large."""
    return f"{value:.0f}" if value >= 10 else scientific(value)


def duration(seconds: float) -> str:
    """Three digits, in milliseconds below a second."""
    return f"{seconds:.3g} s" if seconds >= 1 else f"{1000 * seconds:.3g} ms"


def percent(value: dict[str, float]) -> str:
    """A mean share and its interval."""
    mean, low, high = (round(100 * value[key]) for key in ("mean", "low", "high"))
    return f"{mean} % [{low}, {high}]"


if __name__ == "__main__":
    target = Path(sys.argv[1]) if len(sys.argv) > 1 else ROOT / "docs" / "leaderboard.md"
    target.write_text(page(ROOT / "runs" / "reference"), encoding="utf-8")
