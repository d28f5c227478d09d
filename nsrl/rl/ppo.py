"""NullSpacePPO: PPO that learns a new task inside a KL budget on an old one."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any

from stable_baselines3 import PPO

from nsrl.rl.config import RetentionConfig
from nsrl.rl.protected import ProtectedMixin, build_config

if TYPE_CHECKING:
    from nsrl.rl.buffer import RetentionBuffer

RETENTION_FIELDS = frozenset(RetentionConfig.__dataclass_fields__) - {"seed"}


class NullSpacePPO(ProtectedMixin, PPO):
    """Proximal policy optimisation under a retention constraint.

    Solves `min L_new(theta) subject to mean_s KL(pi_ref(.|s) || pi_theta(.|s)) <= kl_budget` over the states s of a
    retention buffer, and keeps it: after every update the KL is measured on the whole buffer and, where it is over,
    restored. Without a buffer it is stock PPO, bit for bit.

        model = NullSpacePPO.from_pretrained("expert.zip", env=new_env, retain=buffer, kl_budget=0.01)
        model.learn(600_000, progress_bar=True)
        print(model.retention_report())
        model.export("finetuned.zip")          # a stock zip: stable_baselines3.PPO.load just works

    Saved zips are stock PPO zips too; the constraint is not in them (see `nsrl.rl.checkpoint` for resuming a run).
    """

    @classmethod
    def from_pretrained(
        cls,
        agent: Any,
        env: Any,
        retain: RetentionBuffer | None = None,
        kl_budget: float = 0.01,
        *,
        method: str = "null_space",
        penalty: float = 1.0,
        tensorboard_log: str | None = None,
        trust: bool = False,
        trust_buffer: bool = False,
        normalize: bool = True,
        n_envs: int = 1,
        seed: int | None = None,
        device: str = "cpu",
        verbose: int = 0,
        **options: Any,
    ) -> NullSpacePPO:
        """Take over a pretrained agent for fine-tuning.

        Actor and critic weights and the PPO hyper-parameters are the agent's; the optimizer is fresh (old Adam moments
        would push along the old task's momentum).

        Args:
            agent: path of an SB3 zip, of a run folder with VecNormalize statistics, or a loaded SB3 model.
            env: the new task: an environment id, a gymnasium environment or an SB3 VecEnv. When the agent was trained
                with VecNormalize, a bare environment is wrapped with its observation statistics frozen and fresh
                reward statistics.
            retain: buffer of old-task states; None fine-tunes plainly.
            kl_budget: nats per state.
            method: "null_space", or a baseline through the same loop: "kl_penalty" (coefficient `penalty`) or
                "finetune" (the KL is only measured).
            penalty: coefficient of the KL penalty.
            trust: allow unpickling objects inside the zip.
            trust_buffer: accept a buffer that was made with another policy.
            normalize: wrap `env` as above when the agent has statistics.
            n_envs: copies of the environment, when `env` is an id.
            seed: of the fine-tuning run, and of the draws from the buffer.
            options: fields of `RetentionConfig` and keyword arguments of PPO, which override the agent's.

        Raises:
            NsrlError: unreadable agent, spaces that differ, a foreign or damaged buffer, a bad budget or option.
        """
        from nsrl.rl import agents

        retention = {key: options.pop(key) for key in list(options) if key in RETENTION_FIELDS}
        config = build_config(kl_budget=kl_budget, seed=seed or 0, **retention)
        source = agents.load(agent, trust=trust, device=device)
        settings = {**source.hyperparameters, **options}
        policy_kwargs = dict(settings.pop("policy_kwargs", source.model.policy_kwargs))
        if not isinstance(source.model, PPO):
            # A2C's RMSprop and its five-step rollouts are not PPO's.
            for key in ("optimizer_class", "optimizer_kwargs"):
                policy_kwargs.pop(key, None)
        env = agents.training_env(env, source.normalizer if normalize else None, seed=seed,
                                  gamma=settings.get("gamma", 0.99), n_envs=n_envs)  # fmt: skip
        agents.check_spaces(source.model, env)
        policy: Any = source.model.policy_class
        model = cls(policy, env, policy_kwargs=policy_kwargs, tensorboard_log=tensorboard_log,
                    seed=seed, device=device, verbose=verbose, **settings)  # fmt: skip
        model.policy.load_state_dict(source.model.policy.state_dict())
        if retain is not None:
            model.constrain(retain, config, trust_buffer=trust_buffer, method=method, penalty=penalty)
        return model

    def export(self, path: str | Path) -> Path:
        """Write a stock SB3 zip (atomically); `stable_baselines3.PPO.load(path)` acts identically.

        When the environment is VecNormalize-wrapped, its statistics are written beside it as `vecnormalize.pkl`.
        """
        from nsrl.rl import agents

        return agents.export(self, path)
