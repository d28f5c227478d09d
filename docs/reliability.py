"""Writes the tables of promises into docs/reliability.md from the results under runs/reference: `make reliability`.

Every figure is one of a committed JSON; the rest of the page is written by `tests/reading/hostile/table.py`.
"""

from __future__ import annotations

import json
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from nsrl.runs.report import Table

ROOT = Path(__file__).parents[1]
#: What the tables lie between.
BEGIN, END = "<!-- made by `make reliability` -->", "<!-- end of what `make reliability` makes -->"
#: A method of the frontier that promises a budget.
OURS = ("NullSpacePPO", "NullSpaceTRPO")


def page(text: str, reference: Path) -> str:
    """The page with the tables made anew.

    Args:
        text: of the page.
        reference: folder of the committed results.
    """
    head, _, rest = text.partition(BEGIN)
    tail = rest.partition(END)[2]
    return f"{head}{BEGIN}\n\n{tables(reference)}\n{END}{tail}"


def tables(reference: Path) -> str:
    """What is promised, the kinds of file that were mutated, and the agents that were tried."""
    agents, fuzz = (json.loads((reference / f"{name}.json").read_text(encoding="utf-8")) for name in ("agents", "fuzz"))
    parts = [
        promises(agents, fuzz, frontier_rows(reference / "frontier")),
        "`python -m tests.reading.hostile.fuzz --record runs/reference/fuzz.json FOLDER 10000 1 TARGET ...`: "
        "[numbers](../runs/reference/fuzz.json). What lies around the mutated part is made anew.",
        fuzz_table(fuzz).markdown(),
        "`nsrl bench agents FOLDER`, with rl_zoo3 and Box2D installed: [numbers](../runs/reference/agents.json). "
        f"{agents['steps']:,} steps on the task with its rewards negated; the KL as reported, and of the export in "
        "stock Stable-Baselines3 by torch's own formula.",
        agents_table(agents).markdown(),
    ]
    return "\n\n".join(parts) + "\n"


def frontier_rows(folder: Path) -> list[dict[str, Any]]:
    """The frontier's runs of methods that promise a budget."""
    lines = [line for path in sorted(folder.glob("*.jsonl")) for line in path.read_text(encoding="utf-8").splitlines()]
    return [row for row in map(json.loads, lines) if row["method"].startswith(OURS)]


def promises(agents: dict[str, Any], fuzz: dict[str, Any], runs: Sequence[dict[str, Any]]) -> str:
    """A row a promise: how it is tested, and what was counted."""
    rows = agents["rows"]
    held, updates = (sum(run[name] for run in runs) for name in ("held", "updates"))
    ended = sum(row["stage"] == "stock" and row["status"] == "ok" for row in rows)
    same, played = (
        sum(row[name] == good for row in rows) for name, good in (("same_actions", True), ("enjoy", "played"))
    )
    most, stock = (max(row[name] for row in rows if row[name] is not None) for name in ("kl", "kl_stock"))
    mutations, odd = sum(row["mutations"] for row in fuzz["rows"]), sum(map(others, fuzz["rows"]))
    found = (
        (
            "behind every update the measured KL is at most the budget; otherwise the run ends with the last measured "
            "feasible weights",
            "`tests/rl/budget`, `tests/rl/algorithms`; `nsrl bench frontier`",
            f"held behind {held:,} of {updates:,} updates in {len(runs)} runs of the frontier; {len(rows)} public "
            f"agents at budget {agents['budget']:g}: largest KL {most:.9f}",
        ),
        (
            "what is no longer what was protected (environment, statistics, weights, modules, thawed parameters) is "
            "refused, not measured past, and neither reported nor exported",
            "`tests/rl/budget/test_promises.py`, `tests/rl/policies/test_steadiness.py`",
            "",
        ),
        (
            "an exception, Ctrl-C or a number that is none leaves the policy as it was last measured",
            "`tests/rl/budget/test_promises.py`, `tests/rl/opening/test_stage.py`, "
            "`tests/rl/algorithms/test_numbers.py`",
            "",
        ),
        (
            "agents that others saved load, learn, export and act the same in stock Stable-Baselines3, at the KL that "
            "is reported",
            "`tests/field`; `nsrl bench agents FOLDER`",
            f"{ended} of {len(rows)} agents of DLR-RM/rl-trained-agents come to the end, {same} with the same actions; "
            f"largest KL in stock {stock:.9f}",
        ),
        (
            "rl_zoo3's `enjoy` plays what is exported for it",
            "`tests/field`; `nsrl bench agents FOLDER`, where rl_zoo3 is installed",
            f"{played} of {len(rows)} agents",
        ),
        ("arguments of the wrong kind are one sentence", "`tests/rl/test_wrong_arguments.py`", ""),
        (
            "wrong command lines and configurations are one sentence, exit code 2, nothing written",
            "`tests/cli/test_wrong_command_lines.py`; by seed, every key of every command: "
            "`tests/cli/test_fuzzed_command_lines.py`",
            "",
        ),
        (
            "a killed or interrupted run, a full disk, two writers: what was written stays, `--resume` goes on",
            "`tests/cli/test_interruption.py`, `tests/cli/test_full_disk.py`, `tests/runs/test_lock.py`, "
            "`tests/bench/test_lifeline.py`",
            "",
        ),
        (
            "a changed checkpoint is refused before anything is touched",
            "`tests/rl/training/test_wrong_checkpoints.py`",
            "",
        ),
        (
            "files of others are read as data, within bounds",
            "`tests/reading/test_hostile_files.py`",
            "last table below",
        ),
        (
            "damaged files are read or refused in a sentence, and nothing else",
            "`tests/reading/test_mutations.py`, 10,000 a part with `make test-all`",
            f"{mutations:,} mutations of {len(fuzz['rows'])} parts of files: {odd} with another end",
        ),
    )
    return Table(("promised", "how it is tested", "figures"), found).markdown()


def others(row: dict[str, Any]) -> int:
    """Mutations of a part that ended neither in a value nor in a sentence."""
    return row["mutations"] - row.get("read", 0) - row.get("refused", 0)


def fuzz_table(fuzz: dict[str, Any]) -> Table:
    """A row a part of a file."""
    rows = [
        (
            f"`{row['target']}`",
            f"{row['mutations']:,}",
            f"{row.get('refused', 0):,}",
            f"{row.get('read', 0):,}",
            str(others(row)),
        )
        for row in fuzz["rows"]
    ]
    return Table(("part of a file", "mutations", "refused in a sentence", "read", "anything else"), tuple(rows))


def agents_table(agents: dict[str, Any]) -> Table:
    """A row an agent."""
    rows = [
        (
            row["name"],
            row["env"] or "",
            row["status"] if row["status"] == "ok" else f"{row['stage']}: {row['status']}",
            told(row["kl"]),
            told(row["kl_stock"]),
            {True: "same", False: "others", None: ""}[row["same_actions"]],
            row["enjoy"] or "not tried",
        )
        for row in agents["rows"]
    ]
    head = ("agent", "environment", "outcome", "KL", "in stock SB3", "actions there", "rl_zoo3's enjoy")
    return Table(head, tuple(rows))


def told(value: float | None) -> str:
    """A KL in four digits: of two, one just inside the budget looks like the budget."""
    return "" if value is None else f"{value:.4g}"


if __name__ == "__main__":
    target = Path(sys.argv[1]) if len(sys.argv) > 1 else ROOT / "docs" / "reliability.md"
    target.write_text(page(target.read_text(encoding="utf-8"), ROOT / "runs" / "reference"), encoding="utf-8")
