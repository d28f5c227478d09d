"""What flows through some modules at chosen tokens: one forward pass that ends with the last of them."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from typing import Any

import torch
from torch import Tensor, nn

from nsrl.editing.tokens import Marked, padded

#: Tokens of prompts that run at once.
TOKENS = 2048


class Enough(Exception):
    """Ends a forward pass of which nothing more is wanted."""


def hidden_state(output: Any) -> Tensor:
    """The hidden states (N, T, d) of a block's output, which in some models is a tuple."""
    return output if isinstance(output, Tensor) else output[0]


@contextmanager
def stopping(module: nn.Module) -> Iterator[Callable[..., None]]:
    """A way to call a model that ends behind a module of it.

    Args:
        module: behind whose call the pass ends.
    """

    def stop(*_: Any) -> None:
        raise Enough

    def call(model: nn.Module, **inputs: Any) -> None:
        try:
            model(**inputs)
        except Enough:
            return

    handle = module.register_forward_hook(stop)
    try:
        yield call
    finally:
        handle.remove()


def observe(
    model: nn.Module,
    prompts: Sequence[Marked],
    padding: int,
    inputs_of: Sequence[nn.Module] = (),
    outputs_of: Sequence[nn.Module] = (),
) -> list[Tensor]:
    """Inputs and outputs of modules at the last token of each subject, one (N, d) float64 a module, in their order.

    Args:
        model: the language model.
        prompts: of which only the tokens up to the subject's last one are run; later ones cannot act on it.
        padding: token to pad with.
        inputs_of: modules whose first input is wanted.
        outputs_of: modules whose output is wanted; the last of them to be called ends the pass.
    """
    found: list[list[Tensor]] = [[] for _ in (*inputs_of, *outputs_of)]
    device = next(model.parameters()).device
    order = sorted(range(len(prompts)), key=lambda index: prompts[index].lookup)
    for rows in _pieces(order, prompts):
        ids, mask = padded([prompts[row].ids[: prompts[row].lookup + 1] for row in rows], padding, device)
        places = mask.sum(1) - 1, torch.arange(len(rows), device=device)
        missing = {*range(len(found))}

        def keep(
            slot: int, states: Tensor, places: tuple[Tensor, Tensor] = places, missing: set[int] = missing
        ) -> None:
            found[slot].append(states.detach()[places[1], places[0]].double())
            missing.discard(slot)
            if not missing:
                raise Enough

        with ExitStack() as stack, torch.no_grad():
            for slot, module in enumerate(inputs_of):
                stack.callback(module.register_forward_pre_hook(_on_input(keep, slot)).remove)
            for slot, module in enumerate(outputs_of, start=len(inputs_of)):
                stack.callback(module.register_forward_hook(_on_output(keep, slot)).remove)
            try:
                model(input_ids=ids, attention_mask=mask, use_cache=False)
            except Enough:
                pass
    back = torch.empty(len(order), dtype=torch.long, device=device)
    back[torch.tensor(order, device=device)] = torch.arange(len(order), device=device)
    return [torch.cat(pieces)[back] for pieces in found]


def _on_input(keep: Callable[[int, Tensor], None], slot: int) -> Callable[..., None]:
    return lambda _, args: keep(slot, args[0])


def _on_output(keep: Callable[[int, Tensor], None], slot: int) -> Callable[..., None]:
    return lambda _, __, output: keep(slot, hidden_state(output))


def _pieces(order: Sequence[int], prompts: Sequence[Marked]) -> Iterator[list[int]]:
    """Rows in order of their length, so that the padding is little, about TOKENS tokens at a time."""
    held: list[int] = []
    for row in order:
        if held and (len(held) + 1) * (prompts[row].lookup + 1) > TOKENS:
            yield held
            held = []
        held.append(row)
    if held:
        yield held
