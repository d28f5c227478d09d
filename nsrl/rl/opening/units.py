"""Free units: what the old task can do without becomes a fresh network, which the new task has to itself."""

from __future__ import annotations

from collections.abc import Callable

import torch
from stable_baselines3.common.policies import ActorCriticPolicy
from torch import Tensor

from nsrl.rl.opening.block import OFF, FreeBlock
from nsrl.rl.opening.condensing import ActorLayers, condense
from nsrl.rl.opening.noise import HiddenNoise
from nsrl.rl.opening.switch import Switch
from nsrl.rl.policies.actor_critic import Observation

#: Shares of a layer's units that the old task keeps, from the fewest on: the first that costs little enough is taken.
KEPT = (0.25, 0.375, 0.5, 0.625, 0.75)
#: Another, where a copy of the old task's units has to fit beside them.
COPIED = 0.45
#: Spread of the switch over the new task's states, in pre-activations, at most.
MOST_FLICKER = 0.5
#: What a policy is opened to whose old behaviour pays in the new task: it is to be varied there, not given up.
OPEN_WHERE_IT_PAYS = 0.3
#: Gains of fresh layers, as SB3 initialises, and of the head on them.
GAIN, HEAD_GAIN = 2.0**0.5, 1.0


@torch.no_grad()
def free_units(
    policy: ActorCriticPolicy,
    old: Observation,
    new: Observation,
    divergence: Callable[[], float],
    cost: float,
    seed: int,
    go_on: bool = False,
    used: Observation | None = None,
) -> FreeBlock | None:
    """Give the new task a fresh network inside the actor, if an input tells it from the old one.

    The old task is first condensed on a part of the units (`condense`). The others are drawn anew, and gated by the
    input that never moved on the buffer: off on the old task, where what they say is a constant that the layer above
    allows for, and on in the new one. So the weights into them are in the null space as long as the gate holds (they
    are off by a margin of `OFF`), and those out of them are but for one direction an output, which the bias makes up
    for. The old units are turned off on the new task in the same way, and the policy begins there as a freshly
    initialised one does; or, with `go_on`, as the old one: some of the free units are then a copy of those that are
    kept, which the new task may change as it likes. Where they are too few for a copy it hears the old ones instead.

    Args:
        policy: whose actor is an MLP on features that are not learnt; any other keeps its weights.
        old: inputs of the buffer, (N, ...).
        new: inputs of the new task, (M, ...).
        divergence: measures the KL that counts against the budget, nats a state.
        cost: KL at most that the old task may pay for it.
        seed: of the fresh units.
        used: inputs on which the units that are kept have to do what all did; None for the buffer's alone.
        go_on: whether the new task begins with what the old one does.

    Returns:
        The units that were freed; None where nothing was changed, since it would cost more than that.
    """
    layers = ActorLayers.of(policy)
    if layers is None or not layers.activations:
        return None
    before, after = (layers.features(policy, inputs) for inputs in (old, new))
    kept_on = before if used is None else layers.features(policy, used)
    switch = Switch.between(before, after)
    if switch is None:
        return None
    originals, noise = layers.read(), HiddenNoise.of(policy)
    if noise is not None:
        wanted, log_std = noise.variances(layers.hidden(before)), noise.log_std.detach().clone()
    for share in sorted((*KEPT, COPIED) if go_on else KEPT):
        kept = condense(layers, kept_on, share)
        free = [others(rows, layer.out_features) for rows, layer in zip(kept, layers.linears[:-1], strict=True)]
        # one unit of each layer is the switch itself
        if min(map(len, free)) >= 2:
            modes = [(True, True), (False, False)] if go_on else [(False, True)]
            for copied, silence in modes:
                if copied and not all(len(old) < len(new) for old, new in zip(kept, free, strict=True)):
                    continue
                condensed = layers.read()
                fresh = FreshNetwork(layers, kept, free, switch, seed, silent=noise is not None, copied=copied)
                if fresh.plant(before, after, silence):
                    if noise is not None:
                        spread = OPEN_WHERE_IT_PAYS if go_on else 1.0
                        hidden = layers.hidden(before), layers.hidden(after)
                        noise.divide(wanted, *hidden, kept[-1], free[-1], spread)
                    if divergence() <= cost:
                        return FreeBlock(layers, free, switch, heard=not silence, silent=fresh.silent)
                layers.write(condensed)
        layers.write(originals)
        if noise is not None:
            noise.write(log_std)
    return None


class FreshNetwork:
    """The units of an actor that are drawn anew; the first of each layer is the switch, for the layer above.

    Args:
        layers: of the actor, condensed.
        kept, free: indices of the units that the old task keeps and of the others, by hidden layer.
        switch: between the tasks.
        seed: of the weights.
        silent: the last layer's units say 0 on the old task, where their activation can: all of them behind another
            hidden layer, whose units are off, else the switch alone.
        copied: the first free units behind the switch are copies of the kept ones, of which each layer has more.
    """

    def __init__(
        self,
        layers: ActorLayers,
        kept: list[Tensor],
        free: list[Tensor],
        switch: Switch,
        seed: int,
        *,
        silent: bool = False,
        copied: bool = False,
    ):
        self._layers = layers
        self._silent = silent
        #: as they are before the old task's units are turned off on the new one
        self._originals = layers.read() if copied else None
        self._kept = kept
        self._free = free
        self._switch = switch
        self._generator = torch.Generator().manual_seed(seed)

    @property
    def silent(self) -> bool:
        """Whether all units of the last layer rest at a pre-activation of 0 on the old task."""
        return len(self._free) > 1 and self._is_silent(len(self._free) - 1)

    def plant(self, before: Tensor, after: Tensor, silence: bool) -> bool:
        """Write the units' weights; False where the new task's states flicker too much for the switch.

        Args:
            before, after: features of old states, (N, F), and of new ones, (M, F), float64.
            silence: turn the old units off on the new task.
        """
        gates = self._first(before, after)
        if silence:
            gates = torch.cat([gates, self._silence(before, after)])
        if float(gates.abs().max()) * self._switch.flicker > MOST_FLICKER:
            return False
        for number in range(1, len(self._free)):
            self._inner(number)
        self._pair()
        self._head(before, after, silence)
        return True

    def _pair(self) -> None:
        """Make twins of the last layer's units, which the head cancels."""
        layer = self._layers.linears[-2]
        units, twins, _ = self._twins()
        layer.weight[twins], layer.bias[twins] = layer.weight[units], layer.bias[units]

    def _copies(self, number: int) -> int:
        """How many of a layer's free units are copies; they come behind the switch."""
        return 0 if self._originals is None else len(self._kept[number])

    def _twins(self) -> tuple[Tensor, Tensor, Tensor]:
        """The last layer's units in two halves, and what is left over, without the switch and the copies."""
        rest = self._free[-1][1 + self._copies(-1) :]
        half = len(rest) // 2
        units, twins, odd = rest.split([half, half, len(rest) - 2 * half])
        return units, twins, odd

    def _first(self, before: Tensor, after: Tensor) -> Tensor:
        """The first layer's units, on inputs in units of their spread; returns how far the switch moves each."""
        layer, units, switch = self._layers.linears[0], self._free[0], self._switch
        plain = torch.ones(layer.in_features, dtype=torch.bool, device=before.device)
        plain[switch.columns] = False
        inputs = torch.cat([before, after])[:, plain]
        centre, spread = inputs.mean(0), inputs.std(0)
        # an input that never moves tells nothing, and what it would do if it did is not to be amplified
        spread = torch.where(spread > 1e-6 * (1.0 + centre.abs()), spread, torch.ones_like(spread))
        weight = self._drawn(len(units), len(centre), GAIN).to(before) / spread
        weight[0] = 0.0
        bias = -(weight @ centre)
        if self._originals is not None:
            rows, copies = self._kept[0], slice(1, 1 + len(self._kept[0]))
            original, constant = (value[rows].double() for value in self._originals[0])
            weight[copies] = original[:, plain]
            bias[copies] = constant + original[:, switch.columns] @ switch.origin
        # what the units say of the old task's inputs
        gate = (before[:, plain] @ weight.T + bias).amax(0).clamp_min(0.0) + OFF
        bias[0], gate[0] = OFF, OFF - self._rest(0)
        full = torch.zeros(len(units), layer.in_features, dtype=torch.float64, device=before.device)
        full[:, plain] = weight
        full[:, switch.columns] = gate[:, None] * switch.weights
        if self._originals is not None:  # a copy makes of the switch's inputs what its original does
            full[copies, switch.columns] += original[:, switch.columns]
            bias[copies] = constant
        layer.weight[units] = full.to(layer.weight)
        layer.bias[units] = (bias - gate * (1.0 + switch.offset)).to(layer.bias)
        return gate

    def _rest(self, number: int) -> float:
        """Pre-activation of a layer's switch on the old task."""
        return 0.0 if self._is_silent(number) else -OFF

    def _is_silent(self, number: int) -> bool:
        """Whether a layer's units are to say 0 on the old task, at a pre-activation of 0, which says more elsewhere."""
        if not self._silent or number != len(self._free) - 1:
            return False
        activation = self._layers.activations[number]
        off, zero = (abs(float(activation(torch.tensor(x, dtype=torch.float64)))) for x in (-OFF, 0.0))
        return zero < off

    def _silence(self, before: Tensor, after: Tensor) -> Tensor:
        """Let the switch turn the old task's first units off; returns how far it moves each."""
        layer, units, switch = self._layers.linears[0], self._kept[0], self._switch
        weight, bias = layer.weight[units].double(), layer.bias[units].double()
        said = weight[:, switch.columns] @ switch.origin
        alike = after.clone()
        alike[:, switch.columns] = switch.origin
        gate = -((torch.cat([before, alike]) @ weight.T + bias).amax(0).clamp_min(0.0) + OFF)
        layer.bias[units] = (bias + said - gate * switch.offset).to(layer.bias)
        layer.weight[units[:, None], switch.columns] = (gate[:, None] * switch.weights).to(layer.weight)
        return gate

    def _inner(self, number: int) -> None:
        """The units of a layer that reads the fresh ones of the layer below."""
        layer, units, below = self._layers.linears[number], self._free[number], self._free[number - 1]
        activation = self._layers.activations[number - 1]
        off, on = (float(activation(torch.tensor(x, dtype=torch.float64))) for x in (-OFF, OFF))
        weight = self._drawn(len(units), len(below), GAIN).to(layer.weight.device)
        weight[0] = weight[:, 0] = 0.0
        constant = torch.zeros(len(units), dtype=torch.float64, device=weight.device)
        if self._originals is not None:
            rows, copies = self._kept[number], slice(1, 1 + len(self._kept[number]))
            original, bias = self._originals[number]
            weight[copies] = 0.0
            weight[copies, 1 : 1 + len(self._kept[number - 1])] = original[rows][:, self._kept[number - 1]].double()
            constant[copies] = bias[rows].double()
        # on the new task switch and bias cancel; on the old one they outweigh what the constants below add up to
        idle = weight.sum(1) * off + constant
        if self._is_silent(number):
            weight[:, 0] = idle / (on - off)
        else:
            weight[:, 0] = (OFF + idle.clamp_min(0.0)) / (on - off)
        bias = constant - weight[:, 0] * on
        weight[0, 0] = (OFF - self._rest(number)) / (on - off)
        bias[0] = OFF - weight[0, 0] * on
        layer.weight[units] = 0.0
        layer.weight[units[:, None], below] = weight.to(layer.weight)
        layer.bias[units] = bias.to(layer.bias)

    def _head(self, before: Tensor, after: Tensor, silence: bool) -> None:
        """The head: random on the fresh units, the opposite on their twins, and their old outputs in the bias.

        So nothing is preferred to begin with, whatever the size of the weights, and the layers below learn from the
        first step on: with a small head as SB3 draws it their gradients are small, and a natural gradient's damping
        holds them (Zhang et al. 2020, "A type of generalization error induced by initialization": antisymmetric).
        """
        layer, units = self._layers.linears[-1], self._free[-1]
        weight = torch.zeros_like(layer.weight[:, units], dtype=torch.float64)
        half, first = len(self._twins()[0]), 1 + self._copies(-1)
        weight[:, first : first + half] = self._drawn(layer.out_features, half, HEAD_GAIN).to(before)
        weight[:, first + half : first + 2 * half] = -weight[:, first : first + half]
        goal = torch.zeros(layer.out_features, dtype=torch.float64, device=before.device)
        if self._originals is not None:
            original, bias = self._originals[-1]
            weight[:, 1:first], goal = original[:, self._kept[-1]].double(), bias.double()
        idle, awake = (self._layers.hidden(features)[:, units].mean(0) for features in (before, after))
        if silence:
            # what the silenced units and the bias still say, a constant, is cancelled by the switch
            said = self._layers.outputs(after).mean(0)
            weight[:, 0] = (weight @ idle - said + goal) / (awake[0] - idle[0])
        layer.weight[:, units] = weight.to(layer.weight)
        layer.bias.sub_((weight @ idle).to(layer.bias))

    def _drawn(self, rows: int, columns: int, gain: float) -> Tensor:
        """A random matrix with orthonormal columns or rows, whichever are fewer, times a gain."""
        shape = (max(rows, columns), min(rows, columns))
        drawn = torch.randn(shape, generator=self._generator, dtype=torch.float64)
        basis, factor = torch.linalg.qr(drawn)
        basis = basis * factor.diagonal().sign()  # uniform over all such matrices
        return gain * (basis if rows >= columns else basis.T)


def others(rows: Tensor, size: int) -> Tensor:
    """Indices below `size` that are not among the rows, (R,): shape (size - R,)."""
    mask = torch.ones(size, dtype=torch.bool, device=rows.device)
    mask[rows] = False
    return mask.nonzero().flatten()
