"""The page that shows the gallery."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from nsrl.ntk.gallery.registry import FIGURES, GUESTS
from nsrl.rl.archive import written_atomically

ROOMS = {
    "beginnings": "Networks at initialisation",
    "motion": "Networks in training",
    "lazy": "Lazy training",
    "dynamics": "Training in closed form",
    "lecture": "Kernel methods",
    "paths": "Path kernels",
    "policies": "Policies",
}
#: Entries of a section's table; the JSON has all.
ROWS = 12


def write_page(out: Path) -> Path:
    """Write README.md with every figure that is in the folder."""
    parts = ["# Gallery of tangent kernels",
             "Made by `nsrl ntk gallery`; the numbers beside each figure are in its JSON. A slope is given with its "
             "95 % interval and the value that theory expects."]  # fmt: skip
    room = ""
    for name, entry in {**FIGURES, **GUESTS}.items():
        source = out / f"{name}.json"
        if not source.is_file() or not (out / f"{name}.png").is_file():
            continue
        if entry.room != room:
            room = entry.room
            parts.append(f"## {ROOMS[room]}")
        content = json.loads(source.read_text(encoding="utf-8"))
        parts += [
            f"### {entry.title}",
            entry.caption,
            f"![{entry.title}]({name}.png)",
            _table(content.get("numbers", content)),
        ]
        made = f"`{content['command']}`, {content['seconds']:g} s" if name in FIGURES else f"`nsrl ntk {name}`"
        parts.append(f"{made}; [numbers]({name}.json)")
    path = out / "README.md"
    with written_atomically(path) as temporary:
        temporary.write_text("\n\n".join(part for part in parts if part) + "\n", encoding="utf-8")
    return path


def _table(numbers: dict[str, Any]) -> str:
    rows = _rows(numbers, "")[:ROWS]
    return "\n".join(["| | |", "|---|---:|", *(f"| {name} | {value} |" for name, value in rows)]) if rows else ""


def _rows(value: Any, name: str) -> list[tuple[str, str]]:
    if isinstance(value, dict) and "expected" in value:
        text = f"{value['slope']:.3f} [{value['low']:.3f}, {value['high']:.3f}], expected {value['expected']:g}"
        return [(f"slope of {name}", text)]
    if isinstance(value, dict):
        value = {key: entry for key, entry in value.items() if key not in ("settings", "rows")}
        rows = [_rows(entry, f"{name}, {key}" if name else str(key)) for key, entry in value.items()]
        return [row for group in rows for row in group]
    if isinstance(value, bool):
        return [(name, "yes" if value else "no")]
    if isinstance(value, int | float):
        return [(name, f"{value:.3g}" if isinstance(value, float) else str(value))]
    return []
