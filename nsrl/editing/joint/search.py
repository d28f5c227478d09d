"""Values of all edits at once, in the metric of what they cost to be written.

Values found edit by edit are equations: the writing has to bring every hidden state to its value, in all directions,
and where edits are many it distorts the model for distances that no answer needs. Here the answers themselves are
wanted, with a margin, and among all displacements delta of the hidden states that give them the cheapest is looked for:

    minimise  sum_i missing_i(delta)  +  weight tr(delta^T Q^-1 delta),     Q = K A^-1 K^T for the keys K of the edits.

tr(delta^T Q^-1 delta) is tr(D A D^T) of the least D with D K = delta (the representer theorem, see
`closed_form.least_update`), so that what is cheap leaves the preserved text alone. An answer that is given with its
margin asks for nothing more, and one that would cost too much is given up in part: kernel classification, where MEMIT
and its successors do kernel regression.
"""

from __future__ import annotations

import torch
from torch import Tensor

from nsrl.editing.closed_form import factor
from nsrl.editing.joint.answers import Answers

#: Iterations of L-BFGS between two looks at how much they have gained, rounds at most, and the share of the objective
#: that a round has to gain for another one.
ITERATIONS, ROUNDS, GAIN = 6, 6, 0.01


def cheapest(answers: Answers, price: Tensor, weight: float, counted: Tensor, start: Tensor) -> Tensor:
    """Displacements of the hidden states that give the answers at the least price, shape (n, d), float64.

    Args:
        answers: of the edits.
        price: Q, positive semi-definite, shape (n, n), float64.
        weight: of the price, against `Answers.shortfall`.
        counted: which answers are wanted, shape (n,); an edit that a later one replaces is not.
        start: a guess, shape (n, d).

    Raises:
        NsrlError: as `Answers.shortfall`.
    """
    root = factor(price)
    # With delta = L b the price is |b|^2, and a step of gradient descent is one in the metric of the price.
    whitened = torch.linalg.solve_triangular(root, start, upper=False).requires_grad_(True)
    optimizer = torch.optim.LBFGS(
        [whitened], max_iter=ITERATIONS, max_eval=2 * ITERATIONS, history_size=10, line_search_fn="strong_wolfe"
    )

    seen: list[float] = []

    def objective() -> float:
        delta = root @ whitened.detach()
        missing, slope = answers.shortfall(delta)
        mask = counted.double()
        whitened.grad = root.T @ (slope * mask.unsqueeze(1)) + 2.0 * weight * whitened.detach()
        seen.append(float((missing * mask).sum() + weight * whitened.detach().square().sum()))
        return seen[-1]

    for _ in range(ROUNDS):
        tried = len(seen)
        optimizer.step(objective)
        if not min(seen[tried:]) < (1.0 - GAIN) * seen[tried]:
            break
    return root @ whitened.detach()
