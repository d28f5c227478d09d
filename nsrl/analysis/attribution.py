"""Forgetting attribution: which new-task transitions moved the policy at a retained state."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import torch
from stable_baselines3.common.callbacks import BaseCallback
from torch import Tensor

from nsrl.analysis.transitions import BatchWatch, forward
from nsrl.errors import NsrlError
from nsrl.ntk.path.recorder import PathRecorder
from nsrl.ntk.path.result import PathResult
from nsrl.ntk.path.weightings import tracin
from nsrl.rl.policies.observations import map_arrays
from nsrl.rl.retention.buffer import RetentionBuffer
from nsrl.rl.retention.constraint import RetentionConstraint


@dataclass(frozen=True)
class Forgetting:
    """One policy update, seen from N retained states.

    Attributes:
        timesteps: of the model at the update.
        kl: change of KL(pi_ref || pi) at each retained state, measured, (N,), nats.
        contributions: how much of it each transition of the rollout brought about, (N, T). Transition number
            env * n_steps + step, the order of SB3's flattened buffer: `env, step = divmod(number, n_steps)`. They share
            the KL out, which grows with the square of the movement: one transition less lowers it by about twice its
            share. The outputs move by the whole share, `path.contributions`.
        rest: kl - contributions.sum(1): momentum's memory, the optimizer's other losses, log_std's own movement, and
            what the retention constraint did (Lagrangian, projection, restoration), (N,).
        path: the outputs' own path over the update.
    """

    timesteps: int
    kl: Tensor
    contributions: Tensor
    rest: Tensor
    path: PathResult

    def top(self, state: int, count: int = 10) -> list[tuple[int, float]]:
        """The transitions that moved a retained state the most: (index, nats), largest forgetting first."""
        values, indices = self.contributions[state].topk(min(count, self.contributions.shape[1]))
        return list(zip(indices.tolist(), values.tolist(), strict=True))


class ForgettingAttribution(BaseCallback):
    """Records the path of every update on some retained states, and hands each one's attribution on.

        watch = ForgettingAttribution(buffer, states=16)
        model.learn(50_000, callback=watch)
        watch.updates[-1].top(state=3)

    Training is bit for bit the same with it where SB3 makes the updates (`fused="off"`): what watches the optimizer has
    `fused="auto"` leave them to SB3, and the run without it then differs by rounding. It costs, a minibatch, some
    Jacobians of the retained states.

    Args:
        buffer: the retention buffer.
        states: how many of its states, evenly spaced; or their indices.
        rule: quadrature along a step (see `nsrl.ntk.path.RULES`); "midpoint" is within 1e-4 for tanh policies.
        memory: minibatches that momentum's share is traced back over; 1 leaves the earlier ones in the rest.
        keep: updates kept, the latest ones.

    Attributes:
        updates: one `Forgetting` an update.
    """

    def __init__(
        self,
        buffer: RetentionBuffer,
        states: int | list[int] = 16,
        *,
        rule: str = "midpoint",
        memory: int = 1,
        keep: int = 100,
    ):
        super().__init__()
        self.indices = spaced(states, len(buffer)) if isinstance(states, int) else list(states)
        if keep < 1 or any(not 0 <= index < len(buffer) for index in self.indices):
            raise NsrlError(f"states must be indices below {len(buffer)}, and keep at least 1")
        self.buffer = select_states(buffer, self.indices)
        self.rule = rule
        self.memory = memory
        self.keep = keep
        self.updates: list[Forgetting] = []
        self._recorder: PathRecorder | None = None
        self._open = False

    def _on_training_start(self) -> None:
        policy: Any = self.model.policy
        constraint = RetentionConstraint(policy, self.buffer)
        names = tuple(name for name in constraint.names if name != "log_std")
        rollout = self.model.rollout_buffer  # type: ignore[attr-defined]
        self._constraint = constraint
        self._recorder = PathRecorder(
            policy,
            policy.optimizer,
            constraint.inputs,
            rule=self.rule,
            forward=forward,
            parameters=names,
            samples=rollout.buffer_size * rollout.n_envs,
            weightings={"kl": tracin},
            memory=self.memory,
            query_slope=lambda outputs: constraint.metric.slope(constraint.reference, outputs),
        )
        self._watch = BatchWatch(self.model, self._recorder.add_batch)  # type: ignore[arg-type]

    def _on_rollout_end(self) -> None:
        assert self._recorder is not None
        self._recorder.restart()
        self._before = self._constraint.state_divergences()
        self._open = True

    def _on_rollout_start(self) -> None:
        self._close()

    def _on_step(self) -> bool:
        return True

    def _on_training_end(self) -> None:
        self._close()
        if self._recorder is not None:
            self._recorder.detach()
            self._watch.detach()

    def _close(self) -> None:
        """The update is over, and what was restored behind it is restored."""
        if not self._open or self._recorder is None:
            return
        self._open = False
        path = self._recorder.result()
        change = self._constraint.state_divergences() - self._before
        if "kl" in path.totals:
            contributions = -path.totals["kl"]
        else:  # no step was made, or an optimizer whose steps have no owners
            contributions = torch.zeros(len(change), self._recorder.samples or 0)
        rest = change - contributions.double().sum(1)
        self.updates.append(Forgetting(self.num_timesteps, change, contributions, rest, path))
        del self.updates[: -self.keep]


def spaced(states: int, count: int) -> list[int]:
    """At most so many indices below `count`, evenly spaced.

    Raises:
        NsrlError: fewer than one.
    """
    if states < 1:
        raise NsrlError(f"states must be at least 1, not {states}")
    return np.linspace(0, count - 1, min(states, count)).round().astype(int).tolist()


def select_states(buffer: RetentionBuffer, indices: list[int]) -> RetentionBuffer:
    """A buffer of some of a buffer's states, all of them for training and of equal weight."""
    chosen = np.asarray(indices)
    return replace(
        buffer,
        observations=map_arrays(lambda array: array[chosen], buffer.observations),
        outputs=buffer.outputs[chosen],
        heldout=np.zeros(len(chosen), dtype=bool),
        weights=np.ones(len(chosen), dtype=np.float32),
        source=buffer.source[chosen],
    )
