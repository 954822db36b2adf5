"""Batches that are made and sent to the devices ahead of their step."""

from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor

import jax
import numpy as np

from zegformer_jax.runtime.mesh import to_devices
from zegformer_jax.training.objective import Batch


def prefetch(
    batches: Iterator[dict[str, np.ndarray]], mesh: jax.sharding.Mesh
) -> Iterator[tuple[Batch, np.ndarray | None]]:
    """Makes each batch and sends it to the devices while they compute the step before.

    Yields:
        A batch on the devices, and its `index` on the host if it has one.
    """

    def read() -> tuple[Batch, np.ndarray | None] | None:
        batch = next(batches, None)
        if batch is None:
            return None
        arrays = {name: array for name, array in batch.items() if name != "index"}
        return to_devices(arrays, mesh), batch.get("index")

    with ThreadPoolExecutor(max_workers=1) as thread:
        following = thread.submit(read)
        while (batch := following.result()) is not None:
            following = thread.submit(read)
            yield batch
