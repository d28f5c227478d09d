"""What a run says of itself at its end: one table, and a report.md with the figure."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from nsrl.files import STAMP, write_text
from nsrl.rl.opening.stage import OpeningRecord
from nsrl.runs.folder import RunFolder


@dataclass(frozen=True)
class Table:
    """Rows of text under a head; the command line draws it with rich, the report as Markdown.

    Attributes:
        head: column titles.
        rows: cells.
        title: what the table shows.
    """

    head: tuple[str, ...]
    rows: tuple[tuple[str, ...], ...]
    title: str = ""

    def markdown(self) -> str:
        """The table as Markdown; numbers (all columns but the first) are aligned right."""
        rule = ["---"] + ["---:"] * (len(self.head) - 1)
        lines = [self.head, rule, *self.rows]
        return "\n".join("| " + " | ".join(line) + " |" for line in lines)


def number(value: float | None, digits: int = 1) -> str:
    """A number for a table; a dash where there is none."""
    return "-" if value is None or value != value else f"{value:.{digits}f}"


def scientific(value: float | None) -> str:
    """A KL for a table: two digits, plain while it is readable."""
    if value is None or value != value:
        return "-"
    return "0" if value == 0 else f"{value:.2g}" if value >= 1e-3 else f"{value:.1e}"


def percent(value: float | None) -> str:
    """A share for a table."""
    return "-" if value is None or value != value else f"{100 * value:.1f} %"


def returns(values: dict[str, Any] | None) -> str:
    """Mean and spread of an evaluation's episodes."""
    return "-" if not values else f"{number(values['mean'])} ± {number(values['std'])}"


def duration(seconds: float) -> str:
    """A time in the unit that fits."""
    if seconds < 90:
        return f"{seconds:.0f} s"
    minutes = round(seconds / 60)
    return f"{minutes} min" if minutes < 90 else f"{minutes // 60} h {minutes % 60} min"


def finetuning_table(metrics: dict[str, Any]) -> Table:
    """The final table of a fine-tuning run: before and after."""
    before, after = metrics["before"], metrics["after"]
    rows = [
        ("old-task return", returns(before["old_return"]), returns(after["old_return"])),
        ("new-task return", returns(before["new_return"]), returns(after["new_return"])),
        ("KL on the buffer, mean", scientific(before["kl_mean"]), scientific(after["kl_mean"])),
        ("KL on held-out states, mean", scientific(before["kl_heldout"]), scientific(after["kl_heldout"])),
        ("action agreement", percent(before["agreement"]), percent(after["agreement"])),
    ]
    budget = f", KL budget {metrics['kl_budget']:g}" if metrics["method"] == "null_space" else ""
    title = f"{metrics['name']}: {describe_method(metrics)}{budget}, {metrics['timesteps']:,} steps"
    return Table(("", "before", "after"), tuple(rows), title)


def comparison_table(runs: Sequence[tuple[str, dict[str, Any]]], title: str) -> Table:
    """One table for several methods on the same pair: the agent before, and each method after.

    "held" counts the updates behind which the measured KL was within the budget, of all.
    """
    first = runs[0][1]
    rows = [_comparison_row("before", first["before"])]
    rows += [
        _comparison_row(label, metrics["after"], metrics["training_seconds"], metrics.get("retention", {}))
        for label, metrics in runs
    ]
    head = ("", "old return", "new return", "KL", "held-out KL", "agreement", "held", "time")
    return Table(head, tuple(rows), title)


def _comparison_row(
    label: str, state: dict[str, Any], seconds: float | None = None, retention: Mapping[str, Any] | None = None
) -> tuple[str, ...]:
    held = retention.get("held") if retention else None
    return (
        label,
        returns(state["old_return"]),
        returns(state["new_return"]),
        scientific(state["kl_mean"]),
        scientific(state["kl_heldout"]),
        percent(state["agreement"]),
        "" if held is None or not retention else f"{held} of {retention['updates']}",
        "" if seconds is None else duration(seconds),
    )


def describe_method(metrics: dict[str, Any]) -> str:
    """The method in words."""
    name = metrics.get("algorithm", "ppo").upper()  # runs of before there was a choice have none
    penalties = {"kl_penalty": "KL penalty", "l2": "L2 penalty", "ewc": "EWC penalty", "der": "output replay"}
    if metrics["method"] in penalties:
        return f"{name} with {penalties[metrics['method']]} {metrics['penalty']:g}"
    others = {"null_space": f"NullSpace{name}", "finetune": f"plain {name}", "frozen": f"{name}, last layer only"}
    others |= {"agem": f"{name}, A-GEM", "gradient_only": f"{name}, gradients projected"}
    return others[metrics["method"]]


def write_finetuning_report(folder: RunFolder, metrics: dict[str, Any]) -> None:
    """report.md of a fine-tuning run."""
    table = finetuning_table(metrics)
    seconds = metrics.get("retention", {}).get("seconds", {})
    parts = [
        f"# {table.title}",
        f"Old task `{metrics['old_env']}`, new task `{metrics['new_env']}`, seed {metrics['seed']}. "
        f"Returns are means ± standard deviations over {metrics['after']['old_return']['episodes']} episodes.",
        table.markdown(),
        f"![learning curves]({folder.figure.name})",
        _chosen(metrics),
        f"Wall time {duration(metrics['wall_seconds'])}"
        + (f", of which retention {duration(sum(seconds.values()))}" if seconds else "")
        + f"; {metrics['buffer']['states']} states in the buffer, {metrics['buffer']['heldout']} of them held out.",
        _opening(metrics),
        _files(folder),
    ]
    write_text(folder.report, "\n\n".join(part for part in parts if part) + "\n")


def _opening(metrics: dict[str, Any]) -> str:
    """What was done before the first roll-out, in a line."""
    found = metrics.get("retention", {}).get("opening")
    said = f"Before the first roll-out: {OpeningRecord(**found).text()}." if found else ""
    return "\n\n".join(part for part in (said, hint_of_context(metrics)) if part)


def hint_of_context(metrics: dict[str, Any]) -> str:
    """What to do where nothing that the agent sees tells its tasks apart; empty where something may."""
    if metrics.get("told", True):
        return ""
    return (
        "Nothing in the observations tells the two tasks apart, so that one has to give way where they want different "
        "actions; --context add tells the agent which task it is in."
    )


def _chosen(metrics: dict[str, Any]) -> str:
    """Which policy of the run is handed on."""
    chosen, last = metrics.get("chosen", metrics["timesteps"]), metrics["timesteps"]
    if chosen == last:
        return "The agent is the policy at the end of the run."
    return (
        f"The agent is the policy at {chosen:,} timesteps: of the evaluated ones that kept what they were to keep, the "
        "best at what they were to learn."
    )


def write_pretraining_report(folder: RunFolder, metrics: dict[str, Any]) -> None:
    """report.md of a pretraining run."""
    table = pretraining_table(metrics)
    parts = [
        f"# {table.title}",
        table.markdown(),
        f"![learning curve]({folder.figure.name})",
        f"Wall time {duration(metrics['wall_seconds'])}.",
        _files(folder),
    ]
    write_text(folder.report, "\n\n".join(parts) + "\n")


def pretraining_table(metrics: dict[str, Any]) -> Table:
    """The final table of a pretraining run."""
    rows = (("return", returns(metrics["before"]["return"]), returns(metrics["after"]["return"])),)
    return Table(("", "before", "after"), rows, f"{metrics['env']}: PPO from scratch, {metrics['timesteps']:,} steps")


def collection_table(metrics: dict[str, Any]) -> Table:
    """The final table of a collected buffer."""
    origin = metrics["provenance"]
    rows = (
        ("task", str(origin.get("task"))),
        ("states", f"{metrics['states']} ({metrics['heldout']} held out)"),
        ("selection", str(origin.get("select"))),
        ("return of the agent meanwhile", number(origin.get("return_mean"))),
    )
    return Table(("retention buffer", ""), rows)


def evaluation_table(metrics: dict[str, Any]) -> Table:
    """The table of an evaluation."""
    rows = [(f"return on {env}", returns(found)) for env, found in metrics["returns"].items()]
    if "retention" in metrics:
        kept = metrics["retention"]
        rows += [
            ("KL on the buffer, mean", scientific(kept["kl_mean"])),
            ("KL on held-out states, mean", scientific(kept["kl_heldout"])),
            ("action agreement", percent(kept["agreement"])),
        ]
    episodes = next(iter(metrics["returns"].values()))["episodes"]
    return Table(("", f"{episodes} episodes"), tuple(rows))


def _files(folder: RunFolder) -> str:
    """The list of what lies in the folder."""
    known = {
        folder.agent: "the agent, a stock Stable-Baselines3 zip",
        folder.agent.with_name("vecnormalize.pkl"): "its observation statistics",
        folder.buffer: "the retention buffer",
        folder.metrics: "all results",
        folder.history: "measurements during training",
        folder.config: "the complete configuration",
        folder.path / STAMP: "which nsrl made the folder, and in which format",
        folder.tensorboard: "TensorBoard events",
    }
    # metrics.json is written last, after this report
    return "\n".join(
        f"* `{path.name}`: {text}" for path, text in known.items() if path.exists() or path == folder.metrics
    )
