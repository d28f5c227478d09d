"""Where agents and their statistics lie on disk: our run folders, SB3's callbacks, rl-zoo, the hub."""

from __future__ import annotations

import re
import warnings
from dataclasses import dataclass
from pathlib import Path, PurePosixPath
from typing import Any

from nsrl.errors import NsrlError
from nsrl.files import given_path
from nsrl.reading.limits import shown
from nsrl.rl.agents.zoo_settings import SETTINGS, environment_name

CHECKPOINT = re.compile(r"(?P<prefix>.+)_(?P<steps>\d+)_steps")

# Our own; `VecNormalize.save` as rl-zoo names it; the same on the Hugging Face hub.
STATISTICS = ("vecnormalize.npz", "vecnormalize.pkl", "vec_normalize.pkl")


def find_agent(source: str | Path) -> Path:
    """The zip that a path means: itself, with or without its suffix, or the one agent of a run folder.

    In a folder `agent.zip` comes first, then rl-zoo3's last one, then the only zip that is no checkpoint, then the
    checkpoint of the most steps.

    Raises:
        NsrlError: nothing there, or several agents of equal standing, which are listed.
    """
    path = given_path(source)
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
    # Beside best_model.zip rl-zoo3 leaves the last agent, which its enjoy.py takes, too.
    last = [file for file in zips if file.stem == environment_name(folder) or (folder / file.stem / SETTINGS).is_file()]
    if len(last) == 1:
        return last[0]
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


PREFIX = "hf://"

URL = re.compile(r"hf://(?P<repo>[\w.-]+/[\w.-]+)(@(?P<revision>[^/@]+))?/(?P<file>([^/]+/)*[^/]+\.zip)")


def is_hub_url(source: Any) -> bool:
    """Whether a source names a file on the hub."""
    return isinstance(source, str) and source.startswith(PREFIX)


def download(url: str) -> Path:
    """The local copy of `hf://user/repo/file.zip`, in the hub's own cache, with the statistics that lie beside it.

    Nothing in it has been opened: what is downloaded is trusted no more than any other file.

    Args:
        url: as above; `hf://user/repo@revision/folder/file.zip` for a revision and a folder of the repository.

    Raises:
        NsrlError: no such address, no such file, no connection, or the package huggingface_hub is missing.
    """
    address = Address.of(url)
    agent = address.fetch(address.file)
    statistics = address.statistics()
    if statistics is not None:
        address.fetch(statistics)
    return agent


@dataclass(frozen=True)
class Address:
    """Where an agent lies on the hub.

    Attributes:
        url: as it was given.
        repo: user/repo.
        revision: branch, tag or commit; None for the newest.
        file: path of the zip in the repository.
    """

    url: str
    repo: str
    revision: str | None
    file: str

    @classmethod
    def of(cls, url: str) -> Address:
        """Read a URL.

        Raises:
            NsrlError: it has another form, or the package huggingface_hub is missing.
        """
        match = URL.fullmatch(url)
        if match is None or not {".", ".."}.isdisjoint(match["file"].split("/")):
            raise NsrlError(f"{url} is no address of an agent on the hub; expected hf://user/repo/file.zip")
        try:
            import huggingface_hub  # noqa: F401
        except ImportError as error:
            raise NsrlError(f'{url} needs the package huggingface_hub: pip install "nsrl[hub]"') from error
        return cls(url, match["repo"], match["revision"], match["file"])

    def fetch(self, name: str) -> Path:
        """The local copy of one file of the repository.

        Raises:
            NsrlError: it cannot be had; with the reason.
        """
        from huggingface_hub import hf_hub_download

        try:
            return Path(hf_hub_download(self.repo, name, revision=self.revision))
        except Exception as error:  # the hub's own errors, and those of two HTTP libraries
            raise NsrlError(f"{self.url}: {_reason(self.repo, name, error)}") from error

    def statistics(self) -> str | None:
        """The file that `find_statistics` will take for the zip's statistics, None without any."""
        from huggingface_hub import list_repo_files

        try:
            present = set(list_repo_files(self.repo, revision=self.revision))
        except Exception as error:  # offline, as a rule: what was downloaded before will do
            warnings.warn(
                f"{self.url}: the hub cannot be asked for observation statistics beside it ({type(error).__name__}); "
                "only those in its cache are used",
                stacklevel=4,
            )
            return None
        file = PurePosixPath(self.file)
        places = (file.with_suffix(""), file.parent)
        beside = (str(place / name) for place in places for name in STATISTICS)
        return next((name for name in beside if name in present), None)


def _reason(repo: str, name: str, error: Exception) -> str:
    from huggingface_hub import errors

    offline = (errors.LocalEntryNotFoundError, errors.OfflineModeIsEnabled, ConnectionError, TimeoutError)
    if isinstance(error, offline):
        return f"the hub cannot be reached and {name} is not in its cache; connect, or give a path on this disk"
    if isinstance(error, errors.RepositoryNotFoundError):
        return f"the hub has no repository {repo}, or does not show it to you; check it, or log in: hf auth login"
    if isinstance(error, errors.RevisionNotFoundError):
        return f"the repository {repo} has no such revision; leave it out for the newest one"
    if isinstance(error, errors.EntryNotFoundError):
        return f"the repository {repo} has no file {name}; see its files on the hub"
    return f"{name} cannot be downloaded ({type(error).__name__}: {shown(' '.join(str(error).split()), 200)})"
