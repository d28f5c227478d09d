"""The page that shows the gallery."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from nsrl.bench.gallery.registry import FIGURES, GUESTS
from nsrl.files import written_atomically
from nsrl.reading.documents import read_results

ROOMS = {
    "beginnings": "Networks at initialisation",
    "motion": "Networks in training",
    "lazy": "Lazy training",
    "dynamics": "Training in closed form",
    "lecture": "Kernel methods",
    "paths": "Path kernels",
    "policies": "Policies",
}
#: Made by drawing all figures at once.
WHOLE = "gallery.json"


def write_page(out: Path) -> Path:
    """Write README.md with every figure that is in the folder."""
    parts = [
        "# Gallery of tangent kernels",
        "Made by `nsrl ntk gallery`; the numbers beside each figure are in its JSON. A slope is given with its "
        "95 % interval and the value that theory expects.",
    ]
    if (out / WHOLE).is_file():
        whole = read_results(out / WHOLE)
        parts.append(
            f"All {whole['figures']} figures took {whole['seconds']:.0f} s with {whole['workers']} processes "
            f"of one thread on {whole['cores']} cores."
        )
    room = ""
    for name, entry in {**FIGURES, **GUESTS}.items():
        source = out / f"{name}.json"
        if not source.is_file() or not (out / f"{name}.png").is_file():
            continue
        if entry.room != room:
            room = entry.room
            parts.append(f"## {ROOMS[room]}")
        content = read_results(source)
        parts += [
            f"### {entry.title}",
            entry.caption,
            f"![{entry.title}]({name}.png)",
            *_tables(content["numbers"] if name in FIGURES else _summary(content)),
        ]
        made = f"`{content['command']}`, {content['seconds']:g} s" if name in FIGURES else f"`nsrl ntk {name}`"
        parts.append(f"{made}; [numbers]({name}.json)")
    path = out / "README.md"
    with written_atomically(path) as temporary:
        temporary.write_text("\n\n".join(part for part in parts if part) + "\n", encoding="utf-8")
    return path


def _summary(content: dict[str, Any]) -> dict[str, Any]:
    """What a guest found, without what it was made of."""
    return {key: value for key, value in content.items() if key not in ("settings", "rows")}


def _tables(numbers: dict[str, Any]) -> list[str]:
    """A table of single numbers, and one more for every group of entries that have the same columns."""
    if _is_grid(numbers):
        return [_grid("", numbers)]
    grids = {key: value for key, value in numbers.items() if isinstance(value, dict) and _is_grid(value)}
    rows = _rows({key: value for key, value in numbers.items() if key not in grids}, "")
    singles = ["| | |", "|---|---:|", *(f"| {name} | {value} |" for name, value in rows)]
    return ["\n".join(singles)] * bool(rows) + [_grid(key, value) for key, value in grids.items()]


def _is_grid(value: dict[str, Any]) -> bool:
    entries = list(value.values())
    if len(entries) < 2 or any(not isinstance(entry, dict) or "expected" in entry for entry in entries):
        return False
    return all(list(entry) == list(entries[0]) for entry in entries)


def _grid(name: str, value: dict[str, dict[str, Any]]) -> str:
    columns = list(next(iter(value.values())))
    head = [f"| {' | '.join([name, *columns])} |", f"|---|{'---:|' * len(columns)}"]
    return "\n".join([*head, *(f"| {' | '.join([key, *map(_text, row.values())])} |" for key, row in value.items())])


def _rows(value: Any, name: str) -> list[tuple[str, str]]:
    if isinstance(value, dict) and "expected" in value:
        text = f"{value['slope']:.3f} [{value['low']:.3f}, {value['high']:.3f}], expected {value['expected']:g}"
        return [(f"slope of {name}", text)]
    if isinstance(value, dict):
        rows = [_rows(entry, f"{name}, {key}" if name else str(key)) for key, entry in value.items()]
        return [row for group in rows for row in group]
    return [(name, _text(value))]


def _text(value: Any) -> str:
    if value is None:
        return "-"
    if isinstance(value, bool):
        return "yes" if value else "no"
    if isinstance(value, list | tuple):
        return ", ".join(map(_text, value))
    return f"{value:.3g}" if isinstance(value, float) else str(value)
