"""Training in closed form: how outputs move when a (linearised) model descends a squared loss.

One clock for everything: t = learning rate * steps. With u = f - y and dL/df = c u (c from `training.loss_rate`),

    gradient flow       du/dt   = -c K u                u(t) = exp(-c K t) u(0)
    gradient descent    u_(n+1) = (I - c lr K) u_n      u(t) = (I - c lr K)^(t / lr) u(0)

and a test output moves by -K(test, train) [K^-1 (u(0) - u(t))] (Lee et al. 2019, section 2.2).
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
from torch import Tensor

from nsrl.errors import NsrlError
from nsrl.ntk.training import Loss, loss_rate
from nsrl.projection.solvers.spectrum import spectrum

#: Largest relative residual of the Cholesky solve that is believed.
RESIDUAL = 1e-6


class OutputDynamics:
    """Outputs of a linearised model at any time, from one eigen-decomposition of its kernel.

    Args:
        kernel: K of the training inputs, (k, k) with k = N * O: `empirical_ntk(model, x)`.
        outputs: f at time 0 on the training inputs, (N, O).
        targets: y, (N, O).
        loss: "half_sum" 1/2 |f - y|^2, "half_mean" 1/(2k) |f - y|^2, or "mse" 1/k |f - y|^2 (`torch.nn.MSELoss()`).
        storage: dtype of the factors that the kernel was formed from, for its rank.

    Attributes:
        rates: at which the eigenmodes of the residual decay, c * eigenvalues, descending, (k,).
        modes: the eigenmodes, in columns, (k, k).
        rank: number of modes that move at all.

    Raises:
        NsrlError: shapes that do not belong together.
    """

    def __init__(
        self,
        kernel: Tensor,
        outputs: Tensor,
        targets: Tensor,
        *,
        loss: Loss = "half_sum",
        storage: torch.dtype = torch.float64,
    ):
        entries = outputs.numel()
        if outputs.shape != targets.shape or not entries or kernel.shape != (entries, entries):
            raise NsrlError(
                f"a kernel of shape {tuple(kernel.shape)} does not belong to outputs of shape {tuple(outputs.shape)} "
                f"and targets of shape {tuple(targets.shape)}; expected equal shapes (N, O) and a kernel (N O, N O)"
            )
        self._kernel = kernel.double()
        self._outputs, self._targets = outputs.detach().double(), targets.detach().double()
        self._residual = (self._outputs - self._targets).flatten()
        self._rate = loss_rate(loss, entries)
        decomposition = spectrum(self._kernel, storage)
        self._values, self.modes, self.rank = decomposition.values, decomposition.vectors, decomposition.rank
        self.rates = self._rate * self._values

    @property
    def largest_learning_rate(self) -> float:
        """Gradient descent converges below this learning rate: 2 / (c lambda_max)."""
        return 2.0 / float(self.rates[0])

    def residual_modes(self, times: Sequence[float] | Tensor, learning_rate: float | None = None) -> Tensor:
        """Components of f - y along the eigenmodes, (T, k): each decays at its own rate.

        The arguments are those of `train_outputs`.
        """
        return (1.0 - self._progress(times, learning_rate)) * (self.modes.T @ self._residual)

    def train_outputs(self, times: Sequence[float] | Tensor, learning_rate: float | None = None) -> Tensor:
        """Outputs on the training inputs, (T, N, O).

        Args:
            times: t = learning rate * steps, (T,); `math.inf` is allowed.
            learning_rate: of finite-step gradient descent, for which times must be whole numbers of steps; None means
                gradient flow.
        """
        residuals = self.residual_modes(times, learning_rate) @ self.modes.T
        return self._targets + residuals.view(-1, *self._targets.shape)

    def test_outputs(
        self, times: Sequence[float] | Tensor, cross_kernel: Tensor, outputs: Tensor, learning_rate: float | None = None
    ) -> Tensor:
        """Outputs on other inputs, (T, M, O).

        Args:
            times: as for `train_outputs`. At infinity the weights come from a Cholesky solve where the kernel allows.
            cross_kernel: `empirical_ntk(model, test_inputs, train_inputs)`, (M O, N O).
            outputs: f at time 0 on the test inputs, (M, O).
            learning_rate: as for `train_outputs`.

        Raises:
            NsrlError: the cross kernel has another shape.
        """
        if cross_kernel.shape != (outputs.numel(), self._residual.numel()):
            raise NsrlError(
                f"the cross kernel has shape {tuple(cross_kernel.shape)}; expected ({outputs.numel()}, "
                f"{self._residual.numel()}): test rows first, training columns second"
            )
        times = torch.as_tensor(times, dtype=torch.float64).flatten()
        progress = self._progress(times, learning_rate)
        # Modes with eigenvalue zero: (1 - exp(-c lambda t)) / lambda tends to c t. At infinity nothing moves them.
        elapsed = self._rate * times.to(progress).unsqueeze(1).expand_as(progress)
        moving = self._values > 0
        quotient = torch.where(moving, progress / torch.where(moving, self._values, 1.0), elapsed)
        quotient = torch.where(torch.isinf(elapsed) & (progress == 0), 0.0, quotient)
        weights = quotient * (self.modes.T @ self._residual) @ self.modes.T
        weights[torch.isinf(times)] = self._final_weights()
        return outputs.double() - (weights @ cross_kernel.double().T).view(-1, *outputs.shape)

    def _progress(self, times: Sequence[float] | Tensor, learning_rate: float | None) -> Tensor:
        """Share of its way to the target that each mode has gone, (T, k); expm1 keeps the slow modes exact."""
        times = torch.as_tensor(times, dtype=torch.float64).flatten().to(self.rates.device)
        if bool((times < 0).any()) or bool(times.isnan().any()):
            raise NsrlError("times must be numbers from 0 on")
        if learning_rate is None:
            exponents = torch.outer(torch.nan_to_num(times, posinf=0.0), self.rates)
            progress = -torch.expm1(-exponents)
        else:
            steps = self._steps(times, learning_rate)
            change = learning_rate * self.rates
            slow = torch.expm1(torch.outer(steps, torch.log1p(-change.clamp_max(0.5))))
            progress = torch.where(change <= 0.5, -slow, 1.0 - (1.0 - change) ** steps.unsqueeze(1))
        final = (torch.arange(self.rates.numel(), device=self.rates.device) < self.rank).to(progress)
        return torch.where(torch.isinf(times).unsqueeze(1), final, progress)

    def _steps(self, times: Tensor, learning_rate: float) -> Tensor:
        steps = torch.nan_to_num(times, posinf=0.0) / learning_rate
        if bool(((steps - steps.round()).abs() > 1e-6 * steps.clamp_min(1.0)).any()):
            raise NsrlError(f"times must be whole numbers of steps of the learning rate {learning_rate:g}")
        if bool(torch.isinf(times).any()) and learning_rate >= self.largest_learning_rate:
            raise NsrlError(
                f"gradient descent with learning rate {learning_rate:g} does not converge; it must stay below "
                f"{self.largest_learning_rate:g}"
            )
        return steps.round()

    def _final_weights(self) -> Tensor:
        """K^-1 u(0); of the modes that move, where K is singular."""
        factor, info = torch.linalg.cholesky_ex(self._kernel)
        if int(info) == 0 and self.rank == self._residual.numel():
            weights = torch.cholesky_solve(self._residual.unsqueeze(1), factor).squeeze(1)
            if float((self._kernel @ weights - self._residual).norm()) <= RESIDUAL * float(self._residual.norm()):
                return weights
        modes = self.modes[:, : self.rank]
        return modes @ ((modes.T @ self._residual) / self._values[: self.rank])


def kernel_descent(
    kernel: Tensor,
    outputs: Tensor,
    loss: Callable[[Tensor], Tensor],
    *,
    learning_rate: float,
    steps: int,
    cross_kernel: Tensor | None = None,
    test_outputs: Tensor | None = None,
) -> tuple[Tensor, Tensor | None]:
    """Kernel gradient descent f_(t+1) = f_t - lr K dL/df, for any loss: what the parameters of a linear model do.

    Args:
        kernel: K of the training inputs, (N O, N O).
        outputs: f_0, (N, O).
        loss: differentiable function of the training outputs (N, O) to a number.
        cross_kernel: (M O, N O), and
        test_outputs: f_0 on the test inputs, (M, O), when those are wanted.

    Returns:
        Outputs at steps 0 to `steps` on the training inputs, (steps + 1, N, O), and on the test inputs or None.

    Raises:
        NsrlError: shapes that do not belong together.
    """
    entries = outputs.numel()
    if kernel.shape != (entries, entries) or (cross_kernel is None) != (test_outputs is None):
        raise NsrlError(
            f"the kernel must have shape ({entries}, {entries}), not {tuple(kernel.shape)}, and cross_kernel and "
            "test_outputs come together or not at all"
        )
    current, elsewhere = [outputs.detach().to(kernel)], [None if test_outputs is None else test_outputs.to(kernel)]
    for _ in range(steps):
        point = current[-1].clone().requires_grad_(True)
        (gradient,) = torch.autograd.grad(loss(point), point)
        move = learning_rate * gradient.flatten()
        current.append(current[-1] - (kernel @ move).view_as(outputs))
        if cross_kernel is not None and elsewhere[-1] is not None:
            elsewhere.append(elsewhere[-1] - (cross_kernel.to(kernel) @ move).view_as(elsewhere[-1]))
    return torch.stack(current), None if test_outputs is None else torch.stack([f for f in elsewhere if f is not None])
