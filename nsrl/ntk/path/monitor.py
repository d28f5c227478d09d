"""A tangent kernel watched while a model trains: its spectrum, drift and kappa, on TensorBoard too."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np
from torch import Tensor, nn

from nsrl.errors import NsrlError
from nsrl.ntk.path.recorder import unrecorded
from nsrl.projection.jacobians.fallback import Forward
from nsrl.projection.jacobians.linearise import jacobian
from nsrl.projection.solvers.spectrum import spectrum

if TYPE_CHECKING:
    from torch.utils.tensorboard import SummaryWriter


@dataclass(frozen=True)
class KernelState:
    """The kernel K = J J^T / N of a model at one moment.

    Attributes:
        spectrum: eigenvalues, descending, (k,).
        rank: number of those above round-off.
        effective_dimension: sum s / (s + damping).
        drift: |K_t - K_0| / |K_0|, against the first measurement.
        kappa: |f - y| |Hess f| / |J|^2; None without targets.
    """

    spectrum: Tensor
    rank: int
    effective_dimension: float
    drift: float
    kappa: float | None

    def scalars(self) -> dict[str, float]:
        """Tags and values."""
        values = {
            "ntk/rank": float(self.rank),
            "ntk/effective_dim": self.effective_dimension,
            "ntk/lambda_max": float(self.spectrum[0]),
            "ntk/drift": self.drift,
        }
        return values if self.kappa is None else {**values, "ntk/kappa": self.kappa}


class KernelMonitor:
    """Measures a model's tangent kernel on fixed inputs, as often as asked.

        monitor = KernelMonitor(model, inputs, targets=y)
        for step in range(steps):
            ...
            if step % 100 == 0:
                monitor.write(writer, step)

    Args:
        module: in eval mode or without dropout and batch normalisation.
        inputs: N samples.
        targets: y, (N, O), for kappa, which takes some hundred passes; None leaves it out.
        damping: of the effective dimension, as a share of the first kernel's largest eigenvalue.
        forward: function (module, inputs) -> outputs (N, O); default `module(inputs)`.
        parameters: names of the parameters; default all trainable ones.

    Raises:
        NsrlError: a damping that is not positive.
    """

    def __init__(
        self,
        module: nn.Module,
        inputs: Any,
        *,
        targets: Tensor | None = None,
        damping: float = 1e-3,
        forward: Forward | None = None,
        parameters: tuple[str, ...] | None = None,
    ):
        if not damping > 0.0:
            raise NsrlError(f"damping must be a positive share of the largest eigenvalue, not {damping}")
        self.module = module
        self.inputs = inputs
        self.targets = targets
        self.damping = damping
        self._forward = forward
        self._parameters = parameters
        self._first: Tensor | None = None
        self._scale = 0.0

    def measure(self) -> KernelState:
        """The kernel now; the first call is what drift is measured against."""
        with unrecorded():
            factors = jacobian(self.module, self.inputs, forward=self._forward, parameters=self._parameters)
        kernel = factors.gram() / factors.outputs.shape[0]
        parts = spectrum(kernel, factors.outputs.dtype)
        if self._first is None:
            self._first, self._scale = kernel, float(parts.values[0])
        drift = float((kernel - self._first).norm() / self._first.norm().clamp_min(1e-300))
        kappa = None
        if self.targets is not None:
            from nsrl.ntk.lazy import kappa as measure_kappa

            with unrecorded():
                kappa = measure_kappa(
                    self.module, self.inputs, self.targets, forward=self._forward, parameters=self._parameters, starts=1
                ).kappa
        dimension = parts.effective_dimension(self.damping * self._scale)
        return KernelState(parts.values, parts.rank, dimension, drift, kappa)

    def write(self, writer: SummaryWriter, step: int) -> KernelState:
        """Measure, and write scalars and the picture of the spectrum to TensorBoard."""
        state = self.measure()
        for tag, value in state.scalars().items():
            writer.add_scalar(tag, value, step)
        writer.add_image("ntk/spectrum", spectrum_image(state.spectrum), step, dataformats="HWC")
        return state


def spectrum_image(values: Tensor) -> np.ndarray:
    """Eigenvalues on a logarithmic axis against their index, as an RGB picture (height, width, 3), uint8."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    figure = Figure(figsize=(4.0, 3.0), dpi=100, layout="constrained")
    canvas = FigureCanvasAgg(figure)
    axis = figure.subplots()
    shown = values[values > 1e-14 * values[0]].cpu().numpy() if float(values[0]) > 0 else values.cpu().numpy()
    axis.semilogy(np.arange(1, len(shown) + 1), shown, ".-")
    axis.set_xlabel("index")
    axis.set_ylabel("eigenvalue of the kernel")
    axis.grid(alpha=0.25)
    canvas.draw()
    return np.asarray(canvas.buffer_rgba())[..., :3].copy()
