"""The trade-off figure: old-task return against new-task return, one colour a method, one dot a seed."""

from __future__ import annotations

from pathlib import Path
from typing import Any

#: Colours of the methods that keep a budget.
OURS = ("tab:red", "tab:orange", "tab:purple", "tab:green", "tab:brown", "tab:pink")
#: Height of the figure as a share of the old task's return, so that a difference of one step does not fill it.
LEAST_SPAN = 0.2


def draw_tradeoff(content: dict[str, Any], path: Path) -> Path:
    """Draw a suite's runs as a scatter: up is better on the old task, right is better on the new one.

    Penalties are joined by a line through their means, in the order of their coefficients: the frontier to beat.
    """
    from matplotlib import colormaps
    from matplotlib.figure import Figure

    figure = Figure(figsize=(7.2, 4.6), layout="constrained")
    axes = figure.add_subplot()
    methods = list(content["methods"])
    penalties: list[tuple[float, tuple[float, float]]] = []
    other = 0
    for method in methods:
        rows = [row for row in content["rows"] if row["method"] == method]
        kind, trpo = content["methods"][method]["method"], content["methods"][method].get("algorithm") == "trpo"
        x, y = [row["after/new_return"] for row in rows], [row["after/old_return"] for row in rows]
        mean = (sum(x) / len(x), sum(y) / len(y))
        colour: Any
        if kind == "kl_penalty":
            colour, marker = colormaps["Blues"](0.45 + 0.15 * len(penalties)), "s"
            penalties.append((content["methods"][method]["penalty"], mean))
        elif kind == "finetune":
            colour, marker = ("0.2", "P") if trpo else ("0.45", "X")
        else:
            colour, marker = OURS[other % len(OURS)], "D" if trpo else "o"
            other += 1
        axes.scatter(x, y, s=18, color=colour, alpha=0.45, linewidths=0)
        axes.scatter(
            *mean, s=80, color=colour, marker=marker, edgecolors="black", linewidths=0.8, label=method, zorder=3
        )
    if len(penalties) > 1:
        points = [mean for _, mean in sorted(penalties)]
        axes.plot(*zip(*points, strict=True), color="tab:blue", linewidth=1, alpha=0.6, zorder=1)
    before = [row["before/old_return"] for row in content["rows"]]
    level = sum(before) / len(before)
    axes.axhline(level, color="black", linewidth=0.8, linestyle=":", label="old task before")
    low, high = axes.get_ylim()
    missing = max(LEAST_SPAN * abs(level) - (high - low), 0.0)
    axes.set_ylim(low - missing / 2, high + missing / 2)
    axes.set_xlabel("return on the new task after fine-tuning")
    axes.set_ylabel("return on the old task after fine-tuning")
    axes.set_title(content["suite"].replace("_", " "))
    axes.grid(alpha=0.25)
    axes.legend(fontsize=8, loc="center left", bbox_to_anchor=(1.01, 0.5), frameon=False)
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path, dpi=150)
    return path
