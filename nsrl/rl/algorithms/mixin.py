"""The mixin that puts a KL budget around any SB3 on-policy algorithm."""

from __future__ import annotations

import copy
import math
import warnings
from contextlib import nullcontext
from dataclasses import replace
from pathlib import Path
from time import perf_counter, time_ns
from typing import TYPE_CHECKING, Any

from stable_baselines3 import PPO
from stable_baselines3.common.on_policy_algorithm import OnPolicyAlgorithm
from stable_baselines3.common.policies import BasePolicy
from stable_baselines3.common.vec_env import VecNormalize
from torch import nn

from nsrl.errors import NsrlError, check_kind, described
from nsrl.reading.limits import Unreadable
from nsrl.rl.agents.agent import Agent, export, load
from nsrl.rl.agents.archive import check_model_file
from nsrl.rl.agents.normalization import ObservationNormalizer, freeze_observations, same_statistics
from nsrl.rl.agents.spaces import check_spaces
from nsrl.rl.agents.stock_models import MOVING, foreign_defaults, is_zero, left_behind, stock_class
from nsrl.rl.algorithms.critic import reset_critic
from nsrl.rl.algorithms.expansion import with_room
from nsrl.rl.algorithms.fused_update import fused_update
from nsrl.rl.algorithms.numbers import BROKEN, check_numbers, check_weights, is_no_number
from nsrl.rl.algorithms.options import RETENTION_FIELDS, build_config, check_options
from nsrl.rl.algorithms.report import RetentionReport
from nsrl.rl.algorithms.saved_constraint import SavedConstraint
from nsrl.rl.algorithms.value_scale import standardised_values
from nsrl.rl.budget.baselines import build_engine
from nsrl.rl.budget.config import RetentionConfig
from nsrl.rl.budget.engine import Retention
from nsrl.rl.opening.spread import ExplorationSpread
from nsrl.rl.parallel.agreement import check_agreement
from nsrl.rl.playing.environments import check_env, training_env
from nsrl.rl.playing.rollout import evaluation_mode
from nsrl.rl.policies.distributions import distribution_of, is_maskable
from nsrl.rl.policies.fused_forward import fused_forward
from nsrl.rl.policies.steadiness import ASKED, check_steady
from nsrl.rl.retention.buffer import RetentionBuffer
from nsrl.rl.retention.constraint import RetentionConstraint
from nsrl.rl.retention.promises import Promises

if TYPE_CHECKING:
    from typing_extensions import Self


#: What is this object's alone and in no zip.
UNSAVED = ("retention", "_learning_seconds", "_terms", "_loaded")


class ProtectedMixin(OnPolicyAlgorithm):
    """Adds a retention constraint to an SB3 on-policy algorithm; without one, the algorithm is bit for bit stock.

    It derives from `OnPolicyAlgorithm` so that it shares the memory layout of every algorithm: Python lets `protect`
    change a model's class only then.

    Attributes:
        retention: the engine, or None while nothing is protected.
        updates_in_eval_mode: whether batch normalisation and dropout are off in updates.
    """

    updates_in_eval_mode = False
    retention: Retention | None = None
    _learning_seconds: float = 0.0
    _terms: SavedConstraint | None = None
    _saved_constraint: str | None = None
    _loaded: bool = False

    @classmethod
    def from_pretrained(
        cls,
        agent: Any,
        env: Any,
        retain: RetentionBuffer | None = None,
        kl_budget: float = 0.01,
        *,
        config: RetentionConfig | None = None,
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
            config: all retention settings at once; or give `kl_budget` and single fields of `RetentionConfig`.
            method: "null_space", or a baseline through the same loop: "kl_penalty" (coefficient `penalty`) or
                "finetune" (the KL is only measured).
            penalty: coefficient of the KL penalty.
            trust: allow unpickling objects inside the zip.
            trust_buffer: accept a buffer that was made with another policy.
            normalize: wrap `env` as above when the agent has statistics.
            n_envs: copies of the environment, when `env` is an id.
            seed: of the fine-tuning run, and of the draws from the buffer where `config` does not say theirs.
            options: fields of `RetentionConfig` and keyword arguments of the algorithm, which override the agent's.

        Raises:
            NsrlError: unreadable agent, one that keeps its own algorithm (MaskablePPO), spaces that differ, a foreign
                or damaged buffer, a bad budget or option.
        """
        retention = {key: options.pop(key) for key in list(options) if key in RETENTION_FIELDS}
        given = {"tensorboard_log": tensorboard_log, "device": device, "verbose": verbose, "seed": seed}
        check_options(cls, {**options, **given})
        check_kind("config", config, (RetentionConfig, type(None)), "a RetentionConfig")
        if config is None:
            config = build_config(kl_budget=kl_budget, seed=seed or 0, **retention)
        elif retention:
            config = replace(config, **retention)
        source = load(agent, trust=trust, device=device)
        if is_maskable(source.model.policy):
            raise NsrlError(
                f"{source.path or 'the agent'} is a {type(source.model).__name__}, whose action masks {cls.__name__} "
                "would not apply; keep its algorithm: model = nsrl.rl.agents.attach_env(agent, env), then "
                "protect(model, retain=buffer) and model.learn(...)"
            )
        for name, why in left_behind(source.model, cls).items():
            if name not in options:
                warnings.warn(
                    f"{name} of {source.path or 'the agent'} is {why}; {cls.__name__} takes its default instead, "
                    f"give {name}=... for another",
                    stacklevel=2,
                )
        defaults = {k: v for k, v in foreign_defaults(source.model, cls).items() if k not in options}
        if defaults:
            theirs = stock_class(type(source.model)).__name__
            warnings.warn(
                f"{' and '.join(f'{name} {value}' for name, value in defaults.items())} of "
                f"{source.path or 'the agent'}: {theirs}'s default, which nobody chose; {cls.__name__} takes its own "
                "instead, give another by name",
                stacklevel=2,
            )
        added = 0
        check_kind("method", method, str, "the name of a method")
        if "policy_kwargs" not in options:
            opened = config.opening != "off" and (method == "null_space" or config.opening != "auto")
            source, added = with_room(source, retain, config, opened)
        settings = cls._inherited(source, options)
        policy_kwargs = dict(settings.pop("policy_kwargs") or {})
        env = training_env(
            env, source.normalizer if normalize else None, seed=seed, gamma=settings.get("gamma", 0.99), n_envs=n_envs
        )
        check_spaces(source.model, env)
        policy: Any = source.model.policy_class
        try:
            model: Any = cls(
                policy,
                env,
                policy_kwargs=policy_kwargs,
                tensorboard_log=tensorboard_log,
                seed=seed,
                device=device,
                verbose=verbose,
                **settings,
            )
        except (AssertionError, TypeError, ValueError) as error:  # SB3 asserts some of it, and runs into the rest
            raise NsrlError(f"{stock_class(cls).__name__} refuses its settings: {error}") from error
        try:
            model.policy.load_state_dict(source.model.policy.state_dict())
        except RuntimeError as error:
            raise NsrlError(
                f"policy_kwargs {policy_kwargs} makes another network than the agent's; leave net_arch and the like out"
            ) from error
        if retain is not None:
            model.constrain(retain, config, trust_buffer=trust_buffer, method=method, penalty=penalty)
            model.retention.opening.added = added
        return model

    def constrain(
        self,
        retain: RetentionBuffer,
        config: RetentionConfig,
        *,
        trust_buffer: bool = False,
        method: str = "null_space",
        penalty: float = 1.0,
    ) -> None:
        """Put the budget in force from the next update on.

        The observation statistics of a VecNormalize around the model's environment are frozen: while they move, the
        policy's map from raw observations to actions does too.

        Args:
            retain: the buffer; must have been made with this very policy unless `trust_buffer`.
            config: how the budget is kept.
            trust_buffer: skip the checks that the buffer's reference outputs are this policy's (see
                `RetentionBuffer.check`) and its observation statistics those of the environment.
            method: "null_space", or a baseline through the same loop: "kl_penalty" or "finetune".
            penalty: coefficient of the KL penalty.

        Raises:
            NsrlError: spaces or observation statistics differ, another agent's buffer, a network that acts otherwise
                in train mode, or the policy is over the budget already.
        """
        model: Any = self
        if not isinstance(retain, RetentionBuffer):
            raise NsrlError(
                f"retain takes the buffer, not {described(retain)}; RetentionBuffer.load(path) reads one. What of the "
                'policy is retained, its mode or its whole distribution, is preserve="mode" or preserve="distribution"'
            )
        check_kind("config", config, RetentionConfig, "a RetentionConfig")
        check_kind("method", method, str, "the name of a method")
        model.policy.set_training_mode(False)  # it is measured as it acts
        around = model.get_vec_normalize_env()
        if around is not None and around.norm_obs and not trust_buffer:
            _check_statistics(around, retain, model.observation_space)
        retain.check(model, trust_agent=trust_buffer or self._was_held_to(retain))
        asked = retain.inputs(range(min(ASKED, len(retain))), model.device)
        check_steady(model.policy, asked, type(self).__name__, self.updates_in_eval_mode)
        config = config.with_overall_budget()
        if config.log_std_init is not None and model.use_sde:
            raise NsrlError(
                "log_std_init would change what is protected: under gSDE the standard deviation belongs to the "
                "distribution at every state; leave log_std_init out"
            )
        exploration = _exploration(model.policy, config) if method == "null_space" else None
        constraint = RetentionConstraint(
            model.policy,
            retain,
            config.preserve,
            config.tempering,
            config.task_budgets,
            hold_spread=exploration is not None,
            promises=Promises(config.tolerance, config.worst_budget, config.worst_share, config.agreement),
        )
        retention = self._build_engine(constraint, config, method, penalty)
        retention.exploration = exploration
        kl = constraint.binding_divergence()
        # The last update of an earlier run may have ended at the budget, and other batches round otherwise.
        if retention.enforces and not retention.accepts(kl):
            raise NsrlError(
                f"the policy is at a mean KL of {kl:.3g} on the buffer before any update, over the "
                f"budget of {config.kl_budget:g}; collect the buffer from this policy or raise kl_budget"
            )
        if config.critic == "reset":
            reset_critic(model.policy)
        if config.log_std_init is not None and isinstance(getattr(model.policy, "log_std", None), nn.Parameter):
            model.policy.log_std.data.fill_(config.log_std_init)
        if model.env is not None:
            freeze_observations(model.env)
        self.retention = retention
        self._terms = SavedConstraint(config, "", method, penalty, trust_buffer)

    @classmethod
    def load(cls, path: Any, env: Any = None, device: Any = "auto", *args: Any, retain: Any = None, **kw: Any) -> Self:
        """As the algorithm's own; a model that was saved under a budget does not learn before its buffer is given.

        Args:
            path, env, device, args, kw: as in the algorithm's `load`.
            retain: the buffer that the model was saved under, to go on under the same settings.

        Raises:
            NsrlError: a folder, a policy's file or no file at all; another buffer; or as `constrain`.
        """
        check_model_file(path)
        try:
            model = super().load(path, env, device, *args, **kw)
        except (AttributeError, TypeError, KeyError) as error:  # what SB3 runs into in a zip of another algorithm
            raise NsrlError(
                f"{path} cannot be loaded as {cls.__name__}: {error}; {cls.__name__}.from_pretrained(path, env) takes "
                "over an agent of another algorithm"
            ) from error
        model._loaded = True
        if retain is not None:
            model._resume(retain)
        return model

    def save(self, path: Any, exclude: Any = None, include: Any = None) -> None:
        """As the algorithm's own; of the constraint, its settings and the buffer's digest are in the zip."""
        if self.retention is not None and self._terms is not None:
            digest, opening = self.retention.constraint.buffer.digest(), self.retention.opening
            units = 0 if opening.record is None else opening.record.units
            block = None if opening.block is None else opening.block.written()
            given = self.retention.given if self.retention.refreshes else ""
            terms = replace(
                self._terms, digest=digest, opened=not opening.pending, units=units, block=block, given=given
            )
            self._saved_constraint = terms.written()
        # The engine is tied to this very policy; `load` builds another one, and a new engine around it.
        include = None if include is None else [name for name in include if name != "retention"]
        super().save(path, exclude, include)

    def _resume(self, retain: RetentionBuffer) -> None:
        if self._saved_constraint is None:
            raise NsrlError(
                "the zip says nothing of a constraint to go on with (it is stock's, or nothing was protected); load it "
                "without retain and call protect(model, retain=buffer, kl_budget=...)"
            )
        saved = SavedConstraint.read(self._saved_constraint)
        if isinstance(retain, RetentionBuffer) and retain.digest() != saved.digest:
            raise NsrlError(saved.other(retain.digest()))
        self.constrain(retain, saved.resumed(), trust_buffer=saved.trusted, method=saved.method, penalty=saved.penalty)
        assert self.retention is not None
        if saved.opened and self.retention.opening.pending:
            try:
                self.retention.opening.leave_out("the model was saved behind it", saved.units, saved.block)
            except Unreadable as error:
                raise NsrlError(f"the zip's record of its retention constraint is damaged: {error}") from error

    def _was_held_to(self, retain: RetentionBuffer) -> bool:
        """Whether the model comes from a zip that was saved under this very buffer: its policy may have moved since."""
        if self._saved_constraint is None:
            return False
        return SavedConstraint.read(self._saved_constraint).digest == retain.digest()

    def _check_in_force(self) -> None:
        """Raise NsrlError where a promise was made that nobody keeps any more, and say where none is made."""
        if self.retention is not None:
            return
        if self._saved_constraint is not None:
            raise NsrlError(SavedConstraint.read(self._saved_constraint).missing(type(self).__name__))
        if self._loaded:
            self._loaded = False
            warnings.warn(
                f"nothing is retained: this {type(self).__name__} was loaded without a buffer and learns as stock "
                f"{stock_class(type(self)).__name__} does; protect(model, retain=buffer) puts a budget in force",
                stacklevel=3,
            )

    def _setup_model(self) -> None:
        if not isinstance(self.policy_class, type) or not issubclass(self.policy_class, BasePolicy):
            raise NsrlError(
                f"policy is {described(self.policy_class)}, but must be the name of a policy, such as MlpPolicy, or "
                "the class of one"
            )
        if getattr(self, "observation_space", None) is None:
            raise NsrlError("env is None, but must be an environment's id, a gymnasium.Env or an SB3 VecEnv")
        super()._setup_model()

    @staticmethod
    def _wrap_env(env: Any, verbose: int = 0, monitor_wrapper: bool = True) -> Any:
        check_env(env)
        return OnPolicyAlgorithm._wrap_env(env, verbose, monitor_wrapper)

    def set_env(self, env: Any, force_reset: bool = True) -> None:
        """As the algorithm's own; while a budget is in force, the statistics around the new environment are frozen.

        Raises:
            NsrlError: it shows observations otherwise than the last one did; the last one stays.
        """
        if self.retention is not None:
            self.retention.premises.check_statistics(env)
        super().set_env(env, force_reset)
        if self.retention is not None and self.env is not None:
            freeze_observations(self.env)

    def set_parameters(self, load_path_or_dict: Any, exact_match: bool = True, device: Any = "auto") -> None:
        """As the algorithm's own; while a budget is in force, weights outside of it are refused.

        Raises:
            NsrlError: the policy would be over the budget; it stays as it was, as it does where SB3 or torch raise.
        """
        if self.retention is None:
            super().set_parameters(load_path_or_dict, exact_match, device)
            return
        before = copy.deepcopy(self.get_parameters())
        try:
            super().set_parameters(load_path_or_dict, exact_match, device)
            self.retention.verify()
        except BaseException:  # torch has copied what fits before it tells of what does not
            super().set_parameters(before, device=device)  # type: ignore[arg-type]
            raise

    def train(self) -> None:
        """One policy update of the algorithm, inside the budget.

        Raises:
            NsrlError: the roll-out, or the critic behind the update, holds what is no number; the actor is as it was
                last measured. Or another process of the run has other parameters by now, or has ended.
        """
        self._check_in_force()
        if self.retention is None:
            super().train()
            check_agreement(self)
            return
        check_numbers(self)
        with nullcontext() if self.retention.exploration is None else self.retention.exploration.in_force():
            try:
                self.retention.begin()
                self._train_in_units()
                scalars = self.retention.end()
            except BaseException as error:
                self.retention.abandon()
                if is_no_number(error):
                    raise NsrlError(BROKEN.format("the policy")) from error
                raise
        check_weights(self)
        check_agreement(self)
        for tag, value in scalars.items():
            # SB3's printed table cuts long names off and refuses two that are then alike: per-task tags stay out of it.
            self.logger.record(tag, value, exclude=("stdout", "log") if tag.count("/") > 1 else None)

    def _train_in_units(self) -> None:
        """The algorithm's own update, its critic in units of the returns' spread; it is logged in the rewards' own."""
        assert self.retention is not None
        if self.retention.config.values == "raw":
            self._update()
            return
        with standardised_values(self) as unit:
            self._update()
        if "train/value_loss" in self.logger.name_to_value:
            self.logger.name_to_value["train/value_loss"] *= unit**2

    def _update(self) -> None:
        """The algorithm's own update, in closed form where all of it is known."""
        assert self.retention is not None
        # an infinite budget is none, and baselines are what they are compared as
        binds = self.retention.enforces and math.isfinite(self.retention.config.kl_budget)
        asked = binds and self.retention.config.fused == "auto"
        known = asked and super().train.__func__ is PPO.train  # type: ignore[attr-defined]
        update = fused_update(self, self.retention.hooks) if known else None
        super().train() if update is None else update.run()

    def collect_rollouts(self, *args: Any, **kwargs: Any) -> bool:
        """As the algorithm's own; the first one of a protected policy is preceded by its opening."""
        if self.retention is None:
            return super().collect_rollouts(*args, **kwargs)
        if self.retention.opening.pending:
            self.retention.opening.run(self)
        exploration = self.retention.exploration
        with (
            fused_forward(self.policy) if self.retention.config.fused == "auto" else nullcontext(),
            nullcontext() if exploration is None else exploration.sampling(),
        ):
            return super().collect_rollouts(*args, **kwargs)

    def learn(self, *args: Any, **kwargs: Any) -> Any:
        """As the algorithm's own `learn`; logs the last update too, which SB3 drops, where there is a log_interval."""
        self._check_in_force()
        if still := [name for name in MOVING if name in vars(self) and is_zero(vars(self)[name])]:
            warnings.warn(
                f"{still[0]} is 0 from the start to the end, so that no weight will move; rl-zoo's enjoy leaves agents "
                f"so: load the agent as it was trained, or give {still[0]}",
                stacklevel=2,
            )
        updates = 0
        if self.retention is not None:
            self.retention.verify()
            updates = self.retention.updates
        start = perf_counter()
        try:
            super().learn(*args, **kwargs)
        finally:
            self._learning_seconds += perf_counter() - start
        if self.retention is not None:
            self.logger.record("nullspace/overhead_fraction", self._overhead())
            if (args[2] if len(args) > 2 else kwargs.get("log_interval", 1)) is not None:
                self._dump_last(self.retention.updates - updates)
        return self

    def _dump_last(self, iterations: int) -> None:
        """Write what the last update logged, with its time, and leave it for callers to read, as SB3 does."""
        logger = self.logger
        values, counts, excluded = dict(logger.name_to_value), dict(logger.name_to_count), dict(logger.name_to_excluded)
        # What SB3's `dump_logs` has of the clock; the episodes' returns are in the row of the rollout already.
        for name, value in (
            ("iterations", iterations),
            ("time_elapsed", int((time_ns() - self.start_time) / 1e9)),
            ("total_timesteps", self.num_timesteps),
        ):
            logger.record(f"time/{name}", value, exclude="tensorboard")
        logger.dump(self.num_timesteps)
        logger.name_to_value.update(values)
        logger.name_to_count.update(counts)
        logger.name_to_excluded.update(excluded)

    def retention_report(self) -> RetentionReport:
        """Measure the policy on the buffer and summarise the run so far.

        Raises:
            NsrlError: when nothing is protected, or what the measured KL rests on is not as it was.
        """
        if self.retention is None:
            raise NsrlError("nothing is protected: pass retain=buffer, or call protect(model, retain=buffer)")
        retention = self.retention
        retention.premises.check()
        with evaluation_mode(self.policy):  # type: ignore[arg-type]
            measured = retention.constraint.measure()
            rank, dimension = retention.diagnose()
        return RetentionReport(
            kl_mean=measured.kl_mean,
            kl_max=measured.kl_max,
            kl_heldout=measured.kl_heldout,
            agreement=measured.agreement,
            agreement_heldout=measured.agreement_heldout,
            budget=retention.config.kl_budget,
            rank=rank,
            parameters=sum(retention.constraint.parameters.sizes),
            effective_dimension=dimension,
            states=(len(retention.constraint.train), len(retention.constraint.heldout)),
            updates=retention.updates,
            restored=retention.restored,
            rollbacks=retention.rollbacks,
            overhead_fraction=self._overhead(),
            seconds=dict(retention.seconds),
            kl_worst=measured.kl_worst,
            kl_by_task=measured.kl_by_task,
            kl_most=retention.kl_most,
            held=retention.held,
            opening=retention.opening.record,
        )

    def export(self, path: str | Path) -> Path:
        """Write a zip of the stock algorithm (atomically), which its `load` reads and which acts identically.

        When the environment is VecNormalize-wrapped, its statistics are written beside it as `vecnormalize.pkl`.

        Raises:
            NsrlError: the policy, or the statistics around its environment, are not those that were measured inside
                the budget; or as `nsrl.rl.agents.export`.
        """
        return export(self, path)

    @classmethod
    def _inherited(cls, source: Agent, options: dict[str, Any]) -> dict[str, Any]:
        """Keyword arguments of the algorithm, `policy_kwargs` among them: the agent's, overridden by `options`."""
        return {"policy_kwargs": source.model.policy_kwargs, **source.hyperparameters, **options}

    def _build_engine(
        self, constraint: RetentionConstraint, config: RetentionConfig, method: str, penalty: float
    ) -> Retention:
        return build_engine(self, constraint, config, method, penalty)

    def _overhead(self) -> float:
        assert self.retention is not None
        return sum(self.retention.seconds.values()) / max(self._learning_seconds, 1e-9)

    def _excluded_save_params(self) -> list[str]:
        return [*super()._excluded_save_params(), *UNSAVED]


def _check_statistics(around: VecNormalize, buffer: RetentionBuffer, space: Any) -> None:
    """Raise NsrlError unless the policy sees the buffer's states as it sees those of its environment."""
    seen = ObservationNormalizer.from_vec_normalize(around)
    if seen is not None:
        seen.check(space)
    if seen is None or buffer.normalizer is None or not same_statistics(seen, buffer.normalizer):
        raise NsrlError(
            "the VecNormalize around the model's environment has other observation statistics than the buffer, whose "
            "states the policy would see otherwise than it does in training; collect the buffer with these statistics"
        )


def _exploration(policy: Any, config: RetentionConfig) -> ExplorationSpread | None:
    """A standard deviation of its own for exploration, where the policy has one: the retained one is not moved."""
    free = config.opening == "off" or config.preserve != "distribution"
    if free or not distribution_of(policy).has_spread or not policy.log_std.requires_grad:
        return None
    return ExplorationSpread.wide(policy)
