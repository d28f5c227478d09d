"""The order of the house: imports point downward only, no circle, no crowded folder, and every package has a face.

All imports count, deferred ones and those under TYPE_CHECKING too: read by one walk over the syntax trees.
"""

from __future__ import annotations

import ast
import importlib
import re
from collections.abc import Iterator
from functools import lru_cache
from itertools import pairwise
from pathlib import Path

import pytest

# imported here: it sets environment variables, which no test may do
pytest.importorskip("sklearn")

ROOT = Path(__file__).parents[1]
#: From the top down; a room may import from those below it. Rooms on one floor do not know each other.
HOUSE: tuple[tuple[str, ...], ...] = (
    ("nsrl.cli",),
    ("nsrl.bench",),
    ("nsrl.runs",),
    ("nsrl.analysis",),
    ("nsrl.rl", "nsrl.continual", "nsrl.editing"),
    ("nsrl.ntk",),
    ("nsrl.projection",),
    ("nsrl.files",),
    ("nsrl.reading",),
    ("nsrl.versions",),
    ("nsrl.errors", "nsrl.face"),
)
RL = (
    ("nsrl.rl.training",),
    ("nsrl.rl.algorithms",),
    ("nsrl.rl.budget", "nsrl.rl.surgery"),
    ("nsrl.rl.opening",),
    ("nsrl.rl.retention",),
    ("nsrl.rl.playing", "nsrl.rl.parallel"),
    ("nsrl.rl.agents",),
    ("nsrl.rl.policies",),
)
PROJECTION = (
    ("nsrl.projection.constraints",),
    ("nsrl.projection.budget",),
    ("nsrl.projection.solvers",),
    ("nsrl.projection.jacobians",),
    ("nsrl.projection.optimizer", "nsrl.projection.precision", "nsrl.projection.metrics", "nsrl.projection.hooks"),
    ("nsrl.projection.roots",),
)
#: Python files in a folder, at most.
CROWD = 22


@lru_cache(maxsize=1)
def modules() -> dict[str, Path]:
    """Every module of the package, by its dotted name."""
    found = {}
    for path in sorted((ROOT / "nsrl").rglob("*.py")):
        parts = path.relative_to(ROOT).with_suffix("").parts
        found[".".join(parts[:-1] if parts[-1] == "__init__" else parts)] = path
    return found


def imported(path: Path) -> Iterator[str]:
    """Modules of the package that a file imports, wherever in the file."""
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.Import):
            names = [alias.name for alias in node.names]
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{path}: imports are absolute here"
            names = [
                name if (name := f"{node.module}.{alias.name}") in modules() else str(node.module)
                for alias in node.names
            ]
        else:
            continue
        yield from (name for name in names if name in modules())


@lru_cache(maxsize=1)
def graph() -> dict[str, set[str]]:
    """Which modules a module imports."""
    return {name: set(imported(path)) - {name} for name, path in modules().items()}


def is_face(module: str) -> bool:
    return modules()[module].name == "__init__.py"


def floor_of(module: str, floors: tuple[tuple[str, ...], ...]) -> tuple[int, str] | None:
    """Floor (0 the top) and room of a module, None where the floors do not name it."""
    for floor, rooms in enumerate(floors):
        for room in rooms:
            if module == room or module.startswith(f"{room}."):
                return floor, room
    return None


@pytest.mark.parametrize("floors", [HOUSE, RL, PROJECTION], ids=["house", "rl", "projection"])
def test_imports_point_downward_only(floors: tuple[tuple[str, ...], ...]) -> None:
    upward = []
    for module, targets in graph().items():
        here = floor_of(module, floors)
        for target in targets:
            there = floor_of(target, floors)
            if here and there and here[1] != there[1] and here[0] >= there[0]:
                upward.append(f"{module} -> {target}")
    assert not upward, "\n".join(sorted(upward))


def test_every_module_has_a_floor() -> None:
    homeless = [module for module in modules() if module != "nsrl" and floor_of(module, HOUSE) is None]
    for package, floors in (("nsrl.rl", RL), ("nsrl.projection", PROJECTION)):
        inside = [module for module in modules() if module.startswith(f"{package}.")]
        homeless += [module for module in inside if floor_of(module, floors) is None]
    assert not homeless, f"these files belong to no room: {homeless}"


def test_there_is_no_circle() -> None:
    done: set[str] = set()

    def follow(module: str, way: list[str]) -> None:
        if module in way:
            circle = [*way[way.index(module) :], module]
            pytest.fail("circle: " + " -> ".join(circle))
        if module not in done:
            for target in sorted(graph()[module]):
                follow(target, [*way, module])
            done.add(module)

    for module in modules():
        follow(module, [])


def test_no_folder_is_crowded() -> None:
    folders: dict[Path, int] = {}
    for path in modules().values():
        folders[path.parent] = folders.get(path.parent, 0) + 1
    crowded = {str(folder.relative_to(ROOT)): count for folder, count in folders.items() if count > CROWD}
    assert not crowded


@pytest.mark.parametrize("package", sorted(name for name in modules() if is_face(name)))
def test_a_package_says_what_is_public(package: str) -> None:
    face = importlib.import_module(package)
    assert isinstance(face.__all__, list) and len(set(face.__all__)) == len(face.__all__)
    missing = [name for name in face.__all__ if getattr(face, name, None) is None]
    assert not missing, f"{package}.__all__ names {missing}, which are not there"
    assert face.__doc__, f"{package} says in no docstring what lives there"


def test_a_face_is_not_used_from_inside() -> None:
    """A module that imports the face of its own package imports everything in it, and itself."""
    inside = [
        f"{module} -> {target}"
        for module, targets in graph().items()
        for target in targets
        if target != "nsrl" and is_face(target) and module.startswith(f"{target}.")
    ]
    assert not inside, "\n".join(inside)


def test_the_walk_sees_deferred_imports_and_those_for_types_only(tmp_path: Path) -> None:
    path = tmp_path / "module.py"
    path.write_text(
        "from typing import TYPE_CHECKING\nif TYPE_CHECKING:\n    from nsrl.errors import NsrlError\n"
        "def f():\n    from nsrl.projection import optimizer\n    import nsrl.files\n"
    )
    assert list(imported(path)) == ["nsrl.errors", "nsrl.projection.optimizer", "nsrl.files"]


def test_the_floors_are_told_apart() -> None:
    order = [floor_of(name, HOUSE) for name in ("nsrl.cli.main", "nsrl.bench.demo", "nsrl.runs.tasks", "nsrl.errors")]
    assert all(above < below for above, below in pairwise(order))


#: Rooms whose README lies one level up.
INSIDE = ("sequences", "suites", "studies", "speed", "cost", "gallery", "strategies", "benchmarks", "path")


@pytest.mark.parametrize("package", sorted(n for n in modules() if is_face(n) and "." in n))
def test_a_room_says_in_a_page_what_lives_in_it(package: str) -> None:
    folder = modules()[package].parent
    if folder.name in INSIDE:
        folder = folder.parent
    page = folder / "README.md"
    assert page.is_file(), f"{package} has no README.md"
    text = page.read_text(encoding="utf-8")
    assert len(text.splitlines()) <= 40
    named = set(re.findall(r"`([\w/]+\.py|[\w/]+/)`", text))
    missing = {name for name in named if not (folder / name).exists() and not (ROOT / name).exists()}
    assert not missing, f"{page} names {missing}, which are not there"
    if package.startswith(("nsrl.rl", "nsrl.projection", "nsrl.runs")) and folder == modules()[package].parent:
        files = {path.stem for path in folder.glob("*.py")} - {"__init__"}
        assert not {stem for stem in files if f"{stem}" not in text}, "a file that its room's page does not name"
