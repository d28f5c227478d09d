"""A pytest plugin for upstream's own tests: NullSpacePPO in the place of PPO, NullSpaceTRPO in that of TRPO.

Without a buffer they are the stock algorithms, bit for bit; the tests of Stable-Baselines3 and sb3-contrib say whether
they are in everything that upstream looks at (see CONTRIBUTING.md).
"""

import sb3_contrib
import stable_baselines3
from sb3_contrib import trpo
from stable_baselines3 import ppo

from nsrl import NullSpacePPO, NullSpaceTRPO

stable_baselines3.PPO = NullSpacePPO
ppo.PPO = NullSpacePPO
sb3_contrib.TRPO = NullSpaceTRPO
trpo.TRPO = NullSpaceTRPO
