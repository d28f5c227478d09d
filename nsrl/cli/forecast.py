"""`nsrl forecast`: what new texts would cost old ones."""

from __future__ import annotations

from collections.abc import Sequence

from nsrl.cli.command import read_arguments, teller
from nsrl.editing.commands.config import ForecastConfig

EXAMPLES = """\
  nsrl forecast --model MODEL --preserve old.txt --new new.txt --learning_rate 1e-5 --steps 10"""
ABOUT = """\
Say before any training what fine-tuning a causal language model of transformers on new texts would cost old ones: mean
KL(before || afterwards) in nats a token, first order, from gradients as they are now. It ranks better than it measures:
docs/editing.md has its calibration. Needs nsrl[llm]."""


def run(arguments: Sequence[str]) -> int:
    """Forecast, and print it.

    Raises:
        NsrlError: a bad command line, or as `forecast_texts`.
    """
    config, options = read_arguments(
        ForecastConfig, arguments, command="forecast", about=ABOUT, examples=EXAMPLES, kind="post_training"
    )
    from nsrl.editing.models import require_transformers

    require_transformers()
    from nsrl.editing.commands.forecast import forecast_texts, read_calibration

    calibration = None if config.calibration is None else read_calibration(config.calibration)
    found = forecast_texts(config, teller(options["progress"]))
    print(f"KL           {found.kl:.3g} nats a token, after {config.steps} steps")
    if calibration is not None and found.kl > 0.0:
        low, middle, high = calibration.expected(found.kl)
        print(
            f"measured     {middle:.3g} ({low:.3g} to {high:.3g}) is to be expected, by {calibration.runs} fine-tunings"
        )
    print(f"drift        {found.kl_drift:.3g}")
    print(f"noise        {found.kl_noise:.3g}")
    print(f"one step     {found.kl_step:.3g}")
    print(f"alignment    {found.alignment:.3g} (1: a random direction)")
    return 0
