"""Post-training a language model of plain torch inside a KL budget: two lines more than the loop.

A tiny GRU language model knows some walks through its tokens and is then trained on others. Any model that gives logits
will do.
"""

import copy
import os

import torch

from nsrl.editing import protect_module

STEPS = int(os.environ.get("NSRL_EXAMPLE_STEPS", 300))
VOCABULARY, LENGTH = 24, 12


class LanguageModel(torch.nn.Module):
    """Logits of the next token."""

    def __init__(self) -> None:
        super().__init__()
        self.embed = torch.nn.Embedding(VOCABULARY, 32)
        self.memory = torch.nn.GRU(32, 64, batch_first=True)
        self.head = torch.nn.Linear(64, VOCABULARY)

    def forward(self, input_ids: torch.Tensor) -> torch.Tensor:
        return self.head(self.memory(self.embed(input_ids))[0])


def sentences(stride: int, first: int) -> torch.Tensor:
    """Walks through half of the vocabulary with a stride."""
    starts = torch.arange(12)[:, None]
    return first + (starts + stride * torch.arange(LENGTH)) % 12


def train(model: torch.nn.Module, optimizer: torch.optim.Optimizer, data: torch.Tensor, steps: int) -> None:
    for _ in range(steps):
        optimizer.zero_grad()
        logits = model(data[:, :-1])
        torch.nn.functional.cross_entropy(logits.flatten(0, 1), data[:, 1:].flatten()).backward()
        optimizer.step()


@torch.no_grad()
def right(model: torch.nn.Module, data: torch.Tensor) -> float:
    return float((model(data[:, :-1]).argmax(-1) == data[:, 1:]).float().mean())


if __name__ == "__main__":
    torch.manual_seed(0)
    old, new = sentences(1, 0), torch.cat([sentences(5, 12), sentences(1, 0)[:, :1].repeat(1, LENGTH)])
    pretrained = LanguageModel()
    train(pretrained, torch.optim.Adam(pretrained.parameters(), 1e-2), old, STEPS)
    print(f"before: old {right(pretrained, old):.2f}, new {right(pretrained, new):.2f}")
    for budget in (float("inf"), 0.02):
        model = copy.deepcopy(pretrained)
        optimizer = torch.optim.Adam(model.parameters(), 3e-3)
        guard = protect_module(model, optimizer, preserve=[old], kl_budget=budget)
        train(model, optimizer, new, STEPS)
        report = guard.finish()
        print(
            f"budget {budget}: old {right(model, old):.2f}, new {right(model, new):.2f}, KL {report.kl_mean:.4f} nats"
        )
