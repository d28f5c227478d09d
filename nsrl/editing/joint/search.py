"""Values of all edits at once, in the metric of what they cost to be written.

Values found edit by edit are equations: the writing has to bring every hidden state to its value, in all directions,
and where edits are many it distorts the model for distances that no answer needs. Here the answers themselves are
wanted, with a margin, and among all displacements delta of the hidden states that give them the cheapest is looked for:

    minimise  sum_i missing_i(delta_i) + weight tr(delta^T Q^-1 delta),     Q = K A^-1 K^T for the keys K of the edits.

tr(delta^T Q^-1 delta) is tr(D A D^T) of the least D with D K = delta (the representer theorem, see
`closed_form.least_update`), so that what is cheap leaves the preserved text alone. An answer that is given with its
margin asks for nothing more, and one that would cost too much is given up in part: kernel classification, where MEMIT
and its successors do kernel regression.

Where edits come in a sequence, a block of them is moved while the others stay: what these cost is known, and of the
price is left that of the block's distance from where the others alone would bring it, which is the mean of a Gaussian
process of covariance Q given the others.
"""

from __future__ import annotations

import torch
from torch import Tensor

from nsrl.editing.closed_form import factor
from nsrl.editing.joint.answers import Answers

#: Iterations of L-BFGS between two looks at how much they have gained, rounds at most, and the share of the objective
#: that a round has to gain for another one.
ITERATIONS, ROUNDS, GAIN = 6, 6, 0.01


def cheapest(
    answers: Answers, price: Tensor, weight: float, counted: Tensor, start: Tensor, moved: Tensor | None = None
) -> Tensor:
    """Displacements of the hidden states that give the answers at the least price, shape (n, d), float64.

    Args:
        answers: of the edits that are moved, in the order of `moved`.
        price: Q, positive semi-definite, shape (n, n), float64.
        weight: of the price, against `Answers.shortfall`.
        counted: which answers are wanted, of those that are moved, shape (m,); an edit that a later one replaces is
            not.
        start: a guess, shape (n, d); edits that are not moved keep it.
        moved: which edits are moved, their numbers, shape (m,); None for all.

    Raises:
        NsrlError: as `Answers.shortfall`.
    """
    moved = torch.arange(len(start), device=start.device) if moved is None else moved
    mean, root = given_the_others(price, start, moved)
    # With delta = mean + L b the price is |b|^2, and a step of gradient descent is one in the metric of the price.
    whitened = torch.linalg.solve_triangular(root, start[moved] - mean, upper=False).requires_grad_(True)
    optimizer = torch.optim.LBFGS(
        [whitened], max_iter=ITERATIONS, max_eval=2 * ITERATIONS, history_size=10, line_search_fn="strong_wolfe"
    )

    seen: list[float] = []

    def objective() -> float:
        delta = mean + root @ whitened.detach()
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
    found = start.clone()
    found[moved] = mean + root @ whitened.detach()
    return found


def given_the_others(price: Tensor, delta: Tensor, moved: Tensor) -> tuple[Tensor, Tensor]:
    """Where the other edits alone would bring those that are moved, (m, d), and L of L L^T = their price then, (m, m).

    Args:
        price: Q, shape (n, n).
        delta: of all edits, shape (n, d).
        moved: numbers of those that are moved, shape (m,).

    Raises:
        NsrlError: the price is NaN or infinite.
    """
    rest = torch.ones(len(delta), dtype=torch.bool, device=delta.device)
    rest[moved] = False
    others = rest.nonzero().squeeze(1)
    order = torch.cat([others, moved])
    root = factor(price[order][:, order])
    count = len(others)
    known = torch.linalg.solve_triangular(root[:count, :count], delta[others], upper=False)
    return root[count:, :count] @ known, root[count:, count:]
