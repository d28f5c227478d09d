"""Fine-tune an agent's zip on a new task while its old behaviour stays inside a KL budget.

The agent is made here; with one of your own, start at `RetentionBuffer.collect`. Files go to the current folder.
"""

import os

from stable_baselines3 import PPO
from stable_baselines3.common.env_util import make_vec_env

from nsrl import NullSpacePPO, RetentionBuffer
from nsrl.rl import agents

STEPS = int(os.environ.get("NSRL_EXAMPLE_STEPS", 60_000))
EPISODES = 20
OLD, NEW = "nsrl/CartPole-v0", "nsrl/CartPoleSwapped-v0"


def main() -> None:
    # The entropy bonus keeps the policy soft enough to learn something else later.
    expert = PPO(
        "MlpPolicy", make_vec_env(OLD, 8, seed=0), n_steps=128, batch_size=256, ent_coef=0.02, gamma=0.98, seed=0
    )
    expert.learn(STEPS).save("expert.zip")

    # States that the agent visits on its own task, with what it does there.
    buffer = RetentionBuffer.collect("expert.zip", OLD, n_states=2048, seed=0)
    buffer.save("buffer.npz")

    # The agent's hyper-parameters are taken over; keyword arguments change single ones.
    model = NullSpacePPO.from_pretrained(
        "expert.zip", env=NEW, retain=buffer, kl_budget=0.01, n_envs=8, learning_rate=1e-3, seed=0
    )
    model.learn(STEPS)

    report = model.retention_report()
    print(f"KL on the buffer {report.kl_mean:.2e} of {report.budget} nats, on held-out states {report.kl_heldout:.2e}")
    print(f"same action on {report.agreement:.1%} of the states; {report.restored} updates were restored")
    for task in (OLD, NEW):
        before, after = (agents.evaluate(agent, task, episodes=EPISODES).mean for agent in ("expert.zip", model))
        print(f"{task}: return {before:.0f} before, {after:.0f} after")

    # A stock zip: whoever loads it does not need nsrl.
    model.export("finetuned.zip")
    PPO.load("finetuned.zip", env=make_vec_env(NEW, 1))


if __name__ == "__main__":
    main()
