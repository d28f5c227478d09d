"""Linear systems with K = J J^T or J^T J: which way to solve them, and what the answer is worth."""

from nsrl.projection.solvers.factorise import factorise, null_projection, solve
from nsrl.projection.solvers.kfac import KroneckerPreconditioner
from nsrl.projection.solvers.plan import Plan
from nsrl.projection.solvers.solver import Certificate, Solution, Solver
from nsrl.projection.solvers.spectrum import Spectrum

__all__ = [
    "Certificate",
    "KroneckerPreconditioner",
    "Plan",
    "Solution",
    "Solver",
    "Spectrum",
    "factorise",
    "null_projection",
    "solve",
]
