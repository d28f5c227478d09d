"""What a public docstring has to say: which errors are raised, and which shape a returned tensor has.

Read from the syntax trees. A method of a protocol that has no docstring of its own has that of the protocol.
"""

from __future__ import annotations

import ast
import re
from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple

import pytest

ROOT = Path(__file__).parents[1]
FILES = sorted([*(ROOT / "nsrl").rglob("*.py"), *(ROOT / "envs").rglob("*.py")])
#: Errors that are no news to a caller: what has no body yet, and the way out of a process.
UNTOLD = {"NotImplementedError", "SystemExit", "AttributeError"}
ARRAYS = {"Tensor", "torch.Tensor", "np.ndarray", "numpy.ndarray"}
#: (), (P,), (N, O), (k, 2 r), (..., O): what stands in parentheses and has a comma, or nothing.
SHAPE = re.compile(r"\(\)|\([\w.*+/^' -]+,[\w.*+/^', -]*\)|\bscalar\b")


#: Of other packages, or of the field: what docstrings name and no code of ours uses.
FOREIGN = {
    "",  # `RetentionBuffer.from_...`
    "MSELoss",
    "MjModel",
    "SubprocVecEnv",
    "__array_interface__",
    "_metadata",
    "data_to_json",
    "empirical_ntk_jacobian_contraction",
    "empirical_ntk_ntk_vps",
    "env_wrapper",
    "frame_stack",
    "kron",
    "normalize_obs",
    "trim_mean",
}


class Function(NamedTuple):
    """A public function and where it stands."""

    place: str
    node: ast.FunctionDef | ast.AsyncFunctionDef


def public(tree: ast.Module, path: str) -> Iterator[Function]:
    """Public functions of a file, and public methods of its public classes."""

    def walk(body: list[ast.stmt], prefix: str) -> Iterator[Function]:
        for node in body:
            if isinstance(node, ast.ClassDef) and not node.name.startswith("_"):
                yield from walk(node.body, f"{prefix}{node.name}.")
            elif isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef) and not node.name.startswith("_"):
                yield Function(f"{path}:{node.lineno} {prefix}{node.name}", node)

    yield from walk(tree.body, "")


def own(node: ast.AST) -> Iterator[ast.AST]:
    """The nodes of a function that are not inside a function or a class in it."""
    for child in ast.iter_child_nodes(node):
        if not isinstance(child, ast.FunctionDef | ast.AsyncFunctionDef | ast.ClassDef | ast.Lambda):
            yield child
            yield from own(child)


def errors(node: ast.AST) -> set[str]:
    """Names of the errors that a function raises itself; one that is passed on as it was has none."""
    raised = [part.exc for part in own(node) if isinstance(part, ast.Raise) and part.exc is not None]
    names = [error.func if isinstance(error, ast.Call) else error for error in raised]
    return {ast.unparse(name) for name in names} - UNTOLD


def tells_errors(text: str) -> bool:
    """Whether a docstring has a section, or is about nothing else."""
    return bool(re.search(r"^\s*Raises:\s*$", text, re.MULTILINE)) or text.startswith("Raise ")


def silent_about_errors(source: str, path: str) -> list[str]:
    return [
        f"{place}: {', '.join(sorted(errors(node)))}"
        for place, node in public(ast.parse(source), path)
        if errors(node) and not tells_errors(ast.get_docstring(node) or "")
    ]


def silent_about_shapes(source: str, path: str) -> list[str]:
    return [
        place
        for place, node in public(ast.parse(source), path)
        if node.returns is not None
        and {part.strip() for part in ast.unparse(node.returns).split("|")} & ARRAYS
        and ast.get_docstring(node) is not None
        and not SHAPE.search(ast.get_docstring(node) or "")
    ]


@pytest.mark.parametrize("check", [silent_about_errors, silent_about_shapes])
def test_public_docstrings(check) -> None:
    found = [line for path in FILES for line in check(path.read_text(), str(path.relative_to(ROOT)))]
    assert not found, "\n" + "\n".join(found)


def test_the_rules_find_what_they_are_for() -> None:
    source = '''
def f(x) -> "Tensor":
    """All of it."""
    if x:
        raise ValueError("no")
class A:
    def g(self) -> np.ndarray | None:
        """The values, (N, O).

        Raises:
            E: always.
        """
        raise E
    def _hidden(self) -> Tensor:
        """Nothing."""
        raise E
    def passes_on(self):
        """Whatever."""
        def inner():
            raise E
        try:
            inner()
        except E:
            raise
'''.replace('"Tensor"', "Tensor")
    assert silent_about_errors(source, "x.py") == ["x.py:2 f: ValueError"]
    assert silent_about_shapes(source, "x.py") == ["x.py:2 f"]


@pytest.mark.parametrize("text", ["shape ()", "(P,)", "(N, O)", "(..., O)", "(k, 2 r)", "(S + 1, O)", "a scalar"])
def test_shapes_are_recognised(text: str) -> None:
    assert SHAPE.search(text)


@pytest.mark.parametrize("text", ["the weights", "see (2)", "(as given)", "f(x)"])
def test_other_parentheses_are_none(text: str) -> None:
    assert not SHAPE.search(text)


def names_in(tree: ast.AST) -> Iterator[str]:
    """Every identifier, and every text that is one: the keys and options that docstrings name, too."""
    for node in ast.walk(tree):
        for field in ("id", "attr", "arg", "name", "asname"):
            if isinstance(getattr(node, field, None), str):
                yield from getattr(node, field).split(".")
        if isinstance(node, ast.ImportFrom):
            yield from (node.module or "").split(".")
        if isinstance(node, ast.Constant) and isinstance(node.value, str):
            yield from re.findall(r"\w+", node.value) if len(node.value) < 200 and "`" not in node.value else ()


def test_docstrings_name_what_there_is() -> None:
    trees = {path: ast.parse(path.read_text()) for path in FILES}
    known = {name for tree in trees.values() for name in names_in(tree)} | {path.stem for path in FILES}
    missing = []
    for path, tree in trees.items():
        for node in ast.walk(tree):
            if isinstance(node, ast.Module | ast.ClassDef | ast.FunctionDef):
                named = re.findall(r"`([A-Za-z_][\w.]*)(?:\(.*?\))?`", ast.get_docstring(node) or "")
                unknown = [name for name in named if name.split(".")[-1] not in known | FOREIGN]
                missing += [f"{path.relative_to(ROOT)}: {name}" for name in unknown]
    assert not missing, "\n".join(missing)
