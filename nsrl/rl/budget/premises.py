"""What a measured KL rests on besides the protected parameters, and whether it still is as it was.

A KL on the buffer says what the policy does only while the policy is built as it was when the budget was put in force,
while nothing moves that the constraint does not move, and while its environment shows it states as the buffer does.
"""

from __future__ import annotations

from typing import Any

import torch
from stable_baselines3.common.on_policy_algorithm import OnPolicyAlgorithm
from stable_baselines3.common.vec_env import VecEnv
from torch import Tensor

from nsrl.errors import NsrlError
from nsrl.projection.jacobians.matrix_free import is_plain
from nsrl.rl.agents.normalization import same_statistics, seen_statistics
from nsrl.rl.policies.actor_critic import CRITIC
from nsrl.rl.retention.constraint import RetentionConstraint

#: Attributes of a policy that decide what its networks make of an observation.
READING = ("normalize_images", "use_sde", "squash_output", "share_features_extractor")

AGAIN = "call protect(model, retain=buffer) again, which measures the policy as it is now"


class Premises:
    """The policy's build, what holds still in it, and the observation statistics around it, as they were.

    Args:
        model: whose policy is held; with or without an environment.
        constraint: that holds it.
    """

    def __init__(self, model: OnPolicyAlgorithm, constraint: RetentionConstraint):
        self._model = model
        self._constraint = constraint
        #: log_std with preserve="mode" is the new task's: it may move, stop or start.
        self._free = () if constraint.preserve == "distribution" else ("log_std",)
        self._build = self._read_build()
        self._plain = self._read_plain()
        self._trainable = self._read_trainable()
        self._statistics = [constraint.buffer.normalizer, *([] if model.env is None else [seen_statistics(model.env)])]
        protected = set(constraint.parameters.parameters)
        self._still = [
            part
            for kind, name, part in self._actor()
            if isinstance(part, Tensor) and part not in protected and name not in self._free
        ]

    def check(self) -> None:
        """Raise NsrlError, naming what has changed since the budget was put in force, if anything has."""
        self._check_policy()
        if self._model.env is not None:
            self.check_statistics(self._model.env)

    def check_statistics(self, env: VecEnv) -> None:
        """Raise NsrlError unless an environment shows observations as the last one did, or as the buffer has them."""
        seen = seen_statistics(env)
        for known in self._statistics[::-1]:
            if seen is known is None or (seen is not None and known is not None and same_statistics(seen, known)):
                return
        raise NsrlError(
            f"the environment shows observations {'without' if seen is None else 'with other'} statistics than it did "
            "when the budget was put in force: the policy would act otherwise on the old task though no weight moves; "
            "put the same ones around it, frozen: "
            "nsrl.rl.agents.normalization.RetainingVecNormalize(env, retain.normalizer)"
        )

    def still(self) -> list[Tensor]:
        """Copies of what the constraint does not move in the actor: frozen parameters and buffers."""
        return [tensor.detach().clone() for tensor in self._still]

    @torch.no_grad()
    def put_back(self, values: list[Tensor]) -> None:
        """Set them to what `still` gave."""
        for tensor, value in zip(self._still, values, strict=True):
            tensor.data.copy_(value)

    # -- the policy ------------------------------------------------------------------------------------------------

    def _check_policy(self) -> None:
        if self._model.policy is not self._constraint.policy:
            raise NsrlError(f"the model's policy was replaced after the budget was put in force; {AGAIN}")
        build = self._read_build()
        for key in [*self._build, *build]:
            before, now = self._build.get(key), build.get(key)
            if not (before is now or (type(before) is type(now) and not _by_identity(before) and before == now)):
                raise NsrlError(f"{key} was replaced after the budget was put in force; {AGAIN}")
        for name, trainable in self._read_trainable().items():
            if trainable != self._trainable[name]:
                states = ("trainable", "frozen") if self._trainable[name] else ("frozen", "trainable")
                raise NsrlError(
                    f"{name} was {states[0]} when the budget was put in force and is {states[1]} now; set its "
                    f"requires_grad back, or {AGAIN}"
                )
        for name, plain in self._read_plain().items():
            if not plain and self._plain[name]:
                raise NsrlError(
                    f"{name} was given a hook or a forward of its own after the budget was put in force, "
                    f"which measures it without; {AGAIN}"
                )

    def _actor(self) -> list[tuple[str, str, Any]]:
        """Modules, parameters and buffers that are not the critic's alone, by kind and name."""
        policy = self._constraint.policy
        kinds = {
            "module": policy.named_modules(),
            "parameter": policy.named_parameters(),
            "buffer": policy.named_buffers(),
        }
        return [(kind, name, part) for kind, parts in kinds.items() for name, part in parts if _is_actors(name)]

    def _read_build(self) -> dict[str, Any]:
        policy: Any = self._constraint.policy
        build: dict[str, Any] = {f"{kind} {name}".strip(): part for kind, name, part in self._actor()}
        build |= {
            f"number format and device of {name}": (part.dtype, part.device)
            for kind, name, part in self._actor()
            if kind != "module"
        }
        build |= {f"policy.{name}": getattr(policy, name, None) for name in READING}
        return {**build, "policy.action_dist": type(policy.action_dist)}

    def _read_trainable(self) -> dict[str, bool]:
        return {
            name: part.requires_grad
            for kind, name, part in self._actor()
            if kind == "parameter" and name not in self._free
        }

    def _read_plain(self) -> dict[str, bool]:
        """Whether each module's call is its class's, where the constraint reads weights without calling modules."""
        if not self._constraint.skips_calls:
            return {}
        return {name: is_plain(part) for kind, name, part in self._actor() if kind == "module" and name}


def _is_actors(name: str) -> bool:
    return not name.startswith(CRITIC)


def _by_identity(part: Any) -> bool:
    """Tensors and modules are themselves, not what equals them."""
    return isinstance(part, Tensor | torch.nn.Module)
