"""The retained behaviour's tangent kernel on TensorBoard, while an SB3 algorithm learns."""

from __future__ import annotations

from typing import Any

from stable_baselines3.common.callbacks import BaseCallback
from stable_baselines3.common.logger import Image

from nsrl.analysis.attribution import select_states, spaced
from nsrl.analysis.transitions import forward
from nsrl.errors import NsrlError
from nsrl.ntk.path.monitor import KernelMonitor, KernelState, spectrum_image
from nsrl.rl.retention.buffer import RetentionBuffer
from nsrl.rl.retention.constraint import RetentionConstraint
from nsrl.rl.training.tensorboard import write_points

TEXT = ("stdout", "log", "json", "csv")


class KernelCallback(BaseCallback):
    """Logs `ntk/rank`, `ntk/effective_dim`, `ntk/lambda_max`, `ntk/drift`, `ntk/kappa` and the picture `ntk/spectrum`.

    Each stands at the timesteps of its measurement: before every rollout, which is where the constraint is linearised
    anew, and after the last update. The kernel is that of the policy's outputs on some retained states. kappa is
    against the reference outputs: far below 1, the policy is within reach of its linearisation from where it has moved
    to; it is 0 at first.

    Args:
        buffer: the retention buffer.
        states: how many of its states, evenly spaced.
        every: rollouts between measurements.
        kappa: measure it (some hundred passes).
        damping: as in `KernelMonitor`.

    Attributes:
        history: (timesteps, `KernelState`) of every measurement.
    """

    def __init__(
        self, buffer: RetentionBuffer, *, states: int = 64, every: int = 1, kappa: bool = True, damping: float = 1e-3
    ):
        super().__init__()
        if every < 1:
            raise NsrlError(f"every must be at least 1 rollout, not {every}")
        self.buffer = select_states(buffer, spaced(states, len(buffer)))
        self.every = every
        self.kappa = kappa
        self.damping = damping
        self.history: list[tuple[int, KernelState]] = []
        self._rollouts = 0

    def _on_training_start(self) -> None:
        policy: Any = self.model.policy
        constraint = RetentionConstraint(policy, self.buffer)
        targets = constraint.reference if self.kappa else None
        names = tuple(name for name in constraint.names if name != "log_std")
        self._monitor = KernelMonitor(
            policy, constraint.inputs, targets=targets, damping=self.damping, forward=forward, parameters=names
        )

    def _on_rollout_start(self) -> None:
        if self._rollouts % self.every == 0:
            self._measure()
        self._rollouts += 1

    def _on_step(self) -> bool:
        return True

    def _on_training_end(self) -> None:
        self._measure()

    def _measure(self) -> None:
        state = self._monitor.measure()
        self.history.append((self.num_timesteps, state))
        for tag, value in state.scalars().items():
            self.logger.record(tag, value)
        self.logger.record("ntk/spectrum", Image(spectrum_image(state.spectrum), "HWC"), exclude=TEXT)
        write_points(self.logger, self.num_timesteps)
