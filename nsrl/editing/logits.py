"""Logits at chosen tokens only: the head of a language model is a third of a small one's work."""

from __future__ import annotations

from inspect import signature
from typing import Any

import torch
from torch import Tensor, nn

from nsrl.errors import NsrlError


def hidden_states(model: Any, **inputs: Any) -> Tensor:
    """Normalised hidden states in front of the head, shape (N, T, d).

    Args:
        model: a causal language model of transformers.
        inputs: of its forward; a cache of keys and values under `cache`, whatever this version calls it.
    """
    trunk = model.base_model
    if "cache" in inputs and "cache" not in signature(trunk.forward).parameters:
        inputs["past_key_values"] = inputs.pop("cache")
    return trunk(**inputs).last_hidden_state


def logits_of(model: Any, hidden: Tensor) -> Tensor:
    """The head's logits of hidden states (..., d), shape (..., V), with the soft cap of models that have one."""
    logits = model.get_output_embeddings()(hidden)
    cap = getattr(model.config, "final_logit_softcapping", None)
    return logits if cap is None else torch.tanh(logits / cap) * cap


def check_logits(model: Any, ids: Tensor) -> None:
    """Raise NsrlError unless the head's logits are the model's.

    Args:
        model: a causal language model of transformers.
        ids: some tokens, (N, T).

    Raises:
        NsrlError: the model has no such head, or does something behind it.
    """
    known = isinstance(model, nn.Module) and hasattr(model, "get_output_embeddings") and hasattr(model, "base_model")
    if not known or model.get_output_embeddings() is None:
        raise NsrlError("an editor needs a causal language model of transformers, with its head (AutoModelForCausalLM)")
    with torch.no_grad():
        ours, theirs = (
            logits_of(model, hidden_states(model, input_ids=ids, use_cache=False)),
            model(input_ids=ids).logits,
        )
    # The same products in the same format; only their order may differ.
    size = float(theirs.float().abs().max())
    if not float((ours.float() - theirs.float()).abs().max()) <= 64 * torch.finfo(theirs.dtype).eps * size:
        raise NsrlError("the model does something to its logits behind its head, which an editor cannot follow")
