"""A retention buffer from states that you have logged, labelled by the agent or with recorded outputs.

For robots whose old task cannot be played again, or states that matter and are rarely visited.
"""

import os

import numpy as np
import torch
from gymnasium import spaces
from stable_baselines3 import PPO
from stable_baselines3.common.env_util import make_vec_env

from nsrl import NullSpacePPO, RetentionBuffer

STEPS = int(os.environ.get("NSRL_EXAMPLE_STEPS", 40_000))
OLD, NEW = "nsrl/Pendulum-v0", "nsrl/PendulumReversed-v0"


def logged_states(count: int, seed: int = 0) -> np.ndarray:
    """What a log might hold: (count, 4), cosine and sine of the angle, its velocity, and the context 0."""
    rng = np.random.default_rng(seed)
    angle, velocity = rng.uniform(-np.pi, np.pi, count), rng.uniform(-8.0, 8.0, count)
    return np.stack([np.cos(angle), np.sin(angle), velocity, np.zeros(count)], axis=1).astype(np.float32)


def main() -> None:
    agent = PPO("MlpPolicy", make_vec_env(OLD, 4, seed=0), n_steps=256, batch_size=128, gamma=0.95, seed=0)
    agent.learn(STEPS)
    states = logged_states(600)

    # Upright states count three times as much.
    weights = np.where(states[:, 0] > 0.8, 3.0, 1.0)
    buffer = RetentionBuffer.from_arrays(states, agent, weights=weights, task="log")
    print(buffer)

    # The same without the agent: means and standard deviations as they were recorded.
    with torch.no_grad():
        recorded = agent.policy.get_distribution(torch.as_tensor(states)).distribution
    again = RetentionBuffer.from_arrays(
        states,
        outputs=recorded.mean.numpy(),
        log_std=recorded.stddev[0].log().numpy(),
        action_space=spaces.Box(-2.0, 2.0, (1,), np.float32),
        observation_space=agent.observation_space,
        weights=weights,
    )
    print("largest difference of the outputs:", float(np.abs(buffer.outputs - again.outputs).max()))

    # Only the mean is kept: exploration on the new task is free.
    model = NullSpacePPO.from_pretrained(agent, NEW, retain=buffer, kl_budget=0.05, preserve="mode", n_envs=4, seed=0)
    model.learn(STEPS)
    print(f"KL on the logged states: {model.retention_report().kl_mean:.2e} of 0.05 nats")


if __name__ == "__main__":
    main()
