"""From an rl-zoo3 run folder to a fine-tuned agent and back into the folder, where rl-zoo3's scripts can play it.

The first run is made here in rl-zoo3's layout; rl-zoo3 itself need not be installed.
"""

import os
from pathlib import Path

from stable_baselines3 import PPO
from stable_baselines3.common.env_util import make_vec_env
from stable_baselines3.common.vec_env import VecNormalize

from nsrl import NullSpacePPO, RetentionBuffer
from nsrl.rl import agents
from nsrl.rl.agents import rl_zoo

STEPS = int(os.environ.get("NSRL_EXAMPLE_STEPS", 60_000))
OLD, NEW = "nsrl/CartPole-v0", "nsrl/CartPoleSwapped-v0"


def main() -> None:
    # logs/ppo/nsrl-CartPole-v0_1/: the agent, its VecNormalize statistics, config.yml and args.yml.
    envs = VecNormalize(make_vec_env(OLD, 8, seed=0))
    learner = PPO("MlpPolicy", envs, n_steps=128, batch_size=256, ent_coef=0.02, gamma=0.98, seed=0).learn(STEPS)
    rl_zoo.export_run(learner, "logs", OLD)

    # The folder of a run is enough: the statistics that belong to the zip are found.
    run = Path("logs/ppo/nsrl-CartPole-v0_1")
    agent = agents.load(run)
    print(f"loaded {agent.path}, normalised: {agent.normalizer is not None}")
    print(f"return on {OLD}: {agents.evaluate(agent, OLD, episodes=10).mean:.0f}")

    buffer = RetentionBuffer.collect(agent, OLD, n_states=512, seed=0)
    model = NullSpacePPO.from_pretrained(run, NEW, retain=buffer, kl_budget=0.01, n_envs=8, learning_rate=1e-3, seed=0)
    model.learn(STEPS)

    zipped = rl_zoo.export_run(model, "logs", NEW)
    print("written:", *sorted(str(file) for file in zipped.parent.rglob("*") if file.is_file()), sep="\n  ")
    print(f"play it: rl_zoo3 enjoy --folder logs --algo ppo --env {NEW} --gym-packages nsrl_envs")


if __name__ == "__main__":
    main()
