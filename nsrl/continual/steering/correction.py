"""A small way back: the shortest step by which the KL of a few tasks comes inside a budget, to first order.

A restoration linearises every output of hundreds of inputs. What has strayed by no more than a step can be had for
less: the root of a task's KL is nearly linear over a step, so that one row a task, its gradient, tells the way back,
and the shortest step d with J d = -excess is J^T (J J^T)^+ times it: the null space of all else is left alone.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn

from nsrl.continual.retention import RetainedBehaviour

#: Singular values of the tasks' rows, next to the largest, below which two of them are taken for one.
PARALLEL = 1e-6


def shortest_correction(model: nn.Module, retained: RetainedBehaviour, tasks: Tensor, aim: float) -> Tensor:
    """The displacement of the trainable parameters, (P,), float64.

    Args:
        model: as it is; its gradients are left alone.
        retained: inputs and outputs of then.
        tasks: whose KL is to come down, (r,) int64; each of them finite and above the aim.
        aim: KL that each is to have, to first order, nats a sample.
    """
    parameters = [p for p in model.parameters() if p.requires_grad]
    rows, excess = [], []
    for task in tasks.tolist():
        indices = (retained.memory.owner == task).nonzero().squeeze(1)
        with torch.enable_grad():
            outputs = retained.outputs(model, indices)
            kl, slope = retained.gap(outputs.detach(), indices)
            root = float(kl.double().mean().clamp_min(aim)) ** 0.5
            found = torch.autograd.grad(outputs, parameters, slope / (2.0 * root * len(indices)), allow_unused=True)
        pairs = zip(parameters, found, strict=True)
        rows.append(torch.cat([(torch.zeros_like(p) if g is None else g).flatten() for p, g in pairs]))
        excess.append(root - aim**0.5)
    J = torch.stack(rows).double()
    gram = J @ J.T
    return -J.T @ (torch.linalg.pinv(gram, rtol=PARALLEL**2, hermitian=True) @ gram.new_tensor(excess))
