"""Neural tangent kernels on the factored Jacobian: kernels, dynamics, lazy training, path kernels.

The names below load on first use: scikit-learn and SciPy (extra `analysis`) are needed only by what is built on them.
"""

from typing import TYPE_CHECKING, Any

from nsrl.errors import NsrlError
from nsrl.face import lazily

if TYPE_CHECKING:
    from nsrl.ntk.dynamics import OutputDynamics as OutputDynamics
    from nsrl.ntk.dynamics import kernel_descent as kernel_descent
    from nsrl.ntk.fourier import FourierFeatures as FourierFeatures
    from nsrl.ntk.fourier import frequency_spectrum as frequency_spectrum
    from nsrl.ntk.functions import LinearizedModel as LinearizedModel
    from nsrl.ntk.functions import linearize as linearize
    from nsrl.ntk.infinite import InfiniteNetwork as InfiniteNetwork
    from nsrl.ntk.kernels import Tile as Tile
    from nsrl.ntk.kernels import empirical_ntk as empirical_ntk
    from nsrl.ntk.kernels import ntk_tiles as ntk_tiles
    from nsrl.ntk.lazy import Laziness as Laziness
    from nsrl.ntk.lazy import ScaledModel as ScaledModel
    from nsrl.ntk.lazy import kappa as kappa
    from nsrl.ntk.lazy import kernel_drift as kernel_drift
    from nsrl.ntk.lazy import relative_weight_change as relative_weight_change
    from nsrl.ntk.random_functions import RandomFunctionModel as RandomFunctionModel
    from nsrl.ntk.random_functions import fourier_functions as fourier_functions
    from nsrl.ntk.random_functions import random_function_kernel as random_function_kernel
    from nsrl.ntk.regression import NadarayaWatson as NadarayaWatson
    from nsrl.ntk.regression import NTKClassifier as NTKClassifier
    from nsrl.ntk.regression import NTKPrincipalComponents as NTKPrincipalComponents
    from nsrl.ntk.regression import NTKRegressor as NTKRegressor
    from nsrl.ntk.slopes import Slope as Slope
    from nsrl.ntk.slopes import fit_slope as fit_slope
    from nsrl.ntk.sweeps import ScalePoint as ScalePoint
    from nsrl.ntk.sweeps import WidthPoint as WidthPoint
    from nsrl.ntk.sweeps import scale_sweep as scale_sweep
    from nsrl.ntk.sweeps import width_sweep as width_sweep
    from nsrl.ntk.training import Trajectory as Trajectory
    from nsrl.ntk.training import descend as descend

_names, _load = lazily(
    __name__,
    {
        "nsrl.ntk.dynamics": "OutputDynamics kernel_descent",
        "nsrl.ntk.fourier": "FourierFeatures frequency_spectrum",
        "nsrl.ntk.infinite": "InfiniteNetwork",
        "nsrl.ntk.kernels": "Tile empirical_ntk ntk_tiles",
        "nsrl.ntk.lazy": "Laziness ScaledModel kappa kernel_drift relative_weight_change",
        "nsrl.ntk.functions": "LinearizedModel linearize",
        "nsrl.ntk.random_functions": "RandomFunctionModel fourier_functions random_function_kernel",
        "nsrl.ntk.regression": "NTKClassifier NTKPrincipalComponents NTKRegressor NadarayaWatson",
        "nsrl.ntk.slopes": "Slope fit_slope",
        "nsrl.ntk.sweeps": "ScalePoint WidthPoint scale_sweep width_sweep",
        "nsrl.ntk.training": "Trajectory descend",
    },
)
__all__ = [*_names]


def __getattr__(name: str) -> Any:
    try:
        return _load(name)
    except ModuleNotFoundError as missing:
        if (missing.name or "").partition(".")[0] not in ("sklearn", "scipy"):
            raise
        raise NsrlError(f"nsrl.ntk.{name} needs {missing.name}; run pip install 'nsrl[analysis]'") from missing
