"""How an agent learns and forgets, seen through tangent kernels: spectra, forecasts, plasticity, attribution.

The bridge between `nsrl.ntk` and `nsrl.rl`, which do not know each other.
"""

from nsrl.analysis.attribution import Forgetting, ForgettingAttribution
from nsrl.analysis.behaviour import BehaviourSpectrum, retained_behaviour
from nsrl.analysis.callback import KernelCallback
from nsrl.analysis.forecast import Forecast, forecast
from nsrl.analysis.ranking import RankAgreement, rank_agreement
from nsrl.analysis.study import Comparison, ForecastStudy, forecast_study
from nsrl.analysis.transitions import Transitions, collect_transitions

__all__ = [
    "BehaviourSpectrum",
    "Comparison",
    "Forecast",
    "ForecastStudy",
    "Forgetting",
    "ForgettingAttribution",
    "KernelCallback",
    "RankAgreement",
    "Transitions",
    "collect_transitions",
    "forecast",
    "forecast_study",
    "rank_agreement",
    "retained_behaviour",
]
