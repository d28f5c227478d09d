"""Quadrature along one step of training."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from nsrl.errors import NsrlError


@dataclass(frozen=True)
class Rule:
    """Nodes s in [0, 1] along a step and their weights, which sum to 1.

    Attributes:
        nodes: where the query's gradient is taken.
        weights: of the nodes.
        order: exponent of the learning rate in the error of a whole run of fixed length, on a smooth model.
    """

    nodes: tuple[float, ...]
    weights: tuple[float, ...]
    order: int


def _gauss(count: int) -> Rule:
    nodes, weights = np.polynomial.legendre.leggauss(count)
    return Rule(tuple((0.5 * (nodes + 1.0)).tolist()), tuple((0.5 * weights).tolist()), 2 * count)


#: "left" is the rule of TracIn and of the first-order identity; "midpoint" is the one for networks with kinks (ReLU),
#: where more nodes do not pay; three Gauss-Legendre nodes are exact to round-off on smooth networks.
RULES: dict[str, Rule] = {
    "left": Rule((0.0,), (1.0,), 1),
    "midpoint": _gauss(1),
    "gauss2": _gauss(2),
    "gauss3": _gauss(3),
}


def find_rule(rule: str | Rule) -> Rule:
    """A rule by name, or itself.

    Raises:
        NsrlError: unknown name.
    """
    if isinstance(rule, Rule):
        return rule
    if rule not in RULES:
        raise NsrlError(f"rule must be one of {', '.join(RULES)}, not {rule!r}")
    return RULES[rule]
