"""The core without reinforcement learning: a factored Jacobian, its null space, and the neural tangent kernel."""

import torch

from nsrl.ntk import empirical_ntk
from nsrl.projection import jacobian, null_projection


def main() -> None:
    torch.manual_seed(0)
    model = torch.nn.Sequential(torch.nn.Linear(10, 64), torch.nn.Tanh(), torch.nn.Linear(64, 3))
    inputs = torch.randn(32, 10)

    # k = 32 * 3 rows, P columns, never materialised.
    J = jacobian(model, inputs)
    k, P = J.shape
    print(f"Jacobian of {k} rows and {P} columns")

    # Products in both directions, against each other: <u, J v> = <J^T u, v>.
    u, v = torch.randn(k, dtype=torch.float64), torch.randn(P)
    left, right = u @ J.matvec(v).double(), J.rmatvec(u.float()).double() @ v.double()
    print(f"adjoint identity: {left:.6f} = {right:.6f}")

    # The part of a step that leaves all outputs alone, to first order.
    step = torch.randn(P)
    kept = null_projection(J, step).values
    before = model(inputs)
    with torch.no_grad():
        weights = torch.nn.utils.parameters_to_vector(model.parameters())
        for name, direction in {"the step": step, "its null-space part": kept}.items():
            torch.nn.utils.vector_to_parameters(weights + 1e-3 * direction / direction.norm(), model.parameters())
            print(f"outputs change by {(model(inputs) - before).norm():.2e} along {name}")
        torch.nn.utils.vector_to_parameters(weights, model.parameters())

    # The Gram matrix of the Jacobian is the empirical neural tangent kernel.
    kernel, dense = empirical_ntk(model, inputs), J.dense().double()
    print(f"largest difference from the dense product: {(kernel - dense @ dense.T).abs().max():.1e}")
    print("largest eigenvalues:", *(f"{value:.1f}" for value in torch.linalg.eigvalsh(kernel).flip(0)[:5]))


if __name__ == "__main__":
    main()
