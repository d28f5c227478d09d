"""Give an agent an input that tells it which task it is in, when the observations of two tasks look the same.

CartPole with swapped actions cannot be told from CartPole: no policy without memory is good at both. A context entry,
0 on the old task, opens the way; its weights are in the null space of the old behaviour exactly.
"""

import os

import gymnasium as gym
from stable_baselines3 import PPO
from stable_baselines3.common.env_util import make_vec_env

from nsrl import NullSpacePPO, RetentionBuffer
from nsrl.rl import agents
from nsrl.rl.surgery import add_context
from nsrl_envs import SwapActions, TaskContext

STEPS = int(os.environ.get("NSRL_EXAMPLE_STEPS", 60_000))


def old_task() -> gym.Env:
    return TaskContext(gym.make("CartPole-v1"), value=0.0)


def new_task() -> gym.Env:
    return TaskContext(SwapActions(gym.make("CartPole-v1")), value=1.0)


def main() -> None:
    # An agent that has never seen a context.
    envs = make_vec_env("CartPole-v1", 8, seed=0)
    narrow = PPO("MlpPolicy", envs, n_steps=128, batch_size=256, ent_coef=0.02, gamma=0.98, seed=0).learn(STEPS)
    print("before:", narrow.observation_space.shape, agents.evaluate(narrow, "CartPole-v1", episodes=10).mean)

    # One more input with zero weights: the same policy, whatever the context shows.
    agent = add_context(agents.load(narrow), size=1)
    print("after surgery:", agent.model.observation_space.shape, agents.evaluate(agent, old_task(), episodes=10).mean)

    buffer = RetentionBuffer.collect(agent, old_task(), n_states=512, seed=0)
    model = NullSpacePPO.from_pretrained(
        agent, make_vec_env(new_task, 8, seed=0), retain=buffer, kl_budget=0.01, learning_rate=1e-3, seed=0
    )
    model.learn(STEPS)

    for name, env in {"old task": old_task(), "new task": new_task()}.items():
        print(f"{name}: return {agents.evaluate(model, env, episodes=10).mean:.0f}")
    print(f"KL on the buffer: {model.retention_report().kl_mean:.2e} nats")


if __name__ == "__main__":
    main()
