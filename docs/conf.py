"""Settings of the documentation site: `make docs`."""

from __future__ import annotations

import importlib
import os
import re
from pathlib import Path
from typing import Any

from sphinx.application import Sphinx
from sphinx.util import logging

import nsrl

project = "nsrl"
author = "The nsrl authors"
version = release = nsrl.__version__
copyright = author

extensions = ["myst_parser", "sphinx.ext.autodoc", "sphinx.ext.napoleon", "sphinx.ext.viewcode"]
exclude_patterns = ["_build"]
html_theme = "furo"
html_title = f"nsrl {version}"
html_static_path = ["_static"]
html_css_files = ["nsrl.css"]
html_copy_source = False

myst_heading_anchors = 4
myst_enable_extensions = ["colon_fence"]

#: Names in single backticks: links where they lead somewhere, code where not.
default_role = "py:obj"
add_module_names = False
toc_object_entries_show_parents = "hide"
python_use_unqualified_type_names = True
python_maximum_signature_line_length = 100
autodoc_member_order = "bysource"
autodoc_typehints_format = "short"
autodoc_default_options = {"members": True, "imported-members": True, "show-inheritance": True}
napoleon_numpy_docstring = False
napoleon_use_ivar = True
napoleon_use_rtype = False

FACES = (
    "nsrl.analysis",
    "nsrl.continual",
    "nsrl.editing",
    "nsrl.editing.knowledge",
    "nsrl.ntk",
    "nsrl.ntk.path",
    "nsrl.projection",
    "nsrl.rl.agents",
    "nsrl.rl.algorithms",
    "nsrl.rl.budget",
    "nsrl.rl.playing",
    "nsrl.rl.parallel",
    "nsrl.rl.policies",
    "nsrl.rl.retention",
    "nsrl.rl.surgery",
    "nsrl.rl.training",
    "nsrl.runs",
    "nsrl.runs.sequences",
    "nsrl_envs",
)
# Names of a face load on first use; autodoc looks at those that are there.
for _face in FACES:
    _module = importlib.import_module(_face)
    for _name in _module.__all__:
        setattr(_module, _name, getattr(_module, _name))

#: What is not code, in a line of a docstring.
_PROSE = re.compile(r"(`[^`]*`)")
_SIGNS = re.compile(r"([|]|(?<!^)[*]|(?<=\w)_(?=\W|$))")
_NAME = re.compile(r"`\w+(\.\w+)*`")

#: Pages whose text lies elsewhere in the repository; here they only point there.
ELSEWHERE = {
    "gallery": "runs/reference/ntk/README.md",
    "strategies": "runs/reference/continual/continual.md",
    "promise": "runs/reference/continual/promise.md",
    "tuned": "runs/reference/continual/tuned.md",
    "frontier": "runs/reference/frontier/report.md",
    "changelog": "CHANGELOG.md",
    "contributing": "CONTRIBUTING.md",
    "testing": "tests/README.md",
}
_LINK = re.compile(r"\]\((?!https?:|#)([^)\s]+)\)")
ROOT = Path(__file__).parents[1]


def to_rest(app: Sphinx, what: str, name: str, obj: Any, options: Any, lines: list[str]) -> None:
    """Docstrings are plain text: signs of reStructuredText are escaped, indented examples are code."""
    result: list[str] = []
    section = False  # inside "Args:" and the like, where indentation belongs to the section
    code = False
    for line in lines:
        indented = line.startswith("    ")
        if line.strip() and not indented:
            section, code = bool(re.fullmatch(r"[A-Z]\w+:", line)), False
        elif indented and not section and not code and (not result or not result[-1].strip()):
            result += ["::", ""]
            code = True
        result.append(line if code else "".join(map(escaped, _PROSE.split(line))))
    lines[:] = result


def escaped(piece: str) -> str:
    """A piece of a line: a name that may be a link, other code, or prose."""
    if not piece.startswith("`") or len(piece) < 2:
        return _SIGNS.sub(r"\\\1", piece)
    return piece if _NAME.fullmatch(piece) else f"`{piece}`"


def to_site(app: Sphinx, name: str, content: list[str]) -> None:
    """Pages from elsewhere are read, and links that are right in the repository lead to the same pages here."""
    folder = ROOT / "docs"
    if name in ELSEWHERE:
        source = ROOT / ELSEWHERE[name]
        content[0], folder = source.read_text(encoding="utf-8"), source.parent
        app.env.note_dependency(str(source), docname=name)
    elif name.startswith("api/"):
        return

    def moved(match: re.Match[str]) -> str:
        path, _, anchor = match[1].partition("#")
        target = Path(os.path.normpath(folder / path)).relative_to(ROOT).as_posix()
        here = next((f"{page}.md" for page, place in ELSEWHERE.items() if place == target), None)
        if target == "README.md":
            here = "index.md"
        elif target.startswith("examples/"):
            here = "examples.md"
        return f"]({here or os.path.relpath(ROOT / target, ROOT / 'docs')}{'#' * bool(anchor)}{anchor})"

    content[0] = _LINK.sub(moved, content[0])


def left_out(app: Sphinx, what: str, name: str, obj: Any, skip: bool, options: Any) -> bool | None:
    """scikit-learn gives each of its estimators methods that route metadata."""
    return True if re.fullmatch(r"set_\w+_request", name) else None


def known(target: str) -> bool:
    """Whether a dotted name is a module or an attribute of one."""
    parts = target.split(".")
    for end in range(len(parts), 0, -1):
        try:
            found: Any = importlib.import_module(".".join(parts[:end]))
        except ImportError:
            continue
        for part in parts[end:]:
            fields = getattr(found, "__dataclass_fields__", {})
            if not hasattr(found, part) and part not in fields:
                return False
            found = getattr(found, part, None)
        return True
    return False


def refuse_unknown(app: Sphinx, env: Any, node: Any, content: Any) -> None:
    """A name of this library that does not exist is an error, as a broken link is."""
    target = node.get("reftarget", "")
    if re.fullmatch(r"nsrl(_envs)?(\.\w+)+", target) and not known(target):
        logging.getLogger(__name__).warning("there is no %s", target, location=node)


def setup(app: Sphinx) -> None:
    """Connect the above."""
    app.connect("autodoc-process-docstring", to_rest, priority=400)
    app.connect("autodoc-skip-member", left_out)
    app.connect("missing-reference", refuse_unknown)
    app.connect("source-read", to_site)
