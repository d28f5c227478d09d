"""The methods that are compared: ours first, then every rival in its fastest use that we know.

Gram methods return K = J J^T, (k, k), rows sample-major as ours. Each works on a copy of the model, because several
leave hooks behind.
"""

from __future__ import annotations

from collections.abc import Callable
from copy import deepcopy
from dataclasses import dataclass
from importlib.util import find_spec

import torch
from torch import Tensor, nn
from torch.func import functional_call, jacrev, jvp, vjp, vmap

from nsrl.bench.speed.cases import Problem
from nsrl.projection import SpectralProjection, jacobian


def factored_null(problem: Problem) -> Callable[[], Tensor]:
    """`SpectralProjection.null`."""
    solver = _solver(problem)
    return lambda: solver.null(problem.proposal)


def factored_projection(problem: Problem) -> Callable[[], Tensor]:
    """`SpectralProjection.project` with budget 0: the same displacement with its certificate."""
    solver = _solver(problem)
    return lambda: solver.project(problem.proposal, 0.0).displacement


def dense_projection(problem: Problem) -> Callable[[], Tensor]:
    """Two products with a dense basis, stored with its rows contiguous."""
    basis = orthonormal_rows(jacobian(problem.model, problem.inputs).dense())
    return lambda: problem.proposal - (basis @ problem.proposal) @ basis


def orthonormal_rows(matrix: Tensor, chunk: int = 1 << 14) -> Tensor:
    """Overwrite a matrix of full row rank with an orthonormal basis of its rows.

    Cholesky QR in float64, some columns at a time, so that nothing large is held next to the matrix. The basis is as
    orthonormal as float32 can store it up to a condition number of about 1e4.

    Args:
        matrix: shape (k, P), k <= P.
        chunk: columns at a time.
    """
    gram = torch.zeros(len(matrix), len(matrix), dtype=torch.float64, device=matrix.device)
    for columns in matrix.split(chunk, 1):
        gram += columns.double() @ columns.double().T
    factor = torch.linalg.cholesky(gram)
    for columns in matrix.split(chunk, 1):
        columns.copy_(torch.linalg.solve_triangular(factor, columns.double(), upper=False))
    return matrix


def relative_residual(problem: Problem, displacement: Tensor) -> float:
    """|J d| / (|J| |d|), J d by forward-mode differentiation of the model in float64, |J| the spectral norm."""
    values, tangents, start = {}, {}, 0
    for name, parameter in problem.model.named_parameters():
        values[name] = parameter.detach().double()
        part = displacement[start : start + parameter.numel()]
        tangents[name] = part.view_as(parameter).double()
        start += parameter.numel()

    def call(parameters: dict[str, Tensor]) -> Tensor:
        return functional_call(problem.model, parameters, (problem.inputs.double(),))

    moved = jvp(call, (values,), (tangents,))[1]
    largest = torch.linalg.eigvalsh(jacobian(problem.model, problem.inputs).gram())[-1]
    return float(moved.norm() / (largest.sqrt() * displacement.double().norm()))


def _solver(problem: Problem) -> SpectralProjection:
    factored = jacobian(problem.model, problem.inputs)
    return SpectralProjection(factored, torch.zeros(factored.shape[0], device=problem.inputs.device), 0.0)


Run = Callable[[], Tensor]

#: Vectors at a time through an operator of curvlinops.
CHUNK = 128


@dataclass(frozen=True)
class Method:
    """One way to reach a case's goal.

    Attributes:
        name: in tables.
        library: the package that users install; "nsrl" is ours, "dense" is plain linear algebra.
        goal: the kind of cases that it is for.
        prepare: function of the problem to what is timed; what it does itself is not timed.
        copies: memory that it takes, roughly, in dense float32 Jacobians.
        module: what must be importable.
    """

    name: str
    library: str
    goal: str
    prepare: Callable[[Problem], Run]
    copies: float
    module: str = "torch"

    @property
    def installed(self) -> bool:
        """Whether its library is there."""
        return find_spec(self.module) is not None


def _nsrl(problem: Problem) -> Run:
    model = deepcopy(problem.model)
    return lambda: jacobian(model, problem.inputs).gram()


def _nsrl_single(problem: Problem) -> Run:
    """In the rivals' precision: enough to look at a kernel, not to project."""
    model = deepcopy(problem.model)
    return lambda: jacobian(model, problem.inputs).gram(torch.float32)


def _single(problem: Problem) -> tuple[Callable[[dict[str, Tensor], Tensor], Tensor], dict[str, Tensor]]:
    """The model as a function of parameters and one sample, as torch.func wants it."""
    model = deepcopy(problem.model)
    parameters = {name: parameter.detach() for name, parameter in model.named_parameters()}

    def call(values: dict[str, Tensor], sample: Tensor) -> Tensor:
        return functional_call(model, values, (sample.unsqueeze(0),)).squeeze(0)

    return call, parameters


def _sample_major(blocks: Tensor) -> Tensor:
    """(N, M, O, O') to (N O, M O')."""
    return blocks.transpose(1, 2).flatten(2).flatten(0, 1)


def _torch_func_contraction(problem: Problem) -> Run:
    """The tutorial's `empirical_ntk_jacobian_contraction`, which would differentiate twice for x1 = x2; here once."""
    call, parameters = _single(problem)

    def run() -> Tensor:
        jacobians = vmap(jacrev(call), (None, 0))(parameters, problem.inputs)
        flat = [entry.flatten(2) for entry in jacobians.values()]
        return _sample_major(torch.stack([torch.einsum("Naf,Mbf->NMab", entry, entry) for entry in flat]).sum(0))

    return run


def _torch_func_products(problem: Problem) -> Run:
    """The tutorial's `empirical_ntk_ntk_vps`."""
    call, parameters = _single(problem)

    def pair(first: Tensor, second: Tensor) -> Tensor:
        pulled = vjp(lambda values: call(values, first), parameters)

        def product(vector: Tensor) -> Tensor:
            return jvp(lambda values: call(values, second), (parameters,), pulled[1](vector))[1]

        return vmap(product)(torch.eye(pulled[0].numel(), device=first.device))

    return lambda: _sample_major(vmap(vmap(pair, (None, 0)), (0, None))(problem.inputs, problem.inputs))


def _torchjd(problem: Problem) -> Run:
    from torchjd.autogram import Engine

    model = deepcopy(problem.model)
    engine = Engine(model, batch_dim=0)
    return lambda: engine.compute_gramian(model(problem.inputs))


def _nngeometry_gram(problem: Problem) -> Run:
    from nngeometry.gram import GramMatrix

    model = deepcopy(problem.model)

    def run() -> Tensor:
        gram = GramMatrix(model, [problem.inputs], function=lambda batch: model(batch)).to_torch()
        return gram.permute(1, 0, 3, 2).flatten(2).flatten(0, 1)

    return run


def _nngeometry_jacobian(problem: Problem) -> Run:
    from nngeometry.jacobian import Jacobian

    model = deepcopy(problem.model)

    def run() -> Tensor:
        rows = Jacobian(model, [problem.inputs], function=lambda batch: model(batch)).to_torch()
        outputs, samples, _ = rows.shape
        flat = rows.flatten(0, 1)
        gram = (flat @ flat.T).view(outputs, samples, outputs, samples)
        return gram.permute(1, 0, 3, 2).flatten(2).flatten(0, 1)

    return run


def _curvlinops_operator(problem: Problem) -> Run:
    model = deepcopy(problem.model)

    def run() -> Tensor:
        operator = _curvlinops_jacobian(model, problem.inputs)
        gram = operator @ operator.adjoint()
        identity = torch.eye(gram.shape[0], device=problem.inputs.device)
        return torch.cat([gram @ columns for columns in identity.split(CHUNK, 1)], 1)

    return run


def _curvlinops_samples(problem: Problem) -> Run:
    """One operator a sample: no work on the zero blocks between samples."""
    model = deepcopy(problem.model)

    def run() -> Tensor:
        rows = []
        for sample in problem.inputs.split(1):
            operator = _curvlinops_jacobian(model, sample)
            rows.append((operator.adjoint() @ torch.eye(operator.shape[0], device=sample.device)).T)
        dense = torch.cat(rows)
        return dense @ dense.T

    return run


def _curvlinops_jacobian(model: nn.Module, inputs: Tensor) -> torch.Tensor:
    from curvlinops import JacobianLinearOperator

    with torch.no_grad():
        targets = torch.zeros_like(model(inputs))
    return JacobianLinearOperator(model, list(model.parameters()), [(inputs, targets)], check_deterministic=False)


OURS = {"gram": "nsrl", "projection": "nsrl null"}

METHODS = {
    method.name: method
    for method in (
        Method("nsrl", "nsrl", "gram", _nsrl, 0.0),
        Method("nsrl float32", "nsrl", "gram", _nsrl_single, 0.0),
        Method("torch.func contraction", "torch.func", "gram", _torch_func_contraction, 2.5),
        Method("torch.func NTK-vector products", "torch.func", "gram", _torch_func_products, 2.5),
        Method("TorchJD autogram", "TorchJD", "gram", _torchjd, 2.5, "torchjd"),
        Method("nngeometry GramMatrix", "nngeometry", "gram", _nngeometry_gram, 0.5, "nngeometry"),
        Method("nngeometry Jacobian", "nngeometry", "gram", _nngeometry_jacobian, 1.5, "nngeometry"),
        Method("curvlinops operator", "curvlinops", "gram", _curvlinops_operator, 1.0, "curvlinops"),
        Method("curvlinops per sample", "curvlinops", "gram", _curvlinops_samples, 2.5, "curvlinops"),
        Method("nsrl null", "nsrl", "projection", factored_null, 0.0),
        Method("nsrl project", "nsrl", "projection", factored_projection, 0.0),
        Method("dense Q", "dense", "projection", dense_projection, 1.2),
    )
}
