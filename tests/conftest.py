"""Settings shared by all tests: one thread, no windows, no CUDA tests without CUDA, nothing that one leaves behind."""

import os

# before torch and matplotlib are imported: both read these once
os.environ.setdefault("OMP_NUM_THREADS", "1")
os.environ.setdefault("MPLBACKEND", "Agg")
os.environ.setdefault("SDL_VIDEODRIVER", "dummy")

import random
import signal
import time
from collections.abc import Callable, Iterator
from types import SimpleNamespace
from typing import Any

import gymnasium
import matplotlib
import numpy as np
import pytest
import torch
from hypothesis import settings
from hypothesis.internal.conjecture import providers
from matplotlib import pyplot

import nsrl_envs  # noqa: F401  (its tasks are registered now, and not by the first test that needs them)

THREADS = os.environ["OMP_NUM_THREADS"]
torch.set_num_threads(int(THREADS))

# No deadline: the cores of a test machine are shared, and a slow moment is not a failure. The gate draws the same
# examples every time, so that a change is judged by what it changes; `make test-all` draws new ones.
settings.register_profile("gate", deadline=None, max_examples=30, derandomize=True, database=None)
settings.register_profile("nightly", deadline=None, max_examples=100, print_blob=True)
PROFILE = os.environ.get("HYPOTHESIS_PROFILE", "gate")
settings.load_profile(PROFILE)
if PROFILE == "gate":
    # Hypothesis mixes in the constants of whatever modules are loaded, which depends on the tests that ran before in
    # the same worker: `derandomize` alone draws other examples on another day.
    providers.is_local_module_file = lambda _: False  # type: ignore[assignment]


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    if torch.cuda.is_available():
        return
    for item in items:
        if item.get_closest_marker("cuda"):
            item.add_marker(pytest.mark.skip(reason="no CUDA device"))


@pytest.fixture
def a_second_later() -> Iterator[Callable[[], None]]:
    """A call of it lets a second pass for TensorBoard.

    Event files are named by the second that they are opened in, and read in that order: a test that writes two in one
    second would be read in any. A program that is stopped and started again takes longer than that.
    """
    from tensorboard.summary.writer import event_file_writer

    passed = [0.0]

    def wait() -> None:
        passed[0] += 2.0

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(event_file_writer, "time", SimpleNamespace(time=lambda: time.time() + passed[0]))
        yield wait


def global_state() -> dict[str, Any]:
    """What is set for a whole process, and what a test could therefore change for those after it."""
    return {
        "default dtype": torch.get_default_dtype(),
        "default device": torch.get_default_device(),
        "grad mode": torch.is_grad_enabled(),
        "anomaly mode": torch.is_anomaly_enabled(),
        "deterministic algorithms": torch.are_deterministic_algorithms_enabled(),
        "threads": torch.get_num_threads(),
        "float32 precision": torch.get_float32_matmul_precision(),
        "TF32 in cuBLAS": torch.backends.cuda.matmul.allow_tf32,
        "TF32 in cuDNN": torch.backends.cudnn.allow_tf32,
        "cuDNN": (torch.backends.cudnn.enabled, torch.backends.cudnn.deterministic, torch.backends.cudnn.benchmark),
        "MHA fast path": torch.backends.mha.get_fastpath_enabled(),
        "numpy errors": np.geterr(),
        "matplotlib backend": matplotlib.get_backend(),
        "matplotlib settings": dict(matplotlib.rcParams),
        "open figures": pyplot.get_fignums(),
        "registered tasks": sorted(gymnasium.registry),
        # pytest keeps the running test's name there, and torch a folder from its first use of torch.func on
        "environment": {k: v for k, v in os.environ.items() if not k.startswith(("PYTEST_", "TORCHINDUCTOR_"))},
        "working directory": os.getcwd(),
        "signal handlers": [signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM)],
    }


@pytest.fixture(autouse=True)
def alone() -> Iterator[None]:
    """Every test begins from the same state, whatever ran before it, and leaves the process as it found it.

    The tests run on several processes and in no fixed order. The generators are seeded; everything else must be put
    back by the test itself, by a fixture or `monkeypatch`.
    """
    random.seed(0)
    np.random.seed(0)
    torch.manual_seed(0)
    _set_threads()
    before = global_state()
    yield
    _set_threads()
    after = global_state()
    changed = [_difference(name, before[name], after[name]) for name in before if before[name] != after[name]]
    assert not changed, f"the test leaves behind: {'; '.join(changed)}"


def _difference(name: str, before: Any, after: Any) -> str:
    """What to look for. Of the environment's variables the names alone: their values are nobody's business."""
    if isinstance(before, dict):
        return f"{name} {sorted(key for key in before.keys() | after.keys() if before.get(key) != after.get(key))}"
    return f"{name} {after}, before {before}"


def _set_threads() -> None:
    """Commands set these for their process, which in these tests is everyone's."""
    torch.set_num_threads(int(THREADS))
    os.environ["OMP_NUM_THREADS"] = THREADS
