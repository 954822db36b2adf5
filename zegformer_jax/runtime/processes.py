"""Processes that train or evaluate together, and requests to stop them."""

import os
import signal
import threading
from collections.abc import Mapping
from typing import Any

import jax
import numpy as np
from jax.experimental import multihost_utils

from zegformer_jax.runtime.cloud_tpu import has_libtpu
from zegformer_jax.runtime.errors import UserError

# Variables with the number of processes: set by the user, SLURM's srun and Open MPI.
COUNTS = ("JAX_NUM_PROCESSES", "SLURM_STEP_NUM_TASKS", "OMPI_COMM_WORLD_SIZE")
TPU_HOSTS = "TPU_WORKER_HOSTNAMES"  # hosts of a Cloud TPU slice, separated by commas
BY_HAND = ("JAX_COORDINATOR_ADDRESS", "JAX_NUM_PROCESSES", "JAX_PROCESS_ID")


def count_processes(environment: Mapping[str, str]) -> int:
    """Returns the number of processes that the environment variables name, 1 if they name none."""
    counts = [int(environment[name]) for name in COUNTS if environment.get(name, "").isdecimal()]
    slice_hosts = [host for host in environment.get(TPU_HOSTS, "").split(",") if host]
    return max([1, len(slice_hosts), *counts])


def count_slice_hosts(environment: Mapping[str, str]) -> int:
    """Returns the number of hosts of the Cloud TPU slice that this machine is in, 1 if in none.

    A Cloud TPU VM has it in its metadata; only in Kubernetes is it in an environment variable.
    """
    if environment.get("JAX_PLATFORMS") == "cpu" or not has_libtpu():
        return 1
    # jax asks the same when it initialises, and has no public function for it.
    from jax._src.clusters.cloud_tpu_cluster import GceTpuCluster

    return GceTpuCluster.get_process_count() if GceTpuCluster.is_env_present() else 1


def join(environment: Mapping[str, str] = os.environ) -> None:
    """Connects to the other processes, if the environment variables or a TPU slice name any.

    On a TPU slice and under SLURM or Open MPI nothing needs to be set. Elsewhere each process needs
    JAX_COORDINATOR_ADDRESS (host:port of the first), JAX_NUM_PROCESSES and JAX_PROCESS_ID.

    Args:
        environment: The environment variables.

    Raises:
        UserError: Only a part of these is set, or one that is no number.
        RuntimeError: The others did not connect in time.
    """
    given = [name for name in BY_HAND if environment.get(name)]
    if given and len(given) < len(BY_HAND):
        missing = ", ".join(name for name in BY_HAND if name not in given)
        raise UserError(f"several processes: {', '.join(given)} is set, but not {missing}")
    if jax.distributed.is_initialized():
        return
    if count_processes(environment) == 1 and count_slice_hosts(environment) == 1:
        return
    if not given:
        jax.distributed.initialize()
        return
    address, *numbers = (environment[name] for name in BY_HAND)
    for name, number in zip(BY_HAND[1:], numbers, strict=True):
        if not number.isdecimal():
            raise UserError(f"{name} is '{number}': set it to a whole number")
    jax.distributed.initialize(address, *map(int, numbers))


def is_first() -> bool:
    """Returns True in the process that writes and prints."""
    return jax.process_index() == 0


def wait_for_all(reason: str) -> None:
    """Waits until every process makes this call, with the same `reason`."""
    multihost_utils.sync_global_devices(reason)


def sum_over_processes(tree: Any) -> Any:
    """Returns the sum of every process's tree of NumPy arrays, exact in 64 bits.

    Args:
        tree: Arrays, or NumPy numbers, of the same structure, shapes and dtypes in all processes.
    """
    if jax.process_count() == 1:
        return tree
    # Bytes are sent, as devices may have no 64-bit numbers.
    parts = jax.tree.map(lambda x: np.ascontiguousarray(x).reshape(-1).view(np.uint8), tree)
    gathered = multihost_utils.process_allgather(parts)

    def add(rows: np.ndarray, like: np.ndarray) -> np.ndarray:
        numbers = np.ascontiguousarray(rows).view(like.dtype)
        return numbers.reshape(len(rows), *np.shape(like)).sum(axis=0)

    return jax.tree.map(add, gathered, tree)


class StopRequest:
    """Context that receives requests to stop: SIGTERM, as before a preemption.

    If one of several processes gets the signal, all of them stop after the same step.
    """

    def __init__(self) -> None:
        """Makes it without a request; signals are received inside the context."""
        self._asked = threading.Event()
        self._before: Any = None

    def __enter__(self) -> "StopRequest":
        """Starts to handle the signal, which Python allows in the main thread only."""
        if jax.process_count() == 1 and threading.current_thread() is threading.main_thread():
            self._before = signal.signal(signal.SIGTERM, lambda *_: self._asked.set())
        return self

    def __exit__(self, *_: object) -> None:
        """Restores the previous signal handler."""
        if self._before is not None:
            signal.signal(signal.SIGTERM, self._before)

    def asked(self) -> bool:
        """Returns True if this process got the signal; always False if it is one of several."""
        return self._asked.is_set()

    def came(self, step: int) -> bool:
        """Returns True if all processes must stop after this step."""
        if jax.process_count() == 1:
            return self._asked.is_set()
        return multihost_utils.reached_preemption_sync_point(step)
