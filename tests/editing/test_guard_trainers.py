"""The guard in transformers' Trainer, in trl's SFTTrainer and GRPOTrainer, and with peft's adapters, as they are."""

from __future__ import annotations

import copy
import math

import pytest
import torch

pytest.importorskip("transformers", reason="trainers need transformers: install nsrl[llm]")
pytest.importorskip("accelerate", reason="trainers need accelerate: install nsrl[llm]")

from transformers import GPT2Config, GPT2LMHeadModel, LlamaConfig, LlamaForCausalLM, Trainer, TrainingArguments

from nsrl.editing.callback import NAME, GuardCallback
from nsrl.editing.guard import protect_module
from nsrl.editing.post_training.preserved import Preserved
from nsrl.errors import NsrlError

WORDS = 40


def gpt2() -> GPT2LMHeadModel:
    torch.manual_seed(0)
    config = GPT2Config(
        vocab_size=WORDS, n_positions=32, n_embd=16, n_layer=2, n_head=2, bos_token_id=0, eos_token_id=1
    )
    config.pad_token_id = 1
    return GPT2LMHeadModel(config)


def llama() -> LlamaForCausalLM:
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=WORDS,
        hidden_size=16,
        intermediate_size=24,
        num_hidden_layers=2,
        num_attention_heads=2,
        num_key_value_heads=1,
        max_position_embeddings=32,
        tie_word_embeddings=True,
        bos_token_id=0,
        eos_token_id=1,
        pad_token_id=1,
    )
    return LlamaForCausalLM(config)


def rows(count: int, seed: int) -> list[dict]:
    ids = torch.randint(3, WORDS, (count, 8), generator=torch.Generator().manual_seed(seed))
    return [{"input_ids": row, "labels": row} for row in ids]


def preserve() -> list[dict]:
    ids = torch.randint(3, WORDS, (6, 7), generator=torch.Generator().manual_seed(9))
    return [{"input_ids": ids[:3]}, {"input_ids": ids[3:], "attention_mask": (torch.arange(7) < 5).expand(3, 7).long()}]


def arguments(folder, **options) -> TrainingArguments:
    given = {"per_device_train_batch_size": 4, "learning_rate": 5e-3, "max_steps": 8, "save_steps": 4, **options}
    return TrainingArguments(
        str(folder), report_to=[], disable_tqdm=True, use_cpu=True, logging_steps=4, seed=0, **given
    )


def drifted(then, now) -> float:
    """Mean KL of the tokens preserved, by another pass than the guard's."""
    reference = Preserved(copy.deepcopy(then), preserve()).references
    return Preserved(now, preserve(), references=reference).measure().kl_mean


@pytest.mark.parametrize("make", [gpt2, llama])
@pytest.mark.parametrize("accumulate", [1, 2])
def test_trainer_with_checkpoints_and_a_resumed_run(make, accumulate: int, tmp_path) -> None:
    then = make()

    def trainer(folder, **options) -> tuple[Trainer, GuardCallback]:
        guard = GuardCallback(preserve(), 0.01, measure_every=3, project_every=2)
        given = arguments(folder, gradient_accumulation_steps=accumulate, **options)
        return Trainer(copy.deepcopy(then), given, train_dataset=rows(64, 1), callbacks=[guard]), guard

    first, guard = trainer(tmp_path)
    first.train()
    assert guard.guard is not None and guard.guard.steps == 8
    assert 0.0 < drifted(then, first.model) <= 0.01
    assert (tmp_path / "checkpoint-4" / NAME).is_file()
    at_checkpoint = make().from_pretrained(tmp_path / "checkpoint-4")
    assert drifted(then, at_checkpoint) <= 0.01
    assert any("retain/kl_mean" in row for row in first.state.log_history)

    second, guard = trainer(tmp_path)
    second.train(resume_from_checkpoint=str(tmp_path / "checkpoint-4"))
    pairs = zip(first.model.parameters(), second.model.parameters(), strict=True)
    assert all(torch.equal(a, b) for a, b in pairs)
    (tmp_path / "checkpoint-4" / NAME).unlink()
    with pytest.raises(NsrlError, match="is not there"):
        trainer(tmp_path)[0].train(resume_from_checkpoint=str(tmp_path / "checkpoint-4"))


def test_an_infinite_budget_leaves_the_trainer_as_it_is(tmp_path) -> None:
    found = []
    for callbacks in ([], [GuardCallback(preserve(), math.inf)]):
        trainer = Trainer(gpt2(), arguments(tmp_path), train_dataset=rows(32, 1), callbacks=callbacks)
        trainer.train()  # with the dropout of the random numbers that making a trainer has seeded
        found.append(trainer.model)
    assert all(torch.equal(a, b) for a, b in zip(*(model.parameters() for model in found), strict=True))


def test_mixed_precision_measures_the_model_itself(tmp_path) -> None:
    then = gpt2()
    guard = GuardCallback(preserve(), 0.01, measure_every=3)
    trainer = Trainer(copy.deepcopy(then), arguments(tmp_path, bf16=True), train_dataset=rows(32, 1), callbacks=[guard])
    trainer.train()
    assert guard.guard is not None
    kl = guard.guard.report().kl_mean
    assert 0.0 < kl <= 0.01
    trainer.model.forward = trainer.model.__class__.forward.__get__(trainer.model)  # without the trainer's autocast
    assert kl == pytest.approx(drifted(then, trainer.model), rel=1e-6)


def tokenizer():
    from tokenizers import Tokenizer, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast

    words = {"<s>": 0, "<e>": 1, "<u>": 2, **{f"w{n}": n for n in range(3, WORDS)}}
    inner = Tokenizer(models.WordLevel(words, unk_token="<u>"))
    inner.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    return PreTrainedTokenizerFast(tokenizer_object=inner, bos_token="<s>", eos_token="<e>", pad_token="<e>")


def text(row: dict) -> str:
    return " ".join(f"w{int(n)}" for n in row["input_ids"])


def test_sft_trainer_runs_unchanged(tmp_path) -> None:
    trl = pytest.importorskip("trl", reason="SFTTrainer needs trl: pip install trl")
    datasets = pytest.importorskip("datasets", reason="SFTTrainer needs datasets: pip install datasets")
    then = llama()
    data = datasets.Dataset.from_list([{"text": text(row)} for row in rows(32, 1)])
    config = trl.SFTConfig(
        str(tmp_path),
        max_steps=6,
        per_device_train_batch_size=4,
        learning_rate=5e-3,
        report_to=[],
        use_cpu=True,
        bf16=False,
        disable_tqdm=True,
        save_steps=3,
    )
    guard = GuardCallback(preserve(), 0.01, measure_every=2)
    trainer = trl.SFTTrainer(
        copy.deepcopy(then), args=config, train_dataset=data, processing_class=tokenizer(), callbacks=[guard]
    )
    trainer.train()
    assert guard.guard is not None and guard.guard.steps == 6
    assert 0.0 < guard.guard.report().kl_mean <= 0.01
    assert guard.guard.report().kl_mean == pytest.approx(drifted(then, trainer.model), rel=1e-6)


def test_grpo_trainer_runs_unchanged(tmp_path) -> None:
    trl = pytest.importorskip("trl", reason="GRPOTrainer needs trl: pip install trl")
    datasets = pytest.importorskip("datasets", reason="GRPOTrainer needs datasets: pip install datasets")
    then = gpt2()
    data = datasets.Dataset.from_list([{"prompt": text(row)} for row in rows(16, 1)])
    config = trl.GRPOConfig(
        str(tmp_path),
        max_steps=4,
        per_device_train_batch_size=4,
        num_generations=4,
        max_completion_length=6,
        learning_rate=5e-3,
        report_to=[],
        use_cpu=True,
        bf16=False,
        disable_tqdm=True,
        save_strategy="no",
    )
    guard = GuardCallback(preserve(), 0.01, measure_every=2)
    trainer = trl.GRPOTrainer(
        copy.deepcopy(then),
        reward_funcs=lambda completions, **_: [float(len(set(c.split()))) for c in completions],
        args=config,
        train_dataset=data,
        processing_class=tokenizer(),
        callbacks=[guard],
    )
    trainer.train()
    assert guard.guard is not None and guard.guard.steps == 4
    assert guard.guard.report().kl_mean <= 0.01
    assert guard.guard.report().kl_mean == pytest.approx(drifted(then, trainer.model), rel=1e-6, abs=1e-12)


def test_adapters_of_peft_are_what_moves() -> None:
    peft = pytest.importorskip("peft", reason="adapters need peft: pip install peft")
    then = llama()
    model = peft.get_peft_model(
        copy.deepcopy(then), peft.LoraConfig(r=2, target_modules=["q_proj", "v_proj", "down_proj"], lora_dropout=0.1)
    )
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], 2e-2)
    guard = protect_module(model, optimizer, preserve(), 0.003, measure_every=5, project_every=2)
    for row in rows(20, 2):
        optimizer.zero_grad()
        model(input_ids=row["input_ids"][None], labels=row["labels"][None]).loss.backward()
        optimizer.step()
    report = guard.finish()
    assert 0.0 < report.kl_mean <= 0.003 and report.rank > 0
    assert report.parameters == sum(p.numel() for name, p in model.named_parameters() if "lora" in name)
    merged = model.merge_and_unload()
    # the merged weights are those of the adapters up to float32 rounding
    assert drifted(then, merged) == pytest.approx(report.kl_mean, rel=1e-3)


@pytest.mark.parametrize("make", [gpt2, llama])
@pytest.mark.parametrize("constraint", ["features", "kronecker", "none"])
def test_models_of_transformers_under_every_constraint(make, constraint: str) -> None:
    then, model = make(), make()
    optimizer = torch.optim.AdamW(model.parameters(), 1e-2)
    guard = protect_module(model, optimizer, preserve(), 0.01, constraint=constraint, measure_every=4, project_every=2)
    for row in rows(8, 2):
        optimizer.zero_grad()
        model(input_ids=row["input_ids"][None], labels=row["labels"][None]).loss.backward()
        optimizer.step()
    report = guard.finish()
    assert report.kl_mean == pytest.approx(drifted(then, model), rel=1e-6) and 0.0 < report.kl_mean <= 0.01
    assert (report.rank > 0) == (constraint == "features") or constraint == "kronecker"
