"""Functions carried out by the processes of a Ray cluster (nsrl[cluster]), behind the interface of a process pool.

A task is retried by Ray where its process or machine is lost, and ends with the process that asked for it, as all of
Ray's do with their driver.
"""

from __future__ import annotations

import os
import pickle
import signal
import threading
import uuid
from collections.abc import Callable
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from importlib.metadata import version
from importlib.util import find_spec
from pathlib import Path
from types import TracebackType
from typing import Any

from nsrl.errors import NsrlError

#: Times that a cell is begun again where its process has been killed or its machine is lost.
RETRIES = 3
#: What of the driver's environment decides on numbers, or on the speed of small policies; a raylet has its own.
PASSED = ("ATEN_CPU_CAPABILITY", "MKL_ENABLE_INSTRUCTIONS")
#: Times that a Ray of this machine alone is tried to be started: where processors are busy, it gives up early.
STARTS = 3
#: Bytes of shared memory of a Ray that is started here: arguments and results are small. Ray takes no less.
STORE = 80 * 2**20


def require_ray() -> None:
    """Raise NsrlError where Ray is missing.

    Raises:
        NsrlError: naming the extra.
    """
    if find_spec("ray") is None:
        raise NsrlError("--engine ray needs the package ray; install nsrl with its extra: nsrl[cluster]")


@dataclass(frozen=True)
class Surroundings:
    """What a task finds as its driver has it.

    Attributes:
        folder: the working directory, which relative paths of cells begin at.
        marker: a file in the folder that all machines share.
        environment: variables that are set.
        nsrl: the driver's version.
    """

    folder: str
    marker: str
    environment: dict[str, str]
    nsrl: str

    def enter(self) -> None:
        """Be where the driver is.

        Raises:
            NsrlError: this machine does not see the driver's files, or has another nsrl.
        """
        ours = version("nsrl")
        if ours != self.nsrl:
            raise NsrlError(f"{_machine()} has nsrl {ours}, but the benchmark is nsrl {self.nsrl}'s; install that one")
        os.environ.update(self.environment)
        if not Path(self.marker).is_file() or not Path(self.folder).is_dir():
            raise NsrlError(
                f"{_machine()} does not see {Path(self.marker).parent} of the machine that started the benchmark; "
                "start it in, and give it as --out, a folder that all machines of the cluster share under one path"
            )
        os.chdir(self.folder)


def _machine() -> str:
    from platform import node

    return f"the machine {node()}"


class RayPool(ThreadPoolExecutor):
    """A pool whose threads each wait for one task of a Ray cluster.

    The cluster is the one at RAY_ADDRESS, else one that runs on this machine, else one of this machine alone that is
    started here and ended with the pool (RAY_ADDRESS=local asks for that).

    Args:
        workers: tasks at a time; a cluster with fewer free processors makes the rest wait.
        shared: a folder that all machines have to see; made where it is missing.

    Raises:
        NsrlError: Ray is not installed, or there is no cluster at that address.
    """

    def __init__(self, workers: int, shared: Path):
        require_ray()
        super().__init__(workers, "ray-cell")
        shared.mkdir(parents=True, exist_ok=True)
        self._before = dict(os.environ), signal.getsignal(signal.SIGTERM)
        self._ray = _connect(workers)
        self._marker = shared.absolute() / f".cluster-{uuid.uuid4().hex}"
        self._marker.touch()
        given = {key: os.environ[key] for key in PASSED if key in os.environ}
        self._surroundings = Surroundings(
            os.getcwd(),
            str(self._marker),
            {**given, "OMP_NUM_THREADS": "1", "MPLBACKEND": "Agg"},
            version("nsrl"),
        )
        self._task = self._ray.remote(num_cpus=1, max_retries=RETRIES)(carry_out)
        self._running: set[Any] = set()
        self._lock = threading.Lock()

    def submit(self, function: Callable[..., Any], /, *args: Any, **options: Any) -> Future[Any]:
        """As a process pool's: the function is found by its name, arguments and result are pickled."""
        return super().submit(self._carried_out, pickle.dumps((function, args, options)))

    def interrupt(self) -> None:
        """Raise KeyboardInterrupt in the tasks that run, and drop those that wait."""
        with self._lock:
            for task in self._running:
                self._ray.cancel(task)

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if kind is not None:
            self.interrupt()
        self.shutdown(wait=True, cancel_futures=True)
        self._marker.unlink(missing_ok=True)
        self._ray.shutdown()
        _put_back(*self._before)

    def _carried_out(self, call: bytes) -> Any:
        task = self._task.remote(self._surroundings, call)
        with self._lock:
            self._running.add(task)
        try:
            answer, error = pickle.loads(self._ray.get(task))
        except self._ray.exceptions.TaskCancelledError as cancelled:
            raise NsrlError("the run was stopped with the benchmark") from cancelled
        except self._ray.exceptions.RayError as lost:
            told = next(iter(str(lost).strip().splitlines()), "no reason given")
            raise NsrlError(
                f"Ray lost the run, {1 + RETRIES} times where it was a process that ended: {told}"
            ) from lost
        finally:
            with self._lock:
                self._running.discard(task)
        if error is not None:
            raise error
        return answer


def carry_out(surroundings: Surroundings, call: bytes) -> bytes:
    """In a process of Ray's: call a function, and give back what it returned and what it raised."""
    answer, error = None, None
    try:
        surroundings.enter()
        # not before: what is unpickled imports torch, which reads the environment
        function, args, options = pickle.loads(call)
        import torch

        torch.set_num_threads(1)
        answer = function(*args, **options)
    except Exception as raised:  # the others go on; whoever asked is told
        error = raised
    try:
        return pickle.dumps((answer, error))
    except Exception as raised:  # an exception that holds a lock, a file, a lambda
        told = repr(error) if error is not None else f"its result cannot be sent: {raised!r}"
        return pickle.dumps((None, RuntimeError(told)))


def _put_back(environment: dict[str, str], terminated: Any) -> None:
    """Undo what Ray does to the process that it is used in."""
    for key in set(os.environ) - set(environment):
        del os.environ[key]
    os.environ.update(environment)
    if threading.current_thread() is threading.main_thread():
        signal.signal(signal.SIGTERM, terminated)


def _connect(workers: int) -> Any:
    before = dict(os.environ), signal.getsignal(signal.SIGTERM)
    # Neither reports to Ray's makers nor warnings about accelerators that nobody asked for.
    os.environ.setdefault("RAY_USAGE_STATS_ENABLED", "0")
    os.environ.setdefault("RAY_ACCEL_ENV_VAR_OVERRIDE_ON_ZERO", "0")
    import ray

    address = os.environ.get("RAY_ADDRESS")
    quiet: dict[str, Any] = {"log_to_driver": False, "logging_level": "ERROR", "configure_logging": True}
    if address != "local":
        try:
            ray.init(address=address or "auto", **quiet)
            return ray
        except (ConnectionError, ValueError, RuntimeError) as error:
            if address:
                told = next(iter(str(error).strip().splitlines()), repr(error))
                _put_back(*before)
                raise NsrlError(
                    f"there is no Ray cluster at RAY_ADDRESS={address} ({told}); start one with `ray start --head`, "
                    "or leave the variable out"
                ) from error
    for left in reversed(range(STARTS)):
        try:
            ray.init(address="local", num_cpus=workers, object_store_memory=STORE, include_dashboard=False, **quiet)
            break
        except Exception as error:  # Ray raises it bare where its half a minute has passed
            ray.shutdown()
            if not left:
                _put_back(*before)
                told = next(iter(str(error).strip().splitlines()), repr(error))
                raise NsrlError(f"Ray cannot be started on this machine: {told}") from error
    return ray
