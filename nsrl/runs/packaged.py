"""The configurations that come with nsrl: found by name from whatever folder, in a checkout and in a wheel."""

from __future__ import annotations

from importlib.resources import files
from pathlib import Path

from nsrl.errors import NsrlError, near
from nsrl.files import given_path

#: Folder of the configurations of pretraining, fine-tuning and demo; `bench`, `continual` and `edit` inside it hold
#: theirs.
INSTALLED = Path(str(files("nsrl").joinpath("configs")))
#: They lie inside the package in a wheel only (setup.py puts them there); a checkout has them beside it.
CONFIGS = INSTALLED if INSTALLED.is_dir() else INSTALLED.parents[1] / "configs"


def packaged_names(kind: str = "") -> list[str]:
    """Names of the configurations of one kind, in order.

    Args:
        kind: "bench", "continual", "edit", or "" for those of a single run.
    """
    return sorted(path.stem for path in (CONFIGS / kind).glob("*.yaml"))


def find_config(name: str, kind: str = "") -> Path:
    """The file that a configuration's path or name means; a file goes before a name.

    Args:
        name: a path, or the name of a configuration that comes with nsrl.
        kind: as for `packaged_names`.

    Raises:
        NsrlError: it is neither; the names most like it are listed.
    """
    path = given_path(name)
    if path.is_file():
        return path
    known = packaged_names(kind)
    if name in known:
        return CONFIGS / kind / f"{name}.yaml"
    alike = near(path.stem, known, 3, cutoff=0.5)
    hint = f"did you mean {', '.join(alike)}?" if alike else f"those that come with nsrl are {', '.join(known)}"
    what = "is no file" if path.exists() else "No such file"
    raise NsrlError(f"cannot read the configuration {name}: {what}, and nsrl has none of this name; {hint}")
