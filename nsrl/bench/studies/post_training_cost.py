"""What the projection of a guard costs beside a training step, at the size of SmolLM2-135M.

The model has that size and random weights: the time of a product does not depend on what is in it. Processor time on
one thread, so that other processes on the machine do not count.
"""

from __future__ import annotations

import time
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

from nsrl.editing.post_training.way import Way
from nsrl.projection.constraints.thin import ThinLayer, ThinProjection
from nsrl.projection.jacobians.columns import LayerColumns, parameter_columns
from nsrl.projection.optimizer import FlatParameters
from nsrl.runs.machine import describe_environment

#: Sequences of a step, tokens of each.
SEQUENCES, LENGTH = 4, 128
#: Protected directions, as shares of a layer's inputs.
RANKS = (1 / 32, 1 / 8, 1 / 2)
#: Steps from one projection to the next, the guard's default.
EVERY = 10


def smollm_like(layers: int) -> Any:
    """A Llama of SmolLM2-135M's sizes (30 layers), with random weights."""
    from transformers import LlamaConfig, LlamaForCausalLM

    config = LlamaConfig(
        vocab_size=49_152,
        hidden_size=576,
        intermediate_size=1536,
        num_hidden_layers=layers,
        num_attention_heads=9,
        num_key_value_heads=3,
        max_position_embeddings=2048,
        tie_word_embeddings=True,
    )
    return LlamaForCausalLM(config)


def projection_of(model: nn.Module, share: float) -> ThinProjection:
    """A protected subspace of a share of every linear layer's inputs, at random."""
    columns = parameter_columns(model)
    generator = torch.Generator().manual_seed(0)
    bases: dict[int, Tensor] = {}
    layers = []
    for name, layer in model.named_modules():
        where = columns.get(f"{name}.weight")
        if isinstance(layer, nn.Linear) and where is not None:
            width = layer.in_features
            if width not in bases:
                bases[width] = torch.linalg.qr(torch.randn(width, max(1, int(share * width)), generator=generator))[0]
            layers.append(ThinLayer(LayerColumns(name, layer.out_features, where, None), bases[width].clone(), True))
    return ThinProjection(layers, max(stop for _, stop in columns.values()))


def measure_cost(layers: int = 30, told: Callable[[str], None] = lambda text: None) -> dict[str, Any]:
    """Processor seconds of a training step and of a projection, and the bytes of the constraint.

    Args:
        layers: of the model.
        told: how far it is.
    """
    torch.manual_seed(0)
    model = smollm_like(layers)
    optimizer = torch.optim.AdamW(model.parameters(), 1e-5)
    ids = torch.randint(49_152, (SEQUENCES, LENGTH))
    steps = []
    for _ in range(2):  # the first one also makes the optimizer's moments
        start = time.process_time()
        optimizer.zero_grad()
        model(input_ids=ids, labels=ids, use_cache=False).loss.backward()
        optimizer.step()
        steps.append(time.process_time() - start)
        told(f"a training step: {steps[-1]:.1f} s")
    optimizer.zero_grad()
    named = dict(model.named_parameters())
    begin = FlatParameters(list(named.values())).read()
    rows = []
    for share in RANKS:
        thin = projection_of(model, share)
        way = Way(named, thin, begin)
        with torch.no_grad():
            for p in named.values():
                p.add_(1e-4)
        start = time.process_time()
        way.retract()
        seconds = time.process_time() - start
        told(f"a projection at rank {share:g} of the inputs: {seconds:.2f} s")
        rows.append(
            {
                "rank_share": share,
                "projection_seconds": seconds,
                "share_of_step": seconds / EVERY / steps[-1],
                "nbytes": thin.nbytes(),
                "dense_nbytes": thin.dense_nbytes(),
            }
        )
    return {
        "command": "nsrl bench post_training_cost",
        "parameters": sum(p.numel() for p in named.values()),
        "layers": layers,
        "tokens": SEQUENCES * LENGTH,
        "project_every": EVERY,
        "step_seconds": steps[-1],
        "projections": rows,
        "threads": torch.get_num_threads(),
        "machine": describe_environment(),
    }
