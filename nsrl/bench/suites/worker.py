"""The process of one job: `python -m nsrl.bench.suites.worker COMMAND CONFIG FOLDER`."""

from __future__ import annotations

import sys
from collections.abc import Sequence
from pathlib import Path

from nsrl.bench.lifeline import GRACE, end_with_starter
from nsrl.bench.suites.jobs import CONFIGS
from nsrl.errors import NsrlError
from nsrl.runs.config import FinetuneConfig, PretrainConfig
from nsrl.runs.folder import RunFolder
from nsrl.runs.lock import locked
from nsrl.runs.sequences.config import SequenceConfig
from nsrl.runs.settings import load


def main(arguments: Sequence[str]) -> int:
    """Run, or go on with, one job; returns the exit code of the process."""
    from nsrl.runs.training import Interrupted

    command, config, folder = arguments
    try:
        run(command, Path(config), Path(folder))
    except NsrlError as error:
        print(f"nsrl: {error}", file=sys.stderr)
        return 2
    except Interrupted as stop:
        return stop.exit_status
    return 0


def run(command: str, config: Path, folder: Path) -> None:
    """Carry out one job in its folder.

    Raises:
        NsrlError: as the command itself; or an unknown command.
    """
    from nsrl.runs.finetuning import finetune, resume_finetuning
    from nsrl.runs.pretraining import pretrain, resume_pretraining
    from nsrl.runs.sequences.learning import learn_sequence, resume_sequence
    from nsrl.runs.training import use_one_thread

    use_one_thread()
    if folder.is_dir():  # a job that has lost its starter may still be writing its checkpoint there
        with locked(folder, GRACE):
            pass
    if command not in CONFIGS:
        raise NsrlError(f"no job runs the command {command!r}; expected one of {', '.join(CONFIGS)}")
    started = RunFolder(folder).config.is_file()
    if command == "pretrain":
        resume_pretraining(folder) if started else pretrain(load(PretrainConfig, config), folder)
    elif command == "sequence":
        sequence = load(SequenceConfig, config)
        resume_sequence(folder, trust=sequence.trust) if started else learn_sequence(sequence, folder)
    else:
        pair = load(FinetuneConfig, config)
        resume_finetuning(folder, trust=pair.trust) if started else finetune(pair, folder)


if __name__ == "__main__":
    end_with_starter()
    sys.exit(main(sys.argv[1:]))
