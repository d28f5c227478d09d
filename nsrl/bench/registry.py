"""The benchmarks by name: what each measures, draws and writes; whoever asks prints the tables.

A benchmark is a function of `Options` and a `Console` that is registered under its name; a suite of configs/bench needs
no registration. What a benchmark needs is imported when it runs, so that a mistyped name is answered at once.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, Protocol

from nsrl.bench.engine import check_engine
from nsrl.errors import NsrlError, near
from nsrl.runs.lock import alone_in
from nsrl.runs.memory import check_memory
from nsrl.runs.packaged import CONFIGS

if TYPE_CHECKING:
    from nsrl.bench.suites.jobs import Status
    from nsrl.runs.report import Table

#: Where results that are committed lie.
REFERENCE = Path("runs/reference")
#: Bytes that a process takes at least: torch, and what it runs.
WORKER = 2**28


@dataclass(frozen=True)
class Options:
    """What a benchmark is run with.

    Attributes:
        out: where the runs go; None takes runs/bench/NAME.
        reference: where the results go.
        configs: folder of the configurations; those that come with nsrl.
        workers: processes at a time.
        only: cases, or benchmarks and strategies; empty for all.
        quick: small sizes, whose numbers mean nothing.
        again: measure also what is finished in `out`.
        threads: of every measurement of speed; None for all processors.
        folder: of the agents to try.
        engine: where runs go: "local", processes of this machine, or "ray".
    """

    out: Path | None = None
    reference: Path = REFERENCE
    configs: Path = CONFIGS
    workers: int = 2
    only: tuple[str, ...] = ()
    quick: bool = False
    again: bool = False
    threads: int | None = None
    folder: Path | None = None
    engine: str = "local"


class Console(Protocol):
    """Who watches a benchmark."""

    def status(self, name: str) -> AbstractContextManager[Callable[[Status], None]]:
        """While it is open: takes how far jobs are."""
        ...

    def say(self, text: str) -> None:
        """A result on the way."""
        ...

    def note(self, text: str) -> None:
        """How far it is, or what went wrong; no result."""
        ...


@dataclass(frozen=True)
class Results:
    """What a benchmark found.

    Attributes:
        tables: to be printed.
        files: what was written, as (what, where).
        remarks: lines behind the tables.
    """

    tables: Sequence[Table]
    files: Sequence[tuple[str, object]]
    remarks: Sequence[str] = ()


Benchmark = Callable[[Options, Console], Results]
BENCHMARKS: dict[str, Benchmark] = {}
#: Which of them take which of the options that not all take.
TAKES: dict[str, frozenset[str]] = {}
SUITES_TAKE = frozenset({"quick", "engine"})


def benchmark(name: str, *takes: str) -> Callable[[Benchmark], Benchmark]:
    """Register a benchmark under a name.

    Args:
        name: on the command line.
        takes: which of the options "only", "quick", "again", "threads", "folder" and "engine" it knows.
    """

    def register(run: Benchmark) -> Benchmark:
        BENCHMARKS[name], TAKES[name] = run, frozenset(takes)
        return run

    return register


def run_benchmark(name: str, options: Options, console: Console) -> Results:
    """Run a registered benchmark, or a suite by its name in configs/bench or by its path.

    Raises:
        NsrlError: there is no such benchmark, or it does not take one of the options that are set.
    """
    if options.workers < 1:
        raise NsrlError(f"--workers must be at least 1, not {options.workers}")
    keys = ("only", "quick", "again", "threads", "folder", "engine")
    given = {key for key in keys if getattr(options, key) not in ((), False, None, "local")}
    for key in sorted(given - TAKES.get(name, SUITES_TAKE)):
        takers = " and ".join([taker for taker in TAKES if key in TAKES[taker]] + ["suites"] * (key in SUITES_TAKE))
        what = "a folder" if key == "folder" else f"--{key}"
        raise NsrlError(f"{what} is for nsrl bench {takers}, not for {name}; leave it out")
    check_engine(options.engine)
    if options.engine == "local":  # others have machines of their own
        check_memory(f"--workers {options.workers}", options.workers * WORKER)
    if name in BENCHMARKS:
        return BENCHMARKS[name](options, console)
    path = Path(name) if name.endswith(".yaml") else options.configs / "bench" / f"{name}.yaml"
    if not path.is_file():
        known = sorted(file.stem for file in (options.configs / "bench").glob("*.yaml")) + list(BENCHMARKS)
        alike = near(path.stem, known, 3)
        hint = f"did you mean {', '.join(alike)}? " if alike else ""
        raise NsrlError(f"there is no suite {name!r}; {hint}known: {', '.join(known)}")
    return _suite(path, options, console)


def _out(options: Options, name: str) -> Path:
    return options.out or Path("runs/bench") / name


def _suite(path: Path, options: Options, console: Console) -> Results:
    from nsrl.bench.suites import sequences
    from nsrl.bench.suites.pairs import read_suite, run_suite, write_suite
    from nsrl.bench.suites.report import draw_tradeoff, learning_table, suite_table

    suite = read_suite(path)
    out = _out(options, f"{path.stem}_quick" if options.quick else path.stem)
    reference = options.reference
    if options.quick:
        suite = suite.shortened()
        # The committed numbers are not overwritten by those of small sizes.
        reference = out / "results" if reference == REFERENCE else reference
    with alone_in(out), console.status(suite.name) as show:
        run = sequences.run_sequence_suite if suite.is_sequence else run_suite
        content = run(suite, out, workers=options.workers, engine=options.engine, on_status=show)
    results, figure = (reference / f"{suite.name}.{kind}" for kind in ("json", "png"))
    write_suite(content, results)
    if suite.is_sequence:
        sequences.draw_sequence_suite(content, figure)
        tables = [sequences.sequence_suite_table(content)]
    else:
        draw_tradeoff(content, figure)
        title = f"{suite.name}: return on the new task after so many steps"
        tables = [suite_table(content), learning_table(content["curves"], title)]
    return Results(tables, (("results", results), ("figure", figure)))


@benchmark("trpo")
def trpo(options: Options, console: Console) -> Results:
    """Update speed and returns against sb3_contrib.TRPO, without a constraint."""
    from nsrl.bench.studies.trpo import (
        CASES,
        compare_returns,
        measure_protected_trpo,
        measure_trpo,
        summarise_returns,
        trpo_tables,
    )
    from nsrl.files import write_json
    from nsrl.runs.machine import describe_environment
    from nsrl.runs.training import use_one_thread

    out = _out(options, "trpo")
    with alone_in(out), console.status("trpo") as show:
        runs = compare_returns(out, workers=options.workers, on_status=show)
    use_one_thread()
    updates = [measure_trpo(case.env) for case in CASES]
    agent = REFERENCE / "agents" / "cartpole_swapped" / "default_0_x1.zip"
    updates.append(measure_protected_trpo(agent, "nsrl/CartPole-v0", "nsrl/CartPoleSwapped-v0"))
    content = {
        "updates": updates,
        "returns": summarise_returns(runs),
        "runs": runs,
        "cases": {case.env: dict(case.settings) for case in CASES},
        "environment": describe_environment(),
    }
    results = options.reference / "trpo.json"
    write_json(results, content)
    return Results(trpo_tables(content), (("results", results),))


@benchmark("overhead")
def overhead(options: Options, console: Console) -> Results:
    """Wall time and memory against stock PPO, interleaved."""
    from nsrl.bench.studies.overhead import measure_memory, measure_overhead
    from nsrl.bench.studies.stepping import measure_stepping
    from nsrl.bench.suites.jobs import run_jobs
    from nsrl.bench.suites.pairs import read_suite
    from nsrl.files import write_json
    from nsrl.runs.config import FinetuneConfig
    from nsrl.runs.training import use_one_thread

    use_one_thread()
    console.say("environments alone: SB3's DummyVecEnv and copies stepped as arrays in turn, five times each")
    found: dict[str, Any] = {"environments": measure_stepping()}
    for task, counts in found["environments"].items():
        for count, speed in counts.items():
            console.say(f"  {task}, {count} copies: {speed['ratio']:.2f} times as fast")
    for name, steps in (("cartpole_swapped", None), ("halfcheetah_backward", 200_000)):
        suite = read_suite(options.configs / "bench" / f"{name}.yaml")
        out = _out(options, "overhead").with_name(name)
        jobs = suite.pretraining_jobs(out)[:1]
        with alone_in(out), console.status(f"{name}, pretraining") as show:
            run_jobs(jobs, on_status=show)
        config = next(
            config
            for config in suite.methods.values()
            if isinstance(config, FinetuneConfig) and config.method == "null_space"
        )
        console.say(f"{name}: stock PPO and NullSpacePPO in turn, three times each")
        found[name] = measure_overhead(
            config,
            jobs[0].folder,
            steps=steps,
            on_run=lambda method, seconds: console.say(f"  {method:<10} {seconds:7.1f} s"),
        )
        console.say(
            f"  ratio of medians {found[name]['ratio']:.3f} (of processor time {found[name]['processor_ratio']:.3f}), "
            f"the constraint's own share {found[name]['constraint_share']:.1%}"
        )
        rival = found[name]["sbx"]
        console.say(
            "  sbx-rl is not installed: not measured (nsrl[sbx])"
            if rival is None
            else f"  over sbx-rl's PPO {rival['ratio']:.3f} (of processor time {rival['processor_ratio']:.3f})"
        )
        found[name]["memory"] = measure_memory(options.configs / f"{name}.yaml", jobs[0].folder, 20_000)
        console.say(f"  constraint's peak memory {found[name]['memory']['constraint_mb']:.1f} MB")
    results = options.reference / "overhead.json"
    write_json(results, found)
    return Results((), (("results", results),))


@benchmark("speed", "only", "quick", "again", "threads")
def speed(options: Options, console: Console) -> Results:
    """Gram matrices and projections against other libraries.

    Raises:
        NsrlError: `threads` is below 1.
    """
    from nsrl.bench.speed.benchmark import Settings, measure_speed
    from nsrl.bench.speed.report import draw_scaling, speed_tables
    from nsrl.files import write_json
    from nsrl.runs.machine import describe_environment

    threads = describe_environment()["cpus"] if options.threads is None else options.threads
    if threads < 1:
        raise NsrlError(f"--threads must be at least 1, not {threads}")
    out = _out(options, "speed_quick" if options.quick else "speed")
    # The committed numbers are not overwritten by those of small sizes.
    reference = out / "results" if options.quick and options.reference == REFERENCE else options.reference
    with alone_in(out):
        content = measure_speed(
            out,
            Settings(options.quick, threads),
            only=options.only,
            again=options.again,
            on_progress=lambda text: console.note(f"nsrl bench speed: {text}"),
        )
    files: list[tuple[str, object]] = [("results", reference / "speed.json")]
    write_json(reference / "speed.json", content)
    if "scaling" in content:
        files.append(("figure", draw_scaling(content["scaling"], reference / "speed.png")))
    return Results(speed_tables(content), files, ["* first run only: its library has a clearly faster variant"])


@benchmark("continual", "only", "quick", "again", "engine")
def continual(options: Options, console: Console) -> Results:
    """All strategies of supervised continual learning on its offline benchmarks."""
    from nsrl.bench.studies.continual import plan_cells, run_cells
    from nsrl.bench.studies.continual_report import benchmark_tables, draw_benchmarks, write_markdown
    from nsrl.files import write_json

    out = _out(options, "continual_quick" if options.quick else "continual")
    # The committed numbers are overwritten by those of the whole benchmark only.
    partial = (options.quick or options.only) and options.reference == REFERENCE
    reference = out / "results" if partial else options.reference / "continual"
    cells = plan_cells(options.configs, only=options.only, quick=options.quick)
    with alone_in(out), console.status("continual") as show:
        content = run_cells(
            cells, out, workers=options.workers, again=options.again, engine=options.engine, on_status=show
        )
    write_json(reference / "continual.json", content)
    for name, why in content["failures"].items():
        console.note(f"nsrl: {name} came to no result: {why}")
    files = (
        ("results", reference / "continual.json"),
        ("report", write_markdown(content, reference / "continual.md")),
        ("figure", draw_benchmarks(content, reference / "continual.png")),
    )
    return Results(benchmark_tables(content), files)


@benchmark("continual_memories", "only", "quick", "again", "engine")
def continual_memories(options: Options, console: Console) -> Results:
    """A KL budget with its default against replay with 20, 100 and 500 samples a task, nothing tuned."""
    from nsrl.bench.studies.continual import run_cells
    from nsrl.bench.studies.continual_memories import broken, plan_memories
    from nsrl.bench.studies.continual_report import benchmark_tables, draw_benchmarks, write_markdown
    from nsrl.files import write_json

    out = _out(options, "continual_memories_quick" if options.quick else "continual_memories")
    reference = out / "results" if options.quick and options.reference == REFERENCE else options.reference
    reference = reference / "continual"
    name = "_".join(["memories", *(part for part in options.only)])
    cells = plan_memories(options.configs, only=options.only, quick=options.quick)
    with alone_in(out), console.status("continual_memories") as show:
        content = run_cells(
            cells, out, workers=options.workers, again=options.again, engine=options.engine, on_status=show
        )
    write_json(reference / f"{name}.json", content)
    for failed, why in content["failures"].items():
        console.note(f"nsrl: {failed} came to no result: {why}")
    command = " ".join(["nsrl bench continual_memories", *(["--only " + ",".join(options.only)] * bool(options.only))])
    title = "Continual learning with few samples: what stands after the name is how many are kept of a task"
    files = (
        ("results", reference / f"{name}.json"),
        ("report", write_markdown(content, reference / f"{name}.md", title, command)),
        ("figure", draw_benchmarks(content, reference / f"{name}.png")),
    )
    return Results(benchmark_tables(content), files, broken(content))


@benchmark("continual_tuning", "only", "quick", "again", "engine")
def continual_tuning(options: Options, console: Console) -> Results:
    """Rivals tuned by one rule, with as many trials each, against a KL budget with its default."""
    from nsrl.bench.continual.tuning import plan_tuning, run_tuning
    from nsrl.bench.studies.continual_report import benchmark_tables, draw_benchmarks, write_markdown
    from nsrl.files import write_json

    out = _out(options, "continual_tuning_quick" if options.quick else "continual_tuning")
    # As for continual: the committed numbers are those of the whole benchmark, or were asked for.
    partial = (options.quick or options.only) and options.reference == REFERENCE
    reference = out / "results" if partial else options.reference / "continual"
    plan = plan_tuning(options.configs, only=options.only, quick=options.quick)
    with alone_in(out), console.status("continual_tuning") as show:
        content = run_tuning(
            plan, out, workers=options.workers, again=options.again, engine=options.engine, on_status=show
        )
    write_json(reference / "tuned.json", content)
    for failed, why in content["failures"].items():
        console.note(f"nsrl: {failed} came to no result: {why}")
    command = " ".join(["nsrl bench continual_tuning", *(["--only " + ",".join(options.only)] * bool(options.only))])
    title = f"Continual learning: rivals tuned with at most {plan.trials} trials each, a KL budget with its default"
    files = (
        ("results", reference / "tuned.json"),
        ("report", write_markdown(content, reference / "tuned.md", title, command)),
        ("figure", draw_benchmarks(content, reference / "tuned.png")),
    )
    return Results(benchmark_tables(content), files)


@benchmark("continual_promise", "only", "quick", "again", "engine")
def continual_promise(options: Options, console: Console) -> Results:
    """A KL budget over tasks measured behind every single step, with its alarm and without."""
    from nsrl.bench.continual.promise import draw_promise, kept_lines, plan_promise
    from nsrl.bench.studies.continual import run_cells
    from nsrl.bench.studies.continual_report import benchmark_tables, write_markdown
    from nsrl.files import write_json

    out = _out(options, "continual_promise_quick" if options.quick else "continual_promise")
    partial = (options.quick or options.only) and options.reference == REFERENCE
    reference = out / "results" if partial else options.reference / "continual"
    cells = plan_promise(options.configs, only=options.only, quick=options.quick)
    with alone_in(out), console.status("continual_promise") as show:
        content = run_cells(
            cells, out, workers=options.workers, again=options.again, engine=options.engine, on_status=show
        )
    write_json(reference / "promise.json", content)
    for failed, why in content["failures"].items():
        console.note(f"nsrl: {failed} came to no result: {why}")
    command = " ".join(["nsrl bench continual_promise", *(["--only " + ",".join(options.only)] * bool(options.only))])
    title = "A KL budget over tasks, looked at behind every step"
    files = (
        ("results", reference / "promise.json"),
        ("report", write_markdown(content, reference / "promise.md", title, command, "largest KL behind any step")),
        ("figure", draw_promise(content, reference / "promise.png")),
    )
    return Results(benchmark_tables(content), files, kept_lines(content))


@benchmark("frontier", "only", "quick", "engine")
def frontier(options: Options, console: Console) -> Results:
    """Every method on a population of pretrained agents: what is learnt against what is kept."""
    from nsrl.bench.studies.frontier import run_cells
    from nsrl.bench.studies.frontier_plan import plan_cells
    from nsrl.bench.studies.frontier_report import write_frontier

    out = _out(options, "frontier_quick" if options.quick else "frontier")
    reference = out / "results" if options.quick else options.reference / "frontier"
    agents = out / "agents" if options.quick else options.reference / "agents"
    cells = plan_cells(options.only, options.quick)
    with alone_in(out), console.status("frontier") as show:
        failures = run_cells(
            cells,
            reference,
            agents,
            workers=options.workers,
            quick=options.quick,
            engine=options.engine,
            on_status=show,
        )
    for name, why in failures.items():
        console.note(f"nsrl: {name} came to no result: {why}")
    tables, files = write_frontier(reference)
    return Results(tables, files)


@benchmark("agents", "folder", "only", "quick", "again", "engine")
def agents(options: Options, console: Console) -> Results:
    """Every agent in a folder: loaded, collected from, fine-tuned, exported, played by stock SB3.

    Raises:
        NsrlError: no folder is given, or there is no agent in it.
    """
    from nsrl.bench.studies.agents import agents_tables, find_agents, try_agents
    from nsrl.files import given_path, write_json

    if options.folder is None:
        raise NsrlError("nsrl bench agents needs a folder of agents, as in nsrl bench agents rl-trained-agents")
    found = find_agents(given_path(options.folder), options.only)
    out = _out(options, "agents_quick" if options.quick else "agents")
    # As for continual: the committed numbers are those of a whole folder.
    partial = (options.quick or options.only) and options.reference == REFERENCE
    results = (out / "results" if partial else options.reference) / "agents.json"
    with alone_in(out), console.status("agents") as show:
        content = try_agents(
            found,
            out,
            workers=options.workers,
            again=options.again,
            quick=options.quick,
            engine=options.engine,
            on_status=show,
        )
    write_json(results, content)
    told = [f"{row['name']}: {row['reason']}" for row in content["rows"] if row["reason"]]
    return Results(agents_tables(content), (("results", results),), told)


@benchmark("demo_population", "quick", "engine")
def demo_population(options: Options, console: Console) -> Results:
    """The demo for twenty pretrained agents, on this instruction set."""
    from nsrl.bench.studies.demo_population import population_table, run_population

    out = _out(options, "demo_population_quick" if options.quick else "demo_population")
    results = (out / "results" if options.quick else options.reference) / "demo_population.json"
    with alone_in(out), console.status("demo_population") as show:
        content = run_population(
            out, results, workers=options.workers, quick=options.quick, engine=options.engine, on_status=show
        )
    return Results([population_table(content)], [("results", results)])


@benchmark("post_training", "only", "quick")
def post_training(options: Options, console: Console) -> Results:
    """A tiny language model learns something new: old facts kept against new score, all methods (nsrl[llm])."""
    from nsrl.bench.studies.post_training import plan_cells, run_cells
    from nsrl.bench.studies.post_training_report import write_post_training
    from nsrl.runs.training import use_one_thread

    use_one_thread()
    out = _out(options, "post_training_quick" if options.quick else "post_training")
    reference = out / "results" if options.quick else options.reference / "post_training"
    cells = plan_cells(options.only, options.quick)
    with alone_in(out), console.status("post_training") as show:
        failures = run_cells(cells, reference / "runs.jsonl", quick=options.quick, on_status=show)
    for name, why in failures.items():
        console.note(f"nsrl: {name} came to no result: {why}")
    tables, files = write_post_training(reference, "nsrl bench post_training" + (" --quick" if options.quick else ""))
    return Results(tables, files, ["* learnt more than 2 % less than plain fine-tuning"])


@benchmark("post_training_cost", "quick")
def post_training_cost(options: Options, console: Console) -> Results:
    """A guard's projection beside a training step at 135M parameters: time and memory (nsrl[llm])."""
    from nsrl.bench.studies.post_training_cost import measure_cost
    from nsrl.files import write_json
    from nsrl.runs.training import use_one_thread

    use_one_thread()
    out = _out(options, "post_training_cost")
    results = (out / "results" if options.quick else options.reference / "post_training") / "cost.json"
    write_json(results, measure_cost(2 if options.quick else 30, console.say))
    return Results((), (("results", results),))


@benchmark("post_training_forecast", "quick")
def post_training_forecast(options: Options, console: Console) -> Results:
    """What fine-tuning a tiny language model costs, forecast and measured, 24 times (nsrl[llm])."""
    from nsrl.bench.studies.post_training_forecast import measure_forecast
    from nsrl.files import write_json
    from nsrl.runs.training import use_one_thread

    use_one_thread()
    out = _out(options, "post_training_forecast")
    results = (out / "results" if options.quick else options.reference / "post_training") / "forecast.json"
    write_json(results, measure_forecast(options.quick, console.say))
    return Results((), (("results", results),))


@benchmark("run_cost", "quick")
def run_cost(options: Options, console: Console) -> Results:
    """What fine-tuning takes, forecast by `nsrl cost` and measured."""
    from nsrl.bench.cost.runs import measure_runs, run_cost_table
    from nsrl.files import write_json
    from nsrl.runs.training import use_one_thread

    use_one_thread()
    out = _out(options, "run_cost_quick" if options.quick else "run_cost")
    results = (out / "results" if options.quick else options.reference) / "run_cost.json"
    content = measure_runs(REFERENCE / "agents", options.quick, console.say)
    write_json(results, content)
    return Results([run_cost_table(content)], [("results", results)])


@benchmark("cost", "quick")
def cost(options: Options, console: Console) -> Results:
    """What constraints cost at up to a hundred million parameters, forecast from the layers' shapes and measured."""
    from nsrl.bench.cost.constraints import cost_table, measure_costs, outside
    from nsrl.files import write_json
    from nsrl.runs.training import use_one_thread

    use_one_thread()
    out = _out(options, "cost_quick" if options.quick else "cost")
    results = (out / "results" if options.quick else options.reference) / "cost.json"
    content = measure_costs(options.quick, console.say)
    write_json(results, content)
    return Results([cost_table(content)], [("results", results)], outside(content))


@benchmark("edit", "only", "quick", "engine")
def edit(options: Options, console: Console) -> Results:
    """Facts written into language models by all editors: what edits reach, spare and break (nsrl[llm])."""
    from nsrl.bench.studies.editing import plan_cells, run_cells
    from nsrl.bench.studies.editing_report import write_editing
    from nsrl.editing.models import require_transformers
    from nsrl.runs.training import use_one_thread

    require_transformers()
    use_one_thread()
    out = _out(options, "edit_quick" if options.quick else "edit")
    reference = out / "results" if options.quick else options.reference / "editing"
    cells = plan_cells(options.only, options.quick)
    with alone_in(out), console.status("edit") as show:
        failures = run_cells(
            cells,
            reference,
            out,
            workers=options.workers,
            quick=options.quick,
            engine=options.engine,
            on_status=show,
            told=lambda text: console.note(f"nsrl bench edit: {text}"),
        )
    for name, why in failures.items():
        console.note(f"nsrl: {name} came to no result: {why}")
    tables, files = write_editing(reference, "nsrl bench edit" + (" --quick" if options.quick else ""))
    return Results(tables, files)
