"""`nsrl finetune`: a new task, or a sequence of them."""

from __future__ import annotations

import sys
from collections.abc import Sequence
from pathlib import Path

from nsrl.cli.command import print_outcome, read_arguments, run_training
from nsrl.errors import NsrlError
from nsrl.runs.config import FinetuneConfig
from nsrl.runs.packaged import find_config
from nsrl.runs.sequences.config import SequenceConfig
from nsrl.runs.settings import read_yaml

EXAMPLES = """\
  nsrl finetune --config cartpole_swapped
  nsrl finetune --agent expert.zip --old_env CartPole-v1 --new_env MyCartPole-v0 --retention.kl_budget 0.02
  nsrl finetune --config cartpole_swapped --method kl_penalty --penalty 1.0 --seed 3
  nsrl finetune --config sequence_cartpole            (its keys: add --help)
  nsrl finetune --resume runs/finetune-cartpole_swapped-20250101-120000
  torchrun --nproc-per-node 2 --no-python nsrl finetune --config cartpole_swapped     (docs/parallel.md)"""
ABOUT = """\
Fine-tune a pretrained agent on a new task while the mean KL divergence from the pretrained policy, over a
buffer of states of its old task, stays within --retention.kl_budget nats per state. Writes a folder with
the agent (a stock Stable-Baselines3 zip), the buffer, learning curves, TensorBoard events, metrics.json
and report.md. A configuration with the key tasks is a sequence of tasks, learnt one after the other."""
ABOUT_SEQUENCES = """\
Learn tasks one after the other: after each its states join the retention buffer, and what later tasks
change on them stays within the task's own kl_budget, in nats per state. Writes a folder with the agents,
the merged buffer, learning curves, TensorBoard events, metrics.json and report.md with the returns on every
task after every task, average performance, forgetting and forward transfer."""


def run(arguments: Sequence[str]) -> int:
    """Fine-tune, and print the table."""
    return _run_sequence(arguments) if names_sequence(arguments) else _run_pair(arguments)


def names_sequence(arguments: Sequence[str]) -> bool:
    """Whether a command line is about a sequence of tasks: its configuration, or its run's, has the key tasks."""
    for position, word in enumerate(arguments):
        name, equals, value = word.partition("=")
        if name == "--tasks":
            return True
        value = value if equals else next(iter(arguments[position + 1 :]), "")
        try:
            if name in ("--config", "--resume"):
                path = find_config(value) if name == "--config" else Path(value) / "config.yaml"
                if "tasks" in read_yaml(path):
                    return True
        except (NsrlError, TypeError):  # told when it is read in earnest
            pass
    return False


def _run_pair(arguments: Sequence[str]) -> int:
    config, options = read_arguments(
        FinetuneConfig, arguments, command="finetune", about=ABOUT, examples=EXAMPLES, resumable=True
    )
    from nsrl.rl.parallel.ranks import started_together
    from nsrl.runs.finetuning import finetune, resume_finetuning
    from nsrl.runs.parallel import finetune_together, resume_together
    from nsrl.runs.report import finetuning_table, hint_of_context

    count = started_together()
    if options["resume"] is None and config.agent is not None:
        interrupted = _make_agent(config, options["progress"], count)
        if interrupted:
            return interrupted
    start, resume = (finetune, resume_finetuning) if count == 1 else (finetune_together, resume_together)
    outcome, status = run_training("finetune", config, options, start, resume)
    if outcome is not None:
        print_outcome(outcome, finetuning_table(outcome.metrics))
        hint = hint_of_context(outcome.metrics)
        if hint:
            print(f"nsrl: {hint[0].lower()}{hint[1:]}", file=sys.stderr)
    return status


def _make_agent(config: FinetuneConfig, progress: bool, processes: int) -> int:
    """Pretrain the agent of a packaged configuration where it is missing; the exit code, 0 unless interrupted.

    Raises:
        NsrlError: it is missing, and several processes would make it.
    """
    from nsrl.runs.folder import RunFolder, choose_folder
    from nsrl.runs.pretraining import obtain_agent, packaged_maker
    from nsrl.runs.tasks import resolve_tasks
    from nsrl.runs.training import Interrupted, use_one_thread

    agent = str(config.agent)
    maker = packaged_maker(agent)
    if maker is None:
        return 0
    if processes > 1:
        raise NsrlError(f"{agent} is not there yet, and several processes would make it; run nsrl pretrain first")
    choose_folder("finetune", resolve_tasks(config).name, config.out)  # bad input before the training
    print(f"nsrl: {agent} is not there yet; pretraining on {maker.env} first", file=sys.stderr)
    use_one_thread()
    try:
        obtain_agent(maker, RunFolder(Path(agent)), progress=progress)
    except Interrupted as stop:
        print("nsrl: interrupted; the same command goes on with the pretraining", file=sys.stderr)
        return stop.exit_status
    return 0


def _run_sequence(arguments: Sequence[str]) -> int:
    config, options = read_arguments(
        SequenceConfig, arguments, command="finetune", about=ABOUT_SEQUENCES, examples=EXAMPLES, resumable=True
    )
    from nsrl.rl.parallel.ranks import started_together
    from nsrl.runs.sequences.learning import learn_sequence, resume_sequence
    from nsrl.runs.sequences.report import sequence_table

    if (count := started_together()) > 1:
        raise NsrlError(f"torchrun has started {count} processes, but a sequence of tasks is one; leave torchrun out")
    outcome, status = run_training("finetune", config, options, learn_sequence, resume_sequence)
    if outcome is not None:
        print_outcome(outcome, sequence_table(outcome.metrics))
    return status
