"""Rules of the tests themselves, read from their source: what makes one depend on another, on the clock or on luck."""

from __future__ import annotations

import ast
from collections.abc import Iterator
from pathlib import Path

TESTS = Path(__file__).parent
FILES = sorted(TESTS.rglob("*.py"))
#: Longest sleep, seconds: a loop may look again after a moment, none waits for something to have happened.
LONGEST = 0.3

TREES = {str(path.relative_to(TESTS)): ast.parse(path.read_text()) for path in FILES}


def imported(tree: ast.AST) -> Iterator[str]:
    """Every name that a file imports, with its module's."""
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            yield from (f"{node.module}.{alias.name}" for alias in node.names)


def calls(tree: ast.AST, *names: str) -> Iterator[ast.Call]:
    """Calls of functions with these last names."""
    for node in ast.walk(tree):
        if isinstance(node, ast.Call) and getattr(node.func, "attr", getattr(node.func, "id", None)) in names:
            yield node


def test_no_test_imports_another_test() -> None:
    tests = {path.stem for path in FILES if path.stem.startswith("test_")}
    found = [
        (file, name)
        for file, tree in TREES.items()
        for name in imported(tree)
        if name.startswith("tests.") and tests & set(name.split("."))
    ]
    assert not found, "what several tests need belongs into a builder"


def test_no_test_sleeps_or_measures_the_time_that_it_takes() -> None:
    found = [
        (file, ast.unparse(call))
        for file, tree in TREES.items()
        for call in calls(tree, "sleep")
        if not (isinstance(call.args[0], ast.Constant) and call.args[0].value <= LONGEST)
    ]
    # the hostile files' worker reports what a file cost in a table; no test asserts it
    found += [
        (file, ast.unparse(call))
        for file, tree in TREES.items()
        if file != "reading/hostile/worker.py"
        for call in calls(tree, "perf_counter", "monotonic", "process_time")
    ]
    # pytest-timeout ends what hangs
    found += [
        (file, ast.unparse(call))
        for file, tree in TREES.items()
        for call in calls(tree, "run", "communicate")
        if any(word.arg == "timeout" for word in call.keywords)
    ]
    assert not found, "wait for a state, not for a time, and give the code under test a clock"


def test_no_test_forks_a_process_that_holds_torchs_threads() -> None:
    makers = "SubprocVecEnv", "partial", "get_context", "set_start_method", "make_vec_env", "fork"
    found = [
        (file, ast.unparse(call))
        for file, tree in TREES.items()
        for call in calls(tree, *makers)
        if getattr(call.func, "attr", "") == "fork"
        or "fork" in [node.value for node in ast.walk(call) if isinstance(node, ast.Constant)]
    ]
    assert not found, "spawn it"
