"""Hostile checkpoints, results and histories: what lies in a run's folder."""

from __future__ import annotations

import json
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import torch

from tests.reading.hostile.workbench import Case, Workbench, content, saved, zipped

State = dict[str, Any]


def checkpoint(change: Callable[[State, State], Any]) -> Case:
    """A checkpoint of whose state and tensors something is changed."""
    return content("checkpoint", lambda bench: bench.checkpoint_with(change))


def state(**changes: Any) -> Case:
    return checkpoint(lambda s, t: s.update(changes))


def parts(make: Callable[[Workbench], dict[str, Any]]) -> Case:
    """A checkpoint with other members."""
    return content("checkpoint", lambda bench: zipped(make(bench)))


def generator(**changes: Any) -> Case:
    """The first environment's generator with something changed."""
    return checkpoint(lambda s, t: s["generators"]["environments"][0].update(changes))


def twister(position: Any) -> dict[str, Any]:
    return {"bit_generator": "MT19937", "state": {"key": [1] * 624, "pos": position}}


def modules(change: Callable[[State], Any]) -> Case:
    return checkpoint(lambda s, t: change(t["modules"]))


def optimizer(change: Callable[[State], Any]) -> Case:
    return checkpoint(lambda s, t: change(t["modules"]["policy.optimizer"]))


def retention(**changes: Any) -> Case:
    return checkpoint(lambda s, t: t["retention"].update(changes))


def results(make: Callable[[], str | bytes]) -> Case:
    return content("results", lambda bench: make())


def history(make: Callable[[], str | bytes]) -> Case:
    return content("history", lambda bench: make())


def _pipe(bench: Workbench, path: Path) -> None:
    os.mkfifo(path)


NESTED: Any = []
for _ in range(90):
    NESTED = [NESTED]

CASES: dict[str, Case] = {
    # random generators
    "generator at position 10^6": checkpoint(lambda s, t: s["generators"]["numpy"]["state"].update(pos=10**6)),
    "generator at position -1": checkpoint(lambda s, t: s["generators"]["numpy"]["state"].update(pos=-1)),
    "environment's generator at position 625": checkpoint(
        lambda s, t: s["generators"]["environments"].__setitem__(0, twister(625))
    ),
    "generator of 3 words": checkpoint(lambda s, t: s["generators"]["numpy"]["state"].update(key=[1, 2, 3])),
    "generator of words beyond 32 bits": checkpoint(
        lambda s, t: s["generators"]["numpy"]["state"].update(key=[2**40] * 624)
    ),
    "generator of an unknown kind": generator(bit_generator="os.system"),
    "generator whose kind is a list": generator(bit_generator=["PCG64"]),
    "buffer of a generator beyond its end": checkpoint(
        lambda s, t: s["generators"]["environments"].__setitem__(0, _philox(1000))
    ),
    "a thousand environments": checkpoint(lambda s, t: s["generators"].update(environments=[None] * 1000)),
    "Python's generator at position 10^6": checkpoint(lambda s, t: s["generators"]["python"][1].__setitem__(-1, 10**6)),
    "Python's generator as text": checkpoint(lambda s, t: s["generators"].update(python="x")),
    "torch's generator of zeros": checkpoint(
        lambda s, t: t["generators"].update(torch=torch.zeros(5056, dtype=torch.uint8))
    ),
    "torch's generator of 3 bytes": checkpoint(
        lambda s, t: t["generators"].update(torch=torch.zeros(3, dtype=torch.uint8))
    ),
    # modules
    "attributes of the model by name": modules(lambda m: m.update({"env.close": {}})),
    "policy missing": modules(lambda m: m.pop("policy")),
    "policy that is a list": modules(lambda m: m.update(policy=[])),
    "weights of another shape": modules(lambda m: m["policy"].update({"action_net.bias": torch.zeros(3)})),
    "weights of NaN": modules(lambda m: m["policy"].update({"action_net.bias": torch.full((2,), torch.nan)})),
    "weights that are numbers": modules(lambda m: m["policy"].update({"action_net.bias": 1.0})),
    "optimizer state of another shape": optimizer(lambda o: o["state"][0].update(exp_avg=torch.zeros(1000, 1000))),
    "optimizer state of a parameter that is not there": optimizer(lambda o: o["state"].update({999: {}})),
    "optimizer state that is text": optimizer(lambda o: o["state"][0].update(exp_avg="x")),
    "optimizer groups missing": optimizer(lambda o: o.update(param_groups=[])),
    "optimizer group without learning rate": optimizer(lambda o: o["param_groups"][0].pop("lr")),
    "optimizer group with an unknown setting": optimizer(lambda o: o["param_groups"][0].update(hook="x")),
    "optimizer group of other parameters": optimizer(lambda o: o["param_groups"][0].update(params=[0] * 10**5)),
    "stride of 0 in 3.5 GB": modules(lambda m: m.update(policy={"a": torch.zeros(1).expand(30_000, 30_000)})),
    "sparse weights": modules(lambda m: m["policy"].update({"action_net.bias": torch.ones(2).to_sparse()})),
    # state
    "counter that is text": checkpoint(lambda s, t: s["counters"].update(num_timesteps="x")),
    "counter of 10^40": checkpoint(lambda s, t: s["counters"].update(num_timesteps=10**40)),
    "negative counter": checkpoint(lambda s, t: s["counters"].update(num_timesteps=-1)),
    "counter of an unknown name": checkpoint(lambda s, t: s["counters"].update(policy_class=1)),
    "progress of infinity": checkpoint(lambda s, t: s["counters"].update(_current_progress_remaining=float("inf"))),
    "statistics that are not there": checkpoint(lambda s, t: s["statistics"].update(rewards={"mean": 0})),
    "episodes that are text": checkpoint(lambda s, t: s["episodes"].update(ep_info_buffer="x")),
    "episode without a return": checkpoint(lambda s, t: s["episodes"].update(ep_info_buffer=[{"l": 1}])),
    "history that is a number": state(history=1),
    "history of nested lists": state(history=[{"timesteps": NESTED}]),
    "spaces that are numbers": state(spaces=[1, 2]),
    "three spaces": state(spaces=[{}, {}, {}]),
    "space of nested spaces": checkpoint(lambda s, t: s["spaces"][0].update(spaces=_spaces(40))),
    "run that is a list": state(run=[]),
    "run with a setting of a megabyte": checkpoint(lambda s, t: s["run"].update(algorithm="x" * 10**6)),
    "format of 10^30": state(format=10**30),
    "format that is text": state(format="1"),
    "state that is a list": parts(lambda bench: {"state.json": "[]", "tensors.pt": saved({})}),
    "state of 100,000 nested lists": parts(lambda bench: {"state.json": "[" * 100_000, "tensors.pt": saved({})}),
    "no tensors": parts(lambda bench: {"state.json": "{}"}),
    "tensors that are a list": parts(
        lambda bench: {"state.json": json.dumps(bench_state(bench)), "tensors.pt": saved([1])}
    ),
    "cut off": content("checkpoint", lambda bench: bench.checkpoint[:-100]),
    "a pipe": Case("checkpoint", _pipe),
    # retention
    "retention missing": checkpoint(lambda s, t: t.update(retention=None)),
    "KL that is text": state(retention={"kl_mean": "x"}),
    "KL of infinity": state(retention={"kl_mean": float("inf")}),
    "multiplier of NaN": retention(multiplier=float("nan")),
    "updates that are text": retention(updates="x"),
    "queue beyond the buffer": retention(minibatches_queue=torch.tensor([10**6])),
    "queue of a million states": retention(subsets_queue=torch.zeros(10**6, dtype=torch.long)),
    "queue of fractions": retention(minibatches_queue=torch.zeros(3)),
    "generator of the draws that is text": retention(minibatches_generator="x"),
    "seconds of an unknown part": retention(seconds={"x": 1.0}),
    # results and histories
    "results of 100,000 nested lists": results(lambda: "[" * 100_000),
    "results that are a list": results(lambda: "[1]"),
    "results with a number of a million digits": results(lambda: '{"a": ' + "9" * 10**6 + "}"),
    "results with a key twice": results(lambda: '{"a": 1, "a": 2}'),
    "results of four million entries": results(lambda: '{"a": [' + "[]," * 4_000_000 + "0]}"),
    "results that are no text": results(lambda: b"\xff\xfe{}"),
    "results in a pipe": Case("results", _pipe),
    "history of text": history(lambda: '{"timesteps": "x"}\n'),
    "history of lists": history(lambda: "[1]\n[2]\n"),
    "history of nested mappings": history(lambda: '{"timesteps": {"a": 1}}\n'),
    "history in a pipe": Case("history", _pipe),
    "history of 100 MB": history(lambda: b'{"timesteps": 1}\n' * (6 * 2**20)),
}


def _philox(position: int) -> dict[str, Any]:
    kept = np.random.Philox(0).state
    return {
        "bit_generator": "Philox",
        "buffer": [0] * 4,
        "buffer_pos": position,
        "has_uint32": 0,
        "uinteger": 0,
        "state": {key: value.tolist() for key, value in kept["state"].items()},
    }


def _spaces(depth: int) -> dict[str, Any]:
    return {"a": {"type": "Dict", "spaces": _spaces(depth - 1) if depth else {}}}


def bench_state(bench: Workbench) -> State:
    """The state of a true checkpoint."""
    kept: State = {}
    bench.checkpoint_with(lambda s, t: kept.update(s))
    return kept
