"""An agent as it lies on the Hugging Face hub: which files, how it is found, and that loading it runs nothing.

Without arguments everything happens in a local folder of the hub's layout. With an address the hub is asked, which
needs a connection and the extra `hub`:

    python examples/hub_agent.py hf://sb3/ppo-CartPole-v1/ppo-CartPole-v1.zip CartPole-v1
"""

import os
import sys
from pathlib import Path

from stable_baselines3 import PPO
from stable_baselines3.common.env_util import make_vec_env
from stable_baselines3.common.vec_env import VecNormalize

from nsrl import RetentionBuffer
from nsrl.rl import agents

STEPS = int(os.environ.get("NSRL_EXAMPLE_STEPS", 40_000))


def repository(folder: Path, env: str) -> Path:
    """What a repository of an SB3 agent holds: the zip, and its VecNormalize statistics beside it."""
    envs = VecNormalize(make_vec_env(env, 8, seed=0))
    model = PPO("MlpPolicy", envs, n_steps=128, batch_size=256, gamma=0.98, seed=0).learn(STEPS)
    folder.mkdir(exist_ok=True)
    model.save(folder / "ppo-CartPole-v1.zip")
    envs.save(str(folder / "vec_normalize.pkl"))
    return folder / "ppo-CartPole-v1.zip"


def main(source: str | None = None, env: str = "CartPole-v1") -> None:
    source = source or str(repository(Path("repository"), env))

    # Neither the zip's pickles nor the statistics' are unpickled: both are read as data. `trust=True` would run them.
    agent = agents.load(source, env=make_vec_env(env, 1))
    print(f"{agent.path}: a {type(agent.model).__name__}, normalised: {agent.normalizer is not None}")
    print("at their defaults, since they exist only pickled:", ", ".join(agent.untrusted) or "none")
    print("fingerprint of the weights:", agents.fingerprint(agent.model.policy)[:16])

    print(f"return on {env}: {agents.evaluate(agent, env, episodes=5).mean:.0f}")
    buffer = RetentionBuffer.collect(agent, env, n_states=256, seed=0)
    buffer.save("buffer.npz")
    print(RetentionBuffer.load("buffer.npz"))


if __name__ == "__main__":
    main(*sys.argv[1:])
