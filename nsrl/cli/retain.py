"""`nsrl retain`: the portable retention file of a language model."""

from __future__ import annotations

from collections.abc import Sequence

from nsrl.cli.command import read_arguments, teller
from nsrl.editing.commands.config import RetainConfig

EXAMPLES = """\
  nsrl retain --config retain_smollm2
  nsrl retain --model MODEL --texts old.txt --out MODEL/retention.safetensors"""
ABOUT = """\
Write what a causal language model of transformers answers to some texts into one file beside its checkpoint: the
likeliest classes of every token, the others as one mass, and the model's hash. Whoever fine-tunes it later gives the
file to protect_module. Needs nsrl[llm]."""


def run(arguments: Sequence[str]) -> int:
    """Make the file, and say what is in it.

    Raises:
        NsrlError: a bad command line, or as `make_retention_file`.
    """
    config, options = read_arguments(
        RetainConfig, arguments, command="retain", about=ABOUT, examples=EXAMPLES, kind="post_training"
    )
    from nsrl.editing.models import require_transformers

    require_transformers()
    from nsrl.editing.commands.retain import make_retention_file

    found, path = make_retention_file(config, teller(options["progress"]))
    print(f"texts        {len(found)}")
    print(f"tokens       {len(found.ids)}")
    print(f"file         {path} ({path.stat().st_size / 2**20:.2f} MiB)")
    return 0
