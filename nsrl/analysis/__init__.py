"""How an agent learns and forgets, seen through tangent kernels: spectra, forecasts, plasticity, attribution.

The bridge between `nsrl.ntk` and `nsrl.rl`: the one place of this package that knows what a policy is.
"""

from nsrl.analysis.attribution import Forgetting, ForgettingAttribution
from nsrl.analysis.behaviour import RetainedBehaviour, retained_behaviour
from nsrl.analysis.callback import KernelCallback
from nsrl.analysis.forecast import Forecast, forecast
from nsrl.analysis.ranking import RankAgreement, rank_agreement
from nsrl.analysis.study import Comparison, ForecastStudy, forecast_study
from nsrl.analysis.transitions import Transitions, collect_transitions

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
