"""Estimators: scikit-learn's own checks, and stock linear models on the explicit features J(x)."""

import sys

import numpy as np
import pytest
import torch
from sklearn.base import clone
from sklearn.datasets import make_circles, make_moons
from sklearn.decomposition import PCA
from sklearn.linear_model import Ridge, RidgeClassifier
from sklearn.model_selection import GridSearchCV, cross_val_score
from sklearn.utils.estimator_checks import parametrize_with_checks
from torch import nn

import nsrl.ntk
from nsrl.errors import NsrlError
from nsrl.ntk import NadarayaWatson, NTKClassifier, NTKPrincipalComponents, NTKRegressor
from tests.projection.builders import jacrev_matrix, mlp, normal

pytestmark = pytest.mark.filterwarnings("ignore::sklearn.exceptions.SkipTestWarning")


@parametrize_with_checks([NadarayaWatson(), NTKRegressor(), NTKClassifier(), NTKPrincipalComponents()])
def test_scikit_learn_accepts(estimator, check):
    check(estimator)


def features(network: nn.Module, inputs: np.ndarray) -> np.ndarray:
    """The explicit feature map of a network with one output: its parameter gradient."""
    return jacrev_matrix(network, torch.tensor(inputs)).numpy()


def network() -> nn.Module:
    return mlp(3, 10, 1).double()


def test_regressor_is_ridge_on_the_gradient_features():
    model, x, y, test = network(), normal(20, 3).numpy(), normal(20, 2, seed=1).numpy(), normal(6, 3, seed=2).numpy()
    ours = NTKRegressor(model, alpha=0.3, batch_size=4).fit(x, y).predict(test)
    ridge = Ridge(alpha=0.3, fit_intercept=False).fit(features(model, x), y)
    np.testing.assert_allclose(ours, ridge.predict(features(model, test)), rtol=1e-8, atol=1e-8)


@pytest.mark.parametrize("classes", [2, 3])
def test_classifier_is_ridge_classification_on_the_gradient_features(classes):
    model, x, test = network(), normal(30, 3).numpy(), normal(9, 3, seed=2).numpy()
    labels = np.array(["a", "b", "c"])[np.argsort(x[:, :classes], 1)[:, 0]]
    ours = NTKClassifier(model, alpha=0.3).fit(x, labels)
    ridge = RidgeClassifier(alpha=0.3, fit_intercept=False).fit(features(model, x), labels)
    expected = ridge.decision_function(features(model, test))
    np.testing.assert_allclose(ours.decision_function(test), expected, rtol=1e-7, atol=1e-7)
    assert (ours.predict(test) == ridge.predict(features(model, test))).all()


def test_principal_components_are_those_of_the_gradient_features():
    model, x, test = network(), normal(20, 3).numpy(), normal(6, 3, seed=2).numpy()
    ours = NTKPrincipalComponents(3, model).fit(x).transform(test)
    theirs = PCA(3, svd_solver="full").fit(features(model, x)).transform(features(model, test))
    np.testing.assert_allclose(np.abs(ours), np.abs(theirs), rtol=1e-6, atol=1e-6)


def test_the_given_network_stays_as_it_is():
    model = mlp(3, 6, 1)
    before = {name: value.clone() for name, value in model.state_dict().items()}
    fitted = NTKRegressor(model).fit(normal(8, 3).numpy(), np.arange(8.0))
    assert fitted.network_ is not model and next(model.parameters()).dtype == torch.float32 and model.training
    assert all(torch.equal(before[name], value) for name, value in model.state_dict().items())


def test_default_network_follows_the_random_state():
    x, y = normal(10, 3).numpy(), np.arange(10.0)
    one, same, other = (NTKRegressor(random_state=seed, width=16).fit(x, y).predict(x + 0.1) for seed in (1, 1, 2))
    assert np.array_equal(one, same) and not np.allclose(one, other)


def test_moons_and_model_selection():
    x, y = make_moons(160, noise=0.15, random_state=0)
    search = GridSearchCV(NTKClassifier(width=32), {"alpha": [1e-2, 1.0]}, cv=3).fit(x, y)
    assert search.best_score_ > 0.9
    assert cross_val_score(clone(search.best_estimator_), x, y, cv=3).mean() > 0.9


def test_principal_components_untangle_circles():
    """A linear classifier fails on two circles; on a few kernel components it does not."""
    x, y = make_circles(200, factor=0.3, noise=0.05, random_state=0)
    components = NTKPrincipalComponents(5, width=64).fit_transform(x)
    assert RidgeClassifier().fit(x, y).score(x, y) < 0.7
    assert RidgeClassifier().fit(components, y).score(components, y) > 0.95


def test_nadaraya_watson_is_the_weighted_mean():
    x, y, test, h = normal(15, 2).numpy(), normal(15, seed=1).numpy(), normal(4, 2, seed=2).numpy(), 0.7
    weights = np.exp(-(((test[:, None] - x[None]) ** 2).sum(-1)) / (2 * h**2))
    expected = (weights @ y) / weights.sum(1)
    np.testing.assert_allclose(NadarayaWatson(h).fit(x, y).predict(test), expected, rtol=1e-12)


def test_nadaraya_watson_goes_from_the_nearest_neighbour_to_the_mean():
    x, y = np.array([[0.0], [1.0], [3.0]]), np.array([1.0, 2.0, 6.0])
    assert NadarayaWatson(1e-3).fit(x, y).predict([[0.9], [1e6]]).tolist() == [2.0, 6.0]
    assert NadarayaWatson(1e6).fit(x, y).predict([[0.9]])[0] == pytest.approx(3.0)
    with pytest.raises(NsrlError, match="bandwidth must be positive"):
        NadarayaWatson(0.0).fit(x, y)


def test_without_scikit_learn_the_sentence_says_what_to_install(monkeypatch):
    monkeypatch.delitem(sys.modules, "nsrl.ntk.regression")
    monkeypatch.setitem(sys.modules, "sklearn.base", None)
    with pytest.raises(NsrlError, match=r"nsrl\[analysis\]"):
        nsrl.ntk.NTKRegressor  # noqa: B018
