"""The settings of one continual-learning run: frozen dataclasses that a YAML file and the command line fill in.

Nothing heavy is imported here, so that `--help` and a mistyped key are answered at once.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, field
from typing import Any, Literal

from nsrl.errors import NsrlError


@dataclass(frozen=True)
class BenchmarkSettings:
    """The sequence of tasks.

    Attributes:
        name: permuted_digits, rotated_digits, split_digits, teacher_student or regression; or, read from files that you
            have, permuted_mnist, split_mnist, permuted_fashion_mnist, split_fashion_mnist, split_cifar100 or
            split_tinyimagenet.
        scenario: "task": task identity known at test time, a head a task; "class": one head, all classes compete;
            "domain": one head, the same classes in every task; null takes what is usual for the benchmark.
        tasks: how many; null takes what is usual for the benchmark.
        order: of the tasks; 0 as they are, any other number seeds a permutation of them.
        validation: share of the examples kept for choosing settings; never trained on, never reported.
        test: share of the examples kept for the reported scores, where the data come without a test set.
        data: folder of the files, for the benchmarks that read them.
        pixels: inputs of MNIST and Fashion-MNIST: "shares" of white, 0 to 1, or "standardised" by the mean and the
            deviation over all training pixels, as most papers have them.
    """

    name: str = "permuted_digits"
    scenario: Literal["task", "class", "domain"] | None = None
    tasks: int | None = None
    order: int = 0
    validation: float = 0.1
    test: float = 0.2
    data: str | None = None
    pixels: Literal["shares", "standardised"] = "shares"

    def __post_init__(self) -> None:
        if self.tasks is not None and self.tasks < 1:
            raise NsrlError(f"benchmark.tasks must be at least 1, not {self.tasks}")
        if not 0 <= self.order < 2**32:
            raise NsrlError(
                f"benchmark.order must be 0 (as they are) or a positive number of 32 bits, not {self.order}"
            )
        for key in ("validation", "test"):
            if not 0.0 <= getattr(self, key) < 0.5:
                raise NsrlError(f"benchmark.{key} is a share from 0 to below 0.5, not {getattr(self, key)}")


@dataclass(frozen=True)
class ModelSettings:
    """The network.

    Attributes:
        kind: "mlp" for vectors, "resnet18" (the CIFAR variant) for images.
        hidden: widths of the MLP's hidden layers.
        bias: whether the MLP's layers, heads among them, have biases; the projection papers' networks have none.
        width: channels of the ResNet's first stage; the stages have 1, 2, 4 and 8 times as many.
        batch_norm: of the ResNet; statistics are measured on the first task's inputs before training and never move.
            "frozen": scale and shift do not move either; "affine": they are learnt; "none": no such layers.
    """

    kind: Literal["mlp", "resnet18"] = "mlp"
    hidden: list[int] = field(default_factory=lambda: [100, 100])
    bias: bool = True
    width: int = 64
    batch_norm: Literal["frozen", "affine", "none"] = "frozen"

    def __post_init__(self) -> None:
        if self.width < 1 or any(width < 1 for width in self.hidden):
            raise NsrlError(f"model.width and model.hidden must be positive, not {self.width} and {self.hidden}")


@dataclass(frozen=True)
class TrainingSettings:
    """How each task is trained.

    Attributes:
        epochs: passes over a task's training examples.
        batch_size: examples in a step.
        optimizer: "adam" or "sgd".
        learning_rate: of every task but the first.
        first_learning_rate: of the first task; null is the same as `learning_rate`.
        head_learning_rate: of the heads, where every task has its own; null is the same as the rest.
        momentum: of SGD.
        milestones: epochs behind which the learning rates are multiplied by `decay`.
        decay: see `milestones`.
        weight_decay: decoupled, as in AdamW.
        decay_to: "reference": weights decay toward those at the start of the task; "zero": strategies that project,
            project the decay too.
        augment: random crops (4 pixels of padding) and mirroring of training images.
        device: "cpu", "cuda", ...
    """

    epochs: int = 5
    batch_size: int = 32
    optimizer: Literal["adam", "sgd"] = "adam"
    learning_rate: float = 1e-3
    first_learning_rate: float | None = None
    head_learning_rate: float | None = None
    momentum: float = 0.0
    milestones: list[int] = field(default_factory=list)
    decay: float = 0.5
    weight_decay: float = 0.0
    decay_to: Literal["reference", "zero"] = "reference"
    augment: bool = False
    device: str = "cpu"

    def __post_init__(self) -> None:
        for key in ("epochs", "batch_size", "learning_rate", "first_learning_rate", "head_learning_rate", "decay"):
            value = getattr(self, key)
            if value is not None and not 0 < value < math.inf:  # NaN too
                finite = " and finite" if value != value or value > 0 else ""
                raise NsrlError(f"training.{key} must be positive{finite}, not {value}")
        for key in ("momentum", "weight_decay"):
            if not 0 <= getattr(self, key) < math.inf:
                raise NsrlError(f"training.{key} must be finite and not negative, not {getattr(self, key)}")


@dataclass(frozen=True)
class StrategySettings:
    """What keeps earlier tasks.

    Attributes:
        name: of `nsrl.continual.strategies.STRATEGIES`, as "naive", "joint", "ewc", "gpm", "kl_budget".
        options: of that strategy, by name; the others keep their defaults.
    """

    name: str = "kl_budget"
    options: dict[str, Any] = field(default_factory=dict)


@dataclass(frozen=True)
class ContinualConfig:
    """One strategy on one sequence of tasks.

    Attributes:
        benchmark: the tasks.
        model: the network.
        training: how each task is trained.
        strategy: what keeps earlier tasks.
        presets: options by strategy that suit this benchmark; they are beneath those of `strategy`, whichever is
            chosen.
        seed: of the split of the data, the generated tasks, the initial weights and the minibatches.
        out: folder of the run; null makes one under runs/.
    """

    benchmark: BenchmarkSettings = field(default_factory=BenchmarkSettings)
    model: ModelSettings = field(default_factory=ModelSettings)
    training: TrainingSettings = field(default_factory=TrainingSettings)
    strategy: StrategySettings = field(default_factory=StrategySettings)
    presets: dict[str, Any] = field(default_factory=dict)
    seed: int = 0
    out: str | None = None

    def __post_init__(self) -> None:
        if not 0 <= self.seed < 2**32:
            raise NsrlError(f"seed must lie between 0 and {2**32 - 1}, not {self.seed}")
        for name, options in self.presets.items():
            if not isinstance(options, dict):
                raise NsrlError(f"presets.{name} must hold options by name (as in `{{seed: 0}}`), not {options!r}")

    @property
    def options(self) -> dict[str, Any]:
        """The strategy's options: its preset, and over it what `strategy` says."""
        return {**self.presets.get(self.strategy.name, {}), **self.strategy.options}
