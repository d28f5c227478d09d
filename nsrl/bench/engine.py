"""Where the cells of a benchmark run: in processes of this machine, or of a Ray cluster.

Both give a `concurrent.futures.Executor`, so that a study is written once: it submits its cells and takes them as they
end. Whatever engine runs them, the cells, the files and the lines are the same.
"""

from __future__ import annotations

import multiprocessing
from collections.abc import Iterator
from concurrent.futures import Executor, ProcessPoolExecutor
from contextlib import contextmanager
from pathlib import Path

from nsrl.bench.lifeline import begin_worker
from nsrl.errors import NsrlError

ENGINES = ("local", "ray")


def check_engine(engine: str) -> None:
    """Raise NsrlError unless an engine is known and can be had here.

    Raises:
        NsrlError: naming those that there are, or what to install.
    """
    if engine not in ENGINES:
        raise NsrlError(f"--engine must be one of {', '.join(ENGINES)}, not {engine!r}")
    if engine == "ray":
        from nsrl.bench.ray_pool import require_ray

        require_ray()


@contextmanager
def open_workers(engine: str, workers: int, shared: Path) -> Iterator[Executor]:
    """Processes that carry out functions, one torch thread each; at the end of the block what waits is dropped.

    They end with this process, however that one ends.

    Args:
        engine: one of `ENGINES`.
        workers: processes at a time; 0 where nothing is left to be done.
        shared: a folder that the cells write to; with "ray", all machines have to see it.

    Raises:
        NsrlError: as `check_engine`; or there is no cluster at the address that is given.
    """
    check_engine(engine)
    if engine == "ray" and workers:
        from nsrl.bench.ray_pool import RayPool

        with RayPool(workers, shared) as cluster:
            yield cluster
        return
    # spawned, not forked: torch's threads do not survive a fork
    pool = ProcessPoolExecutor(max(1, workers), multiprocessing.get_context("spawn"), begin_worker)
    try:
        yield pool
    finally:
        pool.shutdown(wait=True, cancel_futures=True)
