"""The mesh of devices and what lies where on it."""

import math
from collections.abc import Mapping
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import AxisType, Mesh, NamedSharding, PartitionSpec

from zegformer_jax.runtime.errors import UserError

LEAST_SHARDED = 2**14  # numbers; what is smaller is whole on every device


def make_mesh(devices: int | None = None, model: int = 1) -> Mesh:
    """A (data, model) mesh of all devices, or of the first few: batches are split over `data`.

    Args:
        devices: how many; None: all.
        model: how many of them share a batch's rows; the others' number is what `data` has.

    Raises:
        UserError: `model` does not divide the number of devices.
    """
    count = devices or jax.device_count()
    if model < 1 or count % model:
        raise UserError(f"sharding.model: {model} does not divide {count} devices")
    return jax.make_mesh(
        (count // model, model),
        ("data", "model"),
        axis_types=(AxisType.Auto, AxisType.Auto),
        devices=jax.devices()[:count],
    )


def make_local_mesh(count: int | None = None) -> Mesh:
    """A mesh of this process's devices alone, or of the first few, along `data`."""
    devices = jax.local_devices()[:count]
    types = (AxisType.Auto, AxisType.Auto)
    return jax.make_mesh((len(devices), 1), ("data", "model"), axis_types=types, devices=devices)


def replicated(mesh: Mesh) -> NamedSharding:
    """Every device holds the whole array."""
    return NamedSharding(mesh, PartitionSpec())


def split_batch(mesh: Mesh) -> NamedSharding:
    """The first axis is split over `data`."""
    return NamedSharding(mesh, PartitionSpec("data"))


def split_parts(mesh: Mesh) -> NamedSharding:
    """The second axis is split over `data`: of parts of a batch, stacked along the first."""
    return NamedSharding(mesh, PartitionSpec(None, "data"))


def shard_arrays(tree: Any, mesh: Mesh, axis: str) -> Any:
    """The shardings of a training state's arrays, by one rule for all of them.

    An array of at least `LEAST_SHARDED` numbers is split along its longest side that the mesh's
    axis divides; others are whole everywhere. Parameters, their averages and the optimiser's
    moments have the same shapes and so lie alike.

    Args:
        tree: arrays, or their shapes.
        mesh: of the devices.
        axis: `data`, which is FSDP (Zhao et al., 2023), or `model`; "" replicates everything.

    Raises:
        UserError: there is no such axis.
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
    """Joins the parts of a batch that the mesh's processes have to global arrays.

    They are split over `data`.

    Args:
        batch: Arrays with a row for each example, or trees of such arrays, by name.
        mesh: The mesh.

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
    """Puts every leaf whole on every device; each process has them all."""
    return place(tree, jax.tree.map(lambda _: replicated(mesh), tree))


def place(tree: Any, shardings: Any) -> Any:
    """Lays arrays out by their shardings; each process has them all, and keeps its parts."""

    def place_one(array: Any, sharding: NamedSharding) -> jax.Array:
        if sharding.is_fully_addressable:
            return jax.device_put(array, sharding)
        if jnp.issubdtype(array.dtype, jax.dtypes.prng_key):
            return jax.random.wrap_key_data(place_one(jax.random.key_data(array), sharding))
        host = np.asarray(array)
        return jax.make_array_from_callback(host.shape, sharding, lambda index: host[index])

    return jax.tree.map(place_one, tree, shardings)


def to_host(tree: Any, mesh: Mesh) -> Any:
    """Gives every array whole as NumPy's, wherever its parts lie; all processes take part."""
    whole = jax.jit(lambda x: x, out_shardings=replicated(mesh))(tree)
    return jax.tree.map(lambda x: np.asarray(x.addressable_data(0)), whole)
