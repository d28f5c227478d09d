"""`nsrl continual`: supervised tasks one after the other, with one strategy."""

from __future__ import annotations

import sys
from collections.abc import Sequence

from nsrl.cli.command import print_table, read_arguments
from nsrl.continual.config import ContinualConfig
from nsrl.errors import NsrlError

EXAMPLES = """\
  nsrl continual --config permuted_digits
  nsrl continual --config permuted_digits --strategy.name gpm --seed 3
  nsrl continual --config split_cifar100_10 --benchmark.data data/cifar-100-binary
  nsrl continual --resume runs/continual-permuted_digits-20250101-120000"""
ABOUT = """\
Learn a sequence of supervised tasks with one strategy and measure all tasks after each: accuracy matrix,
average accuracy (ACC), backward and forward transfer, forgetting. Writes a folder with config.yaml,
metrics.json, accuracy_matrix.png, model.pt and TensorBoard events."""


def run(arguments: Sequence[str]) -> int:
    """Learn the tasks, and print the table.

    Raises:
        NsrlError: a bad command line, --resume beside other options, or as `run_continual`.
    """
    config, options = read_arguments(
        ContinualConfig,
        arguments,
        command="continual",
        about=ABOUT,
        examples=EXAMPLES,
        resumable=True,
        kind="continual",
    )
    from nsrl.bench.studies.continual_report import run_table
    from nsrl.continual.runner import run_continual
    from nsrl.files import given_path
    from nsrl.runs.folder import RunFolder, choose_folder
    from nsrl.runs.training import use_one_thread

    if options["resume"] is None:
        folder = choose_folder("continual", config.benchmark.name, config.out)
    elif config != ContinualConfig():
        raise NsrlError("--resume takes everything from the run's folder; leave the other options out")
    else:
        folder = RunFolder(given_path(options["resume"]))
        config = folder.read_config(ContinualConfig)
    if config.training.device == "cpu" and config.model.kind == "mlp":
        use_one_thread()
    try:
        if folder.finished:
            metrics = folder.read_metrics()
        else:
            with folder.made() if options["resume"] is None else folder.continued():
                metrics = run_continual(config, folder.path, progress=options["progress"])
    except KeyboardInterrupt:
        if not folder.config.is_file():
            raise
        print(f"nsrl: interrupted; go on with: nsrl continual --resume {folder.path}", file=sys.stderr)
        return 130
    print_table(run_table(metrics))
    print(f"results      {folder.metrics}")
    print(f"figure       {folder.path / 'accuracy_matrix.png'}")
    print(f"TensorBoard  tensorboard --logdir {folder.tensorboard}")
    return 0
