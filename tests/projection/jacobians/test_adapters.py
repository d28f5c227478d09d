"""The libraries that bring such layers: LoRA of peft, GPT-2 of transformers. Skipped where they are not installed."""

import pytest
import torch
from torch import nn

from nsrl.projection import jacobian
from nsrl.projection.jacobians.blocks import DenseBlock
from tests.projection.builders import jacrev_matrix, mlp, normal

EXACT = {"rtol": 1e-10, "atol": 1e-10}


def test_lora_of_peft():
    peft = pytest.importorskip("peft")
    torch.manual_seed(0)
    config = peft.LoraConfig(target_modules=["0", "2"], r=2, init_lora_weights=False)
    module = peft.get_peft_model(mlp(4, 6, 3).double(), config).double()
    inputs = normal(5, 4)
    result = jacobian(module, inputs)
    assert len(result.names) == len(result.blocks) == 4
    assert not any(isinstance(block, DenseBlock) for block in result.blocks)
    torch.testing.assert_close(result.dense(), jacrev_matrix(module, inputs), **EXACT)


def test_gpt2_of_transformers():
    """Conv1D layers, a head tied to the token embedding, position embeddings that see no sample."""
    transformers = pytest.importorskip("transformers")
    torch.manual_seed(0)
    config = transformers.GPT2Config(
        vocab_size=11, n_positions=5, n_embd=8, n_layer=1, n_head=2, attn_implementation="eager"
    )
    module = transformers.GPT2LMHeadModel(config).double().eval()
    tokens = torch.randint(0, 11, (3, 5), generator=torch.Generator().manual_seed(0))

    def forward(module: nn.Module, tokens: torch.Tensor) -> torch.Tensor:
        return module(tokens, use_cache=False).logits[:, -1, :4]

    result, expected = jacobian(module, tokens, forward=forward), jacrev_matrix(module, tokens, forward)
    torch.testing.assert_close(result.dense(), expected, **EXACT)
    torch.testing.assert_close(result.gram(), expected @ expected.T, **EXACT)
    # the norms' two each, and the positions, whose embedding is looked up without a sample axis
    assert sum(isinstance(block, DenseBlock) for block in result.blocks) <= 3 * 2 + 1
