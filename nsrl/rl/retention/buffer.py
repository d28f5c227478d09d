"""The retention buffer: states of the old task, and what the reference policy does there."""

from __future__ import annotations

import math
import os
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, Concatenate, ParamSpec

from gymnasium import Env
from stable_baselines3.common.base_class import BaseAlgorithm
from stable_baselines3.common.policies import ActorCriticPolicy
from stable_baselines3.common.vec_env import VecEnv

from nsrl.errors import NsrlError, check_kind, check_path
from nsrl.files import read_npz
from nsrl.rl import agents
from nsrl.rl.agents.agent import Agent, fingerprint
from nsrl.rl.agents.spaces import check_described
from nsrl.rl.playing.rollout import Progress, evaluation_mode
from nsrl.rl.retention import arrays as sources
from nsrl.rl.retention import collection, merging
from nsrl.rl.retention.constraint import RetentionConstraint
from nsrl.rl.retention.minari import from_minari
from nsrl.rl.retention.states import RetainedStates, check_content, fields_from
from nsrl.versions import BUFFER

P = ParamSpec("P")


def _constructor(make: Callable[Concatenate[Any, P], RetainedStates]) -> Callable[P, RetentionBuffer]:
    """A function of the class and of other arguments as a classmethod, which type checkers follow."""
    return classmethod(make)  # type: ignore[return-value]


@dataclass(frozen=True, eq=False, repr=False)
class RetentionBuffer(RetainedStates):
    """The retention buffer: states of the old task, collected, read, merged and checked.

    What it holds is told by `RetainedStates`; all arrays are read-only.

    Raises:
        NsrlError: for an array of wrong type or shape, NaN or infinity, or no states.
    """

    @classmethod
    def collect(
        cls,
        agent: BaseAlgorithm | Agent | str | os.PathLike[str],
        env: str | Env | VecEnv | None = None,
        n_states: int = 2048,
        select: str = "expert",
        seed: int = 0,
        *,
        n_envs: int = 8,
        oversample: float = 4.0,
        quantile: float = 0.5,
        heldout: float = 0.2,
        task: str | None = None,
        reward_scale: float | None = None,
        trust: bool = False,
        progress: Progress | None = None,
    ) -> RetentionBuffer:
        """Roll the stochastic agent out on its own task and keep `n_states` of the states that it visits.

        The same seed gives the same buffer. The agent, the statistics and flags of a `VecNormalize`, and the
        global random generators stay as they were; a `VecEnv` that is passed in is left in mid-episode.

        Args:
            agent: an SB3 on-policy model, an `nsrl.rl.agents.Agent`, or a path that `agents.load` takes.
            env: env id, gymnasium.Env or VecEnv of the old task; None takes the model's own.
            n_states: states in the buffer, N.
            select: "expert" keeps states uniformly; "advantage" only among the share `quantile` of highest
                generalised advantage under the agent's critic (which drops states from which it recovers).
            seed: of environments, actions, selection and held-out split.
            n_envs: copies of the environment when `env` is an id.
            oversample: transitions to roll out for each state kept, so that states come from whole episodes.
            quantile: share of the transitions that select="advantage" draws from.
            heldout: share of the states that is held out; neighbours in time may fall on either side.
            task: name of the task in logs; default the env id.
            reward_scale: factor from raw rewards to the critic's unit, for select="advantage"; None takes the
                frozen statistics of a `VecNormalize` with norm_reward; where the agent's observations are
                normalised but reward statistics are missing, the factor that fits the critic; else 1.
            trust: let `agents.load` unpickle, when `agent` is a path.
            progress: called with (transitions so far, total) after each step.

        Raises:
            NsrlError: for bad arguments, an agent that is not on-policy, or an env with other spaces.
        """
        config = collection.CollectionConfig(
            n_states, select, seed, n_envs, oversample, quantile, heldout, task, reward_scale
        )
        return cls(**collection.collect(agent, env, config, trust, progress))

    from_arrays = _constructor(sources.from_arrays)
    from_minari = _constructor(from_minari)
    from_agents = _constructor(merging.from_agents)
    merge = _constructor(merging.merge)

    def check(
        self, model: BaseAlgorithm | Agent, env: Env | VecEnv | None = None, *, trust_agent: bool = False
    ) -> None:
        """Raise NsrlError unless this buffer describes `model` (and the spaces of `env` are the model's).

        The agent's measured KL on the buffer has to be 0 up to rounding; on a merged buffer, that on one source.

        Args:
            model: the agent about to be protected.
            env: the environment that it is about to be trained on.
            trust_agent: accept an agent other than the one the buffer was made with.
        """
        check_content(self)
        check_kind("the model", model, (BaseAlgorithm, Agent), "a Stable-Baselines3 model or an Agent")
        agent = model if isinstance(model, BaseAlgorithm) else model.model
        for key in ("observation_space", "action_space"):
            if key not in self.provenance:
                raise NsrlError(f"the buffer's provenance has no {key!r}; collect it with RetentionBuffer.collect")
        check_described(
            agent, self.provenance["observation_space"], self.provenance["action_space"], "the buffer's task"
        )
        sources.fitting(self.observations, agent.observation_space)  # type: ignore[arg-type]
        if env is not None:
            agents.check_spaces(agent, env)
        if not trust_agent:
            check_policy(self, agent.policy)  # type: ignore[arg-type]

    @classmethod
    def load(cls, path: str | os.PathLike[str]) -> RetentionBuffer:
        """Read a file that `save` wrote; nothing in it is ever unpickled.

        Raises:
            NsrlError: when the file is missing, damaged, of a newer nsrl (the sentence says which), or its content is
                not valid.
        """
        check_path("path", path)
        arrays, header = read_npz(path, BUFFER)
        try:
            return cls(**fields_from(arrays, header))
        except NsrlError as error:
            raise NsrlError(f"{path}: {error}") from error


#: Mean KL, in nats, that outputs of the same weights may have from those stored: other hardware, other batches.
SAME_POLICY = 1e-4

#: The same for other weights: float32 rounding, far below the KL of two untrained policies.
SAME_FUNCTION = 1e-8


def check_policy(buffer: RetentionBuffer, policy: ActorCriticPolicy) -> None:
    """Raise NsrlError, naming the measured KL, unless the reference outputs of one source are this policy's.

    A policy of other weights is the same one where it computes the same function, as after surgery.
    """
    with evaluation_mode(policy):
        kl = RetentionConstraint(policy, buffer).state_divergences().cpu().numpy()
    ours = fingerprint(policy)
    measured = []
    for index, origin in enumerate(buffer.origins):
        theirs, states = origin.get("fingerprint"), buffer.source == index
        mean = float(kl[states].mean()) if states.any() else math.inf
        if mean <= (SAME_POLICY if theirs in (None, ours) else SAME_FUNCTION):
            return
        measured.append((mean, theirs))
    nearest, theirs = min(measured, key=lambda pair: pair[0])
    named = "" if theirs in (None, ours) else f" (fingerprint {str(theirs)[:12]}, this one has {ours[:12]})"
    raise NsrlError(
        f"the buffer holds the outputs of another agent{named}: on its states this one is at a mean KL of "
        f"{nearest:.3g} from them; make the buffer again with this agent, or pass trust_agent=True (trust_buffer to "
        "from_pretrained, protect and in configurations) to hold this agent to the other's behaviour"
    )
