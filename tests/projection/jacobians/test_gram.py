"""Every form of the inner products against the materialised rows in float64."""

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from nsrl.projection.jacobians import gram as products
from tests.projection.builders import normal

sizes = st.integers(1, 5)


def factors(samples: int, rows: int, positions: int, width_out: int, width_in: int, seed: int = 0):
    return normal(samples, positions, width_in, seed=seed), normal(samples, rows, positions, width_out, seed=seed + 1)


def dense(inputs: torch.Tensor, grads: torch.Tensor) -> torch.Tensor:
    return torch.einsum("notd,nti->nodi", grads, inputs).flatten(2).flatten(0, 1)


@given(sizes, sizes, sizes, sizes, sizes, sizes, sizes, sizes)
def test_all_forms_agree(n, r, t, m, s, u, width_out, width_in):
    here, there = factors(n, r, t, width_out, width_in), factors(m, s, u, width_out, width_in, seed=7)
    expected = dense(*here) @ dense(*there).T
    forms = [products._pairs, products._materialised]
    if t == 1 == u:
        forms.append(products._hadamard)
    for form in forms:
        torch.testing.assert_close(form(*here, *there, torch.float64), expected, rtol=1e-12, atol=1e-12)
    torch.testing.assert_close(products.cross_gram(*here, *there), expected, rtol=1e-12, atol=1e-12)


@given(st.integers(1, 40), sizes, sizes, sizes, sizes)
def test_own_gram_is_symmetric_and_right(n, r, t, width_out, width_in):
    """Samples above the number of stripes: the stripes must meet without gap."""
    here = factors(n, r, t, width_out, width_in)
    gram = products.gram(*here)
    assert torch.equal(gram, gram.T)
    torch.testing.assert_close(gram, dense(*here) @ dense(*here).T, rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize(
    ("positions", "rows", "width_in", "form"),
    [
        (1, 10, 784, products._hadamard),
        (32, 16, 256, products._pairs),
        (400, 6, 257, products._materialised),
        (49, 6, 577, products._materialised),
        (3, 1, 4, products._materialised),
    ],
)
def test_the_form_with_the_fewest_products_is_chosen(positions, rows, width_in, form):
    inputs, grads = torch.zeros(32, positions, width_in), torch.zeros(32, rows, positions, 1)
    assert products._cheapest(inputs, grads, inputs, grads) is form


def test_slices_of_features_cover_all_of_them(monkeypatch):
    """More features than a slice or a chunk holds, and not a multiple of it."""
    monkeypatch.setattr(products, "FEATURES", 4)
    monkeypatch.setattr(products, "CHUNK", 30)
    for width in (8, 9):
        here = factors(6, 2, 3, width, 5)
        expected = dense(*here) @ dense(*here).T
        torch.testing.assert_close(products._pairs(*here, *here, torch.float64), expected)
        torch.testing.assert_close(products._materialised(*here, *here, torch.float64), expected)
        torch.testing.assert_close(products.squares(*here), dense(*here).square().sum(0).view(width, 5))


def added(rows: torch.Tensor, precision: torch.dtype) -> torch.Tensor:
    out = torch.zeros(len(rows), len(rows), dtype=precision)
    products.add_row_gram(rows, out)
    return out


@pytest.mark.parametrize("shape", [(20, 3, 1, 5, 6), (20, 9, 3, 5, 60), (20, 2, 6, 5, 3)])
def test_a_gram_is_added_to_what_is_there(shape):
    n, r, t, width_out, width_in = shape
    here = factors(n, r, t, width_out, width_in)
    out = torch.ones(n * r, n * r, dtype=torch.float64)
    products.add_gram(*here, out)
    torch.testing.assert_close(out, 1.0 + dense(*here) @ dense(*here).T)


def test_threads_give_the_same_bits_and_leave_the_settings_alone():
    here = factors(20, 4, 3, 8, 50)
    assert products._cheapest(*here, *here) is products._pairs
    threads, results = torch.get_num_threads(), []
    try:
        for count in (1, 2):
            torch.set_num_threads(count)
            with torch.no_grad():
                results.append(products.gram(*here))
            assert torch.get_num_threads() == count and torch.is_grad_enabled()
    finally:
        torch.set_num_threads(threads)
    assert torch.equal(*results)


def test_double_products_of_single_factors_keep_the_condition_number():
    """Rows of condition 1e5: the float64 Gram sees the smallest direction, the float32 one cannot."""
    left = torch.linalg.qr(normal(6, 6))[0]
    right = torch.linalg.qr(normal(30, 6, seed=1))[0]
    rows = (left * torch.logspace(0, -5, 6, dtype=torch.float64) @ right.T).float()
    exact = torch.linalg.eigvalsh(rows.double() @ rows.double().T)
    double = torch.linalg.eigvalsh(added(rows, torch.float64))
    single = torch.linalg.eigvalsh(added(rows, torch.float32).double())
    torch.testing.assert_close(double, exact, rtol=1e-4, atol=0.0)
    assert abs(float(single[0] - exact[0])) > 0.5 * float(exact[0])
