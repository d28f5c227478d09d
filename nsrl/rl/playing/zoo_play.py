"""What rl_zoo3 makes of an agent that is exported for it: its `enjoy` plays it, in a process of its own."""

from __future__ import annotations

import importlib.util
import subprocess
import sys
from pathlib import Path
from typing import Any

from nsrl.rl.agents import rl_zoo

#: Timesteps that are played, and seconds that they may take, of which most go into imports.
STEPS, SECONDS = 50, 300
PLAYED = "played"


def play_in_zoo(model: Any, folder: Path, env_wrapper: Any = None) -> str | None:
    """Export a model in rl-zoo's layout and let `rl_zoo3 enjoy` play it.

    Args:
        model: a protected model of PPO with its environment, which has an id.
        folder: for the export.
        env_wrapper: of rl-zoo's settings, where the environment is inside one.

    Returns:
        "played", or how `enjoy` ended otherwise; None where rl_zoo3 is not installed.
    """
    if importlib.util.find_spec("rl_zoo3") is None:
        return None
    rl_zoo.export_run(model, folder, settings={} if env_wrapper is None else {"env_wrapper": env_wrapper})
    env = model.get_env().get_attr("spec", 0)[0].id
    words = ["--algo", "ppo", "--env", env, "--folder", str(folder), "-n", str(STEPS), "--no-render", "--exp-id", "1"]
    command = [sys.executable, "-m", "rl_zoo3.enjoy", *words]
    try:
        done = subprocess.run(command, capture_output=True, text=True, timeout=SECONDS)
    except subprocess.TimeoutExpired:
        return f"no end within {SECONDS} s"
    last = (done.stderr.strip().splitlines() or [f"exit code {done.returncode}"])[-1]
    return PLAYED if done.returncode == 0 else last
