"""The pages: links lead somewhere, code runs as it stands, commands and their options exist.

Python blocks of a page run one after the other, with numbers of more than three digits made small, on what `PREPARED`
says a reader has already. A comment `<!-- not run: why -->` before a block leaves it at its names and keywords.
"""

from __future__ import annotations

import ast
import contextlib
import importlib
import inspect
import io
import math
import re
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from stable_baselines3 import PPO
from stable_baselines3.common.env_util import make_vec_env

from nsrl import NullSpacePPO, RetentionBuffer, protect
from nsrl.bench.registry import BENCHMARKS
from nsrl.cli.main import COMMANDS, main

# imported here: it sets environment variables, which no test may do
with contextlib.suppress(ImportError):
    importlib.import_module("sklearn")

ROOT = Path(__file__).parents[2]
PAGES = sorted(
    {path for path in ROOT.glob("*.md")}
    | {path for folder in ("docs", "nsrl", "examples", "tests") for path in (ROOT / folder).rglob("*.md")}
)
BLOCK = re.compile(r"(?P<unrun><!-- not run: [^\n]+ -->\n)?```(?P<kind>\w*)\n(?P<code>.*?)```", re.DOTALL)
LINK = re.compile(r"(?<!\!)\[[^\]\[]*\]\((?P<target>[^)\s]+)\)")
#: What a number of four digits and more becomes.
FEW = 256


@dataclass(frozen=True)
class Block:
    """A piece of code and where it stands."""

    page: str
    line: int
    code: str
    run: bool

    def __str__(self) -> str:
        return f"{self.page}:{self.line}"


def blocks(path: Path) -> Iterator[Block]:
    text = path.read_text(encoding="utf-8")
    for match in BLOCK.finditer(text):
        if match["kind"] == "python":
            line = text[: match.start("code")].count("\n") + 1
            yield Block(named(path), line, match["code"], match["unrun"] is None)


def named(path: Path) -> str:
    return path.relative_to(ROOT).as_posix()


BLOCKS = [block for path in PAGES for block in blocks(path)]


def test_the_search_for_code_finds_it() -> None:
    fences = sum(path.read_text(encoding="utf-8").count("```python") for path in PAGES)
    assert len(BLOCKS) == fences > 10


# ------------------------------------------------------------------------------------------------------- links


def headings(path: Path) -> set[str]:
    """Anchors of a page, as GitHub makes them."""
    text = re.sub(r"```.*?```", "", path.read_text(encoding="utf-8"), flags=re.DOTALL)
    titles = re.findall(r"^#+ (.+)$", text, flags=re.MULTILINE)
    return {re.sub(r"[^\w\- ]", "", title.lower()).strip().replace(" ", "-") for title in titles}


@pytest.mark.parametrize("path", PAGES, ids=named)
def test_links_lead_to_files_and_headings(path: Path) -> None:
    broken = []
    for match in LINK.finditer(re.sub(r"```.*?```", "", path.read_text(encoding="utf-8"), flags=re.DOTALL)):
        target, _, anchor = match["target"].partition("#")
        if target.startswith(("http://", "https://")):
            continue
        file = (path.parent / target).resolve() if target else path
        if not file.exists() or (anchor and anchor not in headings(file)):
            broken.append(match["target"])
    assert not broken


# ---------------------------------------------------------------------------------------------------- commands

#: `nsrl ...` in code, in an indented block or behind a prompt.
COMMAND = re.compile(r"(?:`|^    |^\$ )nsrl (?P<words>[a-z]+[^`\n#]*)", re.MULTILINE)
SAID = sorted(
    {match["words"].strip() for path in PAGES for match in COMMAND.finditer(path.read_text(encoding="utf-8"))}
)


@lru_cache(maxsize=32)
def options_of(command: tuple[str, ...]) -> str:
    """What a command says of itself."""
    output = io.StringIO()
    with contextlib.redirect_stdout(output), contextlib.suppress(SystemExit):
        main([*command, "--help"])
    return output.getvalue()


def test_commands_on_the_pages_exist() -> None:
    suites = {path.stem for path in ROOT.rglob("*.yaml") if "bench" in path.parts}
    wrong = []
    assert len(SAID) > 20
    for said in SAID:
        command, *words = said.split()
        if command not in COMMANDS:
            wrong.append(said)
            continue
        name = words[0] if words and words[0].islower() and not words[0].startswith("-") else None
        if command == "bench" and name is not None and name not in suites | BENCHMARKS.keys():
            wrong.append(said)
        if any(word.startswith("--") for word in words):
            known = options_of((command, name) if command == "ntk" and name else (command,))
            for word in words:
                if re.match("--[a-z]", word) and word not in ("--help",) and word not in re.findall(r"--[\w.]+", known):
                    wrong.append(said)
    assert not wrong


# ------------------------------------------------------------------------------------------------------- names

#: Where a page speaks of what has been.
PAST = {("nsrl/rl/agents/README.md", "nsrl.rl.normalization")}


def test_dotted_names_on_the_pages_exist() -> None:
    missing = []
    for path in PAGES:
        # the changelog's first column has the names of before
        text = re.sub(r"^\| `nsrl.*? \|(?=.* \|$)", "", path.read_text(encoding="utf-8"), flags=re.MULTILINE)
        text = re.sub(r"### Removed.*?(?=###)", "", text, flags=re.DOTALL) if path.stem == "CHANGELOG" else text
        for name in re.findall(r"`(nsrl(?:\.[A-Za-z_]\w*)+)(?:\(.*?\))?`", text):
            if not exists(name) and (named(path), name) not in PAST:
                missing.append((named(path), name))
    assert not missing


def exists(name: str) -> bool:
    """Whether a dotted name is a module or an attribute of one."""
    parts = name.split(".")
    for end in range(len(parts), 0, -1):
        try:
            found: Any = importlib.import_module(".".join(parts[:end]))
        except ImportError:
            continue
        try:
            for part in parts[end:]:
                found = getattr(found, part)
        except AttributeError:
            return False
        return True
    return False


# -------------------------------------------------------------------------------------------------------- code


@pytest.mark.parametrize("block", BLOCKS, ids=str)
def test_names_and_keywords_of_code_exist(block: Block) -> None:
    tree = ast.parse(block.code)
    names: dict[str, Any] = {"NullSpacePPO": NullSpacePPO, "RetentionBuffer": RetentionBuffer}
    for node in ast.walk(tree):
        if isinstance(node, ast.ImportFrom) and str(node.module).partition(".")[0] in ("nsrl", "nsrl_envs"):
            exec(ast.unparse(node), names)
    unknown = []
    for call in ast.walk(tree):
        if not isinstance(call, ast.Call):
            continue
        target = attribute(call.func, names)
        if target is None:
            continue
        parameters = inspect.signature(target).parameters
        if not any(parameter.kind is parameter.VAR_KEYWORD for parameter in parameters.values()):
            unknown += [(ast.unparse(call.func), word.arg) for word in call.keywords if word.arg not in parameters]
    assert not unknown


def attribute(node: ast.expr, names: dict[str, Any]) -> Any:
    """What `a.b` is, where a is an nsrl name; None for all else."""
    if isinstance(node, ast.Name):
        return names.get(node.id)
    if isinstance(node, ast.Attribute):
        owner = attribute(node.value, names)
        return None if owner is None else getattr(owner, node.attr)
    return None


class Small(ast.NodeTransformer):
    """Numbers of four digits and more, made few."""

    def visit_Constant(self, node: ast.Constant) -> ast.Constant:
        return ast.Constant(FEW) if type(node.value) is int and node.value >= 1000 else node


def learner(seed: int = 0, env: str = "nsrl/CartPole-v0") -> PPO:
    """An agent that has learnt next to nothing."""
    return PPO("MlpPolicy", make_vec_env(env, 2, seed=seed), n_steps=64, batch_size=64, n_epochs=2, seed=seed)


@lru_cache(maxsize=1)
def network() -> dict[str, Any]:
    generator = torch.Generator().manual_seed(0)
    return {"x": torch.randn(16, 4, generator=generator), "labels": torch.arange(16) % 3}


def plain_torch() -> dict[str, Any]:
    """A module, an optimizer and data, under the names that the pages have for them."""
    model = torch.nn.Sequential(torch.nn.Linear(4, 16), torch.nn.Tanh(), torch.nn.Linear(16, 3))
    x, labels = network()["x"], network()["labels"]
    return {
        "torch": torch,
        "math": math,
        "np": np,
        "model": model,
        "module": model,
        "optimizer": torch.optim.SGD(model.parameters(), 0.1),
        "x": x,
        "x_test": x[:4] + 0.1,
        "y": torch.nn.functional.one_hot(labels, 3).float(),
        "inputs": x,
        "others": x[:3],
        "queries": x[:4],
        "v": torch.randn(sum(p.numel() for p in model.parameters())),
        "u": torch.randn(48),
        "times": [1.0, 2.0],
        "loss": torch.nn.functional.mse_loss,
        "batches": list(torch.arange(16).split(4)),
        "old_task_loader": [x],
        "tasks": [[(x, labels)], [(x + 1.0, labels)]],
    }


def agent_files() -> dict[str, Any]:
    """The zips that the pages load, in the current folder, and a model with its buffer."""
    agent = learner()
    for file in ("expert.zip", "agent.zip"):
        agent.save(file)
    learner(env="CartPole-v1").save("plain.zip")
    buffer = RetentionBuffer.collect("expert.zip", "nsrl/CartPole-v0", n_states=64, n_envs=2)
    return {"model": learner(), "buffer": buffer}


def reinforcement_learning() -> dict[str, Any]:
    """A model under a budget, whose rollout is there, and its buffer."""
    files = agent_files()
    model = protect(learner(), retain=files["buffer"]).learn(128)
    return {**files, "model": model}


#: What a reader has when a page, or a section of it (by its heading), begins.
PREPARED: dict[str, list[Callable[[], dict[str, Any]]]] = {
    "README.md": [agent_files, agent_files, plain_torch],
    "docs/index.md": [agent_files],
    "docs/ntk.md": [plain_torch, dict, reinforcement_learning],
    "docs/projection.md": [plain_torch],
    "docs/agents.md": [agent_files],
    "docs/buffers.md": [agent_files],
    "docs/surgery.md": [agent_files],
}


@pytest.mark.filterwarnings("ignore::UserWarning")
@pytest.mark.parametrize("page", sorted({block.page for block in BLOCKS}))
def test_code_runs(page: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    names: dict[str, Any] = {}
    prepared = PREPARED.get(page, [])
    for number, block in enumerate(block for block in BLOCKS if block.page == page):
        if number < len(prepared):
            names.update(prepared[number]())
        if block.run:
            tree = ast.fix_missing_locations(Small().visit(ast.parse(block.code)))
            exec(compile(tree, str(block), "exec"), names)
