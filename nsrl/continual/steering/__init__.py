"""What keeps a KL budget from step to step: dual variables, an alarm, and a small way back."""

from nsrl.continual.steering.alarm import Alarm
from nsrl.continual.steering.correction import shortest_correction
from nsrl.continual.steering.multipliers import Multipliers

__all__ = ["Alarm", "Multipliers", "shortest_correction"]
