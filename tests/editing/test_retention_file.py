"""A retention file: it holds what the model answers, is enforced elsewhere, and is refused for another model."""

from __future__ import annotations

import copy
import json

import pytest
import torch
from torch.distributions import Categorical, kl_divergence

from nsrl.editing.fingerprint import fingerprint
from nsrl.editing.guard import protect_module
from nsrl.editing.retention_file import RetentionFile, tokenizer_hash
from nsrl.errors import NsrlError
from tests.editing.tiny_lm import VOCABULARY, TinyLM, train

pytest.importorskip("safetensors", reason="a retention file is safetensors: install nsrl[llm]")

SEQUENCES = [[3, 1, 4, 1, 5], [9, 2, 6], [5, 3, 5, 8, 9, 7, 9], [3, 2]]


class Letters:
    """A tokenizer of letters, as far as the file asks."""

    def __init__(self, letters: str = "abcdefghijklmnopqrstuv "):
        self.letters = letters

    def get_vocab(self) -> dict[str, int]:
        return {letter: index for index, letter in enumerate(self.letters)}

    def __call__(self, text: str) -> dict[str, list[int]]:
        return {"input_ids": [self.letters.find(letter) for letter in text.lower() if letter in self.letters]}


@pytest.fixture
def path(tmp_path):
    return RetentionFile.make(TinyLM(), SEQUENCES, top_k=6, name="tiny").save(tmp_path / "old.safetensors")


def test_it_holds_what_the_model_answers(path) -> None:
    model, file = TinyLM(), RetentionFile.load(path)
    assert [part.tolist() for part in file.ids.split(list(file.lengths))] == SEQUENCES
    with torch.no_grad():
        log = torch.cat([model(torch.tensor([ids])).logits[0].double().log_softmax(-1) for ids in SEQUENCES])
    top, classes = log.topk(6, -1)
    torch.testing.assert_close(file.answers.outputs.double(), top, rtol=0, atol=1e-5)  # padded sums, float32
    assert torch.equal(file.answers.indices, classes)
    torch.testing.assert_close(file.answers.rest.double().exp(), 1 - top.exp().sum(-1), rtol=0, atol=1e-6)
    assert file.provenance["model"] == fingerprint(model) and file.provenance["vocabulary"] == VOCABULARY


def test_its_kl_is_a_lower_bound_of_the_full_one_and_of_a_finer_one() -> None:
    then = TinyLM()
    now = copy.deepcopy(then)
    train(now, torch.optim.Adam(now.parameters(), 1e-2), 5)
    with torch.no_grad():
        pairs = [[m(torch.tensor([ids])).logits[0].double() for m in (then, now)] for ids in SEQUENCES]
    full = float(torch.cat([kl_divergence(Categorical(logits=p), Categorical(logits=q)) for p, q in pairs]).mean())
    found = [
        RetentionFile.make(then, SEQUENCES, top_k=count).preserved(now).measure().kl_mean
        for count in (1, 3, 9, VOCABULARY - 1)
    ]
    assert all(a <= b + 1e-6 for a, b in zip(found, [*found[1:], full], strict=True))
    assert found[0] < 0.9 * full and found[-1] == pytest.approx(full, rel=1e-4)


def test_it_is_enforced_by_somebody_else(path) -> None:
    model = TinyLM()
    optimizer = torch.optim.Adam(model.parameters(), 1e-2)
    with protect_module(model, optimizer, path, 0.005, measure_every=5) as guard:
        train(model, optimizer, 12)
    assert 0.0 < guard.report().kl_mean <= 0.005 and guard.report().tokens == 17
    assert RetentionFile.load(path).preserved(model).measure().kl_mean == pytest.approx(guard.report().kl_mean)


def test_a_run_goes_on_with_it(path) -> None:
    def begin():
        model = TinyLM()
        return model, torch.optim.SGD(model.parameters(), 0.1)

    whole, optimizer = begin()
    guard = protect_module(whole, optimizer, path, 0.05, measure_every=4)
    train(whole, optimizer, 5)
    saved, weights = copy.deepcopy(guard.state_dict()), copy.deepcopy(whole.state_dict())
    train(whole, optimizer, 5, 5)
    guard.finish()
    resumed, optimizer = begin()
    resumed.load_state_dict(weights)
    guard = protect_module(resumed, optimizer, path, 0.05, measure_every=4, resume=saved)
    train(resumed, optimizer, 5, 5)
    guard.finish()
    assert all(torch.equal(a, b) for a, b in zip(whole.parameters(), resumed.parameters(), strict=True))


def test_the_same_model_in_half_precision_is_accepted_with_a_warning_and_another_one_refused(path) -> None:
    file = RetentionFile.load(path)
    file.check(TinyLM())
    with pytest.warns(UserWarning, match="answers alike"):
        file.check(TinyLM().bfloat16())
    other = TinyLM(seed=1)
    with pytest.raises(NsrlError, match=r"of tiny .* nats a token away"):
        protect_module(other, torch.optim.SGD(other.parameters(), 0.1), path)
    small = TinyLM()
    small.tokens = small.head = torch.nn.Embedding(4, 16)
    with pytest.raises(NsrlError, match="another vocabulary"):
        file.check(small)


def test_texts_and_their_tokenizer(tmp_path) -> None:
    model, letters = TinyLM(), Letters()
    file = RetentionFile.make(model, ["a cab", "bad face"], letters, top_k=4)
    assert file.ids.tolist() == [*letters("a cab")["input_ids"], *letters("bad face")["input_ids"]]
    file.check(model, letters)
    assert tokenizer_hash(letters) != tokenizer_hash(Letters("bacdefghijklmnopqrstuv "))
    with pytest.raises(NsrlError, match="another tokenizer"):
        file.check(model, Letters("bacdefghijklmnopqrstuv "))
    for content, tokenizer, told in (
        ([], letters, "nothing to retain"),
        (["abc"], None, "need a tokenizer"),
        ([""], letters, "shorter than a token"),
        ([3.5], letters, "neither a text"),
        ([[0.5]], None, "whole numbers"),
    ):
        with pytest.raises(NsrlError, match=told):
            RetentionFile.make(model, content, tokenizer)
    with pytest.raises(NsrlError, match="at least 1"):
        RetentionFile.make(model, SEQUENCES, top_k=0)


def rewritten(path, **changes) -> None:
    from safetensors import safe_open
    from safetensors.torch import save_file

    with safe_open(path, "pt") as content:
        told = json.loads(content.metadata()["nsrl_retention"])
        tensors = {key: content.get_tensor(key) for key in ("ids", "log_probabilities", "classes", "rest")}
    for key, value in changes.items():
        (tensors if key in tensors else told)[key] = value
    save_file(tensors, path, {"nsrl_retention": json.dumps(told)})


@pytest.mark.parametrize(
    "changes, told",
    [
        ({"rest": torch.zeros(17)}, "checksum"),
        ({"ids": torch.zeros(3, dtype=torch.int32)}, "shapes"),
        ({"lengths": [17, -1, 1]}, "a length is -1"),
        ({"lengths": "all"}, "must be a list"),
        ({"format": 2}, "update nsrl"),
        ({"vocabulary": 5}, "outside its vocabulary"),
        ({"vocabulary": "many"}, "its vocabulary is many"),
        ({"digest": 3}, "digest is no text"),
        ({"top_k": -1}, "its top_k is -1"),
        ({"classes": torch.zeros(17, 6)}, "formats"),
    ],
)
def test_damage_is_refused(path, changes: dict, told: str) -> None:
    rewritten(path, **changes)
    with pytest.raises(NsrlError, match=told):
        RetentionFile.load(path)


def test_what_is_no_retention_file_is_refused(tmp_path) -> None:
    from safetensors.torch import save_file

    with pytest.raises(NsrlError, match="no such file"):
        RetentionFile.load(tmp_path / "none.safetensors")
    (tmp_path / "text.safetensors").write_text("hello")
    with pytest.raises(NsrlError, match="cannot be read as safetensors"):
        RetentionFile.load(tmp_path / "text.safetensors")
    save_file({"a": torch.zeros(2)}, tmp_path / "weights.safetensors")
    with pytest.raises(NsrlError, match="no retention file"):
        RetentionFile.load(tmp_path / "weights.safetensors")
