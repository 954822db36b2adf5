"""Costs of a compiled program: operations, traffic and cycles, with loops counted.

XLA's own cost analysis counts the body of a loop once.
"""

import math
import re
from collections.abc import Iterator, Mapping
from dataclasses import dataclass

from zegformer_jax.compilation.hlo import Instruction, Program

COLLECTIVES = ("all-reduce", "all-gather", "reduce-scatter", "collective-permute", "all-to-all")
# They move no data: names, views and the halves of what is counted elsewhere.
FREE = {
    "parameter", "constant", "tuple", "get-tuple-element", "bitcast", "after-all", "iota",
    "partition-id", "replica-id", "opt-barrier",
}  # fmt: skip
_CYCLES = re.compile(r'"estimated_cycles":"(\d+)"')
_WINDOW = re.compile(r"window=\{([^}]*)\}")
_LABELS = re.compile(r"dim_labels=(\w+)_(\w+)->(\w+)")


@dataclass(frozen=True)
class Operation:
    """An instruction that runs, and its cost each time.

    Attributes:
        instruction: The instruction.
        times: How often it runs.
        known: False if it is in a loop of unknown length.
        cycles: The compiler's estimate; None if it has none.
        flops: Operations of its matrix products and convolutions.
        bytes: Traffic with the chip's main memory.
    """

    instruction: Instruction
    times: int
    known: bool
    cycles: float | None
    flops: float
    bytes: float

    @property
    def collective(self) -> str | None:
        """Its kind of communication; None if it is none."""
        opcode = self.instruction.opcode.removesuffix("-start")
        return opcode if opcode in COLLECTIVES else None


def operations(program: Program) -> list[Operation]:
    """Returns what runs when a program runs, loops and branches taken apart.

    Of a branch the costliest side counts.

    Args:
        program: The program.
    """
    return list(_run(program, program.entry, 1, True))


def _run(program: Program, name: str, times: int, known: bool) -> Iterator[Operation]:
    instructions = program.computations[name]
    for instruction in instructions.values():
        if instruction.opcode == "while":
            trips, certain = program.trips(instruction)
            (body,) = instruction.called("body")
            yield from _run(program, body, times * trips, known and certain)
        elif instruction.opcode == "conditional":
            sides = instruction.called("branch_computations") or [
                *instruction.called("true_computation"), *instruction.called("false_computation")
            ]  # fmt: skip
            yield from max((list(_run(program, x, times, known)) for x in sides), key=_weight)
        elif instruction.opcode == "call":
            (called,) = instruction.called("to_apply")
            yield from _run(program, called, times, known)
        elif instruction.opcode not in FREE and not instruction.opcode.endswith("-done"):
            cycles = _CYCLES.search(instruction.text)
            yield Operation(
                instruction,
                times,
                known,
                float(cycles[1]) if cycles else None,
                _flops(program, instruction, instructions),
                _traffic(program, instruction, instructions),
            )


def _weight(side: list[Operation]) -> tuple[float, float]:
    cycles = sum((x.cycles or 0) * x.times for x in side)
    return cycles, sum(x.bytes * x.times for x in side)


def _flops(program: Program, instruction: Instruction, around: Mapping[str, Instruction]) -> float:
    """Operations of the convolutions in an instruction; TPUs compute all products by these."""
    if instruction.opcode == "convolution":
        return _convolution(instruction, around)
    if instruction.opcode == "dot":
        return _dot(instruction, around)
    total = 0.0
    for name in instruction.called("calls"):
        inside = program.computations[name]
        total += sum(_flops(program, x, inside) for x in inside.values())
    return total


def _dot(instruction: Instruction, around: Mapping[str, Instruction]) -> float:
    found = re.search(r"lhs_contracting_dims=\{([\d,]*)\}", instruction.text)
    sides = around[instruction.operands[0]].arrays[0].sides
    contracted = math.prod(sides[int(axis)] for axis in found[1].split(",") if axis)
    return 2.0 * math.prod(instruction.arrays[0].sides) * contracted


def _convolution(instruction: Instruction, around: Mapping[str, Instruction]) -> float:
    """Counts the multiplications with numbers that are not padding, twice."""
    image, kernel = (around[name].arrays[0].sides for name in instruction.operands[:2])
    output = instruction.arrays[0].sides
    labels = _LABELS.search(instruction.text)
    of_image, of_kernel, of_output = labels[1], labels[2], labels[3]
    fields = dict(x.split("=") for x in (_WINDOW.search(instruction.text) or ["", ""])[1].split())
    count = output[of_output.index("b")] * output[of_output.index("f")]
    count *= kernel[of_kernel.index("i")]
    for axis, label in enumerate(sorted(set(of_image) & set("0123456789"))):
        count *= _pairs(
            image[of_image.index(label)],
            output[of_output.index(label)],
            kernel[of_kernel.index(label)],
            {name: values.split("x")[axis] for name, values in fields.items()},
        )
    return 2.0 * count


def _pairs(image: int, output: int, kernel: int, window: Mapping[str, str]) -> int:
    """Pairs of a place in the output and one in the kernel that meet a number of the image."""
    stride, spread = int(window.get("stride", 1)), int(window.get("rhs_dilate", 1))
    gap, before = int(window.get("lhs_dilate", 1)), int(window.get("pad", "0_0").split("_")[0])
    last = (image - 1) * gap

    def meets(place: int) -> bool:
        return 0 <= place <= last and place % gap == 0

    return sum(
        meets(row * stride + tap * spread - before)
        for row in range(output)
        for tap in range(kernel)
    )


def _traffic(
    program: Program, instruction: Instruction, around: Mapping[str, Instruction]
) -> float:
    """Bytes that an instruction reads and writes in the chip's main memory."""
    if instruction.opcode in ("custom-call", "copy-start", "dynamic-slice", "slice"):
        return 2 * _main_memory(instruction)
    total = _written(program, instruction)
    for place, name in enumerate(instruction.operands):
        operand = around.get(name)
        if operand is not None and len(operand.arrays) == 1 and not operand.arrays[0].on_chip:
            total += _read(program, instruction, place, operand.bytes)
    return total


def _main_memory(instruction: Instruction) -> float:
    return sum(array.bytes for array in instruction.arrays if not array.on_chip)


def _read(program: Program, instruction: Instruction, place: int, whole: float) -> float:
    """Bytes that an instruction reads of the operand at a place.

    Of one that is only sliced these are the slices; one that is overwritten is not read.
    """
    if instruction.opcode == "dynamic-slice" and place == 0:
        return instruction.bytes
    if instruction.opcode == "dynamic-update-slice" and place == 0:
        return 0.0
    if instruction.opcode != "fusion":
        return whole
    (name,) = instruction.called("calls")
    inside = program.computations[name]
    parameter = next(x for x in inside.values() if f" parameter({place})" in x.text)
    reads = [
        _read(program, user, user.operands.index(parameter.name), whole)
        for user in inside.values()
        if parameter.name in user.operands
    ]
    return min(sum(reads), whole)


def _written(program: Program, instruction: Instruction) -> float:
    """Bytes that an instruction writes; of an array that is updated in place, the update."""
    if instruction.opcode == "fusion" and len(instruction.arrays) == 1:
        (name,) = instruction.called("calls")
        inside = program.computations[name]
        (root,) = (x for x in inside.values() if x.is_root)
        while root.opcode == "bitcast":
            root = inside[root.operands[0]]
        if root.opcode == "dynamic-update-slice" and not instruction.arrays[0].on_chip:
            return inside[root.operands[1]].bytes
    return _main_memory(instruction)
