"""Strategies of supervised continual learning, by name."""

from __future__ import annotations

from dataclasses import dataclass, fields
from typing import Any

from torch import nn

from nsrl.continual.budget_options import KLBudgetOptions
from nsrl.continual.features import FeatureOptions
from nsrl.continual.optimizers import OptimizerConfig
from nsrl.continual.strategies.base import Strategy
from nsrl.continual.strategies.der import DER, DEROptions, DERPlusPlus, DERPlusPlusOptions
from nsrl.continual.strategies.ewc import EWC, EWCOptions
from nsrl.continual.strategies.features import FeatureStrategy
from nsrl.continual.strategies.gpm import GPM, SGP, GPMOptions, SGPOptions
from nsrl.continual.strategies.kl_budget import CombinedOptions, CombinedStrategy, KLBudgetStrategy
from nsrl.continual.strategies.naive import Joint, JointOptions, Naive, NoOptions
from nsrl.continual.strategies.nscl import AdamNSCL, AdamNSCLOptions, OfficialAdamNSCL, OfficialAdamNSCLOptions
from nsrl.continual.strategies.ogd import OGD, OGDOptions
from nsrl.continual.strategies.replay import AGEM, ExperienceReplay, ReplayOptions
from nsrl.continual.strategies.trgp import TRGP, TRGPOptions
from nsrl.errors import NsrlError

__all__ = ["STRATEGIES", "Entry", "OptimizerConfig", "Strategy", "build_strategy"]


@dataclass(frozen=True)
class Entry:
    """A strategy and the frozen dataclass of its options.

    Attributes:
        strategy: called with (model, optimizer, options).
        options: its fields are what `build_strategy` takes.
    """

    strategy: type[Strategy]
    options: type


STRATEGIES: dict[str, Entry] = {
    "naive": Entry(Naive, NoOptions),
    "joint": Entry(Joint, JointOptions),
    "ewc": Entry(EWC, EWCOptions),
    "agem": Entry(AGEM, ReplayOptions),
    "er": Entry(ExperienceReplay, ReplayOptions),
    "der": Entry(DER, DEROptions),
    "derpp": Entry(DERPlusPlus, DERPlusPlusOptions),
    "ogd": Entry(OGD, OGDOptions),
    "gpm": Entry(GPM, GPMOptions),
    "sgp": Entry(SGP, SGPOptions),
    "trgp": Entry(TRGP, TRGPOptions),
    "adam_nscl": Entry(AdamNSCL, AdamNSCLOptions),
    "adam_nscl_official": Entry(OfficialAdamNSCL, OfficialAdamNSCLOptions),
    "kl_budget": Entry(KLBudgetStrategy, KLBudgetOptions),
    "features": Entry(FeatureStrategy, FeatureOptions),
    "combined": Entry(CombinedStrategy, CombinedOptions),
}


def build_strategy(name: str, model: nn.Module, optimizer: OptimizerConfig | None = None, **options: Any) -> Strategy:
    """A strategy by name.

    Args:
        name: one of `STRATEGIES`.
        model: trained in place.
        optimizer: of every task.
        options: fields of the strategy's options.

    Raises:
        NsrlError: an unknown name or option.
    """
    if name not in STRATEGIES:
        raise NsrlError(f"there is no strategy {name!r}; choose one of {', '.join(STRATEGIES)}")
    entry = STRATEGIES[name]
    known = [field.name for field in fields(entry.options)]
    unknown = sorted(set(options) - set(known))
    if unknown:
        raise NsrlError(
            f"the strategy {name!r} has no option {', '.join(unknown)}; it has {', '.join(known) or 'none at all'}"
        )
    build: Any = entry.strategy
    return build(model, optimizer, entry.options(**options))
