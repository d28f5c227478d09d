"""Taking a pretrained agent over for fine-tuning: what NullSpacePPO and NullSpaceTRPO have in common."""

from __future__ import annotations

import inspect
from difflib import get_close_matches
from pathlib import Path
from typing import TYPE_CHECKING, Any

from stable_baselines3.common.on_policy_algorithm import OnPolicyAlgorithm

from nsrl.errors import NsrlError
from nsrl.rl.agents.stock_models import stock_class
from nsrl.rl.algorithms.mixin import ProtectedMixin, build_config
from nsrl.rl.budget.config import RetentionConfig
from nsrl.rl.playing.action_masks import is_maskable

if TYPE_CHECKING:
    from typing_extensions import Self

    from nsrl.rl.agents.agent import Agent
    from nsrl.rl.retention.buffer import RetentionBuffer

RETENTION_FIELDS = frozenset(RetentionConfig.__dataclass_fields__) - {"seed"}


class PretrainedMixin(ProtectedMixin):
    """Adds `from_pretrained` and `export` to an algorithm with a retention constraint."""

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
    ) -> Self:
        """Take over a pretrained agent for fine-tuning.

        Actor and critic weights and the hyper-parameters that mean the same here are the agent's; the optimizer is
        fresh (old Adam moments would push along the old task's momentum).

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
            options: fields of `RetentionConfig` and keyword arguments of the algorithm, which override the agent's.

        Raises:
            NsrlError: unreadable agent, one that keeps its own algorithm (MaskablePPO), spaces that differ, a foreign
                or damaged buffer, a bad budget or option.
        """
        from nsrl.rl import agents

        retention = {key: options.pop(key) for key in list(options) if key in RETENTION_FIELDS}
        _check_options(cls, options)
        config = build_config(kl_budget=kl_budget, seed=seed or 0, **retention)
        source = agents.load(agent, trust=trust, device=device)
        if is_maskable(source.model.policy):
            raise NsrlError(
                f"{source.path or 'the agent'} is a {type(source.model).__name__}, whose action masks {cls.__name__} "
                "would not apply; keep its algorithm: model = nsrl.rl.agents.attach_env(agent, env), then "
                "protect(model, retain=buffer) and model.learn(...)"
            )
        settings = cls._inherited(source, options)
        policy_kwargs = dict(settings.pop("policy_kwargs") or {})
        env = agents.training_env(env, source.normalizer if normalize else None, seed=seed,
                                  gamma=settings.get("gamma", 0.99), n_envs=n_envs)  # fmt: skip
        agents.check_spaces(source.model, env)
        policy: Any = source.model.policy_class
        try:
            model: Any = cls(policy, env, policy_kwargs=policy_kwargs, tensorboard_log=tensorboard_log,
                             seed=seed, device=device, verbose=verbose, **settings)  # fmt: skip
        except AssertionError as error:  # SB3 checks its arguments with assertions
            raise NsrlError(f"{stock_class(cls).__name__} refuses its settings: {error}") from error
        try:
            model.policy.load_state_dict(source.model.policy.state_dict())
        except RuntimeError as error:
            raise NsrlError(
                f"policy_kwargs {policy_kwargs} makes another network than the agent's; leave net_arch and the like out"
            ) from error
        if retain is not None:
            model.constrain(retain, config, trust_buffer=trust_buffer, method=method, penalty=penalty)
        return model

    @classmethod
    def _inherited(cls, source: Agent, options: dict[str, Any]) -> dict[str, Any]:
        """Keyword arguments of the algorithm, `policy_kwargs` among them: the agent's, overridden by `options`."""
        raise NotImplementedError

    def export(self, path: str | Path) -> Path:
        """Write a zip of the stock algorithm (atomically), which its `load` reads and which acts identically.

        When the environment is VecNormalize-wrapped, its statistics are written beside it as `vecnormalize.pkl`.
        """
        from nsrl.rl import agents

        return agents.export(self, path)


def _check_options(algorithm: type[OnPolicyAlgorithm], options: dict[str, Any]) -> None:
    stock = stock_class(algorithm)
    known = [*inspect.signature(stock.__init__).parameters, *RETENTION_FIELDS]
    for key in options:
        if key not in known:
            near = get_close_matches(key, known, 1)
            hint = f"did you mean {near[0]}?" if near else "see RetentionConfig and the arguments of the algorithm"
            raise NsrlError(f"{key!r} is no setting of {stock.__name__} or of retention; {hint}")


def without_optimizer(policy_kwargs: dict[str, Any]) -> dict[str, Any]:
    """Arguments of a policy without its choice of an optimizer: A2C's RMSprop is no other algorithm's."""
    return {key: value for key, value in policy_kwargs.items() if key not in ("optimizer_class", "optimizer_kwargs")}
