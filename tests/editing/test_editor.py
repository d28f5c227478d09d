"""The editor on tiny models: what is written, kept, given back and refused."""

from __future__ import annotations

import pytest
import torch

from nsrl.editing import Edit, Editor, Method, ValueSearch
from nsrl.editing.layers import find_layers
from nsrl.editing.observation import observe
from nsrl.editing.values import mark_edit
from nsrl.errors import NsrlError
from tests.editing.builders import EDITS, TEXTS, model, needs_transformers, tokenizer

needs_transformers()

SEARCH = ValueSearch(steps=6, prefixes=2, learning_rate=0.3)
#: Scale-free, so that it works at any size of the keys.
FREE = Method(penalty=1e-3, relative_ridge=1e-3)


def weights(net) -> list[torch.Tensor]:
    return [parameter.detach().clone() for parameter in net.parameters()]


def same(left, right) -> bool:
    return all(torch.equal(a, b) for a, b in zip(left, right, strict=True))


@pytest.mark.parametrize("kind", ["gpt2", "llama"])
def test_edits_are_written_where_they_were_wanted(kind: str) -> None:
    net = model(kind)
    weak = Method(penalty=1e-7, relative_ridge=1e-3)
    editor = Editor(net, tokenizer(), weak, layers=[1], search=ValueSearch(steps=6, prefixes=0))
    editor.preserve(TEXTS)
    values = editor.find_values(EDITS)
    before = values.before.clone()
    report = editor.apply(EDITS, values)
    (after,) = observe(net, [mark_edit(tokenizer(), edit) for edit in EDITS], 0, outputs_of=[editor.layers[-1].block])
    wanted = (values.hidden - before).norm(dim=1)
    # one layer, and keys of these very prompts: what a penalty of 1e-7 leaves undone, and float32
    assert bool(((values.hidden - after).norm(dim=1) < 0.02 * wanted).all())
    assert report.missing < 0.02 and report.written == 1.0 and report.edits == 3
    assert "3 edits in 1 batches" in str(editor.report())


@pytest.mark.parametrize("kind", ["gpt2", "llama"])
def test_undo_is_bit_exact(kind: str) -> None:
    net = model(kind)
    before = weights(net)
    editor = Editor(net, tokenizer(), FREE, layers=[1, 2], search=SEARCH)
    editor.preserve(TEXTS)
    assert same(before, weights(net))
    for edit in EDITS:
        editor.apply([edit])
    assert not same(before, weights(net)) and len(editor.edits) == 3
    editor.undo()
    assert same(before, weights(net)) and editor.edits == ()
    editor.apply(EDITS[:1])  # and it can begin again
    editor.undo()
    assert same(before, weights(net))


def test_values_lower_the_loss_and_stay_inside_the_clamp() -> None:
    net = model("llama")
    slow = ValueSearch(steps=10, prefixes=2, learning_rate=0.05)
    editor = Editor(net, tokenizer(), FREE, layers=[2], search=slow)
    editor.preserve(TEXTS)
    short = editor.find_values(EDITS)
    none = Editor(net, tokenizer(), FREE, layers=[2], search=ValueSearch(steps=1, prefixes=2, learning_rate=1e-9))
    none.preserve(TEXTS)
    assert bool((short.losses < none.find_values(EDITS).losses).all())
    size = (short.hidden - short.before).norm(dim=1) / short.before.norm(dim=1)
    assert float(size.max()) <= slow.clamp * (1 + 1e-4)
    assert all(parameter.requires_grad for parameter in net.parameters())


@pytest.mark.parametrize("kind", ["gpt2", "llama"])
def test_the_loss_of_a_value_is_that_of_the_whole_prompts(kind: str) -> None:
    """Tokens that ran once, padded on the left, give the loss of each prompt run by itself."""
    net = model(kind)
    search = ValueSearch(steps=1, prefixes=2, learning_rate=1e-12, weight_decay=0.0, kl_factor=0.0, enough=0.0)
    editor = Editor(net, tokenizer(), FREE, layers=[2], search=search)
    editor.preserve(TEXTS)
    found = editor.find_values(EDITS).losses
    for edit, loss in zip(EDITS, found, strict=True):
        told = []
        for prefix in ("", *editor._prefixes):
            row = mark_edit(tokenizer(), edit, prefix)
            ids = torch.tensor([row.ids])
            with torch.no_grad():
                chances = net(input_ids=ids).logits[0].log_softmax(-1)
            told.append(-sum(chances[place - 1, row.ids[place]] for place in range(row.target, len(row.ids))))
        # float32 sums of 20 tokens, two orders of summation
        assert float(loss) == pytest.approx(float(sum(told) / len(told)), rel=1e-3)


def test_the_budget_holds_after_every_batch() -> None:
    net = model()
    editor = Editor(net, tokenizer(), "nsrl", layers=[1], search=SEARCH, kl_budget=1e-5, measured_tokens=200)
    editor.preserve(TEXTS)
    free = Editor(model(), tokenizer(), FREE, layers=[1], search=SEARCH, measured_tokens=200)
    free.preserve(TEXTS)
    free.apply(EDITS)
    assert free.report().kl_mean > 1e-5  # there is something to keep
    for edit in EDITS:
        assert editor.apply([edit]).kl <= 1e-5
        assert editor.report().kl_mean <= 1e-5
    assert editor.report().kl_heldout is not None


def test_the_kl_is_that_of_the_logits() -> None:
    net = model()
    editor = Editor(net, tokenizer(), FREE, layers=[1], search=SEARCH, measured_tokens=10**6)
    editor.preserve(TEXTS[:10])
    reference = [model()(input_ids=torch.tensor([tokenizer()(text)["input_ids"]])).logits for text in TEXTS[:10]]
    editor.apply(EDITS)
    total, count = 0.0, 0
    for number, (text, ref) in enumerate(zip(TEXTS, reference, strict=False), start=1):
        if number % 5:  # every fifth is held out
            with torch.no_grad():
                now = net(input_ids=torch.tensor([tokenizer()(text)["input_ids"]])).logits
            p = ref.double().log_softmax(-1)
            total += float((p.exp() * (p - now.double().log_softmax(-1))).sum())
            count += ref.shape[1]
    # the reference is kept in float16: 1e-3 of logits of size 10, squared
    assert editor.report().kl_mean == pytest.approx(total / count, rel=2e-2)


def test_moments_are_those_of_the_tokens_without_padding() -> None:
    net = model("llama")
    editor = Editor(net, tokenizer(), FREE, layers=[1], search=SEARCH)
    editor.preserve(TEXTS[:9])
    seen = []
    handle = editor.layers[0].linear.register_forward_pre_hook(
        lambda _, args: seen.append(args[0][0].detach().double())
    )
    for number, text in enumerate(TEXTS[:9], start=1):
        if number % 5:
            net(input_ids=torch.tensor([tokenizer()(text)["input_ids"]]))
    handle.remove()
    keys = torch.cat(seen)
    held = editor.preserved.of(editor.layers[0])
    assert held.count == len(keys)
    torch.testing.assert_close(held.moment, keys.T @ keys, rtol=1e-4, atol=1e-6)


def test_a_text_longer_than_the_models_positions_is_cut_into_pieces() -> None:
    net = model()
    positions = net.config.max_position_embeddings
    text = " ".join(TEXTS[: positions // 4])
    count = len(tokenizer()(text)["input_ids"])
    assert count > positions
    editor = Editor(net, tokenizer(), FREE, layers=[1], search=SEARCH)
    editor.preserve([text])
    assert editor.preserved.tokens == count


def test_statistics_go_through_a_file_and_not_to_another_model(tmp_path) -> None:
    first = Editor(model(), tokenizer(), FREE, layers=[1, 2], search=SEARCH)
    first.preserve(TEXTS)
    path = first.save_statistics(tmp_path / "moments.safetensors")
    again = Editor(model(), tokenizer(), FREE, layers=[1, 2], search=SEARCH)
    again.load_statistics(path, TEXTS)
    assert again.report().tokens == first.report().tokens
    values = first.find_values(EDITS)
    first.apply(EDITS, values)
    again.apply(EDITS, values)
    assert same(weights(first.model), weights(again.model))
    other = model()
    with torch.no_grad():
        other.lm_head.weight[0, 0] += 1e-3
    with pytest.raises(NsrlError, match="of another model"):
        Editor(other, tokenizer(), FREE, layers=[1, 2]).load_statistics(path)
    with pytest.raises(NsrlError, match=r"no second moment of transformer.h.3.mlp.c_proj"):
        Editor(model(), tokenizer(), FREE, layers=[1, 3]).load_statistics(path)
    path.write_bytes(b"nothing")
    with pytest.raises(NsrlError, match="holds no second moments"):
        Editor(model(), tokenizer(), FREE, layers=[1]).load_statistics(path)


def test_layers_by_preset_and_pattern() -> None:
    names = [layer.name for layer in Editor(model(), tokenizer(), FREE).layers]
    assert names == ["transformer.h.0.mlp.c_proj", "transformer.h.1.mlp.c_proj"]
    names = [layer.name for layer in Editor(model("llama"), tokenizer(), FREE, layers="*.[12].mlp.down_proj").layers]
    assert names == ["model.layers.1.mlp.down_proj", "model.layers.2.mlp.down_proj"]
    with pytest.raises(NsrlError, match=r"matches no linear layer.*near it are .*transformer\.h\.1\.mlp\.c_proj"):
        Editor(model(), tokenizer(), FREE, layers="transformer.h.1.mlp.c_porj")
    with pytest.raises(NsrlError, match="blocks 0 to 3"):
        Editor(model(), tokenizer(), FREE, layers=[4])


def test_a_block_that_normalises_what_its_map_says_is_refused() -> None:
    transformers = pytest.importorskip("transformers")
    config = transformers.Gemma2Config(
        vocab_size=20,
        hidden_size=8,
        intermediate_size=16,
        num_hidden_layers=2,
        num_attention_heads=2,
        num_key_value_heads=1,
        head_dim=4,
    )
    gemma = transformers.Gemma2ForCausalLM(config)
    with pytest.raises(NsrlError, match="no preset of layers for a model of type 'gemma2'"):
        find_layers(gemma)
    with pytest.raises(NsrlError, match="normalises what the map says"):
        find_layers(gemma, "model.layers.*.mlp.down_proj")


def test_bad_edits_are_refused_and_nothing_is_changed() -> None:
    net = model()
    before = weights(net)
    editor = Editor(net, tokenizer(), FREE, layers=[1], search=SEARCH)
    with pytest.raises(NsrlError, match="call preserve"):
        editor.apply(EDITS)
    with pytest.raises(NsrlError, match="shorter than a token"):
        editor.preserve(["He sings.", ""])
    with pytest.raises(NsrlError, match="no texts"):
        editor.preserve([])
    editor.preserve(TEXTS)
    with pytest.raises(NsrlError, match="batch is singular"):
        editor.apply([EDITS[0], Edit(EDITS[0].prompt, EDITS[0].subject, " nurse")])
    with pytest.raises(NsrlError, match="no edits"):
        editor.apply([])
    with pytest.raises(NsrlError, match=r"one \{\}"):
        Edit("Somebody works as a", "Leo", " nurse")
    with pytest.raises(NsrlError, match="0 values for 3 edits"):
        editor.apply(EDITS, editor.find_values(EDITS)[[]])
    values = editor.find_values(EDITS)
    values.hidden[1] = torch.nan
    with pytest.raises(NsrlError, match="NaN"):
        editor.apply(EDITS, values)
    assert same(before, weights(net)) and editor.edits == ()


def test_a_subject_that_is_not_in_the_prompt() -> None:
    from nsrl.editing.tokens import mark

    with pytest.raises(NsrlError, match="'Leo' is not in the prompt"):
        mark(tokenizer(), "Clara works as a", "Leo", " nurse")


def test_a_tokenizer_without_padding() -> None:
    from copy import deepcopy

    other = deepcopy(tokenizer())
    other.pad_token = None
    with pytest.raises(NsrlError, match="no padding token"):
        Editor(model(), other, FREE)


def test_a_weight_that_somebody_else_changes_is_noticed() -> None:
    net = model()
    editor = Editor(net, tokenizer(), FREE, layers=[1], search=SEARCH)
    editor.preserve(TEXTS)
    editor.apply(EDITS)
    with torch.no_grad():
        editor.layers[0].weight.add_(1.0)
    for call in (editor.undo, lambda: editor.apply(EDITS)):
        with pytest.raises(NsrlError, match="changed by somebody else"):
            call()


def test_state_does_not_leak_between_editors() -> None:
    nets = [model(), model()]
    editors = [Editor(net, tokenizer(), FREE, layers=[1], search=SEARCH) for net in nets]
    for editor in editors:
        editor.preserve(TEXTS)
    before = weights(nets[1])
    editors[0].apply(EDITS)
    assert same(before, weights(nets[1]))
    editors[1].apply(EDITS)
    assert same(weights(nets[0]), weights(nets[1]))
