"""The process of one job: `python -m nsrl.bench.worker COMMAND CONFIG FOLDER`."""

from __future__ import annotations

import sys
from collections.abc import Sequence
from pathlib import Path

from nsrl.bench.jobs import CONFIGS
from nsrl.bench.runs import RunFolder
from nsrl.bench.settings import load
from nsrl.errors import NsrlError


def main(arguments: Sequence[str]) -> int:
    """Run, or go on with, one job; returns the exit code of the process."""
    command, config, folder = arguments
    try:
        run(command, Path(config), Path(folder))
    except NsrlError as error:
        print(f"nsrl: {error}", file=sys.stderr)
        return 2
    return 0


def run(command: str, config: Path, folder: Path) -> None:
    """Carry out one job in its folder.

    Raises:
        NsrlError: as the command itself; or an unknown command.
    """
    from nsrl.bench import experiment

    experiment.use_one_thread()
    if command not in CONFIGS:
        raise NsrlError(f"no job runs the command {command!r}; expected one of {', '.join(CONFIGS)}")
    started = RunFolder(folder).config.is_file()
    if command == "pretrain":
        experiment.resume_pretraining(folder) if started else experiment.pretrain(load(CONFIGS[command], config), folder)
    else:
        experiment.resume_finetuning(folder) if started else experiment.finetune(load(CONFIGS[command], config), folder)


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
