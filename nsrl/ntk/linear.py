"""The linearised model f_lin(x; w0 + d) = f(x; w0) + J(x; w0) d."""

from __future__ import annotations

import copy
from typing import Any

import torch
from torch import Tensor, nn

from nsrl.ntk.functions import ParameterFunction
from nsrl.projection.jacobians.fallback import Forward


class LinearizedModel(nn.Module):
    """First-order Taylor expansion of a model in its parameters, as a module to train, evaluate and differentiate.

    Attributes:
        displacement: d = w - w0, the only parameter, shape (P,) in the model's `named_parameters()` order (the columns
            of `nsrl.projection.jacobian`); zero at first, where the two models agree.
    """

    displacement: nn.Parameter

    def __init__(self, model: nn.Module, forward: Forward | None = None):
        super().__init__()
        names = tuple(name for name, parameter in model.named_parameters() if parameter.requires_grad)
        frozen = copy.deepcopy(model).requires_grad_(False)
        self._function = ParameterFunction(frozen, forward, names)
        self.displacement = nn.Parameter(torch.zeros_like(self._function.origin))

    def forward(self, inputs: Any) -> Tensor:
        """Outputs (N, O), affine in the displacement, by one Jacobian-vector product."""
        outputs, change = self._function.first_order(inputs, self.displacement)
        return outputs + change


def linearize(model: nn.Module, *, forward: Forward | None = None) -> LinearizedModel:
    """The model's first-order expansion at its present parameters, of which it keeps a copy.

    Args:
        model: in eval mode. Its layers must support forward-mode differentiation (flash attention does not).
        forward: function (model, inputs) -> outputs (N, O); default `model(inputs)`.

    Raises:
        JacobianError: batch normalisation or dropout in train mode.
        NsrlError: no trainable parameters.
    """
    return LinearizedModel(model, forward)
