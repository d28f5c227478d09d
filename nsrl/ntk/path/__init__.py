"""Path kernels: a trained model's predictions rebuilt from the path that its parameters took.

For gradient flow on a sum of losses, f(x; w_N) = f(x; w_0) - sum_m integral of K_t(x, x_m) L'_m dt (Domingos 2020).
What is computed here is the exact discrete statement for any optimizer (Bell et al. 2023 for gradient descent),

    f(x; w_N) - f(x; w_0) = sum_k integral_0^1 <grad f(x; w_k + s D_k), D_k> ds,      D_k = w_{k+1} - w_k,

with realised displacements D_k and Gauss-Legendre nodes s. Two things to keep in mind when reading it as a kernel
machine: its coefficients a_m and offset b depend on the query x, so it is none in the usual sense; and the exact
discrete kernel integrates the gradient at the query along the step but holds the training gradient at its start, so it
is not symmetric in its arguments.
"""

from nsrl.ntk.path.monitor import KernelMonitor, KernelState
from nsrl.ntk.path.recorder import PathRecorder, unrecorded
from nsrl.ntk.path.result import PathResult, StepRecord
from nsrl.ntk.path.rules import RULES, Rule
from nsrl.ntk.path.two_minima import Crossing, two_minima
from nsrl.ntk.path.weightings import contribution, loss_path_kernel, path_kernel, tracin

__all__ = [
    "RULES",
    "Crossing",
    "KernelMonitor",
    "KernelState",
    "PathRecorder",
    "PathResult",
    "Rule",
    "StepRecord",
    "contribution",
    "loss_path_kernel",
    "path_kernel",
    "tracin",
    "two_minima",
    "unrecorded",
]
