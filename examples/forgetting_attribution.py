"""Which transitions of the new task made the policy forget at an old state: recorded while it learns.

Training is bit for bit the same with the recorder. The attribution is of every update, through all its minibatches.
"""

import os

from stable_baselines3 import PPO
from stable_baselines3.common.env_util import make_vec_env

from nsrl import NullSpacePPO, RetentionBuffer
from nsrl.analysis import ForgettingAttribution, retained_behaviour

STEPS = int(os.environ.get("NSRL_EXAMPLE_STEPS", 40_000))
OLD, NEW = "nsrl/CartPole-v0", "nsrl/CartPoleSwapped-v0"


def main() -> None:
    envs = make_vec_env(OLD, 4, seed=0)
    expert = PPO("MlpPolicy", envs, n_steps=128, batch_size=128, ent_coef=0.02, gamma=0.98, seed=0).learn(STEPS)
    buffer = RetentionBuffer.collect(expert, OLD, n_states=256, seed=0)

    # How much of the parameter space the old behaviour speaks for.
    spectrum = retained_behaviour(expert, buffer)
    print(f"the old states see {spectrum.spectrum.rank} of {spectrum.parameters} parameter directions")

    # Plain fine-tuning through the same loop; the KL is only measured.
    model = NullSpacePPO.from_pretrained(
        expert, NEW, retain=buffer, method="finetune", n_envs=4, n_epochs=4, learning_rate=1e-3, seed=0
    )
    # Adam's momentum is traced back over an update's 16 minibatches.
    watch = ForgettingAttribution(buffer, states=8, memory=16)
    model.learn(min(STEPS, 4 * 4 * 128), callback=watch)

    for update in watch.updates:
        state = int(update.kl.argmax())
        told = float(update.contributions[state].sum())
        print(f"update at {update.timesteps} steps: KL at state {state} by {float(update.kl[state]):+.2e} nats")
        print(f"  {told:+.2e} from transitions, the entropy bonus and the rest {float(update.rest[state]):+.2e}")
        for number, nats in update.top(state, count=3):
            env, step = divmod(number, model.n_steps)
            print(f"  environment {env}, step {step}: {nats:+.2e} nats")


if __name__ == "__main__":
    main()
