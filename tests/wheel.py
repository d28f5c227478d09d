"""Build the wheel, install it away from the checkout, and use it there: python tests/wheel.py

Nothing is downloaded and little is copied, so that every change can be checked: the wheel is built by the setuptools of
this environment, and the fresh environment sees this one's packages through a .pth file. Python does not follow .pth
files from there, so this environment's own nsrl, which is the checkout, stays out of sight; the check asks to be sure.
"""

from __future__ import annotations

import os
import subprocess
import sys
import sysconfig
import tempfile
import venv
import zipfile
from collections.abc import Sequence
from pathlib import Path

REPOSITORY = Path(__file__).parents[1]
#: Makes any training take seconds.
SHORT = ("--progress", "false", "--total_timesteps", "2048", "--evaluation.every", "2048")
SHORT += ("--evaluation.episodes", "2", "--evaluation.final_episodes", "2")
#: In this order, from one folder that is empty at first: the agent of the first is what the second starts from.
COMMANDS: tuple[tuple[str, ...], ...] = (
    ("nsrl", "pretrain", "--config", "pretrain_cartpole", *SHORT),
    ("nsrl", "finetune", "--config", "cartpole_swapped", "--states.n_states", "256", *SHORT),
    ("nsrl", "bench", "cartpole_swapped", "--quick"),
    ("nsrl", "continual", "--config", "permuted_digits", "--benchmark.tasks", "2", "--training.epochs", "1"),
)
#: Every file that git has of these has to be in the wheel, the configurations inside the package.
CONTENT = (("nsrl", "nsrl"), ("envs/nsrl_envs", "nsrl_envs"), ("configs", "nsrl/configs"))


def build(folder: Path, out: Path) -> Path:
    """The wheel of what git has, or would have after `git add`; built in a copy, so that no old build gets in."""
    listed = run(["git", "ls-files", "-z", "--cached", "--others", "--exclude-standard"], REPOSITORY)
    for name in filter(None, listed.split("\0")):
        source, copy = REPOSITORY / name, folder / name
        if source.is_file() and not name.startswith(("runs/", "tests/")):
            copy.parent.mkdir(parents=True, exist_ok=True)
            copy.write_bytes(source.read_bytes())
    pip = [sys.executable, "-m", "pip", "wheel", "--quiet", "--no-deps", "--no-build-isolation", "--no-index"]
    run([*pip, "--wheel-dir", str(out), str(folder)], folder)
    (wheel,) = out.glob("nsrl-*.whl")
    return wheel


def check_content(folder: Path, wheel: Path) -> None:
    """Exit unless all modules, types and configurations are in the wheel, and nothing of the tests."""
    with zipfile.ZipFile(wheel) as archive:
        names = set(archive.namelist())
        (metadata,) = (name for name in names if name.endswith(".dist-info/METADATA"))
        described = archive.read(metadata).decode()
    wanted = {
        f"{inside}/{path.relative_to(folder / place).as_posix()}"
        for place, inside in CONTENT
        for path in (folder / place).rglob("*")
        if path.suffix in (".py", ".yaml", ".typed")
    }
    missing = sorted(wanted - names)
    strange = sorted(name for name in names - wanted if ".dist-info/" not in name)
    if missing or strange or "# nsrl" not in described:
        sys.exit(f"{wheel.name} lacks {missing}, holds {strange}, or has no description")


def install(wheel: Path, home: Path) -> Path:
    """A fresh environment with the wheel; returns the folder of its commands."""
    venv.create(home, with_pip=False)
    scripts = Path(sysconfig.get_path("scripts", "venv", {"base": str(home), "installed_base": str(home)}))
    packages = Path(sysconfig.get_path("purelib", "venv", {"base": str(home), "installed_base": str(home)}))
    (packages / "dependencies.pth").write_text(sysconfig.get_path("purelib") + "\n")
    pip = [sys.executable, "-m", "pip", "--python", str(scripts / "python"), "install", "--quiet"]
    run([*pip, "--no-deps", "--no-index", "--force-reinstall", str(wheel)], home)
    return scripts


def run(words: Sequence[str], folder: Path) -> str:
    """Output of a command in a folder, which sees no checkout; exits where it fails."""
    hidden = ("PYTHONPATH", "PYTHONHOME", "VIRTUAL_ENV")
    surroundings = {name: value for name, value in os.environ.items() if name not in hidden}
    done = subprocess.run(words, cwd=folder, env=surroundings, capture_output=True, text=True)
    if done.returncode:
        sys.exit(f"{' '.join(words)} ended with {done.returncode}:\n{done.stdout}{done.stderr}")
    return done.stdout


def main() -> None:
    """Build, install, use."""
    with tempfile.TemporaryDirectory() as name:
        place = Path(name)
        source, elsewhere = place / "source", place / "elsewhere"
        for folder in (source, elsewhere):
            folder.mkdir()
        wheel = build(source, place)
        check_content(source, wheel)
        scripts = install(wheel, place / "environment")
        where = "import nsrl, nsrl_envs; print(nsrl.__file__, nsrl_envs.__file__)"
        found = run([str(scripts / "python"), "-c", where], elsewhere).split()
        if not all(path.startswith(str(place.resolve())) or path.startswith(name) for path in found):
            sys.exit(f"this is not the wheel: {found}")
        for command, *words in COMMANDS:
            print(f"{wheel.name}: {command} {' '.join(words)}", flush=True)
            run([str(scripts / command), *words], elsewhere)


if __name__ == "__main__":
    main()
