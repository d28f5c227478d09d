"""What each of two processes does in the tests of runs in several processes; one process does the same by itself."""

from __future__ import annotations

import os
import signal
from pathlib import Path
from typing import Any

import gymnasium as gym
import numpy as np
import torch
import torch.distributed as dist
from gymnasium import spaces
from stable_baselines3 import PPO
from stable_baselines3.common.callbacks import BaseCallback
from stable_baselines3.common.monitor import Monitor
from stable_baselines3.common.vec_env import DummyVecEnv, VecNormalize

from nsrl import NullSpacePPO, NullSpaceTRPO, RetentionBuffer
from nsrl.errors import NsrlError
from nsrl.rl.parallel.ranks import Ranks
from nsrl.rl.parallel.shared_envs import SharedEnvs
from nsrl.rl.training.checkpoint import Checkpoint, restore

COUNT, ENVS, STEPS, SEED, BUDGET = 2, 2, 32, 3, 0.01
ALGORITHMS: dict[str, Any] = {
    "ppo": (NullSpacePPO, {"batch_size": 32, "n_epochs": 3, "target_kl": 0.02}),
    "trpo": (NullSpaceTRPO, {"batch_size": 32}),
}


class Walk(gym.Env):
    """A walk on the line that is to end far to the right, with observations of every kind and episodes of ten steps."""

    observation_space = spaces.Dict(
        {"at": spaces.Box(-9.0, 9.0, (2,), np.float32), "time": spaces.Box(0, 255, (1,), np.uint8)}
    )
    action_space = spaces.Discrete(3)

    def __init__(self, sign: float = 1.0):
        self.sign = sign

    def _seen(self) -> dict[str, np.ndarray]:
        return {"at": self._at.astype(np.float32), "time": np.array([self._time], np.uint8)}

    def reset(self, *, seed: int | None = None, options: Any = None) -> Any:
        super().reset(seed=seed)
        self._at, self._time = self.np_random.normal(size=2), 0
        return self._seen(), {}

    def step(self, action: Any) -> Any:
        self._at = np.clip(self._at + np.array([action - 1.0, self.np_random.normal(scale=0.1)]), -9.0, 9.0)
        self._time += 1
        ended = bool(self._at[0] > 5.0)
        info = {"is_success": ended} if self._time == 10 or ended else {}
        return self._seen(), self.sign * float(self._at[0]), ended, self._time == 10, info


def walks(count: int, sign: float = 1.0) -> DummyVecEnv:
    return DummyVecEnv([lambda: Monitor(Walk(sign)) for _ in range(count)])


def pretrained(folder: Path) -> Path:
    """An agent and its buffer, in a folder for all processes."""
    agent = PPO("MultiInputPolicy", walks(2), n_steps=STEPS, batch_size=32, seed=0, device="cpu")
    agent.learn(4 * STEPS)
    agent.save(folder / "agent.zip")
    RetentionBuffer.collect(agent, walks(2), n_states=96, seed=0).save(folder / "buffer.npz")
    return folder


def model(kind: str, folder: Path, envs: Any, **changes: Any) -> Any:
    """A model on environments inside a VecNormalize that scales rewards."""
    algorithm, settings = ALGORITHMS[kind]
    options = {"n_steps": STEPS, "seed": SEED, "opening": "off", **settings, **changes}
    found = algorithm.from_pretrained(
        folder / "agent.zip",
        VecNormalize(envs, norm_obs=False),
        retain=RetentionBuffer.load(folder / "buffer.npz"),
        kl_budget=BUDGET,
        **options,
    )
    return found


def told(found: Any) -> dict[str, Any]:
    """All that has to be the same."""
    around = found.get_vec_normalize_env()
    return {
        "parameters": {name: value.clone() for name, value in found.policy.state_dict().items()},
        "kl": found.retention.constraint.binding_divergence(),
        "kl_most": found.retention.kl_most,
        "updates": found.retention.updates,
        "timesteps": found.num_timesteps,
        "returns": [around.ret_rms.mean.tolist(), around.ret_rms.var.tolist(), around.ret_rms.count],
        "episodes": [(entry["r"], entry["l"]) for entry in found.ep_info_buffer],
        "successes": list(found.ep_success_buffer),
    }


class Kill(BaseCallback):
    """The end of this process, without a word, in the middle of a roll-out."""

    def _on_step(self) -> bool:
        if self.n_calls == STEPS + 5:
            os.kill(os.getpid(), signal.SIGKILL)
        return True


class Disturb(BaseCallback):
    """What draws from a global generator in one process only."""

    def _on_step(self) -> bool:
        if self.n_calls == 5:
            torch.rand(1)
        return True


class Stop(BaseCallback):
    """A signal that comes to one process in the middle of a roll-out, and what is done of it where all stop."""

    def __init__(self, envs: SharedEnvs, come: bool):
        super().__init__()
        self.envs, self.come = envs, come
        envs.stopping = lambda: self.come and self.n_calls >= 5

    def _on_step(self) -> bool:
        return not self.envs.stopped


def learn(kind: str, folder: Path, envs: Any, **changes: Any) -> dict[str, Any]:
    found = model(kind, folder, envs, **changes)
    found.learn(3 * STEPS * found.n_envs)
    return told(found)


def work(number: int, folder: str, threads: int) -> None:
    """One of the processes."""
    torch.set_num_threads(threads)  # rounding is that of so many
    where = Path(folder)
    dist.init_process_group("gloo", init_method=f"file://{where / 'meet'}", rank=number, world_size=COUNT)
    ranks = Ranks()

    def shared() -> SharedEnvs:
        return SharedEnvs(walks(ENVS, -1.0), ranks)

    found: dict[str, Any] = {kind: learn(kind, where, shared()) for kind in ALGORITHMS}
    found["opened"] = learn("ppo", where, shared(), opening="auto")
    # a checkpoint of all environments' generators, which one process with all of them can go on with
    first = model("ppo", where, shared())
    first.learn(STEPS * first.n_envs, callback=Checkpoint(where / f"checkpoint_{number}.zip"))
    restore(where / f"checkpoint_{number}.zip", first)
    first.learn(STEPS * first.n_envs, reset_num_timesteps=False)
    found["resumed"] = told(first)
    envs = shared()
    stopped = model("ppo", where, envs)
    stopped.learn(3 * STEPS * stopped.n_envs, callback=Stop(envs, number == 1))
    found["stopped at"] = stopped.num_timesteps
    found["attributes"] = envs.get_attr("sign"), envs.env_method("get_wrapper_attr", "sign"), envs.get_attr("sign", 3)
    found["asked in vain"] = _raised(lambda: envs.get_attr("nothing"))
    found["other envs"] = _raised(lambda: SharedEnvs(walks(1 + number), ranks))
    found["disturbed"] = _raised(lambda: _disturbed(where, shared(), number))
    found["other seeds"] = _raised(lambda: learn("ppo", where, shared(), seed=number))

    def drifted() -> None:
        drifting = model("ppo", where, shared(), target_kl=None)
        with torch.no_grad():
            next(drifting.policy.value_net.parameters()).add_(1e-6 * number)  # which no action tells of
        drifting.learn(STEPS * drifting.n_envs)

    found["drifted"] = _raised(drifted)
    torch.save(found, where / f"{number}.pt")
    dist.barrier()
    last = model("ppo", where, shared())
    checkpoint = Checkpoint(where / f"last_{number}.zip")
    told_of = _raised(lambda: last.learn(9 * STEPS * last.n_envs, callback=[checkpoint, *[Kill()] * number]))
    if checkpoint.collecting:
        checkpoint.write()
    torch.save({"lost": told_of, "collecting": checkpoint.collecting}, where / "survivor.pt")
    os._exit(0)  # its group is broken


def _disturbed(where: Path, envs: SharedEnvs, number: int) -> None:
    found = model("ppo", where, envs)
    found.learn(STEPS * found.n_envs, callback=[Disturb()] * number)


def _raised(action: Any) -> str:
    try:
        action()
    except (NsrlError, AttributeError) as error:
        return f"{type(error).__name__}: {error}"
    return "nothing"
