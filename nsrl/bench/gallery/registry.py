"""What hangs in the gallery."""

from __future__ import annotations

import importlib
from collections.abc import Callable
from dataclasses import dataclass

from nsrl.bench.gallery.figure import Plate


@dataclass(frozen=True)
class Entry:
    """One figure.

    Attributes:
        room: module of this package that draws it, in a function of the figure's name.
        title: of its section.
        caption: what to see in it.
    """

    room: str
    title: str
    caption: str

    def draw(self, name: str, quick: bool) -> Plate:
        """Compute and draw; `quick` uses small sizes, whose numbers mean nothing."""
        paint: Callable[[bool], Plate] = getattr(importlib.import_module(f"nsrl.bench.gallery.{self.room}"), name)
        return paint(quick)


FIGURES: dict[str, Entry] = {
    "random_nets": Entry(
        "beginnings",
        "Random networks are draws from a Gaussian process",
        "100 networks at initialisation, the band of two standard deviations of the NNGP kernel, and the distance of "
        "the tangent kernel from its limit against width (rajatvd F1).",
    ),
    "kernel_slices": Entry(
        "beginnings",
        "The kernel settles as the width grows",
        "Slices K(x, 0.5) of the empirical tangent kernel, against the closed form of infinite width (rajatvd F5).",
    ),
    "asymptotics": Entry(
        "beginnings",
        "Why wide networks are lazy",
        "|J|, |Hess f| and kappa against width: slopes 1/2, 0 and -1 (rajatvd F8).",
    ),
    "kernel_matrix": Entry(
        "beginnings",
        "A tangent kernel as a matrix",
        "Heat map of the kernel on a sorted line, its spectrum, and the law of large numbers for random functions.",
    ),
    "training": Entry(
        "motion", "One network learns two points", "Snapshots of the function over training, lazy and not (rajatvd F2)."
    ),
    "weights": Entry(
        "motion",
        "Weights hardly move in wide networks",
        "Change of the hidden weight matrix, losses, and relative change of weights and tangent kernel by the end of "
        "training (rajatvd F3): in wide networks the kernel is constant.",
    ),
    "drift": Entry(
        "motion",
        "Output scale alone makes a network lazy",
        "Kernel drift and weight change against the output scale alpha: slope -1 (rajatvd F4, Chizat et al.).",
    ),
    "ellipses": Entry(
        "motion",
        "The kernel steers the outputs",
        "Paths of the two outputs towards their target, with the ellipse of the 2 x 2 kernel at the start and the end; "
        "dotted the linearised model's path (rajatvd F6).",
    ),
    "one_parameter": Entry(
        "motion",
        "A model of one parameter and its tangent",
        "f = alpha (w x + w^2 x + sin e^(0.1 w))(w - 0.4) and the loss, with their linearisations (rajatvd F7).",
    ),
    "neurons": Entry(
        "lazy",
        "Neurons of a lazy student stay at home",
        "A ReLU student of a two-neuron teacher: where its neurons point before and after, by scale (Chizat et al.).",
    ),
    "lazy_is_not_better": Entry(
        "lazy",
        "Lazy is not better",
        "Test error against the output scale (Chizat et al.), and the finite network against the kernel machine of its "
        "own tangent kernel.",
    ),
    "modes": Entry(
        "dynamics",
        "Every mode decays at its own rate",
        "Training in closed form over the measured run; t = learning rate x steps, loss 1/2 sum of squares. A mode "
        "that has lost three decades is fed by the slower ones through what the kernel has drifted.",
    ),
    "minimum_norm": Entry(
        "dynamics",
        "Gradient descent interpolates with minimum norm",
        "More parameters than data: of all interpolants, descent from zero finds the smallest.",
    ),
    "fourier": Entry(
        "dynamics",
        "Fourier features widen the spectrum",
        "Learning rates of the frequencies, and fits after equal time (Tancik et al.).",
    ),
    "nadaraya_watson": Entry("lecture", "Gaussian kernel regression", "Bandwidths too small, right, and too large."),
    "ridge": Entry("lecture", "Kernel ridge regression", "Ridges and kernels, among them a tangent kernel."),
    "kernel_pca": Entry(
        "lecture",
        "Kernel principal components",
        "Circles and moons: of the first eight components the two that tell the classes apart best, and the share of "
        "points on the right side of a line between them.",
    ),
    "certificate": Entry(
        "paths",
        "A trained network rebuilt from its path",
        "Relative error of the rebuilt predictions against the learning rate: slopes 1, 2 and 4, and round-off.",
    ),
    "contributions": Entry(
        "paths",
        "Who moved the prediction",
        "Contributions of the training points to one query over training, and the rest that belongs to nobody.",
    ),
    "residuals": Entry(
        "paths",
        "What the first-order term leaves out",
        "Residual of every step over training, and against the step's length: slope 2.",
    ),
    "two_minima": Entry(
        "paths",
        "Where the kernel picture breaks",
        "A double well: below a learning rate of 0.167 descent stays in its valley; above, a step crosses the barrier, "
        "and the first-order term tells nothing of where it lands. The exact rule does.",
    ),
    "path_kernels": Entry(
        "paths",
        "Path kernel, initial and final tangent kernel",
        "The loss path kernel with the left rule is symmetric; with the exact rule it is not (Bell et al.).",
    ),
    "policy_spectrum": Entry(
        "policies",
        "What a buffer retains of a policy",
        "Spectrum of the whitened Jacobian on the retained states, and its effective dimension against the budget.",
    ),
    "plasticity": Entry(
        "policies",
        "How much of the new task's gradient survives",
        "Share of the policy gradient left by the null space of a growing number of retained states, and share of 80 "
        "Adam updates that a KL budget would leave.",
    ),
    "forgetting": Entry(
        "policies",
        "Which transitions moved the old policy",
        "One update of plain PPO and of NullSpacePPO: change of the KL at retained states, by transition. The rest is "
        "momentum older than 32 minibatches and, for NullSpacePPO, what the constraint did.",
    ),
}

#: Shown on the page when they are in the folder, and made by other commands.
GUESTS: dict[str, Entry] = {
    "forecast": Entry(
        "policies",
        "The forecast, and what then happened",
        "KL on the buffer that the cross-kernel said before training, and the KL measured after plain fine-tuning. "
        "`partial` is the rank correlation within runs of equal learning rate and length, where task and seed alone "
        "differ; the rivals do without a kernel. Intervals (95 %) resample whole tasks.",
    ),
}
