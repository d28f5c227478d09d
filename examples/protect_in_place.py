"""Put a KL budget around the model of an existing script, in place: PPO, A2C, TRPO or MaskablePPO.

Here a VecNormalize is around the environments, as in many scripts: `protect` freezes its observation statistics, for
while they move, the policy's map from raw observations to actions moves too.
"""

import os

from stable_baselines3 import A2C
from stable_baselines3.common.env_util import make_vec_env
from stable_baselines3.common.vec_env import VecNormalize

from nsrl import RetentionBuffer, protect
from nsrl.rl import agents

STEPS = int(os.environ.get("NSRL_EXAMPLE_STEPS", 60_000))
OLD, NEW = "nsrl/CartPole-v0", "nsrl/CartPoleSwapped-v0"


def main() -> None:
    # What a script has: a model that learns a task.
    envs = VecNormalize(make_vec_env(OLD, 8, seed=0))
    model = A2C("MlpPolicy", envs, n_steps=16, ent_coef=0.02, seed=0, device="cpu")
    model.learn(STEPS)

    # What it does there, before it learns anything else.
    buffer = RetentionBuffer.collect(model, OLD, n_states=512, seed=0)

    # The new task, seen through the same statistics; rewards get fresh ones.
    model = agents.attach_env(agents.load(model), make_vec_env(NEW, 8, seed=1))

    # The one line. Optimizer state, callbacks and logger stay the model's own.
    protect(model, retain=buffer, kl_budget=0.02)
    model.learn(STEPS)

    report = model.retention_report()
    print(f"{type(model).__name__} made {report.updates} updates; KL {report.kl_mean:.2e} of {report.budget} nats")
    print(f"it fell back {report.rollbacks} times; retention took {report.overhead_fraction:.0%} of the time")
    agents.export(model, "exported/agent.zip")  # stock A2C, its vecnormalize.pkl beside it
    agent = agents.load("exported/agent.zip")
    for task in (OLD, NEW):
        print(f"{task}: return {agents.evaluate(agent, task, episodes=10).mean:.0f}")


if __name__ == "__main__":
    main()
