"""Surgery: more actions and more inputs for a pretrained agent that goes on doing what it did.

An old buffer is widened with the agent, so that the budget holds through the surgery.
"""

import os

import gymnasium as gym
import numpy as np
from gymnasium import spaces
from stable_baselines3 import PPO
from stable_baselines3.common.env_util import make_vec_env

from nsrl import NullSpacePPO, RetentionBuffer
from nsrl.rl.surgery import add_actions, widen_buffer, widen_observation

STEPS = int(os.environ.get("NSRL_EXAMPLE_STEPS", 60_000))
MARGIN = 5.0
ONE = np.float32(1.0)


class Coasting(gym.Wrapper):
    """CartPole with a third action, no push, and a fifth input, the pole's last change of angle."""

    def __init__(self) -> None:
        super().__init__(gym.make("CartPole-v1"))
        old = self.observation_space
        self.action_space = spaces.Discrete(3)
        self.observation_space = spaces.Box(np.append(old.low, -ONE), np.append(old.high, ONE))

    def reset(self, **options):
        self._seen, info = self.env.reset(**options)
        return np.append(self._seen, np.float32(0.0)), info

    def step(self, action):
        cart = self.unwrapped
        force, cart.force_mag = cart.force_mag, 0.0 if action == 2 else cart.force_mag
        seen, *rest = self.env.step(min(int(action), 1))
        cart.force_mag = force
        change, self._seen = seen[2] - self._seen[2], seen
        return np.append(seen, np.float32(change)), *rest


def main() -> None:
    envs = make_vec_env("CartPole-v1", 8, seed=0)
    old = PPO("MlpPolicy", envs, n_steps=128, batch_size=256, ent_coef=0.02, gamma=0.98, seed=0).learn(STEPS)
    buffer = RetentionBuffer.collect(old, "CartPole-v1", n_states=512, seed=0)

    wider, report = add_actions(old, 1, margin=MARGIN, buffer=buffer)
    print(f"a third action: KL {report.kl_mean:.1e}, at most {report.kl_bound:.1e} nats on any state")
    agent = widen_observation(wider, Coasting().observation_space)
    buffer = widen_buffer(buffer, agent, margin=MARGIN)  # the new input is 0 on the old states

    envs = make_vec_env(Coasting, 8, seed=0)
    model = NullSpacePPO.from_pretrained(agent, envs, retain=buffer, kl_budget=0.01, seed=0).learn(STEPS)
    print(f"KL after fine-tuning: {model.retention_report().kl_mean:.1e} of 0.01 nats")


if __name__ == "__main__":
    main()
