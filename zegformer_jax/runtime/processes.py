"""Several processes that train or evaluate together, and being asked to stop."""

import os
import signal
import threading
from collections.abc import Mapping
from typing import Any

import jax
import numpy as np
from jax.experimental import multihost_utils

from zegformer_jax.runtime.errors import UserError

# What tells how many processes there are: set by hand, by SLURM's srun, by Open MPI.
COUNTS = ("JAX_NUM_PROCESSES", "SLURM_STEP_NUM_TASKS", "OMPI_COMM_WORLD_SIZE")
TPU_HOSTS = "TPU_WORKER_HOSTNAMES"  # of a Cloud TPU slice, by commas
BY_HAND = ("JAX_COORDINATOR_ADDRESS", "JAX_NUM_PROCESSES", "JAX_PROCESS_ID")


def count_processes(environment: Mapping[str, str]) -> int:
    """How many processes the environment speaks of; 1 where it says nothing."""
    counts = [int(environment[name]) for name in COUNTS if environment.get(name, "").isdecimal()]
    slice_hosts = [host for host in environment.get(TPU_HOSTS, "").split(",") if host]
    return max([1, len(slice_hosts), *counts])


def join(environment: Mapping[str, str] = os.environ) -> None:
    """Joins the other processes, where the environment says that there are any.

    On a TPU slice and under SLURM or Open MPI nothing needs to be set. Elsewhere each process gets
    JAX_COORDINATOR_ADDRESS (host:port of the first), JAX_NUM_PROCESSES and JAX_PROCESS_ID.

    Raises:
        UserError: only a part of these is set.
        RuntimeError: the others did not come in time.
    """
    given = [name for name in BY_HAND if environment.get(name)]
    if given and len(given) < len(BY_HAND):
        missing = ", ".join(name for name in BY_HAND if name not in given)
        raise UserError(f"several processes: {', '.join(given)} is set, but not {missing}")
    if count_processes(environment) == 1 or jax.distributed.is_initialized():
        return
    if not given:
        jax.distributed.initialize()
        return
    address, count, place = (environment[name] for name in BY_HAND)
    jax.distributed.initialize(address, int(count), int(place))


def is_first() -> bool:
    """Whether this process is the one that writes and prints."""
    return jax.process_index() == 0


def wait_for_all(reason: str) -> None:
    """Waits until every process is here."""
    multihost_utils.sync_global_devices(reason)


def sum_over_processes(tree: Any) -> Any:
    """Returns the sum of every process's tree of NumPy arrays, exact in 64 bits.

    Args:
        tree: Arrays, or NumPy numbers, of the same structure, shapes and dtypes in all processes.
    """
    if jax.process_count() == 1:
        return tree
    # The bytes travel, as devices may have no 64-bit numbers.
    parts = jax.tree.map(lambda x: np.ascontiguousarray(x).reshape(-1).view(np.uint8), tree)
    gathered = multihost_utils.process_allgather(parts)

    def add(rows: np.ndarray, like: np.ndarray) -> np.ndarray:
        numbers = np.ascontiguousarray(rows).view(like.dtype)
        return numbers.reshape(len(rows), *np.shape(like)).sum(axis=0)

    return jax.tree.map(add, gathered, tree)


class StopRequest:
    """Whether the run was asked to stop (SIGTERM, as at a preemption); a context.

    Of several processes all learn of it at the same step, whichever got the signal.
    """

    def __init__(self) -> None:
        """Knows of nothing yet."""
        self._asked = threading.Event()
        self._before: Any = None

    def __enter__(self) -> "StopRequest":
        """Begins to listen, where signals can be listened to: in a process's main thread."""
        if jax.process_count() == 1 and threading.current_thread() is threading.main_thread():
            self._before = signal.signal(signal.SIGTERM, lambda *_: self._asked.set())
        return self

    def __exit__(self, *_: object) -> None:
        """Leaves signals to who had them before."""
        if self._before is not None:
            signal.signal(signal.SIGTERM, self._before)

    def asked(self) -> bool:
        """Whether this process got the signal; where it is one of several it does not listen."""
        return self._asked.is_set()

    def came(self, step: int) -> bool:
        """Whether to stop after this step."""
        if jax.process_count() == 1:
            return self._asked.is_set()
        return multihost_utils.reached_preemption_sync_point(step)
