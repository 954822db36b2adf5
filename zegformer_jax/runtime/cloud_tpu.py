"""Accelerators that this machine lacks, described so that programs can be compiled for them."""

import importlib.util
import os
import re
from collections.abc import Sequence
from dataclasses import dataclass

from jax.experimental import topologies

from zegformer_jax.runtime.errors import MissingFile, UserError

# Else libtpu asks the cloud which machine it is on, logs that nobody answers, and serves one
# process at a time.
ENVIRONMENT = {
    "TPU_SKIP_MDS_QUERY": "1",
    "TPU_ACCELERATOR_TYPE": "v5litepod-4",  # any, if it is none of this machine
    "TPU_WORKER_HOSTNAMES": "localhost",
    "ALLOW_MULTIPLE_LIBTPU_LOAD": "1",
    "TPU_MIN_LOG_LEVEL": "3",
    "TPU_STDERR_LOG_LEVEL": "3",
}
ONE_CHIP = re.compile(r"1(x1)+")  # libtpu expects four chips a host if it is not told
TOPOLOGY_FORM = "GENERATION:SHAPE, such as v5e:2x2, v5e:4x4, v4:2x2x1, v5p:2x2x1 or v6e:2x4"


@dataclass(frozen=True)
class Chip:
    """Published figures of one chip.

    Attributes:
        flops: Peak bfloat16 operations per second.
        memory: High-bandwidth memory in bytes.
        bandwidth: Bytes per second of that memory.
        interconnect: Bytes per second that a chip sends to the others.
        clock: Cycles per second.
    """

    flops: float
    memory: float
    bandwidth: float
    interconnect: float
    clock: float


# Cloud TPU documentation, "System architecture" of each version, per chip. The clock follows from
# the peak and the matrix units' size; v6e's is not published, and v5p's is assumed.
CHIPS = {
    "v4": Chip(275e12, 32 * 2**30, 1228e9, 300e9, 1.05e9),
    "v5e": Chip(197e12, 16 * 2**30, 819e9, 200e9, 1.5e9),
    "v5p": Chip(459e12, 95 * 2**30, 2765e9, 600e9, 1.75e9),
    "v6e": Chip(918e12, 32 * 2**30, 1640e9, 448e9, 1.75e9),
}


@dataclass(frozen=True)
class Topology:
    """A slice of TPU chips.

    Attributes:
        name: Its name, such as `v5e:2x2`.
        chip: Figures of a chip.
        devices: Devices to compile for, one per chip.
    """

    name: str
    chip: Chip
    devices: Sequence

    @property
    def host_devices(self) -> list:
        """The devices of the first host."""
        first = min(device.process_index for device in self.devices)
        return [device for device in self.devices if device.process_index == first]


def open_topology(name: str) -> Topology:
    """Describes a slice of TPU chips by libtpu, which needs no TPU.

    Args:
        name: libtpu's name of the slice, `v5e:4x4`.

    Raises:
        MissingFile: libtpu is not installed.
        UserError: libtpu knows no such slice.
    """
    version, _, shape = name.partition(":")
    if version not in CHIPS or not shape:
        raise UserError(f"--topology={name}: give {TOPOLOGY_FORM}")
    options = {"chips_per_host_bounds": (1, 1, 1)} if ONE_CHIP.fullmatch(shape) else {}
    if version == "v4":
        options["chip_config_name"] = "megacore"  # both cores of a chip as one device, as in v5p
    for variable, value in ENVIRONMENT.items():
        os.environ.setdefault(variable, value)
    if not has_libtpu():
        raise MissingFile(
            "libtpu is not installed: ./run.sh compile installs it, or pip install libtpu"
        )
    try:
        found = topologies.get_topology_desc(name, "tpu", **options)
    except RuntimeError as error:
        reason = str(error).partition("\n")[0]
        raise UserError(f"--topology={name}: {reason}; give {TOPOLOGY_FORM}") from error
    return Topology(name, CHIPS[version], found.devices)


def has_libtpu() -> bool:
    """Returns True if libtpu is installed, or `TPU_LIBRARY_PATH` names it."""
    return "TPU_LIBRARY_PATH" in os.environ or importlib.util.find_spec("libtpu") is not None
