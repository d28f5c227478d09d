"""Kernel methods as scikit-learn estimators: Nadaraya-Watson, and ridge and principal components with an NTK.

Everything that scikit-learn has is taken from there, through `kernel="precomputed"`.
"""

from __future__ import annotations

import copy
from typing import Any

import numpy as np
import torch
from numpy.typing import ArrayLike, NDArray
from scipy.spatial.distance import cdist
from scipy.special import softmax
from sklearn.base import (
    BaseEstimator,
    ClassifierMixin,
    ClassNamePrefixFeaturesOutMixin,
    MultiOutputMixin,
    RegressorMixin,
    TransformerMixin,
)
from sklearn.decomposition import KernelPCA
from sklearn.kernel_ridge import KernelRidge
from sklearn.preprocessing import LabelBinarizer
from sklearn.utils import check_random_state
from sklearn.utils.multiclass import check_classification_targets
from sklearn.utils.validation import check_is_fitted, validate_data
from torch import nn

from nsrl.errors import NsrlError
from nsrl.ntk.infinite import InfiniteNetwork
from nsrl.ntk.kernels import empirical_ntk

#: The default network: two hidden ReLU layers with biases, in the NTK parametrisation.
DEFAULT = InfiniteNetwork(hidden_layers=2, weight_variance=2.0, bias_variance=0.1)


class NadarayaWatson(MultiOutputMixin, RegressorMixin, BaseEstimator):
    """Gaussian kernel regression: the mean of the training targets, weighted by exp(-|x - x_i|^2 / (2 h^2)).

    Args:
        bandwidth: h. Towards 0 the nearest neighbour, towards infinity the mean of all targets.
    """

    def __init__(self, bandwidth: float = 1.0):
        self.bandwidth = bandwidth

    def fit(self, X: ArrayLike, y: ArrayLike) -> NadarayaWatson:
        """Keep the training set: X (n, d), y (n,) or (n, targets).

        Raises:
            NsrlError: the bandwidth is not positive.
        """
        if not self.bandwidth > 0:
            raise NsrlError(f"bandwidth must be positive, not {self.bandwidth}")
        self.X_fit_, self.y_fit_ = validate_data(self, X, y, multi_output=True, y_numeric=True, dtype=np.float64)
        return self

    def predict(self, X: ArrayLike) -> NDArray[np.float64]:
        """Predictions (n_test,) or (n_test, targets)."""
        check_is_fitted(self)
        X = validate_data(self, X, reset=False, dtype=np.float64)
        # softmax subtracts the largest exponent: far from all data the weights would underflow together
        weights = softmax(-cdist(X, self.X_fit_, "sqeuclidean") / (2 * self.bandwidth**2), axis=1)
        return weights @ self.y_fit_


class _NTKEstimator(BaseEstimator):
    """A network, its training inputs, and the kernel between those and others."""

    network: nn.Module | None
    width: int
    batch_size: int | None
    random_state: Any

    def _fit_kernel(self, X: Any) -> NDArray[np.float64]:
        if self.network is None:
            seed = int(check_random_state(self.random_state).randint(2**31 - 1))
            network: nn.Module = DEFAULT.finite(X.shape[1], self.width, seed=seed)
        else:
            network = copy.deepcopy(self.network).double()
        self.network_ = network.eval()
        self.X_fit_ = X
        return self._kernel(X, None)

    def _test_kernel(self, X: ArrayLike) -> NDArray[np.float64]:
        check_is_fitted(self)
        return self._kernel(validate_data(self, X, reset=False, dtype=np.float64), self.X_fit_)

    def _kernel(self, X: NDArray[np.float64], Y: NDArray[np.float64] | None) -> NDArray[np.float64]:
        # torch.tensor copies: scikit-learn also hands over read-only memory maps
        others = None if Y is None else torch.tensor(Y)
        kernel = empirical_ntk(self.network_, torch.tensor(X), others, "trace", batch_size=self.batch_size)
        return kernel.numpy()


class NTKRegressor(MultiOutputMixin, RegressorMixin, _NTKEstimator):
    """Kernel ridge regression with the empirical tangent kernel of a network at its present parameters.

    Args:
        network: any module that maps float64 inputs (n, d) to outputs (n, O); its kernel is summed over the outputs.
            A copy is used. Default: a fully connected ReLU network of the given width.
        alpha: ridge, absolute (as in `sklearn.kernel_ridge.KernelRidge`).
        width: of the two hidden layers of the default network.
        batch_size: samples linearised at once.
        random_state: of the default network's weights.

    Attributes:
        network_: the network in use, float64.
        ridge_: the fitted `KernelRidge(kernel="precomputed")`.
    """

    def __init__(
        self,
        network: nn.Module | None = None,
        *,
        alpha: float = 1e-2,
        width: int = 128,
        batch_size: int | None = None,
        random_state: Any = 0,
    ):
        self.network = network
        self.alpha = alpha
        self.width = width
        self.batch_size = batch_size
        self.random_state = random_state

    def fit(self, X: ArrayLike, y: ArrayLike) -> NTKRegressor:
        """Fit to X (n, d), y (n,) or (n, targets)."""
        X, y = validate_data(self, X, y, multi_output=True, y_numeric=True, dtype=np.float64)
        self.ridge_ = KernelRidge(alpha=self.alpha, kernel="precomputed").fit(self._fit_kernel(X), y)
        return self

    def predict(self, X: ArrayLike) -> NDArray[np.float64]:
        """Predictions (n_test,) or (n_test, targets)."""
        kernel = self._test_kernel(X)
        return self.ridge_.predict(kernel)


class NTKClassifier(ClassifierMixin, _NTKEstimator):
    """Kernel ridge regression on targets of -1 and 1, one a class, with the empirical tangent kernel of a network.

    Arguments and attributes are those of `NTKRegressor`, and `classes_`.
    """

    def __init__(
        self,
        network: nn.Module | None = None,
        *,
        alpha: float = 1e-2,
        width: int = 128,
        batch_size: int | None = None,
        random_state: Any = 0,
    ):
        self.network = network
        self.alpha = alpha
        self.width = width
        self.batch_size = batch_size
        self.random_state = random_state

    def fit(self, X: ArrayLike, y: ArrayLike) -> NTKClassifier:
        """Fit to X (n, d) and labels y (n,)."""
        X, y = validate_data(self, X, y, dtype=np.float64)
        check_classification_targets(y)
        binarizer = LabelBinarizer(neg_label=-1, pos_label=1).fit(y)
        self.classes_ = binarizer.classes_
        targets = binarizer.transform(y).astype(np.float64)
        self.ridge_ = KernelRidge(alpha=self.alpha, kernel="precomputed").fit(self._fit_kernel(X), targets)
        return self

    def decision_function(self, X: ArrayLike) -> NDArray[np.float64]:
        """Ridge outputs: (n_test,) for two classes, positive for the second; else (n_test, classes)."""
        kernel = self._test_kernel(X)
        scores = self.ridge_.predict(kernel)
        return scores if len(self.classes_) > 2 else scores.ravel()

    def predict(self, X: ArrayLike) -> NDArray[Any]:
        """Labels (n_test,)."""
        scores = self.decision_function(X)
        return self.classes_[scores.argmax(1) if scores.ndim == 2 else (scores > 0).astype(int)]


class NTKPrincipalComponents(ClassNamePrefixFeaturesOutMixin, TransformerMixin, _NTKEstimator):
    """Kernel principal components with the empirical tangent kernel of a network.

    Args:
        n_components: number of components.
        network: as in `NTKRegressor`, like the other arguments.

    Attributes:
        network_: the network in use, float64.
        pca_: the fitted `KernelPCA(kernel="precomputed")`.
    """

    def __init__(
        self,
        n_components: int = 2,
        network: nn.Module | None = None,
        *,
        width: int = 128,
        batch_size: int | None = None,
        random_state: Any = 0,
    ):
        self.n_components = n_components
        self.network = network
        self.width = width
        self.batch_size = batch_size
        self.random_state = random_state

    def fit(self, X: ArrayLike, y: object = None) -> NTKPrincipalComponents:
        """Fit to X (n, d)."""
        X = validate_data(self, X, dtype=np.float64)
        self.pca_ = KernelPCA(self.n_components, kernel="precomputed", eigen_solver="dense").fit(self._fit_kernel(X))
        self._n_features_out = self.pca_.eigenvalues_.shape[0]
        return self

    def transform(self, X: ArrayLike) -> NDArray[np.float64]:
        """Components (n_test, n_components)."""
        kernel = self._test_kernel(X)
        return self.pca_.transform(kernel)
