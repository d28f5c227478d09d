"""`nsrl edit`: facts written into a language model."""

from __future__ import annotations

import sys
from collections.abc import Sequence
from typing import Any

from nsrl.cli.command import print_table, read_arguments, teller
from nsrl.editing.commands.config import EditConfig
from nsrl.errors import NsrlError

EXAMPLES = """\
  nsrl edit --config capitals
  nsrl edit --config capitals --method alphaedit_energy
  nsrl edit --config capitals --options "{kl_budget: 0.001}" --out runs/edited
  nsrl edit --model MODEL --facts counterfact.json --count 100 --batch_size 10 --out runs/counterfact
  nsrl edit --resume runs/counterfact"""
ABOUT = """\
Write facts into a causal language model of transformers, inside a KL budget on text that is to stay. Asks every
prompt before and after; --out makes a folder with config.yaml, metrics.json, a figure and the edited model, which
transformers loads. --facts takes them from a file in CounterFact's form or ZsRE's, and judges paraphrases and
neighbours too. Needs nsrl[llm]."""
#: Rows that a terminal shows; all are in metrics.json.
SHOWN = 20


def run(arguments: Sequence[str]) -> int:
    """Edit, and print the table.

    Raises:
        NsrlError: a bad command line, --resume beside other options, or as `run_edits`.
    """
    config, options = read_arguments(
        EditConfig, arguments, command="edit", about=ABOUT, examples=EXAMPLES, resumable=True, kind="edit"
    )
    from nsrl.editing.models import require_transformers

    require_transformers()
    from nsrl.editing.commands.edit import FIGURE, run_edits
    from nsrl.files import given_path
    from nsrl.runs.folder import RunFolder, choose_folder

    folder: RunFolder | None = None
    if options["resume"] is not None:
        if config != EditConfig():
            raise NsrlError("--resume takes everything from the run's folder; leave the other options out")
        folder = RunFolder(given_path(options["resume"]))
        config = folder.read_config(EditConfig)
    elif config.out is not None:
        folder = choose_folder("edit", config.model, config.out)
    told = teller(options["progress"])
    if folder is None:
        metrics = run_edits(config, told=told)
    elif folder.finished:
        metrics = folder.read_metrics()
    else:
        try:
            with folder.made() if options["resume"] is None else folder.continued():
                metrics = run_edits(config, folder.path, told)
        except KeyboardInterrupt:
            if not folder.config.is_file():
                raise
            print(f"nsrl: interrupted; go on with: nsrl edit --resume {folder.path}", file=sys.stderr)
            return 130
    _print(metrics)
    if folder is not None:
        print(f"figure       {folder.path / FIGURE}")
        print(f"model        {folder.path}")
    return 0


def _print(metrics: dict[str, Any]) -> None:
    from nsrl.runs.report import Table

    rows = [tuple(str(word) for word in row[:4]) for row in metrics["rows"]]
    print_table(Table(("prompt", "before", "after", "wanted"), tuple(rows[:SHOWN])))
    if len(rows) > SHOWN:
        print(f"... and {len(rows) - SHOWN} more in metrics.json")
    print(f"written      {metrics['written']} of {len(rows)}")
    for name, value in (metrics["scores"] or {}).items():
        if isinstance(value, float) and value == value:
            print(f"{name.replace('_', ' '):<22} {value:.3f}")
    print(f"report       {metrics['told']}")
