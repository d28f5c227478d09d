"""`nsrl ntk`: the spectrum of a retained behaviour, the gallery of figures, and the study of the forecast."""

from __future__ import annotations

import argparse
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import TypeVar

from nsrl.cli.command import Parser
from nsrl.errors import NsrlError

GALLERY = Path("runs/reference/ntk")
QUICK = Path("runs/gallery-quick")
N = TypeVar("N", int, float)
ABOUT = """\
See how an agent learns and forgets through tangent kernels.

  nsrl ntk spectrum --agent agent.zip --buffer retention.npz
  nsrl ntk gallery
  nsrl ntk gallery --only certificate,drift --again --out runs/gallery
  nsrl ntk forecast
  nsrl ntk forecast --agent agent.zip --buffer retention.npz --tasks swapped,long_pole --seeds 0,1,2

spectrum   what a buffer retains of an agent's behaviour: rank, effective dimension, eigenvalues
gallery    draw every figure anew, with its numbers and a page that shows them all; goes on where it stopped
forecast   fine-tune a CartPole agent 48 times, and compare the forgetting that was forecast with what happened
"""


def run(arguments: Sequence[str]) -> int:
    """Parse, run, print.

    Raises:
        NsrlError: a bad command line, or as what it runs.
    """
    parser = _parser()
    try:
        options = parser.parse_args(list(arguments))
    except argparse.ArgumentError as error:
        raise NsrlError(f"nsrl ntk: {error}") from error
    return {"spectrum": _spectrum, "gallery": _gallery, "forecast": _forecast}[options.what](options)


def _parser() -> argparse.ArgumentParser:
    parser = Parser(
        prog="nsrl ntk",
        usage="nsrl ntk [-h] {spectrum,gallery,forecast} ...",
        description=ABOUT,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    commands = parser.add_subparsers(
        dest="what", required=True, metavar="{spectrum,gallery,forecast}", parser_class=Parser
    )
    spectrum = commands.add_parser("spectrum", prog="nsrl ntk spectrum", help="of a retained behaviour")
    spectrum.add_argument("--agent", required=True, help="an SB3 zip, a run folder or a hub address")
    spectrum.add_argument("--buffer", type=Path, required=True, help="its retention buffer")
    spectrum.add_argument("--states", type=_positive, default=256, help="buffer states linearised (default 256)")
    spectrum.add_argument("--preserve", choices=("distribution", "mode"), default="distribution")
    spectrum.add_argument("--kl_budget", type=float, default=0.01, help="of the effective dimension (default 0.01)")
    spectrum.add_argument("--step", type=float, default=0.1, help="norm of a step, for the same (default 0.1)")
    spectrum.add_argument("--trust_buffer", action="store_true", help="accept another agent's buffer")
    spectrum.add_argument("--out", type=Path, help="folder for spectrum.json and spectrum.png (default: none)")
    gallery = commands.add_parser("gallery", prog="nsrl ntk gallery", help="draw the figures")
    gallery.add_argument("--out", type=Path, help=f"folder (default {GALLERY}, with --quick {QUICK})")
    gallery.add_argument("--only", type=_words, help="names of figures, separated by commas")
    gallery.add_argument("--workers", type=_positive, default=2, help="processes at a time (default 2)")
    gallery.add_argument("--again", action="store_true", help="draw also what is there")
    gallery.add_argument("--quick", action="store_true", help="small sizes, to try it out; the numbers mean nothing")
    study = commands.add_parser("forecast", prog="nsrl ntk forecast", help="forecast and outcome over many runs")
    study.add_argument("--agent", help="a CartPole agent: an SB3 zip or a run folder (default: train one, 15 s)")
    study.add_argument("--buffer", type=Path, help="its retention buffer (default: collect one of 512 states)")
    study.add_argument("--out", type=Path, default=GALLERY / "forecast.json", help=f"default {GALLERY}/forecast.json")
    study.add_argument("--tasks", type=_words, default=None, help="CartPole variants, separated by commas")
    study.add_argument("--learning_rates", type=_floats, default=(1e-4, 3e-4, 1e-3), help="default 1e-4,3e-4,1e-3")
    study.add_argument("--timesteps", type=_integers, default=(4096,), help="lengths of the runs (default 4096)")
    study.add_argument("--again", action="store_true", help="begin anew, whatever the file holds")
    study.add_argument("--seeds", type=_integers, default=(2, 3), help="default 2,3")
    return parser


def _spectrum(options: argparse.Namespace) -> int:
    from nsrl.analysis import retained_behaviour
    from nsrl.cli.command import print_table
    from nsrl.files import write_json
    from nsrl.rl.retention.buffer import RetentionBuffer
    from nsrl.runs.report import Table
    from nsrl.runs.training import use_one_thread

    use_one_thread()
    buffer = RetentionBuffer.load(options.buffer)
    found = retained_behaviour(
        options.agent, buffer, states=options.states, preserve=options.preserve, trust_buffer=options.trust_buffer
    )
    dimension = found.effective_dimension(options.kl_budget, options.step)
    values = found.spectrum.values[: max(found.spectrum.rank, 1)]
    rows = (
        ("states linearised", str(found.states)),
        ("protected parameters", str(found.parameters)),
        ("rank", f"{found.spectrum.rank} ({found.rank_fraction:.1%} of the parameters)"),
        (f"effective dimension at KL {options.kl_budget:g}, step {options.step:g}", f"{dimension:.1f}"),
        (
            "eigenvalues: largest, median, smallest",
            f"{float(values[0]):.3g}, {float(values[len(values) // 2]):.3g}, {float(values[-1]):.3g}",
        ),
    )
    print_table(Table(("retained behaviour", ""), rows))
    if options.out is not None:
        from nsrl.bench.gallery.policies import spectrum_plate

        content = {
            "states": found.states,
            "parameters": found.parameters,
            "rank": found.spectrum.rank,
            "effective_dimension": dimension,
            "kl_budget": options.kl_budget,
            "step": options.step,
            "eigenvalues": values.tolist(),
        }
        write_json(options.out / "spectrum.json", content)
        print(f"numbers  {options.out / 'spectrum.json'}")
        print(f"figure   {spectrum_plate(found).save(options.out / 'spectrum.png')}")
    return 0


def _gallery(options: argparse.Namespace) -> int:
    from nsrl.bench.gallery import make_gallery
    from nsrl.runs.lock import alone_in

    if options.only is not None and not options.only:
        raise NsrlError("nsrl ntk gallery: --only names no figure; leave it out to draw all")
    out = options.out or (QUICK if options.quick else GALLERY)
    with alone_in(out), _progress("gallery") as show:
        figures = make_gallery(
            out,
            only=options.only or (),
            workers=options.workers,
            again=options.again,
            quick=options.quick,
            on_progress=show,
        )
    print(f"figures  {len(figures)}\npage     {out / 'README.md'}")
    return 0


def _forecast(options: argparse.Namespace) -> int:
    from nsrl.analysis.study import CARTPOLES, OLD_TASK, forecast_study, planned_runs, pretrained_cartpole
    from nsrl.bench.gallery.page import write_page
    from nsrl.bench.gallery.policies import study_plate
    from nsrl.cli.command import print_table
    from nsrl.rl.retention.buffer import RetentionBuffer
    from nsrl.runs.report import Table, scientific
    from nsrl.runs.training import use_one_thread

    use_one_thread()
    tasks = tuple(CARTPOLES) if options.tasks is None else options.tasks
    planned_runs(tasks, options.learning_rates, options.timesteps, options.seeds)  # bad input before the training
    if options.buffer is not None and options.agent is None:
        raise NsrlError("nsrl ntk forecast: --buffer needs --agent, the agent that it was collected with")
    buffer = None if options.buffer is None else RetentionBuffer.load(options.buffer)
    agent = options.agent or pretrained_cartpole()
    with _progress("fine-tuning runs") as show:
        study = forecast_study(
            agent,
            buffer or RetentionBuffer.collect(agent, OLD_TASK, n_states=512),
            options.out,
            tasks=tasks,
            learning_rates=options.learning_rates,
            timesteps=options.timesteps,
            seeds=options.seeds,
            again=options.again,
            on_run=lambda done, total: show("run", done, total),
        )
    head = ("task", "learning rate", "seed", "first update: forecast", "measured", "whole run: forecast", "measured")
    kinds = [(horizon, key) for horizon in ("first_update", "whole_run") for key in ("forecast_kl", "measured_kl")]
    rows = tuple(
        (
            row["task"],
            f"{row['learning_rate']:g}",
            str(row["seed"]),
            *(scientific(row[horizon][key]) for horizon, key in kinds),
        )
        for row in study.rows
    )
    print_table(Table(head, rows))
    for name, found in (("first update", study.first_update), ("whole run", study.whole_run)):
        ranks = tuple(
            (
                by,
                _with_interval(rank.spearman, rank.spearman_interval),
                _with_interval(rank.partial, rank.partial_interval),
            )
            for by, rank in {"cross-kernel": found.forecast, **found.rivals}.items()
        )
        within = tuple(
            (f"cross-kernel, {group}", _with_interval(value, None), "") for group, value in found.within.items()
        )
        print_table(Table((f"rank correlation, {name}", "all runs", "at equal settings"), ranks + within))
    print(f"results  {options.out}\nfigure   {study_plate(study).save(options.out.with_suffix('.png'))}")
    if (options.out.parent / "README.md").is_file():
        write_page(options.out.parent)
    return 0


def _with_interval(value: float | None, interval: tuple[float, float] | None) -> str:
    return "-" if value is None else f"{value:.2f}" + (f" [{interval[0]:.2f}, {interval[1]:.2f}]" if interval else "")


@contextmanager
def _progress(name: str) -> Iterator[Callable[[str, int, int], None]]:
    from rich.console import Console
    from rich.progress import Progress

    with ExitStack() as stack:
        bar = Progress(console=Console(stderr=True))
        task = bar.add_task(name, total=None)

        def show(last: str, done: int, total: int) -> None:
            if not bar.live.is_started:  # not before there is something to show: bad input is told first, and alone
                stack.enter_context(bar)
            bar.update(task, completed=done, total=total, description=f"{name}: {last}")

        yield show


def _positive(text: str) -> int:
    if not text.isdecimal() or int(text) < 1:
        raise argparse.ArgumentTypeError(f"must be a whole number from 1 on, not {text!r}")
    return int(text)


def _words(text: str) -> tuple[str, ...]:
    return tuple(word.strip() for word in text.split(",") if word.strip())


def _floats(text: str) -> tuple[float, ...]:
    return _numbers(text, float)


def _integers(text: str) -> tuple[int, ...]:
    return _numbers(text, int)


def _numbers(text: str, kind: type[N]) -> tuple[N, ...]:
    try:
        return tuple(kind(word) for word in _words(text))
    except ValueError as error:
        whole = "whole " if kind is int else ""
        raise argparse.ArgumentTypeError(f"must be {whole}numbers separated by commas, not {text!r}") from error
