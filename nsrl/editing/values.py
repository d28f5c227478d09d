"""The values of edits: what the hidden state at the subject should be so that the model says the target.

As in ROME and its successors (arXiv 2202.05262, section 3.1): a vector delta is added to the last edited block's output
at the subject's last token, and Adam lowers the target's negative log-likelihood over several prefixes, plus the KL of
the prompt "{} is a" and a penalty on the length of delta, which is clamped.

Tokens in front of the subject's last one do not depend on delta: they run once, and their keys and values are kept.
Many edits share a pass, each with its own delta and its own end.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from nsrl.editing.continuations import Rows, rows_of, run_heads, run_tails
from nsrl.editing.edits import Edit
from nsrl.editing.layers import EditedLayer
from nsrl.editing.logits import logits_of
from nsrl.editing.observation import hidden_state, observe
from nsrl.editing.tokens import Marked, mark
from nsrl.errors import NsrlError


@dataclass(frozen=True)
class ValueSearch:
    """How values are found; the defaults are those of the official code for Llama-3 but for the learning rate.

    Attributes:
        steps: of Adam, at most.
        learning_rate: of Adam, in units of the mean size of the hidden state's entries.
        weight_decay: times |delta| / |h|^2, as the official code has it.
        kl_factor: weight of the KL of the essence prompt.
        clamp: largest |delta| / |h|.
        enough: an edit whose loss is below this is done.
        prefixes: how many beginnings of preserved texts stand before the prompt in turn, besides none.
        prefix_words: length of a prefix.
        essence: prompt about the subject whose continuation should stay; has one {}.
        batch: edits that share a pass.
    """

    steps: int = 25
    learning_rate: float = 0.5
    weight_decay: float = 0.5
    kl_factor: float = 0.0625
    clamp: float = 0.75
    enough: float = 0.05
    prefixes: int = 3
    prefix_words: int = 6
    essence: str = "{} is a"
    batch: int = 16

    def __post_init__(self) -> None:
        for key in ("steps", "learning_rate", "clamp", "batch", "prefix_words"):
            if not getattr(self, key) > 0:
                raise NsrlError(f"{key} of the search for values must be positive, not {getattr(self, key)}")
        for key in ("weight_decay", "kl_factor", "enough", "prefixes"):
            if not getattr(self, key) >= 0:
                raise NsrlError(f"{key} of the search for values must not be negative, not {getattr(self, key)}")
        if self.essence.count("{}") != 1:
            raise NsrlError(f"the essence prompt {self.essence!r} must have one {{}} for the subject")


@dataclass(frozen=True)
class Values:
    """What the search found, edit by edit, on the model as it was then.

    Attributes:
        hidden: wanted output of the last edited block at the subject, shape (n, d), float64.
        before: its output on the unedited model, shape (n, d), float64.
        keys: inputs of the first edited map at the subject, mean over the prefixes, shape (n, d_in), float64.
        losses: last loss, shape (n,).
        steps: how many were made, shape (n,).
    """

    hidden: Tensor
    before: Tensor
    keys: Tensor
    losses: Tensor
    steps: Tensor

    def __len__(self) -> int:
        return len(self.hidden)

    def __getitem__(self, rows: Sequence[int] | slice) -> Values:
        """Those of some edits."""
        chosen = rows if isinstance(rows, slice) else list(rows)
        return Values(*(getattr(self, name)[chosen] for name in ("hidden", "before", "keys", "losses", "steps")))


def mark_edit(tokenizer: Any, edit: Edit, prefix: str = "") -> Marked:
    """An edit's prompt behind a prefix, with its target.

    Raises:
        NsrlError: as `mark`.
    """
    return mark(tokenizer, prefix + edit.text, edit.subject, edit.target)


def find_values(
    model: Any,
    tokenizer: Any,
    layers: Sequence[EditedLayer],
    edits: Sequence[Edit],
    prefixes: Sequence[str],
    search: ValueSearch,
) -> Values:
    """Values of some edits on the model as it is.

    Args:
        model: a causal language model in evaluation mode.
        tokenizer: its own.
        layers: the edited ones; values belong to the last one's block.
        edits: at least one.
        prefixes: texts that stand in front of the prompt in turn, besides none.
        search: how.
    """
    parts = []
    for start in range(0, len(edits), search.batch):
        chosen = edits[start : start + search.batch]
        rows = [[mark_edit(tokenizer, edit, prefix) for prefix in ("", *prefixes)] for edit in chosen]
        essences = [mark(tokenizer, search.essence.replace("{}", e.subject), e.subject) for e in chosen]
        keys, hidden = observe(
            model,
            [row for group in rows for row in group],
            tokenizer.pad_token_id,
            [layers[0].linear],
            [layers[-1].block],
        )
        count = 1 + len(prefixes)
        before = hidden[::count]
        found = _search(model, layers[-1], rows, essences, before, tokenizer.pad_token_id, search)
        mean = keys.reshape(len(chosen), count, -1).mean(1)
        parts.append(Values(before + found[0].double(), before, mean, found[1], found[2]))
    return Values(
        *(torch.cat([getattr(part, n) for part in parts]) for n in ("hidden", "before", "keys", "losses", "steps"))
    )


def _search(
    model: Any,
    layer: EditedLayer,
    groups: Sequence[Sequence[Marked]],
    essences: Sequence[Marked],
    before: Tensor,
    padding: int,
    search: ValueSearch,
) -> tuple[Tensor, Tensor, Tensor]:
    device = layer.weight.device
    every = rows_of(groups, essences, padding, device)
    run_heads(model, every)
    size = before.norm(dim=1).float()
    # An entry's size differs a hundredfold from model to model, and Adam's steps are as long as its learning rate.
    rate = search.learning_rate * size.mean() / before.shape[1] ** 0.5
    delta = torch.zeros(before.shape, dtype=torch.float32, device=device, requires_grad=True)
    optimizer = torch.optim.Adam([delta], lr=float(rate))
    losses, steps = torch.full((len(groups),), torch.inf, device=device), torch.zeros(len(groups), dtype=torch.long)
    active = torch.ones(len(groups), dtype=torch.bool, device=device)
    with torch.no_grad():
        reference = _essence_logits(model, every)
    rows = every
    state: dict[str, Tensor] = {}

    def add(_: Any, __: Any, output: Any) -> Any:
        hidden = hidden_state(output)
        moved = torch.cat([hidden[:, :1] + state["delta"][state["edit"]].unsqueeze(1).to(hidden), hidden[:, 1:]], 1)
        return moved if isinstance(output, Tensor) else (moved, *output[1:])

    handle = layer.block.register_forward_hook(add)
    grown = [(p, p.requires_grad_(False)) for p in model.parameters() if p.requires_grad]
    try:
        for step in range(search.steps + 1):
            state = {"delta": delta, "edit": rows.edit}
            with torch.enable_grad():
                loss = _losses(model, rows, reference[active], search, len(groups))
                loss = loss + search.weight_decay * _norms(delta) / size.square()
                losses = torch.where(active, loss.detach(), losses)
                active = active & (losses >= search.enough)
                if step == search.steps or not bool(active.any()):
                    break
                steps[active.cpu()] += 1
                optimizer.zero_grad()
                loss[active].sum().backward()
            frozen = delta.detach().clone()
            optimizer.step()
            with torch.no_grad():
                norm = delta.norm(dim=1)
                delta *= (search.clamp * size / norm.clamp_min(1e-30)).clamp_max(1.0).unsqueeze(1)
                delta[~active] = frozen[~active]
            rows = every.of(active)
    finally:
        handle.remove()
        for parameter, _ in grown:
            parameter.requires_grad_(True)
    if not bool(torch.isfinite(losses).all()):
        raise NsrlError("the search for values met NaN or infinite losses; the model has diverged")
    return delta.detach(), losses.cpu(), steps


def _norms(delta: Tensor) -> Tensor:
    """|delta| with the slope 0 at 0, where the norm has none."""
    return delta.square().sum(1).clamp_min(1e-30).sqrt()


def _essence_logits(model: Any, rows: Rows) -> Tensor:
    return F.log_softmax(logits_of(model, run_tails(model, rows)[rows.essence, 0]).float(), -1)


def _losses(model: Any, rows: Rows, reference: Tensor, search: ValueSearch, count: int) -> Tensor:
    hidden = run_tails(model, rows)
    wanted = rows.labels >= 0
    logits = logits_of(model, torch.cat([hidden[wanted], hidden[rows.essence, 0]]))
    told = F.log_softmax(logits.float(), -1)
    answers, essence = told.split([int(wanted.sum()), len(reference)])
    owners = rows.edit.unsqueeze(1).expand_as(rows.labels)[wanted]
    picked = answers.gather(1, rows.labels[wanted].unsqueeze(1)).squeeze(1) * rows.weights[wanted]
    kl = (reference.exp() * (reference - essence)).sum(1)
    loss = torch.zeros(count, device=told.device)
    return loss.index_add(0, owners, -picked).index_add(0, rows.edit[rows.essence], search.kl_factor * kl)
