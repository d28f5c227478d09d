"""`nsrl bench`: suites of runs, what the budget costs, the core's speed, continual learning; JSON and figures."""

from __future__ import annotations

import argparse
import sys
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING

from nsrl.bench.engine import ENGINES
from nsrl.bench.registry import BENCHMARKS, REFERENCE, Options, run_benchmark
from nsrl.cli.command import Parser, print_table
from nsrl.cli.status_line import StatusLine
from nsrl.runs.packaged import CONFIGS

if TYPE_CHECKING:
    from nsrl.bench.suites.jobs import Status

ABOUT = """\
Run a benchmark and write its results.

  nsrl bench cartpole_swapped            all methods and seeds of configs/bench/cartpole_swapped.yaml
  nsrl bench cartpole_swapped --quick    the same, small: to see that it runs
  nsrl bench sequence_cartpole           tasks one after the other: average performance, forgetting, forward transfer
  nsrl bench trpo                        update speed and returns against sb3_contrib.TRPO, no constraint
  nsrl bench overhead                    wall time and memory against stock PPO, interleaved
  nsrl bench speed                       Gram matrices and projections against other libraries (nsrl[rivals])
  nsrl bench speed --quick --only gram_mlp,scaling
  nsrl bench continual                   all strategies of nsrl continual on its offline benchmarks
  nsrl bench continual --only permuted_digits,naive,kl_budget
  nsrl bench continual_memories          the same with 20, 100 and 500 samples a task, a KL budget against replay
  nsrl bench continual_tuning            rivals tuned by one rule, as many trials each; a KL budget with its default
  nsrl bench continual_promise           the KL of what a budget is held on, measured behind every step
  nsrl bench frontier                    every method on populations of pretrained agents: old task kept, new one learnt
  nsrl bench demo_population             the demo on twenty agents, with vector instructions and without
  nsrl bench post_training               a tiny language model learns inside a budget on what stays (nsrl[llm])
  nsrl bench cost                        what constraints cost at up to 1e8 parameters, forecast and measured
  nsrl bench run_cost                    what fine-tuning takes, forecast by nsrl cost and measured
  nsrl bench edit --only tiny            all editors of language models, batched and in sequence (nsrl[llm])
  nsrl bench agents rl-trained-agents    every agent in a folder: loaded, fine-tuned, exported, played by stock SB3
  nsrl bench frontier --engine ray --workers 200    on a Ray cluster (nsrl[cluster], docs/cluster.md)
  nsrl bench halfcheetah_backward --out runs/bench/cheetah --reference runs/reference

Runs go to --out, two at a time; what is finished there is not run again, so an interrupted benchmark goes on where it
stopped. The gathered results go to --reference as NAME.json and NAME.png.
"""


def run(arguments: Sequence[str]) -> int:
    """Parse, run, print.

    Raises:
        NsrlError: a bad command line, or as `run_benchmark`.
    """
    parser = Parser(prog="nsrl bench", description=ABOUT, formatter_class=argparse.RawDescriptionHelpFormatter)
    known = ", ".join(BENCHMARKS)
    parser.add_argument("name", help=f"a suite of configs/bench, the path of a suite, or one of {known}")
    parser.add_argument("folder", nargs="?", type=Path, help="of the agents, for nsrl bench agents")
    parser.add_argument("--out", type=Path, help="where the runs go (default runs/bench/NAME)")
    parser.add_argument("--reference", type=Path, default=REFERENCE, help="where the results go")
    parser.add_argument("--workers", type=int, default=2, help="processes at a time")
    parser.add_argument("--engine", choices=ENGINES, default="local", help="where the runs go (ray: nsrl[cluster])")
    parser.add_argument("--configs", type=Path, default=CONFIGS, help="folder of configurations (default nsrl's)")
    parser.add_argument("--quick", action="store_true", help="small sizes, to try it out; numbers mean nothing")
    speed = parser.add_argument_group("some of them only")
    speed.add_argument("--only", help="cases, benchmarks, pairs, methods or agents, separated by commas")
    speed.add_argument("--again", action="store_true", help="measure also what is finished in --out")
    speed.add_argument("--threads", type=int, help="of every measurement of speed (default all processors)")
    options = parser.parse_args(list(arguments))
    only = tuple(options.only.split(",")) if options.only else ()
    chosen = Options(
        options.out,
        options.reference,
        options.configs,
        options.workers,
        only,
        options.quick,
        options.again,
        options.threads,
        options.folder,
        options.engine,
    )
    results = run_benchmark(options.name, chosen, Terminal())
    for table in results.tables:
        print_table(table)
        print()
    for line in results.remarks:
        print(line)
    for what, where in results.files:
        print(f"{what:<8} {where}")
    return 0


class Terminal:
    """A benchmark's console: results on stdout, the rest on stderr."""

    @contextmanager
    def status(self, name: str) -> Iterator[Callable[[Status], None]]:
        """A line that says how far jobs are."""
        with StatusLine(name) as line:
            yield line.show

    def say(self, text: str) -> None:
        """On stdout, at once."""
        print(text, flush=True)

    def note(self, text: str) -> None:
        """On stderr."""
        print(text, file=sys.stderr, flush=True)
