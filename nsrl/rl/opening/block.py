"""The block: units of an actor that are the new task's alone, and what may move so that the old one never notices."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, cast

import torch
import torch.nn.functional as F
from stable_baselines3.common.policies import ActorCriticPolicy
from torch import Tensor, nn

from nsrl.reading.limits import Unreadable
from nsrl.reading.values import finite, items, mapping, numbers, whole
from nsrl.rl.opening.condensing import ActorLayers
from nsrl.rl.opening.noise import SILENT, HiddenNoise
from nsrl.rl.opening.switch import Switch
from nsrl.rl.policies.actor_critic import Observation

#: Pre-activation at which a unit counts as off: tanh is within 2.3e-7 of -1 there.
OFF = 8.0


@dataclass(frozen=True)
class FreeBlock:
    """What the new task has to itself in an actor.

    Two things keep it from the old task, both of them exact. What the old task is computed with does not move: the
    units that it keeps, what they feed, the head's bias. And the switch, which is 0 on the old task and 1 on the new
    one, lets every fresh unit be pushed off on the old task, and the head's constant there be put back, without any
    change on the new one (`settle`). So a step of whatever length is projected onto the null space itself, not onto its
    linearisation.

    Attributes:
        layers: of the actor.
        free: indices of the fresh units, by hidden layer; the first of each is the switch for the layer above.
        switch: between the tasks.
        heard: whether the new task hears the old units, so that fresh ones may read them.
        silent: whether the last layer's units rest at a pre-activation of 0 on the old task, where they say nothing,
            instead of being off: what gSDE makes of them is the new task's alone then.
    """

    layers: ActorLayers
    free: Sequence[Tensor]
    switch: Switch
    heard: bool = False
    silent: bool = False

    def written(self) -> dict[str, Any]:
        """In lists and numbers, for checkpoints and zips."""
        return {
            "free": [units.tolist() for units in self.free],
            "columns": self.switch.columns.tolist(),
            "weights": self.switch.weights.tolist(),
            "flicker": self.switch.flicker,
            "heard": self.heard,
            "silent": self.silent,
        }

    @classmethod
    def read(cls, state: Any, policy: ActorCriticPolicy, old: Observation) -> FreeBlock:
        """Inverse of `written`, for a policy of the same architecture.

        Args:
            state: what it gave.
            policy: whose actor it is.
            old: inputs of the buffer, (N, ...).

        Raises:
            Unreadable: it cannot have given that for this policy and buffer.
        """
        mapping(state, "the free block", ("free", "columns", "weights", "flicker", "heard", "silent"), ())
        layers = ActorLayers.of(policy)
        if layers is None or not layers.activations:
            raise Unreadable("it has a free block, which this policy cannot have")
        device = layers.linears[0].weight.device
        free = [
            torch.tensor(_indices(units, layer.out_features, 2), device=device)
            for units, layer in zip(items(state["free"], "free", len(layers.activations)), layers.linears, strict=False)
        ]
        columns = torch.tensor(_indices(state["columns"], layers.linears[0].in_features, 1), device=device)
        weights = torch.as_tensor(numbers(state["weights"], "weights", (len(columns),)), device=device)
        if not type(state["heard"]) is type(state["silent"]) is bool:
            raise Unreadable("what its free block hears and says is damaged")
        origin = layers.features(policy, old)[:, columns]
        if not bool((origin == origin[:1]).all()):
            raise Unreadable("the inputs that told its tasks apart move on this buffer")
        flicker = finite(state["flicker"], "flicker", 0.0)
        return cls(layers, free, Switch(columns, weights, origin[0], flicker), state["heard"], state["silent"])

    @property
    def units(self) -> int:
        """How many they are."""
        return sum(map(len, self.free))

    def masks(self, policy: ActorCriticPolicy, old: Observation) -> list[tuple[nn.Parameter, Tensor]]:
        """The actor's parameters and where each may move, 1 or 0, of their shapes.

        Args:
            policy: whose actor it is.
            old: inputs of the buffer, (N, ...).
        """
        masks: list[tuple[nn.Parameter, Tensor]] = []
        for number, layer in enumerate(self.layers.linears):
            weight, bias = torch.zeros_like(layer.weight), torch.zeros_like(layer.bias)
            if number < len(self.free):
                rows = self.free[number][1:]
                bias[rows] = 1.0
                weight[rows] = 1.0
            else:
                weight[:] = 1.0
            if number > 0 and not (self.heard and number < len(self.free)):
                deaf = torch.ones(layer.in_features, dtype=torch.bool, device=weight.device)
                deaf[self.free[number - 1]] = False
                weight[:, deaf] = 0.0
            masks += [(cast(nn.Parameter, layer.weight), weight), (layer.bias, bias)]
        noise = HiddenNoise.of(policy)
        if noise is not None:
            # what a unit says on the old task is noise there
            silent = self.layers.hidden(self.layers.features(policy, old)).abs().amax(0) < SILENT
            masks.append((noise.log_std, silent.to(noise.log_std).unsqueeze(1).expand_as(noise.log_std)))
        return masks

    @torch.no_grad()
    def constant(self, policy: ActorCriticPolicy, old: Observation) -> Tensor:
        """What the fresh units make of the head's outputs on the old task, bias included, (O,) float64."""
        return self._said(self._idle(self.layers.features(policy, old)))

    @torch.no_grad()
    def settle(self, policy: ActorCriticPolicy, old: Observation, constant: Tensor) -> None:
        """Push the fresh units off on the old task, and give the head its constant back; the new task sees no change.

        Args:
            policy: whose actor it is, its kept part as it was.
            old: inputs of the buffer, (N, ...).
            constant: as it was (`constant`).
        """
        idle = self._idle(self.layers.features(policy, old), push=True)
        head, switch = self.layers.linears[-1], self.free[-1][0]
        off, on = self._levels(len(self.free) - 1, float(idle[0]))
        # on the new task what the bias gains the switch takes back
        share = (constant - self._said(idle)) / (off - on)
        head.weight[:, switch] += share.to(head.weight)
        head.bias.sub_((share * on).to(head.bias))

    def _idle(self, features: Tensor, push: bool = False) -> Tensor:
        """Means of the last layer's fresh units on the old task, (F,) float64, pushed off before with `push`.

        Units are evaluated in the policy's own precision, in which it acts.
        """
        values = whole = features.to(self.layers.linears[0].weight.dtype)
        for number, (layer, units) in enumerate(zip(self.layers.linears, self.free, strict=False)):
            activation = self.layers.activations[number]
            read, seen = layer.weight[units], whole
            if number > 0 and not self.heard:
                read, seen = read[:, self.free[number - 1]], values
            before = F.linear(seen, read, layer.bias[units])
            if push:
                short = self._short(number, before)
                self._push(number, short)
                before = before - short.to(before)
            values = activation(before)
            if self.heard and number + 1 < len(self.free):
                whole = activation(F.linear(whole, layer.weight, layer.bias))
                whole[:, units] = values
        return values.mean(0, dtype=torch.float64)

    def _short(self, number: int, before: Tensor) -> Tensor:
        """By how much pre-activations of a layer's fresh units on the old task, (N, F), are to be lower, (F,)."""
        if self.silent and number == len(self.free) - 1:
            short = before.mean(0, dtype=torch.float64)
        else:
            short = (before.amax(0).double() + OFF).clamp_min(0.0)
        short[0] = 0.0  # the switch itself does not move
        return short

    def _said(self, idle: Tensor) -> Tensor:
        """What the head makes of it, bias included, (O,)."""
        head = self.layers.linears[-1]
        return head.weight[:, self.free[-1]].double() @ idle + head.bias.double()

    def _push(self, number: int, short: Tensor) -> None:
        """Lower a layer's fresh units by so much on the old task, and not at all on the new one."""
        layer, units = self.layers.linears[number], self.free[number]
        if number == 0:
            layer.weight[units[:, None], self.switch.columns] += (short[:, None] * self.switch.weights).to(layer.weight)
            layer.bias[units] -= (short * (1.0 + self.switch.offset)).to(layer.bias)
            return
        off, on = self._levels(number - 1)
        layer.weight[units, self.free[number - 1][0]] += (short / (on - off)).to(layer.weight)
        layer.bias[units] -= (short * on / (on - off)).to(layer.bias)

    def _levels(self, number: int, off: float | None = None) -> tuple[float, float]:
        """What a layer's switch says on the old task and on the new one."""
        activation = self.layers.activations[number]
        low, high = (float(activation(torch.tensor(x, dtype=torch.float64))) for x in (-OFF, OFF))
        return (low if off is None else off), high


def _indices(value: Any, below: int, least: int) -> list[int]:
    """So many different indices at least, in ascending order."""
    found = [whole(entry, "an index of the free block", 0, below - 1) for entry in items(value, "the free block")]
    if len(found) < least or sorted(set(found)) != found:
        raise Unreadable("the indices of its free block are damaged")
    return found
