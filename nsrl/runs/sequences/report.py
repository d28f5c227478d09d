"""What a sequence of tasks says of itself at its end: task x time matrix and metrics, in a table and in a report."""

from __future__ import annotations

from typing import Any

from nsrl.runs.folder import RunFolder, write_text
from nsrl.runs.report import Table, describe_method, duration, number, scientific

DEFINITIONS = """\
Row t is measured after task t, column i on task i, with {episodes} episodes each. Performance is {scale}. Forgetting is
the performance right after a task minus that at the end; forward transfer (AUC - AUC_ref) / (1 - AUC_ref), with AUC the
mean performance on a task while it is learnt and AUC_ref the same for the task alone, from scratch (Continual World,
arXiv 2105.10919). The KL is the mean over a task's states, from the policy that had just learnt it."""


def sequence_table(metrics: dict[str, Any]) -> Table:
    """The matrix of mean returns, and under it what it comes to for each task and in the mean."""
    names = [task["name"] for task in metrics["tasks"]]
    rows = [
        (f"after {name}", *(number(value) for value in row), number(sum(row) / len(row)))
        for name, row in zip(names, metrics["matrix"], strict=True)
    ]
    scaled = metrics["unit"] == "performance"
    digits = 3 if scaled else 1
    if scaled:
        rows.append(_row("performance at the end", names, metrics["performance_by_task"],
                         metrics["average_performance"], digits))  # fmt: skip
    rows.append(_row("forgetting", names, metrics["forgetting_by_task"], metrics["forgetting"], digits))
    if metrics["forward_transfer"] is not None:
        transfers = metrics["forward_transfer_by_task"]
        rows.append(_row("forward transfer", names, transfers, metrics["forward_transfer"], digits))
    rows.append(("KL at the end", *(scientific(metrics["kl_by_task"].get(name)) for name in names), ""))
    rows.append(("KL budget", *(f"{task['kl_budget']:g}" for task in metrics["tasks"][:-1]), "-", ""))
    title = f"{metrics['name']}: {describe_method(metrics)}, {len(names)} tasks, {metrics['timesteps']:,} steps"
    return Table(("mean return", *names, "mean"), tuple(rows), title)


def write_sequence_report(folder: RunFolder, metrics: dict[str, Any]) -> None:
    """report.md of a sequence."""
    table = sequence_table(metrics)
    scale = "the return itself"
    if metrics["unit"] == "performance":
        ranges = "; ".join(f"{task['name']} {task['low']:g} to {task['high']:g}" for task in metrics["tasks"])
        scale = f"linear in the return, from 0 to 1 ({ranges})"
    episodes = metrics["returns"][0][metrics["tasks"][0]["name"]]["episodes"]
    environments = ", ".join(f"{task['name']} (`{task['env']}`)" for task in metrics["tasks"])
    parts = [
        f"# {table.title}",
        f"Tasks: {environments}; seed {metrics['seed']}.",
        table.markdown(),
        " ".join(DEFINITIONS.format(episodes=episodes, scale=scale).split()),
        f"![returns and KL over the sequence]({folder.figure.name})",
        f"Largest share of a task's KL budget after any update {metrics['largest_share']:.3f}; "
        f"{metrics['buffer']['states']} states in the buffer, {metrics['buffer']['heldout']} of them held out. "
        f"Wall time {duration(metrics['wall_seconds'])}.",
        _files(folder),
    ]
    write_text(folder.report, "\n\n".join(parts) + "\n")


def _row(title: str, names: list[str], values: dict[str, float | None], mean: float, digits: int) -> tuple[str, ...]:
    return (title, *(number(values.get(name), digits) for name in names), number(mean, digits))


def _files(folder: RunFolder) -> str:
    known = {
        folder.agent: "the agent after the last task, a stock Stable-Baselines3 zip",
        folder.agent.with_name("vecnormalize.pkl"): "its observation statistics",
        folder.path / "tasks": "the agent and the states of each task",
        folder.path / "references": "the tasks learnt alone",
        folder.buffer: "the states of all tasks, to go on with",
        folder.history: "measurements during training",
        folder.config: "the complete configuration",
        folder.tensorboard: "TensorBoard events",
    }
    lines = [f"* `{path.name}`: {text}" for path, text in known.items() if path.exists()]
    # metrics.json is written last, after this report
    return "\n".join([*lines, f"* `{folder.metrics.name}`: all results"])
