"""What is summed up along the path: every attribution is a weighting of the same tangent kernel."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

from nsrl.errors import NsrlError


@dataclass(frozen=True)
class KernelNode:
    """The kernel between queries and the samples of a batch at one node of one step.

    Attributes:
        kernel: grad f(x; w_k + s D_k) . S grad f(x_m; w_k), weighted by the node, shape (N, O, B, O). S is what the
            optimizer multiplies this batch's gradient by: the learning rate, for Adam its realised diagonal.
        cotangents: dL/df of the batch, as the optimizer was given it, shape (B, O).
        slopes: derivative of the queries' own loss at the node, shape (N, O); None without `query_slope`.
    """

    kernel: Tensor
    cotangents: Tensor
    slopes: Tensor | None


#: A tensor (N, ..., B): one entry a query and a sample of the batch, summed over nodes and steps.
Weighting = Callable[[KernelNode], Tensor]


def contribution(node: KernelNode) -> Tensor:
    """How much each sample moved each output of each query, (N, O, B); sums to the prediction's change."""
    return -torch.einsum("nobp,bp->nob", node.kernel, node.cotangents)


def path_kernel(node: KernelNode) -> Tensor:
    """Domingos' path kernel, the integral of K dt, shape (N, O, O, B): query's output, sample's output, sample."""
    return node.kernel.permute(0, 1, 3, 2)


def tracin(node: KernelNode) -> Tensor:
    """How much each sample lowered each query's loss, (N, B).

    With rule="left" it is TracIn with every step as a checkpoint (Pruthi et al. 2020); with more nodes its sum is the
    fall of the loss itself, exactly.
    """
    return -torch.einsum("no,nob->nb", _slopes(node), contribution(node))


def loss_path_kernel(node: KernelNode) -> Tensor:
    """Integral of <grad l(z), grad l(z_m)> dt over the steps that used z_m, (N, B) (Chen et al. 2023).

    The batch's loss has to be a mean over its samples; for full-batch training it is the loss path kernel.
    """
    return node.cotangents.shape[0] * tracin(node)


def _slopes(node: KernelNode) -> Tensor:
    if node.slopes is None:
        raise NsrlError("this weighting needs the loss of the queries: pass query_slope to the recorder")
    return node.slopes
