"""The command line: finds the command, and turns errors and interruptions into sentences and exit codes."""

from __future__ import annotations

import importlib
import os
import sys
import warnings
from collections.abc import Callable, Sequence

from nsrl import __version__
from nsrl.errors import NsrlError, nearest
from nsrl.files import NO_ROOM, unwritable

#: Command, and what it is for. Its module in this package has the same name and a function `run(arguments)`.
COMMANDS: dict[str, str] = {
    "pretrain": "train an agent from scratch with stock PPO",
    "collect": "collect a retention buffer: states that an agent visits on its own task",
    "finetune": "fine-tune a pretrained agent on a new task inside a KL budget on the old one",
    "cost": "say what fine-tuning would take in time and memory, before it starts",
    "evaluate": "play an agent and report its returns, and its KL on a retention buffer",
    "continual": "learn a sequence of supervised tasks with one strategy, and measure what is forgotten",
    "edit": "write facts into a language model inside a KL budget on text that is to stay",
    "retain": "write what a language model answers into a file that later fine-tuning can be held to",
    "forecast": "say what fine-tuning a language model on new texts would cost old ones, before any training",
    "data": "put a data set of the continual benchmarks where they look for it",
    "bench": "run a benchmark: methods x seeds of a suite, or what the budget costs",
    "ntk": "tangent kernels: spectrum of a retained behaviour, gallery of figures, study of the forecast",
    "demo": "see all of it on CartPole, in three minutes",
}

#: How torch says that there is no memory, on the processor and on the GPU.
OUT_OF_MEMORY = ("can't allocate memory", "not enough memory", "CUDA out of memory")

#: Signs of a sentence.
LONGEST = 1000

HELP = """\
usage: nsrl COMMAND [--config FILE|NAME] [--KEY VALUE ...]

Fine-tune pretrained Stable-Baselines3 policies on a new task while their behaviour on the old one stays
inside a KL budget.

commands:
{commands}

options:
  -h, --help     show this help, or with a command that command's
  --version      show the version

examples:
  nsrl demo
  nsrl pretrain --config pretrain_cartpole
  nsrl finetune --config cartpole_swapped --retention.kl_budget 0.005
  nsrl finetune --help
"""


def main(arguments: Sequence[str] | None = None) -> int:
    """Run one command; returns the exit code: 0, 2 for bad input, 130 or 143 when interrupted.

    Args:
        arguments: the words after `nsrl`; None takes them from the process.
    """
    words = list(sys.argv[1:] if arguments is None else arguments)
    if not words or words[0] in ("-h", "--help", "help"):
        print(HELP.format(commands="\n".join(f"  {name:<12} {text}" for name, text in COMMANDS.items())), end="")
        return 0
    if words[0] in ("-V", "--version", "version"):
        print(f"nsrl {__version__}")
        return 0
    # Before torch and matplotlib are imported: one thread is the fastest setting for small policies.
    os.environ.setdefault("OMP_NUM_THREADS", "1")
    os.environ.setdefault("MPLBACKEND", "Agg")
    formatwarning = warnings.formatwarning
    warnings.formatwarning = lambda message, *_, **__: f"nsrl: warning: {sentence(message)}\n"
    try:
        return find_command(words[0])(words[1:]) or 0
    except NsrlError as error:
        print(f"nsrl: {sentence(error)}", file=sys.stderr)
        return 2
    except OSError as error:
        if isinstance(error, BrokenPipeError):
            # The reader of our output (head, less) has gone; there is nobody left to tell.
            os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
            return 1
        if error.errno not in NO_ROOM:
            raise
        told = unwritable(error.filename or "the output", error, "; make room and give the command again")
        print(f"nsrl: {sentence(told)}", file=sys.stderr)
        return 2
    except (MemoryError, RuntimeError) as error:
        if isinstance(error, RuntimeError) and not any(sign in str(error) for sign in OUT_OF_MEMORY):
            raise
        print("nsrl: there is not enough memory; ask for less, or use a larger machine", file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        print("nsrl: interrupted", file=sys.stderr)
        return 130
    finally:
        warnings.formatwarning = formatwarning


def sentence(message: object) -> str:
    """A message on one line, without signs that a terminal would obey: parts of it may come from a file.

    Where a value makes it longer than a screen, its middle is left out.
    """
    text = "".join(sign if sign.isprintable() else "?" for sign in " ".join(str(message).split()))
    return text if len(text) <= LONGEST else f"{text[: LONGEST - 300]} ... {text[-290:]}"


def find_command(name: str) -> Callable[[Sequence[str]], int | None]:
    """The `run` function of a command's module, which only now is imported.

    Raises:
        NsrlError: there is no such command; the nearest is suggested.
    """
    if name not in COMMANDS:
        near = nearest(name, COMMANDS, 0.5)
        hint = f"did you mean {near}?" if near else f"the commands are {', '.join(COMMANDS)}"
        raise NsrlError(f"there is no command {name!r}; {hint}")
    return importlib.import_module(f"nsrl.cli.{name}").run


if __name__ == "__main__":
    sys.exit(main())
