"""The version of nsrl, and those of the files that it writes: which ones are read, and who reads newer ones.

The promise (docs/formats.md): a file of a version that any released nsrl wrote is read by every later one; a newer one
is refused in a sentence that names the nsrl that it needs.
"""

from __future__ import annotations

import os
import re
from dataclasses import dataclass
from typing import Any

from nsrl.errors import NsrlError

VERSION = "0.1.0"


@dataclass(frozen=True)
class Format:
    """What the content of one kind of file looks like; its number grows when an older nsrl would misread the new form.

    Attributes:
        what: the file is, for sentences.
        newest: version that this nsrl writes; it reads all from 1 on.
    """

    what: str
    newest: int

    def check(self, path: str | os.PathLike[str], version: int, writer: Any = None) -> int:
        """The version, where this nsrl reads it.

        Args:
            path: of the file.
            version: that it says it has.
            writer: the nsrl that it says wrote it; None, or anything that is no version, where it does not say.

        Raises:
            NsrlError: it is newer; which nsrl reads it is said.
        """
        if version <= self.newest:
            return version
        known = isinstance(writer, str) and re.fullmatch(r"\d{1,4}(\.\w{1,12}){1,4}", writer)
        by, needed = (f", written by nsrl {writer}", f"nsrl {writer} or later") if known else ("", "a later nsrl")
        raise NsrlError(
            f"{path} is {self.what} of format {version}{by}; this is nsrl {VERSION}, which reads format "
            f"{'1' if self.newest == 1 else f'1 to {self.newest}'}; install {needed}"
        )


#: 2 added the source of each state; a buffer of one source is still written as 1, which older versions read.
BUFFER = Format("a retention buffer", 2)
CHECKPOINT = Format("a checkpoint", 1)
RUN = Format("a run folder", 1)
TASK = Format("a finished task", 1)
