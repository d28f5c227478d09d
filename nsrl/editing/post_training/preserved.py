"""Preserved behaviour: batches of inputs with what the module answered to them before it was trained on.

The divergence is KL(then || now) of the softmax over the last axis of the outputs, its mean over real positions: the
padding that an attention mask marks is no position. It is in nats a token.
"""

from __future__ import annotations

import copy
import math
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from nsrl.errors import NsrlError
from nsrl.projection.metrics import Categorical
from nsrl.reading.checksums import checksum

#: Numbers of reference outputs that are held without being asked for, 2 GiB of float32.
MOST = 2**29


@dataclass(frozen=True)
class Batch:
    """Inputs of one call of the module.

    Attributes:
        inputs: keyword arguments by name, or the one positional argument.
        mask: real positions, (N, T) bool; None for all.
    """

    inputs: dict[str, Any] | Tensor
    mask: Tensor | None

    def to(self, device: torch.device) -> Batch:
        """On a device."""
        return Batch(_moved(self.inputs, device), None if self.mask is None else self.mask.to(device))


@dataclass(frozen=True)
class Reference:
    """What the module answered to one batch, M real positions and V classes.

    Attributes:
        outputs: logits (M, V), or with `indices` the log-probabilities (M, K) of the K most likely classes.
        indices: of those classes, (M, K) int64; None where `outputs` are all.
        rest: log-probability of all other classes together, (M,); None where `outputs` are all.
    """

    outputs: Tensor
    indices: Tensor | None = None
    rest: Tensor | None = None

    @classmethod
    def most_likely(cls, logits: Tensor, count: int) -> Reference:
        """The `count` most likely classes, and the mass of the rest."""
        log = F.log_softmax(logits, -1, dtype=torch.float64)
        top, indices = log.topk(min(count, logits.shape[-1] - 1), -1)
        return cls(top.float(), indices, others(log, indices).float())

    def completed(self, outputs: Tensor) -> Tensor:
        """Logits of then, shape (M, V), where the rest is shared out as the module shares it out now.

        With it the full KL is that of the K classes and the rest as one, the gradient in the outputs too: a lower bound
        of the KL with all of then (log-sum inequality), equal to it as far as the rest has kept its shares.

        Args:
            outputs: logits of now, (M, V).
        """
        if self.indices is None or self.rest is None:
            return self.outputs.float()
        log = F.log_softmax(outputs.double(), -1)
        spread = log + (self.rest.double() - others(log, self.indices)).unsqueeze(-1)
        return spread.scatter(-1, self.indices, self.outputs.double())

    def to(self, device: torch.device) -> Reference:
        """On a device."""
        indices = None if self.indices is None else self.indices.to(device)
        return Reference(self.outputs.to(device), indices, None if self.rest is None else self.rest.to(device))

    def nbytes(self) -> int:
        """Memory held, in bytes."""
        return sum(t.numel() * t.element_size() for t in (self.outputs, self.indices, self.rest) if t is not None)


def metric_of(outputs: Tensor) -> Categorical:
    """The metric of logits (M, V).

    Its Hessian is tempered little: most of a vocabulary is next to impossible at every position.
    """
    return Categorical((outputs.shape[-1],), tempering=1e-3)


def others(log: Tensor, indices: Tensor) -> Tensor:
    """Log-probability of all classes (M, V) but those of `indices` (M, K) together, shape (M,)."""
    return log.scatter(-1, indices, -math.inf).logsumexp(-1)


@dataclass(frozen=True)
class Measured:
    """KL(then || now) over all preserved positions.

    Attributes:
        kl_mean: nats a token.
        kl_max: of the position that has moved most.
        agreement: share of positions with the same most likely class.
        tokens: positions measured.
    """

    kl_mean: float
    kl_max: float
    agreement: float
    tokens: int


class Preserved:
    """Batches that a module is to answer as it does now.

    Args:
        module: unwrapped, as it is called.
        batches: mappings of keyword arguments with "input_ids" (an "attention_mask" tells the padding, "labels" are
            left out), tensors, or tuples that begin with the input.
        top_k: keep this many of the most likely classes and the rest as one mass; None keeps all.
        references: what was answered, where that is known already.

    Raises:
        NsrlError: no batches or no real position in them, something that is no batch, outputs that are no logits or
            not finite, or more reference outputs than `MOST`.
    """

    def __init__(
        self,
        module: nn.Module,
        batches: Iterable[Any],
        top_k: int | None = None,
        references: Sequence[Reference] | None = None,
    ):
        if top_k is not None and top_k < 1:
            raise NsrlError(f"top_k is a number of classes of at least 1, not {top_k}")
        device = next((p.device for p in module.parameters()), torch.device("cpu"))
        self.module = module
        self.batches = [_batch(given, number).to(device) for number, given in enumerate(batches)]
        if not self.batches:
            raise NsrlError("there is nothing to preserve: the loader gave no batch")
        self.digest = checksum([_plain(batch.inputs) for batch in self.batches])
        if references is None:
            references = list(self._answered(top_k))
        self.references = list(references)
        self.tokens = sum(len(reference.outputs) for reference in self.references)
        if not self.tokens:
            raise NsrlError("there is nothing to preserve: every position is padding")

    def __len__(self) -> int:
        return len(self.batches)

    def outputs(self, number: int) -> Tensor:
        """Logits of now at the real positions of a batch, in their graph where gradients are on, shape (M, V).

        Raises:
            NsrlError: the module gave something else.
        """
        batch = self.batches[number]
        logits = called(self.module, batch.inputs)
        if logits.dim() < 2 or not logits.is_floating_point():
            raise NsrlError(f"the module gave outputs of shape {tuple(logits.shape)}; logits (..., classes) are needed")
        if batch.mask is None:
            return logits.flatten(0, -2)
        if logits.shape[:2] != batch.mask.shape:
            raise NsrlError(
                f"the module gave outputs for {tuple(logits.shape[:2])} positions where the attention mask has "
                f"{tuple(batch.mask.shape)}; a decoder gives one a token"
            )
        return logits[batch.mask]

    @torch.no_grad()
    def measure(self) -> Measured:
        """How far the module has moved on everything that is preserved, in evaluation mode."""
        total, largest, same = 0.0, 0.0, 0
        with evaluated(self.module):
            for number, reference in enumerate(self.references):
                now = self.outputs(number)
                then = reference.completed(now)
                kl = metric_of(now).divergence(then, now)
                total += float(kl.sum())
                # NaN, which max() would hide behind any number
                largest = max(largest, float(kl.max())) if bool(torch.isfinite(kl).all()) else math.inf
                same += int((then.argmax(-1) == now.argmax(-1)).sum())
        mean = max(total / self.tokens, 0.0) if math.isfinite(total) else math.inf
        return Measured(mean, largest, same / self.tokens, self.tokens)

    def pull(self, number: int, parameters: Sequence[nn.Parameter]) -> tuple[float, list[Tensor]]:
        """Mean KL of one batch, and its gradient in every parameter.

        Taken with `torch.autograd.grad`: no hook of a gradient accumulator fires, so that a data-parallel wrapper does
        not take it for a part of the loss.
        """
        with evaluated(self.module), torch.enable_grad():
            now = self.outputs(number)
            here = now.detach().float()
            then = self.references[number].completed(here)
            slope = (metric_of(here).slope(then, here) / len(here)).to(now)
            kl = float(metric_of(here).divergence(then, here).mean())
            pieces = torch.autograd.grad(now, list(parameters), slope, allow_unused=True)
        return kl, [torch.zeros_like(p) if g is None else g for p, g in zip(parameters, pieces, strict=True)]

    def nbytes(self) -> int:
        """Reference outputs and inputs, in bytes."""
        held = [leaf for batch in self.batches for leaf in _tensors(batch.inputs)]
        return sum(t.numel() * t.element_size() for t in held) + sum(r.nbytes() for r in self.references)

    @torch.no_grad()
    def _answered(self, top_k: int | None) -> Iterator[Reference]:
        held = 0
        with evaluated(self.module):
            for number in range(len(self.batches)):
                logits = self.outputs(number).detach()
                if not bool(torch.isfinite(logits).all()):
                    raise NsrlError("the module gives NaN or infinite logits on what is to be preserved; mend it first")
                held += logits.numel() if top_k is None else 0
                if held > MOST:
                    raise NsrlError(
                        f"the reference outputs would hold more than {MOST:,} numbers ({logits.shape[-1]:,} classes a "
                        "token); preserve fewer tokens, or give top_k=256 to keep the likeliest classes and the rest "
                        "as one mass"
                    )
                yield Reference(logits.clone()) if top_k is None else Reference.most_likely(logits, top_k)


def called(module: nn.Module, inputs: dict[str, Any] | Tensor) -> Tensor:
    """The logits that a module gives, whatever it wraps them in, shape (..., V).

    Raises:
        NsrlError: there are none.
    """
    if isinstance(inputs, dict):
        # A cache of keys and values is for generating; here it would only hold memory.
        cached = hasattr(getattr(module, "config", None), "use_cache")
        answer = module(**{"use_cache": False, **inputs} if cached else inputs)
    else:
        answer = module(inputs)
    for name in ("logits", "last_hidden_state"):
        if hasattr(answer, name):
            answer = getattr(answer, name)
            break
    if isinstance(answer, Mapping):
        answer = answer.get("logits")
    if isinstance(answer, tuple | list) and answer:
        answer = answer[0]
    if not isinstance(answer, Tensor):
        raise NsrlError(f"the module gave a {type(answer).__name__}; it must give logits, or something with .logits")
    return answer


@contextmanager
def evaluated(module: nn.Module) -> Iterator[None]:
    """Within the block the module is in evaluation mode, without autocast, and draws no random numbers of the loop.

    Trainers wrap `forward` in an autocast of their own, which rounds outputs to three digits: what is measured is the
    module itself.
    """
    modes = [(child, child.training) for child in module.modules()]
    devices = sorted({p.device.index or 0 for p in module.parameters() if p.device.type == "cuda"})
    with ExitStack() as stack:
        stack.enter_context(torch.random.fork_rng(devices=devices))
        for kind in ("cpu", "cuda"):
            if torch.is_autocast_enabled(kind):
                stack.enter_context(torch.autocast(kind, enabled=False))
        wrapped = vars(module).get("forward") if "_original_forward" in vars(module) else None
        if wrapped is not None:
            vars(module)["forward"] = module._original_forward
        module.eval()
        try:
            yield
        finally:
            if wrapped is not None:
                vars(module)["forward"] = wrapped
            for child, training in modes:
                child.training = training


def _batch(given: Any, number: int) -> Batch:
    if isinstance(given, Batch):
        return given
    if isinstance(given, Mapping):
        inputs = {str(key): value for key, value in given.items() if key not in ("labels", "completion_mask")}
        if not isinstance(inputs.get("input_ids"), Tensor):
            raise NsrlError(f"batch {number} of what is to be preserved has no tensor under 'input_ids'; tokenise it")
        mask = inputs.get("attention_mask")
        return Batch(copy.copy(inputs), mask.bool() if isinstance(mask, Tensor) and mask.dim() == 2 else None)
    if isinstance(given, tuple | list) and given:
        given = given[0]
    if not isinstance(given, Tensor):
        raise NsrlError(
            f"batch {number} of what is to be preserved is a {type(given).__name__}; give mappings with 'input_ids', "
            "tensors, or tuples that begin with one"
        )
    return Batch(given, None)


def _moved(value: Any, device: torch.device) -> Any:
    if isinstance(value, Tensor):
        return value.detach().to(device)
    return {key: _moved(entry, device) for key, entry in value.items()} if isinstance(value, dict) else value


def _tensors(value: Any) -> list[Tensor]:
    if isinstance(value, dict):
        return [leaf for entry in value.values() for leaf in _tensors(entry)]
    return [value] if isinstance(value, Tensor) else []


def _plain(inputs: dict[str, Any] | Tensor) -> Any:
    if isinstance(inputs, Tensor):
        return inputs.cpu()
    return {key: value.cpu() if isinstance(value, Tensor) else repr(value) for key, value in inputs.items()}
