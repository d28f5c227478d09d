"""A suite's results as one table."""

from __future__ import annotations

from typing import Any

from nsrl.runs.report import Table, scientific


def suite_table(content: dict[str, Any]) -> Table:
    """Mean and 95 % bootstrap interval over seeds of every method.

    `kept`: old-task return as a share of the agent's before; `learnt`: new-task return as a share of plain PPO's.
    """
    first = content["summary"][0]
    rows = [("before fine-tuning", _interval(first["before/old_return"]), _interval(first["before/new_return"]),
             "100 %", "-", "-", "-")]  # fmt: skip
    for entry in content["summary"]:
        rows.append((
            entry["method"], _interval(entry["after/old_return"]), _interval(entry["after/new_return"]),
            _share(entry["old_return_kept"]), _share(entry.get("new_return_of_plain")),
            scientific(entry["after/kl_mean"]["mean"]), scientific(entry["after/kl_heldout"]["mean"]),
        ))  # fmt: skip
    seeds = first["seeds"]
    head = ("method", "old task", "new task", "kept", "learnt", "KL", "held out")
    return Table(head, tuple(rows), f"{content['suite']}, {seeds} seeds, mean [95 % interval]")


def _share(value: dict[str, float] | None) -> str:
    """Mean over seeds of a paired ratio."""
    return "-" if value is None else f"{100 * value['mean']:.0f} %"


def _interval(value: dict[str, float]) -> str:
    return f"{value['mean']:.0f} [{value['low']:.0f}, {value['high']:.0f}]"
