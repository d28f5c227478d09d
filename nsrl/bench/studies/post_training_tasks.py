"""A generated world of facts, a tiny language model that knows them, and three things to teach it besides."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

#: People have a first and a last name; every relation has its own answers.
FIRST, LAST, RELATIONS, ANSWERS, WORDINGS = 12, 12, 3, 8, 2
PEOPLE, NEW = 48, 12
PAD, END, STYLE, ASK = 0, 1, 2, 3
#: Sentences of a step of pretraining; half as many in a step on a new task.
BATCH = 48


@dataclass(frozen=True)
class World:
    """Facts as token ids.

    Attributes:
        people: first and last name of everybody, (people, 2).
        answers: of every relation, (people, relations).
        vocabulary: number of tokens.
    """

    people: Tensor
    answers: Tensor
    vocabulary: int

    @classmethod
    def generated(cls, seed: int) -> World:
        """Old people first, then the new ones; answers at random."""
        generator = torch.Generator().manual_seed(seed)
        pairs = torch.randperm(FIRST * LAST, generator=generator)[: PEOPLE + NEW]
        start = 4
        people = torch.stack([start + pairs // LAST, start + FIRST + pairs % LAST], 1)
        start += FIRST + LAST + 2 * RELATIONS * WORDINGS
        chosen = torch.randint(ANSWERS, (PEOPLE + NEW, RELATIONS), generator=generator)
        answers = start + torch.arange(RELATIONS) * ANSWERS + chosen
        return cls(people, answers, start + RELATIONS * ANSWERS)

    @property
    def answer_words(self) -> tuple[int, int]:
        """First and last token, excluded, of the words that are answers."""
        return self.vocabulary - RELATIONS * ANSWERS, self.vocabulary

    def prompts(self, people: Sequence[int], wording: int) -> tuple[Tensor, Tensor]:
        """Prompts (n, 5), the last token before the answer at the end, and their answers (n,)."""
        rows, answers = [], []
        for person in people:
            for relation in range(RELATIONS):
                words = 4 + FIRST + LAST + 2 * (relation * WORDINGS + wording)
                first, last = self.people[person].tolist()
                rows.append([words, first, last, words + 1] if wording else [first, last, words, words + 1])
                answers.append(int(self.answers[person, relation]))
        return torch.tensor(rows), torch.tensor(answers)

    def sentences(self, people: Sequence[int], wordings: Sequence[int] = (0, 1)) -> Tensor:
        """Whole sentences, (n, 6): prompt, answer, end."""
        found = []
        for wording in wordings:
            prompts, answers = self.prompts(people, wording)
            found.append(torch.cat([prompts, answers[:, None], torch.full_like(answers[:, None], END)], 1))
        return torch.cat(found)

    def styled(self, people: Sequence[int]) -> tuple[Tensor, Tensor]:
        """The other style: asked for by a mark, the answer twice and the last name behind it; (n, 9), prompt of 5."""
        prompts, answers = self.prompts(people, 0)
        mark = torch.full_like(answers[:, None], STYLE)
        last = prompts[:, 1:2]
        row = torch.cat([mark, prompts, answers[:, None], answers[:, None], last, mark - STYLE + END], 1)
        return row, answers

    def asked(self, people: Sequence[int]) -> Tensor:
        """Prompts of the rewarded style: a mark and half a sentence, (n, 4)."""
        prompts, _ = self.prompts(people, 0)
        return torch.cat([torch.full((len(prompts), 1), ASK), prompts[:, :3]], 1)


def tiny_model(world: World, seed: int) -> Any:
    """A Llama of 48 numbers a token and two layers, head and embedding tied."""
    from transformers import LlamaConfig, LlamaForCausalLM

    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        config = LlamaConfig(
            vocab_size=world.vocabulary,
            hidden_size=48,
            intermediate_size=128,
            num_hidden_layers=2,
            num_attention_heads=4,
            num_key_value_heads=4,
            max_position_embeddings=16,
            tie_word_embeddings=True,
            pad_token_id=PAD,
            bos_token_id=END,
            eos_token_id=END,
        )
        return LlamaForCausalLM(config)


def logits_of(model: Any, ids: Tensor) -> Tensor:
    """Logits of a model, (n, T, V)."""
    return model(input_ids=ids, use_cache=False).logits


def cross_entropy(model: Any, ids: Tensor, prompt: int = 0) -> Tensor:
    """Mean negative log-likelihood of all tokens behind a prompt of so many, a scalar ()."""
    logits = logits_of(model, ids[:, :-1])[:, max(prompt - 1, 0) :]
    return F.cross_entropy(logits.flatten(0, 1), ids[:, max(prompt, 1) :].flatten())


def pretrain(model: Any, world: World, seed: int, epochs: int) -> None:
    """Teach the old people's facts, in both wordings."""
    sentences = world.sentences(range(PEOPLE))
    generator = torch.Generator().manual_seed(seed)
    optimizer = torch.optim.AdamW(model.parameters(), 3e-3, weight_decay=0.01)
    steps = epochs * -(-len(sentences) // BATCH)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, 3e-3, total_steps=steps)
    model.train()
    for _ in range(epochs):
        for rows in torch.randperm(len(sentences), generator=generator).split(BATCH):
            optimizer.zero_grad()
            cross_entropy(model, sentences[rows]).backward()
            optimizer.step()
            schedule.step()
    model.eval()


@torch.no_grad()
def known(model: Any, world: World, people: Sequence[int], wording: int) -> Tensor:
    """Which facts the model answers rightly by its likeliest token, (n,) bool."""
    prompts, answers = world.prompts(people, wording)
    return logits_of(model, prompts)[:, -1].argmax(-1) == answers


@torch.no_grad()
def continued(model: Any, prompts: Tensor, tokens: int, generator: torch.Generator | None = None) -> Tensor:
    """Prompts with so many tokens behind them, the likeliest ones or drawn ones, (n, T + tokens)."""
    rows = prompts
    for _ in range(tokens):
        last = logits_of(model, rows)[:, -1]
        chosen = (
            last.argmax(-1, keepdim=True)
            if generator is None
            else torch.multinomial(last.softmax(-1), 1, generator=generator)
        )
        rows = torch.cat([rows, chosen], 1)
    return rows


def reward(world: World, completions: Tensor) -> Tensor:
    """A wordy style: share of completions (n, T) that are answers, whatever the question, no word twice; shape (n,)."""
    low, high = world.answer_words
    found = torch.stack([((completions == word).any(1)) for word in range(low, high)], 1)
    return found.sum(1).clamp_max(completions.shape[1]).float() / completions.shape[1]


@dataclass(frozen=True)
class Task:
    """Something new to learn.

    Attributes:
        steps: of the optimizer.
        rate: its learning rate.
        loss: function (model, world, generator) -> loss of one batch.
        score: function (model, world) -> how well it is learnt, 0 to 1.
    """

    steps: int
    rate: float
    loss: Callable[[Any, World, torch.Generator], Tensor]
    score: Callable[[Any, World], float]
    extra: dict[str, float] = field(default_factory=dict)


def _some(count: int, size: int, generator: torch.Generator) -> Tensor:
    return torch.randint(count, (size,), generator=generator)


def _facts_loss(model: Any, world: World, generator: torch.Generator) -> Tensor:
    sentences = world.sentences(range(PEOPLE, PEOPLE + NEW))
    return cross_entropy(model, sentences[_some(len(sentences), BATCH // 2, generator)])


def _facts_score(model: Any, world: World) -> float:
    right = [known(model, world, range(PEOPLE, PEOPLE + NEW), wording) for wording in range(WORDINGS)]
    return float(torch.cat(right).double().mean())


def _style_loss(model: Any, world: World, generator: torch.Generator) -> Tensor:
    rows, _ = world.styled(range(PEOPLE // 2))
    return cross_entropy(model, rows[_some(len(rows), BATCH // 2, generator)], 5)


def _style_score(model: Any, world: World) -> float:
    """Share of right tokens in the answers, of people that were not in the training data of the style."""
    rows, _ = world.styled(range(PEOPLE // 2, PEOPLE))
    return float((continued(model, rows[:, :5], 4) == rows)[:, 5:].double().mean())


#: Completions of a prompt, tokens of each, prompts of a step.
GROUP, TOKENS, PROMPTS = 8, 4, 8


def _reward_loss(model: Any, world: World, generator: torch.Generator) -> Tensor:
    """Policy gradient with advantages normalised within the group of a prompt (GRPO without its KL)."""
    prompts = world.asked(range(PEOPLE // 2))
    chosen = prompts[_some(len(prompts), PROMPTS, generator)].repeat_interleave(GROUP, 0)
    rows = continued(model, chosen, TOKENS, generator)
    gained = reward(world, rows[:, chosen.shape[1] :]).view(PROMPTS, GROUP)
    advantage = (gained - gained.mean(1, keepdim=True)) / (gained.std(1, keepdim=True) + 1e-4)
    logs = logits_of(model, rows[:, :-1])[:, chosen.shape[1] - 1 :].log_softmax(-1)
    taken = logs.gather(-1, rows[:, chosen.shape[1] :, None]).squeeze(-1).sum(1)
    return -(advantage.flatten() * taken).mean()


def _reward_score(model: Any, world: World) -> float:
    prompts = world.asked(range(PEOPLE // 2, PEOPLE))
    generator = torch.Generator().manual_seed(0)
    return float(reward(world, continued(model, prompts, TOKENS, generator)[:, prompts.shape[1] :]).mean())


TASKS: dict[str, Task] = {
    "new facts (SFT)": Task(150, 2e-3, _facts_loss, _facts_score),
    "other style (SFT)": Task(150, 2e-3, _style_loss, _style_score),
    "rewarded style (GRPO)": Task(150, 2e-3, _reward_loss, _reward_score),
}
