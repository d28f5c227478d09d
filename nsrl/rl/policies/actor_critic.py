"""What a Stable-Baselines3 policy computes: its distribution parameters as a plain function of observations."""

from __future__ import annotations

from sb3_contrib.common.maskable.distributions import (
    MaskableBernoulliDistribution,
    MaskableCategoricalDistribution,
    MaskableMultiCategoricalDistribution,
)
from stable_baselines3.common.distributions import (
    BernoulliDistribution,
    CategoricalDistribution,
    DiagGaussianDistribution,
    MultiCategoricalDistribution,
    SquashedDiagGaussianDistribution,
    StateDependentNoiseDistribution,
)
from stable_baselines3.common.policies import ActorCriticPolicy, BasePolicy
from torch import Tensor, nn

from nsrl.errors import NsrlError

#: Where modules are that only the critic has.
CRITIC = ("mlp_extractor.value_net", "value_net", "vf_features_extractor")
Observation = Tensor | dict[str, Tensor]

FAMILIES: dict[type, str] = {
    CategoricalDistribution: "categorical",
    MultiCategoricalDistribution: "multi_categorical",
    BernoulliDistribution: "bernoulli",
    DiagGaussianDistribution: "gaussian",
    MaskableCategoricalDistribution: "categorical",
    MaskableMultiCategoricalDistribution: "multi_categorical",
}
#: Why a distribution of SB3 is refused, and what to do instead.
REFUSED: dict[type, str] = {
    StateDependentNoiseDistribution: (
        "the noise of gSDE depends on the state through learnt features, so its spread is no parameter that could be "
        "held; train the agent with use_sde=False"
    ),
    SquashedDiagGaussianDistribution: (
        "a tanh lies between its mean and the action, which nsrl does not model; train the agent with "
        "squash_output=False, as PPO and A2C do by default"
    ),
    MaskableBernoulliDistribution: (
        "masked MultiBinary actions have two logits each, not one; declare them as MultiDiscrete([2, 2, ...]), which "
        "is the same to MaskablePPO"
    ),
}


def action_family(policy: BasePolicy) -> str:
    """Name of the action distribution: "categorical", "multi_categorical", "bernoulli" or "gaussian".

    Raises:
        NsrlError: for a policy with memory, or a distribution whose outputs are not plain logits or a mean (gSDE,
            squashed Gaussian).
    """
    if hasattr(policy, "lstm_actor"):
        raise NsrlError(
            f"{type(policy).__name__} acts on its memory as well as on the observation, so the states of a buffer do "
            "not say what it does; only PPO, A2C, TRPO and MaskablePPO can be protected (stacked frames can stand in "
            "for memory)"
        )
    kind = type(getattr(policy, "action_dist", None))
    family = FAMILIES.get(kind)
    if family is None:
        why = REFUSED.get(kind, "it is none of the distributions that SB3's on-policy algorithms make")
        raise NsrlError(f"policies with {kind.__name__} cannot be protected: {why}")
    return family


def check_steady(policy: BasePolicy, algorithm: str) -> None:
    """Raise NsrlError where the actor computes something else in train mode than when it acts.

    SB3's PPO and A2C update in train mode; no KL of a policy holds that is random or depends on the batch there, and
    the running statistics of batch normalisation move the policy where no constraint on its parameters can see it.
    """
    for name, module in policy.named_modules():
        noisy = isinstance(module, nn.modules.dropout._DropoutNd) and module.p > 0.0
        if name.startswith(CRITIC) or not (noisy or isinstance(module, nn.modules.batchnorm._BatchNorm)):
            continue
        raise NsrlError(
            f"{name} is {type(module).__name__}, with which {algorithm} updates another policy than the one that acts; "
            "replace it (LayerNorm will do), or fine-tune with NullSpaceTRPO, which updates in eval mode"
        )


def policy_outputs(policy: ActorCriticPolicy, observations: Observation) -> Tensor:
    """Logits (discrete actions) or mean (Box actions) of the policy, shape (N, O).

    Goes through the actor only, as `ActorCriticPolicy.get_distribution` does, but builds no distribution object:
    SB3's is a mutable singleton that the next call overwrites.
    """
    # The base class's method: ActorCriticPolicy's own returns a pair when actor and critic extract separately.
    features = BasePolicy.extract_features(policy, observations, policy.pi_features_extractor)
    return policy.action_net(policy.mlp_extractor.forward_actor(features))  # type: ignore[arg-type]
