"""What constraints and runs cost: forecast before anything is made, and measured."""

from nsrl.bench.cost.constraints import measure_costs
from nsrl.bench.cost.runs import measure_runs

__all__ = [
    "measure_costs",
    "measure_runs",
]
