"""A pytest plugin for Stable-Baselines3's own tests: NullSpacePPO in the place of PPO (see CONTRIBUTING.md).

Without a buffer it is PPO, bit for bit; upstream's tests say whether it is in everything that they look at.
"""

import stable_baselines3
from stable_baselines3 import ppo

from nsrl import NullSpacePPO

stable_baselines3.PPO = NullSpacePPO
ppo.PPO = NullSpacePPO
