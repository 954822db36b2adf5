"""Meshes of devices and the shardings of arrays on them."""

import math
from collections.abc import Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import AxisType, Mesh, NamedSharding, PartitionSpec

from zegformer_jax.runtime.errors import UserError

LEAST_SHARDED = 2**14  # elements; smaller arrays are replicated


def make_mesh(devices: Sequence[jax.Device] | None = None, model: int = 1) -> Mesh:
    """Makes a (data, model) mesh.

    Args:
        devices: Devices; None takes all of all processes.
        model: Size of the axis `model`: devices that share the rows of a batch. Batches are split
            over the axis `data`, of size devices / model.

    Raises:
        UserError: `model` does not divide the number of devices.
    """
    devices = jax.devices() if devices is None else devices
    if model < 1 or len(devices) % model:
        raise UserError(f"sharding.model: {model} does not divide {len(devices)} devices")
    return jax.make_mesh(
        (len(devices) // model, model),
        ("data", "model"),
        axis_types=(AxisType.Auto, AxisType.Auto),
        devices=devices,
    )


def describe_devices() -> str:
    """Returns a line on the devices of all processes."""
    kinds = sorted({device.device_kind for device in jax.devices()})
    text = f"devices: {jax.device_count()} x {', '.join(kinds)}"
    processes = jax.process_count()
    return text if processes == 1 else f"{text}, in {processes} processes"


def make_local_mesh() -> Mesh:
    """Makes a mesh along `data` of this process's devices."""
    return make_mesh(jax.local_devices())


def replicated(mesh: Mesh) -> NamedSharding:
    """Returns the sharding that puts the whole array on every device."""
    return NamedSharding(mesh, PartitionSpec())


def split_batch(mesh: Mesh) -> NamedSharding:
    """Returns the sharding that splits the first axis over `data`."""
    return NamedSharding(mesh, PartitionSpec("data"))


def split_parts(mesh: Mesh) -> NamedSharding:
    """Returns the sharding that splits the second axis over `data`.

    It is for the parts of a batch, stacked along the first axis.
    """
    return NamedSharding(mesh, PartitionSpec(None, "data"))


def shard_arrays(tree: Any, mesh: Mesh, axis: str) -> Any:
    """Returns the shardings of a training state's arrays, by one rule for all arrays.

    An array of at least `LEAST_SHARDED` elements is split along its longest side that is divisible
    by the size of the mesh's axis; all others are replicated. Parameters, their averages and the
    optimiser's moments have the same shapes, hence the same shardings.

    Args:
        tree: Arrays or their shapes.
        mesh: Mesh of the devices.
        axis: `data`, which is FSDP (Zhao et al., 2023), or `model`; "" replicates everything.

    Raises:
        UserError: There is no such axis.
    """
    if axis not in ("", *mesh.axis_names):
        raise UserError(f"sharding.params: no axis '{axis}'; choose '', data or model")

    def rule(array: Any) -> NamedSharding:
        sides = [x if axis and x % mesh.shape[axis] == 0 else 0 for x in array.shape]
        if math.prod(array.shape) < LEAST_SHARDED or not any(sides):
            return replicated(mesh)
        longest = max(range(len(sides)), key=sides.__getitem__)
        return NamedSharding(mesh, PartitionSpec(*[None] * longest, axis))

    return jax.tree.map(rule, tree)


def to_devices(batch: Mapping[str, Any], mesh: Mesh) -> dict[str, Any]:
    """Makes global arrays, split over `data`, of the parts of a batch that the processes hold.

    Args:
        batch: This process's arrays by name, or trees of arrays; one row per example.
        mesh: Mesh of the devices.

    Raises:
        UserError: The batch does not divide by the number of devices.
    """
    sharding, devices = split_batch(mesh), mesh.shape["data"]
    processes = len({device.process_index for device in mesh.devices.flat})

    def join(array: np.ndarray) -> jax.Array:
        if len(array) * processes % devices:
            raise UserError(
                f"a batch of {len(array) * processes} does not divide by {devices} devices: "
                "change input.batch_size or eval.batch_size"
            )
        return jax.make_array_from_process_local_data(sharding, array)

    return jax.tree.map(join, dict(batch))


def replicate(tree: Any, mesh: Mesh) -> Any:
    """Puts every array on every device; each process passes the same arrays."""
    return place(tree, jax.tree.map(lambda _: replicated(mesh), tree))


def place(tree: Any, shardings: Any) -> Any:
    """Puts arrays on devices by their shardings; each process passes the same whole arrays."""

    def place_one(array: Any, sharding: NamedSharding) -> jax.Array:
        if sharding.is_fully_addressable:
            return jax.device_put(array, sharding)
        if jnp.issubdtype(array.dtype, jax.dtypes.prng_key):
            return jax.random.wrap_key_data(place_one(jax.random.key_data(array), sharding))
        host = np.asarray(array)
        return jax.make_array_from_callback(host.shape, sharding, lambda index: host[index])

    return jax.tree.map(place_one, tree, shardings)


def to_host(tree: Any, mesh: Mesh) -> Any:
    """Returns whole NumPy arrays of sharded ones; every process must call it."""
    whole = jax.jit(lambda x: x, out_shardings=replicated(mesh))(tree)
    return jax.tree.map(lambda x: np.asarray(x.addressable_data(0)), whole)
