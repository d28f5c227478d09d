"""Checkpoints that are well formed and wrong: refused in a sentence, and nothing has been touched."""

import copy
import json
import random
import zipfile
from collections.abc import Iterator
from itertools import islice
from typing import Any

import numpy as np
import pytest
import torch

from nsrl.errors import NsrlError
from nsrl.reading.checksums import checksum
from nsrl.reading.limits import Unreadable
from nsrl.rl.training import checkpoint
from nsrl.rl.training.checkpoint import read_checkpoint, restore, save, write_checkpoint
from tests.rl.clockwork import ROLLOUT, build_buffer, build_expert, build_model
from tests.rl.oracles import same

#: What stands in for every value of a checkpoint in turn.
WRONG: tuple[Any, ...] = (None, "x", -1, 2**70, float("nan"), [], {"a": 1})


@pytest.fixture(scope="module")
def whole(tmp_path_factory):
    """A learnt model's checkpoint, and how to build the run that it is of."""
    expert = build_expert()
    buffer = build_buffer(expert)
    trained = build_model(expert, buffer)
    trained.learn(ROLLOUT)
    trained.ep_success_buffer.append(1.0)
    path = tmp_path_factory.mktemp("whole") / "checkpoint"
    row = {"timesteps": 0, "old_returns": {"a": 1.0}, "new_return": 2.0, "kl_mean": 0.0, "kl_heldout": None}
    save(path, trained, [{**row, "agreement": 1.0, "seconds": 0.1}])
    return path, lambda: build_model(expert, buffer)


def fingerprint(model) -> list:
    """Everything that restoring writes to, gathered without the code under test."""
    envs = model.env.unwrapped.envs
    return [
        {name: value.clone() for name, value in model.policy.state_dict().items()},
        copy.deepcopy(model.policy.optimizer.state_dict()),
        [model.num_timesteps, model._total_timesteps, model._n_updates, model._episode_num, model._learning_seconds],
        None if model.ep_info_buffer is None else list(model.ep_info_buffer),
        copy.deepcopy(model.retention.state_dict()),
        [random.getstate(), np.random.get_state()[1].tolist(), torch.get_rng_state().clone()],
        [copy.deepcopy(env.unwrapped.np_random.bit_generator.state) for env in envs],
    ]


def places(value: Any, path: tuple = ()) -> Iterator[tuple]:
    """The way to every value in nested lists and mappings; of long lists to the first and the last."""
    yield path
    if isinstance(value, dict):
        for key, part in value.items():
            yield from places(part, (*path, key))
    elif isinstance(value, list | tuple):
        for index in sorted({0, len(value) - 1} if value else ()):
            yield from places(value[index], (*path, index))


def changed(value: Any, path: tuple, new: Any) -> Any:
    """A copy of nested values with one of them exchanged."""
    if not path:
        return new
    kind = list if isinstance(value, tuple) else type(value)
    made = kind(value)
    made[path[0]] = changed(value[path[0]], path[1:], new)
    return tuple(made) if isinstance(value, tuple) else made


def wrongs(state: dict, tensors: dict) -> Iterator[tuple[str, dict, dict]]:
    """Every value in turn as something else, and missing; tensors also of other shapes, types and values."""
    parts = {"state": state, "tensors": tensors}
    for path in places(parts):
        if len(path) < 2 or path[:2] in {("state", "versions"), ("state", "format")}:
            continue
        here: Any = parts
        for key in path:
            here = here[key]
        candidates = list(WRONG)
        if isinstance(here, torch.Tensor):
            candidates = [None, 1, [], torch.zeros(7), here.to(torch.complex64), here.double() * torch.nan]
        for new in candidates:
            if type(new) is type(here) and not isinstance(new, torch.Tensor) and new == here:
                continue
            made = changed(parts, path, new)
            yield f"{path} = {new!r:.40}", made["state"], made["tensors"]
        if isinstance(here, dict) and here:
            made = changed(parts, path, dict(list(here.items())[1:]))
            yield f"{path} without its first", made["state"], made["tensors"]


@pytest.mark.parametrize("step", [29, pytest.param(1, marks=pytest.mark.slow)])
def test_every_wrong_value_is_refused_in_a_sentence_and_touches_nothing(step, whole, tmp_path, monkeypatch):
    """What is taken after all (a number for a number) has to be a state that the run goes on from."""
    source, build = whole
    state, tensors = read_checkpoint(source)
    model = build()
    before = fingerprint(model)
    content: list = []
    # Neither the zip nor the pickle is what is tested here.
    monkeypatch.setattr(checkpoint, "read_checkpoint", lambda path: content[0])
    counts = {"refused": 0, "taken": 0}
    for what, wrong_state, wrong_tensors in islice(wrongs(state, tensors), 0, None, step):
        content[:] = [(copy.deepcopy(wrong_state), copy.deepcopy(wrong_tensors))]
        try:
            restore(tmp_path / "checkpoint", model)
        except NsrlError as error:
            counts["refused"] += 1
            assert "\n" not in str(error) and str(tmp_path / "checkpoint") in str(error), what
            assert same(fingerprint(model), before), f"{what} was refused and has changed the model"
        except Exception as error:
            pytest.fail(f"{what}: {error!r}")
        else:
            counts["taken"] += 1
            model.learn(ROLLOUT, reset_num_timesteps=False)
            model = build()
            random.seed(0), np.random.seed(0), torch.manual_seed(0)
            before = fingerprint(model)
    assert counts["refused"] > 900 // step and counts["taken"] < counts["refused"] / 4, counts


def test_a_checkpoint_that_measures_otherwise_is_taken_back(whole, tmp_path):
    """The KL is known only once the weights are there."""
    source, build = whole
    state, tensors = read_checkpoint(source)
    tensors["modules"]["policy"]["action_net.bias"][0] += 0.1
    write_checkpoint(tmp_path / "checkpoint", state, tensors)
    model = build()
    before = fingerprint(model)
    with pytest.raises(NsrlError, match="says that the policy's KL is"):
        restore(tmp_path / "checkpoint", model)
    assert same(fingerprint(model), before)


@pytest.mark.parametrize("error", [RuntimeError("odd\nnumber"), KeyboardInterrupt()])
def test_whatever_fails_while_it_is_put_back_leaves_the_model_as_it_was(error, whole, monkeypatch):
    source, build = whole
    model = build()
    before = fingerprint(model)
    original, calls = checkpoint.write_generators, []

    def fail(*arguments):
        calls.append(original(*arguments))
        if len(calls) == 1:  # the last thing to be put back
            raise error

    monkeypatch.setattr(checkpoint, "write_generators", fail)
    expected = NsrlError if isinstance(error, Exception) else KeyboardInterrupt
    with pytest.raises(expected) as caught:
        restore(source, model)
    assert same(fingerprint(model), before) and "\n" not in str(caught.value)


def test_weights_written_anew_do_not_have_the_checksum(whole, tmp_path):
    """The value function's: neither the KL nor any shape knows of them."""
    source, build = whole
    state, tensors = read_checkpoint(source)
    path = write_checkpoint(tmp_path / "checkpoint", state, tensors)
    assert restore(path, build())["timesteps"] == ROLLOUT
    with zipfile.ZipFile(path) as archive:
        signed = json.loads(archive.read("state.json"))
    for change in ("weight", "counter"):
        state, tensors = copy.deepcopy(signed), read_checkpoint(source)[1]
        if change == "weight":
            tensors["modules"]["policy"]["value_net.bias"][0] += 1e-6
        else:
            state["counters"]["_n_updates"] += 1
        monkey = path.with_name(change)
        with zipfile.ZipFile(monkey, "w") as archive, zipfile.ZipFile(path) as old:
            archive.writestr("state.json", json.dumps(state))
            with archive.open("tensors.pt", "w") as member:
                torch.save(tensors, member) if change == "weight" else member.write(old.read("tensors.pt"))
        with pytest.raises(NsrlError, match="does not have the checksum"):
            restore(monkey, build())


class TestChecksum:
    def test_what_files_give_back_has_the_checksum_of_what_they_were_given(self):
        assert checksum({"a": (1, 2.5, None)}) == checksum({"a": [1, 2.5, None]})
        assert checksum({"a": 1, "b": 2}) == checksum({"b": 2, "a": 1})
        tensor = torch.arange(6.0).reshape(2, 3)
        assert checksum(tensor.T.contiguous()) == checksum(tensor.T) == checksum(torch.nn.Parameter(tensor.T))
        value = {"x": [0.1, float("nan"), float("inf"), -0.0, 2**100]}
        assert checksum(json.loads(json.dumps(value))) == checksum(value)

    def test_different_values_have_different_ones(self):
        values = [
            None,
            True,
            1,
            1.0,
            "1",
            [],
            {},
            [1],
            [[1]],
            ["1"],
            {"1": 1},
            {1: 1},
            ["ab", "c"],
            ["a", "bc"],
            0.0,
            -0.0,
        ]
        values += [torch.zeros(2), torch.zeros(1, 2), torch.zeros(2).double(), torch.zeros(2).bfloat16(), torch.ones(2)]
        values += [torch.zeros(0), torch.tensor(1.0), torch.tensor(True), "None", "true", "\ud800"]
        assert len({checksum(value) for value in values}) == len(values)

    @pytest.mark.parametrize("value", [b"x", object(), {"a": {1}}, np.float32(1.0)])
    def test_other_things_have_none(self, value):
        with pytest.raises(Unreadable, match="neither a tensor nor plain"):
            checksum(value)
