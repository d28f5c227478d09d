"""Buffer refresh: the retained states are joined by those that the policy visits in the old task by now."""

from __future__ import annotations

import warnings

import numpy as np
from stable_baselines3.common.callbacks import BaseCallback

from nsrl.errors import NsrlError, check_whole
from nsrl.rl.agents.agent import resolve_agent
from nsrl.rl.budget.engine import Retention
from nsrl.rl.playing.environments import Environments, check_apart
from nsrl.rl.policies.distributions import INVALID, is_maskable
from nsrl.rl.retention.arrays import Reference
from nsrl.rl.retention.buffer import RetentionBuffer


class BufferRefresh(BaseCallback):
    """Adds states of the old task that the policy visits by now, labelled by the reference, every so many timesteps.

    A buffer of the reference's states does not show where a policy inside its budget drifts to: small differences lead
    to other states, on which nothing is promised. There the reference is asked (DAgger's remedy, Ross et al. 2011), and
    from then on the budget holds on them too. It acts between an update and the next roll-out. Put it before
    `TaskEvaluation` and `Checkpoint` in the list of callbacks.

    Args:
        env: the old task.
        reference: the agent that the buffer was made with: a path, a model or an `Agent`.
        every: timesteps between refreshes.
        states: that each adds. Measurements and restorations take so much longer.
        n_envs: copies of the environment, when it is an id.
        seed: of the roll-outs.
        trust: let `agents.load` unpickle, where the reference is a path.

    Attributes:
        taken: refreshes that were taken; one that no restoration brings the policy inside of is left out, with a
            warning.

    Raises:
        NsrlError: a number out of range; when learning begins: nothing is retained, another agent's buffer is, or the
            environment is the one that is learnt on.
    """

    def __init__(
        self,
        env: Environments,
        reference: Reference,
        *,
        every: int = 50_000,
        states: int = 256,
        n_envs: int = 8,
        seed: int = 0,
        trust: bool = False,
    ):
        super().__init__()
        for name, value in (("every", every), ("states", states), ("n_envs", n_envs)):
            check_whole(name, value, 1)
        check_whole("seed", seed, 0)
        self.env = env
        self.reference = reference
        self.every = every
        self.states = states
        self.n_envs = n_envs
        self.seed = seed
        self.trust = trust
        self.taken = 0
        self._last = 0

    def _on_training_start(self) -> None:
        check_apart(self.env, self.model, "the environment of a buffer's refresh")
        retention = self._retention()
        agent = resolve_agent(self.reference, self.trust)[0]
        retention.constraint.buffer.check(agent)  # type: ignore[attr-defined]
        self._last = self.model.num_timesteps // self.every

    def _on_rollout_start(self) -> None:
        number = self.model.num_timesteps // self.every
        if number > self._last:
            self._last = number
            self.refresh(self.seed + number)

    def _on_step(self) -> bool:
        return True

    def refresh(self, seed: int) -> bool:
        """Add states now; returns whether they were taken.

        Args:
            seed: of the roll-out.
        """
        retention = self._retention()
        buffer = retention.constraint.buffer
        visited = RetentionBuffer.collect(self.model, self.env, self.states, seed=seed, n_envs=self.n_envs)  # type: ignore[arg-type]
        masked = is_maskable(self.model.policy)
        labelled = RetentionBuffer.from_arrays(
            visited.observations,
            self.reference,
            heldout=visited.heldout,
            normalizer=buffer.normalizer,
            task=buffer.tasks[0],
            trust=self.trust,
            action_masks=visited.outputs > np.float32(0.5 * INVALID) if masked else None,
        )
        taken = retention.hold_to(RetentionBuffer.merge([buffer, labelled], buffer.normalizer))
        self.taken += taken
        if not taken:
            warnings.warn(
                "a refresh of the buffer was left out: nothing brings the policy inside the budget on the states "
                "that it visits in the old task by now; refresh more often, or keep it nearer with a smaller kl_budget",
                stacklevel=2,
            )
        self.logger.record("retain/states", len(retention.constraint.buffer))
        self.logger.record("retain/refreshes", retention.refreshes)
        return taken

    def _retention(self) -> Retention:
        retention = getattr(self.model, "retention", None)
        if retention is None:
            raise NsrlError(
                "there is no buffer to refresh: nothing is retained; give retain= or call protect(model, ...)"
            )
        return retention
