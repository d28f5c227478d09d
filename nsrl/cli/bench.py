"""`nsrl bench`: suites of runs, what the budget costs, the core's speed, continual learning; JSON and figures."""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence
from pathlib import Path

from nsrl.errors import NsrlError

REFERENCE = Path("runs/reference")
ABOUT = """\
Run a benchmark and write its results.

  nsrl bench cartpole_swapped            all methods and seeds of configs/bench/cartpole_swapped.yaml
  nsrl bench sequence_cartpole           tasks one after the other: average performance, forgetting, forward transfer
  nsrl bench trpo                        update speed and returns against sb3_contrib.TRPO, no constraint
  nsrl bench overhead                    wall time and memory against stock PPO, interleaved
  nsrl bench speed                       Gram matrices and projections against other libraries (nsrl[rivals])
  nsrl bench speed --quick --only gram_mlp,scaling
  nsrl bench continual                   all strategies of nsrl continual on its offline benchmarks
  nsrl bench continual --only permuted_digits,naive,kl_budget
  nsrl bench halfcheetah_backward --out runs/bench/cheetah --reference runs/reference

Runs go to --out, two at a time; what is finished there is not run again, so an interrupted benchmark goes on where it
stopped. The gathered results go to --reference as NAME.json and NAME.png.
"""


def run(arguments: Sequence[str]) -> int:
    """Parse, run, print."""
    parser = argparse.ArgumentParser(prog="nsrl bench", description=ABOUT, exit_on_error=False,
                                     formatter_class=argparse.RawDescriptionHelpFormatter)  # fmt: skip
    parser.add_argument(
        "name", help="a suite of configs/bench, the path of a suite, trpo, overhead, speed or continual"
    )
    parser.add_argument("--out", type=Path, help="where the runs go (default runs/bench/NAME)")
    parser.add_argument("--reference", type=Path, default=REFERENCE, help="where the results go")
    parser.add_argument("--workers", type=int, default=2, help="processes at a time")
    parser.add_argument("--configs", type=Path, default=Path("configs"), help="folder of the configurations")
    speed = parser.add_argument_group("speed and continual only")
    speed.add_argument("--only", help="cases, or benchmarks and strategies, separated by commas")
    speed.add_argument("--quick", action="store_true", help="small sizes, to try it out; numbers mean nothing")
    speed.add_argument("--again", action="store_true", help="measure also what is finished in --out")
    speed.add_argument("--threads", type=int, help="of every measurement of speed (default all processors)")
    try:
        options = parser.parse_args(list(arguments))
    except argparse.ArgumentError as error:
        raise NsrlError(f"nsrl bench: {error}") from error
    if options.workers < 1:
        raise NsrlError(f"--workers must be at least 1, not {options.workers}")
    if options.name == "speed":
        return _speed(options)
    if options.name == "continual" and not options.threads:
        return _continual(options)
    if options.only or options.quick or options.again or options.threads:
        raise NsrlError(f"--only, --quick and --again are for nsrl bench speed and continual, --threads is for speed, "
                        f"not for {options.name}")  # fmt: skip
    out = options.out or Path("runs/bench") / Path(options.name).stem
    if options.name == "overhead":
        return _overhead(options.configs, out, options.reference)
    if options.name == "trpo":
        return _trpo(out, options.reference, options.workers)
    path = Path(options.name) if options.name.endswith(".yaml") else options.configs / "bench" / f"{options.name}.yaml"
    if not path.is_file():
        suites = sorted(file.stem for file in (options.configs / "bench").glob("*.yaml"))
        known = ", ".join([*suites, "trpo", "overhead", "speed", "continual"])
        raise NsrlError(f"there is no suite {options.name!r}; known: {known}")
    return _suite(path, out, options.reference, options.workers)


def _suite(path: Path, out: Path, reference: Path, workers: int) -> int:
    from nsrl.bench.suites.pairs import read_suite, run_suite, write_suite
    from nsrl.bench.suites.report import draw_tradeoff, learning_table, suite_table
    from nsrl.bench.suites.sequences import draw_sequence_suite, run_sequence_suite, sequence_suite_table
    from nsrl.cli.command import print_table
    from nsrl.cli.status_line import StatusLine

    suite = read_suite(path)
    carry_out, draw, tabulate = run_suite, draw_tradeoff, suite_table
    if suite.is_sequence:
        carry_out, draw, tabulate = run_sequence_suite, draw_sequence_suite, sequence_suite_table
    with StatusLine(suite.name) as line:
        content = carry_out(suite, out, workers=workers, on_status=line.show)
    write_suite(content, reference / f"{suite.name}.json")
    draw(content, reference / f"{suite.name}.png")
    print_table(tabulate(content))
    if not suite.is_sequence:
        print_table(learning_table(content["curves"], f"{suite.name}: return on the new task after so many steps"))
    print(f"results  {reference / suite.name}.json\nfigure   {reference / suite.name}.png")
    return 0


def _trpo(out: Path, reference: Path, workers: int) -> int:
    from nsrl.bench.studies.trpo import CASES, compare_returns, measure_trpo, summarise_returns, trpo_tables
    from nsrl.cli.command import print_table
    from nsrl.cli.status_line import StatusLine
    from nsrl.files import write_json
    from nsrl.runs.machine import describe_environment
    from nsrl.runs.training import use_one_thread

    with StatusLine("trpo") as line:
        runs = compare_returns(out, workers=workers, on_status=line.show)
    use_one_thread()
    updates = [measure_trpo(case.env) for case in CASES]
    content = {
        "updates": updates, "returns": summarise_returns(runs), "runs": runs,
        "cases": {case.env: dict(case.settings) for case in CASES}, "environment": describe_environment(),
    }  # fmt: skip
    write_json(reference / "trpo.json", content)
    for table in trpo_tables(content):
        print_table(table)
    print(f"results  {reference / 'trpo.json'}")
    return 0


def _overhead(configs: Path, out: Path, reference: Path) -> int:
    from nsrl.bench.studies.overhead import measure_memory, measure_overhead
    from nsrl.bench.suites.jobs import run_jobs
    from nsrl.bench.suites.pairs import read_suite
    from nsrl.cli.status_line import StatusLine
    from nsrl.files import write_json
    from nsrl.runs.config import FinetuneConfig
    from nsrl.runs.training import use_one_thread

    use_one_thread()
    results = {}
    for name, steps in (("cartpole_swapped", None), ("halfcheetah_backward", 200_000)):
        suite = read_suite(configs / "bench" / f"{name}.yaml")
        jobs = suite.pretraining_jobs(out.with_name(name))[:1]
        with StatusLine(f"{name}, pretraining") as line:
            run_jobs(jobs, on_status=line.show)
        config = next(
            config
            for config in suite.methods.values()
            if isinstance(config, FinetuneConfig) and config.method == "null_space"
        )
        print(f"{name}: stock PPO and NullSpacePPO in turn, three times each")
        results[name] = measure_overhead(config, jobs[0].folder, steps=steps, on_run=_print_run)
        print(f"  ratio of medians {results[name]['ratio']:.3f}")
        results[name]["memory"] = measure_memory(configs / f"{name}.yaml", jobs[0].folder, 20_000)
        print(f"  constraint's peak memory {results[name]['memory']['constraint_mb']:.1f} MB")
    write_json(reference / "overhead.json", results)
    print(f"results  {reference / 'overhead.json'}")
    return 0


def _speed(options: argparse.Namespace) -> int:
    from nsrl.bench.speed.benchmark import Settings, measure_speed
    from nsrl.bench.speed.report import draw_scaling, speed_tables
    from nsrl.cli.command import print_table
    from nsrl.files import write_json
    from nsrl.runs.machine import describe_environment

    threads = describe_environment()["cpus"] if options.threads is None else options.threads
    if threads < 1:
        raise NsrlError(f"--threads must be at least 1, not {threads}")
    out = options.out or Path("runs/bench/speed_quick" if options.quick else "runs/bench/speed")
    # The committed numbers are not overwritten by those of small sizes.
    reference = out / "results" if options.quick and options.reference == REFERENCE else options.reference
    content = measure_speed(out, Settings(options.quick, threads), only=options.only.split(",") if options.only else (),
                            again=options.again, on_progress=_print_progress)  # fmt: skip
    write_json(reference / "speed.json", content)
    for table in speed_tables(content):
        print_table(table)
        print()
    print("* first run only: its library has a clearly faster variant")
    print(f"results  {reference / 'speed.json'}")
    if "scaling" in content:
        print(f"figure   {draw_scaling(content['scaling'], reference / 'speed.png')}")
    return 0


def _continual(options: argparse.Namespace) -> int:
    from nsrl.bench.studies.continual import plan_cells, run_cells
    from nsrl.bench.studies.continual_report import benchmark_tables, draw_benchmarks, write_markdown
    from nsrl.cli.command import print_table
    from nsrl.cli.status_line import StatusLine
    from nsrl.files import write_json

    only = tuple(options.only.split(",")) if options.only else ()
    out = options.out or Path("runs/bench/continual_quick" if options.quick else "runs/bench/continual")
    # The committed numbers are overwritten by those of the whole benchmark only.
    partial = (options.quick or only) and options.reference == REFERENCE
    reference = out / "results" if partial else options.reference / "continual"
    cells = plan_cells(options.configs, only=only, quick=options.quick)
    with StatusLine("continual") as line:
        content = run_cells(cells, out, workers=options.workers, again=options.again, on_status=line.show)
    write_json(reference / "continual.json", content)
    for table in benchmark_tables(content):
        print_table(table)
        print()
    for name, why in content["failures"].items():
        print(f"nsrl: {name} came to no result: {why}", file=sys.stderr)
    print(f"results  {reference / 'continual.json'}\nreport   {write_markdown(content, reference / 'continual.md')}\n"
          f"figure   {draw_benchmarks(content, reference / 'continual.png')}")  # fmt: skip
    return 0


def _print_progress(text: str) -> None:
    print(f"nsrl bench speed: {text}", file=sys.stderr, flush=True)


def _print_run(method: str, seconds: float) -> None:
    print(f"  {method:<10} {seconds:7.1f} s", flush=True)
