"""NullSpacePPO: PPO that learns a new task inside a KL budget on an old one."""

from __future__ import annotations

from typing import Any

from stable_baselines3 import PPO

from nsrl.rl.agents.agent import Agent
from nsrl.rl.algorithms.mixin import ProtectedMixin
from nsrl.rl.algorithms.options import without_optimizer


class NullSpacePPO(ProtectedMixin, PPO):
    """Proximal policy optimisation under a retention constraint.

    Solves `min L_new(theta) subject to mean_s KL(pi_ref(.|s) || pi_theta(.|s)) <= kl_budget` over the states s of a
    retention buffer, and keeps it: after every update the KL is measured on the whole buffer and, where it is over,
    restored. Without a buffer it is stock PPO, bit for bit.

        model = NullSpacePPO.from_pretrained("expert.zip", env=new_env, retain=buffer, kl_budget=0.01)
        model.learn(600_000, progress_bar=True)
        print(model.retention_report())
        model.export("finetuned.zip")          # a stock zip: stable_baselines3.PPO.load just works

    Saved zips are stock PPO zips too. The buffer is not in them: `NullSpacePPO.load(path, env=env, retain=buffer)` goes
    on under the budget, and without it the loaded model acts but refuses to learn (see `nsrl.rl.training.checkpoint`
    for resuming a run where it was).
    """

    @classmethod
    def _inherited(cls, source: Agent, options: dict[str, Any]) -> dict[str, Any]:
        inherited = super()._inherited(source, options)
        if not isinstance(source.model, PPO) and "policy_kwargs" not in options:
            inherited["policy_kwargs"] = without_optimizer(inherited["policy_kwargs"])
        return inherited
