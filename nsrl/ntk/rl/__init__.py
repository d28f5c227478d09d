"""How an agent learns and forgets, seen through tangent kernels: spectra, forecasts, plasticity, attribution.

The bridge between `nsrl.ntk` and `nsrl.rl`: the one place of this package that knows what a policy is.
"""

from nsrl.ntk.rl.attribution import Forgetting, ForgettingAttribution
from nsrl.ntk.rl.behaviour import RetainedBehaviour, retained_behaviour
from nsrl.ntk.rl.callback import KernelCallback
from nsrl.ntk.rl.forecast import Forecast, forecast
from nsrl.ntk.rl.study import ForecastStudy, forecast_study
from nsrl.ntk.rl.transitions import Transitions, collect_transitions

__all__ = [
    "Forecast",
    "ForecastStudy",
    "Forgetting",
    "ForgettingAttribution",
    "KernelCallback",
    "RetainedBehaviour",
    "Transitions",
    "collect_transitions",
    "forecast",
    "forecast_study",
    "retained_behaviour",
]
