"""Settings shared by all tests: one thread, no windows, no CUDA tests without CUDA."""

import os

# before torch and matplotlib are imported: both read these once
os.environ.setdefault("OMP_NUM_THREADS", "1")
os.environ.setdefault("MPLBACKEND", "Agg")
os.environ.setdefault("SDL_VIDEODRIVER", "dummy")

import pytest
import torch
from hypothesis import settings

torch.set_num_threads(1)

# no deadline: the cores of a test machine are shared, and a slow moment is not a failure
settings.register_profile("nsrl", deadline=None, max_examples=30, print_blob=True)
settings.load_profile("nsrl")


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    if torch.cuda.is_available():
        return
    for item in items:
        if item.get_closest_marker("cuda"):
            item.add_marker(pytest.mark.skip(reason="no CUDA device"))


@pytest.fixture(autouse=True)
def seeded() -> None:
    """Seed torch, so that a test's random weights do not depend on the tests before it."""
    torch.manual_seed(0)
