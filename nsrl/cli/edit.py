"""`nsrl edit`: facts written into a language model."""

from __future__ import annotations

import sys
from collections.abc import Sequence

from nsrl.cli.command import print_table, read_arguments
from nsrl.editing.config import EditConfig

EXAMPLES = """\
  nsrl edit --config capitals
  nsrl edit --config capitals --method alphaedit_energy
  nsrl edit --config capitals --options "{kl_budget: 0.001}" --out runs/edited"""
ABOUT = """\
Write facts into a causal language model of transformers, inside a KL budget on text that is to stay. Asks every
prompt before and after; --out writes the edited model, which transformers loads. Needs nsrl[llm]."""


def run(arguments: Sequence[str]) -> int:
    """Edit, and print the table.

    Raises:
        NsrlError: a bad command line, or as `run_edits`.
    """
    config, options = read_arguments(EditConfig, arguments, command="edit", about=ABOUT, examples=EXAMPLES, kind="edit")
    from nsrl.editing.models import require_transformers

    require_transformers()
    from nsrl.editing.runner import run_edits
    from nsrl.runs.report import Table

    show = options["progress"]
    outcome = run_edits(config, (lambda text: print(f"nsrl: {text}", file=sys.stderr)) if show else lambda _: None)
    print_table(Table(("prompt", "before", "after", "wanted"), tuple(outcome.rows)))
    print(f"written      {outcome.written} of {len(outcome.rows)}")
    print(f"report       {outcome.report}")
    if outcome.folder is not None:
        print(f"model        {outcome.folder}")
    return 0
