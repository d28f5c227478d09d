"""How an agent learns and forgets, seen through tangent kernels: spectra, forecasts, plasticity, attribution.

The bridge between `nsrl.ntk` and `nsrl.rl`: the one place of this package that knows what a policy is.
"""

from nsrl.ntk.rl.attribution import Forgetting, ForgettingAttribution
from nsrl.ntk.rl.behaviour import RetainedBehaviour, retained_behaviour
from nsrl.ntk.rl.callback import KernelCallback
from nsrl.ntk.rl.forecast import Forecast, forecast
from nsrl.ntk.rl.ranking import RankAgreement, rank_agreement
from nsrl.ntk.rl.study import Comparison, ForecastStudy, forecast_study
from nsrl.ntk.rl.transitions import Transitions, collect_transitions

__all__ = [
    "Comparison",
    "Forecast",
    "ForecastStudy",
    "Forgetting",
    "ForgettingAttribution",
    "KernelCallback",
    "RankAgreement",
    "RetainedBehaviour",
    "Transitions",
    "collect_transitions",
    "forecast",
    "forecast_study",
    "rank_agreement",
    "retained_behaviour",
]
