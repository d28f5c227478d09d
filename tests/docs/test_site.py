"""The site: every public name has its place, and the leaderboard is what its command makes of the results."""

from __future__ import annotations

import ast
import importlib
import math
import re
import runpy
from pathlib import Path
from typing import Any

import pytest

# imported here: it sets environment variables, which no test may do
pytest.importorskip("sklearn")

ROOT = Path(__file__).parents[2]


def test_every_public_name_is_on_a_page_of_the_site() -> None:
    pages = "\n".join(path.read_text(encoding="utf-8") for path in (ROOT / "docs" / "api").glob("*.md"))
    shown = {line.split()[-1] for line in pages.splitlines() if line.startswith(".. automodule::")}
    documented = {id(getattr(importlib.import_module(face), name)) for face in shown for name in face_of(face)}
    packages = [path.parent for folder in ("nsrl", "envs/nsrl_envs") for path in (ROOT / folder).rglob("__init__.py")]
    missing = []
    for package in packages:
        face = ".".join(package.relative_to(ROOT / "envs" if "envs" in package.parts else ROOT).parts)
        if face.startswith(("nsrl.bench", "nsrl.cli", "nsrl.continual.", "nsrl.projection.")):
            continue  # told by their commands, or on the page of the package above
        found = importlib.import_module(face)
        missing += [
            f"{face}.{name}"
            for name in face_of(face)
            if not name.startswith("__") and id(getattr(found, name)) not in documented
        ]
    assert not missing


def test_every_page_that_is_linked_to_is_a_page_of_the_site() -> None:
    """Sphinx says so too, and stops; here it is found without Sphinx."""
    tree = ast.parse((ROOT / "docs" / "conf.py").read_text(encoding="utf-8"))
    (elsewhere,) = [
        ast.literal_eval(node.value)
        for node in tree.body
        if isinstance(node, ast.Assign) and isinstance(node.targets[0], ast.Name) and node.targets[0].id == "ELSEWHERE"
    ]
    pages = {ROOT / "README.md", *(ROOT / place for place in elsewhere.values()), *(ROOT / "docs").rglob("*.md")}
    sources = [path for path in pages if path.name != "README.md" or path.parent.name != "docs"]
    missing = []
    for path in sources:
        for target in re.findall(r"\]\((?!https?:|#)([^)\s#]+\.md)", path.read_text(encoding="utf-8")):
            found = (path.parent / target).resolve()
            if found not in pages and "examples" not in found.relative_to(ROOT).parts and path != ROOT / "README.md":
                missing.append(f"{path.relative_to(ROOT)}: {target}")
    assert not missing, "give it a page in docs/ and a line in ELSEWHERE of docs/conf.py"


def face_of(package: str) -> list[str]:
    return list(getattr(importlib.import_module(package), "__all__", []))


def test_the_leaderboard_is_what_its_command_writes(tmp_path: Path) -> None:
    page = runpy.run_path(str(ROOT / "docs" / "leaderboard.py"))["page"]
    written = (ROOT / "docs" / "leaderboard.md").read_text(encoding="utf-8")
    assert written == page(ROOT / "runs" / "reference"), "run make leaderboard and commit the page"


def test_the_tables_of_promises_are_what_their_command_writes() -> None:
    page = runpy.run_path(str(ROOT / "docs" / "reliability.py"))["page"]
    written = (ROOT / "docs" / "reliability.md").read_text(encoding="utf-8")
    assert written == page(written, ROOT / "runs" / "reference"), "run make reliability and commit the page"


def test_the_tables_of_the_plan_are_what_their_command_writes() -> None:
    made = runpy.run_path(str(ROOT / "docs" / "scale.py"))
    written = (ROOT / "docs" / "scale.md").read_text(encoding="utf-8")
    assert written == made["page"](written, ROOT / "runs" / "reference"), "run make scale and commit the page"
    # what the text says in figures of its own
    width = made["WIDTH"]
    assert 12 * width**2 * made["LAYERS"] == made["parameters"]() == 100_663_296_000
    features = made["cost"]("features", made["ASSUMED"])
    assert features.gathering_bytes == 8 * (5 * width**2 + (4 * width) ** 2) * 80 == pytest.approx(1.4e12, rel=0.02)
    assert features.projecting_exchanged_bytes == 0.0
    kronecker = made["cost"]("kronecker", made["ASSUMED"])
    assert kronecker.projecting_exchanged_bytes == pytest.approx(4 * made["parameters"]() / 4)
    assert math.sqrt(math.log(1e6) / 2e6) == pytest.approx(2.6e-3, rel=0.02)  # Hoeffding's bound


def test_a_promise_that_was_not_kept_is_counted() -> None:
    made = runpy.run_path(str(ROOT / "docs" / "reliability.py"))
    agent = {"name": "a", "env": "E-v0", "stage": "stock", "status": "ok", "kl": 0.004, "kl_stock": 0.004}
    agent |= {"same_actions": True, "enjoy": "played"}
    bad = agent | {"kl": 0.02, "kl_stock": 0.03, "same_actions": False, "enjoy": "no such wrapper"}
    agents = {"rows": [agent, bad], "steps": 2000, "budget": 0.01}
    fuzz = {"rows": [{"target": "t", "mutations": 10, "read": 2, "refused": 7, "3: KeyError: x": 1}]}
    text = made["promises"](agents, fuzz, [{"held": 3, "updates": 4}])
    for said in (
        "3 of 4 updates",
        "largest KL 0.02",
        "2 of 2 agents",
        "1 with the same",
        "1 of 2 agents",
        "1 with anot",
    ):
        assert said in text
    assert made["fuzz_table"](fuzz).rows == (("`t`", "10", "7", "2", "1"),)
    assert [row[5:] for row in made["agents_table"](agents).rows] == [("same", "played"), ("others", "no such wrapper")]


def test_what_the_promises_name_exists() -> None:
    text = (ROOT / "docs" / "reliability.md").read_text(encoding="utf-8")
    named = re.findall(r"`(tests/[\w/.]+)`", text)
    assert len(named) > 10 and [name for name in named if not (ROOT / name).exists()] == []


def test_the_leaderboard_ranks_by_what_is_learnt_among_those_that_keep_the_old_task() -> None:
    table = runpy.run_path(str(ROOT / "docs" / "leaderboard.py"))["pair_table"]

    def entry(method: str, kept: float, new: float) -> dict[str, Any]:
        same = {"low": 0.0, "high": 0.0}
        values = {
            "after/old_return": 100.0 * kept,
            "after/new_return": new,
            "after/kl_mean": 0.1,
            "after/kl_heldout": 0.1,
        }
        return {
            "method": method,
            "seeds": 3,
            "old_return_kept": {"mean": kept},
            **{key: {"mean": value, **same} for key, value in values.items()},
        }

    entries = [
        entry("forgets", 0.3, 9.0),
        entry("slow", 1.0, 2.0),
        entry("good", 0.96, 5.0),
        entry("nearly", 0.94, 6.0),
    ]
    rows = table({"summary": entries}).rows
    assert [row[:2] for row in rows] == [("good", "1"), ("slow", "2"), ("forgets", "-"), ("nearly", "-")]


def test_every_page_is_in_the_contents_of_the_site() -> None:
    docs = ROOT / "docs"
    for index in (docs / "index.md", docs / "api" / "index.md"):
        trees = re.findall(r"```\{toctree\}\n(.*?)```", index.read_text(encoding="utf-8"), flags=re.DOTALL)
        listed = [line for tree in trees for line in tree.split() if not line.startswith(":")]
        pages = {path.stem for path in index.parent.glob("*.md")} - {"index"}
        assert pages <= {name.partition("/")[0] for name in listed}, "name the page in the index beside it"
