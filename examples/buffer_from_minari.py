"""Retain what a Minari data set shows: clone it, label its states, fine-tune. Needs the extra `minari`.

The data set is made here, in the current folder; one of your own, or of `minari download`, goes by its id.
"""

import os
import sys
from pathlib import Path

import gymnasium as gym
import numpy as np

from nsrl import NullSpacePPO, RetentionBuffer
from nsrl.rl.retention import clone

STEPS = int(os.environ.get("NSRL_EXAMPLE_STEPS", 20_000))


def recorded(folder: Path, episodes: int) -> Path:
    """Pendulum episodes of a hand-written swing-up controller, as a Minari data set; its folder."""
    os.environ["MINARI_DATASETS_PATH"] = str(folder)
    import minari
    from minari.data_collector import EpisodeBuffer

    env, buffers = gym.make("Pendulum-v1"), []
    for episode in range(episodes):
        seen, actions, rewards = [env.reset(seed=episode)[0]], [], []
        for _ in range(env.spec.max_episode_steps):
            cosine, sine, velocity = seen[-1]
            # Energy pumping below, proportional-derivative control near the top.
            force = -8.0 * sine - 2.0 * velocity if cosine > 0.8 else 2.0 * velocity
            actions.append(np.array([np.clip(force, -2.0, 2.0)], np.float32))
            state, reward, *_ = env.step(actions[-1])
            seen.append(state)
            rewards.append(reward)
        ends = [False] * (len(actions) - 1) + [True]
        buffers.append(EpisodeBuffer(episode, None, None, seen, actions, rewards, [False] * len(actions), ends))
    about = dict.fromkeys(("algorithm_name", "author", "author_email", "code_permalink", "description"), "example")
    minari.create_dataset_from_buffers("pendulum/swing_up-v0", buffers, env=env.spec, eval_env=env.spec, **about)
    env.close()
    return folder / "pendulum" / "swing_up-v0"


def main() -> None:
    try:
        import minari  # noqa: F401
    except ImportError:
        sys.exit('This example needs the package minari: pip install "nsrl[minari]"')
    dataset = recorded(Path.cwd() / "datasets", episodes=max(2, min(50, STEPS // 500)))

    # Data come without an agent: behaviour cloning makes a stock PPO agent.
    agent, report = clone(dataset, epochs=10)
    print(
        f"log-likelihood of an action: {report.log_likelihood:.2f}, held out {report.heldout_log_likelihood:.2f} nats"
    )

    buffer = RetentionBuffer.from_minari(dataset, agent, n_states=256)
    model = NullSpacePPO.from_pretrained(agent, "Pendulum-v1", retain=buffer, kl_budget=0.05, n_envs=4, n_steps=128)
    model.learn(STEPS)
    print(f"KL on the states of the data: {model.retention_report().kl_mean:.2e} of 0.05 nats")


if __name__ == "__main__":
    main()
