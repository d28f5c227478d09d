"""A hand-written training loop of plain torch that keeps every task it has learnt: three lines more.

Five tasks of one kind: Gaussian clusters in 20 dimensions, whose coordinates every task permutes anew.
"""

import os

import torch
from torch.utils.data import DataLoader, TensorDataset

from nsrl.continual import protect

STEPS = int(os.environ.get("NSRL_EXAMPLE_STEPS", 4_000))
TASKS, CLASSES, WIDTH = 5, 4, 20


def tasks() -> list[TensorDataset]:
    generator = torch.Generator().manual_seed(0)
    centres = 1.5 * torch.randn(CLASSES, WIDTH, generator=generator)
    found = []
    for _ in range(TASKS):
        labels = torch.randint(CLASSES, (512,), generator=generator)
        inputs = centres[labels] + torch.randn(len(labels), WIDTH, generator=generator)
        found.append(TensorDataset(inputs[:, torch.randperm(WIDTH, generator=generator)], labels))
    return found


def accuracy(model: torch.nn.Module, task: TensorDataset) -> float:
    inputs, labels = task.tensors
    with torch.no_grad():
        return float((model(inputs).argmax(1) == labels).float().mean())


def train(budget: float | None) -> list[float]:
    torch.manual_seed(0)
    model = torch.nn.Sequential(torch.nn.Linear(WIDTH, 64), torch.nn.Tanh(), torch.nn.Linear(64, CLASSES))
    optimizer = torch.optim.Adam(model.parameters(), 3e-3)
    guard = protect(model, optimizer, kl_budget=budget) if budget is not None else None
    data = tasks()
    for task in data:
        loader = DataLoader(task, 64, shuffle=True)
        for _ in range(max(1, STEPS // TASKS // len(loader))):
            for inputs, labels in loader:  # your loop as it is
                optimizer.zero_grad()
                torch.nn.functional.cross_entropy(model(inputs), labels).backward()
                optimizer.step()
        if guard is not None:
            guard.after_task(loader)  # retain what was learnt
    if guard is not None:
        print(f"largest KL of a learnt task: {guard.report()['largest_kl']:.3f} of {budget} nats")
    return [accuracy(model, task) for task in data]


if __name__ == "__main__":
    for name, budget in {"plain": None, "KL budget": 0.02}.items():
        print(f"{name}: accuracy by task", *(f"{value:.2f}" for value in train(budget)))
