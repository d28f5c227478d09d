"""What a comparison of continual-learning strategies rests on: tuning by one rule, and a promise that is measured."""

from nsrl.bench.continual.promise import plan_promise
from nsrl.bench.continual.tuning import plan_tuning, run_tuning

__all__ = ["plan_promise", "plan_tuning", "run_tuning"]
