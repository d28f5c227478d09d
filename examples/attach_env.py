"""Fine-tune an agent that has to keep its own algorithm: MaskablePPO here, whose action masks no other would apply."""

import os

import gymnasium as gym
import numpy as np
from sb3_contrib import MaskablePPO
from stable_baselines3.common.env_util import make_vec_env

from nsrl import RetentionBuffer, protect
from nsrl.rl import agents

STEPS = int(os.environ.get("NSRL_EXAMPLE_STEPS", 40_000))


class OneSided(gym.Wrapper):
    """CartPole where pushing outward is invalid near one edge of the track."""

    def __init__(self, edge: float):
        super().__init__(gym.make("CartPole-v1"))
        self.edge = edge

    def action_masks(self) -> np.ndarray:
        position = float(self.unwrapped.state[0])
        inward = 0 if self.edge > 0 else 1
        near = position > self.edge if self.edge > 0 else position < self.edge
        return np.array([not near or action == inward for action in (0, 1)])


def main() -> None:
    envs = make_vec_env(lambda: OneSided(1.0), 4, seed=0)
    MaskablePPO("MlpPolicy", envs, n_steps=128, batch_size=128, ent_coef=0.02, gamma=0.98, seed=0).learn(STEPS).save(
        "maskable"
    )

    # Masks are recorded with the states: only valid actions count in the KL.
    buffer = RetentionBuffer.collect("maskable", OneSided(1.0), n_states=512, seed=0)

    # A model with a new task, of whatever number of copies, ready for `protect` and `learn`.
    model = agents.attach_env("maskable", make_vec_env(lambda: OneSided(-0.5), 8, seed=0), seed=0)
    protect(model, retain=buffer, kl_budget=0.01)
    model.learn(STEPS)

    report = model.retention_report()
    print(f"{type(model).__name__}: KL {report.kl_mean:.2e} of {report.budget} nats, agreement {report.agreement:.1%}")
    for edge in (1.0, -0.5):
        print(f"edge {edge}: return {agents.evaluate(model, OneSided(edge), episodes=10).mean:.0f}")
    agents.export(model, "finetuned.zip")
    MaskablePPO.load("finetuned")


if __name__ == "__main__":
    main()
