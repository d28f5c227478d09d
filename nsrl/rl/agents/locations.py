"""Where agents and their statistics lie on disk: our run folders, SB3's callbacks, rl-zoo, the hub."""

from __future__ import annotations

import re
from pathlib import Path

from nsrl.errors import NsrlError

CHECKPOINT = re.compile(r"(?P<prefix>.+)_(?P<steps>\d+)_steps")
# Our own; `VecNormalize.save` as rl-zoo names it; the same on the Hugging Face hub.
STATISTICS = ("vecnormalize.npz", "vecnormalize.pkl", "vec_normalize.pkl")


def find_agent(source: str | Path) -> Path:
    """The zip that a path means: itself, with or without its suffix, or the one agent of a run folder.

    In a folder `agent.zip` comes first, then the only zip that is no checkpoint, then the checkpoint of the
    most steps.

    Raises:
        NsrlError: nothing there, or several agents of equal standing, which are listed.
    """
    path = Path(source).expanduser()
    with_suffix = Path(f"{path}.zip")
    if path.is_dir():
        zips = sorted(file for file in path.glob("*.zip") if not file.name.startswith("."))
        if zips:
            return _chosen(path, zips)
        if with_suffix.is_file():  # rl-zoo keeps ENV.zip beside a folder ENV
            return with_suffix
        raise NsrlError(
            f"the folder {path} holds no agent; expected agent.zip or another zip saved by Stable-Baselines3"
        )
    for candidate in (path, with_suffix):
        if candidate.is_file():
            return candidate
    raise NsrlError(f"no agent at {path}; expected a zip saved by Stable-Baselines3, or a folder with one")


def _chosen(folder: Path, zips: list[Path]) -> Path:
    if folder / "agent.zip" in zips:
        return folder / "agent.zip"
    checkpoints = {file: match for file in zips if (match := CHECKPOINT.fullmatch(file.stem))}
    others = [file for file in zips if file not in checkpoints]
    if len(others) == 1:
        return others[0]
    if not others and len({match["prefix"] for match in checkpoints.values()}) == 1:
        return max(zips, key=lambda file: int(checkpoints[file]["steps"]))
    raise _ambiguous(folder, "agents", others or zips)


def find_statistics(agent: Path) -> Path | None:
    """The VecNormalize statistics that belong to an agent's zip, None if there are none.

    In this order: the checkpoint of the same steps; a sub folder named like the zip (rl-zoo); beside the zip;
    the only sub folder with statistics and no agent of its own (rl-zoo's best_model.zip); the checkpoint of
    the most steps.

    Raises:
        NsrlError: several of equal standing, which are listed.
    """
    folder, checkpoint = agent.parent, CHECKPOINT.fullmatch(agent.stem)
    if checkpoint:
        same_steps = folder / f"{checkpoint['prefix']}_vecnormalize_{checkpoint['steps']}_steps.pkl"
        if same_steps.is_file():
            return same_steps
    for place in (folder / agent.stem, folder):
        for name in STATISTICS:
            if (place / name).is_file():
                return place / name
    below = [
        file for name in STATISTICS for file in sorted(folder.glob(f"*/{name}")) if not any(file.parent.glob("*.zip"))
    ]
    if len(below) > 1:
        raise _ambiguous(folder, "observation statistics", below)
    if below:
        return below[0]
    if checkpoint:
        return None  # another step's statistics are not this checkpoint's
    saved = {
        file: match for file in folder.glob("*_vecnormalize_*_steps.pkl") if (match := CHECKPOINT.fullmatch(file.stem))
    }
    if len({match["prefix"] for match in saved.values()}) > 1:
        raise _ambiguous(folder, "observation statistics", sorted(saved))
    return max(saved, key=lambda file: int(saved[file]["steps"]), default=None)


def _ambiguous(folder: Path, what: str, candidates: list[Path]) -> NsrlError:
    listed = ", ".join(str(file.relative_to(folder)) for file in candidates)
    advice = "name the zip you mean" if what == "agents" else "keep one, as vecnormalize.pkl beside the zip"
    return NsrlError(f"the folder {folder} holds several {what} ({listed}); {advice}")
