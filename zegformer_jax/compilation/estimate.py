"""Estimates of a program's memory and time on a slice of chips, by the compiler's figures."""

import collections
import dataclasses
import re
import time
from typing import Any

import jax

from zegformer_jax.compilation import hlo
from zegformer_jax.compilation.costs import Operation, operations
from zegformer_jax.runtime.cloud_tpu import Chip, Topology
from zegformer_jax.runtime.compiled import peak_bytes

COSTLIEST = 10  # operations that are listed
# "Ran out of memory in memory space hbm. Used 20.57G of 15.75G hbm.", or "Ran out of memory on HBM,
# the total memory required for HLO temporaries (230.89G) exceeds available HBM (15.75G)."
_OUT_OF_MEMORY = re.compile(
    r"(?:Used |\()([\d.]+)([KMGT])(?: of |\) exceeds available HBM \()([\d.]+)([KMGT])"
)
_UNITS = {"K": 2**10, "M": 2**20, "G": 2**30, "T": 2**40}
PACKAGE = "zegformer_jax/"  # in the paths of source lines


@dataclasses.dataclass(frozen=True)
class Costly:
    """Operations that one source line made.

    Attributes:
        source: The innermost line of this project, `file:line function`.
        opcode: XLA's name of the costliest of the operations.
        seconds: Their estimated time.
        count: Their number.
    """

    source: str
    opcode: str
    seconds: float
    count: int


@dataclasses.dataclass(frozen=True)
class Estimate:
    """The compiler's figures of a program, for each chip.

    Attributes:
        program: `train` or `evaluate`.
        topology: Name of the slice.
        chips: Chips that run the program together.
        images: Images of one run of the program, on all chips.
        memory: Bytes at the peak.
        available: Bytes that a chip has.
        compile_seconds: How long compiling took here.
        flops: Operations of matrix products and convolutions.
        bytes: Traffic with the main memory.
        seconds: Estimated time: the compiler's cycles and the communication, at least the time
            that the traffic takes.
        communication: Share of `seconds` that is communication.
        peak: Bytes, operations and seconds relate by this chip's figures.
        collectives: Bytes by kind of communication.
        costliest: The costliest source lines.
        unbounded: Source lines of loops whose length is unknown.
    """

    program: str
    topology: str
    chips: int
    images: int
    memory: float
    available: float
    compile_seconds: float
    flops: float
    bytes: float
    seconds: float
    communication: float
    peak: Chip
    collectives: dict[str, float]
    costliest: list[Costly]
    unbounded: list[str]

    @property
    def fits(self) -> bool:
        """True if the program fits into a chip's memory."""
        return self.memory <= self.available

    @property
    def images_per_second(self) -> float:
        """Estimated images per second of all chips."""
        return self.images / self.seconds

    @property
    def share_of_peak(self) -> float:
        """Operations per estimated second as a share of the chip's peak."""
        return self.flops / self.seconds / self.peak.flops

    def as_json(self) -> dict[str, Any]:
        """Returns all fields and derived figures as JSON values."""
        derived = ("fits", "images_per_second", "share_of_peak")
        return dataclasses.asdict(self) | {name: getattr(self, name) for name in derived}


class DoesNotFit(Exception):
    """The compiler found no way to fit a program into a chip's memory.

    Attributes:
        used: Bytes that it needs.
        available: Bytes that there are.
    """

    def __init__(self, used: float, available: float):
        """Keeps both figures."""
        super().__init__(f"{used / 2**30:.2f} GiB of {available / 2**30:.2f} GiB")
        self.used, self.available = used, available


def estimate(
    name: str, lowered: jax.stages.Lowered, topology: Topology, chips: int, images: int
) -> Estimate:
    """Compiles a program and estimates its costs.

    Args:
        name: `train` or `evaluate`.
        lowered: The program.
        topology: The slice that it is lowered for.
        chips: Chips that run it together.
        images: Images of one run.

    Raises:
        DoesNotFit: It needs more memory than a chip has.
    """
    start = time.perf_counter()
    try:
        compiled = lowered.compile()
    except jax.errors.JaxRuntimeError as error:
        if found := _OUT_OF_MEMORY.search(str(error)):
            used, used_unit, available, unit = found.groups()
            raise DoesNotFit(
                float(used) * _UNITS[used_unit], float(available) * _UNITS[unit]
            ) from error
        raise
    seconds = time.perf_counter() - start
    program = hlo.parse(compiled.as_text())
    costs = operations(program)
    chip = topology.chip
    communication = sum(_seconds(x, chip) * x.times for x in costs if x.collective)
    traffic = sum(x.bytes * x.times for x in costs)
    total = max(sum(_seconds(x, chip) * x.times for x in costs), traffic / chip.bandwidth)
    collectives: collections.Counter[str] = collections.Counter()
    for operation in costs:
        if operation.collective:
            collectives[operation.collective] += operation.instruction.bytes * operation.times
    return Estimate(
        program=name,
        topology=topology.name,
        chips=chips,
        images=images,
        memory=peak_bytes(compiled),
        available=chip.memory,
        compile_seconds=seconds,
        flops=sum(x.flops * x.times for x in costs),
        bytes=traffic,
        seconds=total,
        communication=communication / total,
        peak=chip,
        collectives=dict(collectives),
        costliest=_costliest(program, costs, chip),
        unbounded=sorted({_source(program, x) for x in costs if not x.known}),
    )


def _seconds(operation: Operation, chip: Chip) -> float:
    """Estimated time of an operation, once; 0 for copies that run beside others."""
    if operation.collective:
        # A ring sends what is reduced twice: the sums around, and the result.
        rounds = 2 if operation.collective == "all-reduce" else 1
        return rounds * operation.instruction.bytes / chip.interconnect
    if operation.instruction.opcode.endswith("-start"):
        return 0.0
    if operation.cycles is not None:
        return operation.cycles / chip.clock
    return max(operation.flops / chip.flops, operation.bytes / chip.bandwidth)


def _costliest(program: hlo.Program, costs: list[Operation], chip: Chip) -> list[Costly]:
    by_source: dict[str, list[Operation]] = collections.defaultdict(list)
    for operation in costs:
        by_source[_source(program, operation)].append(operation)

    def of_line(source: str, found: list[Operation]) -> Costly:
        largest = max(found, key=lambda x: _seconds(x, chip) * x.times)
        seconds = sum(_seconds(x, chip) * x.times for x in found)
        return Costly(source, largest.instruction.opcode, seconds, len(found))

    lines = [of_line(source, found) for source, found in by_source.items()]
    return sorted(lines, key=lambda x: -x.seconds)[:COSTLIEST]


def _source(program: hlo.Program, operation: Operation) -> str:
    """Returns the innermost line of this project, else the innermost line."""
    lines = program.source(operation.instruction)
    own = [line for line in lines if PACKAGE in line and "site-packages" not in line]
    line = (own or lines or ("unknown",))[0]
    return line[line.rfind(PACKAGE) + len(PACKAGE) :] if PACKAGE in line else line
