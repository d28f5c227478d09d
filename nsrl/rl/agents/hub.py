"""Agents on the Hugging Face hub: downloaded with their observation statistics, and then files like any other."""

from __future__ import annotations

import re
import warnings
from dataclasses import dataclass
from pathlib import Path, PurePosixPath
from typing import Any

from nsrl.errors import NsrlError
from nsrl.reading.limits import shown
from nsrl.rl.agents.locations import STATISTICS

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
        """Read a URL; raises NsrlError for any other form, and where the package huggingface_hub is missing."""
        match = URL.fullmatch(url)
        if match is None or not {".", ".."}.isdisjoint(match["file"].split("/")):
            raise NsrlError(f"{url} is no address of an agent on the hub; expected hf://user/repo/file.zip")
        try:
            import huggingface_hub  # noqa: F401
        except ImportError as error:
            raise NsrlError(f'{url} needs the package huggingface_hub: pip install "nsrl[hub]"') from error
        return cls(url, match["repo"], match["revision"], match["file"])

    def fetch(self, name: str) -> Path:
        """The local copy of one file of the repository."""
        from huggingface_hub import hf_hub_download

        try:
            return Path(hf_hub_download(self.repo, name, revision=self.revision))
        except Exception as error:  # the hub's own errors, and those of two HTTP libraries
            raise NsrlError(f"{self.url}: {_reason(self.repo, name, error)}") from error

    def statistics(self) -> str | None:
        """The file that `nsrl.rl.agents.locations.find_statistics` will take for the zip's statistics, None without any."""
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
