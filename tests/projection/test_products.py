"""Every form of the inner products against the materialised rows in float64."""

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from nsrl.projection import products
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


@pytest.mark.parametrize(("positions", "rows", "width_in", "form"), [
    (1, 10, 784, products._hadamard), (32, 16, 256, products._pairs), (400, 6, 257, products._materialised),
    (49, 6, 577, products._materialised), (3, 1, 4, products._materialised),
])  # fmt: skip
def test_the_form_with_the_fewest_products_is_chosen(positions, rows, width_in, form):
    inputs, grads = torch.zeros(1, positions, width_in), torch.zeros(1, rows, positions, 1)
    assert products._cheapest(inputs, grads, inputs, grads) is form


def test_slices_of_features_cover_all_of_them(monkeypatch):
    """More features than a slice or a chunk holds, and not a multiple of it."""
    monkeypatch.setattr(products, "FEATURES", 4)
    monkeypatch.setattr(products, "CHUNK", 30)
    for width in (8, 9):
        here = factors(6, 2, 3, width, 5)
        expected = dense(*here) @ dense(*here).T
        torch.testing.assert_close(products._pairs(*here, *here, torch.float64), expected)
        torch.testing.assert_close(products._materialised(*here, None, None, torch.float64), expected)
        torch.testing.assert_close(products.squares(*here), dense(*here).square().sum(0).view(width, 5))


def test_double_products_of_single_factors_keep_the_condition_number():
    """Rows of condition 1e5: the float64 Gram sees the smallest direction, the float32 one cannot."""
    left = torch.linalg.qr(normal(6, 6))[0]
    right = torch.linalg.qr(normal(30, 6, seed=1))[0]
    rows = (left * torch.logspace(0, -5, 6, dtype=torch.float64) @ right.T).float()
    exact = torch.linalg.eigvalsh(rows.double() @ rows.double().T)
    double = torch.linalg.eigvalsh(products.row_gram(rows))
    single = torch.linalg.eigvalsh(products.row_gram(rows, torch.float32).double())
    torch.testing.assert_close(double, exact, rtol=1e-4, atol=0.0)
    assert abs(float(single[0] - exact[0])) > 0.5 * float(exact[0])
