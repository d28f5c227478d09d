"""Policy surgery: inputs and actions added to a pretrained agent that does on old observations what it did before.

Net2Net (Chen et al. 2016) for stock Stable-Baselines3 agents: weights are copied, those of new inputs are zero. On
states where a new input is zero, the Jacobian's columns for its weights are zero too: they lie in the null space of the
retained behaviour, exactly and for any step size.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any, TypeVar

import numpy as np
import torch
from gymnasium import spaces
from stable_baselines3.common.on_policy_algorithm import OnPolicyAlgorithm
from stable_baselines3.common.policies import ActorCriticPolicy
from stable_baselines3.common.preprocessing import is_image_space
from torch import Tensor, nn

from nsrl.errors import NsrlError
from nsrl.rl import agents
from nsrl.rl.agents.agent import Agent
from nsrl.rl.agents.spaces import describe_space, same_observations
from nsrl.rl.agents.stock_models import bare, stock_class
from nsrl.rl.playing.rollout import own_randomness
from nsrl.rl.policies.actor_critic import Observation, policy_outputs
from nsrl.rl.policies.distributions import is_maskable
from nsrl.rl.retention.states import Buffer, RetainedStates
from nsrl.rl.surgery.widening import (
    Positions,
    Widening,
    check_exact,
    feature_columns,
    random_inputs,
    shapes_of,
    widening,
)

Source = TypeVar("Source", OnPolicyAlgorithm, Agent)

# Log standard deviation of what is not to be heard in gSDE's noise.
SILENT_LOG_STD = -12.0
# The layers that read the features; the heads do where a network has no hidden layer.
READERS = {
    "mlp_extractor.policy_net.0.weight",
    "mlp_extractor.value_net.0.weight",
    "action_net.weight",
    "value_net.weight",
}
# What belongs to the old spaces, or to the run that is over.
LEFT_BEHIND = {
    "policy",
    "env",
    "rollout_buffer",
    "_vec_normalize_env",
    "_last_obs",
    "_last_original_obs",
    "_last_episode_starts",
    "ep_info_buffer",
    "ep_success_buffer",
    "_logger",
    "_custom_logger",
}


@dataclass(frozen=True)
class ActionReport:
    """What adding actions did to the distribution over the old ones.

    Attributes:
        count: actions added.
        margin: how far below the mean of the old logits the new ones are, nats.
        kl_mean, kl_max: KL(old || new) over the states looked at.
        kl_bound: what that KL cannot exceed on any state, log(1 + count / old * exp(-margin)).
        new_probability: largest probability of all new actions together over those states.
    """

    count: int
    margin: float
    kl_mean: float
    kl_max: float
    kl_bound: float
    new_probability: float


def add_context(agent: Source, size: int, *, key: str = "context", scale: float = 0.0, seed: int = 0) -> Source:
    """An agent with `size` more inputs in [0, 1], behind its flat observation or under a new key of a Dict.

    The observation space becomes that of `nsrl_envs.TaskContext`.

    Args:
        agent: a stock model, or an `nsrl.rl.agents.Agent`, whose observation statistics are widened with it.
        size: entries of the context.
        key: name of the context in a Dict observation.
        scale: standard deviation of the new weights. 0 keeps the policy whatever the context shows, others only where
            it is zero.
        seed: of the new weights.

    Raises:
        NsrlError: observations that are no vector or Dict, or an agent whose first layer is a CNN.
    """
    if size < 1:
        raise NsrlError(f"size is {size}, but a context needs at least one entry")
    space: Any = _model(agent).observation_space
    if isinstance(space, spaces.Dict):
        if key in space.spaces:
            raise NsrlError(f"the observation has a key {key!r} already; give the context another key")
        context = spaces.Box(0.0, 1.0, (size,), np.float32)
        return widen_observation(agent, spaces.Dict([*space.spaces.items(), (key, context)]), scale=scale, seed=seed)
    if not isinstance(space, spaces.Box) or len(space.shape) != 1 or space.dtype.kind != "f":
        raise NsrlError(f"a context is appended to flat floating-point Box observations, but the agent has {space}")
    low = np.concatenate([space.low, np.zeros(size, space.dtype)])
    high = np.concatenate([space.high, np.ones(size, space.dtype)])
    return widen_observation(agent, spaces.Box(low, high, dtype=space.dtype.type), scale=scale, seed=seed)


def widen_observation(
    agent: Source, space: spaces.Space, positions: Positions | None = None, *, scale: float = 0.0, seed: int = 0
) -> Source:
    """An agent that reads a wider observation and ignores what is new in it.

    Actor and critic are copied, their first layers with columns for the new entries; hyper-parameters are kept; the
    optimizer is fresh. New entries have the observation statistics mean 0 and variance 1, new Dict keys none.

    Args:
        agent: a stock model, or an `nsrl.rl.agents.Agent`, whose observation statistics are widened with it.
        space: the new observation space: a Box with more entries, or a Dict with more keys or larger Boxes.
        positions: where the new entries are in the new (flattened) observation, for each grown key of a Dict; default
            behind the old ones.
        scale: standard deviation of the new weights. 0 keeps the policy whatever the new entries are, others only
            where they are zero.
        seed: of the new weights.

    Returns:
        A new model, or a new `Agent` where one was given.

    Raises:
        NsrlError: a space that is not wider, an agent whose first layer is a CNN, or outputs that differ by more than
            1e-6 on random inputs.
    """
    old = _model(agent)
    wide = widening(shapes_of(old.observation_space), space, positions)
    _check_parts(old.observation_space, space)
    generator = torch.Generator().manual_seed(seed)

    def grown(new: ActorCriticPolicy) -> Callable[[str, Tensor, Tensor], Tensor | None]:
        columns = feature_columns(old.policy, new, wide)  # type: ignore[arg-type]

        def grow(name: str, weight: Tensor, like: Tensor) -> Tensor | None:
            if name not in READERS:
                return None
            noise = torch.randn(like.shape, generator=generator)
            result = (scale * noise if scale else torch.zeros(like.shape)).to(like)
            result[:, columns] = weight
            return result

        return grow

    new = _rebuilt(old, space, old.action_space, grown)
    check_exact(old.policy, new.policy, wide, scale)  # type: ignore[arg-type]
    return _like(agent, new, wide)


def add_actions(
    agent: Source, count: int, *, margin: float = 5.0, buffer: RetainedStates | None = None
) -> tuple[Source, ActionReport]:
    """An agent with `count` more discrete actions, at first unlikely; the logits of the old ones are unchanged.

    Each new logit is the mean of the old ones minus `margin`. By Jensen's inequality all new actions together have at
    most count / old * exp(-margin) of the old ones' probability, on every state.

    Args:
        agent: a stock model or an `nsrl.rl.agents.Agent`, with Discrete actions.
        count: actions to add, numbered behind the old ones.
        margin: nats; a new action has to be likely enough to be tried once in a while.
        buffer: states on which the change of the old distribution is measured; default random inputs.

    Returns:
        A new model (or `Agent`), and what the surgery did to the old actions' distribution.

    Raises:
        NsrlError: other than Discrete actions, or old logits that differ by more than 1e-6 on random inputs.
    """
    old = _model(agent)
    space = old.action_space
    if not isinstance(space, spaces.Discrete):
        raise NsrlError(f"actions can be added to Discrete action spaces only, but the agent has {space}")
    if is_maskable(old.policy):
        raise NsrlError(
            "actions cannot be added to a MaskablePPO agent: where few others are valid, a low logit is not unlikely; "
            "declare them before training and mask them meanwhile"
        )
    if count < 1 or not math.isfinite(margin):
        raise NsrlError(f"count is {count} and margin {margin}, but at least one action and a finite margin are needed")

    def grown(_: ActorCriticPolicy) -> Callable[[str, Tensor, Tensor], Tensor | None]:
        def grow(name: str, weight: Tensor, like: Tensor) -> Tensor | None:
            if name not in ("action_net.weight", "action_net.bias"):
                return None
            row = weight.mean(0, keepdim=True) - (margin if name.endswith("bias") else 0.0)
            return torch.cat([weight, row.expand(count, *weight.shape[1:])])

        return grow

    options: dict[str, Any] = {} if space.dtype == np.int64 else {"dtype": space.dtype.type}
    larger = spaces.Discrete(int(space.n) + count, start=int(space.start), **options)
    new = _rebuilt(old, old.observation_space, larger, grown)
    same = widening(shapes_of(old.observation_space), old.observation_space)
    check_exact(old.policy, new.policy, same, 0.0)  # type: ignore[arg-type]
    inputs = buffer.inputs(device=new.device) if buffer is not None else random_inputs(same, 0.0, new.device)[1]
    return _like(agent, new, same), _reported(new.policy, inputs, int(space.n), count, margin)  # type: ignore[arg-type]


def add_units(agent: Source, count: int, *, seed: int = 0) -> Source:
    """An agent whose actor has `count` more units in every hidden layer, of which no output hears yet.

    The weights into them are drawn as SB3 draws them, those out of them are zero: the policy is the old one, exactly,
    and what the units come to say is the new task's (`nsrl.rl.opening.units` gates them). The critic is the old one's.

    Args:
        agent: a stock model or an `nsrl.rl.agents.Agent` whose actor is an MLP of its own.
        count: units to add to each layer, at least 1.
        seed: of the weights.

    Returns:
        A new model, or a new `Agent` where one was given; the buffer stays valid.

    Raises:
        NsrlError: a count below 1, an actor without hidden layers or with a network of its own make, or outputs that
            differ by more than 1e-6 on random inputs.
    """
    old: Any = _model(agent)
    if count < 1:
        raise NsrlError(f"count is {count}, but at least one unit has to be added")
    arch = getattr(old.policy, "net_arch", None)
    widths = _widths(arch)
    if not widths["pi"]:
        raise NsrlError("the actor has no hidden layer of its own that units could be added to; train one with some")
    wide = {"pi": [width + count for width in widths["pi"]], "vf": list(widths["vf"])}
    generator = torch.Generator().manual_seed(seed)

    def grown(_: ActorCriticPolicy) -> Callable[[str, Tensor, Tensor], Tensor | None]:
        def grow(name: str, weight: Tensor, like: Tensor) -> Tensor | None:
            if name == "log_std":  # under gSDE one row a unit, which nothing reads: none of the noise
                result = torch.full_like(like, SILENT_LOG_STD)
            elif name.startswith("mlp_extractor.policy_net.") or name == "action_net.weight":
                result = torch.zeros_like(like)
            else:
                return None
            rows = tuple(slice(0, size) for size in weight.shape)
            if name.endswith(".weight") and like.shape[0] > weight.shape[0]:
                fresh = torch.empty(like.shape[0] - weight.shape[0], like.shape[1])
                nn.init.orthogonal_(fresh, gain=math.sqrt(2.0), generator=generator)
                result[weight.shape[0] :] = fresh.to(like)
            result[rows] = weight
            return result

        return grow

    new: Any = _rebuilt(old, old.observation_space, old.action_space, grown, net_arch=wide)
    if new.policy.action_net.in_features != old.policy.action_net.in_features + count:
        raise NsrlError(
            f"{type(old.policy).__name__} builds its network without regard to net_arch, so that it has no units to "
            "add to; use a stock SB3 policy"
        )
    same = widening(shapes_of(old.observation_space), old.observation_space)
    check_exact(old.policy, new.policy, same, 0.0)  # type: ignore[arg-type]
    return _like(agent, new, same)


def _widths(arch: Any) -> dict[str, list[int]]:
    """Hidden layers of actor and critic, as SB3 reads `net_arch`."""
    if isinstance(arch, dict):
        return {key: list(arch.get(key, [])) for key in ("pi", "vf")}
    return {"pi": list(arch or []), "vf": list(arch or [])}


def widen_buffer(
    buffer: Buffer,
    agent: OnPolicyAlgorithm | Agent,
    positions: Positions | None = None,
    *,
    fill: float = 0.0,
    margin: float | None = None,
) -> Buffer:
    """A buffer made before surgery, for the agent after it.

    Args:
        buffer: states, outputs and statistics of the agent before surgery.
        agent: the agent after it.
        positions: of new observation entries, as in `widen_observation`.
        fill: what new entries are on the old task; 0 for a context.
        margin: as in `add_actions`, where actions were added.

    Raises:
        NsrlError: a buffer that does not become one for this agent.
    """
    model = _model(agent)
    old = buffer.observations
    shapes = {key: a.shape[1:] for key, a in old.items()} if isinstance(old, dict) else old.shape[1:]
    wide = widening(shapes, model.observation_space, positions)
    outputs = buffer.outputs
    if isinstance(model.action_space, spaces.Discrete) and model.action_space.n > outputs.shape[1]:
        if margin is None:
            raise NsrlError("the agent has more actions than the buffer; pass margin, with which they were added")
        row = outputs.mean(1, keepdims=True) - np.float32(margin)
        outputs = np.concatenate([outputs, row.repeat(int(model.action_space.n) - outputs.shape[1], 1)], 1)
    described = {key: describe_space(getattr(model, key)) for key in ("observation_space", "action_space")}
    return replace(
        buffer,
        observations=wide.observations(old, fill),
        outputs=outputs,
        normalizer=None if buffer.normalizer is None else wide.normalizer(buffer.normalizer),
        provenance={**buffer.provenance, **described},
    )


def _model(agent: OnPolicyAlgorithm | Agent) -> OnPolicyAlgorithm:
    """The model; refuses one whose statistics would be left behind, and agents that cannot be fine-tuned at all."""
    loaded = agents.load(agent)
    if loaded is not agent and loaded.normalizer is not None:
        raise NsrlError(
            "the model acts inside a VecNormalize, whose statistics have to grow with it; pass "
            "nsrl.rl.agents.load(model), which carries them"
        )
    return loaded.model


def _like(agent: Source, model: OnPolicyAlgorithm, wide: Widening) -> Source:
    if not isinstance(agent, Agent):
        return model
    normalizer = None if agent.normalizer is None else wide.normalizer(agent.normalizer)
    return replace(agent, model=model, normalizer=normalizer, path=None)


def _rebuilt(
    old: OnPolicyAlgorithm,
    observation_space: spaces.Space,
    action_space: spaces.Space,
    grown: Callable[[ActorCriticPolicy], Callable[[str, Tensor, Tensor], Tensor | None]],
    **policy_kwargs: Any,
) -> OnPolicyAlgorithm:
    """A stock model for other spaces or another network, with the old settings and weights; larger ones are grown."""
    with own_randomness(0):  # building draws initial weights, and SB3 seeds the global generators
        new = bare(stock_class(type(old)), type(old.policy), str(old.device))  # type: ignore[arg-type]
        for name in vars(new).keys() & vars(old).keys() - LEFT_BEHIND:
            setattr(new, name, vars(old)[name])
        new.observation_space, new.action_space, new.n_envs = observation_space, action_space, old.n_envs
        new.policy_kwargs = {**old.policy_kwargs, **policy_kwargs}
        try:
            new._setup_model()
        except Exception as error:  # SB3 checks spaces with assertions, torch with exceptions of all kinds
            raise NsrlError(f"no policy can be built for {observation_space} and {action_space}: {error}") from error
    grow = grown(new.policy)  # type: ignore[arg-type]
    weights, state = old.policy.state_dict(), new.policy.state_dict()
    for name, like in state.items():
        weight = weights.get(name)
        if weight is not None and weight.shape != like.shape:
            weight = grow(name, weight, like)
        if weight is None or weight.shape != like.shape:
            raise NsrlError(f"surgery cannot grow {name} of {type(old.policy).__name__}; use a stock SB3 policy")
        state[name] = weight
    new.policy.load_state_dict(state)
    return new


def _check_parts(old: spaces.Space, new: spaces.Space) -> None:
    """Raise NsrlError unless all that is new is entries of Boxes, or whole keys, that no CNN reads."""
    if not isinstance(old, spaces.Box | spaces.Dict):
        raise NsrlError(f"only Box and Dict observations can be widened, but the agent has {old}; flatten it first")
    old_parts = old.spaces if isinstance(old, spaces.Dict) else {"": old}
    new_parts = new.spaces if isinstance(new, spaces.Dict) else {"": new}
    grew = False
    for key, part in new_parts.items():
        before = old_parts.get(key)
        if before is not None and same_observations(describe_space(before), describe_space(part)):
            continue
        grew = True
        if is_image_space(part) or (before is not None and is_image_space(before)):
            raise NsrlError(
                f"{part} is an image, which a CNN reads and which cannot be widened; add a Dict key beside it"
            )
        if before is not None and not (isinstance(before, spaces.Box) and isinstance(part, spaces.Box)):
            raise NsrlError(f"{before} cannot become {part}: only Box entries can be added; flatten the observation")
    if not grew:
        raise NsrlError(f"the new observation space {new} has nothing that the agent's {old} lacks")


@torch.no_grad()
def _reported(policy: ActorCriticPolicy, inputs: Observation, old: int, count: int, margin: float) -> ActionReport:
    logits = policy_outputs(policy, inputs).double()
    kl = torch.logsumexp(logits, 1) - torch.logsumexp(logits[:, :old], 1)
    bound = math.log1p(count / old * math.exp(-margin))
    return ActionReport(count, margin, float(kl.mean()), float(kl.max()), bound, float(-torch.expm1(-kl.max())))
