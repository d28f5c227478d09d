"""A policy that is a transformer: pretrained by stock PPO, fine-tuned on a new task by NullSpacePPO inside a KL budget.

The policy sees the last observations as a sequence. The old task is CartPole, the new one has a pole of another length.
"""

import os

import gymnasium
import torch
from stable_baselines3 import PPO

import nsrl_envs  # noqa: F401  registers the tasks
from nsrl import NullSpacePPO, RetentionBuffer
from nsrl.editing.post_training.sequence_policy import SequenceExtractor

STEPS = int(os.environ.get("NSRL_EXAMPLE_STEPS", 20_000))


def stacked(name: str) -> gymnasium.Env:
    return gymnasium.wrappers.FrameStackObservation(gymnasium.make(name), 4)


if __name__ == "__main__":
    torch.set_num_threads(1)
    policy = {"features_extractor_class": SequenceExtractor, "features_extractor_kwargs": {"features_dim": 16}}
    agent = PPO("MlpPolicy", stacked("nsrl/CartPole-v0"), n_steps=256, learning_rate=1e-3, policy_kwargs=policy, seed=0)
    agent.learn(STEPS)
    buffer = RetentionBuffer.collect(agent, stacked("nsrl/CartPole-v0"), n_states=256, seed=0)
    model = NullSpacePPO.from_pretrained(
        agent, stacked("nsrl/CartPoleSwapped-v0"), retain=buffer, kl_budget=0.01, n_steps=256, seed=0
    )
    model.learn(STEPS)
    report = model.retention_report()
    print(f"KL on what it did before: {report.kl_mean:.4f} of 0.01 nats, agreement {report.agreement:.3f}")
