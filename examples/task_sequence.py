"""Three tasks one after the other: after each, its states join those on which behaviour is kept.

The same as `nsrl finetune --config` with a file of tasks; interrupted, `nsrl finetune --resume FOLDER` goes on.
"""

import os

from nsrl.runs.config import BufferSettings, EvaluationSettings, PretrainConfig
from nsrl.runs.hyperparameters import PPOOverrides, PPOSettings
from nsrl.runs.sequences import SequenceConfig, SequenceTask, learn_sequence
from nsrl_envs import SEQUENCES

STEPS = int(os.environ.get("NSRL_EXAMPLE_STEPS", 60_000))
EPISODES = 20


def main() -> None:
    # Each task may have a budget of its own; low and high make returns comparable.
    tasks = [
        SequenceTask(env, total_timesteps=STEPS, kl_budget=0.01, low=0.0, high=500.0)
        for env in SEQUENCES["cartpole_trio"].tasks
    ]
    config = SequenceConfig(
        tasks=tasks,
        pretraining=PretrainConfig(ppo=PPOSettings(n_steps=128, batch_size=256, ent_coef=0.02, gamma=0.98)),
        states=BufferSettings(n_states=512),
        ppo=PPOOverrides(learning_rate=1e-3),
        evaluation=EvaluationSettings(every=STEPS, episodes=2, final_episodes=EPISODES),
    )
    outcome = learn_sequence(config, "sequence")

    print((outcome.folder.path / "report.md").read_text(encoding="utf-8"))
    print("everything is in", outcome.folder.path)


if __name__ == "__main__":
    main()
