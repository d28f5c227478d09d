"""How surely a model gives the answers of some edits, as a function of what is added at their subjects."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from nsrl.editing.continuations import Rows, rows_of, run_heads, run_tails
from nsrl.editing.layers import EditedLayer
from nsrl.editing.logits import logits_of
from nsrl.editing.observation import hidden_state
from nsrl.editing.tokens import Marked
from nsrl.errors import NsrlError

#: An answer is given for good where the log-odds of each of its tokens against all others are at least this, in nats.
MARGIN = 1.0
#: Logits that are held at once, entries.
LOGITS = 1 << 23


class Answers:
    """Log-odds of the answers of edits, token by token, and what they miss of `MARGIN`.

    The tokens in front of a subject's last one run once, when this is made, through the model as it is then. What is
    added at other tokens, where a weight changes, is not seen: the preserved text is what keeps it small.

    Args:
        model: a causal language model in evaluation mode; it has to be the same at every call.
        layer: the one to whose block's output something is added, at the subject's last token.
        prompts: with their answers, one an edit.
        padding: token to pad with.
    """

    def __init__(self, model: Any, layer: EditedLayer, prompts: Sequence[Marked], padding: int):
        self.model, self.layer, self.count = model, layer, len(prompts)
        words = int(model.get_output_embeddings().weight.shape[0])
        size = max(1, LOGITS // (words * max(len(prompt.ids) - prompt.target for prompt in prompts)))
        self._pieces: list[tuple[slice, Rows]] = []
        for start in range(0, len(prompts), size):
            rows = rows_of([[prompt] for prompt in prompts[start : start + size]], [], padding, layer.weight.device)
            run_heads(model, rows)
            self._pieces.append((slice(start, start + size), rows))

    def shortfall(self, added: Tensor) -> tuple[Tensor, Tensor]:
        """What every edit's answer misses, and its slope.

        Args:
            added: to the hidden states, shape (n, d).

        Returns:
            Mean over an answer's tokens of relu(`MARGIN` - log-odds)², (n,), and its gradient, (n, d); float64.

        Raises:
            NsrlError: NaN or infinite logits.
        """
        missing, slopes = [], []
        handle = self.layer.block.register_forward_hook(self._add)
        learnt = [p for p in self.model.parameters() if p.requires_grad]
        try:
            for parameter in learnt:
                parameter.requires_grad_(False)
            for piece, rows in self._pieces:
                self._added = added[piece].detach().to(self.layer.weight.dtype).requires_grad_(True)
                with torch.enable_grad():
                    found = self._missing(rows)
                    (slope,) = torch.autograd.grad(found.sum(), self._added)
                missing.append(found.detach().double())
                slopes.append(slope.double())
        finally:
            handle.remove()
            for parameter in learnt:
                parameter.requires_grad_(True)
        if not bool(torch.isfinite(torch.cat(missing)).all()):
            raise NsrlError("the answers of the edits have NaN or infinite logits; the model has diverged")
        return torch.cat(missing), torch.cat(slopes)

    def _missing(self, rows: Rows) -> Tensor:
        wanted = rows.labels >= 0
        logits = logits_of(self.model, run_tails(self.model, rows)[wanted])
        logits = logits.to(torch.promote_types(logits.dtype, torch.float32))
        labels = rows.labels[wanted].unsqueeze(1)
        # Log-odds, by the other words alone: one less the probability of a sure answer would be round-off.
        others = logits.scatter(1, labels, -torch.inf).logsumexp(1, keepdim=True)
        short = (MARGIN - (logits.gather(1, labels) - others)).relu().square().squeeze(1)
        owners = rows.edit.unsqueeze(1).expand_as(rows.labels)[wanted]
        shares = short * rows.weights[wanted].to(short)
        return short.new_zeros(len(rows.edit)).index_add(0, owners, shares)

    def _add(self, _: Any, __: Any, output: Any) -> Any:
        hidden = hidden_state(output)
        moved = torch.cat([hidden[:, :1] + self._added.unsqueeze(1), hidden[:, 1:]], 1)
        return moved if isinstance(output, Tensor) else (moved, *output[1:])
