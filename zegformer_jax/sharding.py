"""The mesh of devices and what lies where on it."""

from collections.abc import Mapping
from typing import Any

import jax
import numpy as np
from jax.sharding import AxisType, Mesh, NamedSharding, PartitionSpec


def make_mesh(devices: int | None = None) -> Mesh:
    """A (data, model) mesh of all devices, or of the first few: batches are split over `data`."""
    count = devices or jax.device_count()
    return jax.make_mesh(
        (count, 1),
        ("data", "model"),
        axis_types=(AxisType.Auto, AxisType.Auto),
        devices=jax.devices()[:count],
    )


def replicated(mesh: Mesh) -> NamedSharding:
    """Every device holds the whole array."""
    return NamedSharding(mesh, PartitionSpec())


def split_batch(mesh: Mesh) -> NamedSharding:
    """The first axis is split over `data`."""
    return NamedSharding(mesh, PartitionSpec("data"))


def to_devices(batch: Mapping[str, np.ndarray], mesh: Mesh) -> dict[str, jax.Array]:
    """Joins the hosts' parts of a batch to global arrays, split over `data`.

    Raises:
        ValueError: the batch does not divide by the number of devices.
    """
    sharding, devices = split_batch(mesh), mesh.shape["data"]
    for name, array in batch.items():
        if len(array) * jax.process_count() % devices:
            raise ValueError(
                f"a batch of {len(array) * jax.process_count()} ({name}) does not divide by "
                f"{devices} devices: change input.batch_size or eval.batch_size"
            )
    return {k: jax.make_array_from_process_local_data(sharding, v) for k, v in batch.items()}


def replicate(tree: Any, mesh: Mesh) -> Any:
    """Puts every leaf whole on every device."""
    return jax.device_put(tree, replicated(mesh))
